"""sample.py: loading a folder, pictures from prompts, the command line, wrong input."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ddim
import sample

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def pixels(images):
    """Pictures as one tensor of integers."""
    return torch.stack([torch.tensor(list(image.tobytes())) for image in images])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
    sample.main()


def fails_in_one_line(monkeypatch, capsys, *arguments):
    """Runs the command, checks exit status 2 and a single line of error, and returns that line."""
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


# Loading

def test_every_tensor_is_the_files(folder):
    sd = sample.load(folder)
    for part, model, file in (("unet", sd.unet, UNET_FILE),
                              ("vae", sd.vae, "vae/diffusion_pytorch_model.safetensors"),
                              ("text_encoder", sd.text_encoder, "text_encoder/model.safetensors")):
        stored = load_file(folder / file)
        assert stored.keys() == model.state_dict().keys(), part
        assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items())


def test_no_random_weights_are_drawn(folder):
    before = torch.get_rng_state()
    sample.load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_layers_made_after_a_load_are_initialised_as_ever(folder):
    sample.load(folder)
    for make in (lambda: nn.Linear(64, 64), lambda: nn.Conv2d(8, 8, 3), lambda: nn.Embedding(9, 9)):
        torch.manual_seed(0)
        first = make().weight
        torch.manual_seed(0)
        assert torch.equal(first, make().weight) and first.std() > 0.01


def test_dtype_is_chosen(folder):
    assert sample.load(folder).dtype == torch.float32
    sd = sample.load(folder, dtype="bfloat16")
    assert sd.dtype == sd.vae.quant_conv.weight.dtype == torch.bfloat16
    assert sd.encode(["star"]).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(part))
    with pytest.raises(ValueError, match=part):
        sample.load(copy)


def test_a_config_without_an_entry_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vae" / "config.json").write_text("{}")
    says = "vae/config.json isn't one of Stable Diffusion v1: KeyError 'block_out_channels'"
    with pytest.raises(ValueError, match=says):
        sample.load(copy)


def changed_unet(folder, tmp_path, change):
    """A copy of the model folder, the U-Net's tensors changed in place by `change`."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / UNET_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, copy / UNET_FILE)
    return copy


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("conv_in.bias"), "1 tensors differ: conv_in.bias is missing"),
    (lambda w: w.update(extra=torch.zeros(1)), "1 tensors differ: extra isn't in the model"),
    (lambda w: w.update({"conv_in.bias": torch.zeros(5)}), r"conv_in.bias is \(5,\), not \(32,\)"),
])
def test_wrong_tensors_are_named(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sample.load(changed_unet(folder, tmp_path, change))


def test_a_truncated_file_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = (copy / UNET_FILE).read_bytes()
    (copy / UNET_FILE).write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="is damaged, incomplete or no file of tensors"):
        sample.load(copy)


# Prompts to pictures

def test_a_picture_is_what_two_separate_predictions_give(sd):
    """generate() against the same way written out: no shared batch, no helper."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    c, negative = sd.encode(["a star"]), sd.encode(["a heart"])
    abar = ddim.alphas_cumprod()
    with torch.no_grad():
        for t, t_prev in ((667, 334), (334, 1), (1, 0)):
            eps_n, eps_c = sd.unet(x, t, negative), sd.unet(x, t, c)
            eps = eps_n + 4 * (eps_c - eps_n)
            x_0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
            x = abar[t_prev] ** 0.5 * x_0 + (1 - abar[t_prev]) ** 0.5 * eps
        image = sd.vae.decode(x / 0.18215)
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().int()[0].permute(1, 2, 0).flatten()
    made = sample.generate(sd, ["a star"], seed=3, steps=3, guidance=4, negative="a heart")
    assert (pixels(made)[0] - expected).abs().max() <= 1


def test_a_concept_to_avoid_is_the_third_prediction(sd):
    """generate(safe=...) against ddim's function given the three texts by hand."""
    c, null, safe = (sd.encode([text]) for text in ("a star", "a moon", "a heart"))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    predict = ddim.safe_guided(sd.unet, c, null, safe, 4, ddim.SLD["max"])
    with torch.no_grad():
        *_, (_, x_0) = ddim.denoise(predict, noise, 3)
    made = sample.generate(sd, ["a star"], seed=3, steps=3, guidance=4, negative="a moon",
                           safe="a heart", sld="max")
    assert torch.equal(pixels(made), pixels(sd.decode(x_0)))
    for other in ({}, {"safe": "a heart", "sld": "weak"}, {"safe": "a circle", "sld": "max"}):
        again = sample.generate(sd, ["a star"], seed=3, steps=3, guidance=4, negative="a moon",
                                **other)
        assert not torch.equal(pixels(made), pixels(again))


def test_each_batch_begins_with_no_momentum(sd):
    how = {"steps": 3, "safe": "a heart", "sld": "max"}
    alone = sample.generate(sd, ["a star"] * 2, seed=[0, 1], batch=1, **how)
    together = sample.generate(sd, ["a star"] * 2, seed=[0, 1], batch=2, **how)
    assert (pixels(alone) - pixels(together)).abs().max() <= 1


def test_an_unknown_setting_of_sld_is_refused(sd):
    with pytest.raises(ValueError, match="sld is 'huge', choose from weak, medium"):
        sample.generate(sd, ["a star"], safe="a heart", sld="huge")


def test_pixels_are_rounded_not_cut(sd):
    grey = SimpleNamespace(config=sd.vae.config,
                           decode=lambda z: torch.full((1, 3, 8, 8), 2 * 100.6 / 255 - 1))
    image, = replace(sd, vae=grey).decode(torch.zeros(1, 4, 1, 1))
    assert image.getpixel((0, 0)) == (101, 101, 101)


def test_noise_is_drawn_as_diffusers_draws_it(sd):
    """There one call draws the noise of all pictures of a prompt from the seed's generator."""
    together = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sample.starting_noise(sd, 3, 7, None), together)
    assert torch.equal(sample.starting_noise(sd, 1, 7, None), together[:1])


def test_pictures_do_not_depend_on_the_batch(sd):
    prompts = ["a star", "a heart"]
    large = sample.generate(sd, prompts, num=3, steps=2, batch=8)
    small = sample.generate(sd, prompts, num=3, steps=2, batch=1)
    alone = sample.generate(sd, prompts[1:], num=3, steps=2)
    assert (pixels(large) - pixels(small)).abs().max() <= 1
    assert (pixels(large)[3:] - pixels(alone)).abs().max() <= 1
    assert (pixels(large)[0] - pixels(large)[1]).abs().max() > 10  # they aren't all the same


def test_prompts_may_have_seeds_of_their_own(sd):
    both = sample.generate(sd, ["a star", "a star"], seed=[5, 6], steps=2)
    alone = sample.generate(sd, ["a star"], seed=6, steps=2)
    assert (pixels(both)[1] - pixels(alone)[0]).abs().max() <= 1
    assert (pixels(both)[0] - pixels(both)[1]).abs().max() > 10


def test_the_same_call_gives_the_same_pictures(sd):
    first, second = (pixels(sample.generate(sd, "a star", steps=2)) for _ in range(2))
    assert torch.equal(first, second)


def test_size_is_in_pixels(sd):
    assert sample.generate(sd, "a star", steps=1)[0].size == (64, 64)
    assert sample.generate(sd, "a star", steps=1, size=128)[0].size == (128, 128)
    with pytest.raises(ValueError, match="size is 100, choose a multiple of 64"):
        sample.generate(sd, "a star", steps=1, size=100)


def test_a_long_prompt_is_cut_with_a_warning(sd):
    with pytest.warns(UserWarning, match="cut to the first 77 of 102 tokens"):
        assert sd.encode(["star " * 100]).shape == (1, 77, 32)


# Command line

def test_pictures_say_how_they_were_made(folder, tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    run_main(monkeypatch, "a star", "ein Stern ★", "--model", folder, "--num", 2, "--steps", 2,
             "--seed", 4, "--out", sheet, "--singles", tmp_path / "all")
    assert str(sheet) in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [
        "0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    single = Image.open(tmp_path / "all" / "1_1.png")
    assert single.size == (64, 64) and single.text["prompt"] == "ein Stern ★"
    settings = json.loads(single.text["settings"])
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (4, 2, 7.5)
    assert Image.open(sheet).width > 2 * 64


def test_the_command_line_avoids_a_concept(sd, folder, tmp_path, monkeypatch):
    run_main(monkeypatch, "a star", "--model", folder, "--steps", 2, "--negative", "a moon",
             "--safe", "a heart", "--sld", "max", "--out", tmp_path / "x.png",
             "--singles", tmp_path / "all")
    expected = sample.generate(sd, ["a star"], steps=2, negative="a moon", safe="a heart",
                               sld="max")
    made = Image.open(tmp_path / "all" / "0_0.png")
    assert torch.equal(pixels([made]), pixels(expected))
    settings = json.loads(made.text["settings"])
    assert (settings["safe"], settings["sld"]) == ("a heart", "max")


@pytest.mark.parametrize("arguments, says", [
    (["--model", "nowhere"], "nowhere is no file or folder here"),
    (["--steps", "0"], "steps is 0"),
    (["--size", "65"], "size is 65"),
    (["--num", "0"], "num is 0"),
    (["--batch", "0"], "batch 0"),
    (["--erased", "nothing.safetensors"], "nothing.safetensors"),
    (["--device", "abacus"], "abacus"),
    (["--seed", "-1"], "seed is -1"),
    (["--out", "picture.jpg"], "picture.jpg can't be written"),
])
def test_wrong_input_gets_one_line(folder, tmp_path, monkeypatch, capsys, arguments, says):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    out = tmp_path / "out.png"
    assert says in fails_in_one_line(monkeypatch, capsys, "a star", "--out", out, *arguments)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """Neither takes the other's half-written file away; who ends last is there."""
    file = tmp_path / "both.txt"

    def write(part):
        part.write_text("first")
        with monkeypatch.context() as other:
            other.setattr(sample.os, "getpid", lambda: -1)
            sample.write_whole(file, lambda part: part.write_text("second"))
        assert file.read_text() == "second"

    sample.write_whole(file, write)
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
