"""erase.py: Eq. 6, which tensors move, one step by hand, the file, the command line."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import tensor

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


def test_loss_is_one_mean_square_per_sample():
    """With known networks: the teacher says 1 without c and 3 with it, the student 0 or 5."""
    text = erase.Text(concept=torch.full((2, 77, 4), 3.0), null=torch.ones(2, 77, 4))

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert c is text.concept
        return torch.ones_like(x_t) * tensor([0.0, 5.0]).view(2, 1, 1, 1)

    x_t, t = torch.zeros(2, 4, 8, 8), tensor([1, 2])
    # target = 1 - 2 * (3 - 1) = -3, so (0 + 3)^2 and (5 + 3)^2
    assert erase.esd_loss(student, teacher, x_t, t, text, eta=2.0).tolist() == [9.0, 64.0]


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
    assert load_file(path)["a"].item() == 1


def test_a_file_of_another_model_is_refused(sd, tmp_path):
    save_file({"down_blocks.9.weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="down_blocks.9.weight isn't in the model"):
        sample.load_erased(sd, tmp_path / "other")
    save_file({}, tmp_path / "empty")
    with pytest.raises(ValueError, match="the file is empty"):
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
    (["--model", "nowhere"], "nowhere isn't a folder"),
    (["--steps", "1000"], "steps is 1000"),
    (["--iterations", "-1"], "iterations is -1"),
    (["--batch", "0"], "batch is 0"),
    (["--average", "1"], "average 1.0"),
    (["--dtype", "float16"], "float16 is too coarse"),
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
