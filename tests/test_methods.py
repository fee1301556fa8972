"""notebooks/methods: what ESD is compared with, each against its published equations."""

import importlib
import inspect
import re
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import ddim
import erase
import sample
from notebooks.methods import (
    adversarial_esd,
    checkpointed,
    concept_ablation,
    esd,
    esd_from,
    esd_in_contexts,
    esd_odds,
    forget_me_not,
    keep_empty_prompt,
    lora,
    rece,
    safe_latent_diffusion,
    salun,
    speed,
    spm,
    uce,
)
from notebooks.methods.safe_latent_diffusion import SETTINGS, SafePredictor, Safety
from support import commands, small


def tensor(*values: float) -> Tensor:
    """Returns one value per sample, (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def features(batch: int, *values: float) -> list[Tensor]:
    """Returns text features, one tensor for each value."""
    return [torch.full((batch, 77, 8), value) for value in values]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def equal(theta: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return theta.keys() == other.keys() and all(torch.equal(theta[n], other[n]) for n in theta)


def moved(sd, theta: dict[str, Tensor]) -> set[str]:
    """Returns the names of the weights that differ from the original's."""
    start = sample.unet_tensors(sd)
    return {name for name, W in theta.items() if not torch.equal(W, start[name])}


# ---- one interface

STEPS = {"iterations": 1, "lr": 1e-3, "batch": 1, "steps": 2}
FEWER = STEPS | {"method": "esd-x"}  # weights, to save time
# before the first step, nothing that is kept has changed, so its loss is 0 but for rounding
TWICE = FEWER | {"iterations": 2}
IMAGES = {"images": 3, "image_steps": 2, "iterations": 1, "lr": 1e-3, "batch": 1}
INTERFACE = {  # settings, then whether it uses seed, anchor and keep
    "esd": (STEPS, True, False, False),
    "esd_from": (STEPS | {"wider": "ring"}, True, False, False),
    "esd_in_contexts": (STEPS, True, True, False),
    "esd_odds": (STEPS | {"jumps": 2, "prior": 0.2}, True, False, False),
    "keep_empty_prompt": (FEWER, True, False, False),
    "adversarial_esd": (TWICE | {"attack_steps": 1, "tokens": 2}, True, False, True),
    "concept_ablation": (IMAGES, True, True, False),
    "salun": (TWICE | {"mask_batches": 1}, True, True, True),
    "forget_me_not": (FEWER, True, False, False),
    "spm": (STEPS, True, True, False),
    "lora": (STEPS, True, False, False),
    "uce": ({"lam": 0.2}, False, True, True),
    "rece": ({"rounds": 1}, False, True, True),
    "speed": ({"threshold": 0.2}, False, True, True),
}


SLOW = ("salun", "adversarial_esd")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.robustness) if name in SLOW else name
    for name in INTERFACE
])
def test_the_interface(name, sd):
    """Same seed, same theta; seed, anchor and keep change it where the method uses them."""
    settings, uses_seed, uses_anchor, uses_keep = INTERFACE[name]
    erase_with = importlib.import_module(f"notebooks.methods.{name}").erase
    assert [*inspect.signature(erase_with).parameters][:4] == ["sd", "concepts", "keep", "seed"]
    before = {key: W.clone() for key, W in sample.unet_tensors(sd).items()}

    def run(anchor="heart", keep=("moon",), seed=0):
        return erase_with(sd, {"star": anchor}, keep=[*keep], seed=seed, **settings)

    theta = run()
    assert moved(sd, theta)
    assert all(W.isfinite().all() and not W.requires_grad for W in theta.values())
    sample.with_weights(sd, theta)
    assert equal(sample.unet_tensors(sd), before)
    assert all(W.grad is None for W in sd.unet.parameters())

    changes = {"seed": 1, "anchor": "circle", "keep": ["ring"]}
    is_used = dict(zip(changes, (uses_seed, uses_anchor, uses_keep)))
    unused = {key: value for key, value in changes.items() if not is_used[key]}
    assert equal(run(**unused), theta)
    for key in changes.keys() - unused.keys():
        assert not equal(run(**{key: changes[key]}), theta), key
    if uses_keep:
        run(keep=[])


@pytest.mark.parametrize("name", INTERFACE)
def test_an_unknown_setting_is_an_error(name, sd):
    settings, *_ = INTERFACE[name]
    erase_with = importlib.import_module(f"notebooks.methods.{name}").erase
    with pytest.raises(TypeError, match="unknown"):
        erase_with(sd, {"star": "heart"}, keep=["moon"], seed=0, unknown=1, **settings)


# ---- ESD under it


def x_t(**options):
    return partial(erase.x_t_from_model, **options)


def test_esd_is_esd(sd):
    """Each setting gets where erase.erase has it."""
    settings = {"eta": 2.0, "lr": 1e-3, "iterations": 2, "batch": 2}
    theta = esd.erase(
        sd, {"star": "heart", "moon": "ring"}, seed=3, method="esd-u", steps=3, guidance=2.0,
        every_step=True, **settings,
    )
    data = x_t(steps=3, guidance=2.0, every_step=True)
    by_hand = erase.erase(sd, ["star", "moon"], method="esd-u", seed=3, data=data, **settings)
    assert equal(theta, by_hand)

    drawn = esd.erase(sd, {"star": ""}, drawn_for="heart", steps=3, **settings)
    by_hand = erase.erase(sd, {"star": "heart"}, data=x_t(steps=3), **settings)
    assert equal(drawn, by_hand)
    assert not equal(drawn, esd.erase(sd, {"star": ""}, steps=3, **settings))


def test_x_t_by_the_frozen_model(sd):
    """The first x_t is the same for both models, later ones aren't."""
    frozen = []

    def data(unet, *rest, **options):
        frozen.append(unet is sd.unet)
        return erase.x_t_from_model(unet, *rest, **options)

    def run(x_t, **more):
        settings = STEPS | {"iterations": 3, "every_step": True} | more
        return esd.erase(sd, {"star": ""}, x_t=x_t, data=data, **settings)

    assert not equal(run("frozen"), run("edited"))
    assert equal(run("frozen", iterations=1), run("edited", iterations=1))
    assert frozen == [True, False] * 2
    with pytest.raises(sample.UsageError, match="x_t is 'mine', choose edited or frozen"):
        run("mine")


def test_the_names_of_which_weights_are_tuned(sd):
    names = {name for name, _ in sd.unet.named_parameters()}
    tuned = {method: {*filter(esd.tuned_by(method), names)} for method in esd.METHODS}
    assert tuned["full"] == names
    assert tuned["esd-u of the paper"] == {name for name in names if "attn2" not in name}
    assert tuned["esd-x-strict"] == {n for n in names if re.search(r"attn2\.to_[kv]", n)}
    assert all(tuned[method] == {*filter(is_tuned, names)}
               for method, is_tuned in erase.METHODS.items())

    spared = tuned["esd-u of the paper"] - tuned["esd-u"]
    assert spared and all(
        re.match(r"(time_embedding|conv_norm_out|conv_out)\.", name) for name in spared
    )
    assert [*erase.METHODS] == ["esd-x", "esd-u"]
    theta = esd.erase(sd, {"star": ""}, method="esd-x-strict", **STEPS)
    assert {*theta} == tuned["esd-x-strict"]
    assert esd.tuned_by(str.isupper) is str.isupper
    with pytest.raises(sample.UsageError, match="method is 'esd-y', choose esd-x or esd-u or"):
        esd.erase(sd, {"star": ""}, method="esd-y")


def test_prompts_come_with_the_x_t_of_the_concept(sd):
    """The anchor is the concept's own; each sample gets a prompt to keep."""
    anchors, keep = ["heart", "ring"], ["moon", "cross", "arrow"]
    texts = erase.texts_for(sd, ["star", "circle"], batch=2)
    shape = (2, *sd.latent_shape)
    batches = esd.x_t_with_prompts(
        sd.unet, texts, shape, seeded(), sd=sd, anchors=anchors, keep=keep, steps=2
    )
    rng = seeded()
    plain = erase.x_t_from_model(sd.unet, texts, shape, rng, steps=2)
    indices, kept = set(), set()
    for batch, by_hand in islice(zip(batches, plain), 10):
        chosen = torch.randint(3, (2,), generator=rng)
        assert torch.equal(batch.x_t, by_hand.x_t) and torch.equal(batch.t, by_hand.t)
        assert batch.text.concept is by_hand.text.concept and batch.text.null is texts[0].null
        anchor = sd.encode(anchors)[by_hand.text.index].expand(2, -1, -1)
        assert torch.equal(batch.text.anchor, anchor)
        assert torch.equal(batch.text.kept, sd.encode(keep)[chosen])
        indices.add(by_hand.text.index)
        kept.update(chosen.tolist())
    assert indices == {0, 1} and kept == {0, 1, 2}


# ---- its variations under it: the same as their loss and data by hand


def test_variations_get_their_settings(sd):
    steps, settings = {"steps": 2}, {"iterations": 1, "lr": 1e-3, "batch": 1, "seed": 1}
    pair = {"star": "heart"}

    def by_hand(loss_fn, data=x_t(steps=2), concepts=("star",), **more):
        concepts = concepts if isinstance(concepts, dict) else [*concepts]
        return erase.erase(sd, concepts, loss_fn=loss_fn, data=data, **settings | more)

    assert equal(
        keep_empty_prompt.erase(sd, pair, weight=2.0, **steps, **settings),
        by_hand(partial(keep_empty_prompt.loss, weight=2.0), method="esd-u"),
    )
    odds = {"prior": 0.2, "largest": 5.0, "jumps": 3}
    assert equal(
        esd_odds.erase(sd, pair, **odds, **steps, **settings),
        by_hand(partial(esd_odds.loss, **odds)),
    )
    assert equal(
        esd_from.erase(sd, pair, wider="ring", **steps, **settings),
        by_hand(esd_from.loss, concepts={"star": "ring"}),
    )
    assert equal(
        adversarial_esd.erase(
            sd, pair, ["moon"], weight=0.5, tokens=2, attack_steps=3, attack_lr=0.2,
            method="esd-x", **steps, **settings,
        ),
        by_hand(
            partial(adversarial_esd.loss, weight=0.5, tokens=2, steps=3, lr=0.2),
            data=partial(adversarial_esd.data, sd=sd, keep=["moon"], steps=2),
        ),
    )


@pytest.mark.parametrize("every_step", [True, False])
def test_esd_in_contexts_takes_anchors_for_contexts(every_step, sd):
    contexts = {"star": "", "a red star": "a red picture"}
    settings = {"iterations": 2, "lr": 1e-3, "batch": 1}
    theta = esd_in_contexts.erase(sd, contexts, steps=3, every_step=every_step, **settings)
    data = partial(
        esd_in_contexts.data, sd=sd, contexts=contexts, steps=3, every_step=every_step
    )
    assert equal(theta, erase.erase(sd, [*contexts], data=data, **settings))

    texts = erase.texts_for(sd, [*contexts], batch=1)
    batches = data(sd.unet, texts, (1, *sd.latent_shape), seeded())
    drawn = [*islice(batches, 30)]
    assert ([batch.t.item() for batch in drawn] == [667, 334, 1] * 10) == every_step
    indices = [batch.text.index for batch in drawn]
    trajectories = [len({*indices[i : i + 3]}) == 1 for i in range(0, 30, 3)]
    assert all(trajectories) == every_step  # else each x_t is for a prompt of its own


def test_concept_ablation_draws_images_of_the_anchor_first(sd):
    settings = {"iterations": 2, "lr": 1e-3, "batch": 2, "seed": 1}
    theta = concept_ablation.erase(
        sd, {"star": "heart"}, images=3, image_steps=2, image_guidance=3.0, **settings
    )
    images = sample.generate(sd, ["heart"], num=3, seed=1, steps=2, guidance=3.0)
    data = partial(concept_ablation.data, latents=sd.encode_images(images))
    by_hand = erase.erase(
        sd, {"star": "heart"}, method=uce.keys_and_values, loss_fn=concept_ablation.loss,
        data=data, **settings,
    )
    assert equal(theta, by_hand)
    with pytest.raises(sample.UsageError, match="erases one concept, not 2"):
        concept_ablation.erase(sd, {"star": "heart", "moon": "heart"})
    with pytest.raises(TypeError, match="steps"):
        concept_ablation.erase(sd, {"star": "heart"}, steps=2, images=1, image_steps=1)


# ---- SalUn


def prompts(batch: int, *values: float) -> esd.Prompts:
    return esd.Prompts(*features(batch, *values))


def mean_of(c: Tensor, x_t: Tensor) -> Tensor:
    return torch.ones_like(x_t) * c[:, :1, :1, None]


def test_the_loss_of_salun_by_hand():
    """The model in training predicts twice the features: 6, and 20 for the anchor."""
    text = prompts(2, 3.0, 1.0, 10.0, 5.0)
    weight = torch.tensor(2.0, requires_grad=True)

    def student(x_t, t, c):
        assert torch.is_grad_enabled() == (c is not text.anchor)
        return weight * mean_of(c, x_t)

    def teacher(x_t, t, c):
        assert c is text.kept and not torch.is_grad_enabled()
        return mean_of(c, x_t)

    batch = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text
    loss = salun.loss(student, teacher, *batch, beta=0.1)
    assert loss.tolist() == pytest.approx([(6 - 20) ** 2 + 0.1 * (10 - 5) ** 2] * 2)
    loss.mean().backward()
    expected = 2 * (6 - 20) * 3 + 0.1 * 2 * (10 - 5) * 5
    assert weight.grad.item() == pytest.approx(expected)


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_the_mask_is_the_largest_gradients(fraction, sd):
    texts = erase.texts_for(sd, ["star"], batch=1)
    batches = [*islice(esd.x_t_with_prompts(
        sd.unet, texts, (1, *sd.latent_shape), seeded(), sd=sd, anchors=["heart"], steps=2
    ), 3)]
    mask = salun.saliency_mask(sd, "esd-x", batches, fraction)

    theta = erase.trainable_copies(sd.unet, "esd-x")
    unet = erase.with_theta(sd.unet, theta)
    for x_t, t, text in batches:
        with torch.no_grad():
            target = sd.unet(x_t, t, text.anchor)
        (unet(x_t, t, text.concept) - target).square().mean().backward()
    gradients = torch.cat([W.grad.abs().flatten() for W in theta.values()])
    chosen = torch.cat([mask[name].flatten() for name in theta])

    count = max(1, round(fraction * len(gradients)))
    assert abs(chosen.sum().item() - count) <= 2
    if fraction < 1:
        assert gradients[chosen].min() > 0.99 * gradients[~chosen].max()


def test_salun_moves_only_what_the_mask_has(sd, monkeypatch):
    masks = []
    make = salun.saliency_mask
    monkeypatch.setattr(
        salun, "saliency_mask", lambda *inputs: masks.append(make(*inputs)) or masks[-1]
    )
    theta = salun.erase(sd, {"star": "heart"}, ["moon"], fraction=0.3, mask_batches=2, **STEPS)
    (mask,), start = masks, sample.unet_tensors(sd)
    assert {*theta} == {*start}
    changed = {name: theta[name] != start[name] for name in theta}
    assert not any((changed[name] & ~mask[name]).any() for name in theta)
    share = sum(each.sum() for each in changed.values()) / sum(W.numel() for W in theta.values())
    assert 0.25 < share < 0.31


# ---- Forget-Me-Not


def test_the_tokens_of_forget_me_not(sd):
    """"a red star" is start, a, red, star, end, padding."""
    assert forget_me_not.tokens_of(sd, "a red star", end=False) == [1, 2, 3]
    assert forget_me_not.tokens_of(sd, "a red star", end=True) == [1, 2, 3, 4]


def test_attention_maps_are_those_of_the_layers(sd):
    """With them, the values give each layer's output. No hook is left."""
    x_t = torch.randn(2, *sd.latent_shape, generator=seeded())
    c = sd.encode(["a star", "moon"])
    theta = {}
    for name, W in erase.trainable_copies(sd.unet, "esd-x").items():
        theta[name] = W.detach() + 0.1 * torch.randn(W.shape, generator=seeded())
    unet = erase.with_theta(sd.unet, theta)
    names = {m: name for name, m in sd.unet.named_modules() if name.endswith("attn2")}

    called, values, outputs = [], [], []

    def keep_output(layer, inputs, output):
        called.append(names[layer])
        values.append(layer.to_v(inputs[1]))
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep_output) for layer in names]
    with torch.no_grad():
        maps = forget_me_not.attention_maps(sd, unet, x_t, torch.tensor([501, 21]), c)
    for hook in hooks:
        hook.remove()

    assert sorted(called) == sorted(names.values()) and len(maps) == len(called)
    for name, attention, v, output in zip(called, maps, values, outputs):
        assert attention.shape[:2] == (2, sd.unet.config.heads) and attention.shape[3] == 77
        heads = v.unflatten(-1, (sd.unet.config.heads, -1)).transpose(1, 2)
        together = (attention @ heads).transpose(1, 2).flatten(2)
        W, b = (theta[f"{name}.to_out.0.{part}"] for part in ("weight", "bias"))
        torch.testing.assert_close(output, (together @ W.T + b).detach(), atol=1e-5, rtol=1e-4)
    assert not any(layer._forward_hooks for layer in names)


def test_the_loss_of_forget_me_not_is_the_norm_at_the_concepts_tokens(sd, monkeypatch):
    maps = [torch.rand(2, 4, n, 77, generator=seeded(n), requires_grad=True) for n in (4, 16)]
    monkeypatch.setattr(forget_me_not, "attention_maps", lambda *inputs: maps)
    text = erase.texts_for(sd, ["star", "moon"], batch=2)[1]
    loss = forget_me_not.loss(
        None, None, None, None, text, sd=sd, tokens=[[1], [2, 5]]
    )
    squares = sum(each[:, :, :, [2, 5]].square().sum(dim=(1, 2, 3)) for each in maps)
    torch.testing.assert_close(loss, squares.sqrt())


def test_forget_me_not_lowers_the_attention_to_the_concept(sd):
    (text,) = erase.texts_for(sd, ["star"], batch=2)
    x_t = torch.randn(2, *sd.latent_shape, generator=seeded(5))
    settings = {"method": "esd-x", "iterations": 8, "batch": 2, "steps": 2}
    theta = forget_me_not.erase(sd, {"star": ""}, lr=1e-3, end=False, **settings)
    losses = [
        forget_me_not.loss(
            unet, None, x_t, torch.tensor([501, 21]), text, sd=sd, tokens=[[1]]
        )
        for unet in (sd.unet, erase.with_theta(sd.unet, theta))
    ]
    assert (losses[1] < losses[0]).all()


# ---- SPEED


def test_the_null_space_of_speed():
    """The singular values of C_0 C_0^T / 4 are 4, 1 and 0.01."""
    basis, _ = torch.linalg.qr(columns(0, 3, dim=3))
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]).double() / 2
    C_0 = basis @ torch.diag(torch.tensor([16.0, 4.0, 0.04]).double().sqrt()) @ signs
    low, middle = basis[:, 2:], basis[:, 1:2]
    torch.testing.assert_close(speed.null_space(C_0, 0.1), low @ low.T)
    torch.testing.assert_close(speed.null_space(C_0, 2.0), low @ low.T + middle @ middle.T)


def test_speed_is_the_minimum_and_keeps_what_it_must():
    """Against the same minimum by least squares, in coordinates that obey the constraints."""
    W, C_1, C_s, C_2 = columns(0, 9, dim=4), columns(1, 3, 9), columns(2, 3, 9), columns(3, 2, 9)
    C_0 = columns(4, 3, 9)
    P = speed.null_space(C_0, 1e-9)
    found = speed.edited(W, C_1, C_s=C_s, C_2=C_2, P=P).double()
    torch.testing.assert_close(found @ C_0, W @ C_0, atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ C_2, W @ C_2, atol=1e-5, rtol=0)

    U, _, _ = torch.linalg.svd(torch.cat([C_0, C_2], dim=1))
    N = U[:, 5:]  # D P = Z N^T for any Z
    system = torch.cat([(N.T @ C_1).T, torch.eye(4)])
    target = torch.cat([(W @ C_s - W @ C_1).T, torch.zeros(4, 4)])
    Z = torch.linalg.lstsq(system, target.double()).solution.T
    torch.testing.assert_close(found, W + Z @ N.T, atol=1e-5, rtol=0)


def test_speed_edits_values_alone(sd):
    theta = speed.erase(sd, {"star": "heart"}, ["moon", "a ring"], threshold=0.05)
    names = {name for name, _ in sd.unet.named_parameters()}
    assert {*theta} == {name for name in names if "attn2.to_v" in name}

    kept = [sd.encode([prompt])[0, first:].double().T for prompt, first in
            (("moon", 1), ("a ring", 2))]
    empty = sd.encode([""])[0].double().T
    tokens = uce.tokens(sd, {"star": "heart"}, [])
    name, W = next(iter(theta.items()))
    C_2 = torch.stack([empty[:, 0], empty[:, 1:].mean(dim=1)], dim=1)
    P = speed.null_space(torch.cat(kept, dim=1), 0.05)
    by_hand = speed.edited(sd.unet.get_parameter(name), tokens.c_e, tokens.c_g, C_2=C_2, P=P)
    assert torch.equal(W, by_hand)


# ---- SPM, and the LoRA


def test_the_loss_of_spm_by_hand():
    """The teacher predicts 3, 10 for the anchor, 5 for random features; the student 1 more."""
    text = prompts(2, 3.0, 1.0, 10.0, 5.0)

    def student(x_t, t, c):
        assert torch.is_grad_enabled()
        return mean_of(c, x_t) + 1

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return mean_of(c, x_t)

    batch = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text
    loss = spm.loss(student, teacher, *batch, eta=0.5, strength=7.0)
    target = 10 - 0.5 * (3 - 10)
    assert loss.tolist() == pytest.approx([(4 - target) ** 2 + 7 * 1] * 2)


def test_random_features_are_as_long_as_the_concepts(sd):
    texts = erase.texts_for(sd, ["star"], batch=3)
    batches = spm.data(
        sd.unet, texts, (3, *sd.latent_shape), seeded(), sd=sd, anchors=["heart"], steps=2
    )
    ratios = []
    for batch in islice(batches, 10):
        r, c = batch.text.kept, batch.text.concept
        ratios += (r.norm(dim=(1, 2)) / c.norm(dim=(1, 2))).tolist()
        assert torch.cosine_similarity(r.flatten(1), c.flatten(1)).abs().max() < 0.1
    assert 0.8 <= min(ratios) < 0.9 and 1.1 < max(ratios) <= 1.2


@pytest.mark.parametrize("module, rank", [(spm, 1), (lora, 4)])
def test_an_adapter_has_its_rank(module, rank, sd):
    theta = module.erase(sd, {"star": "heart"}, **STEPS | {"iterations": 2, "lr": 0.1})
    start = sample.unet_tensors(sd)
    if module is spm:
        matrices = {n for n, W in start.items() if ".attentions." in n and W.ndim > 1}
        assert any(start[name].ndim == 4 for name in matrices)
    else:
        matrices = {*filter(uce.keys_and_values, start)}
    assert {*theta} == matrices == moved(sd, theta)

    ranks = []
    for name, W in theta.items():
        difference = (W - start[name]).flatten(1).double()
        rounding = torch.finfo(torch.float32).eps * start[name].norm()
        ranks.append(torch.linalg.matrix_rank(difference, atol=rounding, rtol=1e-3).item())
    assert max(ranks) == rank


def test_the_example_of_a_strangers_method_is_short():
    lines = inspect.getsource(lora.erase).splitlines()
    assert sum(1 for line in lines if line.strip()) <= 25


# ---- Safe Latent Diffusion


def test_safe_direction_by_hand():
    """One element for each case: above the threshold, below it and small, below it and clamped."""
    safety = Safety(delta=0, scale=2.0, threshold=0.1, momentum_scale=0.5, beta=0.25)
    gamma, momentum = safe_latent_diffusion.safe_direction(
        eps_null=tensor(1, 1, 1), eps_c=tensor(4, 2, 0), eps_s=tensor(3, 2.2, 3),
        momentum=tensor(8, 4, 2), safety=safety,
    )

    mu = (0, 2 * 0.2, 1)  # eps_c - eps_s is 1, -0.2, -3
    expected = tensor(mu[0] * 2 + 0.5 * 8, mu[1] * 1.2 + 0.5 * 4, mu[2] * 2 + 0.5 * 2)
    torch.testing.assert_close(gamma, expected)
    torch.testing.assert_close(momentum, 0.25 * tensor(8, 4, 2) + 0.75 * expected)


def test_a_difference_that_equals_the_threshold_is_safe():
    safety = Safety(delta=0, scale=1000, threshold=0.5, momentum_scale=0, beta=0)
    gamma, _ = safe_latent_diffusion.safe_direction(
        eps_null=tensor(1), eps_c=tensor(2.5), eps_s=tensor(2), momentum=tensor(0), safety=safety
    )
    assert gamma == tensor(0)


def official_sld(eps_null, predictions, guidance, warmup, scale, threshold, momentum_scale, beta):
    """Returns a list of guided eps: the official code's operations in its order, for one element.

    predictions: pairs, for the text and for the concept.
    """
    momentum = 0.0
    guided = []
    for i, (text, concept) in enumerate(predictions):
        direction = text - eps_null
        strength = min(abs(text - concept) * scale, 1.0)
        strength = 0.0 if text - concept >= threshold else strength
        safety = (concept - eps_null) * strength + momentum_scale * momentum
        momentum = beta * momentum + (1 - beta) * safety
        if i >= warmup:
            direction = direction - safety
        guided.append(eps_null + guidance * direction)
    return guided


@pytest.mark.parametrize(
    "name, official",
    [
        ("weak", (15, 200, 0.0, 0.0, 0.0)),
        ("medium", (10, 1000, 0.01, 0.3, 0.4)),
        ("strong", (7, 2000, 0.025, 0.5, 0.7)),
        ("max", (0, 5000, 1.0, 0.5, 0.7)),
    ],
)
def test_fifty_steps_equal_the_official_arithmetic(name, official):
    eps_null = 0.3
    pairs = torch.randn(50, 2, generator=seeded(), dtype=torch.float64).tolist()
    predictions = [(text, text + 0.01 * difference) for text, difference in pairs]
    answers = iter([tensor(eps_null, *both) for both in predictions])

    (zeros,) = features(1, 0.0)
    predict = SafePredictor(
        lambda x_t, t, text: next(answers), text=zeros, null=zeros, guidance=7.5,
        concept=zeros, safety=SETTINGS[name],
    )
    guided = [predict(tensor(0), torch.tensor(t)).item() for t in ddim.timesteps(50)]
    expected = official_sld(eps_null, predictions, 7.5, *official)
    assert guided == pytest.approx(expected, abs=1e-12)


def test_the_unet_is_called_once_for_all_three_texts():
    unet = small.FakeUNet()
    null, text, concept = features(1, 1.0, 3.0, 4.0)
    null, text = null.expand(2, -1, -1), text.expand(2, -1, -1)
    safety = Safety(delta=0, scale=1000, threshold=0.0, momentum_scale=0, beta=0)
    predict = SafePredictor(unet, text, null, guidance=2.0, concept=concept, safety=safety)

    x_t = torch.randn(2, 4, 8, 8, generator=seeded())
    eps = predict(x_t, 981)
    torch.testing.assert_close(eps, x_t + 1 + 2 * (3 - 1 - (4 - 1)))  # eps_c - eps_s = -1: mu is 1
    assert unet.calls == [(6, 981)]


@pytest.mark.parametrize("steps, first", [(50, 10), (10, 2), (20, 4)])
def test_gamma_counts_from_the_same_time_with_fewer_steps(steps, first):
    null, text, concept = features(1, 1.0, 3.0, 4.0)
    safety = Safety(delta=10, scale=1000, threshold=0.0, momentum_scale=0, beta=0)
    predict = SafePredictor(
        small.FakeUNet(), text, null, guidance=2.0, concept=concept, safety=safety
    )

    x_t = torch.zeros(1, 4, 8, 8)
    means = [predict(x_t, t).mean().item() for t in ddim.timesteps(steps)]
    assert means == pytest.approx([5.0] * first + [-1.0] * (steps - first))


def test_generate_samples_with_it(sd):
    """Compared with the predictor itself, called with the three texts by hand."""
    c, null, concept = (sd.encode([prompt]) for prompt in ("a star", "a moon", "a heart"))
    strongest = partial(SafePredictor, concept=concept, safety=SETTINGS["max"])
    noise = torch.randn(1, 4, 8, 8, generator=seeded(3))
    with torch.no_grad():
        *_, (_, x_0) = ddim.denoise(strongest(sd.unet, c, null, 4), noise, 3)

    def generated(**settings):
        images = sample.generate(
            sd, ["a star"], seed=3, steps=3, guidance=4, negative="a moon", **settings
        )
        return commands.pixels(images)

    away = generated(predictor=strongest)
    assert torch.equal(away, commands.pixels(sd.decode(x_0)))

    weak = partial(SafePredictor, concept=concept, safety=SETTINGS["weak"])
    from_circle = partial(strongest, concept=sd.encode(["a circle"]))
    assert not torch.equal(away, generated())
    assert not torch.equal(away, generated(predictor=weak))
    assert not torch.equal(away, generated(predictor=from_circle))


def test_each_batch_begins_with_no_momentum(sd):
    away = partial(SafePredictor, concept=sd.encode(["a heart"]), safety=SETTINGS["max"])
    alone, together = (
        sample.generate(sd, ["a star"] * 2, seed=[0, 1], steps=3, batch=batch, predictor=away)
        for batch in (1, 2)
    )
    assert commands.difference(alone, together) <= 1


# ---- a concept out of a wider one


def test_esd_from_by_hand():
    """The teacher predicts 3 for the concept, 1 for null, 10 for the anchor; the student 0 or 5."""
    text = erase.Text(*features(2, 3.0, 1.0, 10.0))

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert c is text.anchor
        assert torch.is_grad_enabled()
        return torch.ones_like(x_t) * tensor(0.0, 5.0)

    x_t, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    loss = esd_from.loss(student, teacher, x_t, t, text, eta=2.0)
    assert loss.tolist() == [36.0, 1.0]  # target = 10 - 2 * (3 - 1) = 6


def test_without_an_anchor_its_eta_is_one_more_than_esds(sd):
    (text,) = erase.texts_for(sd, ["a star"], batch=1)
    t = torch.tensor([1])
    x_t, other = torch.randn(2, 1, 4, 8, 8, generator=seeded())

    def student(x_t, t, c):
        return sd.unet(x_t + other, t, c)

    ours = erase.esd_loss(student, sd.unet, x_t, t, text, eta=1.5)
    official = esd_from.loss(student, sd.unet, x_t, t, text, eta=2.5)
    torch.testing.assert_close(ours, official)
    same_eta = esd_from.loss(student, sd.unet, x_t, t, text, eta=1.5)
    assert not torch.allclose(ours, same_eta)


# ---- closed forms, against the published formulas written out with loops


def columns(seed: int, n: int, dim: int = 5) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(dim, n))


def uce_by_loops(W, c_e, c_g, c_p, lam, s):
    """UCE, eq. 7, element by element, with an inverse."""
    rows, dim = W.shape
    A = lam * W.copy()
    B = lam * np.eye(dim)
    edits = [(c_e[:, i], c_g[:, i], 1) for i in range(c_e.shape[1])]
    edits += [(c_p[:, i], c_p[:, i], s) for i in range(c_p.shape[1])]
    for c, becomes, weight in edits:
        value = W @ becomes
        for a in range(dim):
            for row in range(rows):
                A[row, a] += weight * value[row] * c[a]
            for b in range(dim):
                B[a, b] += weight * c[a] * c[b]
    return A @ np.linalg.inv(B)


@pytest.mark.parametrize("kept", [0, 3])
def test_uce_is_its_equation(kept):
    W, c_e, c_g, c_p = columns(0, 5, dim=7), columns(1, 4), columns(2, 4), columns(3, kept)
    found = uce.edited(W, c_e, c_g, c_p, lam=0.1, s=0.3)
    by_loops = uce_by_loops(*(x.numpy() for x in (W, c_e, c_g, c_p)), lam=0.1, s=0.3)
    assert np.abs(found.numpy() - by_loops).max() < 1e-6

    mistakes = [
        uce.edited(W, c_g, c_e, c_p, lam=0.1, s=0.3),
        uce.edited(W, c_e, c_g, c_p, lam=0.5, s=0.3),
        uce.edited(W, c_e, c_g, c_e, lam=0.1, s=0.3),
    ]
    if kept:
        mistakes.append(uce.edited(W, c_e, c_g, c_p, lam=0.1, s=1.0))
    for mistake in mistakes:
        assert (found - mistake).abs().max() > 1e-2


def test_uce_sends_the_concept_where_the_guide_went():
    W, c_e, c_g, c_p = columns(0, 5, dim=7), columns(1, 2), columns(2, 2), columns(3, 2)
    edited = uce.edited(W, c_e, c_g, c_p, lam=1e-9, s=0.5).double()
    torch.testing.assert_close(edited @ c_e, W @ c_g, atol=1e-5, rtol=0)
    torch.testing.assert_close(edited @ c_p, W @ c_p, atol=1e-5, rtol=0)


def test_the_tokens_of_uce(sd):
    """"a star" is start, a, star, end, ...; "heart" is start, heart, end, ...: 75 and 76 left."""
    tokens = uce.tokens(sd, {"a star": "heart", "moon": ""}, ["a ring"])
    prompts = ("a star", "heart", "moon", "", "a ring")
    star, heart, moon, empty, ring = (sd.encode([prompt])[0].double().T for prompt in prompts)
    assert torch.equal(tokens.c_e, torch.cat([star[:, 2:], moon[:, 1:]], dim=1))
    assert torch.equal(tokens.c_g, torch.cat([heart[:, 1:76], empty[:, :76]], dim=1))
    assert torch.equal(tokens.c_p, torch.cat([empty, ring], dim=1))
    assert [uce.keep_weight(["moon"] * n) for n in (0, 1, 30)] == [1, 0.5, 0.1]


def test_uce_edits_keys_and_values_alone(sd):
    weights = dict(sd.unet.named_parameters())
    theta = uce.erase(sd, {"star": "heart"}, keep=["moon"])
    assert {*theta} == {name for name in weights if "attn2.to_k" in name or "attn2.to_v" in name}

    name, W = next(iter(theta.items()))
    tokens = uce.tokens(sd, {"star": "heart"}, ["moon"])
    assert torch.equal(W, uce.edited(weights[name], *tokens, lam=0.1, s=0.5))
    assert not torch.allclose(W, weights[name], atol=1e-3)
    sample.with_weights(sd, theta)


def test_closed_forms_edit_a_compiled_unet(sd):
    compiled = replace(sd, unet=torch.compile(sd.unet, backend="eager"))
    for method in (uce.erase, rece.erase):
        plain = method(sd, {"star": "heart"})
        theta = method(compiled, {"star": "heart"})
        assert theta.keys() == plain.keys()
        assert all(torch.equal(theta[name], plain[name]) for name in plain)


def test_rece_is_its_equation():
    old = [columns(seed, 5, dim=7) for seed in (0, 1)]
    new = [columns(seed, 5, dim=7) for seed in (2, 3)]
    c = columns(4, 3)

    gram = 1e-3 * np.eye(5)
    cross = np.zeros((5, 5))
    for W, edited in zip(old, new):
        for a in range(5):
            for b in range(5):
                gram[a, b] += sum(edited[row, a] * edited[row, b] for row in range(7))
                cross[a, b] += sum(edited[row, a] * W[row, b] for row in range(7))
    by_loops = np.linalg.inv(gram) @ cross @ c.numpy()

    found = rece.adversarial(old, new, c, lam=1e-3)
    assert np.abs(found.numpy() - by_loops).max() < 1e-6
    assert (found - rece.adversarial(new, old, c, lam=1e-3)).abs().max() > 1e-2


def test_rece_finds_the_concept_itself_where_nothing_was_edited():
    W = [columns(seed, 5, dim=7) for seed in (0, 1)]
    c = columns(4, 3)
    torch.testing.assert_close(rece.adversarial(W, W, c, lam=1e-12), c)


def test_a_round_of_rece_erases_what_brings_the_concept_back(sd):
    pair, keep = {"star": "heart"}, ["moon"]
    before, after = (rece.erase(sd, pair, keep, rounds=rounds) for rounds in (0, 1))
    plain = uce.erase(sd, pair, keep)
    assert all(torch.equal(before[name], plain[name]) for name in plain)

    weights = dict(sd.unet.named_parameters())
    original = [weights[name].double() for name in before]
    edited = [W.double() for W in before.values()]
    star, heart = (sd.encode([prompt])[0].double().T for prompt in ("star", "heart"))
    kept = torch.cat([sd.encode([prompt])[0].double().T for prompt in ("", "moon")], dim=1)
    found = rece.adversarial(original, edited, star, lam=1e-3)  # of all 77 tokens
    for name, W in after.items():
        assert torch.equal(W, uce.edited(before[name], found, heart, kept, lam=0.1, s=0.1))


# ---- concept ablation


def test_the_target_of_concept_ablation_is_the_model_in_training():
    """It predicts 3 for the concept and 10 for the anchor; the original isn't called."""
    text = erase.Text(*features(2, 3.0, 1.0, 10.0))
    calls = []
    weight = torch.ones((), requires_grad=True)

    def student(x_t, t, c):
        calls.append((c.flatten()[0].item(), torch.is_grad_enabled()))
        return weight * torch.ones_like(x_t) * c[:, :1, :1, None]

    loss = concept_ablation.loss(student, None, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text)
    assert loss.tolist() == [49.0, 49.0]
    loss.mean().backward()
    assert weight.grad == 2 * (3 - 10) * 3  # of the concept's prediction alone
    assert calls == [(10.0, False), (3.0, True)]


def test_concept_ablation_learns_on_noised_images_of_the_anchor(sd):
    latents = sd.encode_images(sample.generate(sd, ["a heart"], num=3, steps=2))
    shape = (2, *latents.shape[1:])
    batches = concept_ablation.data(None, ["text"], shape, seeded(), latents=latents)

    times = []
    rng = seeded()
    abar = ddim.alphas_cumprod()
    for x_t, t, text in islice(batches, 50):
        chosen = torch.randint(3, (2,), generator=rng)
        assert torch.equal(t, torch.randint(1000, (2,), generator=rng))
        assert text == "text"
        noise = torch.randn(shape, generator=rng)
        torch.testing.assert_close(x_t, ddim.add_noise(latents[chosen], noise, abar[t]))
        times += t.tolist()
    assert any(t % 20 != 1 for t in times)  # any time, not only the sampler's


def test_concept_ablation_refuses_several_concepts(sd):
    data = partial(concept_ablation.data, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(sample.UsageError, match="erases one concept, not 2"):
        erase.erase(sd, ["star", "moon"], data=data, iterations=1)


# ---- ESD in contexts


def test_a_context_takes_the_empty_prompts_place_in_the_loss_alone(sd):
    """x_t is drawn with the empty prompt, at every step of a trajectory, for random prompts."""
    contexts = {"star": "", "a red star": "a red picture"}
    texts = erase.texts_for(sd, [*contexts], batch=1)
    null = texts[0].null
    shape = (1, 4, 8, 8)
    batches = esd_in_contexts.data(
        sd.unet, texts, shape, seeded(), sd=sd, contexts=contexts, steps=2
    )

    chosen = []
    rng = seeded()
    abar = ddim.alphas_cumprod()
    for _ in range(8):
        x_t, t, text = next(batches)
        x_next, t_next, same = next(batches)
        i = torch.randint(2, (1,), generator=rng).item()
        torch.randint(1, (1,), generator=rng)  # one of a trajectory's single concept
        assert torch.equal(x_t, torch.randn(shape, generator=rng))
        assert (t, t_next) == (501, 1)
        assert text.concept is same.concept is texts[i].concept
        torch.testing.assert_close(text.null, sd.encode([[*contexts.values()][i]]))
        assert torch.equal(same.null, text.null)

        with torch.no_grad():
            predict = ddim.guided_predictor(sd.unet, texts[i].concept, null, guidance=3.0)
            eps = predict(x_t, torch.tensor(501))
        torch.testing.assert_close(x_next, ddim.step(x_t, eps, abar[501], abar[1]))
        chosen.append(i)
    assert {*chosen} == {0, 1}


def test_there_is_a_context_for_each_prompt(sd):
    data = partial(esd_in_contexts.data, sd=sd, contexts={"star": ""})
    with pytest.raises(sample.UsageError, match="1 contexts for 2 prompts"):
        erase.erase(sd, ["star", "a red star"], data=data, iterations=1)


# ---- ESD against learned prompts


def attackable(x_t, t, c):
    """Predicts the mean of all tokens."""
    return torch.ones_like(x_t) * c.mean(dim=(1, 2))[:, None, None, None]


def test_the_attack_finds_tokens_that_bring_the_concept_back():
    c = torch.full((2, 77, 8), 1.0)
    x_t = torch.zeros(2, 4, 8, 8)
    target = torch.full_like(x_t, 2.0)
    attacked = adversarial_esd.attack(attackable, target, x_t, 1, c, tokens=16, steps=200, lr=0.1)
    assert attacked.shape == (2, 77 + 16, 8)
    assert torch.equal(attacked[:, :77], c)
    assert not attacked.requires_grad
    assert (attackable(x_t, 1, attacked) - target).abs().max() < 0.1
    assert (attacked[:, 77:78] - attacked[:, 78:]).abs().amax(dim=2).min() > 0.1  # no two alike


def test_the_attack_sees_gradients_that_float16_rounds_to_0():
    c = torch.zeros(2, 77, 64).half()
    x_t = torch.zeros(2, 4, 8, 8).half()
    start = adversarial_esd.attack(attackable, x_t, x_t, 1, c, steps=0)
    target = attackable(x_t, 1, start) + 1e-4
    attacked = adversarial_esd.attack(attackable, target, x_t, 1, c, steps=1)
    assert (attacked != start)[:, 77:].all()


def test_salun_refuses_a_mask_of_gradients_that_are_0(sd):
    flat = sample.with_weights(sd, {"conv_out.weight": 0 * sd.unet.conv_out.weight})
    with pytest.raises(sample.UsageError, match="50% of the gradients or more are 0: use float32"):
        salun.erase(flat, {"star": ""}, **TWICE | {"mask_batches": 1})


def test_the_loss_of_adversarial_esd_by_hand():
    """No tokens to attack with: the model predicts 3, and 5 for the prompt to keep."""
    text = esd.Prompts(*features(2, 3.0, 1.0, 3.0, 5.0))

    def teacher(x_t, t, c):
        return attackable(x_t, t, c) + (c.mean() == 5)  # 6 for the prompt to keep

    loss = adversarial_esd.loss(
        attackable, teacher, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text, eta=2.0,
        weight=0.5, tokens=0, steps=0,
    )
    target = 1 - 2 * (3 - 1)
    expected = (3 - target) ** 2 + 0.5 * (5 - 6) ** 2
    torch.testing.assert_close(loss, torch.full((2,), expected))


def test_prompts_to_keep_are_drawn_for_each_sample_and_leave_x_t_the_models(sd):
    keep = ["a heart", "a moon", "a ring"]
    kept = sd.encode(keep)
    texts = erase.texts_for(sd, ["star", "circle"], batch=2)
    shape = (2, *sd.latent_shape)
    batches = adversarial_esd.data(
        sd.unet, texts, shape, seeded(), sd=sd, keep=keep, steps=3, guidance=2.0, every_step=True
    )

    rng = seeded()
    drawn = []
    by_hand = erase.x_t_from_model(
        sd.unet, texts, shape, rng, steps=3, guidance=2.0, every_step=True
    )
    for batch, plain in islice(zip(batches, by_hand), 12):
        chosen = torch.randint(3, (2,), generator=rng)
        assert torch.equal(batch.x_t, plain.x_t)
        assert torch.equal(batch.t, plain.t)
        assert batch.text.concept is plain.text.concept
        assert batch.text.null is plain.text.null
        assert torch.equal(batch.text.kept, kept[chosen])
        drawn.append(tuple(chosen.tolist()))
    assert {prompt for pair in drawn for prompt in pair} == {0, 1, 2}
    assert any(first != second for first, second in drawn)  # not one for the whole batch


def test_adversarial_esd_without_a_prompt_to_keep_is_refused(sd):
    with pytest.raises(sample.UsageError, match="use adversarial_esd.data"):
        erase.erase(
            sd, ["star"], loss_fn=adversarial_esd.loss, iterations=1,
            data=partial(erase.x_t_from_model, steps=2),
        )


@pytest.mark.robustness  # seconds
def test_adversarial_esd_runs_from_the_command_line(sd, folder, tmp_path, monkeypatch):
    """As from Python, with the flags that its data takes."""
    monkeypatch.setattr(erase, "draw_before_and_after", lambda *_: Image.new("RGB", (8, 8)))
    name = "notebooks.methods.adversarial_esd"
    out = tmp_path / "star.safetensors"
    commands.run(
        erase.main, "star", "--model", folder, "--iterations", 1, "--steps", 3, "--every-step",
        "--lr", 1e-3, "--loss", f"{name}:loss", "--data", f"{name}:data", "--out", out,
    )

    data = partial(adversarial_esd.data, sd=sd, steps=3, every_step=True)
    theta = erase.erase(
        sd, ["star"], iterations=1, lr=1e-3, loss_fn=adversarial_esd.loss, data=data
    )
    stored = load_file(out)
    assert stored.keys() == theta.keys()
    assert all(torch.equal(stored[name], theta[name].half()) for name in theta)


# ---- no hidden state


@pytest.mark.parametrize("module", [adversarial_esd, concept_ablation, esd_from])
def test_a_loss_is_the_same_when_it_is_called_again(module, sd):
    (text,) = erase.texts_for(sd, {"star": "a heart"}, batch=2)
    x_t = torch.randn(2, *sd.latent_shape, generator=seeded())
    t = torch.tensor([501, 21])
    loss_fn = module.loss
    if module is adversarial_esd:
        loss_fn = partial(module.loss, steps=2)
        text = esd.Prompts(text.concept, text.null, text.anchor, kept=text.anchor)
    unet = erase.with_theta(sd.unet, erase.trainable_copies(sd.unet, "esd-x"))
    first, again = (loss_fn(unet, sd.unet, x_t, t, text) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "function, bound",
    [
        (adversarial_esd.data, {"keep": ("a heart", "a moon"), "steps": 2}),
        (concept_ablation.data, {"latents": torch.ones(3, 4, 8, 8)}),
        (esd_in_contexts.data, {"contexts": {"star": ""}, "steps": 2}),
    ],
)
def test_data_is_the_same_for_the_same_rng(function, bound, sd):
    data = erase.bind(function, bound | {"sd": sd})
    texts = erase.texts_for(sd, ["star"], batch=2)
    first, again = (
        list(islice(data(sd.unet, texts, (2, *sd.latent_shape), seeded()), 4)) for _ in range(2)
    )
    for batch, same in zip(first, again):
        assert torch.equal(batch.x_t, same.x_t)
        assert torch.equal(batch.t, same.t)
        assert all(torch.equal(a, b) for a, b in zip(batch.text[:3], same.text[:3]))
    assert not torch.equal(first[0].x_t, first[1].x_t)


# ---- LoRA, through erase.with_theta


def test_a_lora_changes_only_its_weights_and_merges(sd):
    """W + up @ down, of rank 4, on the keys and values of cross-attention."""
    start = {
        name: W for name, W in sd.unet.named_parameters() if uce.keys_and_values(name)
    }
    before = {name: W.clone() for name, W in sd.unet.named_parameters()}
    down = {name: 0.1 * torch.randn(4, W.shape[1], generator=seeded()) for name, W in start.items()}
    up = {name: torch.zeros(W.shape[0], 4) for name, W in start.items()}
    leaves = [leaf.requires_grad_() for leaf in (*down.values(), *up.values())]

    def merged():
        return {name: W + up[name] @ down[name] for name, W in start.items()}

    unet = erase.with_theta(sd.unet, merged)
    texts = erase.texts_for(sd, ["star"], batch=1)
    shape = (1, *sd.latent_shape)
    data = erase.x_t_from_model(unet, texts, shape, seeded(), steps=2)
    losses = erase.gradient_steps(unet, sd.unet, data, torch.optim.Adam(leaves, lr=1e-2))
    assert len(list(islice(losses, 3))) == 3

    erased = sample.with_weights(sd, merged())
    after = dict(erased.unet.named_parameters())
    assert all(torch.equal(W, before[name]) for name, W in sd.unet.named_parameters())
    assert {name for name in after if not torch.equal(after[name], before[name])} == {*start}
    for name in start:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 4

    x_t = torch.randn(shape, generator=seeded(1))
    with torch.no_grad():
        eps = unet(x_t, torch.tensor([501]), texts[0].concept)
        eps_merged = erased.unet(x_t, torch.tensor([501]), texts[0].concept)
        eps_original = sd.unet(x_t, torch.tensor([501]), texts[0].concept)
    assert torch.equal(eps, eps_merged)
    assert not torch.allclose(eps, eps_original, atol=1e-3)


# ---- activation checkpointing


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("method", ["esd-x", "esd-u"])
def test_a_checkpointed_unet_is_erased_to_the_same_weights(method, sd):
    recomputing = replace(sd, unet=checkpointed.checkpointed(sd.unet))
    settings = {
        "method": method, "iterations": 3, "lr": 1e-3, "batch": 2,
        "data": partial(erase.x_t_from_model, steps=2),
    }
    plain = erase.erase(sd, ["star"], **settings)
    theta = erase.erase(recomputing, ["star"], **settings)
    assert theta.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(theta[name], plain[name])
        assert not torch.equal(theta[name], sd.unet.get_parameter(name))


def kept_for_the_gradient(unet: torch.nn.Module, sd: sample.StableDiffusion) -> int:
    """Returns how many numbers a loss keeps between its forward and its backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    (text,) = erase.texts_for(sd, ["star"], batch=1)
    x_t = torch.randn(1, *sd.latent_shape, generator=seeded())
    edited = erase.with_theta(unet, erase.trainable_copies(unet, "esd-u"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        erase.esd_loss(edited, sd.unet, x_t, torch.tensor([501]), text)
    return sum(kept)


def test_a_checkpointed_unet_keeps_less_and_shares_its_weights(sd):
    unet = checkpointed.checkpointed(sd.unet)
    assert kept_for_the_gradient(unet, sd) < 0.1 * kept_for_the_gradient(sd.unet, sd)

    weights = dict(unet.named_parameters())
    assert list(weights) == [name for name, _ in sd.unet.named_parameters()]
    assert all(weights[name] is W for name, W in sd.unet.named_parameters())
    resnet = sd.unet.mid_block.resnets[0]
    assert not isinstance(resnet, checkpointed.Checkpointed)  # the original stays as it is


@pytest.mark.robustness  # it is about torch
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_torchs_checkpoint_alone_loses_theta(use_reentrant, sd, monkeypatch):
    """Why checkpointed.py keeps the weights: this is what its docstring says happens otherwise."""
    def forward(layer, *inputs):
        return checkpoint(layer.plain[0], *inputs, use_reentrant=use_reentrant)

    monkeypatch.setattr(checkpointed.Checkpointed, "forward", forward)
    theta = erase.trainable_copies(sd.unet, "esd-u")
    unet = erase.with_theta(checkpointed.checkpointed(sd.unet), theta)
    (text,) = erase.texts_for(sd, ["star"], batch=1)
    x_t = torch.randn(1, *sd.latent_shape, generator=seeded())
    loss = erase.esd_loss(unet, sd.unet, x_t, torch.tensor([501]), text).mean()

    if use_reentrant:
        loss.backward()
        without = [name for name, W in theta.items() if W.grad is None]
        assert len(without) > 0.9 * len(theta)
    else:
        with pytest.raises(CheckpointError):
            loss.backward()
