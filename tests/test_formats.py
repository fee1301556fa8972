"""sample.load and load_erased: the one layout, in both its spellings; all else is refused."""

import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from support import formats, hub
from support.formats import equal

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def edit_json(file, changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(function, *arguments):
    """The one line of the error that a call must end in."""
    with pytest.raises(sample.UsageError) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- assign_tensors


def built(model, weights):
    """A model like `model` with these weights, and the names that found no place."""
    with torch.device("meta"):
        new = type(model)(model.config)
    return new, sample.assign_tensors(new, weights, "a file")


@pytest.mark.parametrize("part", sample.PARTS)
def test_tensors_are_taken_uncopied_and_frozen(part, sd):
    weights = getattr(sd, part).state_dict()
    model, leftover = built(getattr(sd, part), weights)
    assert not leftover and model.state_dict().keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()
        assert not parameter.requires_grad


def without_one(weights, name):
    return {other: weights[other] for other in weights if other != name}


def with_one_shorter(weights, name):
    return weights | {name: weights[name][:-1]}


@pytest.mark.parametrize("part", sample.PARTS)
@pytest.mark.parametrize("change", [without_one, with_one_shorter])
def test_tensors_that_do_not_fit_are_named(change, part, sd):
    model = getattr(sd, part)
    name = next(reversed(model.state_dict()))
    with pytest.raises(sample.UsageError, match=f"a file .*, 1 tensors differ: {name}: "):
        built(model, change(model.state_dict(), name))


@pytest.mark.parametrize("part", sample.PARTS)
def test_tensors_that_the_model_lacks_are_returned_by_name(part, sd):
    model = getattr(sd, part)
    new, leftover = built(model, model.state_dict() | {"un.known": torch.zeros(1)})
    assert leftover == ["un.known"]
    assert new.state_dict().keys() == model.state_dict().keys()


# ---- folders


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_folders(half, old, folder, tmp_path):
    suffix = ".fp16.safetensors" if half else ".safetensors"
    dtype = torch.float16 if half else torch.float32
    copy = formats.write_folder(folder, tmp_path / "copy", suffix, dtype, old)
    name = "float16" if half else "float32"
    assert equal(sample.load(copy, dtype=name), sample.load(folder, dtype=name))


def test_of_several_files_the_most_precise_is_taken(folder, tmp_path, sd):
    copy = formats.write_folder(
        folder, tmp_path / "copy", ".fp16.safetensors", torch.float16, old=False
    )
    for part in sample.PARTS:
        whole, = (folder / part).glob("*.safetensors")
        shutil.copy(whole, copy / part)
        (copy / part / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert equal(sample.load(copy), sd)


def command_in(text):
    """The arguments of the convert command with which an error ends."""
    _, command = text.split("; convert it: python -m notebooks.tools.convert ")
    return shlex.split(command)


def test_other_forms_end_in_the_command_that_converts_them(sd, folder, tmp_path):
    """tests/test_convert.py runs these commands."""
    for name in ("v1-4.ckpt", "v1 4.safetensors"):
        (tmp_path / name).write_bytes(b"anything")
        text = refusal(sample.load, tmp_path / name)
        out = f"{(tmp_path / name).stem}-converted"
        assert command_in(text) == [str(tmp_path / name), "--out", out]

    pickled = formats.write_folder(folder, tmp_path / "old", ".bin", torch.float32, old=True)
    text = refusal(sample.load, pickled)
    assert "/old/unet/diffusion_pytorch_model.safetensors is missing" in text
    assert command_in(text) == [str(pickled), "--out", "old-converted"]

    (tmp_path / "star.pt").write_bytes(b"anything")
    text = refusal(sample.load_erased, sd, tmp_path / "star.pt")
    expected = [str(tmp_path / "star.pt"), "--erased", "--out", "star-converted.safetensors"]
    assert command_in(text) == expected


# ---- what is refused


def test_a_git_lfs_pointer_is_refused(sd, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    pointer = copy / UNET_FILE
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{pointer} is incomplete, or not safetensors" in refusal(sample.load, copy)
    assert "is incomplete, or not safetensors" in refusal(sample.load_erased, sd, pointer)


@pytest.mark.parametrize("part, change, says", [
    ("text_encoder", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),  # SD 2
    ("vae", {"latent_channels": 16}, "vae.encoder.conv_out.weight: "),
])
def test_folders_of_relatives(part, change, says, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / part / "config.json", change)
    assert says in refusal(sample.load, copy)


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("change", [
    {"rescale_betas_zero_snr": True},
    {"beta_schedule": "linear"},
    {"beta_start": 0.0001},
    {"beta_end": 0.02},
    {"num_train_timesteps": 500},
    {"prediction_type": "v_prediction"},
    {"trained_betas": [0.1]},
])
def test_another_schedule_is_another_model(change, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scheduler").mkdir(exist_ok=True)
    file = copy / "scheduler" / "scheduler_config.json"
    published = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    file.write_text(json.dumps(published))
    assert sample.load(copy)

    edit_json(file, change)
    (key, value), = change.items()
    assert f"{key} is {value}, not " in refusal(sample.load, copy)


@pytest.mark.parametrize("part, changed", [
    ("unet", {"down_block_types": ["CrossAttnDownBlock2D"]}),
    ("unet", {"block_out_channels": [32.0, 32.0, 64.0, 64.0]}),
    ("vae", {"block_out_channels": [32, "32", 32, 32]}),
    ("vae", {"block_out_channels": []}),
])
def test_levels_of_other_kinds_are_refused(part, changed, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / part / "config.json", changed)
    says = f"can't load {copy}: {copy}/{part}/config.json has (attention|block_out_channels) = "
    assert re.match(says, refusal(sample.load, copy))


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("part, field", [
    ("unet", "layers_per_block"),
    ("text_encoder", "num_hidden_layers"),
    ("unet", "sample_size"),
    ("vae", "norm_num_groups"),
    ("unet", "block_out_channels"),
    ("vae", "scaling_factor"),
])
@pytest.mark.parametrize("value", [10**9, float("nan"), "two", []])
def test_absurd_settings_are_refused_at_once(part, field, value, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / part / "config.json", {field: value})
    assert refusal(sample.load, copy).startswith(f"can't load {copy}: ")


def linear_projections(weights):
    """As in Stable Diffusion 2 and SDXL."""
    changed = dict(weights)
    for name, tensor in weights.items():
        if "proj_" in name and tensor.ndim == 4:
            changed[name] = tensor.flatten(1)
    return changed


def nine_channels_in(weights):
    """As in inpainting models, which also get the mask and the masked image."""
    return weights | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}


@pytest.mark.parametrize("change, config, says", [
    (linear_projections, {"attention_head_dim": [5, 10, 20, 20]}, "has heads = [5, 10, 20, 20]"),
    (linear_projections, {}, "_in.weight: [32, 32], expected [32, 32, 1, 1]"),
    (nine_channels_in, {}, "conv_in.weight: [32, 9, 3, 3], expected [32, 4, 3, 3]"),
    (
        nine_channels_in,
        {"in_channels": 9},
        "this is an inpainting model, not Stable Diffusion v1",
    ),
])
def test_unets_of_relatives(change, config, says, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    save_file(change(load_file(folder / UNET_FILE)), copy / UNET_FILE)
    edit_json(copy / "unet" / "config.json", config)
    assert says in refusal(sample.load, copy)


def test_a_config_that_is_no_json(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "unet" / "config.json").write_text("<html>")
    assert "unet/config.json holds no settings" in refusal(sample.load, copy)


def test_a_tokenizer_of_another_model(folder, tmp_path, sd):
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = sd.tokenizer.get_vocab() | {"zebra</w>": len(sd.tokenizer)}
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(other))
    assert "its parts aren't of one model" in refusal(sample.load, copy)


def test_a_vocabulary_that_gives_an_id_twice(folder, tmp_path, sd):
    copy = shutil.copytree(folder, tmp_path / "copy")
    vocabulary = sd.tokenizer.get_vocab()
    vocabulary["8"] = vocabulary["7"]  # a flipped bit
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    assert "each pair should be equal: [(820, 821)" in refusal(sample.load, copy)


def test_parts_of_two_models(folder, tmp_path):
    """Text features of another width: every part loads, but they don't fit together."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    narrower = load_file(copy / UNET_FILE)
    for name, tensor in narrower.items():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            narrower[name] = tensor[:, :24].contiguous()
    save_file(narrower, copy / UNET_FILE)
    edit_json(copy / "unet" / "config.json", {"cross_attention_dim": 24})
    assert "its parts aren't of one model" in refusal(sample.load, copy)


def test_no_tokenizer(folder, tmp_path):
    ignored = shutil.ignore_patterns("tokenizer")
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=ignored)
    assert refusal(sample.load, copy).startswith(f"can't load {copy}: ")


def first_half(data):
    return data[: len(data) // 2]


def nothing(data):
    return b""


def no_utf8(data):
    return b"\xff" + data[1:]


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [first_half, nothing, no_utf8])
def test_a_damaged_tokenizer_is_refused_in_one_line(name, damage, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "tokenizer" / name
    file.write_bytes(damage(file.read_bytes()))
    if name == "merges.txt" and damage is not no_utf8:  # half of the merges are merges
        assert sample.load(copy).tokenizer.get_vocab()
    else:
        assert refusal(sample.load, copy).startswith(f"can't load {copy}: ")


# ---- erased weights


@pytest.fixture(scope="module")
def whole_unet(sd):
    """Every tensor of the U-Net, changed."""
    return {name: tensor + 1 for name, tensor in sd.unet.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erased_weights_of_the_official_code(dtype, sd, whole_unet, tmp_path):
    """esd-Van Gogh-from-Van Gogh-esdx.safetensors."""
    partial = formats.cross_attention(whole_unet)
    save_file({name: tensor.to(dtype) for name, tensor in partial.items()}, tmp_path / "erased")
    loaded = sample.load_erased(sd, tmp_path / "erased").unet.state_dict()
    for name, tensor in sd.unet.state_dict().items():
        expected = partial[name].to(dtype).float() if name in partial else tensor
        assert torch.equal(loaded[name], expected), name


@pytest.mark.parametrize("tensors, says", [
    ({"text_model.encoder.weight": torch.zeros(1)},
     "other has 1 tensors, 1 not the U-Net's: ['text_model.encoder.weight']"),
    ({"conv_in.bias": torch.zeros(5)}, "1 tensors differ: conv_in.bias: [5], expected [32]"),
    ({}, "other has 0 tensors, 0 not the U-Net's"),
])
def test_erased_weights_of_another_model_are_refused(tensors, says, sd, tmp_path):
    save_file(tensors, tmp_path / "other")
    assert says in refusal(sample.load_erased, sd, tmp_path / "other")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_part_is_no_erased_unet(part, sd, tmp_path):
    weights = getattr(sd, part).state_dict()
    save_file(weights, tmp_path / "other")
    text = refusal(sample.load_erased, sd, tmp_path / "other")
    assert f"not the U-Net's: ['{min(weights)}', " in text


def test_erased_weights_of_another_size_name_the_model_that_they_fit(sd, tmp_path):
    settings = json.dumps({"model": "some/model"})
    save_file({"conv_in.bias": torch.zeros(5)}, tmp_path / "other", {"settings": settings})
    text = refusal(sample.load_erased, sd, tmp_path / "other")
    assert text.endswith("it was made from --model some/model") and "convert" not in text


def test_the_model_with_other_weights_shares_the_rest(sd):
    name = "conv_in.bias"
    tensor = torch.arange(32.0).requires_grad_()
    before = {key: value.clone() for key, value in sd.unet.state_dict().items()}

    edited = sample.with_weights(sd, {name: tensor})
    for part in ("vae", "text_encoder", "tokenizer"):
        assert getattr(edited, part) is getattr(sd, part)
    assert torch.equal(edited.unet.conv_in.bias, tensor)
    assert edited.unet.conv_in.bias.data_ptr() != tensor.data_ptr()
    assert not edited.unet.conv_in.bias.requires_grad and tensor.requires_grad

    weights, others = edited.unet.state_dict(), sd.unet.state_dict()
    replaced = [key for key in weights if weights[key].data_ptr() != others[key].data_ptr()]
    assert replaced == [name]
    assert formats.same_tensors(others, before)
    for wrong in ({}, {"conv_in.nothing": tensor}, {name: tensor[:3]}):
        assert refusal(sample.with_weights, sd, wrong).startswith("theta")


# ---- the hub


@pytest.fixture
def server(tmp_path):
    with hub.serving(tmp_path / "hub") as running:
        yield running


@pytest.mark.robustness
def test_the_hub(server, folder, tmp_path):
    """One set of weights is downloaded, once, and a broken connection is resumed."""
    repository = shutil.copytree(folder, server.root / "someone" / "model")
    unneeded = (
        "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "model.ckpt",
    )
    for file in unneeded:
        (repository / file).parent.mkdir(exist_ok=True)
        (repository / file).write_bytes(b"unneeded")
    (repository / "tokenizer" / "added_tokens.json").write_text("{}")
    server.cut = {UNET_FILE}
    home = tmp_path / "home"
    command = f"sample star --steps 1 --model someone/model --out {tmp_path}/"

    errors = server.run(home, f"{command}0.png", f"{command}1.png")
    assert "exit status" not in errors
    assert "Fetching" in errors or "ownload" in errors  # progress
    one, two = [start for name, start in server.served if name == UNET_FILE]
    assert one == 0 < two  # the second half only
    names = [name for name, start in server.served if start == 0]
    assert len(names) == len({*names}) and not {*unneeded} & {*names}
    assert "tokenizer/added_tokens.json" in names  # all of tokenizer/

    served = len(server.served)
    assert "exit status" not in server.run(home, f"{command}2.png", offline=True)
    assert len(server.served) == served
    images = [Image.open(tmp_path / f"{i}.png").tobytes() for i in range(3)]
    assert images[0] == images[1] == images[2]


@pytest.mark.robustness
def test_repositories_without_float32_or_without_a_model(server, folder, tmp_path):
    """Of each part, one file is downloaded: the first form that there is."""
    half = formats.write_folder(
        folder, server.root / "someone" / "half", ".fp16.safetensors", torch.float16, old=False
    )
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", half / "vae")
    formats.write_folder(folder, server.root / "someone" / "bin", ".bin", torch.float32, old=False)
    (server.root / "someone" / "single").mkdir(parents=True)
    (server.root / "someone" / "single" / "v1.ckpt").write_bytes(b"weights")
    refused = {
        "someone/nothing": "someone/nothing: no such folder here; on the hub: RepositoryNotFound",
        "someone/single": "someone/single: no such folder here; on the hub: FileNotFoundError",
        "not/a/hub/name": "can't load not/a/hub/name: ",
        "someone/bin": "notebooks.tools.convert someone/bin --out bin-converted",
    }

    command = "sample star --steps 1 --model"
    errors = server.run(
        tmp_path / "home",
        *(f"{command} {model} --out {tmp_path}/out.png" for model in refused),
        f"{command} someone/half --out {tmp_path}/half.png",
    )
    *blocks, rest = errors.split("exit status 2\n")
    assert len(blocks) == len(refused)
    assert "exit status" not in rest and "Traceback" not in errors
    for lines, says in zip(blocks, refused.values()):
        assert says in lines.strip().splitlines()[-1]
    assert [file.name for file in tmp_path.glob("*.png")] == ["half.png"]
    weights = [name for name, _ in server.served if name.endswith((".bin", ".safetensors"))]
    assert sorted(weights) == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
