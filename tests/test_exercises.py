"""The checks and the grader: right variants are right; stubs, likely mistakes and cheats aren't."""

import csv
import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ddim
import erase
from notebooks.course import cases, checks, grade, submission

pytestmark = pytest.mark.robustness

NOTEBOOKS = Path(grade.__file__).parents[1]
NUMBERS = {name: exercise.number for name, exercise in checks.EXERCISES.items()}
NAMES = {number: name for name, number in NUMBERS.items()}


def module_of(name):
    return importlib.import_module(f"notebooks.course.solutions.solution_{NUMBERS[name][0]}")


@pytest.mark.parametrize("name", NUMBERS)
def test_the_solution_is_right(name):
    solution = getattr(module_of(name), name)
    assert [checks.EXERCISES[name](solution, seed) for seed in range(6)] == ["right"] * 6


def unwritten(*_):
    raise NotImplementedError()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("stub", [lambda *_: ..., unwritten], ids=["ellipsis", "nbgrader's"])
def test_the_stub_is_not(name, stub):
    assert checks.EXERCISES[name](stub) == cases.NOT_YET


@pytest.mark.parametrize("name, what", [(name, what) for name in NUMBERS
                                        for what in checks.EXERCISES[name].mistakes])
def test_a_likely_mistake_is_named(name, what):
    exercise = checks.EXERCISES[name]._replace(forbidden=())  # some mistakes use those functions
    for seed in (0, 3):
        assert exercise(exercise.mistakes[what], seed) == f"wrong: {what}"


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_grader_takes_away_exists(name):
    for forbidden in checks.EXERCISES[name].forbidden:
        module, _, function = forbidden.rpartition(".")
        assert hasattr(importlib.import_module(module), function), forbidden


# ---- answers that students write; each is the source of a function's body

SIGNATURES = {
    name: str(inspect.signature(getattr(module_of(name), name))) for name in NUMBERS
}
SIGNATURES["my_interval"] = "(hits, images)"

DRAW = """
with torch.no_grad():
    predict = ddim.guided_predictor(edited, c, null, 3.0)
    t, x_t = list(ddim.denoise(predict, noise, 50))[k]
    e0, ec = frozen(x_t, t, null), frozen(x_t, t, c)
"""
STEP = """
optimizer.zero_grad()
loss.backward()
optimizer.step()
return loss.item()
"""
LOSS = "loss = (edited(x_t, t, c) - target).square().mean()"
TARGET = "target = e0 - eta * (ec - e0)"


def one_step(target=TARGET, loss=LOSS, step=STEP, draw=DRAW):
    return "\n".join([draw, target, loss, step])


DENOISE = """
abar = ddim.alphas_cumprod()
for k in reversed(range(steps)):
    t = k * (1000 // steps) + 1
    t_prev = {t_prev}
    eps = predict(x_t, t)
    x_0 = (x_t - {share} * eps) / {root}
    x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * eps
    {more}
return {result}
"""


def denoising(t_prev="max(t - 1000 // steps, 0)", share="(1 - abar[t]).sqrt()",
              root="abar[t].sqrt()", more="", result="x_t"):
    return DENOISE.format(t_prev=t_prev, share=share, root=root, more=more, result=result)


SLD = "mu = {mu}\nmu = torch.where({where}, mu, torch.zeros(()))\nreturn {result}"


def sld(mu="(scale * (eps_c - eps_s).abs()).clamp(max=1)", where="eps_c - eps_s < threshold",
        result="mu * (eps_s - eps_null)"):
    return SLD.format(mu=mu, where=where, result=result)


RIGHT = [
    ("1.2", "return abar_t ** 0.5 * x_0 + (1 - abar_t) ** 0.5 * noise"),
    ("1.2", "import math\nreturn math.sqrt(abar_t) * x_0 + math.sqrt(1 - abar_t) * noise"),
    ("1.3", denoising()),
    ("1.3", denoising(t_prev="t - 1000 // steps if k else 0")),
    ("1.3", "for t, t_prev in zip(ddim.timesteps(steps), [*ddim.timesteps(steps)[1:], 0]):\n"
            "    a, b = ddim.alphas_cumprod()[[t, t_prev]]\n"
            "    eps = predict(x_t, torch.tensor([t]))\n"
            "    x_t = b ** 0.5 * (x_t - (1 - a) ** 0.5 * eps) / a ** 0.5 + (1 - b) ** 0.5 * eps\n"
            "return x_t.float()"),
    ("2.2", one_step()),
    ("2.2", one_step("target = erase.esd_target(e0, ec, eta)")),
    ("2.2", one_step("target = (1 + eta) * e0 - eta * ec")),
    ("2.2", one_step(loss="loss = (target - edited(x_t, t, c)).pow(2).mean()")),
    ("2.2", one_step(loss="loss = torch.nn.functional.mse_loss(edited(x_t, t, c), target)")),
    ("2.2", one_step(step="loss.backward()\noptimizer.step()\noptimizer.zero_grad()\nreturn loss")),
    ("2.2", "optimizer.zero_grad()\n" + one_step(step="loss.backward()\noptimizer.step()\n"
                                                  "return float(loss)")),
    ("2.2", one_step(draw=DRAW.replace("with torch.no_grad():", "if True:") +
                     "x_t = x_t.detach()\ne0, ec = e0.detach(), ec.detach()")),
    ("2.2", one_step(draw="predict = ddim.guided_predictor(edited, c, null, guidance=3)\n"
                          "with torch.no_grad():\n"
                          "    for i, (t, x_t) in enumerate(ddim.denoise(predict, noise, 50)):\n"
                          "        if i == k:\n            break\n"
                          "    times = torch.full((len(x_t),), t)\n"
                          "    e0, ec = frozen(x_t, times, null), frozen(x_t, times, c)")),
    ("2.3", "return 'attn2.to_q.' in name"),
    ("2.3", "if 'attn2.to_q' in name:\n    return True"),
    ("2.3", "import re\nreturn re.search(r'attn2\\.to_q\\.', name)"),
    ("2.3", "return name.endswith('attn2.to_q.weight')"),
    ("2.3", "return name.split('.')[-3:-1] == ['attn2', 'to_q']"),
    ("3.2", "z, p, n = 1.96, hits / images, images\n"
            "a = p + z * z / 2 / n\nb = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5\n"
            "return [(a - b) / (1 + z * z / n), (a + b) / (1 + z * z / n)]"),
    ("3.2", "from statistics import NormalDist\nz = torch.tensor(NormalDist().inv_cdf(0.975))\n"
            "p, n = hits / images, images\na = p + z * z / 2 / n\n"
            "b = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5\n"
            "return torch.stack([a - b, a + b]) / (1 + z * z / n)"),
    ("3.3", sld()),
    ("3.3", sld("torch.minimum(torch.ones(()), scale * abs(eps_c - eps_s))",
                where="~(eps_c - eps_s >= threshold)", result="(eps_s - eps_null) * mu")),
    ("3.4", "import math\npairs = list(zip(one, other))\n"
            "k = min(pairs.count((True, False)), pairs.count((False, True)))\n"
            "n = sum(a != b for a, b in pairs)\n"
            "return min(1.0, sum(math.comb(n, i) for i in range(k + 1)) / 2 ** (n - 1))"),
    ("4.2", "e0, ec = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)\n"
            "d = ec - e0\ngoal = ec.clone()\nbig = d.abs() > 0.1\n"
            "goal[big] = (e0 - eta * d)[big]\n"
            "return ((unet(x_t, t, text.concept) - goal.detach()) ** 2).flatten(1).mean(1)"),
    ("4.2", "pairs = (x_t, x_t), (t, t), (text.null, text.concept)\n"
            "twice = [torch.cat(pair) for pair in pairs]\n"
            "with torch.no_grad():\n"
            "    e0, ec = frozen(*twice).chunk(2)\n"
            "goal = torch.where((ec - e0).abs() > 0.1, e0 - eta * (ec - e0), ec)\n"
            "return (unet(x_t, t, text.concept) - goal).square().mean(dim=(1, 2, 3))"),
]
WRONG = [
    # 1.2
    ("1.2", "return abar_t * x_0 + (1 - abar_t) * noise", "abar is a share of the variance"),
    ("1.2", "return x_0 + noise", "eq. 4 of DDIM"),
    ("1.2", "return 1 / 0", "it raises ZeroDivisionError: division by zero"),
    ("1.2", "return x_0[0]", "its result has the shape [4, 3, 3] instead of [1, 4, 3, 3]"),
    # 1.3
    ("1.3", "return x_t", "the times differ: ten steps are 901"),
    ("1.3", denoising(t_prev="t - 1000 // steps"), "the last step's t_prev is negative"),
    ("1.3", denoising(t_prev="t - 1000 // steps", share="(1 - abar[t])"), "Two bugs are left"),
    ("1.3", denoising(share="(1 - abar[t])"), "the share of the noise in x_t isn't 1 - abar"),
    ("1.3", denoising(t_prev="max(t - 1000 // steps, 1)"), "not at t = 1"),
    ("1.3", denoising(t_prev="max(t - 1000 // steps, -1)"), "abar[-1] is the noisiest"),
    ("1.3", denoising(result="x_0"), "where a trace of noise is left"),
    ("1.3", denoising(root="abar[t]"), "the times are right, the values aren't"),
    ("1.3", denoising(more="yield x_t"), "it yields: return the result"),
    ("1.3", denoising(result="[x_t]"), "it returns a list, not a tensor"),
    ("1.3", denoising(result="(t, x_t)"), "it returns a tuple, not a tensor"),
    ("1.3", denoising(result="'x_t'"), "it returns a str, not a tensor"),
    ("1.3", denoising(result="None"), "it returns None: is a `return` missing?"),
    ("1.3", denoising(result="x_t[0]"), "its result has the shape [4, 2, 2] instead of [1, 4, 2"),
    ("1.3", denoising(result="x_t * float('nan')"), "not all of its numbers are finite"),
    ("1.3", denoising(result="object()"), "it returns an object, not a tensor"),
    ("1.3", "import sys\nsys.exit(1)", "it raises SystemExit: 1"),
    ("1.3", "raise ValueError('one line\\nand another')", "it raises ValueError: one line"),
    # 2.2: five targets that eta 1 doesn't tell apart
    ("2.2", one_step("target = e0 - (ec - e0)"), "eta isn't used here"),
    ("2.2", one_step("target = eta * e0 - (ec - e0)"), "eta multiplies the difference, not eps_nu"),
    ("2.2", one_step("target = e0 - eta * ec + e0"), "mind the brackets"),
    ("2.2", one_step("target = e0 - eta ** 2 * (ec - e0)"), "eta isn't squared"),
    ("2.2", one_step("target = e0 - 1 / eta * (ec - e0)"), "eta doesn't divide"),
    ("2.2", one_step("target = e0 + eta * (ec - e0)"), "guidance, Eq. 3"),
    ("2.2", one_step("target = ec - eta * (ec - e0)"), "the official code of 2025"),
    ("2.2", one_step("target = e0"), "this is eps_null alone"),
    ("2.2", one_step("with torch.no_grad():\n    e0, ec = edited(x_t, t, null), edited(x_t, t, c)"
                     f"\n{TARGET}"), "the target is from the edited model"),
    ("2.2", one_step(f"e0, ec = edited(x_t, t, null), edited(x_t, t, c)\n{TARGET}"),
     "the target is from the edited model"),
    ("2.2", one_step(loss=LOSS.replace("t, c)", "t, null)")), "edited model is asked with null"),
    ("2.2", one_step(loss=LOSS.replace("mean", "sum")), "it sums the squares: take their mean"),
    ("2.2", one_step(loss=LOSS.replace("mean", "sum(dim=(1, 2, 3)).mean")), "over each sample"),
    ("2.2", one_step(loss=LOSS.replace("square()", "abs()")), "absolute values"),
    ("2.2", one_step(draw=DRAW.replace("predict =", "predict = lambda x, t: edited(x, t, c) #")),
     "x_t is drawn without guidance"),
    ("2.2", one_step(draw=DRAW.replace("(edited", "(frozen")), "the frozen model draws x_t"),
    ("2.2", one_step(draw=DRAW.replace("c, null, 3", "null, c, 3")), "away from the concept"),
    ("2.2", one_step(draw=DRAW.replace("    e0", "    t = k\n    e0")), "the index k as the time"),
    ("2.2", one_step(draw=DRAW.replace("[k]", "[k + 1]")), "one step too clean"),
    ("2.2", one_step(draw=DRAW.replace("[k]", "[k - 1]")), "one step too noisy"),
    ("2.2", one_step(draw=DRAW.replace("noise, 50))[k]", "noise, k))[-1]")), "k steps of k"),
    ("2.2", one_step(draw=DRAW.replace("with torch.no_grad():", "if True:")),
     "the loss is right, but the weights after it aren't: the drawing has a gradient"),
    ("2.2", one_step(step=STEP.replace("optimizer.step()", "")), "they don't move: call backward"),
    ("2.2", one_step(step=STEP.replace("loss.backward()", "")), "they don't move: call backward"),
    ("2.2", one_step(step=STEP.replace("loss.b", "(-loss).b")), "the step goes uphill"),
    ("2.2", one_step(step=STEP.replace("optimizer.zero_grad()", "")), "iteration before are added"),
    ("2.2", one_step(step=STEP + "").replace("return loss.item()", ""), "it returns None"),
    ("2.2", one_step(step=STEP.replace("loss.item()", "(loss, x_t)")), "it returns a tuple"),
    ("2.2", one_step(loss=LOSS.replace(".mean()", "")), "it raises RuntimeError: grad can be"),
    ("2.2", one_step(step=STEP.replace("optimizer.step()", "optimizer.step(); optimizer.step()")),
     "one zero_grad, backward and step"),
    # 2.3
    ("2.3", "'attn2.to_q.' in name", "it selects nothing: a part of the name is enough, and is a"),
    ("2.3", "return name == 'attn2.to_q'", "it selects nothing"),
    ("2.3", "return 'attn2.to_q'", "it selects everything"),
    ("2.3", "return 'attn2' or 'to_q' in name", "it selects everything"),
    ("2.3", "return 'attn2' in name or 'to_q' in name", "both conditions have to hold"),
    ("2.3", "return 'to_q' in name", "the queries of the self-attention, too"),
    ("2.3", "return 'attn2.to_k.' in name", "it selects the keys"),
    ("2.3", "return torch.ones(2)", "it returns a Tensor, neither true nor false"),
    ("2.3", "return name.index('attn2')", "it raises ValueError: substring not found"),
    # 3.2
    ("3.2", "return hits / images", "it returns a float, not (low, high)"),
    ("3.2", "return 'ab'", "it returns a str, not (low, high)"),
    ("3.2", "return 0, hits / images", "for 0 of 50 Wilson's interval is"),
    ("3.2", "low = 0", "it returns None: is a `return` missing?"),
    ("3.2", "return None, 1", "it returns None"),
    ("3.2", "h = 1.96 * (hits / images * (1 - hits / images) / images) ** 0.5\n"
            "return hits / images - h, hits / images + h", "this is the normal interval"),
    # 3.3
    ("3.3", sld(result="mu * (eps_null - eps_s)"), "the sign: eps_s - eps_null is subtracted"),
    ("3.3", sld(result="-mu * (eps_s - eps_null)"), "the sign: eps_s - eps_null is subtracted"),
    ("3.3", sld("(scale * (eps_c - eps_s)).clamp(max=1)"), "mu is negative where eps_c - eps_s is"),
    ("3.3", sld("(scale * (eps_c - eps_s)).clamp(0, 1)"), "don't cut it off"),
    ("3.3", sld("(scale * (eps_s - eps_c)).clamp(max=1)"), "in the place of the absolute value"),
    ("3.3", sld("(eps_c - eps_s).abs().clamp(max=1)"), "the scale isn't used"),
    ("3.3", sld("scale * (eps_c - eps_s).abs().clamp(max=1)"), "the scale is inside of min"),
    ("3.3", sld("scale * (eps_c - eps_s).abs()"), "mu must be at most 1"),
    ("3.3", sld("(scale * (eps_c - eps_s).abs()).clamp(min=1)"), "this mu is at least 1"),
    ("3.3", sld(where="eps_c - eps_s >= threshold"), "not below it"),
    ("3.3", sld(where="eps_c == eps_c"), "mu must be 0 where"),
    ("3.3", sld(where="(eps_c - eps_s).abs() < threshold"), "not for its absolute value"),
    ("3.3", sld(where="(eps_c - eps_s).abs() > threshold"), "where the absolute value is small"),
    ("3.3", sld(where="eps_s - eps_c < threshold"), "not for eps_s - eps_c"),
    ("3.3", sld(where="mu < threshold"), "not for mu"),
    ("3.3", sld(where="eps_c - eps_s < 0"), "the threshold is lambda, not 0"),
    ("3.3", sld(result="mu * (eps_s - eps_c)"), "starts from the empty prompt"),
    ("3.3", sld(result="mu"), "this is mu alone"),
    ("3.3", sld(result="eps_c - eps_null - mu * (eps_s - eps_null)"), "the equations give other"),
    # 3.4
    ("3.4", "return 0.5", "p = min(1, 2 sum C(n, i) / 2^n)"),
    ("3.4", "return 0.1, 2", "it returns a tuple, not a tensor"),
    ("3.4", "return torch.ones(3)", "it returns a tensor of the shape [3], not a number"),
    # 4.2
    ("4.2", "return 0.5", "its result has the shape [] instead of [2]"),
    ("4.2", "return erase.esd_loss(unet, frozen, x_t, t, text, eta)", "Eq. 6 everywhere"),
    ("4.2", "return erase.esd_loss(unet, frozen, x_t, t, text, eta).mean()", "its result has"),
    ("4.2", "erase.esd_loss(unet, frozen, x_t, t, text, eta)", "it returns None"),
    ("4.2", "e0, ec = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)\n"
            "target = e0 - eta * (ec - e0)\n"
            "goal = torch.where((target - e0).abs() > 0.1, target, ec).detach()\n"
            "return (unet(x_t, t, text.concept) - goal).square().mean(dim=(1, 2, 3))", "wrong: "),
]

# the project's own functions, which the check and the grader refuse
STATS = "from notebooks.experiments import stats\n"
WRONG += [
    (number, f"{STATS}return {function}", "this is the project's own function: write yours")
    for number, function in [
        ("1.2", "ddim.add_noise(x_0, noise, abar_t)"),
        ("1.3", "[*ddim.denoise(predict, x_t, steps)][-1][1]"),
        ("3.2", "stats.wilson(hits, images)"),
        ("3.4", "stats.mcnemar(one, other).p"),
    ]
]


KEEPING = """
e0, ec = frozen(x_t, t, text.null).detach(), frozen(x_t, t, text.concept).detach()
target = e0 - eta * (ec - e0)
first = (unet(x_t, t, text.concept) - target) ** 2
second = (unet(x_t, t, {kept}) - {at}) ** 2
return {result}
"""


def keeping(kept="text.null", at="e0", result="(first + weight * second).flatten(1).mean(1)"):
    return KEEPING.format(kept=kept, at=at, result=result)


ATTACK = """
snr = abar_t / (1 - abar_t)
weight = {weight}
text = {text}
error = (unet(x_t, t, text) - {target}) ** 2
loss = {loss}
{step}
"""


def attacking(weight="snr.clamp(max=5) / snr", text="encode(v).expand(len(x_t), -1, -1)",
              target="noise", loss="(weight * error.flatten(1).mean(1)).mean()", step=STEP):
    return ATTACK.format(weight=weight, text=text, target=target, loss=loss, step=step)


RIGHT += [
    ("5.2", attacking()),
    ("5.2", attacking("torch.minimum(snr, torch.tensor(5)) * (1 - abar_t) / abar_t")),
    ("5.2", attacking(text="encode(v).repeat(len(x_t), 1, 1)", step="loss.backward()\n"
                      "optimizer.step()\noptimizer.zero_grad()\nreturn loss")),
    ("5.2", attacking("(snr.clamp(max=5) / snr).view(-1, 1, 1, 1)", loss="(weight * error).mean()",
                      step="v.grad, = torch.autograd.grad(loss, v)\noptimizer.step()\n"
                      "return loss.detach()")),
]
WRONG += [
    # 5.2
    ("5.2", attacking("1"), "w_t is missing"),
    ("5.2", attacking("snr.clamp(max=5)"), "min(SNR, 5) / SNR, not min(SNR, 5)"),
    ("5.2", attacking("snr.clamp(min=5) / snr"), "not max(SNR, 5)"),
    ("5.2", attacking(target="x_t"), "should predict the noise, not x_t"),
    ("5.2", attacking(loss="(weight * error.flatten(1).sum(1)).mean()"), "over the elements of"),
    ("5.2", attacking(loss="weight.mean() * error.mean()"), "each sample has its own w_t"),
    ("5.2", attacking(loss="error.mean()"), "w_t is missing"),
    ("5.2", attacking(text="encode(v)"), "the U-Net gets 3 x_t and 1 c: expand c"),
    ("5.2", attacking(text="encode(v.detach()).expand(3, -1, -1)"), "it doesn't move: encode(v)"),
    ("5.2", attacking(text="encode(v).detach().expand(3, -1, -1)"), "it doesn't move: encode(v)"),
    ("5.2", attacking(step=STEP.replace("optimizer.step()", "")), "it doesn't move: encode(v)"),
    ("5.2", attacking(step=STEP.replace("optimizer.zero_grad()", "")), "step before are added"),
    ("5.2", attacking(step=STEP.replace("loss.b", "(-loss).b")), "the step goes uphill"),
    ("5.2", attacking(step="optimizer = torch.optim.Adam(unet.parameters())" + STEP),
     "the U-Net's weights move: the attack changes only v"),
    ("5.2", attacking(step="optimizer = torch.optim.Adam([v, *unet.parameters()])" + STEP),
     "the U-Net's weights move: the attack changes only v"),
    ("5.2", attacking(step="optimizer = torch.optim.Adam([v])" + STEP), "optimizer that you get"),
    ("5.2", attacking(step=STEP.replace("return loss.item()", "")), "it returns None"),
    ("5.2", attacking(loss="weight * error.flatten(1).mean(1)"), "grad can be implicitly created"),
]


VARIANCE = "import math\nif {where}:\n    return math.inf\nreturn {result}"


def eq_4(where="(1 + eta) * C <= eta * S", result="S * C / ((1 + eta) * C - eta * S)"):
    return VARIANCE.format(where=where, result=result)


RIGHT += [
    ("6.1", eq_4()),
    ("6.1", eq_4("C <= S * eta / (1 + eta)", "1 / ((1 + eta) / S - eta / C)")),
    ("6.1", eq_4("eta and 1 + 1 / eta <= S / C", "torch.tensor(1 / ((1 + eta) / S - eta / C))")),
    ("6.2", keeping()),
    ("6.2", "return erase.esd_loss(unet, frozen, x_t, t, text, eta) + weight * erase.esd_loss("
            "unet, frozen, x_t, t, erase.Text(text.null, text.null, text.null), eta)"),
    ("6.2", keeping(result="first.mean(dim=(1, 2, 3)) + weight * second.mean(dim=(1, 2, 3))")),
]
WRONG += [
    # 6.1
    ("6.1", eq_4("False"), "it raises ZeroDivisionError"),
    ("6.1", eq_4("False", "S * C / ((1 + eta) * C - eta * S or 1e-9)"), "it is negative, and then"),
    ("6.1", eq_4("eta * S >= C"), "more often than that there is one"),
    ("6.1", eq_4("False", "S * (S / C) ** eta"), "this is what DDIM draws"),
    ("6.1", eq_4("False", "1 / ((1 + eta) / S + eta / C)"), "the other sign"),
    ("6.1", eq_4("C <= eta * S", "1 / (1 / S - eta / C)"), "the exponent of p is 1 + eta"),
    ("6.1", eq_4(result="((1 + eta) * C - eta * S) / S / C"), "1 divided by the variance"),
    ("6.1", eq_4(result="S"), "it is 1 at eta = 0, and 3 at eta = 1"),
    ("6.1", eq_4(result="None"), "it returns None"),
    # 6.2
    ("6.2", keeping(result="first.flatten(1).mean(1)"), "the term for the empty prompt is missing"),
    ("6.2", keeping(result="(first + second).flatten(1).mean(1)"), "weight isn't used"),
    ("6.2", keeping(at="target"), "not go to Eq. 6's target"),
    ("6.2", keeping(at="ec"), "with the frozen model's for the empty prompt"),
    ("6.2", keeping(kept="text.concept"), "ask it with text.null"),
    ("6.2", keeping(kept="text.anchor", at="frozen(x_t, t, text.anchor)"),
     "this keeps the anchor's prediction"),
    ("6.2", keeping(result="(first + weight * second).flatten(1).sum(1)"), "take the mean"),
    ("6.2", keeping(result="(first + weight * second).mean()"), "has the shape [] instead of [2]"),
    ("6.2", keeping(result="(first + weight * second.detach()).flatten(1).mean(1)"),
     "the new term has no gradient"),
    ("6.2", keeping(result="(first + weight * second).detach().flatten(1).mean(1)"),
     "the values are right, the gradient isn't"),
]


def answer_of(number, body):
    """The function with a body."""
    name = NAMES[number]
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f"def {name}{SIGNATURES[name]}:\n{lines}\n"
    exec(source, names := {"torch": torch, "ddim": ddim, "erase": erase})
    return names[name]


@pytest.mark.parametrize("number, body", RIGHT)
def test_a_right_variant_is_right(number, body):
    check = checks.EXERCISES[NAMES[number]]
    assert [check(answer_of(number, body), seed) for seed in (0, 3)] == ["right", "right"]


@pytest.mark.parametrize("number, body, says", WRONG)
def test_a_wrong_answer_gets_its_message(number, body, says):
    said = checks.EXERCISES[NAMES[number]](answer_of(number, body))
    assert said.startswith("wrong: ") and says in said and "\n" not in said, said
    assert "raises Wrong" not in said


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("answer", [3, None, "right", lambda: 1, lambda *_: {}, lambda *_: b"1",
                                    lambda *_: [[1, 2], [3]], lambda *_: type, lambda *_: 10**400,
                                    lambda *_: torch.zeros(2, 0), lambda *_: (yield 1)])
def test_no_answer_stops_a_check(name, answer):
    said = checks.EXERCISES[name](answer)
    assert said.startswith("wrong: ") and "\n" not in said, said


# ---- the grader


def submitted(folder, number, *cells, title="# {}. A title"):
    """A notebook of the course whose code cells are the student's."""
    first = {"cell_type": "markdown", "source": [title.format(number), "\n", "Text"]}
    code = [{"cell_type": "code", "source": cell, "outputs": [{"text": "right"}]} for cell in cells]
    (folder / "mine.ipynb").write_text(json.dumps({"cells": [first, *code]}))
    return folder / "mine.ipynb"


def solved(name):
    """The source of a solution's function, with its module's imports."""
    module = module_of(name)
    imports = [line for line in inspect.getsource(module).splitlines() if line.startswith("import")]
    return "\n".join([*imports, inspect.getsource(getattr(module, name))])


def marks(file, seconds=20):
    return {number: (e["points"], e["says"])
            for number, e in grade.grade(file, seconds)["exercises"].items()}


@pytest.mark.parametrize("number", sorted({number[0] for number in NAMES}))
def test_a_solved_notebook_gets_all_points(number, tmp_path):
    """Each solution in its notebook's own cell, with the cells around it."""
    file, = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = json.loads(file.read_text())
    for cell in notebook["cells"]:
        for name in NUMBERS:
            if cell["cell_type"] == "code" and f"def {name}(" in "".join(cell["source"]):
                cell["source"] = solved(name)
    (tmp_path / "mine.ipynb").write_text(json.dumps(notebook))

    graded = grade.grade(tmp_path / "mine.ipynb")
    assert graded["points"] == graded["of"] > 0, graded


ADD = "def my_add_noise(x_0, noise, abar_t):\n    "
ROOTS = "return abar_t ** 0.5 * x_0 + (1 - abar_t) ** 0.5 * noise"
ACCEPTED = {  # of exercise 1.2
    "magics": ["%pip install x\n!ls\nfiles = !ls\nmy_add_noise?\n" + ADD + ROOTS + "\n%time 1"],
    "a timed cell": ["%%time\n" + ADD + ROOTS],
    "a check in its cell": [ADD + ROOTS + "\nprint(checks.add_noise(my_add_noise))"],
    "a cell that raises below it": [ADD + ROOTS + "\n1 / 0"],
    "a cell that takes long below it": [ADD + ROOTS + "\nwhile True: pass"],
    "another language above it": ["%%bash\nls | wc", ADD + ROOTS],
    "an error above it": ["def broken(:", ADD + ROOTS],
    "a statement that raises above it": ["import no_such_module\n" + ADD + ROOTS],
    "a lambda": ["my_add_noise = lambda x, n, a: a.sqrt() * x + (1 - a).sqrt() * n"],
    "a partial": ["import functools\ndef mix(power, x, n, a):\n"
                  "    return a**power * x + (1 - a)**power * n",
                  "my_add_noise = functools.partial(mix, 0.5)"],
    "constants above it": ["HALF = 1 / 2\npowers = {}\npowers['x'] = HALF", "x_0 = 'no matter'",
                           ADD + "return abar_t**powers['x'] * x_0 + (1 - abar_t)**HALF * noise"],
    "a constant below it": [
        ADD + "return abar_t**HALF * x_0 + (1 - abar_t)**HALF * noise\nHALF = 0.5"],
    "a class": ["class Mixer:\n    def __call__(self, x_0, noise, abar_t):\n        " + ROOTS,
                "my_add_noise = Mixer()"],
    "a dataclass": ["from __future__ import annotations\nfrom dataclasses import dataclass\n"
                    "@dataclass\nclass Power:\n    value: float = 0.5",
                    ADD + "p = Power().value\n"
                    "    return abar_t**p * x_0 + (1 - abar_t)**p * noise"],
    "long cells above that it doesn't need": ["while True: pass", "x_0 = [0 for _ in iter(int, 1)]",
                                              ADD + ROOTS],
    "the last of two": [ADD + "return x_0", ADD + ROOTS],
    "printing": [ADD + "print('{}', flush=True)\n    " + ROOTS],
}


@pytest.mark.parametrize("variant", ACCEPTED)
def test_a_right_submission_gets_its_point(variant, tmp_path):
    assert marks(submitted(tmp_path, 1, *ACCEPTED[variant]), seconds=5)["1.2"] == (1, "right")


ELSEWHERE = "import gc, importlib, json, os, runpy, shutil, subprocess, sys, time\n"
CHEATS = {  # of exercise 1.2: cells, and what is said
    "prints right": ([ADD + "print('right')\n    return x_0"], "eq. 4"),
    "only prints": (["print('right')"], cases.NOT_YET),
    "a check of its own": (
        ["from notebooks.course import checks\nchecks.add_noise = lambda f: 'right'",
         ADD + "return x_0"], "eq. 4"),
    "the project's function": (["import ddim", ADD + "return ddim.add_noise(x_0, noise, abar_t)"],
                               "this is the project's own function"),
    "the project's function by name": (
        ["from ddim import add_noise", ADD + "return add_noise(x_0, noise, abar_t)"],
        "this is the project's own function"),
    "a function that calls it": (
        ["import ddim, torch", ADD + "return ddim.step(x_0, noise, torch.ones(()), abar_t)"],
        "this is the project's own function"),
    "the project's function or nothing": (
        ["import ddim", ADD + "try:\n        return ddim.add_noise(x_0, noise, abar_t)\n"
         "    except Exception:\n        return x_0"], "eq. 4"),
    "the check's answer": (["from notebooks.course import checks",
                            ADD + "return checks.add_noise.solution(x_0, noise, abar_t)"],
                           "it raises NameError"),
    "the solution": ([ADD + "from notebooks.course.solutions import solution_5\n"
                      "    return solution_5.my_add_noise(x_0, noise, abar_t)"],
                     "it raises ModuleNotFoundError"),
    "the main module": ([ELSEWHERE + ADD +
                         "main = sys.modules['__main__']\n"
                         "    return main.checks.add_noise.solution(x_0, noise, abar_t)"],
                        "it raises AttributeError"),
    "reload": ([ELSEWHERE + "import ddim\n" + ADD +
                "return importlib.reload(ddim).add_noise(x_0, noise, abar_t)"],
               "this is the project's own function"),
    "runpy": ([ELSEWHERE + ADD +
               "return runpy.run_path('ddim.py')['add_noise'](x_0, noise, abar_t)"],
              "this is the project's own function"),
    "frames": ([ELSEWHERE + ADD +
                "frame = sys._getframe()\n    while frame:\n"
                "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
                "            if hasattr(value, 'solution'):\n"
                "                return value.solution(x_0, noise, abar_t)\n"
                "        frame = frame.f_back\n    return x_0"], "eq. 4"),
    "all objects": ([ELSEWHERE + "def ADD(): pass\n" + ADD +
                     "for each in gc.get_objects():\n"
                     "        if type(each) is type(ADD) and each.__name__ == 'add_noise':\n"
                     "            return each(x_0, noise, abar_t)\n    return x_0"],
                    "this is the project's own function"),
    "the path of the grader": (
        [ELSEWHERE + ADD + "sys.path[:] = os.environ.get('PYTHONPATH', '').split(':')\n"
         "    sys.modules.pop('notebooks', 0)\n    from notebooks.course import checks\n"
         "    return checks.add_noise.solution(x_0, noise, abar_t)"], "it raises KeyError"),
    "a verdict of its own": (
        [ELSEWHERE + ADD + "for stream in range(3, 20):\n        try:\n"
         "            os.write(stream, b'{\"why\": \"right\"}')\n"
         "        except OSError:\n            pass\n    os._exit(0)"], grade.UNREADABLE),
    "no results": (
        [ELSEWHERE + ADD + "for stream in range(3, 20):\n        try:\n"
         "            os.write(stream, b'{\"results\": [[], [], []]}')\n"
         "        except OSError:\n            pass\n    os._exit(0)"], grade.UNREADABLE),
    "equal to everything": (["import torch\nclass Same(torch.Tensor):\n"
                             "    def __eq__(self, other):\n        return True",
                             ADD + "return x_0.as_subclass(Same)"], "eq. 4"),
    "a patched comparison": (["import torch", ADD + "torch.allclose = lambda *a, **k: True\n"
                              "    return x_0"], "eq. 4"),
    "noise without noise": (
        ["import torch\ntorch.randn = lambda *shape, generator, dtype: torch.zeros(shape)\n"
         + ADD + "return x_0"], "eq. 4"),
    "an endless loop": ([ADD + "while True:\n        pass"], "it takes more than 1 seconds"),
    "an endless loop that can't be interrupted": (
        [ADD + "import signal\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
         "    while True:\n        try:\n            while True: pass\n"
         "        except BaseException:\n            pass"], "it takes more than 1 seconds"),
    "an exit": ([ADD + "raise SystemExit(0)"], "it raises SystemExit: 0"),
    "a hard exit": (["import os", ADD + "os._exit(0)"], "it ends its process"),
    "another shape": ([ADD + "return torch.tensor(0.0)"], "its result has the shape"),
    "not a number": ([ADD + "return x_0 * float('nan')"], "not all of its numbers are finite"),
    "a string": ([ADD + "return 'right'"], "it returns a str, not a tensor"),
    "a stub": ([ADD + "return ..."], cases.NOT_YET),
    "nbgrader's stub": ([ADD + "# YOUR CODE HERE\n    raise NotImplementedError()"], cases.NOT_YET),
    "an error in another function": (["def broken(:", ADD + "return x_0"], "eq. 4"),
    "an error in the cell": ([ADD + "y = 1\n    return x_0 +"],
                             "line 3 of its cell isn't Python: return x_0 + (invalid syntax)"),
    "half an emoji": ([ADD + "return x_0  # \ud83d"], "its cell can't be read"),
    "a return outside of a function": ([ADD + "return x_0\nreturn 1"], "line 3 of its cell isn't"),
    "a helper that is missing": ([ADD + "return helper(x_0)"], "it raises NameError"),
    "half right": ([ADD + "return abar_t * x_0 + (1 - abar_t) * noise"],
                   "abar is a share of the variance"),
    "right for one abar": ([ADD + "return 0.6 * x_0 + 0.8 * noise"], "eq. 4"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_gets_none(cheat, tmp_path):
    """The clock starts after the imports, and counts CPU time."""
    cells, says = CHEATS[cheat]
    points, said = marks(submitted(tmp_path, 1, *cells), seconds=1)["1.2"]
    assert points == 0 and says in said, said


@pytest.mark.parametrize("new_session", [False, True])
def test_what_a_submission_starts_ends_with_it(tmp_path, new_session):
    """Even though it returns at once; its child would otherwise write a file later."""
    if new_session and not Path("/proc/self/task").exists():
        pytest.skip("only Linux lets the grader find it")
    late = tmp_path / "late"
    child = f"import time; time.sleep(6); open({str(late)!r}, 'w').close()"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session={new_session})"
    cell = ELSEWHERE + ADD + f"{start}\n    " + ROOTS
    began = time.time()
    assert marks(submitted(tmp_path, 1, cell))["1.2"] == (1, "right")
    time.sleep(max(0, began + 60 - time.time()) if late.exists() else 7)
    assert not late.exists()


def test_a_submission_that_deletes_its_folder_harms_nobody(tmp_path):
    """The exercise after it has a folder of its own."""
    wreck = ELSEWHERE + "from pathlib import Path\nroot = Path.cwd()\n"
    delete = "shutil.rmtree(root)\n    for folder in sys.path:\n" \
             "        if 'notebooks' in folder:\n            shutil.rmtree(folder, True)\n    "
    file = submitted(
        tmp_path, 2,
        wreck + f"def my_iteration(*given):\n    {delete}return 1.0",
        wreck + "def my_method(name):\n    if root.exists():\n        "
        "shutil.rmtree(root)\n    return 'attn2.to_q.' in name",
    )
    graded = marks(file)
    assert graded["2.2"][0] == 0 and graded["2.3"] == (1, "right")
    assert (NOTEBOOKS / "course" / "checks.py").exists()


def test_a_submission_that_deletes_the_project_takes_nothing_from_the_next(
    tmp_path, monkeypatch
):
    project = tmp_path / "project"
    left_out = shutil.ignore_patterns("*.ipynb", "*.png", "results", "__pycache__")
    shutil.copytree(NOTEBOOKS, project / "notebooks", ignore=left_out)
    for file in NOTEBOOKS.parent.glob("*.py"):
        shutil.copy(file, project)
    monkeypatch.setattr(grade, "ROOT", project)
    grade.project_files.cache_clear()
    try:
        grade.project_files()
        wreck = ELSEWHERE + ADD + f"shutil.rmtree({str(project)!r}, True)\n    " + ROOTS
        assert marks(submitted(tmp_path, 1, wreck))["1.2"] == (1, "right")
        assert marks(submitted(tmp_path, 1, ELSEWHERE + ADD + ROOTS))["1.2"] == (1, "right")
    finally:
        grade.project_files.cache_clear()


def test_the_copy_has_no_answers(tmp_path):
    grade.copy_project(tmp_path, checks.add_noise.forbidden)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    course = {name for name in files if name.startswith("notebooks/course")}
    assert course == {"notebooks/course/answer.py", "notebooks/course/cases.py"}
    assert {"ddim.py", "erase.py", "notebooks/toy/model/model_index.json"} <= files
    assert not any(name.startswith(("tests", ".git")) or name.endswith(".ipynb") for name in files)
    for name in checks.EXERCISES:
        assert f"def {name}" not in "".join((tmp_path / file).read_text() for file in files
                                            if file.endswith(".py"))
    for module in ("cases.py", "answer.py"):
        source = (tmp_path / "notebooks" / "course" / module).read_text()
        assert "checks." not in source.split('"""')[2] and "solution" not in source.split('"""')[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_lets_nobody_run_submissions(tmp_path, monkeypatch):
    """Where nobody else can run this Python, it says so."""
    cell = ELSEWHERE + ADD + "raise ValueError(str(os.geteuid()))"
    _, says = marks(submitted(tmp_path, 1, cell))["1.2"]
    user = grade.NOBODY["user"] if grade.other_user() else 0
    assert says == f"wrong: it raises ValueError: {user}"


def test_an_exercise_that_is_left_out_counts(tmp_path):
    graded = grade.grade(submitted(tmp_path, 2, solved("my_method")))
    assert (graded["points"], graded["of"]) == (1, 2)
    assert graded["exercises"]["2.2"]["says"] == cases.NOT_YET


@pytest.mark.parametrize("title", ["# {}. A title", "# My answers\n\n# {}. A title", "# 2. Hello",
                                   "no heading", "", "# 2024"])
def test_the_notebook_is_known_by_its_functions(title, tmp_path):
    graded = marks(submitted(tmp_path, 5, ADD + ROOTS, title=title))
    assert graded == {"1.2": (1, "right"), "1.3": (0, cases.NOT_YET)}


def test_a_helper_from_another_notebook_doesnt_make_it_that_one():
    """Notebook 4 has one exercise, and an interval and McNemar's test are of use there."""
    cells = ["def my_interval(): ...", "def my_mcnemar(): ..."]
    number = checks.EXERCISES["my_interval"].number[0]
    assert grade.chapter_of("4", cells) == number != "4"  # nothing of 4 is there
    name = next(name for name, each in checks.EXERCISES.items() if each.number[0] == "4")
    assert grade.chapter_of("4", [*cells, f"def {name}(): ..."]) == "4"
    assert grade.chapter_of("", ["my_intervals = 1"]) == ""


def test_the_notebook_is_known_by_its_heading_without_functions(tmp_path):
    assert set(marks(submitted(tmp_path, 2))) == {"2.2", "2.3"}


def test_one_bad_file_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    good = submitted(tmp_path, 1, ADD + ROOTS)
    bad = {
        "a.pdf": b"%PDF-1.7\n\xff\xfe",
        "b.ipynb": b"[]",
        "c.ipynb": b'{"cells": [3]}',
        "d.ipynb": b'{"cells": [{"cell_type": "code", "source": 5}]}',
        "e.ipynb": b"[" * 100_000,
        "f.ipynb": b'{"cells": []}',
        "g.ipynb": b"",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.ipynb").mkdir()
    files = [*map(str, sorted(tmp_path.iterdir())), str(tmp_path / "missing.ipynb"), str(good)]

    monkeypatch.setattr("sys.argv", ["grade.py", *files])
    grade.main()
    graded = json.loads(capsys.readouterr().out)
    assert [each["file"] for each in graded] == files
    assert [each["points"] for each in graded].count(1) == 2  # the good one is there twice
    assert sum("error" in each for each in graded) == len(bad) + 2


def test_the_table_has_a_row_for_each_notebook(tmp_path, monkeypatch, capsys):
    right = submitted(tmp_path, 1, ADD + ROOTS).rename(tmp_path / "right.ipynb")
    wrong = submitted(tmp_path, 1, ADD + "return x_0, ").rename(tmp_path / "wrong.ipynb")
    (tmp_path / "bad.ipynb").write_text("no")
    files = [str(right), str(wrong), str(tmp_path / "bad.ipynb")]
    monkeypatch.setattr("sys.argv", ["grade.py", *files, "--csv"])
    grade.main()

    rows = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert [row["file"] for row in rows] == files
    assert [(row["points"], row["of"], row["1.2"]) for row in rows] == \
        [("1", "2", "1"), ("0", "2", "0"), ("0", "0", "")]
    assert rows[0]["why"] == f"1.3 {cases.NOT_YET}"
    assert rows[1]["why"].startswith("1.2 wrong: it returns a tuple, not a tensor; ")
    assert "isn't a notebook" in rows[2]["why"]


def test_gradescope_gets_its_form(tmp_path, monkeypatch, capsys):
    file = submitted(tmp_path, 2, solved("my_method"))
    monkeypatch.setattr("sys.argv", ["grade.py", str(file), str(tmp_path / "no"), "--gradescope"])
    grade.main()
    results = json.loads(capsys.readouterr().out)
    assert results["score"] == 1 and "isn't a notebook" in results["output"]
    assert results["tests"] == [
        {"name": "2.2", "score": 0, "max_score": 1, "status": "failed", "output": cases.NOT_YET},
        {"name": "2.3", "score": 1, "max_score": 1, "status": "passed", "output": "right"},
    ]


# ---- nbgrader


def only_exercises(file):
    """A notebook's first code cell, exercises and checks, which run in seconds."""
    notebook = json.loads(file.read_text())
    kept = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if re.search("import sample|def (my|given)_", source) or "nbgrader" in cell["metadata"]:
            kept.append(cell)
    return notebook | {"cells": kept}


def with_answers(notebook, answers):
    """A notebook with some of its functions written."""
    for cell in notebook["cells"]:
        for name, source in answers.items():
            if f"def {name}(" in "".join(cell["source"]):
                cell["source"] = source
    return json.dumps(notebook)


def test_nbgrader_hands_out_and_grades(tmp_path):
    """Notebooks 1 and 2: all points for the solutions, one for my_method alone; stubs get none."""
    pytest.importorskip("nbgrader")
    clone = tmp_path / "minESD"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "results", "*.png", "*.html")
    shutil.copytree(NOTEBOOKS.parent, clone, ignore=left_out)
    course = clone / "runs" / "course"  # the first cell looks for the project above itself
    source = course / "source" / "one"
    source.mkdir(parents=True)
    files = [*NOTEBOOKS.glob("1_*.ipynb"), *NOTEBOOKS.glob("2_*.ipynb")]
    for file in files:
        (source / file.name).write_text(json.dumps(only_exercises(file)))

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls alembic

    def nbgrader(*command):
        done = subprocess.run([sys.executable, "-m", "nbgrader", *command], cwd=course,
                              env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    nbgrader("generate_assignment", "one")
    released = {}
    for file in files:
        released[file.name] = (course / "release" / "one" / file.name).read_text()
    assert "t = k * stride\\n" in released[files[0].name]  # 1.3's bugs
    assert [each.count("raise NotImplementedError()") for each in released.values()] == [1, 2]
    assert "def my_iteration(edited, frozen" in released[files[1].name]
    assert "return ..." not in "".join(released.values())

    answers = {name: solved(name) for name in NUMBERS}
    for student, written in {"all": answers, "some": {"my_method": answers["my_method"]}}.items():
        folder = course / "submitted" / student / "one"
        folder.mkdir(parents=True)
        for name, notebook in released.items():
            (folder / name).write_text(with_answers(json.loads(notebook), written))

    nbgrader("autograde", "one")
    nbgrader("export")
    rows = csv.DictReader((course / "grades.csv").open())
    points = {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in rows}
    assert points == {"all": (4, 4), "some": (1, 4)}


# ---- which statements a function needs


def test_only_what_is_needed_runs():
    cells = ["import torch\nimport math\nA = 1\nB = A + 1\nC = B * 1000",
             "def helper(x):\n    A = 3\n    return B + x",
             "def f(C):\n    return helper(C)\nf(1)\nD = 5"]
    kept = submission.statements_for(cells, "f")
    assert [line.splitlines()[0] for line in kept] == \
        ["A = 1", "B = A + 1", "def helper(x):", "def f(C):"]


def test_lines_of_the_shell_are_dropped_only_where_they_are():
    cell = "def f(x):\n    %time g\n    y = !ls\n    return (x\n            % 2)"
    statement, = submission.statements_for([cell], "f")
    exec(statement, names := {})
    assert names["f"](5) == 1
