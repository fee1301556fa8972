"""The recipes of notebooks/methods/README.md, run as they are printed, and what each of them does.

They run on the small model and with 6 iterations instead of 160. The loss in README.md is one, too.
"""

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Generator

import ddim
import erase
import sample
from test_erase import by_hand, texts_of

pytestmark = pytest.mark.robustness  # half a minute

ROOT = Path(__file__).parents[1]
RECIPES = (ROOT / "notebooks" / "methods" / "README.md").read_text()
README = (ROOT / "README.md").read_text()
LOAD = 'sd = sample.load("notebooks/toy/model")\n'


def code_after(text, words):
    """The first Python block after these words."""
    _, found, rest = text.partition(words)
    assert found, words
    return re.search(r"```python\n(.*?)```", rest, flags=re.DOTALL)[1]


@pytest.fixture
def recipe(sd, tmp_path, monkeypatch):
    """Runs the recipe after some words, after the common start; returns its variables."""
    monkeypatch.chdir(tmp_path)

    def run(words, **variables):
        start = code_after(RECIPES, "All recipes start like this")
        assert LOAD in start
        code = start.replace(LOAD, "") + code_after(RECIPES, words)
        scope = {"sd": sd} | variables
        exec(code.replace("160", "6"), scope)
        return scope

    return run


def is_tuned(sd, theta, count=80):
    """Whether theta has as many weights as expected, all of which moved."""
    start = sample.unet_tensors(sd)
    return len(theta) == count and all((theta[name] != start[name]).any() for name in theta)


def equal(theta, other):
    return theta.keys() == other.keys() and all(torch.equal(theta[n], other[n]) for n in theta)


def test_the_loss_in_the_readme(sd):
    """The teacher predicts 3 for the concept, 1 for null, 10 for the anchor; the student 0 or 5."""
    code = code_after(README, "## Swap a piece")
    assert LOAD in code
    scope = {"sd": sd}
    exec(code.replace(LOAD, "").replace("160", "6"), scope)
    text = erase.Text(*(torch.full((2, 77, 4), value) for value in (3.0, 1.0, 10.0)))

    def student(x_t, t, c):
        assert c is text.concept and torch.is_grad_enabled()
        return torch.ones_like(x_t) * torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)

    def teacher(x_t, t, c):
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    batch = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text
    assert scope["anchor_loss"](student, teacher, *batch, 1.0).tolist() == [100.0, 25.0]
    assert is_tuned(sd, scope["theta"])


def test_which_weights(sd, recipe):
    theta = recipe("**Which weights.**")["theta"]
    assert is_tuned(sd, theta, count=16) and all("attn2.to_k" in name for name in theta)


def test_x_t_for_an_anchor(sd, recipe):
    """The same pieces, put together by hand."""
    scope = recipe("**x_t drawn for another prompt**")
    texts = texts_of(sd, "star", anchors=["a sheriff badge"], batch=4)
    theta = erase.trainable_copies(sd.unet, "esd-x")
    unet = erase.with_theta(sd.unet, theta)
    data = scope["data"](unet, texts, (4, 4, 8, 8), Generator().manual_seed(0))
    losses = erase.gradient_steps(unet, sd.unet, data, torch.optim.Adam(theta.values(), lr=4e-4))
    assert len([*itertools.islice(losses, 6)]) == 6
    assert equal(scope["theta"], theta) and is_tuned(sd, theta)


def test_prompts_to_keep(sd, recipe):
    """Every other x_t is a kept prompt's, drawn by the frozen model, whose eps is the target."""
    scope = recipe("**Prompts to keep**")
    star, = texts_of(sd, "star", batch=4)
    items = scope["alternating"](sd.unet, [star], (4, 4, 8, 8), Generator().manual_seed(0))
    rng, seen = Generator().manual_seed(0), []
    for i, (x_t, t, text) in enumerate(itertools.islice(items, 12)):
        torch.randint(1 + i % 2, (1,), generator=rng)  # one concept, two prompts to keep
        k = torch.randint(8, (1,), generator=rng).item()
        noise = torch.randn(4, 4, 8, 8, generator=rng)
        assert t.tolist() == [ddim.timesteps(8)[k]] * 4
        if i % 2 == 0:
            assert text is star
            continue
        seen += [prompt for prompt in ("heart", "moon")
                 if torch.equal(text.concept[:1], sd.encode([prompt]))]
        with torch.no_grad():
            plain = [*ddim.denoise(lambda x, t: sd.unet(x, t, text.concept), noise, 8)]
            loss = erase.esd_loss(sd.unet, sd.unet, x_t, t, text, 7.0)
        assert torch.allclose(x_t, plain[k][1], atol=1e-4) and (loss < 1e-10).all()
    assert len(seen) == 6 and {*seen} == {"heart", "moon"}
    assert is_tuned(sd, scope["theta"])


def test_another_optimizer(sd, recipe):
    """As a second U-Net becomes under the same optimizer."""
    theta = recipe("**Another optimizer.**")["theta"]
    expected = by_hand(sd, "star", iterations=6, steps=8, lr=1.0, seed=0, batch=4,
                       optimizer=lambda tensors, lr: torch.optim.SGD(tensors, lr, momentum=0.9))
    start = sample.unet_tensors(sd)
    for name in theta:
        moved = (expected[name] - start[name]).norm()
        assert (theta[name] - expected[name]).norm() < 1e-2 * moved, name


def test_a_look_at_each_step(sd, recipe):
    """Its loss is small at once on this model, so one step is taken."""
    scope = recipe("**A look at each step.**")
    once = erase.erase(sd, ["star"], **scope["settings"] | {"iterations": 1})
    assert equal(scope["theta"], once)


def test_a_loop_of_ones_own_and_a_regulariser(sd, recipe):
    """As a second U-Net becomes, with the pull's derivative added to its gradient."""
    theta = recipe("**A loop of your own**")["theta"]
    settings = {"iterations": 6, "steps": 8, "batch": 4, "seed": 0, "lr": 1.0}
    settings["optimizer"] = torch.optim.SGD
    expected, free = (by_hand(sd, "star", **settings, pull=pull) for pull in (0.01, 0.0))
    start = sample.unet_tensors(sd)
    assert theta.keys() == expected.keys()
    for name in theta:
        moved = (expected[name] - start[name]).norm()
        assert (theta[name] - expected[name]).norm() < 1e-2 * moved, name
        assert (theta[name] - free[name]).norm() > 2e-2 * moved, name  # so the pull is seen


def test_save_and_draw(sd, recipe, tmp_path):
    x_t = functools.partial(erase.x_t_from_model, steps=8)
    theta = erase.erase(sd, ["star"], iterations=1, data=x_t)
    scope = recipe("**Save, and draw", theta=theta)
    assert len(scope["images"]) == 4
    assert sample.load_erased(sd, tmp_path / "star.safetensors").edited == theta.keys()
