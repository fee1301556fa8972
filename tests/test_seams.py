"""The pieces that the README swaps, in the README's own lines, and what each of them does."""

import ast
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Generator

import ddim
import erase
from test_erase import by_hand, texts_of

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def how():
    """The README's has more iterations."""
    return {"lr": 1e-3, "iterations": 3, "steps": 4, "batch": 2}


# The README's lines; each function ends with a line of its own

def a_new_loss(sd, how):
    def anchor_loss(unet, frozen, x_t, t, text, eta):
        with torch.no_grad():
            target = frozen(x_t, t, text.anchor)
        return (unet(x_t, t, text.concept) - target).square().mean(dim=(1, 2, 3))
    theta = erase.erase(sd, {"star": "circle"}, loss_fn=anchor_loss, **how)
    return theta, anchor_loss


def x_t_for_an_anchor(sd, how):
    theta = erase.erase(sd, {"star": "a sheriff badge"}, **how)
    return theta


def prompts_to_keep(sd, how):
    keep = [erase.Text(c, c, c) for p in ("heart", "moon") for c in [sd.encode([p] * how["batch"])]]
    def data(unet, texts, *rest):
        for both in zip(erase.own_ways(unet, texts, *rest), erase.own_ways(sd.unet, keep, *rest)):
            yield from both
    theta = erase.erase(sd, ["star"], data=data, **how)
    return theta, data


def another_optimizer_and_a_regulariser(sd, how):
    star, null = (sd.encode([prompt] * how["batch"]) for prompt in ("star", ""))
    theta, start = erase.select(sd.unet, "esd-x"), dict(sd.unet.named_parameters())
    unet, shape = erase.edit(sd.unet, theta), (how["batch"], 4, 8, 8)
    data = erase.own_ways(unet, [erase.Text(star, null, star)], shape, 8, 3.0, torch.Generator())
    def near_start(*batch):
        pull = sum((theta[name] - start[name]).square().sum() for name in theta)
        return erase.esd_loss(*batch) + 0.01 * pull
    losses = erase.esd(unet, sd.unet, data, torch.optim.SGD(theta.values(), lr=1.0), near_start)
    for _ in range(how["iterations"]): next(losses)
    return theta


SEAMS = [a_new_loss, x_t_for_an_anchor, prompts_to_keep, another_optimizer_and_a_regulariser]


def test_the_readme_has_these_lines():
    """And no other Python than these, the imports, the model and `how`."""
    readme = "".join(re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL))
    known = {"import torch, sample, erase", 'sd = sample.load("notebooks/toy")', ""}
    for seam in SEAMS:
        lines = inspect.getsource(seam).splitlines(keepends=True)[1:-1]
        code = textwrap.dedent("".join(lines))
        assert code in readme, code
        known |= {*code.splitlines()}
    others = {line for line in readme.splitlines() if not line.startswith("#")} - known
    assert len(others) == 1, others
    name, value = others.pop().split(" = ")
    assert name == "how"
    inspect.signature(erase.erase).bind("sd", ["star"], **ast.literal_eval(value))


# What they do

def test_a_new_loss(sd, how):
    """The teacher predicts 3 for the concept, 1 for null, 10 for the anchor; the student 0 or 5."""
    theta, anchor_loss = a_new_loss(sd, how)
    text = erase.Text(*(torch.full((2, 77, 4), value) for value in (3.0, 1.0, 10.0)))

    def student(x_t, t, c):
        assert c is text.concept and torch.is_grad_enabled()
        return torch.ones_like(x_t) * torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)

    def teacher(x_t, t, c):
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    x_t, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    assert anchor_loss(student, teacher, x_t, t, text, 1.0).tolist() == [100.0, 25.0]
    plain = erase.erase(sd, {"star": "circle"}, **how)
    assert len(theta) == 80 and all((theta[name] != plain[name]).any() for name in theta)


def test_x_t_for_an_anchor(sd, how):
    """The same pieces, put together by hand."""
    texts = texts_of(sd, "star", anchors=["a sheriff badge"], batch=2)
    theta = erase.select(sd.unet, "esd-x")
    unet = erase.edit(sd.unet, theta)
    data = erase.own_ways(unet, texts, (2, 4, 8, 8), 4, 3.0, Generator().manual_seed(0))
    losses = erase.esd(unet, sd.unet, data, torch.optim.Adam(theta.values(), lr=1e-3))
    assert len([*itertools.islice(losses, 3)]) == 3
    found = x_t_for_an_anchor(sd, how)
    assert len(found) == 80 and all(torch.equal(found[name], theta[name]) for name in theta)


def test_prompts_to_keep(sd, how):
    """Every other x_t is a kept prompt's, drawn by the frozen model, whose eps is the target."""
    _, data = prompts_to_keep(sd, how)
    star, = texts_of(sd, "star", batch=2)
    items = data(sd.unet, [star], (2, 4, 8, 8), 4, 3.0, Generator().manual_seed(0))
    generator, seen = Generator().manual_seed(0), []
    for i, (x_t, t, text) in enumerate(itertools.islice(items, 12)):
        torch.randint(1 + i % 2, (1,), generator=generator)  # one concept, two prompts to keep
        k = torch.randint(4, (1,), generator=generator).item()
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        assert t.tolist() == [ddim.timesteps(4)[k]] * 2
        if i % 2 == 0:
            assert text is star
            continue
        seen += [prompt for prompt in ("heart", "moon")
                 if torch.equal(text.concept[:1], sd.encode([prompt]))]
        with torch.no_grad():
            plain = [*ddim.denoise(lambda x, t: sd.unet(x, t, text.concept), noise, 4)]
            loss = erase.esd_loss(sd.unet, sd.unet, x_t, t, text, 7.0)
        assert torch.allclose(x_t, plain[k][1], atol=1e-4) and (loss < 1e-10).all()
    assert len(seen) == 6 and {*seen} == {"heart", "moon"}


def test_another_optimizer_and_a_regulariser(sd, how):
    """As a second U-Net becomes under SGD, with the pull's derivative added to its gradient."""
    longer = how | {"iterations": 6, "batch": 1}
    theta = another_optimizer_and_a_regulariser(sd, longer)
    start = dict(sd.unet.named_parameters())
    settings = {"iterations": 6, "steps": 8, "batch": 1, "seed": Generator().initial_seed(),
                "lr": 1.0, "optimizer": torch.optim.SGD}
    expected, free = (by_hand(sd, "star", **settings, pull=pull) for pull in (0.01, 0.0))
    assert theta.keys() == expected.keys()
    for name in theta:
        moved = (expected[name] - start[name]).norm()
        assert (theta[name] - expected[name]).norm() < 1e-2 * moved, name
        assert (theta[name] - free[name]).norm() > 2e-2 * moved, name  # so the pull is seen
