"""sample.py: loading a folder, images from prompts, the command line, wrong input."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ddim
import sample

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def pixels(images):
    """Images as one tensor of integers."""
    return torch.stack([torch.tensor(list(image.tobytes())) for image in images])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
    sample.main()


def fails_in_one_line(monkeypatch, capsys, *arguments):
    """Runs the command, checks for exit status 2 and one line of error, and returns that line."""
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0] and len(lines[0]) <= 300
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(part))
    with pytest.raises(ValueError, match=f"can't load {copy}: .*/copy/{part}"):
        sample.load(copy)


def test_a_config_without_an_entry_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"can't load {copy}: KeyError: 'block_out_channels'"):
        sample.load(copy)


def changed_unet(folder, tmp_path, change):
    """A copy of the model folder; `change` is given the U-Net's tensors to change in place."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / UNET_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, copy / UNET_FILE)
    return copy


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("conv_in.bias"), "1 tensors differ: unet.conv_in.bias: missing"),
    (lambda w: w.update({"conv_in.bias": torch.zeros(5)}),
     r"1 tensors differ: unet.conv_in.bias: \[5\], expected \[32\]"),
])
def test_wrong_tensors_are_named(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sample.load(changed_unet(folder, tmp_path, change))


def test_tensors_that_no_part_has_are_left_out_and_named(sd, folder, tmp_path, capsys):
    extra = {f"extra.{i}": torch.zeros(1) for i in range(4)}
    copy = changed_unet(folder, tmp_path, lambda w: w.update(extra))
    loaded = sample.load(copy)
    assert loaded.unet.state_dict().keys() == sd.unet.state_dict().keys()
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{copy}: left out 4 tensors: ")
    assert line.endswith("unet.extra.0, unet.extra.1, unet.extra.2")
    sample.load(folder)
    assert capsys.readouterr().err == ""


def test_a_truncated_file_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = (copy / UNET_FILE).read_bytes()
    (copy / UNET_FILE).write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="can't be used"):
        sample.load(copy)


# Prompts to images

def test_an_image_is_what_two_separate_predictions_give(sd):
    """generate() against the same computation written out: no shared batch, no helper."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    c, negative = sd.encode(["a star"]), sd.encode(["a heart"])
    abar = ddim.alphas_cumprod()
    with torch.no_grad():
        for t, t_prev in ((667, 334), (334, 1), (1, 0)):
            eps_n, eps_c = sd.unet(x, t, negative), sd.unet(x, t, c)
            eps = eps_n + 100 * (eps_c - eps_n)  # the small model hardly reads its prompt
            x_0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
            x = abar[t_prev] ** 0.5 * x_0 + (1 - abar[t_prev]) ** 0.5 * eps
        image = sd.vae.decode(x / 0.18215)
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().int()[0].permute(1, 2, 0).flatten()
    made = sample.generate(sd, ["a star"], seed=3, steps=3, guidance=100, negative="a heart")
    assert (pixels(made)[0] - expected).abs().max() <= 1


def test_pixels_are_rounded_not_cut(sd):
    grey = SimpleNamespace(config=sd.vae.config,
                           decode=lambda z: torch.full((1, 3, 8, 8), 2 * 100.6 / 255 - 1))
    image, = replace(sd, vae=grey).decode(torch.zeros(1, 4, 1, 1))
    assert image.getpixel((0, 0)) == (101, 101, 101)


def test_noise_is_drawn_as_diffusers_draws_it(sd):
    """In diffusers, one call draws the noise of all images of a prompt, from the seed."""
    together = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sample.starting_noise(sd, 3, 7, None), together)
    assert torch.equal(sample.starting_noise(sd, 1, 7, None), together[:1])


def test_images_do_not_depend_on_the_batch(sd):
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


def test_the_same_call_gives_the_same_images(sd):
    first, second = (pixels(sample.generate(sd, "a star", steps=2)) for _ in range(2))
    assert torch.equal(first, second)


def test_size_is_in_pixels(sd):
    assert sample.generate(sd, "a star", steps=1)[0].size == (64, 64)
    assert sample.generate(sd, "a star", steps=1, size=128)[0].size == (128, 128)
    assert sample.generate(sd, "a star", steps=1, size=(128, 64))[0].size == (128, 64)
    for size, says in ((100, "100 x 100"), ((64, 100), "64 x 100"), (0, "0 x 0")):
        with pytest.raises(ValueError, match=f"size is {says}, .*choose multiples of 64"):
            sample.generate(sd, "a star", steps=1, size=size)


def test_a_long_prompt_is_cut_with_a_warning(sd):
    with pytest.warns(UserWarning, match="cut to the first 77 of 102 tokens"):
        assert sd.encode(["star " * 100]).shape == (1, 77, 32)


def test_an_image_becomes_the_vaes_latents(sd):
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    x_0, = sd.encode_images([image])
    pixels = torch.tensor(list(image.tobytes())).view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(x_0, sd.vae.encode(pixels)[0][0] * 0.18215, atol=1e-6)
    assert sd.encode_images([image.resize((640, 320)), image]).shape == (2, 4, 8, 8)


# What isn't a picture

def broken_vae(folder, tmp_path):
    """A copy whose decoder overflows, as a VAE may in float16."""
    copy, name = shutil.copytree(folder, tmp_path / "broken"), "decoder.conv_out.bias"
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {name: torch.tensor([0.0, float("inf"), 0.0])}, file)
    return copy


def test_what_is_not_finite_is_no_picture(folder, tmp_path, monkeypatch, capsys):
    model, out = broken_vae(folder, tmp_path), tmp_path / "x.png"
    line = fails_in_one_line(monkeypatch, capsys, "a star", "a moon", "--model", model, "--steps",
                             1, "--batch", 1, "--out", out)
    assert "the batch from 'a star' on has non-finite pixels: try --dtype float32" in line
    assert not out.exists()


def test_the_first_prompt_of_the_batch_that_broke_is_named(sd):
    decoded = []

    def decode(z):
        decoded.append(z)
        return torch.full((1, 3, 8, 8), float("nan") if len(decoded) == 4 else 0.0)

    broken = replace(sd, vae=SimpleNamespace(config=sd.vae.config, decode=decode))
    with pytest.raises(ValueError, match="from 'a moon' on"):
        sample.generate(broken, ["a star", "a moon"], num=3, steps=1, batch=1)


@pytest.mark.parametrize("mode, pixel, shown", [
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("LA", (0, 0), (255, 255, 255)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ("I;16", 257 * 100, (100, 100, 100)), ("I", 257 * 100, (100, 100, 100)),
    ("L", 7, (7, 7, 7)), ("1", 1, (255, 255, 255)), ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
])
def test_an_image_is_what_a_viewer_shows(mode, pixel, shown):
    seen = sample.as_seen(Image.new(mode, (4, 4), pixel))
    assert seen.mode == "RGB" and seen.getpixel((1, 1)) == shown


def test_a_transparent_palette_is_put_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0] + [0] * 765)
    image.info["transparency"] = 0
    assert sample.as_seen(image).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_as_its_exif_says(sd, tmp_path):
    upright = Image.new("RGB", (64, 64), "red")
    upright.paste("blue", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    upright.rotate(180).save(tmp_path / "photo.png", exif=exif)
    photo = Image.open(tmp_path / "photo.png")
    assert torch.equal(sd.encode_images([photo]), sd.encode_images([upright]))
    as_stored = Image.fromarray(np.asarray(photo))  # without the EXIF
    assert not torch.equal(sd.encode_images([photo]), sd.encode_images([as_stored]))


# The contact sheet

def test_each_image_of_a_contact_sheet_lies_under_its_label():
    colours = ["red", "lime", "blue", "yellow", "cyan"]
    red, lime, blue, yellow, cyan = (Image.new("RGB", (64, 64), colour) for colour in colours)
    sheet = sample.contact_sheet([("one label", [red, lime]), (["a", "b", "c"], [blue, yellow,
                                                                                 cyan])], 96)
    side = 128  # twice 64, to be at least 96

    def corner(row, column):
        return 4 + column * (side + 4), row * (side + 26) + 22

    assert sheet.size == (3 * (side + 4) + 4, 2 * (side + 26))
    for (row, column), image in {(0, 0): red, (0, 1): lime, (1, 0): blue, (1, 1): yellow,
                                 (1, 2): cyan}.items():
        x, y = corner(row, column)
        for point in ((x, y), (x + side - 1, y + side - 1)):
            assert sheet.getpixel(point) == image.getpixel((0, 0)), (row, column)
    x, y = corner(0, 2)
    assert sheet.crop((x, y, x + side, y + side)).getextrema() == 3 * ((255, 255),)  # no image

    def labelled(row, column):
        x, y = corner(row, column)
        return sheet.crop((x, y - 20, x + side, y)).convert("L").getextrema()[0] < 128

    assert [labelled(0, column) for column in range(3)] == [True, False, False]
    assert [labelled(1, column) for column in range(3)] == [True, True, True]


# Command line

def test_a_sheet_says_how_it_was_made(folder, tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    run_main(monkeypatch, "a star", "ein Stern ★", "--model", folder, "--num", 2, "--steps", 2,
             "--seed", 4, "--out", sheet)
    assert capsys.readouterr().out.strip() == str(sheet)
    assert Image.open(sheet).width > 2 * 64
    settings = json.loads(Image.open(sheet).text["settings"])
    assert settings["prompts"] == ["a star", "ein Stern ★"]
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (4, 2, 7.5)


@pytest.fixture
def asked(monkeypatch):
    """`generate` draws nothing; its arguments by name, of each call."""
    signature, calls = inspect.signature(sample.generate), []

    def generate(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return [Image.new("RGB", (64, 64))] * (len(calls[-1]["prompts"]) * calls[-1]["num"])

    monkeypatch.setattr(sample, "generate", generate)
    return calls


def test_every_flag_reaches_generate(folder, tmp_path, monkeypatch, asked):
    flags = {"num": 2, "seed": 3, "steps": 5, "guidance": 4.0, "size": 128, "negative": "a heart",
             "batch": 6}
    typed = [word for name, value in flags.items() for word in (f"--{name}", value)]
    run_main(monkeypatch, "a star", "a moon", "--model", folder, *typed, "--out",
             tmp_path / "x.png")
    call, = asked
    assert call["prompts"] == ["a star", "a moon"] and flags.items() <= call.items()


def test_flags_may_come_from_a_file_and_later_ones_win(folder, tmp_path, monkeypatch, asked):
    (tmp_path / "flags").write_text(f'--model={folder} --steps 2\n--seed=7\n"a red moon"\n')
    for order in (["--seed", 5, f"@{tmp_path}/flags"], [f"@{tmp_path}/flags", "--seed", 5]):
        run_main(monkeypatch, "a star", *order, "--out", tmp_path / "x.png")
    assert [(call["prompts"], call["steps"], call["seed"]) for call in asked] == [
        (["a star", "a red moon"], 2, seed) for seed in (7, 5)]


def test_an_interrupted_command_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "a star", "--model", folder, "--out", tmp_path / "x.png")
    assert stopped.value.code == 130 and not (tmp_path / "x.png").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments, says", [
    (["--model", "nowhere"], "can't load nowhere: "),
    (["--steps", "0"], "steps is 0"),
    (["--size", "65"], "size is 65 x 65"),
    (["--num", "0"], "num is 0"),
    (["--batch", "0"], "batch 0"),
    (["--erased", "nothing.safetensors"], "nothing.safetensors"),
    (["--device", "abacus"], "Expected one of cpu"),
    (["--device", "mps"], "mps"),
    (["--dtype", "int3"], "int3"),
    (["--tokenizer", "nowhere"], "nowhere"),
    (["--seed", "-1"], "seed is -1"),
    (["--model", "no" * 500], "can't load nono"),
    (["--out", "image.jpg"], "image.jpg can't be written: choose a new .png name"),
])
def test_wrong_input_gets_one_line(folder, tmp_path, monkeypatch, capsys, arguments, says):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    out = tmp_path / "out.png"
    assert says in fails_in_one_line(monkeypatch, capsys, "a star", "--out", out, *arguments)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_written_over(tmp_path):
    file = tmp_path / "file.txt"
    (tmp_path / "file.txt.part").write_text("half of a longer te")
    sample.write_whole(file, lambda part: part.write_text("whole"))
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["sample", "erase"])
def test_help_does_not_wait_for_transformers(name):
    code = f"import sys, {name}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
