"""The checks of the exercises accept the solutions and reject stubs and likely mistakes."""

import importlib

import pytest
import torch

import ddim
import erase
from notebooks import checks

SOLUTIONS = {
    "denoise": (1, "my_denoise"), "target": (2, "my_target"), "method": (2, "my_method"),
    "interval": (3, "my_interval"), "safe_direction": (3, "my_safe_direction"),
    "selective_loss": (4, "my_selective_loss"), "add_noise": (5, "my_add_noise"),
}


def sampler(offset=1, root=True, end=0):
    """Returns a DDIM sampler with a mistake or two."""
    def denoise(predict, x_t, steps):
        abar, stride = ddim.alphas_cumprod(), 1000 // steps
        for k in reversed(range(steps)):
            t, t_prev = k * stride + offset, max((k - 1) * stride + offset, end)
            eps = predict(x_t, t)
            noise = (1 - abar[t]).sqrt() if root else 1 - abar[t]
            x_0 = (x_t - noise * eps) / abar[t].sqrt()
            x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * eps
        return x_t
    return denoise


def normal_interval(hits, asked):
    p = hits / asked
    half = 1.96 * (p * (1 - p) / asked) ** 0.5
    return p - half, p + half


def selective(flip=False, reach=(1, 2, 3), grad=True, elsewhere="concept", size=torch.abs,
              masked=False, total=False):
    def loss(unet, frozen, x_t, t, text, eta):
        with torch.no_grad():
            eps_null, eps_c = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)
            matters = (size(eps_c - eps_null) > 0.1) != flip
            rest = eps_c if elsewhere == "concept" else eps_null
            target = torch.where(matters, erase.esd_target(eps_null, eps_c, eta), rest)
        with torch.set_grad_enabled(grad):
            error = (unet(x_t, t, text.concept) - target).square()
            if masked:
                return torch.stack([e[m].mean() for e, m in zip(error, matters)])
            return error.sum(dim=reach) if total else error.mean(dim=reach)
    return loss


def safe(bound=lambda mu: mu.clamp(max=1), below=True, base="null"):
    def direction(eps_null, eps_c, eps_s, scale, threshold):
        mu = bound(scale * (eps_c - eps_s).abs())
        mu = mu * (eps_c - eps_s < threshold) if below else mu
        return mu * (eps_s - (eps_null if base == "null" else eps_c))
    return direction


MISTAKES = {
    "denoise": [sampler(offset=0), sampler(root=False), sampler(end=1),
                lambda predict, x_t, steps: x_t],
    "target": [lambda n, c, eta: n + eta * (c - n), lambda n, c, eta: c - eta * (c - n),
               lambda n, c, eta: n - eta * c, lambda n, c, eta: n - (c - n)],
    "method": [lambda name: "attn2" in name, lambda name: "to_q" in name,
               lambda name: "attn1.to_q." in name, lambda name: True],
    "interval": [normal_interval, lambda hits, asked: hits / asked,
                 lambda hits, asked: (0, hits / asked)],
    "safe_direction": [safe(bound=lambda mu: mu), safe(below=False),
                       safe(bound=lambda mu: mu.clamp(min=1)), safe(base="c")],
    "selective_loss": [erase.esd_loss, selective(flip=True), selective(reach=(0, 1, 2, 3)),
                       selective(grad=False), selective(elsewhere="null"),
                       selective(size=lambda d: d), selective(masked=True), selective(total=True)],
    "add_noise": [lambda x, n, a: a * x + (1 - a) * n,
                  lambda x, n, a: (1 - a).sqrt() * x + a.sqrt() * n,
                  lambda x, n, a: x + (1 - a).sqrt() * n],
}


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_the_solution_is_right(exercise):
    number, name = SOLUTIONS[exercise]
    solution = importlib.import_module(f"notebooks.solutions.solution_{number}")
    assert getattr(checks, exercise)(getattr(solution, name)) == "right"


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_the_stub_is_not(exercise):
    assert getattr(checks, exercise)(lambda *arguments: ...) == checks.NOT_YET
    assert getattr(checks, exercise)(lambda *arguments: None) == checks.NOT_YET


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_likely_mistakes_are_not(exercise):
    assert len(MISTAKES[exercise]) >= 3
    said = [getattr(checks, exercise)(mistake) for mistake in MISTAKES[exercise]]
    assert all(answer.startswith("wrong: ") for answer in said), said


def test_what_raises_is_reported():
    said = checks.target(lambda n, c, eta: 1 / 0)
    assert said == "wrong: it raises ZeroDivisionError: division by zero"
