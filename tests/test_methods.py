"""notebooks/methods: what ESD is compared with, each against its published equations."""

import numpy as np
import pytest
import torch
from torch import Tensor

import ddim
import erase
import sample
from notebooks.methods import (adversarial_esd, concept_ablation, esd_from, esd_in_contexts, rece,
                               safe_latent_diffusion, uce)
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


# Closed forms, against the published formulas written out with loops

def columns(seed: int, n: int, dim: int = 5) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(dim, n))


def uce_by_loops(W, c_e, c_g, c_p, lam, s):
    """UCE, eq. 7, element by element, with an inverse."""
    rows, dim = W.shape
    wanted, met = lam * W.copy(), lam * np.eye(dim)
    pairs = [(c_e[:, i], c_g[:, i], 1) for i in range(c_e.shape[1])]
    for own, becomes, weight in pairs + [(c_p[:, i], c_p[:, i], s) for i in range(c_p.shape[1])]:
        value = W @ becomes
        for a in range(dim):
            for row in range(rows):
                wanted[row, a] += weight * value[row] * own[a]
            for b in range(dim):
                met[a, b] += weight * own[a] * own[b]
    return wanted @ np.linalg.inv(met)


@pytest.mark.parametrize("kept", [0, 3])
def test_uce_is_its_equation(kept):
    W, c_e, c_g, c_p = columns(0, 5, dim=7), columns(1, 4), columns(2, 4), columns(3, kept)
    found = uce.edited(W, c_e, c_g, c_p, 0.1, 0.3)
    by_loops = uce_by_loops(*(x.numpy() for x in (W, c_e, c_g, c_p)), 0.1, 0.3)
    assert np.abs(found.numpy() - by_loops).max() < 1e-6
    mistakes = [(W, c_g, c_e, c_p, 0.1, 0.3), (W, c_e, c_g, c_p, 0.5, 0.3),
                (W, c_e, c_g, c_e, 0.1, 0.3), *[(W, c_e, c_g, c_p, 0.1, 1.0)] * bool(kept)]
    for mistake in mistakes:
        assert (found - uce.edited(*mistake)).abs().max() > 1e-2


def test_uce_sends_the_concept_where_the_guide_went():
    W, c_e, c_g, c_p = columns(0, 5, dim=7), columns(1, 2), columns(2, 2), columns(3, 2)
    edited = uce.edited(W, c_e, c_g, c_p, 1e-9, 0.5).double()
    torch.testing.assert_close(edited @ c_e, W @ c_g, atol=1e-5, rtol=0)
    torch.testing.assert_close(edited @ c_p, W @ c_p, atol=1e-5, rtol=0)


def test_the_tokens_of_uce(sd):
    """"a star" is start, a, star, end, ...; "heart" is start, heart, end, ...: 75 and 76 left."""
    c_e, c_g, c_p = uce.tokens(sd, {"a star": "heart", "moon": ""}, ["a ring"])
    star, heart, moon, empty, ring = (sd.encode([prompt])[0].double().T for prompt in
                                      ("a star", "heart", "moon", "", "a ring"))
    assert torch.equal(c_e, torch.cat([star[:, 2:], moon[:, 1:]], dim=1))
    assert torch.equal(c_g, torch.cat([heart[:, 1:76], empty[:, :76]], dim=1))
    assert torch.equal(c_p, torch.cat([empty, ring], dim=1))
    assert [uce.keep_weight(["moon"] * n) for n in (0, 1, 30)] == [1, 0.5, 0.1]


def test_uce_edits_keys_and_values_alone(sd):
    theta = uce.erase(sd, {"star": "heart"}, keep=["moon"])
    assert {*theta} == {name for name, _ in sd.unet.named_parameters()
                        if "attn2.to_k" in name or "attn2.to_v" in name}
    name, W = next(iter(theta.items()))
    original = dict(sd.unet.named_parameters())[name]
    expected = uce.edited(original, *uce.tokens(sd, {"star": "heart"}, ["moon"]), 0.1, 0.5)
    assert torch.equal(W, expected) and not torch.allclose(W, original, atol=1e-3)
    sample.with_tuned(sd, theta)


def test_rece_is_its_equation():
    old, new = ([columns(i, 5, dim=7) for i in some] for some in ((0, 1), (2, 3)))
    c = columns(4, 3)
    own, both = 1e-3 * np.eye(5), np.zeros((5, 5))
    for W, edited in zip(old, new):
        for a in range(5):
            for b in range(5):
                own[a, b] += sum(edited[row, a] * edited[row, b] for row in range(7))
                both[a, b] += sum(edited[row, a] * W[row, b] for row in range(7))
    by_loops = np.linalg.inv(own) @ both @ c.numpy()
    found = rece.adversarial(old, new, c, 1e-3)
    assert np.abs(found.numpy() - by_loops).max() < 1e-6
    assert (found - rece.adversarial(new, old, c, 1e-3)).abs().max() > 1e-2


def test_rece_finds_the_concept_itself_where_nothing_was_edited():
    W, c = [columns(i, 5, dim=7) for i in (0, 1)], columns(4, 3)
    torch.testing.assert_close(rece.adversarial(W, W, c, 1e-12), c)


def test_a_round_of_rece_erases_what_brings_the_concept_back(sd):
    pair, keep = {"star": "heart"}, ["moon"]
    before, after = (rece.erase(sd, pair, keep, rounds) for rounds in (0, 1))
    plain = uce.erase(sd, pair, keep)
    assert all(torch.equal(before[name], plain[name]) for name in plain)
    names = dict(sd.unet.named_parameters())
    c_e, c_g, c_p = uce.tokens(sd, pair, keep)
    found = rece.adversarial([names[name].double() for name in before],
                             [W.double() for W in before.values()], c_e, 1e-3)
    for name, W in after.items():
        assert torch.equal(W, uce.edited(before[name], found, c_g, c_p, 0.1, 0.5))


# Concept ablation

def test_the_target_of_concept_ablation_is_the_model_in_training():
    """It predicts 3 for the concept and 10 for the anchor; the original isn't asked."""
    text, asked = erase.Text(*features(2, 3.0, 1.0, 10.0)), []
    weight = torch.ones((), requires_grad=True)

    def student(x_t, t, c):
        asked.append((c.flatten()[0].item(), torch.is_grad_enabled()))
        return weight * torch.ones_like(x_t) * c[:, :1, :1, None]

    loss = concept_ablation.loss(student, None, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text)
    assert loss.tolist() == [49.0, 49.0]
    loss.mean().backward()
    assert weight.grad == 2 * (3 - 10) * 3  # of the concept's prediction alone
    assert asked == [(10.0, False), (3.0, True)]


def test_concept_ablation_learns_on_noised_images_of_the_anchor(sd):
    images = sample.generate(sd, ["a heart"], num=3, steps=2)
    latents, seen = sd.encode_images(images), []
    shape, texts = (2, *latents.shape[1:]), ["text"]
    generator = torch.Generator().manual_seed(0)
    batches = concept_ablation.data(sd, images)(None, texts, shape, 50, 3.0, generator)
    rng, abar = torch.Generator().manual_seed(0), ddim.alphas_cumprod()
    for _ in range(50):
        x_t, t, text = next(batches)
        some = torch.randint(3, (2,), generator=rng)
        assert torch.equal(t, torch.randint(1000, (2,), generator=rng)) and text == "text"
        noise = torch.randn(shape, generator=rng)
        torch.testing.assert_close(x_t, ddim.add_noise(latents[some], noise, abar[t]))
        seen += t.tolist()
    assert any(t % 20 != 1 for t in seen)  # any time, not only the sampler's


# ESD in contexts

def test_a_context_takes_the_empty_prompts_place_in_the_loss_alone(sd):
    """x_t is drawn with the empty prompt, at every step of a way, for prompts at random."""
    contexts = {"star": "", "a red star": "a red picture"}
    null, *prompts = sd.encode(["", *contexts])[:, None]
    texts, shape = [erase.Text(c, null, c) for c in prompts], (1, 4, 8, 8)
    found = esd_in_contexts.data(sd, contexts)(sd.unet, texts, shape, 2, 3.0,
                                               torch.Generator().manual_seed(0))
    rng, chosen, abar = torch.Generator().manual_seed(0), [], ddim.alphas_cumprod()
    for _ in range(8):
        with torch.no_grad():
            (x_t, t, text), (x_next, t_next, same) = next(found), next(found)
        i = torch.randint(2, (1,), generator=rng).item()
        torch.randint(1, (1,), generator=rng)  # one of a way's single concept
        assert torch.equal(x_t, torch.randn(shape, generator=rng))
        assert (t, t_next) == (501, 1) and text.concept is same.concept is texts[i].concept
        torch.testing.assert_close(text.null, sd.encode([[*contexts.values()][i]]))
        with torch.no_grad():
            eps = ddim.guided(sd.unet, texts[i].concept, null, 3.0)(x_t, 501)
        torch.testing.assert_close(x_next, ddim.step(x_t, eps, abar[501], abar[1]))
        chosen.append(i)
    assert {*chosen} == {0, 1}


# ESD against learned prompts

def attackable(x_t, t, c):
    """Predicts the mean of all tokens."""
    return torch.ones_like(x_t) * c.mean(dim=(1, 2))[:, None, None, None]


def test_the_attack_finds_tokens_that_bring_the_concept_back():
    c, x_t = torch.full((2, 77, 8), 1.0), torch.zeros(2, 4, 8, 8)
    target = torch.full_like(x_t, 2.0)
    attacked = adversarial_esd.attack(attackable, target, x_t, 1, c, tokens=16, steps=200, lr=0.1)
    assert attacked.shape == (2, 77 + 16, 8) and torch.equal(attacked[:, :77], c)
    assert not attacked.requires_grad
    assert (attackable(x_t, 1, attacked) - target).abs().max() < 0.1
    assert (attacked[:, 77:78] - attacked[:, 78:]).abs().amax(dim=2).min() > 0.1  # no two alike


def test_the_loss_of_adversarial_esd_by_hand():
    """No tokens to attack with: the model predicts 3, and 5 for what is kept."""
    text = erase.Text(*features(2, 3.0, 1.0, 3.0))
    keep, = features(1, 5.0)

    def teacher(x_t, t, c):
        return attackable(x_t, t, c) + (c.mean() == 5)  # 6 for the prompt to keep

    loss = adversarial_esd.against(keep, weight=0.5, tokens=0, steps=0)(
        attackable, teacher, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text, 2.0)
    target = 1 - 2 * (3 - 1)
    expected = (3 - target) ** 2 + 0.5 * (5 - 6) ** 2
    torch.testing.assert_close(loss, torch.full((2,), expected))


def test_adversarial_esd_runs_as_a_loss(sd):
    loss = adversarial_esd.against(sd.encode(["a heart", "a moon"]), steps=2)
    theta = erase.erase(sd, ["star"], loss_fn=loss, iterations=2, steps=2, lr=1e-3)
    moved = [name for name, W in sd.unet.named_parameters() if name in theta
             and not torch.equal(W, theta[name])]
    assert moved and all(theta[name].isfinite().all() for name in theta)
