"""notebooks/methods: Safe Latent Diffusion, and erasing a concept from a wider one."""

import pytest
import torch
from torch import Tensor

import ddim
import erase
import sample
from notebooks.methods import esd_from, safe_latent_diffusion
from notebooks.methods.safe_latent_diffusion import Safety
from support import small
from test_sample import pixels


def tensor(*values: float) -> Tensor:
    """One value per sample: (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def features(batch: int, *values: float) -> list[Tensor]:
    """Text features, one tensor for each value."""
    return [torch.full((batch, 77, 8), value) for value in values]


# Safe Latent Diffusion

def test_safe_direction_by_hand():
    """One element for each case: above the threshold, below it and small, below it and clamped."""
    safety = Safety(delta=0, scale=2.0, threshold=0.1, momentum_scale=0.5, beta=0.25)
    eps_null, eps_c, eps_s = tensor(1, 1, 1), tensor(4, 2, 0), tensor(3, 2.2, 3)
    gamma, momentum = safe_latent_diffusion.safe_direction(
        eps_null, eps_c, eps_s, tensor(8, 4, 2), safety)
    mu = (0, 2 * 0.2, 1)  # eps_c - eps_s is 1, -0.2, -3
    expected = tensor(mu[0] * 2 + 0.5 * 8, mu[1] * 1.2 + 0.5 * 4, mu[2] * 2 + 0.5 * 2)
    torch.testing.assert_close(gamma, expected)
    torch.testing.assert_close(momentum, 0.25 * tensor(8, 4, 2) + 0.75 * expected)


def test_a_difference_that_equals_the_threshold_is_safe():
    gamma, _ = safe_latent_diffusion.safe_direction(
        tensor(1), tensor(2.5), tensor(2), tensor(0), Safety(0, 1000, 0.5, 0, 0))
    assert gamma == tensor(0)


def official_sld(eps_null, predictions, guidance, warmup, scale, threshold, momentum_scale, beta):
    """The official code's operations in its order, for one element: a list of guided eps."""
    momentum, made = 0.0, []
    for i, (text, concept) in enumerate(predictions):
        direction = text - eps_null
        strength = min(abs(text - concept) * scale, 1.0)
        strength = 0.0 if text - concept >= threshold else strength
        safety = (concept - eps_null) * strength + momentum_scale * momentum
        momentum = beta * momentum + (1 - beta) * safety
        if i >= warmup:
            direction = direction - safety
        made.append(eps_null + guidance * direction)
    return made


@pytest.mark.parametrize("name, official", [
    ("weak", (15, 200, 0.0, 0.0, 0.0)), ("medium", (10, 1000, 0.01, 0.3, 0.4)),
    ("strong", (7, 2000, 0.025, 0.5, 0.7)), ("max", (0, 5000, 1.0, 0.5, 0.7))])
def test_fifty_steps_equal_the_official_arithmetic(name, official):
    generator = torch.Generator().manual_seed(0)
    predictions = [(text, text + 0.01 * off) for text, off in
                   torch.randn(50, 2, generator=generator, dtype=torch.float64).tolist()]
    eps_null = 0.3
    answers = iter(tensor(eps_null, *both) for both in predictions)
    away = safe_latent_diffusion.guided(torch.zeros(1, 77, 8), name)
    predict = away(lambda x_t, t, text: next(answers), *[torch.zeros(1, 77, 8)] * 2, 7.5)
    made = [predict(tensor(0), t).item() for t in ddim.timesteps(50)]
    assert made == pytest.approx(official_sld(eps_null, predictions, 7.5, *official), abs=1e-12)


def test_the_unet_is_called_once_for_all_three_texts(monkeypatch):
    unet, (safe,), (null, text) = small.FakeUNet(), features(1, 4.0), features(2, 1.0, 3.0)
    monkeypatch.setitem(safe_latent_diffusion.SETTINGS, "own", Safety(0, 1000, 0.0, 0, 0))
    predict = safe_latent_diffusion.guided(safe, "own")(unet, text, null, 2.0)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    # mu is 1, since eps_c - eps_s is -1
    torch.testing.assert_close(predict(x_t, 981), x_t + 1 + 2 * (3 - 1 - (4 - 1)))
    assert unet.calls == [(6, 981)]


@pytest.mark.parametrize("steps, first", [(50, 10), (10, 2), (20, 4)])
def test_gamma_counts_from_the_same_time_with_fewer_steps(steps, first, monkeypatch):
    null, text, safe = features(1, 1.0, 3.0, 4.0)
    monkeypatch.setitem(safe_latent_diffusion.SETTINGS, "own", Safety(10, 1000, 0.0, 0, 0))
    predict = safe_latent_diffusion.guided(safe, "own")(small.FakeUNet(), text, null, 2.0)
    made = [predict(torch.zeros(1, 4, 8, 8), t).mean().item() for t in ddim.timesteps(steps)]
    assert made == pytest.approx([5.0] * first + [-1.0] * (steps - first))


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="sld is 'huge', choose from weak, medium"):
        safe_latent_diffusion.guided(torch.zeros(1, 77, 8), "huge")


def test_generate_samples_with_it(sd):
    """Compared with the function itself, called with the three texts by hand."""
    c, null, safe = (sd.encode([text]) for text in ("a star", "a moon", "a heart"))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    predict = safe_latent_diffusion.guided(safe, "max")(sd.unet, c, null, 4)
    with torch.no_grad():
        *_, (_, x_0) = ddim.denoise(predict, noise, 3)

    def made(**how):
        return pixels(sample.generate(sd, ["a star"], seed=3, steps=3, guidance=4,
                                      negative="a moon", **how))

    away = made(guided=safe_latent_diffusion.guided(safe, "max"))
    assert torch.equal(away, pixels(sd.decode(x_0)))
    for other in ({}, {"guided": safe_latent_diffusion.guided(safe, "weak")},
                  {"guided": safe_latent_diffusion.guided(sd.encode(["a circle"]), "max")}):
        assert not torch.equal(away, made(**other))


def test_each_batch_begins_with_no_momentum(sd):
    away = safe_latent_diffusion.guided(sd.encode(["a heart"]), "max")
    alone, together = (pixels(sample.generate(sd, ["a star"] * 2, seed=[0, 1], steps=3,
                                              batch=batch, guided=away)) for batch in (1, 2))
    assert (alone - together).abs().max() <= 1


# A concept out of a wider one

def test_esd_from_by_hand():
    """The teacher predicts 3 for the concept, 1 for null, 10 for the anchor; the student 0 or 5."""
    text = erase.Text(*features(2, 3.0, 1.0, 10.0))

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert c is text.anchor and torch.is_grad_enabled()
        return torch.ones_like(x_t) * tensor(0.0, 5.0)

    x_t, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    loss = esd_from.loss(student, teacher, x_t, t, text, eta=2.0)
    assert loss.tolist() == [36.0, 1.0]  # target = 10 - 2 * (3 - 1) = 6


def test_without_an_anchor_its_eta_is_one_more_than_esds(sd):
    star, null = sd.encode(["a star"]), sd.encode([""])
    text, t = erase.Text(star, null, star), torch.tensor([1])
    x_t, other = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def student(x_t, t, c):
        return sd.unet(x_t + other, t, c)

    ours = erase.esd_loss(student, sd.unet, x_t, t, text, eta=1.5)
    official = esd_from.loss(student, sd.unet, x_t, t, text, eta=2.5)
    torch.testing.assert_close(ours, official)
    assert not torch.allclose(ours, esd_from.loss(student, sd.unet, x_t, t, text, eta=1.5))
