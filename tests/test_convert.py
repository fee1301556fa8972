"""notebooks/tools/convert.py and compvis.py: every published form becomes the one layout, or is
refused in one line. No name in a pickle is looked up, and nothing in it runs.
"""

import json
import os
import pickletools
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from notebooks.tools import compvis, convert, export
from support import commands, formats, hub
from support.formats import equal, same_tensors

pytestmark = pytest.mark.robustness

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
UNET_PREFIX = formats.PREFIX["unet"]


@pytest.fixture(scope="session")
def configs(folder):
    """The sizes of the small model, which a single file doesn't tell."""
    return sample.read_configs(folder)


@pytest.fixture
def converted(folder, configs, tmp_path):
    """Converts a source of the small size, and loads what was written."""

    def convert_and_load(source, dtype="float32", **options):
        out = tmp_path / "converted"
        shutil.rmtree(out, ignore_errors=True)
        if Path(source).is_file():
            options.setdefault("tokenizer", str(folder / "tokenizer"))
            options["configs"] = configs
        convert.convert_model(source, out, **options)
        return sample.load(out, dtype=dtype)

    return convert_and_load


@pytest.fixture
def converted_erased(configs, tmp_path):
    """Converts erased weights of the small size, and returns the tensors written."""

    def convert_and_load(source):
        out = tmp_path / "converted.safetensors"
        convert.convert_erased(source, out, configs["unet"])
        return load_file(out)

    return convert_and_load


@pytest.fixture
def checkpoint(folder, sd, tmp_path, monkeypatch):
    """A .ckpt as published, with tokenizer/ next to it."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    return formats.write_ckpt(formats.compvis_weights(sd), tmp_path / "v1.ckpt", monkeypatch)


def refusal(function, *arguments, **options):
    """The one line of the error that a call must end in."""
    with pytest.raises(sample.UsageError) as refused:
        function(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- names


@pytest.mark.parametrize("part", sample.PARTS)
def test_names_are_those_of_the_published_checkpoint(part):
    config = convert.SD_V1[part]
    names = compvis.theirs_to_ours(part, config)
    assert names == formats.COMPVIS[part]

    with torch.device("meta"):
        tensors = sample.PARTS[part].model(config).state_dict()
    assert sorted(names.values()) == sorted(tensors)  # one to one, and complete
    assert compvis.to_ours(part, tensors, config).keys() == tensors.keys()  # and ours stay


@pytest.mark.parametrize("part", sample.PARTS)
def test_both_ways_change_no_tensor(part, sd):
    model = getattr(sd, part)
    theirs = compvis.to_theirs(part, model)
    expected = formats.compvis_part(part, model.state_dict(), formats.PREFIX[part])
    assert same_tensors(theirs, expected)

    bare = convert.with_prefix(theirs, compvis.PREFIXES[part])
    assert same_tensors(compvis.to_ours(part, bare, model.config), model.state_dict())


# ---- folders


@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
@pytest.mark.parametrize("old", [False, True])
def test_folders(suffix, old, folder, converted, tmp_path):
    dtype = torch.float16 if "fp16" in suffix else torch.float32
    copy = formats.write_folder(folder, tmp_path / "copy", suffix, dtype, old)
    name = "float16" if "fp16" in suffix else "float32"
    assert equal(converted(copy, dtype=name), sample.load(folder, dtype=name))

    for part, described in sample.PARTS.items():
        stored = load_file(tmp_path / "converted" / part / described.files[0])
        assert {tensor.dtype for tensor in stored.values()} == {dtype}


def test_of_several_files_the_most_precise_is_taken(folder, converted, tmp_path, sd):
    copy = formats.write_folder(folder, tmp_path / "copy", ".fp16.bin", torch.float16, old=False)
    formats.write_folder(folder, tmp_path / "whole", ".bin", torch.float32, old=False)
    shutil.copytree(tmp_path / "whole", copy, dirs_exist_ok=True)
    assert equal(converted(copy), sd)

    for part in sample.PARTS:
        whole, = (folder / part).glob("*.safetensors")
        shutil.copy(whole, copy / part)
        (copy / part / f"{formats.PICKLED[part]}.bin").write_bytes(b"not even a pickle")
    assert equal(converted(copy), sd)


def test_a_folder_keeps_its_tokenizer(sd, folder, converted):
    prompts = ["a red star in the style of mosaic", "ein Stern ★"]
    assert converted(folder).tokenizer(prompts).input_ids == sd.tokenizer(prompts).input_ids


def test_a_folder_without_a_part(folder, converted, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / UNET_FILE).unlink()
    text = f"can't convert {copy}: {UNET_FILE} is missing, in every form"
    assert refusal(converted, copy) == text

    shutil.rmtree(copy / "vae")
    text = f"can't convert {copy}: it has no vae/config.json; look for the whole model"
    assert refusal(converted, copy) == text


def test_a_folder_has_no_average(folder, configs, converted):
    text = f"can't convert {folder}: a folder has one U-Net, and its sizes: no --ema, no --model"
    assert refusal(converted, folder, ema=True) == text
    assert refusal(converted, folder, configs=configs) == text


def test_a_git_lfs_pointer_is_named(folder, converted, converted_erased, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    pointer = copy / UNET_FILE
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for function, source in ((converted, copy), (converted_erased, pointer)):
        assert "git-lfs pointer, run `git lfs pull`" in refusal(function, source)


def test_a_folder_of_another_schedule(folder, converted, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scheduler").mkdir()
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert "prediction_type is v_prediction, not epsilon" in refusal(converted, copy)


# ---- single files


def test_single_safetensors(sd, converted, tmp_path):
    save_file(formats.compvis_weights(sd), tmp_path / "v1.safetensors")
    assert equal(converted(tmp_path / "v1.safetensors"), sd)


def test_ckpt(sd, checkpoint, converted, capsys):
    assert equal(converted(checkpoint), sd)
    left_out = "model_ema.decay, model_ema.num_updates"  # but the schedule isn't named
    assert capsys.readouterr().err == f"{checkpoint}: left out 2 tensors: {left_out}\n"


def test_a_half_precision_file_stays_one(sd, converted, tmp_path):
    halved = {name: tensor.half() for name, tensor in formats.compvis_weights(sd).items()}
    save_file(halved, tmp_path / "v1.safetensors")
    loaded = converted(tmp_path / "v1.safetensors", dtype="float16")
    for part, weights in formats.part_weights(sd).items():
        stored = load_file(tmp_path / "converted" / part / sample.PARTS[part].files[0])
        assert same_tensors(stored, {name: weights[name].half() for name in weights})
        assert same_tensors(stored, formats.part_weights(loaded)[part])


def test_ckpt_names_nine_globals(checkpoint):
    """So the file that the test above converts is like the published ones."""
    with zipfile.ZipFile(checkpoint) as opened:
        pickled = opened.read("v1/data.pkl")
    found = {arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
    assert {
        "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
        "numpy.core.multiarray scalar",
        "numpy dtype",
        "_codecs encode",
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
    } <= found


def test_ckpt_of_the_old_container(sd, converted, tmp_path, monkeypatch):
    weights = formats.compvis_weights(sd)
    old = formats.write_ckpt(weights, tmp_path / "old.ckpt", monkeypatch, zipped=False)
    assert not zipfile.is_zipfile(old)
    assert equal(converted(old), sd)


def test_what_a_file_is_is_told_by_its_content(sd, converted, tmp_path):
    save_file(formats.compvis_weights(sd), tmp_path / "v1.ckpt")
    assert equal(converted(tmp_path / "v1.ckpt"), sd)


def prefixed(prefix, weights):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def under(key, weights):
    return {key: weights, "step": 7}


WRAPPERS = [
    partial(prefixed, "module."),
    partial(prefixed, "_orig_mod."),
    partial(prefixed, "_orig_mod.module."),
    partial(under, "model"),
    partial(under, "model_state_dict"),
    partial(under, "state_dict"),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: f"{wrap.func.__name__} {wrap.args[0]}")
def test_wrapped_checkpoints(wrap, sd, converted, tmp_path):
    torch.save(wrap(formats.compvis_weights(sd)), tmp_path / "v1.pt")
    assert equal(converted(tmp_path / "v1.pt"), sd)


def test_the_averaged_unet_is_taken_on_request(sd, converted, tmp_path, monkeypatch, capsys):
    """The other U-Net in this file is all zeros."""
    weights = formats.compvis_weights(sd, ema=True)
    file = formats.write_ckpt(weights, tmp_path / "full.ckpt", monkeypatch)
    assert equal(converted(file, ema=True), sd)
    assert "left out 2 tensors" in capsys.readouterr().err

    last = converted(file)
    assert equal(replace(last, unet=sd.unet), sd)
    assert not any(tensor.any() for tensor in last.unet.state_dict().values())
    assert f"left out {2 + len(sd.unet.state_dict())} tensors" in capsys.readouterr().err


def test_an_average_with_a_gap_is_refused(sd, converted, tmp_path):
    tensors = formats.compvis_weights(sd, ema=True)
    del tensors["model_ema.diffusion_modeltime_embed0weight"]
    save_file(tensors, tmp_path / "full")
    text = refusal(converted, tmp_path / "full", ema=True)
    assert "--ema needs model_ema.diffusion_modeltime_embed0weight, which is missing" in text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_tensors_of_a_ckpt_are_mapped_not_read(checkpoint):
    before = checkpoint.name in Path("/proc/self/maps").read_text()
    tensors, _ = convert.read_file(checkpoint)
    assert tensors and not before
    assert checkpoint.name in Path("/proc/self/maps").read_text()


def test_a_file_that_says_it_predicts_v_is_refused(sd, converted, tmp_path):
    """In its metadata, or in the .yaml of the same name."""
    file = tmp_path / "v.safetensors"
    weights = formats.compvis_weights(sd)
    save_file(weights, file, {"modelspec.prediction_type": "epsilon"})
    assert equal(converted(file), sd)
    save_file(weights, file, {"modelspec.prediction_type": "v"})
    assert "prediction_type is v, not epsilon" in refusal(converted, file)

    save_file(weights, file)
    yaml = file.with_suffix(".yaml")
    yaml.write_text("model:\n  params:\n    parameterization: eps\n    linear_start: 0.00085\n")
    assert equal(converted(file), sd)
    for value in ('"v"', "v"):
        yaml.write_text(f"model:\n  params:\n    parameterization: {value}\n")
        assert "prediction_type is v, not epsilon" in refusal(converted, file)


def renamed(ours, theirs, weights):
    return {name.replace(ours, theirs): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("ours, theirs, kind", [
    ("cond_stage_model.transformer.", "cond_stage_model.model.", "Stable Diffusion 2"),
    ("cond_stage_model.", "conditioner.embedders.0.", "SDXL"),
])
def test_single_files_of_relatives(ours, theirs, kind, sd, converted, tmp_path):
    save_file(renamed(ours, theirs, formats.compvis_weights(sd)), tmp_path / "other")
    text = refusal(converted, tmp_path / "other")
    assert text == f"can't convert {tmp_path}/other: this is {kind}, not Stable Diffusion v1"
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("without, says", [
    (["vae"], "it holds a U-Net and a text encoder, but no VAE; add --vae FILE"),
    (
        ["text_encoder"],
        "it holds a U-Net and a VAE, but no text encoder; look for the whole checkpoint",
    ),
    (
        ["unet", "vae"],
        "it holds a text encoder, but no U-Net, no VAE; look for the whole checkpoint",
    ),
])
def test_a_checkpoint_without_a_part(without, says, sd, converted, tmp_path):
    file = tmp_path / "part.safetensors"
    prefixes = tuple(formats.PREFIX[part] for part in without)
    weights = formats.compvis_weights(sd)
    save_file({name: weights[name] for name in weights if not name.startswith(prefixes)}, file)
    assert refusal(converted, file) == f"can't convert {file}: {says}"


def test_a_checkpoint_without_a_vae_is_converted_with_one(sd, converted, tmp_path):
    weights = formats.compvis_weights(sd)
    no_vae = {name: weights[name] for name in weights if not name.startswith("first_stage")}
    save_file(no_vae, tmp_path / "no-vae")
    save_file(sd.vae.state_dict(), tmp_path / "vae")
    assert equal(converted(tmp_path / "no-vae", vae_file=tmp_path / "vae"), sd)


def test_a_lora_is_no_checkpoint(converted, tmp_path):
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(1)}, tmp_path / "lora")
    text = "it holds 1 tensors: lora_unet_down.lora_up.weight, but no U-Net, no VAE, no text"
    assert text in refusal(converted, tmp_path / "lora")


def test_a_file_with_leftovers(sd, converted, tmp_path, capsys):
    """ControlNet's weights, for instance."""
    extra = {"control_model.x.weight": torch.zeros(1)}
    save_file(formats.compvis_weights(sd) | extra, tmp_path / "other")
    assert equal(converted(tmp_path / "other"), sd)
    line, = capsys.readouterr().err.strip().splitlines()
    assert "left out 3 tensors" in line and "control_model.x.weight" in line


def test_leftovers_replace_nothing(sd, converted, tmp_path, capsys):
    extra = {"unet.conv_in.bias": torch.ones(32)}
    save_file(formats.compvis_weights(sd) | extra, tmp_path / "other")
    assert equal(converted(tmp_path / "other"), sd)


def test_an_inpainting_file(sd, converted, tmp_path):
    tensors = formats.compvis_weights(sd)
    tensors[f"{UNET_PREFIX}input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting")
    text = "1 tensors differ: unet.conv_in.weight: [32, 9, 3, 3], expected [32, 4, 3, 3]"
    assert text in refusal(converted, tmp_path / "inpainting")


@pytest.mark.parametrize("form", [
    dict, formats.compvis_unet, formats.cross_attention, formats.nested
])
def test_erased_weights_without_erased(form, sd, converted, tmp_path):
    """What people have is an erased U-Net, or a part of one, in any of its forms."""
    weights = form(sd.unet.state_dict())
    torch.save(weights, tmp_path / "erased.pt")
    tensors, _ = convert.read_file(tmp_path / "erased.pt")
    assert refusal(converted, tmp_path / "erased.pt") == (
        f"can't convert {tmp_path}/erased.pt: it holds {len(tensors)} tensors of a U-Net, and "
        "nothing else of a model; if they are erased weights, add --erased and end --out in "
        ".safetensors"
    )


# ---- --vae and --tokenizer


@pytest.fixture(scope="module")
def other_vae(sd):
    """Every tensor of the VAE, changed."""
    return {name: tensor + 1 for name, tensor in sd.vae.state_dict().items()}


def as_it_is(weights):
    return weights


def in_compvis_names(weights):
    return {"state_dict": formats.compvis_part("vae", weights, "")}


def in_a_checkpoint(weights):
    unet = {f"{UNET_PREFIX}input_blocks.0.0.bias": torch.zeros(1)}
    return unet | formats.compvis_part("vae", weights, formats.PREFIX["vae"])


@pytest.mark.parametrize("form", [
    as_it_is, formats.vae_of_2022, in_compvis_names, in_a_checkpoint
])
@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_another_vae(source, form, sd, other_vae, converted, tmp_path, request):
    torch.save(form(other_vae), tmp_path / "vae.pt")
    loaded = converted(request.getfixturevalue(source), vae_file=tmp_path / "vae.pt")
    assert same_tensors(loaded.vae.state_dict(), other_vae)
    assert equal(replace(loaded, vae=sd.vae), sd)


def test_a_vae_of_another_size_is_named(other_vae, folder, converted, tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(other_vae | {"decoder.conv_out.bias": torch.zeros(5)}, file)
    text = refusal(converted, folder, vae_file=file)
    assert f"it, with {file}, doesn't fit" in text
    assert "1 tensors differ: vae.decoder.conv_out.bias: [5], expected [3]" in text
    file.unlink()
    assert f"{file} isn't a file" in refusal(converted, folder, vae_file=file)


def test_a_tokenizer_is_looked_for_next_to_a_file(sd, checkpoint, configs, tmp_path):
    """A folder `tokenizer`, or its files themselves."""
    convert.convert_model(checkpoint, tmp_path / "1", configs=configs)
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "tokenizer").rmdir()
    convert.convert_model(checkpoint, tmp_path / "2", configs=configs)
    for name in ("1", "2"):
        loaded = sample.load(tmp_path / name)
        assert loaded.tokenizer.get_vocab() == sd.tokenizer.get_vocab()


def test_no_tokenizer(folder, checkpoint, configs, tmp_path):
    """It may be CLIP's, which isn't on this machine: there, transformers makes up an empty one."""
    ignored = shutil.ignore_patterns("tokenizer")
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=ignored)
    shutil.rmtree(tmp_path / "tokenizer")
    for source, options in ((copy, {}), (checkpoint, {"configs": configs})):
        text = refusal(convert.convert_model, source, tmp_path / "out", **options)
        assert text.startswith(f"can't convert {source}: ")
        assert text.endswith(f"choose another --tokenizer than {convert.CLIP}")


def test_a_tokenizer_of_another_model(folder, sd, converted, tmp_path):
    other = shutil.copytree(folder / "tokenizer", tmp_path / "other")
    vocabulary = sd.tokenizer.get_vocab() | {"zebra</w>": len(sd.tokenizer)}
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    text = refusal(converted, folder, tokenizer=str(other))
    assert "each pair should be equal: [(822, 821)" in text
    assert text.endswith(f"choose another --tokenizer than {other}")


def test_a_vocabulary_that_gives_an_id_twice(folder, sd, converted, tmp_path):
    other = shutil.copytree(folder / "tokenizer", tmp_path / "other")
    vocabulary = sd.tokenizer.get_vocab()
    vocabulary["8"] = vocabulary["7"]  # a flipped bit
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    text = refusal(converted, folder, tokenizer=str(other))
    assert "each pair should be equal: [(820, 821)" in text


# ---- erased weights


@pytest.fixture(scope="module")
def whole_unet(sd):
    """Every tensor of the U-Net, changed."""
    return {name: tensor + 1 for name, tensor in sd.unet.state_dict().items()}


def nested_part(weights):
    return formats.nested(formats.cross_attention(weights))


@pytest.mark.parametrize("form, save", [
    (as_it_is, torch.save),  # diffusers-VanGogh-ESDx1-UNET.pt
    (formats.compvis_unet, torch.save),  # compvis-word_VanGogh-...pt
    (formats.cross_attention, save_file),  # esd-Van Gogh-from-Van Gogh-esdx.safetensors
    (formats.nested, torch.save),  # of the demo
    (nested_part, torch.save),
])
def test_every_published_form_of_erased_weights(
    form, save, sd, whole_unet, converted_erased, tmp_path
):
    save(form(whole_unet), tmp_path / "erased")
    is_partial = form in (formats.cross_attention, nested_part)
    expected = formats.cross_attention(whole_unet) if is_partial else whole_unet
    assert same_tensors(converted_erased(tmp_path / "erased"), expected)

    loaded = sample.load_erased(sd, tmp_path / "converted.safetensors").unet.state_dict()
    assert same_tensors(loaded, sd.unet.state_dict() | expected)


PREFIXES = [partial(prefixed, "unet."), partial(prefixed, "diffusion_model.")]


@pytest.mark.parametrize(
    "wrap", WRAPPERS + PREFIXES, ids=lambda wrap: f"{wrap.func.__name__} {wrap.args[0]}"
)
def test_wrapped_erased_weights(wrap, whole_unet, converted_erased, tmp_path):
    weights = formats.cross_attention(whole_unet)
    torch.save(wrap(weights), tmp_path / "erased.pt")
    assert same_tensors(converted_erased(tmp_path / "erased.pt"), weights)
    torch.save(wrap(formats.compvis_part("unet", weights | whole_unet, "")), tmp_path / "erased.pt")
    assert same_tensors(converted_erased(tmp_path / "erased.pt"), whole_unet)


def test_erased_weights_in_a_whole_checkpoint(sd, whole_unet, converted_erased, tmp_path):
    """As the 2023 code saves it: 1143 tensors in CompVis's format, no state_dict around them."""
    tensors = formats.compvis_weights(sd) | formats.compvis_unet(whole_unet)
    torch.save(tensors, tmp_path / "compvis.pt")
    assert same_tensors(converted_erased(tmp_path / "compvis.pt"), whole_unet)


def test_erased_weights_keep_dtype_and_metadata(whole_unet, converted_erased, tmp_path):
    weights = {name: t.bfloat16() for name, t in formats.cross_attention(whole_unet).items()}
    metadata = {"settings": '{"eta": 1.0}', "tensors": "a name like an argument's"}
    save_file(weights, tmp_path / "half", metadata)
    assert same_tensors(converted_erased(tmp_path / "half"), weights)
    with safe_open(tmp_path / "converted.safetensors", "pt") as opened:
        assert opened.metadata() == metadata


@pytest.mark.parametrize("tensors, says", [
    (
        {"text_model.encoder.weight": torch.zeros(1)},
        "it has 1 tensors, 1 not the U-Net's: ['text_model.encoder.weight']",
    ),
    ({"conv_in.bias": torch.zeros(5)}, "1 tensors differ: conv_in.bias: [5], expected [32]"),
    ({}, "it has 0 tensors, 0 not the U-Net's"),
])
def test_erased_weights_of_another_model_are_refused(tensors, says, converted_erased, tmp_path):
    torch.save(tensors, tmp_path / "other.pt")
    text = refusal(converted_erased, tmp_path / "other.pt")
    assert text.startswith(f"can't convert {tmp_path}/other.pt: ") and says in text
    assert not (tmp_path / "converted.safetensors").exists()


def test_erased_weights_are_of_the_full_size_unless_a_model_is_given(tmp_path):
    out = tmp_path / "out.safetensors"
    torch.save({"conv_in.bias": torch.zeros(32)}, tmp_path / "small.pt")
    text = refusal(convert.convert_erased, tmp_path / "small.pt", out)
    assert "conv_in.bias: [32], expected [320]" in text and not out.exists()
    torch.save({"conv_in.bias": torch.ones(320)}, tmp_path / "whole.pt")
    convert.convert_erased(tmp_path / "whole.pt", out)
    assert load_file(out)["conv_in.bias"].tolist() == [1.0] * 320


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_part_is_no_erased_unet(part, sd, converted_erased, tmp_path):
    weights = getattr(sd, part).state_dict()
    save_file(weights, tmp_path / "other")
    assert "not the U-Net's: ['" in refusal(converted_erased, tmp_path / "other")


# ---- pickles that aren't what they seem


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(kind, mark):
    """Something that would create the file `mark`."""
    command = f"touch {mark}"
    if kind == "os.system":
        return Evil(os.system, command)
    if kind == "eval":
        return Evil(eval, f"__import__('os').system('{command}')")
    if kind == "getattr":
        return Evil(getattr, Evil(__import__, "os"), "system")
    if kind == "np.load":
        return Evil(np.load, str(mark))
    rebuild = torch._utils._rebuild_tensor_v2
    return Evil(rebuild, Evil(os.system, command), 0, (1,), (1,), False, None)


@pytest.mark.parametrize("kind, name", [
    ("os.system", "posix.system"),
    ("eval", "eval"),
    ("getattr", "getattr"),
    ("np.load", "numpy"),
    ("an argument of an allowed function", "posix.system"),
])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_runs(kind, name, zipped, sd, converted, converted_erased, tmp_path):
    file = tmp_path / "evil.ckpt"
    mark = tmp_path / "ran"
    content = {"state_dict": formats.compvis_weights(sd), "callbacks": evil(kind, mark)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for function in (convert.read_file, converted, converted_erased):
        text = refusal(function, file)
        _, refused = text.split("nothing in it ran: GLOBAL ")
        assert name in refused and "look for a .safetensors" in refused
        assert not mark.exists()


def test_an_allowed_function_with_wrong_arguments_is_refused(tmp_path):
    torch.save(Evil(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6), tmp_path / "evil.pt")
    assert "evil.pt can't be used" in refusal(convert.read_file, tmp_path / "evil.pt")


def test_a_pickle_that_contains_itself_is_refused(tmp_path):
    content = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "evil.pt")
    assert "evil.pt can't be used" in refusal(convert.read_file, tmp_path / "evil.pt")


def test_an_inert_class_keeps_nothing(tmp_path, monkeypatch):
    module = "pytorch_lightning.callbacks.model_checkpoint"
    thing = formats.stand_in(monkeypatch, module, "ModelCheckpoint")()
    thing.secret = 7
    torch.save({"a": torch.ones(1), "b": thing}, tmp_path / "inert.pt")
    tensors, _ = convert.read_file(tmp_path / "inert.pt")
    assert [*tensors] == ["a"]
    read = convert.unpickle(tmp_path / "inert.pt")["b"]
    assert type(read) is convert.Inert and not vars(read)


def test_both_spellings_of_numpys_scalar_are_taken(tmp_path):
    """NumPy 2 writes numpy._core, NumPy 1 numpy.core."""
    content = {"a": torch.ones(1), "b": np.float64(7)}
    torch.save(content, tmp_path / "2.pt")
    assert b"numpy._core.multiarray" in (tmp_path / "2.pt").read_bytes()
    torch.save(content, tmp_path / "1.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "1.pt").read_bytes()
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "1.pt").write_bytes(data)
    for name in ("1.pt", "2.pt"):
        tensors, _ = convert.read_file(tmp_path / name)
        assert [*tensors] == ["a"]


def test_a_refused_pickle_says_what_to_look_for(tmp_path):
    torch.save({"a": torch.ones(1), "b": Path("x")}, tmp_path / "path.pt")
    text = refusal(convert.read_file, tmp_path / "path.pt")
    assert "nothing in it ran: GLOBAL pathlib" in text
    assert text.endswith(", look for a .safetensors of it")


# ---- damaged files


@pytest.mark.parametrize("content", [
    b"",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html>",
    b"PK\x03\x04 and no more",
    b"\xff\x00\x00\x00\x00\x00\x00\x00{ and no more",
])
def test_files_of_something_else(content, converted, converted_erased, tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    for function in (converted, converted_erased):
        text = refusal(function, file)
        assert text.startswith(f"can't convert {file}: it can't be used; nothing in it ran: ")
        assert text.count(str(file)) == 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_checkpoints(share, zipped, sd, converted, tmp_path, monkeypatch):
    weights = formats.compvis_weights(sd)
    file = formats.write_ckpt(weights, tmp_path / "v1.ckpt", monkeypatch, zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    assert f"{file}: it can't be used; nothing in it ran: " in refusal(converted, file)


def test_numbers_that_are_not_finite_are_refused(sd, folder, converted, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / UNET_FILE)
    save_file(weights | {"conv_in.bias": torch.full((32,), torch.inf)}, copy / UNET_FILE)
    assert "finite" in refusal(converted, copy)
    assert not {*tmp_path.iterdir()} - {copy}


# ---- the command


def test_the_command_converts_a_file(sd, folder, checkpoint, other_vae, tmp_path, capsys):
    save_file(other_vae, tmp_path / "vae")
    out = tmp_path / "new" / "folder"
    flags = ["--model", folder, "--vae", tmp_path / "vae", "--out", out]
    commands.run(convert.main, checkpoint, *flags)
    assert capsys.readouterr().out == f"{out}\n"
    loaded = sample.load(out)
    assert same_tensors(loaded.vae.state_dict(), other_vae)
    assert equal(replace(loaded, vae=sd.vae), sd)


def test_the_command_takes_the_average(sd, folder, tmp_path):
    save_file(formats.compvis_weights(sd, ema=True), tmp_path / "full")
    tokenizer = folder / "tokenizer"
    flags = ["--model", folder, "--ema", "--tokenizer", tokenizer, "--out", tmp_path / "out"]
    commands.run(convert.main, tmp_path / "full", *flags)
    assert equal(sample.load(tmp_path / "out"), sd)


def test_the_commands_that_errors_end_in_work_as_typed(
    sd, folder, whole_unet, tmp_path, monkeypatch
):
    """But for --model, which the small size needs."""
    pickled = formats.write_folder(folder, tmp_path / "of 2022", ".bin", torch.float32, old=True)
    single = tmp_path / "v1.4.safetensors"
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    save_file(formats.compvis_weights(sd), single)
    erased = tmp_path / "star.pt"
    torch.save(whole_unet, erased)

    errors = [
        refusal(sample.load, pickled),
        f"{refusal(sample.load, single)} --model {folder}",
        f"{refusal(sample.load_erased, sd, erased)} --model {folder}",
    ]
    monkeypatch.chdir(tmp_path)
    for error in errors:
        _, command = error.split("; convert it: python -m notebooks.tools.convert ")
        commands.run(convert.main, *shlex.split(command))
    assert equal(sample.load(tmp_path / "of 2022-converted"), sd)
    assert equal(sample.load(tmp_path / "v1.4-converted"), sd)
    loaded = sample.load_erased(sd, tmp_path / "star-converted.safetensors")
    assert same_tensors(loaded.unet.state_dict(), whole_unet)


@pytest.mark.parametrize("flags, says", [
    (["nowhere", "--out", "sd"], "can't convert nowhere: no such file or folder here; on "),
    (["models/sd/v1.ckpt", "--out", "sd"], "no such file or folder here; on the hub: "),
    (["nowhere.pt", "--erased"], "can't convert nowhere.pt: it isn't a file"),
    (["nowhere.ckpt", "--model", "no/model"], "--model no/model isn't a folder"),
    (["nowhere.pt", "--erased", "--ema"], "--ema, --vae and --tokenizer are for whole models"),
    (["nowhere.pt", "--erased", "--out", "name"], "name isn't the name of a .safetensors file"),
])
def test_wrong_input_gets_one_line(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in commands.refusal(capsys, convert.main, "--out", "out.safetensors", *flags)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["convert", "export"])
def test_a_tool_started_by_its_path_says_how_to_start_it(name, tmp_path):
    file = commands.ROOT / "notebooks" / "tools" / f"{name}.py"
    ended = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr == f"error: run it as python -m notebooks.tools.{name}\n"


def test_a_whole_model_is_not_named_like_a_file(folder, tmp_path, capsys):
    out = tmp_path / "van-gogh.safetensors"
    text = commands.refusal(capsys, convert.main, folder, "--out", out)
    assert text == f"error: {out} would be a folder, with a whole model: add --erased?"


@pytest.mark.parametrize("flags", [[], ["--erased"]])
def test_an_existing_output_stays(flags, folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    text = commands.refusal(capsys, convert.main, folder, "--out", out, *flags)
    assert text == f"error: {out} exists; delete it or choose another --out"
    assert out.read_text() == "old"


@pytest.mark.parametrize("name", ["write_index", "write_part"])
def test_nothing_is_half_written(name, folder, converted, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(folder)
    assert not [*tmp_path.iterdir()]


def test_erased_weights_are_never_half_written(whole_unet, converted_erased, tmp_path, monkeypatch):
    def full_disk(path, content):
        path.touch()
        raise OSError("no space left on device")

    torch.save(whole_unet, tmp_path / "erased.pt")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        converted_erased(tmp_path / "erased.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["erased.pt"]


# ---- the hub


@pytest.mark.robustness
def test_repositories_with_pickles(folder, sd, tmp_path):
    """Of each part, one file is downloaded: the most precise that the repository has."""
    root = tmp_path / "hub" / "someone"
    whole = formats.write_folder(folder, root / "bin", ".bin", torch.float32, old=True)
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", whole / "vae")
    (whole / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"unneeded")
    formats.write_folder(folder, root / "half", ".fp16.bin", torch.float16, old=False)
    (root / "single").mkdir()
    (root / "single" / "v1.ckpt").write_bytes(b"weights")
    other = shutil.copytree(whole, root / "other")
    (other / "scheduler").mkdir()
    schedule = {"prediction_type": "v_prediction"}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))

    with hub.serving(tmp_path / "hub") as server:
        command = "notebooks.tools.convert someone/"
        names = ("bin", "half", "single", "other")
        lines = [f"{command}{name} --out {tmp_path}/{name}" for name in names]
        errors = server.run(tmp_path / "home", *lines)
    *blocks, rest = errors.split("exit status 2\n")
    assert len(blocks) == 2 and "exit status" not in rest and "Traceback" not in errors
    text = "someone/single: no such file or folder here; on the hub: FileNotFoundError"
    assert f"can't convert {text}" in blocks[0].splitlines()[-1]
    assert "prediction_type is v_prediction, not epsilon" in blocks[1].splitlines()[-1]

    assert equal(sample.load(tmp_path / "bin"), sd)
    half = sample.load(folder, dtype="float16")
    assert equal(sample.load(tmp_path / "half", dtype="float16"), half)
    weights = [name for name, _ in server.served if name.endswith((".bin", ".safetensors"))]
    assert sorted(weights) == [
        "text_encoder/pytorch_model.bin",
        "text_encoder/pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.bin",
        "vae/diffusion_pytorch_model.fp16.bin",
        "vae/diffusion_pytorch_model.safetensors",
    ]
