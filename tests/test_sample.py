"""sample.py: loading a folder, images from prompts, erased weights, the command line."""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file
from torch import nn

import ddim
import erase
import sample
from sample import UsageError
from support import commands, hub
from support.commands import difference, pixels

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


# ---- loading


def test_every_tensor_is_the_files(folder):
    sd = sample.load(folder)
    models = {UNET_FILE: sd.unet, VAE_FILE: sd.vae, TEXT_FILE: sd.text_encoder}
    for file, model in models.items():
        stored = load_file(folder / file)
        loaded = model.state_dict()
        assert stored.keys() == loaded.keys(), file
        assert all(torch.equal(stored[name], loaded[name]) for name in stored), file


def test_no_random_weights_are_drawn(folder):
    before = torch.get_rng_state()
    sample.load(folder)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layer, std", [(nn.Linear, (3 * 64) ** -0.5), (nn.Embedding, 1.0)])
def test_layers_made_after_a_load_are_initialised_as_ever(folder, layer, std):
    sample.load(folder)
    assert layer(64, 64).weight.std().item() == pytest.approx(std, rel=0.1)


def test_dtype_is_chosen(folder):
    assert sample.load(folder).dtype == torch.float32
    sd = sample.load(folder, dtype="bfloat16")
    assert sd.dtype == sd.vae.quant_conv.weight.dtype == torch.bfloat16
    assert sd.encode(["star"]).dtype == torch.bfloat16


@pytest.mark.parametrize("part", sample.PARTS)
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    ignore = shutil.ignore_patterns(part)
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=ignore)
    with pytest.raises(UsageError, match=f"can't load {copy}: .*/copy/{part}"):
        sample.load(copy)


def test_a_config_without_an_entry_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vae" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="vae/config.json has no 'in_channels'"):
        sample.load(copy)


def test_a_mistake_in_a_models_code_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(sample.unet, "MidBlock", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        sample.load(folder)


def with_other_tensors(folder, tmp_path, changed, removed=()):
    """Copies the model folder, its U-Net with these tensors changed, added or removed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / UNET_FILE) | changed
    kept = {name: tensor for name, tensor in tensors.items() if name not in removed}
    save_file(kept, copy / UNET_FILE)
    return copy


def test_a_missing_tensor_is_named(folder, tmp_path):
    copy = with_other_tensors(folder, tmp_path, changed={}, removed=["conv_in.bias"])
    with pytest.raises(UsageError, match="1 tensors differ: unet.conv_in.bias: missing"):
        sample.load(copy)


def test_a_tensor_of_another_shape_is_named(folder, tmp_path):
    copy = with_other_tensors(folder, tmp_path, changed={"conv_in.bias": torch.zeros(5)})
    says = r"1 tensors differ: unet.conv_in.bias: \[5\], expected \[32\]"
    with pytest.raises(UsageError, match=says):
        sample.load(copy)


def test_tensors_that_no_part_has_are_left_out_and_named(sd, folder, tmp_path, capsys):
    extra = {f"extra.{i}": torch.zeros(1) for i in range(4)}
    copy = with_other_tensors(folder, tmp_path, changed=extra)
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
    (copy / UNET_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=f"{copy / UNET_FILE} is incomplete, or not safetensors"):
        sample.load(copy)


# ---- what notebooks/tools/convert.py is for


def test_a_file_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    file = tmp_path / "v1 4.ckpt"
    file.write_bytes(b"weights")
    line = commands.refusal(capsys, sample.main, "a star", "--model", file)
    command = f"python -m notebooks.tools.convert '{file}' --out 'v1 4-converted'"
    assert line == f"error: can't load {file}: it is a file, not a folder; convert it: {command}"


@pytest.mark.parametrize("part", sample.PARTS)
def test_a_folder_with_pickles_is_refused_with_that_command(part, folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "old")
    weights, = (copy / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))

    line = commands.refusal(capsys, sample.main, "a star", "--model", copy)
    assert f"{weights} is missing; " in line
    assert line.endswith(f"python -m notebooks.tools.convert {copy} --out old-converted")


def test_erased_weights_in_another_form_are_refused_with_that_command(folder, tmp_path, capsys):
    file = tmp_path / "esd.pt"
    torch.save({"conv_in.bias": torch.zeros(32)}, file)
    line = commands.refusal(
        capsys, sample.main, "a star", "--model", folder, "--erased", file, "--out",
        tmp_path / "x.png",
    )
    assert line.startswith(f"error: {file} is incomplete, or not safetensors")
    command = f"python -m notebooks.tools.convert {file} --erased --out esd-converted.safetensors"
    assert line.endswith(command)


@pytest.mark.robustness
def test_the_weights_of_another_model_are_not_downloaded(folder, tmp_path):
    """The configs come first: what they rule out costs kilobytes."""
    server = hub.Hub(tmp_path / "hub")
    repository = shutil.copytree(folder, server.root / "someone" / "v2")
    (repository / "scheduler").mkdir()
    schedule = {"prediction_type": "v_prediction"}
    (repository / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))

    online = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    try:
        done = subprocess.run(
            [sys.executable, "sample.py", "a star", "--model", "someone/v2"],
            cwd=commands.ROOT,
            env=os.environ | online,
            capture_output=True,
            text=True,
        )
    finally:
        server.shutdown()
        server.server_close()

    assert done.returncode == 2
    assert "prediction_type is v_prediction" in done.stderr.strip().splitlines()[-1]
    served = {name for name, _ in server.served}
    assert {f"{part}/config.json" for part in sample.PARTS} <= served
    assert not [name for name in served if name.endswith(".safetensors")]


# ---- prompts to images


def test_an_image_is_what_two_separate_predictions_give(sd):
    """generate() against the same computation written out: no shared batch, no helper."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    c = sd.encode(["a star"])
    negative = sd.encode(["a heart"])
    abar = ddim.alphas_cumprod()
    with torch.no_grad():
        for t, t_prev in ((667, 334), (334, 1), (1, 0)):
            eps_n = sd.unet(x, t, negative)
            eps_c = sd.unet(x, t, c)
            eps = eps_n + 100 * (eps_c - eps_n)  # the small model hardly reads its prompt
            x_0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
            x = abar[t_prev] ** 0.5 * x_0 + (1 - abar[t_prev]) ** 0.5 * eps
        image = sd.vae.decode(x / 0.18215)

    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().int()[0].permute(1, 2, 0).flatten()
    made = sample.generate(sd, ["a star"], seed=3, steps=3, guidance=100, negative="a heart")
    assert (pixels(made)[0] - expected).abs().max() <= 1


def test_pixels_are_rounded_not_cut(sd):
    def decode(latents):
        return torch.full((1, 3, 8, 8), 2 * 100.6 / 255 - 1)

    grey = SimpleNamespace(config=sd.vae.config, decode=decode)
    image, = replace(sd, vae=grey).decode(torch.zeros(1, 4, 1, 1))
    assert image.getpixel((0, 0)) == (101, 101, 101)


@pytest.mark.parametrize("value, pixel", [(1.5, 255), (-1.5, 0)])
def test_what_is_brighter_than_white_is_white(sd, value, pixel):
    """And not what is left of it in a byte."""
    def decode(latents):
        return torch.full((1, 3, 8, 8), value)

    vae = SimpleNamespace(config=sd.vae.config, decode=decode)
    image, = replace(sd, vae=vae).decode(torch.zeros(1, 4, 1, 1))
    assert image.getpixel((0, 0)) == (pixel,) * 3


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 24)])
def test_noise_is_drawn_as_diffusers_draws_it(shape):
    """In diffusers, one call draws the noise of all images of a prompt, from the seed."""
    together = torch.randn(3, *shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sample.starting_noise(shape, num=3, seed=7), together)
    assert torch.equal(sample.starting_noise(shape, num=1, seed=7), together[:1])


def test_images_do_not_depend_on_the_batch(sd):
    prompts = ["a star", "a heart"]
    large = sample.generate(sd, prompts, num=3, steps=2, batch=8)
    small = sample.generate(sd, prompts, num=3, steps=2, batch=1)
    alone = sample.generate(sd, prompts[1:], num=3, steps=2)
    assert difference(large, small) <= 1
    assert difference(large[3:], alone) <= 1
    assert difference(large[:1], large[1:2]) > 10  # they aren't all the same


def test_prompts_may_have_seeds_of_their_own(sd):
    both = sample.generate(sd, ["a star", "a star"], seed=[5, 6], steps=2)
    alone = sample.generate(sd, ["a star"], seed=6, steps=2)
    assert difference(both[1:], alone) <= 1
    assert difference(both[:1], both[1:]) > 10


@pytest.mark.parametrize("seeds", [[], [5], [5, 6, 7]])
def test_there_is_a_seed_for_each_prompt(sd, seeds):
    with pytest.raises(UsageError, match=f"{len(seeds)} seeds for 2 prompts"):
        sample.generate(sd, ["a star", "a heart"], seed=seeds, steps=1)


def test_no_prompts_are_refused(sd):
    with pytest.raises(UsageError, match="there is no prompt"):
        sample.generate(sd, [], steps=1)


def test_the_same_call_gives_the_same_images(sd):
    first = sample.generate(sd, "a star", steps=2)
    second = sample.generate(sd, "a star", steps=2)
    assert torch.equal(pixels(first), pixels(second))


@pytest.mark.parametrize("size, in_pixels", [
    (None, (64, 64)),
    (128, (128, 128)),
    ((128, 64), (128, 64)),
    ((64, 192), (64, 192)),
])
def test_size_is_in_pixels(sd, size, in_pixels):
    assert sample.image_size(sd, size) == in_pixels
    image, = sample.generate(sd, "a star", steps=1, size=size)
    assert image.size == in_pixels


@pytest.mark.parametrize("size, says", [
    (100, "100 x 100"),
    ((64, 100), "64 x 100"),
    ((100, 64), "100 x 64"),
    (0, "0 x 0"),
    ((64, -64), "64 x -64"),
])
def test_a_size_that_cannot_be_halved_is_refused(sd, size, says):
    with pytest.raises(UsageError, match=f"size is {says}, choose multiples of 64"):
        sample.image_size(sd, size)
    with pytest.raises(UsageError, match=f"size is {says}, "):
        sample.generate(sd, "a star", steps=1, size=size)


def test_a_long_prompt_is_cut_with_a_warning(sd):
    with pytest.warns(UserWarning, match="cut from 102 to 77 tokens"):
        assert sd.encode(["star " * 100]).shape == (1, 77, 32)


def test_an_image_becomes_the_latents_of_the_vae(sd):
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    x_0, = sd.encode_images([image])

    scaled = torch.tensor(list(image.tobytes())).view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    mean, _ = sd.vae.encode(scaled)
    assert torch.allclose(x_0, mean[0] * 0.18215, atol=1e-6)
    assert sd.encode_images([image.resize((640, 320)), image]).shape == (2, 4, 8, 8)


def test_an_image_that_is_not_square_is_cropped_and_not_squashed(sd):
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("lime", (48, 0, 80, 64))
    middle = wide.crop((32, 0, 96, 64))
    assert torch.equal(sd.encode_images([wide]), sd.encode_images([middle]))
    assert not torch.equal(sd.encode_images([wide]), sd.encode_images([wide.resize((64, 64))]))


# ---- another guidance, another sampler, another form of the U-Net


def test_another_sampler_takes_the_place_of_ddim(sd):
    """It is called as ddim.denoise is, and draws its own noise from a seeded generator."""
    calls = []

    def adds_noise(predict, x_t, steps, rng):
        calls.append((len(x_t), steps))
        for t, x_t in ddim.denoise(predict, x_t, steps):
            noise = torch.randn(x_t.shape, generator=rng)
            yield t, x_t + 0.5 * noise

    def draw(**settings):
        return sample.generate(sd, "a star", num=2, steps=3, **settings)

    first = draw(seed=4, denoise=adds_noise)
    assert calls == [(2, 3)]
    assert torch.equal(pixels(first), pixels(draw(seed=4, denoise=adds_noise)))
    assert difference(first, draw(seed=4)) > 10

    alone = draw(seed=4, denoise=adds_noise, batch=1)
    assert difference(first[:1], alone[:1]) > 1  # as documented: its noise depends on the batch


def test_the_generator_of_a_sampler_has_the_first_seed(sd):
    drawn = []

    def draws(predict, x_t, steps, rng):
        drawn.append(torch.randn(3, generator=rng).tolist())
        yield 0, x_t

    sample.generate(sd, ["a star", "a heart"], seed=[6, 7], denoise=draws)
    assert drawn == [torch.randn(3, generator=torch.Generator().manual_seed(6)).tolist()]


def test_another_guidance_is_called_as_guided_predictor_is(sd):
    calls = []

    def twice(unet, text, null, guidance):
        calls.append((unet is sd.unet, text.shape, null.shape, guidance))
        return ddim.guided_predictor(unet, text, null, 2 * guidance)

    found = sample.generate(sd, "a star", num=3, steps=2, guidance=50, predictor=twice, batch=2)
    assert calls == [(True, (2, 77, 32), (2, 77, 32), 50), (True, (1, 77, 32), (1, 77, 32), 50)]
    assert difference(found, sample.generate(sd, "a star", num=3, steps=2, guidance=100)) <= 1


@pytest.mark.robustness  # compiling takes seconds
def test_a_compiled_unet_gives_the_same_image(sd):
    """And is compiled once, not for each step: t is a tensor."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = replace(sd, unet=torch.compile(sd.unet, backend=compiler))
    found = sample.generate(compiled, "a star", steps=4)
    assert difference(found, sample.generate(sd, "a star", steps=4)) <= 1
    assert len(graphs) == 1
    assert sample.unet_tensors(compiled).keys() == sd.unet.state_dict().keys()
    assert sample.fingerprint(compiled) == sample.fingerprint(sd)


# ---- half precision


@pytest.mark.robustness  # seconds, where a CPU has neither
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_latents_are_float32(folder, dtype):
    half = sample.load(folder, dtype=dtype)
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    x_0 = half.encode_images([image])
    assert x_0.dtype == torch.float32

    exact = sample.load(folder).encode_images([image])
    assert (x_0 - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_the_sampler_steps_in_float32(sd, folder, dtype):
    half = sample.load(folder, dtype=dtype)
    dtypes = []

    def denoise(*arguments):
        for t, x_t in ddim.denoise(*arguments):
            dtypes.append(x_t.dtype)
            yield t, x_t

    found = sample.generate(half, "a star", steps=3, denoise=denoise)
    assert dtypes == [torch.float32] * 4
    assert difference(found, sample.generate(sd, "a star", steps=3)) < 60


# ---- what isn't an image


def broken_vae(folder, tmp_path):
    """Copies the model, with a decoder that overflows, as a VAE may in float16."""
    copy = shutil.copytree(folder, tmp_path / "broken")
    bias = torch.tensor([0.0, float("inf"), 0.0])
    save_file(load_file(copy / VAE_FILE) | {"decoder.conv_out.bias": bias}, copy / VAE_FILE)
    return copy


def test_non_finite_pixels_are_no_image(folder, tmp_path, capsys):
    model = broken_vae(folder, tmp_path)
    out = tmp_path / "x.png"
    line = commands.refusal(
        capsys, sample.main, "a star", "a moon", "--model", model, "--steps", 1, "--batch", 1,
        "--out", out,
    )
    assert "the batch from 'a star' on has non-finite pixels: try --dtype float32" in line
    assert not out.exists()


def test_the_first_prompt_of_the_batch_that_broke_is_named(sd):
    decoded = []

    def decode(latents):
        decoded.append(latents)
        value = float("nan") if len(decoded) == 4 else 0.0
        return torch.full((1, 3, 8, 8), value)

    broken = replace(sd, vae=SimpleNamespace(config=sd.vae.config, decode=decode))
    with pytest.raises(UsageError, match="from 'a moon' on"):
        sample.generate(broken, ["a star", "a moon"], num=3, steps=1, batch=1)


@pytest.mark.parametrize("mode, pixel, shown", [
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("LA", (0, 0), (255, 255, 255)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ("I;16", 257 * 100, (100, 100, 100)),
    ("I", 257 * 100, (100, 100, 100)),
    ("L", 7, (7, 7, 7)),
    ("1", 1, (255, 255, 255)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
])
def test_an_image_is_what_a_viewer_shows(mode, pixel, shown):
    converted = sample.to_rgb(Image.new(mode, (4, 4), pixel))
    assert converted.mode == "RGB"
    assert converted.getpixel((1, 1)) == shown


def test_a_transparent_palette_is_put_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0] + [0] * 765)
    image.info["transparency"] = 0
    assert sample.to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


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


# ---- the contact sheet


def test_each_image_of_a_contact_sheet_lies_under_its_label():
    colours = ["red", "lime", "blue", "yellow", "cyan"]
    red, lime, blue, yellow, cyan = (Image.new("RGB", (64, 64), colour) for colour in colours)
    rows = [("one label", [red, lime]), (["a", "b", "c"], [blue, yellow, cyan])]
    sheet = sample.contact_sheet(rows, least=96)
    side = 128  # twice 64, to be at least 96
    assert sheet.size == (3 * (side + 4) + 4, 2 * (side + 26))

    def corner(row, column):
        return 4 + column * (side + 4), row * (side + 26) + 22

    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            x, y = corner(row, column)
            assert sheet.getpixel((x, y)) == image.getpixel((0, 0)), (row, column)
            last = sheet.getpixel((x + side - 1, y + side - 1))
            assert last == image.getpixel((0, 0)), (row, column)
    x, y = corner(0, 2)
    empty = sheet.crop((x, y, x + side, y + side))
    assert empty.getextrema() == 3 * ((255, 255),)

    def labelled(row, column):
        x, y = corner(row, column)
        return sheet.crop((x, y - 20, x + side, y)).convert("L").getextrema()[0] < 128

    assert [labelled(0, column) for column in range(3)] == [True, False, False]
    assert [labelled(1, column) for column in range(3)] == [True, True, True]


# ---- erased weights


def test_weights_are_copied(sd):
    """Also in float32 on the CPU: what is trained on later isn't the model's."""
    name = "conv_in.bias"
    theta = {name: torch.ones(32, requires_grad=True)}
    edited = sample.with_weights(sd, theta)

    with torch.no_grad():
        theta[name] += 1
    assert edited.unet.conv_in.bias.tolist() == [1.0] * 32
    assert not edited.unet.conv_in.bias.requires_grad
    assert not torch.equal(sd.unet.conv_in.bias, edited.unet.conv_in.bias)


def test_edits_add_up(sd):
    first = sample.with_weights(sd, {"conv_in.bias": torch.zeros(32)})
    second = sample.with_weights(first, {"conv_out.bias": torch.zeros(4)})
    assert sd.edited == frozenset()
    assert second.edited == {"conv_in.bias", "conv_out.bias"}
    assert second.unet.conv_in.bias.tolist() == [0.0] * 32


@pytest.mark.parametrize("weights, says", [
    ({"conv_in.weights": torch.zeros(1)}, r"theta has 1 tensors, 1 not the U-Net's: .*conv_in.w"),
    ({"conv_in.bias": torch.zeros(1)}, r"conv_in.bias: \[1\], expected \[32\]"),
    ({}, "theta has 0 tensors"),
])
def test_weights_of_another_model_are_refused(sd, weights, says):
    with pytest.raises(UsageError, match=says):
        sample.with_weights(sd, weights)


def changed(sd):
    """Returns a model that differs from the small one in one tensor, by a twentieth."""
    return sample.with_weights(sd, {"conv_out.weight": 1.05 * sd.unet.conv_out.weight})


@pytest.mark.robustness  # seconds, where a CPU has neither
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_fingerprint_tells_models_apart_and_not_precisions(sd, folder, dtype):
    ours = sample.fingerprint(sd)
    half = sample.fingerprint(sample.load(folder, dtype=dtype))
    assert len(ours) == len(sd.unet.state_dict())
    assert half == pytest.approx(ours, rel=0.01, abs=1e-4)

    other = sample.fingerprint(changed(sd))
    assert other != pytest.approx(ours, rel=0.01, abs=1e-4)
    without = sample.fingerprint(changed(sd), without=["conv_out.weight"])
    assert without == sample.fingerprint(sd, without=["conv_out.weight"])


@pytest.fixture
def erased(sd, tmp_path):
    """A file that erase.py wrote, with one tensor."""
    file = tmp_path / "erased.safetensors"
    erase.save({"conv_in.bias": torch.zeros(32)}, file, settings={}, sd=sd)
    return file


def test_erased_weights_of_another_base_are_loaded_with_a_line(sd, erased, capsys):
    loaded = sample.load_erased(changed(sd), erased)
    assert loaded.unet.conv_in.bias.tolist() == [0.0] * 32
    assert capsys.readouterr().err == f"{erased} was made from a different model\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_erased_weights_know_their_base_in_any_precision(folder, erased, dtype, capsys):
    loaded = sample.load_erased(sample.load(folder, dtype=dtype), erased)
    assert loaded.edited == {"conv_in.bias"}
    assert capsys.readouterr().err == ""


def test_erased_weights_without_a_base_are_loaded_without_a_line(sd, tmp_path, capsys):
    """The official code's files, for example."""
    save_file({"conv_in.bias": torch.zeros(32)}, tmp_path / "official.safetensors")
    sample.load_erased(sd, tmp_path / "official.safetensors")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("settings", ["{", "[]", "3", '{"base": 3}', '{"base": ["x"]}'])
def test_damaged_settings_of_erased_weights_are_no_traceback(settings, sd, tmp_path):
    file = tmp_path / "damaged.safetensors"
    save_file({"conv_in.bias": torch.zeros(32)}, file, {"settings": settings})
    try:
        sample.load_erased(sd, file)
    except UsageError as error:
        assert str(file) in str(error)


def test_erased_weights_that_replace_others_are_loaded_with_a_line(sd, erased, capsys):
    other = sample.with_weights(sd, {"conv_in.bias": torch.ones(32)})
    loaded = sample.load_erased(other, erased)
    assert loaded.unet.conv_in.bias.tolist() == [0.0] * 32
    assert capsys.readouterr().err == f"{erased} replaces 1 already edited weights\n"

    sample.load_erased(loaded, erased)  # the same weights again
    assert capsys.readouterr().err == ""


# ---- errors in one line


def test_one_line_keeps_the_beginning_and_the_end():
    text = "it begins " + 300 * "long " + "and ends"
    line = sample.one_line(ValueError(text))
    assert line.startswith("it begins long ")
    assert line.endswith(" long and ends")
    assert " ... " in line
    assert 450 < len(line) <= 500


def test_one_line_is_one_line():
    assert sample.one_line(ValueError("two\n  lines")) == "two lines"
    assert sample.one_line(UsageError("x" * 500)) == "x" * 500
    assert sample.one_line(KeyError("beta")) == "KeyError: 'beta'"


def fails_with(error):
    """Runs a command that raises this error."""
    def run(args):
        raise error

    sample.fail_in_one_line(run, argparse.ArgumentParser())


BAD_INPUT = {
    "usage": UsageError("choose\nanother"),
    "file": FileNotFoundError(2, "No such file or directory", "x.png"),
    "a huge image": Image.DecompressionBombError("exceeds limit of 178956970 pixels"),
    "python's memory": MemoryError("1 TB"),
    "an accelerator's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "torch's memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_ends_a_command_with_one_line(kind, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as stopped:
        fails_with(BAD_INPUT[kind])
    assert stopped.value.code == 2

    line, = capsys.readouterr().err.splitlines()
    assert line == f"error: {sample.one_line(BAD_INPUT[kind])}"


@pytest.mark.parametrize("mistake", [
    ValueError("expected 4 values to unpack"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    KeyError("beta"),
    TypeError("unsupported operand"),
])
def test_a_mistake_in_code_keeps_its_traceback(mistake, capsys, monkeypatch):
    """A loss of one's own, for example: without the traceback there is no telling where."""
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(type(mistake)) as raised:
        fails_with(mistake)
    assert raised.value is mistake
    assert capsys.readouterr().err == ""


# ---- the command line


def test_a_sheet_says_how_it_was_made(folder, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    commands.run(
        sample.main, "a star", "ein Stern ★", "--model", folder, "--num", 2, "--steps", 2,
        "--seed", 4, "--out", sheet,
    )
    assert capsys.readouterr().out.strip() == str(sheet)

    image = Image.open(sheet)
    assert image.width > 2 * 64
    settings = json.loads(image.text["settings"])
    assert settings["prompts"] == ["a star", "ein Stern ★"]
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (4, 2, 7.5)


@pytest.fixture
def calls(monkeypatch):
    """`generate` draws nothing; the arguments of each call, by name."""
    signature = inspect.signature(sample.generate)
    calls = []

    def generate(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append(arguments)
        return [Image.new("RGB", (64, 64))] * (len(arguments["prompts"]) * arguments["num"])

    monkeypatch.setattr(sample, "generate", generate)
    return calls


def test_a_sheet_has_a_row_for_each_prompt(folder, tmp_path, monkeypatch):
    colours = {"a star": "red", "a moon": "blue"}

    def generate(sd, prompts, num, **settings):
        return [Image.new("RGB", (64, 64), colours[each]) for each in prompts for _ in range(num)]

    monkeypatch.setattr(sample, "generate", generate)
    sheet = tmp_path / "sheet.png"
    commands.run(sample.main, *colours, "--model", folder, "--num", 2, "--out", sheet)
    rows = [(label, [Image.new("RGB", (64, 64), colours[label])] * 2) for label in colours]
    expected = sample.contact_sheet(rows)
    assert Image.open(sheet).convert("RGB").tobytes() == expected.convert("RGB").tobytes()


@pytest.fixture
def loaded(sd, monkeypatch):
    """The command gets the small model at once, whatever --model says."""
    monkeypatch.setattr(sample, "load", lambda *_: sd)


def test_every_flag_reaches_generate(loaded, tmp_path, calls):
    flags = {
        "num": 2,
        "seed": 3,
        "steps": 5,
        "guidance": 4.0,
        "size": 128,
        "negative": "a heart",
        "batch": 6,
    }
    typed = [word for name, value in flags.items() for word in (f"--{name}", value)]
    out = tmp_path / "x.png"
    commands.run(sample.main, "a star", "a moon", *typed, "--out", out)

    call, = calls
    assert call["prompts"] == ["a star", "a moon"]
    assert flags.items() <= call.items()


def test_flags_may_come_from_a_file_and_later_ones_win(loaded, tmp_path, calls):
    flags = tmp_path / "flags"
    flags.write_text("--model=small --steps 2\n--seed=7\n")
    out = tmp_path / "x.png"
    commands.run(sample.main, "a star", "--seed", 5, f"@{flags}", "--out", out)
    commands.run(sample.main, "a star", f"@{flags}", "--seed", 5, "--out", out)

    first, second = calls
    assert (first["seed"], second["seed"]) == (7, 5)
    for call in calls:
        assert call["steps"] == 2


def test_paths_in_a_flags_file_are_relative_to_it(folder, tmp_path, monkeypatch, calls):
    shutil.copytree(folder, tmp_path / "models" / "small")
    (tmp_path / "models" / "flags").write_text("--model=./small\n--steps=2\n")
    monkeypatch.chdir(tmp_path)
    commands.run(sample.main, "a star", "@models/flags", "--out", tmp_path / "x.png")
    (tmp_path / "models" / "small" / "flags").write_text("--model=./ --steps=3 --negative=\n")
    commands.run(sample.main, "a star", "@models/small/flags", "--out", tmp_path / "x.png")
    assert [call["steps"] for call in calls] == [2, 3]
    assert [call["negative"] for call in calls] == ["", ""]


@pytest.mark.parametrize("words, says", [
    ("star --negative bad anatomy", "no use for anatomy: see --help; quote each prompt"),
    ("star --seed 1 a star --num 2", "no use for a star: see --help; quote each prompt"),
    ("star --sed 1", "no use for --sed 1: see --help; quote each prompt"),
    ("--seed 1 star", "put prompts before options, not after --seed"),
])
def test_words_after_an_option_show_the_quotes_that_are_missing(words, says, capsys):
    assert commands.refusal(capsys, sample.main, *words.split()).startswith(f"error: {says}")


def test_several_erased_files_apply_in_order(sd, loaded, tmp_path, calls, capsys):
    """In both forms of the flag. Of the same weights, the last file's count, and a line says so."""
    files = []
    for i, name in enumerate(["conv_in.bias", "conv_in.bias", "conv_out.bias"]):
        weights = {name: torch.full_like(sd.unet.get_parameter(name), i + 1.0)}
        files.append(tmp_path / f"{i}.safetensors")
        save_file(weights, files[-1])

    command = ["a star", "--out", tmp_path / "x.png"]
    commands.run(sample.main, *command, "--erased", *files)
    assert capsys.readouterr().err == f"{files[1]} replaces 1 already edited weights\n"
    commands.run(sample.main, *command, "--erased", files[0], "--erased", files[2])
    assert capsys.readouterr().err == ""
    found = [(model.unet.conv_in.bias.mean().item(), model.unet.conv_out.bias.mean().item())
             for model in (call["sd"] for call in calls)]
    assert found == [(2.0, 3.0), (1.0, 3.0)]


@pytest.mark.parametrize("part, changed, kind", [
    ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
    ("unet/config.json", {"use_linear_projection": True}, "Stable Diffusion 2"),
    ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
])
def test_another_kind_of_model_is_named(part, changed, kind, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / part).write_text(json.dumps(json.loads((copy / part).read_text()) | changed))
    with pytest.raises(UsageError, match=f"this is {kind}, not Stable Diffusion v1"):
        sample.load(copy)


def test_dtypes_and_devices_are_understood_or_refused_with_the_choices(folder):
    for dtype in ("half16", "fp16", "float64"):
        with pytest.raises(UsageError, match=f"dtype is {dtype}, choose float32, bfloat16 or"):
            sample.load(folder, dtype=dtype)
    assert sample.choose_device("0", "float16") == ("cuda:0", torch.float16)


def test_a_path_that_does_not_exist_says_so_before_what_the_hub_says():
    with pytest.raises(UsageError, match="models/v1.ckpt: no such folder here; on the hub: "):
        sample.load("models/v1.ckpt")


def test_a_long_prompt_gives_one_warning(sd, capfd):
    """transformers' own, about indexing errors, is a false alarm here."""
    with pytest.warns(UserWarning) as warned:
        sd.encode(["star " * 100])
    assert len(warned) == 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize("label, shown", [
    ("René Magritte", "Rene Magritte"), ("Straße", "Stra?e"),
    ("Nafea\nFaa  Ipoipo", "Nafea Faa Ipoipo"), ("Звезда ★", "?????? ?"),
])
def test_labels_are_ascii_on_one_line(label, shown):
    assert sample.printable(label) == shown


def test_a_long_label_ends_in_dots_within_its_width():
    font = ImageFont.load_default(14)
    short = sample.shortened("a star " * 50, 128, font)
    assert short.endswith("...") and 100 < font.getlength(short) <= 128
    assert sample.shortened("a star", 128, font) == "a star"


def test_an_interrupted_command_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        commands.run(sample.main, "a star", "--model", folder, "--out", tmp_path / "x.png")
    assert stopped.value.code == 130
    assert not (tmp_path / "x.png").exists()
    assert capsys.readouterr().err == "interrupted\n"


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
    (["--seed", "-1"], "seed is -1"),
    (["--model", "no" * 500], "can't load nono"),
    (["--out", "image.jpg"], "image.jpg isn't the name of a .png file: choose another --out"),
])
def test_wrong_input_gets_one_line(folder, tmp_path, capsys, arguments, says):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    out = tmp_path / "out.png"
    assert says in commands.refusal(capsys, sample.main, "a star", "--out", out, *arguments)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_written_over(tmp_path):
    file = tmp_path / "file.txt"
    (tmp_path / "file.txt.part").write_text("half of a longer te")
    sample.write_whole(file, lambda part: part.write_text("whole"))
    assert file.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["sample", "erase"])
def test_help_does_not_wait_for_transformers(name):
    code = f"import sys, {name}; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
