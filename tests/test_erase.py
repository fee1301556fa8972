"""erase.py: Eq. 6, what x_t is, which tensors move, steps by hand, resuming, the command line."""

import copy
import functools
import importlib
import inspect
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, tensor

import ddim
import erase
import sample
from notebooks.methods import esd_from
from sample import UsageError
from unet import UNet


def drawn_by(data, steps=4, **settings):
    """`data` with its number of steps bound, as the command line binds it."""
    return functools.partial(data, steps=steps, **settings)


EVERY_STEP = functools.partial(erase.x_t_from_model, every_step=True)
QUICK = {"iterations": 2, "lr": 1e-3, "data": drawn_by(erase.x_t_from_model)}


# Eq. 6

def test_target_on_hand_made_tensors():
    eps_null, eps_c = tensor([1.0, 2.0, 3.0]), tensor([2.0, 0.0, 3.0])
    assert erase.esd_target(eps_null, eps_c, 1.0).tolist() == [0.0, 4.0, 3.0]
    assert erase.esd_target(eps_null, eps_c, 3.0).tolist() == [-2.0, 8.0, 3.0]
    assert erase.esd_target(eps_null, eps_c, 0.0).tolist() == eps_null.tolist()


def test_eta_minus_one_gives_back_the_conditional_prediction():
    eps_null, eps_c = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(erase.esd_target(eps_null, eps_c, -1.0), eps_c, atol=1e-12)


def test_the_loss_is_one_mean_square_per_sample():
    """The teacher predicts 3 for the concept, 1 for null, 10 for the anchor; the student 0 or 5."""
    text = erase.Text(*(torch.full((2, 77, 4), value) for value in (3.0, 1.0, 10.0)))

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert c is text.concept and torch.is_grad_enabled()
        return torch.ones_like(x_t) * tensor([0.0, 5.0]).view(2, 1, 1, 1)

    x_t, t = torch.zeros(2, 4, 8, 8), tensor([1, 2])
    loss = erase.esd_loss(student, teacher, x_t, t, text, eta=2.0)
    assert loss.tolist() == [9.0, 64.0]  # target = 1 - 2 * (3 - 1) = -3


# Which weights: trainable_copies and with_theta

@pytest.mark.parametrize("method, tensors, parameters", [  # the paper's code counts these on SD v1
    ("esd-x", 80, 43_962_560),
    ("esd-u", 598, 813_495_680),
    (lambda name: "attn2.to_k" in name or "attn2.to_v" in name, 32, 19_169_280),
    (lambda name: True, 686, 859_520_964),
])
def test_counts_on_the_full_size_model(method, tensors, parameters):
    with torch.device("meta"):
        theta = erase.trainable_copies(UNet(), method)
    assert len(theta) == tensors
    assert sum(part.numel() for part in theta.values()) == parameters


def test_the_names_of_esd_x():
    with torch.device("meta"):
        theta = erase.trainable_copies(UNet(), "esd-x")
    places = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    layers = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    assert set(theta) == {f"{p}.transformer_blocks.0.attn2.{w}" for p in places for w in layers}


HALF = pytest.param("bfloat16", marks=pytest.mark.robustness)  # seconds, where a CPU has none


@pytest.mark.parametrize("dtype", ["float32", HALF])
def test_theta_is_a_float32_copy(dtype, folder):
    unet = sample.load(folder, dtype=dtype).unet
    theta = erase.trainable_copies(unet, "esd-x")
    assert len(theta) == 80
    for name, part in theta.items():
        own = unet.get_parameter(name)
        assert part.dtype == torch.float32 and part.is_leaf and part.requires_grad
        assert torch.equal(part, own.float()) and part.data_ptr() != own.data_ptr()
        assert not own.requires_grad


def test_a_selection_of_nothing_is_an_error(sd):
    with pytest.raises(UsageError, match="selects no weight"):
        erase.erase(sd, ["star"], lambda name: "attn3" in name, iterations=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", HALF])
def test_the_edited_model_has_thetas_newest_values(dtype, folder):
    sd = sample.load(folder, dtype=dtype)
    c, x_t = sd.encode(["star"]), torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(0))
    theta = erase.trainable_copies(sd.unet, "esd-x")
    unet, before = erase.with_theta(sd.unet, theta), sd.unet(x_t, 1, c)
    assert torch.allclose(unet(x_t, 1, c), before, atol=1e-5)
    for shift in (0.1, 0.2):
        for part in theta.values():
            part += shift
        edited = copy.deepcopy(sd.unet)
        for name, part in theta.items():
            edited.get_parameter(name).copy_(part)
        assert torch.allclose(unet(x_t, 1, c), edited(x_t, 1, c), atol=1e-5)
        assert (unet(x_t, 1, c) - before).abs().max() > 0.01
    assert torch.equal(sd.unet(x_t, 1, c), before)  # the frozen one stays as it was


# Where x_t comes from: x_t_from_model and x_t_from_images

def texts_of(sd, *concepts, anchors=None, batch=1):
    null = sd.encode([""] * batch)
    return [erase.Text(sd.encode([concept] * batch), null, sd.encode([anchor] * batch))
            for concept, anchor in zip(concepts, anchors or concepts)]


def denoised(unet, x, times, text, guidance, steps=4):
    """x at noise -> x after these of the times: the two predictions apart, no helper of ours."""
    abar = ddim.alphas_cumprod()
    for t in times:
        e, e_c = unet(x, t, text.null), unet(x, t, text.anchor)
        e, t_prev = e + guidance * (e_c - e), max(t - 1000 // steps, 0)
        x_0 = (x - (1 - abar[t]) ** 0.5 * e) / abar[t] ** 0.5
        x = abar[t_prev] ** 0.5 * x_0 + (1 - abar[t_prev]) ** 0.5 * e
    return x


@torch.no_grad()
def test_x_t_from_model_draws_the_concept_then_the_step_then_the_noise(sd):
    texts = texts_of(sd, "star", "heart", "moon", anchors=["circle", "heart", "moon"], batch=2)
    rng = Generator().manual_seed(3)
    data = erase.x_t_from_model(sd.unet, texts, (2, 4, 8, 8), rng, steps=4, guidance=2.5)
    times, generator, seen = [751, 501, 251, 1], Generator().manual_seed(3), set()
    for x_t, t, text in itertools.islice(data, 12):
        i, k = (torch.randint(n, (1,), generator=generator).item() for n in (3, 4))
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        assert text is texts[i] and t.tolist() == [times[k]] * 2
        expected = denoised(sd.unet, noise, times[:k], text, 2.5)
        assert torch.allclose(x_t, expected, atol=1e-4), (i, k)
        if i == 0 and k > 0 and "its anchor" not in seen:  # "star", drawn for "circle"
            for_concept = text._replace(anchor=text.concept)
            other = denoised(sd.unet, noise, times[:k], for_concept, 2.5)
            assert not torch.allclose(x_t, other, atol=1e-3)
            seen.add("its anchor")
        seen |= {("concept", i), ("step", k)}
    assert len(seen) == 3 + 4 + 1  # the seed shows each of them


@torch.no_grad()
def test_every_step_draws_the_concept_then_the_noise_and_yields_each_t_in_order(sd):
    texts = texts_of(sd, "star", "heart")
    rng = Generator().manual_seed(1)
    data = EVERY_STEP(sd.unet, texts, (1, 4, 8, 8), rng, steps=4, guidance=2.5)
    times, generator, seen = [751, 501, 251, 1], Generator().manual_seed(1), set()
    for _ in range(3):
        i = torch.randint(2, (1,), generator=generator).item()
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        for k, (x_t, t, text) in enumerate(itertools.islice(data, 4)):
            assert text is texts[i] and t.tolist() == [times[k]]
            expected = denoised(sd.unet, noise, times[:k], text, 2.5)
            assert torch.allclose(x_t, expected, atol=1e-4), k
        seen.add(i)
    assert seen == {0, 1}


@torch.no_grad()
def test_x_t_from_images_draws_the_concept_then_the_step_then_the_noise(sd):
    """And each image belongs to its own concept."""
    texts, x_0 = texts_of(sd, "star", "heart"), torch.randn(2, 4, 8, 8)
    rng = Generator().manual_seed(2)
    data = erase.x_t_from_images(sd.unet, texts, (3, 4, 8, 8), rng, latents=x_0, steps=4)
    generator, abar, seen = Generator().manual_seed(2), ddim.alphas_cumprod(), set()
    for x_t, t, text in itertools.islice(data, 16):
        i, k = (torch.randint(n, (1,), generator=generator).item() for n in (2, 4))
        noise, a = torch.randn(3, 4, 8, 8, generator=generator), abar[[751, 501, 251, 1][k]]
        assert text is texts[i] and t.tolist() == [[751, 501, 251, 1][k]] * 3
        assert torch.allclose(x_t, a.sqrt() * x_0[i] + (1 - a).sqrt() * noise, atol=1e-6)
        seen |= {("concept", i), ("step", k)}
    assert len(seen) == 2 + 4


@pytest.mark.parametrize("every_step", [False, True])
def test_unet_calls_for_drawing(every_step, sd):
    """Every step: two for each x_t but a trajectory's first. Else: two for each step down to t."""
    sizes, steps = [], 4  # a call for drawing has both prompts in it, so twice the batch of 1
    hook = sd.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    times = []

    def loss(unet, frozen, x_t, t, text, eta):
        times.append(t.item())
        return erase.esd_loss(unet, frozen, x_t, t, text, eta)

    try:
        data = drawn_by(erase.x_t_from_model, steps, every_step=every_step)
        erase.erase(sd, ["star"], iterations=8, loss_fn=loss, data=data)
    finally:
        hook.remove()
    down = [[751, 501, 251, 1].index(t) for t in times]
    expected = 2 * (steps - 1) if every_step else sum(down)  # 8 iterations: two trajectories
    assert sizes.count(1) == 3 * 8 and sizes.count(2) == len(sizes) - 3 * 8 == expected
    assert times == [751, 501, 251, 1] * 2 or not every_step


# The loop: gradient_steps

def test_one_gradient_step_for_each_loss_that_is_asked_for():
    """theta = 1 and the loss theta * t, so each step of SGD takes t off theta."""
    theta, drawn = torch.ones(1, requires_grad=True), []

    def data():
        for t in (1.0, 2.0, 3.0):
            drawn.append(t)
            yield torch.zeros(1), tensor([t]), None

    def loss_fn(unet, frozen, x_t, t, text, eta):
        assert (unet, frozen, text, eta) == ("unet", "frozen", None, 0.5)
        return theta * t

    optimizer = torch.optim.SGD([theta], lr=1)
    losses = erase.gradient_steps("unet", "frozen", data(), optimizer, loss_fn, 0.5)
    assert theta.item() == 1 and not drawn
    for after, loss, t in ((0, 1, 1), (-2, 0, 2), (-5, -6, 3)):
        assert next(losses) == loss and theta.item() == after and drawn[-1] == t
    assert drawn == [1, 2, 3] and next(losses, None) is None


def test_a_loss_that_is_not_finite_stops_the_run(sd):
    def loss(unet, frozen, x_t, t, text, eta):
        return erase.esd_loss(unet, frozen, x_t, t, text, eta) * torch.inf

    with pytest.raises(UsageError, match=r"the loss at t = \[\d+\] isn't finite: lower lr or eta"):
        erase.erase(sd, ["star"], loss_fn=loss, **QUICK)


def test_a_gradient_that_is_not_finite_stops_the_run(sd):
    """Though the loss is, as may happen in float16: at the next loss, or at the end."""
    def loss(unet, frozen, x_t, t, text, eta):
        losses = erase.esd_loss(unet, frozen, x_t, t, text, eta)
        return losses.detach() + (losses - losses.detach()).sqrt()  # of 0: its slope is infinite

    for iterations, says in ((1, "theta isn't finite"), (2, r"the loss at t = .* isn't finite")):
        with pytest.raises(UsageError, match=f"{says}: lower lr or eta"):
            erase.erase(sd, ["star"], loss_fn=loss, **QUICK | {"iterations": iterations})


# The whole: erase

def test_only_the_chosen_tensors_come_back_and_the_model_is_untouched(sd):
    before = {name: p.clone() for name, p in sd.unet.state_dict().items()}
    theta = erase.erase(sd, ["star"], **QUICK)
    assert list(theta) == [name for name in before if "attn2" in name]
    for name, part in theta.items():
        assert part.dtype == torch.float32 and not part.requires_grad
        assert (part != before[name]).any()
    assert all(torch.equal(p, before[name]) for name, p in sd.unet.state_dict().items())


def test_zero_iterations_change_no_bit(sd):
    same = sample.with_weights(sd, erase.erase(sd, ["star"], iterations=0))
    first, second = (sample.generate(m, ["a star"], steps=2)[0] for m in (sd, same))
    assert first.tobytes() == second.tobytes()


def by_hand(sd, concept, iterations, steps, lr, seed, every_step=False, batch=1,
            optimizer=torch.optim.Adam, pull=0.0):
    """ESD with a second, really edited U-Net: nothing functional, nothing shared, no SCALE."""
    edited = copy.deepcopy(sd.unet)
    tuned = {name: p.requires_grad_() for name, p in edited.named_parameters() if "attn2" in name}
    optimizer, (text,) = optimizer(tuned.values(), lr=lr), texts_of(sd, concept, batch=batch)
    times, generator = ddim.timesteps(steps), Generator().manual_seed(seed)

    def learn(x, t):
        with torch.no_grad():
            target = 2 * sd.unet(x, t, text.null) - sd.unet(x, t, text.concept)  # eta = 1
        optimizer.zero_grad()
        ((edited(x, t, text.concept) - target) ** 2).mean().backward()
        for name, p in tuned.items():
            p.grad += 2 * pull * (p.detach() - sd.unet.get_parameter(name))
        optimizer.step()

    done = 0
    while done < iterations:
        torch.randint(1, (1,), generator=generator)  # the concept
        k = None if every_step else torch.randint(steps, (1,), generator=generator).item()
        x = torch.randn(batch, 4, 8, 8, generator=generator)
        for t in times if every_step else times[:k + 1]:
            if (every_step or t == times[k]) and done < iterations:
                learn(x, t)
                done += 1
            with torch.no_grad():
                x = denoised(edited, x, [t], text, 3.0, steps)
    return tuned


@pytest.mark.parametrize("every_step", [False, True])
def test_it_is_what_a_second_unet_trained_by_hand_becomes(every_step, sd):
    settings = {"lr": 1e-2, "seed": 1, "iterations": 6}
    expected = by_hand(sd, "star", every_step=every_step, steps=4, **settings)
    data = drawn_by(erase.x_t_from_model, every_step=every_step)
    theta = erase.erase(sd, ["star"], data=data, **settings)
    start = dict(sd.unet.named_parameters())
    assert theta.keys() == expected.keys()
    for name in theta:  # Adam's division makes rounding large where a gradient is nearly zero
        moved = (expected[name] - start[name]).norm()
        assert (theta[name] - expected[name]).norm() < 0.01 * moved, name


def batches(sd, concepts=("star",), **settings):
    """(x_t, t, text) of every iteration."""
    seen = []

    def loss(unet, frozen, x_t, t, text, eta):
        value = erase.esd_loss(unet, frozen, x_t, t, text, eta)
        seen.append((x_t, t, text))
        assert t.shape == value.shape == (len(x_t),)
        return value

    settings = {"iterations": 8, "lr": 1e-2, "data": drawn_by(erase.x_t_from_model)} | settings
    erase.erase(sd, concepts, loss_fn=loss, **settings)
    assert len(seen) == settings["iterations"]
    return seen


def drawn_by_frozen(sd):
    def data(unet, texts, shape, rng):
        return erase.x_t_from_model(sd.unet, texts, shape, rng, steps=4)

    return data


def test_x_t_may_be_drawn_by_the_frozen_model(sd):
    """Then it doesn't depend on theta; drawn by the edited model, it does."""
    edited = batches(sd)
    frozen = batches(sd, data=drawn_by_frozen(sd), lr=1e-1)
    texts = erase.texts_for(sd, ["star"], batch=1)
    still = drawn_by_frozen(sd)(None, texts, (1, 4, 8, 8), Generator().manual_seed(0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(frozen, still))
    assert [t for _, t, _ in edited] == [t for _, t, _ in frozen]
    later = [torch.equal(a[0], b[0]) for a, b in zip(edited[1:], frozen[1:], strict=True)
             if a[1].item() != 751]  # at 751, x_t is the noise itself
    assert torch.equal(edited[0][0], frozen[0][0])  # before theta has moved
    assert len(later) >= 3 and not any(later)


def test_a_batch_has_several_latents(sd):
    for x_t, t, text in batches(sd, batch=3, iterations=2):
        assert x_t.shape == (3, 4, 8, 8) and not torch.equal(x_t[0], x_t[1])
        assert {features.shape for features in text[:3]} == {(3, 77, 32)}
        assert torch.equal(text.concept[2:], sd.encode(["star"]))
        assert torch.equal(text.null[2:], sd.encode([""]))


def test_one_concept_is_drawn_each_step(sd):
    star, heart = sd.encode(["star"]), sd.encode(["heart"])
    data = drawn_by(erase.x_t_from_model, steps=1)
    seen = [text for _, _, text in batches(sd, ["star", "heart"], iterations=12, data=data)]
    drawn = [torch.equal(text.concept, star) for text in seen]
    assert all(is_star or torch.equal(text.concept, heart) for text, is_star in zip(seen, drawn))
    assert [text.index for text in seen] == [0 if is_star else 1 for is_star in drawn]
    assert 0 < sum(drawn) < len(drawn) == 12


def test_texts_are_the_concepts_with_their_anchors(sd):
    """Of prompts, pairs, features, or one prompt; without an anchor, the concept is its own."""
    pairs = {"star": "heart", "moon": "circle"}
    alone = {"star": "star", "moon": "moon"}
    features = sd.encode([*pairs])
    cases = [(pairs, pairs), ([*pairs], alone), (features, alone), ("star", {"star": "star"})]
    for concepts, anchors in cases:
        texts = erase.texts_for(sd, concepts, batch=2)
        assert [text.index for text in texts] == [*range(len(anchors))]
        for text, (concept, anchor) in zip(texts, anchors.items()):
            assert torch.allclose(text.concept, sd.encode([concept] * 2), atol=1e-5)
            assert torch.allclose(text.null, sd.encode([""] * 2), atol=1e-5)
            assert torch.allclose(text.anchor, sd.encode([anchor] * 2), atol=1e-5)


# Number formats

def moved(sd, theta):
    """The share of theta's numbers that aren't what they were."""
    changed = torch.cat([(part != sd.unet.get_parameter(name).float()).flatten()
                         for name, part in theta.items()])
    return changed.float().mean()


@pytest.mark.robustness  # seconds, where a CPU has no bfloat16
def test_half_precision_model_is_tuned_in_float32(folder):
    sd = sample.load(folder, dtype="bfloat16")
    theta = erase.erase(sd, ["star"], iterations=1, data=drawn_by(erase.x_t_from_model, steps=2))
    assert {part.dtype for part in theta.values()} == {torch.float32}
    assert moved(sd, theta) > 0.99  # in bfloat16, few weights would move by 1e-5


@pytest.mark.robustness  # seconds, where a CPU has no float16
def test_gradients_in_float16_do_not_vanish(folder, monkeypatch):
    sd = sample.load(folder, dtype="float16")
    settings = {"iterations": 1, "data": drawn_by(erase.x_t_from_model, steps=2)}
    assert moved(sd, erase.erase(sd, ["star"], **settings)) > 0.99
    monkeypatch.setattr(erase, "SCALE", 1.0)
    assert moved(sd, erase.erase(sd, ["star"], **settings)) < 0.9


def test_the_scale_changes_no_bit_in_float32(sd, monkeypatch):
    scaled = erase.erase(sd, ["star"], **QUICK | {"iterations": 4})
    monkeypatch.setattr(erase, "SCALE", 1.0)
    plain = erase.erase(sd, ["star"], **QUICK | {"iterations": 4})
    assert len(plain) == 80 and all(torch.equal(plain[name], scaled[name]) for name in plain)


@pytest.mark.robustness  # seconds, where there is no bfloat16
def test_under_autocast_each_step_is_seen_by_the_next(sd, monkeypatch):
    """On one x_t, the loss changes. With autocast's cast of the first theta, it would stay."""
    def one_x_t(unet, texts, shape, rng):
        batch = next(erase.x_t_from_model(unet, texts, shape, rng, steps=4))
        return itertools.repeat(batch)

    def losses():
        seen = []
        with torch.autocast("cpu", torch.bfloat16):
            erase.erase(sd, ["star"], lr=1e-3, iterations=6, data=one_x_t,
                        on_step=lambda iteration, loss, theta: seen.append(loss))
        return seen

    assert len({*losses()}) == 6
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    assert len({*losses()}) == 1


# The seams

def test_the_loss_is_checked(sd):
    """Its shape, and that it has a gradient: without, nothing would be learned."""
    def mean_over_the_rows(unet, frozen, x_t, t, text, eta):
        return (unet(x_t, t, text.concept) - x_t).square().mean(dim=(0, 1, 2))  # (W,)

    def without_a_gradient(*batch):
        return erase.esd_loss(*batch).detach()

    for loss, says in ((mean_over_the_rows, r"isn't \(1,\) with a gradient"),
                       (without_a_gradient, "with a gradient")):
        with pytest.raises(UsageError, match=says):
            erase.erase(sd, ["star"], loss_fn=loss, **QUICK)


def test_a_mistake_in_a_loss_keeps_its_traceback(folder, tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(
        "def loss(unet, frozen, x_t, t, text, eta):\n    return x_t @ text.concept\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="Expected size"):
        run_main(monkeypatch, "star", "--model", folder, "--iterations", 1, "--steps", 2,
                 "--loss", "my_loss:loss", "--out", tmp_path / "star.safetensors")


def test_a_mistake_in_a_module_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "imports_nowhere.py").write_text("import nowhere_2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_2"):
        erase.find_function("--loss", "imports_nowhere:loss")


def test_the_defaults_are_the_papers(monkeypatch):
    """From Python and from the command line."""
    paper = {"method": "esd-x", "eta": 1.0, "lr": 1e-5, "iterations": 1000, "batch": 1}
    drawing = {"steps": 50, "guidance": 3.0, "every_step": False}
    flags = []
    monkeypatch.setattr(erase, "run", flags.append)
    run_main(monkeypatch, "star")
    for function, expected in ((erase.erase, paper), (erase.x_t_from_model, drawing)):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in expected} == expected
    assert vars(flags[0]).items() >= (paper | drawing).items()


def test_drawing_keeps_no_activations_and_the_loss_has_gradients(sd):
    """Else a trajectory of 50 steps would need the memory of 100 training steps."""
    theta = erase.trainable_copies(sd.unet, "esd-x")
    unet = erase.with_theta(sd.unet, theta)
    texts = erase.texts_for(sd, ["star"], batch=1)
    batches = EVERY_STEP(unet, texts, (1, 4, 8, 8), Generator().manual_seed(0), steps=3)
    for batch in itertools.islice(batches, 3):
        assert not batch.x_t.requires_grad
        assert torch.is_grad_enabled()


def test_x_t_carries_no_gradient_into_the_loss(sd):
    """A data function without no_grad gives the same theta."""
    def with_gradients(unet, texts, shape, rng):
        while True:
            x_t = torch.randn(shape, generator=rng)
            t = torch.full(shape[:1], 501)
            yield erase.Batch(x_t - unet(x_t, t, texts[0].concept), t, texts[0])

    def without(unet, texts, shape, rng):
        for x_t, t, text in with_gradients(unet, texts, shape, rng):
            yield x_t.detach(), t, text

    one, other = (erase.erase(sd, ["star"], **QUICK | {"data": data})
                  for data in (with_gradients, without))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_data_that_ends_says_so(sd):
    def three(unet, texts, shape, rng):
        return itertools.islice(erase.x_t_from_model(unet, texts, shape, rng, steps=2), 3)

    with pytest.raises(UsageError, match="data ended after 3 of 5 iterations"):
        erase.erase(sd, ["star"], iterations=5, data=three)


def test_the_optimizer_gets_names_and_gradients_that_are_not_scaled(sd):
    """SGD's step is the gradient, which a second U-Net gives by hand."""
    given = {}

    def optimizer(pairs, lr):
        pairs = [*pairs]
        given.update(pairs)
        return torch.optim.SGD(pairs, lr)

    # the gradient is small: with a smaller rate, a step is as small as a weight's rounding
    settings = {"lr": 50, "iterations": 1, "data": drawn_by(erase.x_t_from_model)}
    theta = erase.erase(sd, ["star"], optimizer=optimizer, **settings)
    assert given.keys() == theta.keys()
    expected = by_hand(sd, "star", iterations=1, steps=4, lr=50, seed=0, optimizer=torch.optim.SGD)
    start = dict(sd.unet.named_parameters())
    for name in theta:
        moved = (expected[name] - start[name]).norm()
        assert (theta[name] - expected[name]).norm() < 0.01 * moved, name


def test_the_target_may_be_another_models(sd):
    """As if the loss itself took another teacher."""
    other = sample.with_weights(sd, {"conv_in.bias": sd.unet.conv_in.bias + 1})
    asked = []

    def teacher(x_t, t, c):
        asked.append(len(x_t))
        return other.unet(x_t, t, c)

    theirs = erase.erase(sd, ["star"], frozen=teacher, **QUICK)
    ours = erase.erase(sd, ["star"], **QUICK)
    assert len(asked) == 2 * QUICK["iterations"]
    assert all((theirs[name] != ours[name]).any() for name in ours)

    def loss(unet, frozen, *batch):
        return erase.esd_loss(unet, other.unet, *batch)

    by_loss = erase.erase(sd, ["star"], loss_fn=loss, **QUICK)
    assert all(torch.equal(theirs[name], by_loss[name]) for name in theirs)


def test_on_step_sees_every_iteration_and_may_stop(sd):
    seen = []

    def on_step(iteration, loss, theta):
        copies = {name: part.detach().clone() for name, part in theta.items()}
        seen.append((iteration, loss, copies))
        return iteration == 3

    theta = erase.erase(sd, ["star"], on_step=on_step, **QUICK | {"iterations": 9})
    assert [iteration for iteration, _, _ in seen] == [1, 2, 3]
    assert all(loss > 0 for _, loss, _ in seen)
    shorter = erase.erase(sd, ["star"], **QUICK | {"iterations": 3})
    for name, part in theta.items():
        assert torch.equal(part, shorter[name]) and torch.equal(part, seen[-1][2][name])
        assert not torch.equal(seen[0][2][name], seen[1][2][name])


def test_theta_may_come_from_a_function(sd):
    """A LoRA of rank 1 on one weight: the model has theta* + up @ down, which alone are leaves."""
    name = next(name for name in erase.trainable_copies(sd.unet, "esd-x") if "to_v" in name)
    start = sd.unet.get_parameter(name)
    up = torch.zeros(len(start), 1, requires_grad=True)
    down = torch.ones(1, start.shape[1], requires_grad=True)
    unet = erase.with_theta(sd.unet, lambda: {name: start + up @ down})
    x_t, t, c = torch.randn(1, 4, 8, 8), tensor([501]), sd.encode(["star"])

    assert torch.allclose(unet(x_t, t, c), sd.unet(x_t, t, c), atol=1e-5)
    unet(x_t, t, c).square().mean().backward()
    assert up.grad.abs().max() > 0 and start.grad is None
    with torch.no_grad():
        up += 100
        merged = sample.with_weights(sd, {name: start + up @ down})
        assert torch.allclose(unet(x_t, t, c), merged.unet(x_t, t, c), atol=1e-5)
        assert (unet(x_t, t, c) - sd.unet(x_t, t, c)).abs().max() > 1e-3


def test_a_weight_that_the_unet_does_not_have_is_an_error(sd):
    unet = erase.with_theta(sd.unet, {"conv_in.nothing": torch.zeros(1)})
    with pytest.raises(UsageError, match="no weights named conv_in.nothing"):
        unet(torch.zeros(1, 4, 8, 8), tensor([1]), sd.encode(["star"]))


def test_another_sampler_draws_x_t_and_gets_rng(sd):
    """One that goes from noise to noise, which it draws itself."""
    def only_noise(predict, x_t, steps, rng):
        for t in ddim.timesteps(steps):
            yield t, torch.randn(x_t.shape, generator=rng)

    text, = texts_of(sd, "star")
    rng = Generator().manual_seed(0)
    data = EVERY_STEP(sd.unet, [text], (1, 4, 8, 8), rng, steps=3, denoise=only_noise)
    found = [x_t for x_t, _, _ in itertools.islice(data, 3)]
    expected = Generator().manual_seed(0)
    torch.randint(1, (1,), generator=expected)
    torch.randn(1, 4, 8, 8, generator=expected)  # the noise that the sampler starts from
    assert all(torch.equal(x_t, torch.randn(1, 4, 8, 8, generator=expected)) for x_t in found)


@pytest.mark.robustness  # compiling takes seconds
def test_a_compiled_unet_erases_saves_and_loads(sd, folder, tmp_path):
    """torch.compile puts _orig_mod. before every name. x_t is noise, so that little is compiled."""
    def noise(unet, texts, shape, rng):
        while True:
            x_t = torch.randn(shape, generator=rng)
            yield erase.Batch(x_t, torch.full(shape[:1], 981), texts[0])

    compiled = sample.load(folder)
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    theta = erase.erase(compiled, ["star"], **QUICK | {"data": noise})
    expected = erase.erase(sd, ["star"], **QUICK | {"data": noise})
    assert theta.keys() == expected.keys()
    assert all(torch.allclose(theta[name], expected[name], atol=1e-5) for name in theta)

    erase.save(theta, tmp_path / "star.safetensors", {}, compiled)
    name = next(iter(theta))
    for model in (compiled, sd):
        erased = sample.load_erased(model, tmp_path / "star.safetensors").unet
        assert torch.equal(erased.get_parameter(name), theta[name].half().float())


@pytest.mark.parametrize("arguments, says", [
    ({"method": "esdx"}, "method is 'esdx', choose esd-x or esd-u"),
    ({"concepts": []}, "name at least one concept, and none that is blank"),
    ({"concepts": ["star", " "]}, "name at least one concept, and none that is blank"),
    ({"concepts": torch.zeros(77, 32)}, r"shape \(77, 32\), not \(C, 77, 768\)"),
    ({"lr": -1.0}, "lr -1.0"),
    ({"lr": float("nan")}, "lr nan"),
    ({"concepts": ["star", "star"]}, "'star' is given twice"),
    ({"iterations": -1}, "iterations -1"),
    ({"batch": 0}, "batch 0"),
])
def test_the_api_is_checked_as_the_command_line_is(sd, arguments, says):
    with pytest.raises(UsageError, match=says):
        erase.erase(sd, **{"concepts": ["star"]} | QUICK | arguments)


# Interrupted, and resumed

def from_images(unet, texts, shape, rng):
    latents = torch.ones(len(texts), *shape[1:])
    return erase.x_t_from_images(unet, texts, shape, rng, latents, steps=3)


def interrupted_at(limit):
    """An on_step that interrupts the run in this iteration, before it is saved; 0: never."""
    def on_step(iteration, loss, theta):
        if iteration == limit:
            raise InterruptedError

    return on_step


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("data", [
    drawn_by(erase.x_t_from_model, steps=3), drawn_by(EVERY_STEP, steps=3), from_images])
def test_a_run_resumes_from_its_checkpoint_to_the_same_bits(data, sd, tmp_path, monkeypatch):
    """Kept after 3 and 6 of 8 iterations: with every step, these are ends of trajectories."""
    monkeypatch.setattr(erase, "SAVE_EVERY", 3)
    file = tmp_path / "run.checkpoint"

    def run(limit, checkpoint):
        return erase.erase(sd, ["star", "heart"], data=data, iterations=8, lr=1e-3,
                           on_step=interrupted_at(limit), checkpoint=checkpoint)

    whole = run(0, None)
    for limit in (2, 7):
        with pytest.raises(InterruptedError):
            run(limit, file)
        assert file.exists() == (limit > 3) and not [*tmp_path.glob("*.part")]
    steps = []
    again = erase.erase(sd, ["star", "heart"], data=data, iterations=8, lr=1e-3, checkpoint=file,
                        on_step=lambda iteration, *_: steps.append(iteration))
    assert steps == [7, 8]
    assert len(whole) == 80 and all(torch.equal(whole[name], again[name]) for name in whole)


def half_loss(*batch):
    return erase.esd_loss(*batch) / 2


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("changed", [
    {"concepts": ["heart"]}, {"eta": 2.0}, {"lr": 2e-3}, {"method": "esd-u"}, {"seed": 1},
    {"iterations": 5}, {"batch": 2}, {"loss_fn": half_loss}, {"optimizer": torch.optim.SGD},
    {"data": drawn_by(erase.x_t_from_model, steps=5)}, {"data": from_images},
    {"frozen": half_loss},
])
def test_a_checkpoint_of_another_run_is_refused(changed, sd, tmp_path, monkeypatch):
    """And named is what differs."""
    monkeypatch.setattr(erase, "SAVE_EVERY", 1)
    settings = {"concepts": ["star"], **QUICK, "checkpoint": tmp_path / "run.checkpoint"}
    with pytest.raises(InterruptedError):
        erase.erase(sd, on_step=interrupted_at(2), **settings)
    name = next(iter(changed)).removesuffix("_fn")
    with pytest.raises(UsageError, match=f"belongs to a run with a different {name}"):
        erase.erase(sd, **settings | changed)


def test_a_checkpoint_of_another_model_is_refused(sd, tmp_path):
    settings = {"concepts": ["star"], **QUICK, "checkpoint": tmp_path / "run.checkpoint"}
    erase.erase(sd, **settings)
    other = sample.with_weights(sd, {"conv_in.weight": sd.unet.conv_in.weight + 1})
    with pytest.raises(UsageError, match="a run with a different model"):
        erase.erase(other, **settings)


def test_the_code_of_a_loss_is_a_setting(tmp_path, monkeypatch):
    """An edited loss doesn't go on from the old one's steps."""
    monkeypatch.syspath_prepend(tmp_path)
    seen = set()
    for i, factor in enumerate((1, 2)):
        (tmp_path / f"my_loss_{i}.py").write_text(f"def loss(*batch):\n    return {factor}\n")
        seen.add(erase.setting_to_text(importlib.import_module(f"my_loss_{i}").loss))
    assert len(seen) == 2
    assert erase.setting_to_text(half_loss) == erase.setting_to_text(half_loss)
    bound = [erase.setting_to_text(drawn_by(erase.x_t_from_model, steps)) for steps in (2, 2, 3)]
    assert bound[0] == bound[1] != bound[2]


def test_images_are_a_setting_and_so_is_their_order():
    latents = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(0))
    several = [latents, latents.clone(), latents.flip(0), latents[:1]]
    texts = [erase.setting_to_text(drawn_by(from_images, latents=each)) for each in several]
    assert texts[0] == texts[1] and len({*texts}) == 3


def test_an_interrupted_checkpoint_leaves_the_last_one(sd, tmp_path, monkeypatch):
    file, save, written = tmp_path / "run.checkpoint", torch.save, []

    def break_off(state, part):
        written.append(part)
        save(state, part)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", break_off)
    monkeypatch.setattr(erase, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        erase.erase(sd, ["star"], checkpoint=file, **QUICK | {"iterations": 6})
    assert len(written) == 2 and [*tmp_path.iterdir()] == [file]
    assert torch.load(file, weights_only=True)["done"] == 2


# The file

def test_the_same_seed_gives_the_same_file(sd, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        theta = erase.erase(sd, ["star"], seed=seed, **QUICK)
        erase.save(theta, tmp_path / name, {"concepts": ["star"], "eta": 1.0}, sd)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def settings_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["settings"])


def test_the_file_has_the_settings_and_float16_tensors(sd, tmp_path):
    theta = erase.erase(sd, ["star"], **QUICK)
    settings = {"concepts": ["star"], "eta": 1.0, "out": tmp_path}
    erase.save(theta, tmp_path / "f", settings, sd)
    saved = settings_of(tmp_path / "f")
    assert saved.pop("base") == sample.fingerprint(sd, without=theta)
    assert saved == {"concepts": ["star"], "eta": 1.0, "out": str(tmp_path)}
    stored = load_file(tmp_path / "f")
    assert stored.keys() == theta.keys()
    for name, part in stored.items():
        assert part.dtype == torch.float16 and torch.equal(part, theta[name].half())


def test_an_interrupted_write_leaves_the_old_file(sd, tmp_path, monkeypatch):
    path, name = tmp_path / "erased.safetensors", "conv_in.bias"
    bias = torch.ones(32)
    erase.save({name: bias}, path, {}, sd)
    for beyond in (torch.nan, torch.inf, 1e6):  # float16 ends at 65504
        with pytest.raises(UsageError, match="float16 can't hold theta, so nothing was saved"):
            erase.save({name: bias * beyond}, path, {}, sd)

    def break_off(part, data):
        part.open("wb").write(data[:len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(OSError):
        erase.save({name: 0 * bias}, path, {}, sd)
    assert load_file(path)[name].tolist() == bias.tolist() and [*tmp_path.iterdir()] == [path]


def test_what_was_edited_before_is_in_the_file_too(sd, tmp_path, capsys):
    """ESD-u on top of an edit of cross-attention: the file alone gives both, on the original."""
    name = next(iter(erase.trainable_copies(sd.unet, "esd-x")))
    first = sample.with_weights(sd, {name: sd.unet.get_parameter(name) + 1})
    theta = erase.erase(first, ["star"], method="esd-u", **QUICK)
    erase.save(theta, tmp_path / "both.safetensors", {}, first)
    assert load_file(tmp_path / "both.safetensors").keys() == {name, *theta}
    both = sample.load_erased(sd, tmp_path / "both.safetensors")
    assert capsys.readouterr().err == ""
    assert torch.allclose(both.unet.get_parameter(name), sd.unet.get_parameter(name) + 1, atol=1e-2)


def test_a_file_of_another_model_is_refused(sd, tmp_path):
    save_file({"down_blocks.9.weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UsageError, match="has 1 tensors, 1 not the U-Net's: .'down_blocks"):
        sample.load_erased(sd, tmp_path / "other")
    save_file({}, tmp_path / "empty")
    with pytest.raises(UsageError, match="empty has 0 tensors"):
        sample.load_erased(sd, tmp_path / "empty")


def test_loading_shares_what_was_not_tuned_and_leaves_the_original(sd, tmp_path):
    before = {name: p.clone() for name, p in sd.unet.state_dict().items()}
    theta = erase.erase(sd, ["star"], **QUICK)
    erase.save(theta, tmp_path / "f", {}, sd)
    erased = sample.load_erased(sd, tmp_path / "f").unet.state_dict()
    for name, own in sd.unet.state_dict().items():
        assert torch.equal(own, before[name])
        assert (own.data_ptr() == erased[name].data_ptr()) == (name not in theta)
        assert torch.equal(erased[name], theta[name].half().float() if name in theta else own)


# Command line

@pytest.fixture
def loaded(sd, monkeypatch):
    """The command gets the small model at once, whatever --model says."""
    monkeypatch.setattr(sample, "load", lambda *_: sd)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["erase.py", *map(str, arguments)])
    erase.main()


def stops(monkeypatch, status, *arguments):
    """Runs the command, which must end with this exit status."""
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == status


@pytest.fixture
def no_images(monkeypatch):
    """The images before and after take most of a command's time and are tested once."""
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [Image.new("RGB", (64, 64))] * 4)


def test_the_command_writes_weights_and_images(sd, folder, tmp_path, monkeypatch, capsys):
    out, drawn, generate = tmp_path / "new" / "star.safetensors", [], sample.generate

    def spy(model, prompts, **settings):  # two steps, to save time
        images = generate(model, prompts, **settings | {"steps": min(settings["steps"], 2)})
        drawn.append((model, prompts, images))
        return images

    monkeypatch.setattr(sample, "generate", spy)
    run_main(monkeypatch, "star", "--model", folder, "--iterations", 2, "--steps", 2, "--lr", 0.1,
             "--show", "a heart", "--out", out)
    plan, said = capsys.readouterr().out.strip().splitlines()
    assert plan == "erasing ['star'], then drawing ['star', 'a heart']"
    sizes = sum(part.numel() for part in erase.trainable_copies(sd.unet, "esd-x").values())
    assert said == f"{sizes:,} parameters tuned: {out}, {out.with_suffix('.png')}"
    assert [prompts for _, prompts, _ in drawn] == [["star"], ["star"], ["a heart"], ["a heart"]]
    assert all(len(images) == 4 for _, _, images in drawn)
    for model, _, _ in drawn[::2]:
        assert all(torch.equal(p, sd.unet.get_parameter(name))
                   for name, p in model.unet.named_parameters())
    stored = load_file(out)
    assert len(stored) == 80
    for model, _, _ in drawn[1::2]:
        for name, p in model.unet.named_parameters():
            start = sd.unet.get_parameter(name)
            assert torch.equal(p, stored[name].float() if name in stored else start)  # as saved
    labels = ["star, before", "star, after", "a heart, before", "a heart, after"]
    sheet = Image.open(out.with_suffix(".png"))
    assert sheet.tobytes() == sample.contact_sheet(
        [(label, images) for label, (_, _, images) in zip(labels, drawn)]).tobytes()
    assert json.loads(sheet.text["settings"]).items() <= settings_of(out).items()
    assert sorted(file.name for file in out.parent.iterdir()) == ["star.png", "star.safetensors"]

    monkeypatch.setattr("sys.argv", ["sample.py", "a star", "--model", str(folder), "--steps", "1",
                                     "--erased", str(out), "--out", str(tmp_path / "star-2.png")])
    sample.main()
    image, = generate(sample.load_erased(sd, out), ["a star"], steps=1)
    made = Image.open(tmp_path / "star-2.png")
    assert made.tobytes() == sample.contact_sheet([("a star", [image])]).tobytes()
    assert json.loads(made.text["settings"])["erased"] == [str(out)]


@pytest.mark.parametrize("arguments, says", [
    (["--model", "nowhere"], "can't load nowhere: "),
    (["--steps", "501"], "steps is 501, choose 1 to 500"),
    (["--image", "a.png", "b.png"], "2 images for 1 concepts"),
    (["--image", "README.md"], "cannot identify image file 'README.md'"),
    (["--image", "nowhere.png"], "nowhere.png"),
    (["--loss", "nowhere:loss"], "--loss nowhere:loss: No module named 'nowhere'"),
    (["--loss", "erase"], "--loss erase: erase has no function ''"),
    (["--loss", "./my.py:loss"], "--loss ./my.py:loss: write MODULE:FUNCTION"),
    (["--loss", "erase:nothing"], "--loss erase:nothing: erase has no function 'nothing'"),
    (["--data", "erase:SCALE"], "--data erase:SCALE: erase has no function 'SCALE'"),
    (["--seed", "-1"], "seed is -1"),
    (["--out", "star.png"], "star.png isn't the name of a .safetensors file"),
    (["--resume"], "star.checkpoint doesn't exist: leave out --resume"),
])
def test_wrong_input_gets_one_line(folder, tmp_path, monkeypatch, capsys, arguments, says):
    out = tmp_path / "star.safetensors"
    stops(monkeypatch, 2, "star", "--model", folder, "--out", out, *arguments)
    line, = capsys.readouterr().err.strip().splitlines()
    assert says in line and line.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_processes_of_torchrun_are_refused(folder, tmp_path, monkeypatch, capsys):
    """Each would erase everything and write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stops(monkeypatch, 2, "star", "--model", folder, "--out", tmp_path / "star.safetensors")
    says = "error: erase.py runs as one process: start it without torchrun\n"
    assert capsys.readouterr().err == says


@pytest.mark.robustness
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_the_user_chose(folder, tmp_path, monkeypatch, no_images, umask,
                                                 mode):
    before = os.umask(umask)
    try:
        run_main(monkeypatch, "star", "--model", folder, "--iterations", 0, "--steps", 1,
                 "--out", tmp_path / "star.safetensors")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("flags, says", [
    (["--image", "IMAGE", "--guidance", "4"], "--guidance changes nothing with --image"),
    (["--image", "IMAGE", "--every-step"], "--every-step changes nothing with --image"),
    (["--image", "IMAGE", "--anchor", "heart"], "--anchor changes nothing with --image"),
    (["--image", "IMAGE", "--data", "notebooks.methods.key_steps:data"],
     "--image changes nothing with notebooks.methods.key_steps:data"),
    (["--data", "notebooks.methods.key_steps:data", "--every-step"],
     "--every-step changes nothing with notebooks.methods.key_steps:data"),
    (["--data", "test_erase:nothing", "--steps", 3], "--steps changes nothing with test_erase"),
])
def test_a_flag_that_changes_nothing_is_refused(flags, says, loaded, tmp_path, monkeypatch,
                                                capsys, red_png):
    flags = [red_png if flag == "IMAGE" else flag for flag in flags]
    stops(monkeypatch, 2, "star", *flags, "--out", tmp_path / "a.safetensors")
    assert f"error: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("words, plan", [
    (["Van", "Gogh"], "erasing ['Van', 'Gogh'], then drawing"),
    (["star, heart"], "erasing ['star, heart'], then drawing"),
])
def test_the_first_line_shows_words_that_were_not_quoted(words, plan, loaded, tmp_path,
                                                         monkeypatch, capsys, no_images):
    run_main(monkeypatch, *words, "--iterations", 0, "--out", tmp_path / "one.safetensors")
    assert capsys.readouterr().out.startswith(plan)


def test_duplicates_are_refused(folder, tmp_path, monkeypatch, capsys):
    for flags in ([], ["--image", "a.png"], ["--anchor", "heart"]):
        stops(monkeypatch, 2, "star", "star", "--model", folder, *flags,
              "--out", tmp_path / "star.safetensors")
        assert capsys.readouterr().err == "error: 'star' is given twice\n"


def test_a_run_may_start_from_erased_weights(folder, tmp_path, monkeypatch, no_images):
    """The file has both edits, so that it gives both on the original."""
    command = ["--model", folder, "--iterations", 1, "--steps", 2, "--lr", 1e-3]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run_main(monkeypatch, "star", *command, "--out", one)
    run_main(monkeypatch, "heart", *command, "--method", "esd-u", "--erased", one, "--out", two)
    first, both = load_file(one), load_file(two)
    assert first.keys() < both.keys()
    assert all(torch.equal(both[name], first[name]) for name in first)


def test_what_exists_is_not_overwritten(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "star.safetensors"
    for mine in (out, out.with_suffix(".png")):
        mine.write_bytes(b"mine")
        stops(monkeypatch, 2, "star", "--model", folder, "--out", out)
        line = capsys.readouterr().err.strip()
        assert line == f"error: {mine} exists; delete it or choose another --out"
        assert [*tmp_path.iterdir()] == [mine] and mine.read_bytes() == b"mine"
        mine.unlink()


@pytest.mark.robustness
def test_an_interrupted_command_resumes_if_asked_to(folder, tmp_path, monkeypatch, capsys,
                                                    no_images):
    """8 iterations, kept after 2, 4, 6."""
    command = ["star", "--model", folder, "--iterations", 8, "--steps", 2, "--lr", 1e-3]
    whole, out = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    run_main(monkeypatch, *command, "--out", whole)
    assert not [*tmp_path.glob("*.checkpoint")]

    stepped, limit = 0, 6
    adam_step = torch.optim.Adam.step

    def step(self, *args):
        nonlocal stepped
        stepped += 1
        if stepped == limit:
            raise KeyboardInterrupt
        return adam_step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(erase, "SAVE_EVERY", 2)
    checkpoint = tmp_path / "broken.checkpoint"
    stops(monkeypatch, 130, *command, "--out", out)
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"
    assert checkpoint.exists() and not out.exists()

    for flags, says in [
        (["--eta", 2], f"{checkpoint} is from an unfinished run: add --resume, or delete it"),
        (["--eta", 2, "--resume"], "to a run with a different eta: 1.0, not 2.0"),
    ]:
        stops(monkeypatch, 2, *command, "--out", out, *flags)
        assert says in capsys.readouterr().err and checkpoint.exists()

    stepped, limit = 0, None
    run_main(monkeypatch, *command, "--out", out, "--resume")
    assert stepped == 8 - 4 and not checkpoint.exists()
    tensors, expected = load_file(out), load_file(whole)
    assert len(tensors) == 80 == len(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.robustness
def test_interrupted_images_can_be_drawn_later(folder, tmp_path, monkeypatch):
    """The weights are saved before; until the image is there, the checkpoint stays."""
    command = ["star", "--model", folder, "--iterations", 2, "--steps", 2,
               "--out", tmp_path / "star.safetensors"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", interrupted)
        stops(patch, 130, *command)
    assert {file.suffix for file in tmp_path.iterdir()} == {".checkpoint", ".safetensors"}
    saved = load_file(tmp_path / "star.safetensors")
    assert torch.load(tmp_path / "star.checkpoint", weights_only=True)["done"] == 2

    monkeypatch.setattr(sample, "generate", lambda *_, **__: [Image.new("RGB", (64, 64))] * 4)
    run_main(monkeypatch, *command, "--resume")
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".png"}
    again = load_file(tmp_path / "star.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_damaged_checkpoint_is_refused(sd, tmp_path):
    file = tmp_path / "run.checkpoint"
    erase.erase(sd, ["star"], checkpoint=file, **QUICK)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="run.checkpoint is damaged, delete it"):
        erase.erase(sd, ["star"], checkpoint=file, **QUICK)


@pytest.fixture
def red_png(tmp_path):
    Image.new("RGB", (50, 70), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def every_other_step(unet, texts, shape, rng, sd, steps, every_step, guidance=3.0):
    """For --data: gets the flags, and the model."""
    assert isinstance(sd, sample.StableDiffusion) and steps == 2 and not every_step
    return erase.x_t_from_model(sd.unet, texts, shape, rng, steps=3, guidance=guidance)


def nothing(unet, texts, shape, rng):
    """For --data: takes no flag."""
    return iter(())


def loss_with_sd(unet, frozen, x_t, t, text, eta, sd):
    """For --loss: gets the model."""
    assert isinstance(sd, sample.StableDiffusion)
    return half_loss(unet, frozen, x_t, t, text, eta)


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("flags, concepts, settings", [
    ("", ["star"], {}),
    ("--every-step", ["star"], {"data": drawn_by(EVERY_STEP, steps=2)}),
    ("--anchor heart", {"star": "heart"}, {}),
    ("--loss notebooks.methods.esd_from:loss --anchor heart", {"star": "heart"},
     {"loss_fn": esd_from.loss}),
    ("--image red.png", ["star"], {"data": "image"}),
    ("--data test_erase:every_other_step --guidance 4", ["star"], {"data": "own"}),
    ("--loss test_erase:loss_with_sd --lr 2e-3", ["star"], {"loss_fn": half_loss, "lr": 2e-3}),
    ("--method esd-u --eta 2 --lr 1e-2 --guidance 4 --batch 2 --seed 5", ["star"],
     {"method": "esd-u", "eta": 2.0, "lr": 1e-2, "batch": 2, "seed": 5,
      "data": drawn_by(erase.x_t_from_model, steps=2, guidance=4.0)}),
])
def test_the_command_is_the_function(flags, concepts, settings, sd, folder, tmp_path, monkeypatch,
                                     no_images, red_png):
    """The file has what the function returns, so every flag reaches it."""
    usual = {"iterations": 4, "lr": 1e-3, "data": drawn_by(erase.x_t_from_model, steps=2)}
    if settings.get("data") == "image":
        latents = sd.encode_images([Image.open(red_png)])
        settings = {"data": drawn_by(erase.x_t_from_images, steps=2, latents=latents)}
    elif settings.get("data") == "own":
        settings = {"data": functools.partial(
            every_other_step, sd=sd, steps=2, every_step=False, guidance=4.0)}
    flags = flags.replace("red.png", str(red_png)).split()
    run_main(monkeypatch, "star", "--model", folder, "--iterations", 4, "--steps", 2, "--lr", 1e-3,
             *flags, "--out", tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    theta = erase.erase(sd, concepts, **usual | settings)
    assert stored.keys() == theta.keys()
    assert all(torch.equal(stored[name], theta[name].half()) for name in theta)
    plain = erase.erase(sd, ["star"], **usual)
    same = all(name in stored and torch.equal(stored[name], plain[name].half()) for name in plain)
    assert same == (not flags)


def test_every_flag_reaches_the_loader_and_the_file(folder, tmp_path, monkeypatch, no_images):
    flags = {"method": "esd-u", "eta": 2.0, "lr": 1e-3, "iterations": 1, "guidance": 4.0,
             "steps": 3, "seed": 5, "batch": 2, "every_step": True, "device": "cpu",
             "dtype": "bfloat16", "model": str(folder), "anchor": "heart",
             "loss": "notebooks.methods.esd_from:loss", "data": "erase:x_t_from_model"}
    given, load = {}, sample.load

    def spy(*args, **kwargs):
        given.update(inspect.signature(load).bind(*args, **kwargs).arguments)
        return load(*args, **kwargs)

    monkeypatch.setattr(sample, "load", spy)
    typed = [word for key, value in flags.items()
             for word in (f"--{key.replace('_', '-')}", *([] if value is True else [value]))]
    run_main(monkeypatch, "star", "moon", *typed, "--out", tmp_path / "a.safetensors")
    saved = settings_of(tmp_path / "a.safetensors")
    assert flags.items() <= saved.items() and saved["concepts"] == ["star", "moon"]
    assert given == {key: flags[key] for key in ("model", "device", "dtype")}


def test_flags_may_come_from_a_file_and_later_ones_win(loaded, tmp_path, monkeypatch, no_images):
    (tmp_path / "flags").write_text("--model=small\n--iterations 0 --steps=2\n--every-step\n")
    file, seen = f"@{tmp_path}/flags", []
    for i, flags in enumerate(([file], [file, "--steps", 3], ["--steps", 3, file])):
        run_main(monkeypatch, "star", *flags, "--out", tmp_path / f"{i}.safetensors")
        saved = settings_of(tmp_path / f"{i}.safetensors")
        assert saved["every_step"] and saved["iterations"] == 0 and saved["concepts"] == ["star"]
        assert saved["model"] == "small"
        seen.append(saved["steps"])
    assert seen == [2, 3, 2]
