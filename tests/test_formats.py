"""sample.load and load_erased: every published form is the same model, all else is refused."""

import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from notebooks.tools import export
from support import formats, hub, parity, small

ROOT = Path(__file__).parents[1]


def equal(a, b):
    """Whether two models are the same, to the bit and the dtype."""
    both = zip(formats.part_weights(a).values(), formats.part_weights(b).values(), strict=True)
    return all(x.keys() == y.keys() and all(
        torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)
        for x, y in both)


@pytest.fixture
def small_single(folder, monkeypatch):
    formats.read_as_small(folder, monkeypatch)


@pytest.fixture
def checkpoint(folder, sd, tmp_path, small_single, monkeypatch):
    """A .ckpt as published, with tokenizer/ next to it."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    return formats.write_ckpt(formats.compvis_weights(sd), tmp_path / "v1.ckpt", monkeypatch)


# Names

@pytest.mark.parametrize("part", sample.PARTS)
def test_names_of_compvis_are_mapped_as_diffusers_maps_them(part):
    config = sample.PARTS[part].config()
    stored, rename = formats.COMPVIS[part], parity.MODULES[part].rename
    for theirs, ours in stored.items():
        assert [*rename({theirs: torch.zeros(1)}, config)] == [ours]
    with torch.device("meta"):
        tensors = sample.PARTS[part].model(config).state_dict()
    assert sorted(stored.values()) == sorted(tensors)  # one to one, and complete
    assert rename(tensors, config).keys() == tensors.keys()  # and ours stay


@pytest.mark.parametrize("part", sample.PARTS)
def test_a_config_is_read_back_as_written(part):
    config_from_json, (config, _) = parity.MODULES[part].config_from_json, parity.CLASSES[part]

    def written(config):
        return json.loads(json.dumps(export.CONFIGS[part](config)))

    for written_config in (config(), config_from_json(small.SMALL[part])):
        assert config_from_json(written(written_config)) == written_config
    published, ours = small.PUBLISHED[part], written(config())
    shared = [key for key in published if key in ours and not key.endswith("token_id")]
    assert {key: ours[key] for key in shared} == {key: published[key] for key in shared}
    assert set(ours) - set(published) <= {
        "scaling_factor", "norm_num_groups", "addition_embed_type", "use_linear_projection",
        "class_embed_type"}


# One model

def built(model, weights):
    """A model like `model` with these weights, and the names that fit() found no place for."""
    with torch.device("meta"):
        new = type(model)(model.config)
    return new, sample.fit(new, weights, "a file")


@pytest.mark.parametrize("part", sample.PARTS)
def test_tensors_are_taken_uncopied_and_frozen(part, sd):
    weights = getattr(sd, part).state_dict()
    model, left = built(getattr(sd, part), weights)
    assert not left and model.state_dict().keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr() and not parameter.requires_grad


def without_one(weights, name):
    return {other: weights[other] for other in weights if other != name}


def with_one_shorter(weights, name):
    return weights | {name: weights[name][:-1]}


@pytest.mark.parametrize("part", sample.PARTS)
@pytest.mark.parametrize("change", [without_one, with_one_shorter])
def test_tensors_that_do_not_fit_are_named(change, part, sd):
    model = getattr(sd, part)
    name = next(reversed(model.state_dict()))
    with pytest.raises(ValueError, match=f"a file doesn't fit .*, 1 tensors differ: {name}: "):
        built(model, change(model.state_dict(), name))


@pytest.mark.parametrize("part", sample.PARTS)
def test_tensors_that_the_model_lacks_are_returned_by_name(part, sd):
    model = getattr(sd, part)
    new, left = built(model, model.state_dict() | {"un.known": torch.zeros(1)})
    assert left == ["un.known"] and new.state_dict().keys() == model.state_dict().keys()


# Folders

@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
@pytest.mark.parametrize("old", [False, True])
def test_folders(suffix, old, folder, tmp_path):
    half = "fp16" in suffix
    copy = formats.write_folder(folder, tmp_path / "copy", suffix,
                                torch.float16 if half else torch.float32, old)
    dtype = "float16" if half else "float32"
    assert equal(sample.load(copy, dtype=dtype), sample.load(folder, dtype=dtype))


def test_of_several_files_the_most_precise_is_taken(folder, tmp_path, sd):
    copy = formats.write_folder(folder, tmp_path / "copy", ".fp16.safetensors", torch.float16,
                                False)
    for part in sample.PARTS:
        whole, = (folder / part).glob("*.safetensors")
        shutil.copy(whole, copy / part)
        (copy / part / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert equal(sample.load(copy), sd)


def test_a_written_folder_is_the_same_model(sd, tmp_path):
    export.write_folder(sd, tmp_path / "saved")
    saved = sample.load(tmp_path / "saved")
    assert equal(saved, sd)
    prompts = ["a red star in the style of mosaic", "ein Stern ★"]
    assert saved.tokenizer(prompts).input_ids == sd.tokenizer(prompts).input_ids
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["unet"]
    with pytest.raises(ValueError, match="saved exists, choose another folder"):
        export.write_folder(sd, tmp_path / "saved")


def test_a_folder_is_never_half_written(sd, tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write_index", interrupted)
        export.write_folder(sd, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    export.write_folder(sd, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# Single files

def test_single_safetensors(sd, folder, tmp_path, small_single):
    save_file(formats.compvis_weights(sd), tmp_path / "v1.safetensors")
    assert equal(sample.load(tmp_path / "v1.safetensors", tokenizer=folder / "tokenizer"), sd)


def test_ckpt(sd, checkpoint, capsys):
    assert equal(sample.load(checkpoint), sd)
    left = "model_ema.decay, model_ema.num_updates"  # but the schedule isn't named
    said = f"{checkpoint}: left out 2 tensors: {left}\n"
    assert capsys.readouterr().err == said


def test_ckpt_names_nine_globals(checkpoint):
    """So the file that the test above loads is like the published ones."""
    with zipfile.ZipFile(checkpoint) as opened:
        pickled = opened.read("v1/data.pkl")
    found = {arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
    assert {"pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
            "numpy.core.multiarray scalar", "numpy dtype", "_codecs encode",
            "collections OrderedDict", "torch._utils _rebuild_tensor_v2"} <= found


def test_ckpt_of_the_old_container(sd, checkpoint, tmp_path, monkeypatch):
    old = formats.write_ckpt(formats.compvis_weights(sd), tmp_path / "old.ckpt", monkeypatch,
                             zipped=False)
    assert not zipfile.is_zipfile(old)
    assert equal(sample.load(old), sd)


def test_what_a_file_is_is_told_by_its_content(sd, folder, tmp_path, small_single):
    save_file(formats.compvis_weights(sd), tmp_path / "v1.ckpt")
    assert equal(sample.load(tmp_path / "v1.ckpt", tokenizer=folder / "tokenizer"), sd)


def test_the_averaged_unet_is_taken_on_request(sd, checkpoint, tmp_path, monkeypatch, capsys):
    """The other U-Net in this file is all zeros."""
    file = formats.write_ckpt(formats.compvis_weights(sd, ema=True), tmp_path / "full.ckpt",
                              monkeypatch)
    assert equal(sample.load(file, ema=True), sd)
    assert "left out 2 tensors" in capsys.readouterr().err
    raw = sample.load(file)
    assert equal(replace(raw, unet=sd.unet), sd)
    assert not any(tensor.any() for tensor in raw.unet.state_dict().values())
    assert f"left out {2 + len(sd.unet.state_dict())} tensors" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["sample.py", "a star", "--model", str(file), "--ema",
                                     "--steps", "1", "--out", str(tmp_path / "x.png")])
    sample.main()
    expected = sample.contact_sheet([("a star", sample.generate(sd, ["a star"], steps=1))])
    assert Image.open(tmp_path / "x.png").tobytes() == expected.tobytes()


def test_an_average_with_a_gap_is_refused(sd, folder, tmp_path, small_single):
    tensors = formats.compvis_weights(sd, ema=True)
    del tensors["model_ema.diffusion_modeltime_embed0weight"]
    save_file(tensors, tmp_path / "full")
    with pytest.raises(ValueError, match="KeyError: 'model_ema.diffusion_modeltime_embed0weight'"):
        sample.load(tmp_path / "full", tokenizer=folder / "tokenizer", ema=True)


def test_a_folder_has_no_average(folder):
    with pytest.raises(ValueError, match="Is a directory"):
        sample.load(folder, ema=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_tensors_of_a_ckpt_are_mapped_not_read(checkpoint):
    before = checkpoint.name in Path("/proc/self/maps").read_text()
    tensors = sample.read_tensors(checkpoint)
    assert tensors and not before and checkpoint.name in Path("/proc/self/maps").read_text()


# Erased weights

@pytest.fixture(scope="module")
def whole_unet(sd):
    """Every tensor of the U-Net, changed."""
    return {name: tensor + 1 for name, tensor in sd.unet.state_dict().items()}


def nested(tensors):
    """Module -> {weight, bias}, as the demo of the official code saves."""
    modules = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        modules.setdefault(f"unet.{module}", {})[kind] = tensor
    return modules


def compvis_unet(tensors):
    prefix = formats.PREFIX["unet"]
    return {prefix + theirs: tensors[ours] for theirs, ours in formats.COMPVIS["unet"].items()}


def partial(tensors):
    return {name: tensor for name, tensor in tensors.items() if "attn2" in name}


@pytest.mark.parametrize("form, save", [
    (dict, torch.save),  # diffusers-VanGogh-ESDx1-UNET.pt
    (compvis_unet, torch.save),  # compvis-word_VanGogh-...pt
    (partial, save_file),  # esd-Van Gogh-from-Van Gogh-esdx.safetensors
    (nested, torch.save),  # of the demo
    (lambda tensors: nested(partial(tensors)), torch.save),
])
def test_every_published_form_of_erased_weights(form, save, sd, whole_unet, tmp_path):
    save(form(whole_unet), tmp_path / "erased")
    loaded = sample.load_erased(sd, tmp_path / "erased").unet.state_dict()
    for name, tensor in sd.unet.state_dict().items():
        changed = "attn2" in name or len(form(whole_unet)) in (686, len(nested(whole_unet)))
        assert torch.equal(loaded[name], whole_unet[name] if changed else tensor), name


def test_erased_weights_in_a_whole_checkpoint(sd, whole_unet, tmp_path):
    """As the 2023 code saves it: 1143 tensors in CompVis's format, no state_dict around them."""
    tensors = formats.compvis_weights(sd) | compvis_unet(whole_unet)
    torch.save(tensors, tmp_path / "compvis.pt")
    loaded = sample.load_erased(sd, tmp_path / "compvis.pt").unet.state_dict()
    assert all(torch.equal(loaded[name], whole_unet[name]) for name in loaded)


def test_the_model_with_tuned_tensors_shares_the_others(sd):
    name, tensor = "conv_in.bias", torch.arange(32.0).requires_grad_()
    before = {key: value.clone() for key, value in sd.unet.state_dict().items()}
    tuned = sample.with_tuned(sd, {name: tensor})
    assert replace(tuned, unet=sd.unet) == sd
    assert torch.equal(tuned.unet.conv_in.bias, tensor)
    assert not tuned.unet.conv_in.bias.requires_grad and tensor.requires_grad
    own, others = tuned.unet.state_dict(), sd.unet.state_dict()
    assert {key for key in own if own[key].data_ptr() != others[key].data_ptr()} == {name}
    assert all(torch.equal(others[key], before[key]) for key in before)
    for wrong in ({}, {"conv_in.nothing": tensor}, {name: tensor[:3]}):
        with pytest.raises(ValueError, match="^theta"):
            sample.with_tuned(sd, wrong)


def test_bfloat16_erased_weights(sd, whole_unet, tmp_path):
    save_file({name: t.bfloat16() for name, t in partial(whole_unet).items()}, tmp_path / "half")
    loaded = sample.load_erased(sd, tmp_path / "half").unet.state_dict()
    for name, tensor in partial(whole_unet).items():
        assert torch.equal(loaded[name], tensor.bfloat16().float())


@pytest.mark.parametrize("tensors, says", [
    ({"text_model.encoder.weight": torch.zeros(1)},
     "other.pt has 1 tensors, not the U-Net's: \\['text_model.encoder.weight'\\]"),
    ({"conv_in.bias": torch.zeros(5)}, r"1 tensors differ: conv_in.bias: \[5\], expected \[32\]"),
    ({}, "other.pt has 0 tensors, not the U-Net's"),
])
def test_erased_weights_of_another_model_are_refused(tensors, says, sd, tmp_path):
    torch.save(tensors, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=says):
        sample.load_erased(sd, tmp_path / "other.pt")


# Pickles that aren't what they seem

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
        import numpy
        return Evil(numpy.load, str(mark))
    return Evil(torch._utils._rebuild_tensor_v2, Evil(os.system, command), 0, (1,), (1,), False,
                None)


@pytest.mark.parametrize("kind, named", [
    ("os.system", "posix.system"), ("eval", "eval"),
    ("getattr", "getattr"), ("np.load", "numpy.*load"),
    ("an argument of an allowed function", "posix.system")])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_runs(kind, named, zipped, sd, tmp_path, monkeypatch, small_single):
    file, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({"state_dict": formats.compvis_weights(sd), "callbacks": evil(kind, mark)}, file,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"nothing in it ran: GLOBAL {named}") as refused:
        sample.read_tensors(file)
    assert "\n" not in str(refused.value) and not mark.exists()


def test_an_allowed_function_with_wrong_arguments_is_refused(tmp_path):
    torch.save(Evil(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt can't be used"):
        sample.read_tensors(tmp_path / "evil.pt")


def test_an_inert_class_keeps_nothing(tmp_path, monkeypatch):
    callback = formats.stand_in(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint",
                                "ModelCheckpoint")
    thing = callback()
    thing.secret = 7
    torch.save({"a": torch.ones(1), "b": thing}, tmp_path / "inert.pt")
    assert [*sample.read_tensors(tmp_path / "inert.pt")] == ["a"]
    with torch.serialization.safe_globals(sample.INERT):
        read = torch.load(tmp_path / "inert.pt", weights_only=True)["b"]
    assert type(read) is sample.Inert and not vars(read)


def test_both_spellings_of_numpys_scalar_are_taken(tmp_path):
    """NumPy 2 writes numpy._core, NumPy 1 numpy.core."""
    thing = {"a": torch.ones(1), "b": np.float64(7)}
    torch.save(thing, tmp_path / "2.pt")
    data = (tmp_path / "2.pt").read_bytes()
    assert b"numpy._core.multiarray" in data
    torch.save(thing, tmp_path / "1.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "1.pt").read_bytes().replace(b"numpy._core.multiarray",
                                                   b"numpy.core.multiarray")
    (tmp_path / "1.pt").write_bytes(old)
    for name in ("1.pt", "2.pt"):
        assert [*sample.read_tensors(tmp_path / name)] == ["a"]


def test_a_refused_pickle_says_what_to_look_for(tmp_path):
    torch.save({"a": torch.ones(1), "b": Path("x")}, tmp_path / "path.pt")
    with pytest.raises(ValueError, match="nothing in it ran: GLOBAL .*, look for a .safetensors"):
        sample.read_tensors(tmp_path / "path.pt")


# What is refused

@pytest.mark.parametrize("content", [
    b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>",
    b"PK\x03\x04 and no more", b"\xff\x00\x00\x00\x00\x00\x00\x00{ and no more"])
def test_files_of_something_else(content, tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} can't be used") as refused:
        sample.load(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_checkpoints(share, zipped, sd, tmp_path, monkeypatch, small_single):
    file = formats.write_ckpt(formats.compvis_weights(sd), tmp_path / "v1.ckpt", monkeypatch,
                              zipped)
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match="v1.ckpt can't be used") as refused:
        sample.load(file)
    assert "\n" not in str(refused.value)


def test_a_git_lfs_pointer_is_named(sd, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    pointer = copy / "unet" / "diffusion_pytorch_model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for load in (lambda: sample.load(copy), lambda: sample.load_erased(sd, pointer)):
        with pytest.raises(ValueError, match="git-lfs pointer, run `git lfs pull`"):
            load()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_part_is_no_erased_unet(part, sd, tmp_path):
    save_file(getattr(sd, part).state_dict(), tmp_path / "other")
    first = min(getattr(sd, part).state_dict())
    with pytest.raises(ValueError, match=f"not the U-Net's: \\['{first}', "):
        sample.load_erased(sd, tmp_path / "other")


def renamed(ours, theirs):
    return lambda weights: {name.replace(ours, theirs): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("change", [
    renamed("cond_stage_model.transformer.", "cond_stage_model.model."),  # Stable Diffusion 2
    renamed("cond_stage_model.", "conditioner.embedders.0."),  # SDXL
    lambda weights: {"lora_unet_down.lora_up.weight": torch.zeros(1)}])
def test_single_files_of_relatives(change, sd, folder, tmp_path, small_single):
    save_file(change(formats.compvis_weights(sd)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"\d+ tensors differ: \w+\.\S+: missing, expected "):
        sample.load(tmp_path / "other", tokenizer=folder / "tokenizer")


def test_a_file_with_leftovers(sd, folder, tmp_path, small_single, capsys):
    """ControlNet's weights, for instance."""
    extra = {"control_model.x.weight": torch.zeros(1)}
    save_file(formats.compvis_weights(sd) | extra, tmp_path / "other")
    assert equal(sample.load(tmp_path / "other", tokenizer=folder / "tokenizer"), sd)
    line, = capsys.readouterr().err.strip().splitlines()
    assert "left out 3 tensors" in line and "control_model.x.weight" in line


def test_an_inpainting_file(sd, folder, tmp_path, small_single):
    tensors = formats.compvis_weights(sd)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting")
    says = r"1 tensors differ: unet.conv_in.weight: \[32, 9, 3, 3\], expected \[32, 4, 3, 3\]"
    with pytest.raises(ValueError, match=says):
        sample.load(tmp_path / "inpainting", tokenizer=folder / "tokenizer")


def test_a_unet_alone_is_no_checkpoint(sd, folder, tmp_path, small_single):
    save_file(sd.unet.state_dict(), tmp_path / "unet")
    with pytest.raises(ValueError, match=r"\d+ tensors differ: \w+\.\S+: missing, expected "):
        sample.load(tmp_path / "unet", tokenizer=folder / "tokenizer")


@pytest.mark.parametrize("part, change, says", [
    ("text_encoder", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),  # SD 2
    ("vae", {"latent_channels": 16}, "vae.encoder.conv_out.weight: "),
])
def test_folders_of_relatives(part, change, says, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=says) as refused:
        sample.load(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [
    {"rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}, {"beta_start": 0.0001},
    {"beta_end": 0.02}, {"num_train_timesteps": 500}, {"prediction_type": "v_prediction"},
    {"trained_betas": [0.1]}])
def test_another_schedule_is_another_model(change, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scheduler").mkdir(exist_ok=True)
    file = copy / "scheduler" / "scheduler_config.json"
    published = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                 "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False}
    file.write_text(json.dumps(published))
    assert sample.load(copy)
    file.write_text(json.dumps(published | change))
    (key, value), = change.items()
    with pytest.raises(ValueError) as refused:
        sample.load(copy)
    assert f"{key} is {value}, not " in str(refused.value)


def test_a_file_that_says_it_predicts_v_is_refused(sd, folder, tmp_path, small_single):
    """In its metadata, or in the .yaml of the same name."""
    file, words = tmp_path / "v.safetensors", folder / "tokenizer"
    weights = formats.compvis_weights(sd)
    for said in ("epsilon", "v"):
        save_file(weights, file, {"modelspec.prediction_type": said})
        if said == "epsilon":
            assert equal(sample.load(file, tokenizer=words), sd)
    with pytest.raises(ValueError, match="modelspec.prediction_type is v, not epsilon"):
        sample.load(file, tokenizer=words)

    save_file(weights, file)
    yaml = file.with_suffix(".yaml")
    yaml.write_text("model:\n  params:\n    parameterization: eps\n    linear_start: 0.00085\n")
    assert equal(sample.load(file, tokenizer=words), sd)
    for said in ('"v"', "v"):
        yaml.write_text(f"model:\n  params:\n    parameterization: {said}\n")
        with pytest.raises(ValueError, match="parameterization is v, not eps"):
            sample.load(file, tokenizer=words)


@pytest.mark.parametrize("part, field", [
    ("unet", "layers_per_block"), ("text_encoder", "num_hidden_layers"), ("unet", "sample_size"),
    ("vae", "norm_num_groups"), ("unet", "block_out_channels"), ("vae", "scaling_factor")])
@pytest.mark.parametrize("value", [10**9, float("nan"), "two", []])
def test_absurd_settings_are_refused_at_once(part, field, value, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"can't load {copy}: ") as refused:
        sample.load(copy)
    assert "\n" not in str(refused.value)


def linear_projections(weights):
    """As in Stable Diffusion 2 and SDXL."""
    return {name: tensor.flatten(1) if "proj_" in name and tensor.ndim == 4 else tensor
            for name, tensor in weights.items()}


def nine_channels_in(weights):
    """As in inpainting models, which also get the mask and the masked image."""
    return weights | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}


@pytest.mark.parametrize("change, config, says", [
    (linear_projections, {"attention_head_dim": [5, 10, 20, 20]},
     r"unet has heads = \[5, 10, 20, 20\]"),
    (linear_projections, {}, r"proj_in.weight: \[96, 96\], expected \[96, 96, 1, 1\]"),
    (nine_channels_in, {}, r"conv_in.weight: \[32, 9, 3, 3\], expected \[32, 4, 3, 3\]"),
    (nine_channels_in, {"in_channels": 9},
     r"conv_out.weight: \[4, 32, 3, 3\], expected \[9, 32, 3, 3\]"),
])
def test_unets_of_relatives(change, config, says, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(folder / "unet" / file.name)), file)
    published = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(published | config))
    with pytest.raises(ValueError, match=says):
        sample.load(copy)


def test_a_config_that_is_no_json(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "unet" / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="unet/config.json holds no settings"):
        sample.load(copy)


def test_a_tokenizer_of_another_model(folder, tmp_path, sd):
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = sd.tokenizer.get_vocab() | {"zebra</w>": len(sd.tokenizer)}
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=f"--tokenizer {copy}/tokenizer aren't of one model"):
        sample.load(copy)


def test_parts_of_two_models(folder, tmp_path):
    """Text features of another width: every part loads, but they don't fit together."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor[:, :24].contiguous() if "attn2.to_k" in name or "attn2.to_v" in name
               else tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 24}))
    with pytest.raises(ValueError, match="its parts and --tokenizer .* aren't of one model"):
        sample.load(copy)


def test_no_tokenizer(folder, checkpoint, tmp_path):
    """It may be CLIP's, which isn't on this machine: there, transformers makes up an empty one."""
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer"))
    shutil.rmtree(tmp_path / "tokenizer")
    for model in (copy, checkpoint):
        with pytest.raises(ValueError, match=f"can't load {model}: .*--tokenizer {sample.CLIP}"):
            sample.load(model)


def test_a_file_looks_for_a_tokenizer_beside_it(sd, folder, checkpoint, tmp_path):
    """A folder `tokenizer`, or its files themselves."""
    assert sample.load(checkpoint).tokenizer.get_vocab() == sd.tokenizer.get_vocab()
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "tokenizer").rmdir()
    assert sample.load(checkpoint).tokenizer.get_vocab() == sd.tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: b"\xff" + data[1:]])
def test_a_damaged_tokenizer_is_refused_in_one_line(name, damage, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "tokenizer" / name
    file.write_bytes(damage(file.read_bytes()))
    try:
        loaded = sample.load(copy)  # half of the merges are merges
        assert name == "merges.txt" and loaded.tokenizer.get_vocab()
    except ValueError as error:
        assert f"can't load {copy}: " in str(error) and "--tokenizer" in str(error)
        assert "\n" not in str(error)


# The hub

RUN = """
import sys, sample
for arguments in sys.argv[1:]:
    sys.argv = ["sample.py", "a star", "--steps", "1", *arguments.split()]
    try:
        sample.main()
    except SystemExit as stopped:
        print("exit status", stopped.code, file=sys.stderr)
"""


def on_the_hub(server, home, *commands, offline=False):
    """Runs sample.py with each of these arguments, the stand-in as the hub; returns stderr."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(home),
                                "HF_HUB_OFFLINE": "1" if offline else "0"}
    return subprocess.run([sys.executable, "-c", RUN, *commands], cwd=ROOT, env=environment,
                          check=True, capture_output=True, text=True).stderr


@pytest.fixture
def server(tmp_path):
    running = hub.Hub(tmp_path / "hub")
    yield running
    running.shutdown()
    running.server_close()


def test_the_hub(server, folder, tmp_path):
    """One set of weights is downloaded, once, and a broken connection is resumed."""
    repository = shutil.copytree(folder, server.root / "someone" / "model")
    unneeded = ("unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors", "model.ckpt")
    for file in unneeded:
        (repository / file).parent.mkdir(exist_ok=True)
        (repository / file).write_bytes(b"unneeded")
    (repository / "tokenizer" / "added_tokens.json").write_text("{}")
    weights = "unet/diffusion_pytorch_model.safetensors"
    server.cut = {weights}
    first, again, offline = (f"--model someone/model --out {tmp_path}/{i}.png" for i in range(3))

    errors = on_the_hub(server, tmp_path / "home", first, again)
    assert "exit status" not in errors
    assert "Fetching" in errors or "ownload" in errors  # progress
    one, two = [start for name, start in server.served if name == weights]
    assert one == 0 < two  # the second half only
    names = [name for name, start in server.served if start == 0]
    assert len(names) == len({*names}) and not {*unneeded} & {*names}
    assert "tokenizer/added_tokens.json" in names  # all of tokenizer/

    served = len(server.served)
    assert "exit status" not in on_the_hub(server, tmp_path / "home", offline, offline=True)
    assert len(server.served) == served
    images = [Image.open(tmp_path / f"{i}.png").tobytes() for i in range(3)]
    assert images[0] == images[1] == images[2]


def test_repositories_without_float32_safetensors_or_without_a_model(server, folder, tmp_path):
    """Of each part, one file is downloaded: the first form that there is."""
    suffixes = {"bin": ".bin", "half": ".fp16.safetensors"}
    for name, suffix in suffixes.items():
        dtype = torch.float16 if "half" in name else torch.float32
        copy = formats.write_folder(folder, server.root / "someone" / name, suffix, dtype, False)
        shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", copy / "vae")
    (server.root / "someone" / "single").mkdir(parents=True)
    (server.root / "someone" / "single" / "v1.ckpt").write_bytes(b"weights")
    refused = {"someone/nothing": "can't load someone/nothing: RepositoryNotFoundError",
               "someone/single": "can't load someone/single: FileNotFoundError",
               "not/a/hub/name": "can't load not/a/hub/name: "}
    drawn = [f"--model someone/{name} --out {tmp_path}/{name}.png" for name in suffixes]
    errors = on_the_hub(server, tmp_path / "home", *(
        f"--model {model} --out {tmp_path}/out.png" for model in refused), *drawn)

    *said, rest = errors.split("exit status 2\n")
    assert len(said) == 3 and "exit status" not in rest and "Traceback" not in errors
    for lines, says in zip(said, refused.values()):
        assert says in lines.strip().splitlines()[-1]
    assert {file.stem for file in tmp_path.glob("*.png")} == {*suffixes}
    weights = [name for name, _ in server.served if name.endswith((".bin", ".safetensors"))]
    assert sorted(weights) == sorted(
        [f"unet/diffusion_pytorch_model{suffix}" for suffix in suffixes.values()]
        + ["text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"]
        + ["vae/diffusion_pytorch_model.safetensors"] * 2)
