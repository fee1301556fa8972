"""erase.py: Eq. 6, which tensors move, one step by hand, the file, the command line."""

import copy
import inspect
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import ddim
import erase
import sample
from unet import UNet

QUICK = {"iterations": 2, "steps": 4, "lr": 1e-3}


# Eq. 6

def test_target_on_hand_made_tensors():
    eps_null, eps_c = tensor([1.0, 2.0, 3.0]), tensor([2.0, 0.0, 3.0])
    assert erase.esd_target(eps_null, eps_c, 1.0).tolist() == [0.0, 4.0, 3.0]
    assert erase.esd_target(eps_null, eps_c, 3.0).tolist() == [-2.0, 8.0, 3.0]
    assert erase.esd_target(eps_null, eps_c, 0.0).tolist() == eps_null.tolist()


def test_eta_minus_one_gives_back_the_conditional_prediction():
    eps_null, eps_c = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(erase.esd_target(eps_null, eps_c, -1.0), eps_c, atol=1e-12)


@pytest.mark.parametrize("loss, shown, expected", [
    (erase.esd_loss, "concept", [9.0, 64.0]),  # target = 1 - 2 * (3 - 1) = -3
    (erase.esd_from_loss, "anchor", [36.0, 1.0]),  # target = 10 - 2 * (3 - 1) = 6
])
def test_a_loss_is_one_mean_square_per_sample(loss, shown, expected):
    """The teacher says 3 for the concept, 1 for nothing, 10 for the anchor; the student 0 or 5."""
    text = erase.Text(*(torch.full((2, 77, 4), value) for value in (3.0, 1.0, 10.0)))

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert c is getattr(text, shown)
        return torch.ones_like(x_t) * tensor([0.0, 5.0]).view(2, 1, 1, 1)

    x_t, t = torch.zeros(2, 4, 8, 8), tensor([1, 2])
    assert loss(student, teacher, x_t, t, text, eta=2.0).tolist() == expected


# Which parameters a method tunes

@pytest.mark.parametrize("method, tensors, parameters", [  # the paper's code counts these on SD v1
    ("esd-x", 80, 43_962_560),
    ("esd-x-strict", 32, 19_169_280),
    ("esd-u", 598, 813_495_680),
    ("selfattn", 80, 49_574_080),
    ("full", 686, 859_520_964),
    ("notime", 678, 857_458_240),
])
def test_counts_on_the_full_size_model(method, tensors, parameters):
    with torch.device("meta"):
        unet = UNet()
    names = erase.select(unet, method)
    sizes = dict(unet.named_parameters())
    assert len(names) == tensors
    assert sum(sizes[name].numel() for name in names) == parameters


def test_the_names_of_esd_x():
    with torch.device("meta"):
        unet = UNet()
    places = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    layers = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    expected = {f"{p}.transformer_blocks.0.attn2.{w}" for p in places for w in layers}
    assert set(erase.select(unet, "esd-x")) == expected


def test_names_of_the_official_code_are_understood(sd):
    for alias, method in (("xattn", "esd-x"), ("noxattn", "esd-u"), ("esd-all", "full")):
        assert erase.select(sd.unet, alias) == erase.select(sd.unet, method)


def test_unknown_methods_and_empty_selections_are_errors(sd):
    with pytest.raises(ValueError, match="'esdx', choose from esd-x, "):
        erase.select(sd.unet, "esdx")
    with pytest.raises(ValueError, match="'esd-x' selects no parameter"):
        erase.select(torch.nn.Linear(2, 2), "esd-x")


# The loop

def test_only_the_chosen_tensors_come_back_and_the_model_is_untouched(sd):
    before = {name: p.clone() for name, p in sd.unet.state_dict().items()}
    theta = erase.erase(sd, ["star"], **QUICK)
    assert list(theta) == erase.select(sd.unet, "esd-x")
    assert all(theta[name].dtype == torch.float32 for name in theta)
    assert all((theta[name] != before[name]).any() for name in theta)
    assert all(torch.equal(p, before[name]) for name, p in sd.unet.state_dict().items())


def test_zero_iterations_change_no_bit(sd, tmp_path):
    theta = erase.erase(sd, ["star"], iterations=0)
    erase.save(theta, tmp_path / "none.safetensors", torch.float32, {})
    same = sample.load_erased(sd, tmp_path / "none.safetensors")
    first, second = (sample.generate(m, ["a star"], steps=2)[0] for m in (sd, same))
    assert first.tobytes() == second.tobytes()


def steps_by_hand(sd, concept, lr, seed, steps, iterations):
    """ESD with a second, really edited U-Net, nothing functional, nothing shared."""
    edited = copy.deepcopy(sd.unet)
    tuned = [p for name, p in edited.named_parameters() if "attn2" in name]
    for p in tuned:
        p.requires_grad_(True)
    adam = torch.optim.Adam(tuned, lr=lr)
    c, null, abar = sd.encode([concept]), sd.encode([""]), ddim.alphas_cumprod()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        torch.randint(1, (1,), generator=generator)  # the concept
        k = torch.randint(steps, (1,), generator=generator).item()
        x = torch.randn(1, 4, 8, 8, generator=generator)
        times = ddim.timesteps(steps)
        with torch.no_grad():
            for t, t_prev in zip(times[:k], times[1:]):
                e = edited(x, t, null) + 3 * (edited(x, t, c) - edited(x, t, null))
                x = ddim.step(x, e, abar[t], abar[t_prev])
            target = 2 * sd.unet(x, times[k], null) - sd.unet(x, times[k], c)  # eta = 1
        adam.zero_grad()
        ((edited(x, times[k], c) - target) ** 2).mean().backward()
        adam.step()
    return {name: p for name, p in edited.named_parameters() if "attn2" in name}


def test_it_is_what_a_second_unet_trained_by_hand_becomes(sd):
    settings = {"lr": 1e-2, "seed": 1, "steps": 4, "iterations": 3}
    by_hand = steps_by_hand(sd, "star", **settings)
    theta = erase.erase(sd, ["star"], **settings)
    start = dict(sd.unet.named_parameters())
    for name in theta:  # Adam's division makes rounding large where a gradient is nearly zero
        moved = (by_hand[name] - start[name]).norm()
        assert (theta[name] - by_hand[name]).norm() < 0.01 * moved, name


def test_average_is_of_the_tensors_after_each_iteration(sd):
    """With decay 0.5 from the start a: after b and c it is a/4 + b/4 + c/2."""
    name = erase.select(sd.unet, "esd-x")[0]
    a = dict(sd.unet.named_parameters())[name]
    b, c = (erase.erase(sd, ["star"], iterations=n, steps=2, lr=1e-2)[name] for n in (1, 2))
    averaged = erase.erase(sd, ["star"], iterations=2, steps=2, lr=1e-2, average=0.5)[name]
    assert torch.allclose(averaged, a / 4 + b / 4 + c / 2, atol=1e-6)
    assert not torch.allclose(averaged, c, atol=1e-4)


def test_the_rate_falls_to_zero_or_stays(sd):
    rates = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        erase.erase(sd, ["star"], lr=0.8, lr_decay=True, iterations=4, steps=2)
        erase.erase(sd, ["star"], lr=0.8, iterations=2, steps=2)
    finally:
        hook.remove()
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.8, 0.8])


def test_a_batch_has_several_latents_and_one_loss_for_each(sd):
    def loss(unet, frozen, x_t, t, text, eta):
        value = erase.esd_loss(unet, frozen, x_t, t, text, eta)
        assert x_t.shape == (3, 4, 8, 8) and t.shape == value.shape == (3,)
        assert not torch.equal(x_t[0], x_t[1])
        return value

    erase.erase(sd, ["star"], iterations=2, steps=2, batch=3, loss_fn=loss)


def test_one_concept_is_drawn_each_step(sd):
    seen = []

    def loss(unet, frozen, x_t, t, text, eta):
        seen.append(text.concept)
        return erase.esd_loss(unet, frozen, x_t, t, text, eta)

    erase.erase(sd, ["star", "heart"], iterations=12, steps=1, loss_fn=loss)
    star, heart = sd.encode(["star"]), sd.encode(["heart"])
    drawn = [torch.equal(c, star) for c in seen]
    assert all(star_drawn or torch.equal(c, heart) for c, star_drawn in zip(seen, drawn))
    assert 0 < sum(drawn) < 12


def test_half_precision_model_is_tuned_in_float32(folder):
    sd = sample.load(folder, dtype="bfloat16")
    theta = erase.erase(sd, ["star"], iterations=1, steps=2, lr=1e-5)
    start = dict(sd.unet.named_parameters())
    moved = torch.cat([(theta[name] != start[name].float()).flatten() for name in theta])
    assert all(theta[name].dtype == torch.float32 for name in theta)
    assert moved.float().mean() > 0.99  # in bfloat16, few weights would move by 1e-5


# What x_t is, and t

def batches(sd, concepts=("star",), **settings):
    """(x_t, t, text) of every iteration."""
    seen = []

    def loss(unet, frozen, x_t, t, text, eta):
        seen.append((x_t, t, text))
        return erase.esd_loss(unet, frozen, x_t, t, text, eta)

    erase.erase(sd, [*concepts], loss_fn=loss, **{"iterations": 8, "steps": 4, "lr": 1e-2}
                | settings)
    return seen


def test_x_t_may_be_drawn_by_the_frozen_model(sd):
    edited, frozen = batches(sd, iterations=9), batches(sd, iterations=9, drawn_by="frozen")
    assert [t for _, t, _ in edited] == [t for _, t, _ in frozen]
    for x_t, t, text in frozen:  # whatever theta has become
        c, null = sd.encode(["star"]), sd.encode([""])
        assert torch.equal(text.concept, c)
    first = ddim.denoise(ddim.guided(sd.unet, c, null, 3.0), frozen[0][0], 4)
    assert torch.equal(edited[0][0], frozen[0][0]) and first  # before theta has moved
    late = [torch.equal(a[0], b[0]) for a, b in zip(edited, frozen) if a[1].item() != 751]
    assert late.count(False) >= len(late) - 1  # x_T is noise, the others differ
    still = batches(sd, iterations=9, drawn_by="frozen", lr=1.0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(frozen, still))


def test_t_is_exact_or_anywhere_in_its_step(sd):
    exact = {t.item() for _, t, _ in batches(sd, iterations=30)}
    assert exact == set(ddim.timesteps(4)) == {1, 251, 501, 751}
    anywhere = [t.item() for _, t, _ in batches(sd, iterations=30, jitter=True)]
    assert all(0 <= t <= 999 for t in anywhere) and len(set(anywhere)) > 20
    assert len({t // 250 for t in anywhere}) == 4  # step k is 250 k to 250 k + 249
    for seed in range(10):  # of 500 steps each has two times, so a t beside them shows soon
        settings = {"steps": 500, "iterations": 1, "seed": seed, "images": [Image.new("L", (8, 8))]}
        (_, step, _), = batches(sd, **settings)
        (_, t, _), = batches(sd, **settings, jitter=True)
        assert t // 2 == step // 2


def test_a_picture_is_noised_to_t(sd):
    image = Image.linear_gradient("L").convert("RGB")
    x_0 = sd.encode_images([image])
    generator = torch.Generator().manual_seed(0)
    for x_t, t, _ in batches(sd, images=[image], batch=2):
        torch.randint(1, (1,), generator=generator)
        assert ddim.timesteps(4)[torch.randint(4, (1,), generator=generator)] == t[0].item()
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        abar = ddim.alphas_cumprod()[t[0]]
        assert torch.allclose(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, atol=1e-6)


def test_a_picture_belongs_to_its_title(sd):
    images = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    x_0 = sd.encode_images(images)
    for x_t, _, text in batches(sd, ("star", "heart"), images=images, steps=1, iterations=6):
        own = int(torch.equal(text.concept, sd.encode(["heart"])))
        noise = (x_t - ddim.alphas_cumprod()[1].sqrt() * x_0).std(dim=(1, 2, 3))  # at t = 1
        assert noise[own] < noise[1 - own]


def test_latents_of_a_picture_are_those_of_the_vae(sd):
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    x_0, = sd.encode_images([image])
    pixels = torch.tensor(list(image.tobytes())).view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(x_0, sd.vae.encode(pixels)[0][0] * 0.18215, atol=1e-6)
    assert sd.encode_images([image.resize((640, 320))]).shape == (1, 4, 8, 8)


def test_the_wider_concept_is_drawn_and_shown(sd):
    for anchors in (["heart"], ["heart", "heart"]):
        for _, _, text in batches(sd, ("star", "moon"), anchors=anchors, iterations=4):
            assert torch.equal(text.anchor, sd.encode(["heart"]))
    x_heart = batches(sd, ["heart"], drawn_by="frozen")
    x_from = batches(sd, ["star"], anchors=["heart"], drawn_by="frozen")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(x_heart, x_from))
    assert all(torch.equal(text.anchor, text.concept) for _, _, text in x_heart)


@pytest.mark.parametrize("settings, says", [
    ({"anchors": ["a", "b"]}, "1 concepts and 2 anchors"),
    ({"images": [None, None]}, "1 concepts and 2 images"),
    ({"drawn_by": "me"}, "drawn_by is 'me'")])
def test_settings_that_do_not_go_together(settings, says, sd):
    with pytest.raises(ValueError, match=says):
        erase.erase(sd, ["star"], iterations=0, **settings)


# Interrupted, resumed, gone wrong

@pytest.mark.parametrize("more", [{}, {"average": 0.9, "lr_decay": True, "jitter": True}])
def test_what_goes_on_from_a_state_ends_the_same_bit_for_bit(more, sd, tmp_path, monkeypatch):
    monkeypatch.setattr(erase, "KEEP_EVERY", 3)
    settings = {"iterations": 7, "steps": 3, "lr": 1e-3, "batch": 2} | more
    states = []
    whole = erase.erase(sd, ["star", "heart"], **settings,
                        keep=lambda state: states.append(copy.deepcopy(state)))
    assert [state["iteration"] for state in states] == [3, 6]
    for state in states:
        torch.save(state, tmp_path / "state")
        again = erase.erase(sd, ["star", "heart"], **settings,
                            state=torch.load(tmp_path / "state", weights_only=True))
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_loss_that_is_not_finite_stops_the_run(sd):
    def loss(unet, frozen, x_t, t, text, eta):
        return erase.esd_loss(unet, frozen, x_t, t, text, eta) * torch.inf

    with pytest.raises(ValueError, match=r"loss at iteration 0, t = \d+, isn't finite: try"):
        erase.erase(sd, ["star"], loss_fn=loss, **QUICK)


def test_float16_is_tuned_with_a_scaled_loss(folder):
    """Unscaled, the gradients of the first steps are below what float16 can hold."""
    sd = sample.load(folder, dtype="float16")
    theta = erase.erase(sd, ["star"], iterations=1, steps=2, lr=1e-5)
    start = dict(sd.unet.named_parameters())
    moved = torch.cat([(theta[name] != start[name].float()).flatten() for name in theta])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("method", ["esd-x", "esd-u"])
def test_checkpointing_changes_no_bit(method, folder):
    results = []
    for checkpointing in (False, True):
        sd = sample.load(folder)
        sd.unet.checkpointing = checkpointing
        results.append(erase.erase(sd, ["star"], method, **QUICK))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_checkpointing_saves_less(sd, folder):
    """The bytes that autograd keeps for the gradient, weights not counted."""
    def kept(unet):
        sizes = {}

        def pack(saved):
            sizes[saved.data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        weights = {p.data_ptr() for p in unet.parameters()}
        x_t = torch.randn(1, 4, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            unet(x_t, 1, sd.encode(["star"]))
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    copied = sample.load(folder).unet
    usual = kept(copied)
    copied.checkpointing = True
    assert kept(copied) < usual / 3


# The file

def test_the_same_seed_gives_the_same_file(sd, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        theta = erase.erase(sd, ["star"], seed=seed, **QUICK)
        erase.save(theta, tmp_path / name, torch.float16, {"concepts": ["star"], "eta": 1.0})
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_the_file_has_the_settings_and_the_dtype(sd, tmp_path):
    theta = erase.erase(sd, ["star"], **QUICK)
    for dtype in (torch.float16, torch.float32):
        erase.save(theta, tmp_path / "f", dtype, {"concepts": ["star"], "eta": 1.0})
        with safe_open(tmp_path / "f", "pt") as file:
            assert json.loads(file.metadata()["settings"]) == {"concepts": ["star"], "eta": 1.0}
            assert all(torch.equal(file.get_tensor(k), v.to(dtype)) for k, v in theta.items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "erased.safetensors"
    erase.save({"a": torch.ones(1)}, path, torch.float32, {})

    def break_off(tensors, part, metadata):
        part.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(erase, "save_file", break_off)
    with pytest.raises(OSError):
        erase.save({"a": torch.zeros(1)}, path, torch.float32, {})
    with pytest.raises(ValueError, match="a isn't finite"):
        erase.save({"a": torch.full((1,), torch.nan)}, path, torch.float32, {})
    assert load_file(path)["a"].item() == 1 and [*tmp_path.iterdir()] == [path]


def test_a_file_of_another_model_is_refused(sd, tmp_path):
    save_file({"down_blocks.9.weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="down_blocks.9.weight isn't in the model"):
        sample.load_erased(sd, tmp_path / "other")
    save_file({}, tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no tensors"):
        sample.load_erased(sd, tmp_path / "empty")


def test_loading_shares_what_was_not_tuned_and_leaves_the_original(sd, tmp_path):
    erase.save(erase.erase(sd, ["star"], **QUICK), tmp_path / "f", torch.float32, {})
    erased = sample.load_erased(sd, tmp_path / "f")
    before, after = sd.unet.state_dict(), erased.unet.state_dict()
    for name in before:
        assert (before[name].data_ptr() == after[name].data_ptr()) == ("attn2" not in name)


# Command line

def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["erase.py", *map(str, arguments)])
    erase.main()


@pytest.fixture
def no_picture(monkeypatch):
    """The before/after picture takes most of a command's time and is tested once."""
    monkeypatch.setattr(erase, "before_after", lambda *_: Image.new("RGB", (1, 1)))


def test_the_command_writes_weights_and_a_picture(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "star.safetensors"
    run_main(monkeypatch, "star", "--model", folder, "--iterations", 2, "--steps", 2,
             "--show", "a heart", "--out", out)
    said = capsys.readouterr().out
    assert "esd-x tunes 80 tensors" in said and str(out) in said
    assert len(load_file(out)) == 80
    picture = Image.open(out.with_suffix(".png"))
    assert picture.text["prompt"] == "star\na heart"
    monkeypatch.setattr("sys.argv", ["sample.py", "a star", "--model", str(folder), "--steps", "1",
                                     "--erased", str(out), "--out", str(tmp_path / "star-2.png")])
    sample.main()
    settings = json.loads(Image.open(tmp_path / "star-2.png").text["settings"])
    assert settings["erased"] == str(out)


@pytest.mark.parametrize("arguments, says", [
    (["--model", "nowhere"], "nowhere is no file or folder here"),
    (["--steps", "1000"], "steps is 1000"),
    (["--iterations", "-1"], "iterations is -1"),
    (["--batch", "0"], "batch is 0"),
    (["--average", "1"], "average 1.0"),
    (["--from", "a", "b"], "1 concepts and 2 anchors"),
    (["--image", "README.md"], "README.md can't be opened as a picture"),
    (["--out", "star.png"], "star.png can't be written"),
])
def test_wrong_input_gets_one_line(folder, tmp_path, monkeypatch, capsys, arguments, says):
    out = tmp_path / "star.safetensors"
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "star", "--model", folder, "--out", out, *arguments)
    assert stopped.value.code == 2 and not out.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_resumed_to_the_same_file(folder, tmp_path, monkeypatch, capsys,
                                                  no_picture):
    monkeypatch.setattr(erase, "KEEP_EVERY", 3)
    command = ["star", "--model", folder, "--iterations", 8, "--steps", 2, "--average", 0.9,
               "--lr-decay"]
    run_main(monkeypatch, *command, "--out", tmp_path / "whole.safetensors")

    out, steps = tmp_path / "broken.safetensors", []

    def killed(self, *args):
        steps.append(args)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return adam_step(self, *args)

    adam_step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", killed)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *command, "--out", out)
    assert stopped.value.code == 130 and not out.exists()
    assert "broken.checkpoint keeps what was reached" in capsys.readouterr().err
    monkeypatch.setattr(torch.optim.Adam, "step", adam_step)

    for change, says in ((["--resume", "--eta", 2], "made with eta = 1.0, not 2.0"),
                         (["--resume", "--method", "esd-u"], "made with method = 'esd-x'"),
                         (["--resume", "--iterations", 9], "made with iterations = 8"),
                         ([], "broken.checkpoint is there already: go on with --resume")):
        with pytest.raises(SystemExit) as stopped:
            run_main(monkeypatch, *command, "--out", out, *change)
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *command, "--out", tmp_path / "new.safetensors", "--resume")
    assert "new.checkpoint isn't there: nothing to resume" in capsys.readouterr().err
    run_main(monkeypatch, *command, "--out", out, "--resume")
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not out.with_suffix(".checkpoint").exists()
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *command, "--out", out)
    assert "broken.safetensors is there already" in capsys.readouterr().err


def test_every_flag_reaches_the_loop_and_the_file(folder, tmp_path, monkeypatch, no_picture):
    flags = {"method": "full", "eta": 2.0, "lr": 1e-3, "iterations": 1, "guidance": 4.0, "steps": 3,
             "seed": 5, "batch": 2, "average": 0.5, "lr_decay": True, "drawn_by": "frozen",
             "jitter": True}
    given, loop = {}, erase.erase

    def spy(*args, **kwargs):
        given.update(inspect.signature(loop).bind(*args, **kwargs).arguments)
        return loop(*args, **kwargs)

    monkeypatch.setattr(erase, "erase", spy)
    typed = [word for key, value in flags.items()
             for word in (f"--{key.replace('_', '-')}", *([] if value is True else [value]))]
    run_main(monkeypatch, "star", "--model", folder, *typed, "--out", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        saved = json.loads(file.metadata()["settings"])
    assert flags.items() <= given.items() and flags.items() <= saved.items()


def test_the_command_takes_pictures_and_wider_concepts(folder, tmp_path, monkeypatch, no_picture):
    Image.new("RGB", (50, 70), "red").save(tmp_path / "red.png")
    quick = ["--model", folder, "--iterations", 1, "--steps", 2]
    run_main(monkeypatch, "red", *quick, "--image", tmp_path / "red.png",
             "--out", tmp_path / "a.safetensors")
    run_main(monkeypatch, "hat", *quick, "--from", "cowboy", "--out", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"])["anchors"] == ["cowboy"]
