"""notebooks/tools/export.py: erased models in the forms of other programs."""

import json
from dataclasses import replace
from datetime import date
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import clip_text
import erase
import sample
from notebooks.tools import convert, export
from support import commands, formats, parity, small

pytestmark = pytest.mark.robustness

# ---- folders


@pytest.mark.parametrize("part", sample.PARTS)
def test_a_config_is_read_back_as_written(part):
    config, _ = parity.CLASSES[part]
    config_from_json = parity.MODULES[part].config_from_json

    def written(config):
        return json.loads(json.dumps(export.CONFIGS[part](config)))

    for written_config in (config(), config_from_json(small.SMALL[part])):
        assert config_from_json(written(written_config)) == written_config

    published, ours = small.PUBLISHED[part], written(config())
    shared = [key for key in published if key in ours and not key.endswith("token_id")]
    assert {key: ours[key] for key in shared} == {key: published[key] for key in shared}
    assert set(ours) - set(published) <= {
        "scaling_factor",
        "norm_num_groups",
        "addition_embed_type",
        "use_linear_projection",
        "class_embed_type",
    }


def test_a_written_folder_is_the_same_model(sd, tmp_path):
    export.write_folder(sd, tmp_path / "saved")
    saved = sample.load(tmp_path / "saved")
    assert formats.equal(saved, sd)
    prompts = ["a red star in the style of mosaic", "ein Stern ★"]
    assert saved.tokenizer(prompts).input_ids == sd.tokenizer(prompts).input_ids
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["unet"]
    with pytest.raises(sample.UsageError, match="saved exists; delete it or choose another"):
        export.write_folder(sd, tmp_path / "saved")


@pytest.fixture
def sd_with_word(sd, folder):
    """The small model with a word more, as textual inversion adds one."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>"])
    config = replace(sd.text_encoder.config, vocab_size=len(tokenizer))
    encoder = small.filled(clip_text.TextEncoder(config)).float()
    return replace(sd, text_encoder=encoder, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["sd", "sd_with_word"])
def test_the_ids_of_a_folders_tokens_are_its_tokenizers(name, folder, tmp_path, request):
    export.write_folder(request.getfixturevalue(name), tmp_path / "saved")
    convert.convert_model(tmp_path / "saved", tmp_path / "converted")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]

    for written in ("saved", "converted"):
        config = json.loads((tmp_path / written / "text_encoder" / "config.json").read_text())
        found = [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
        assert found == [start, end, end]


def test_a_folder_is_never_half_written(sd, tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write_index", interrupted)
        export.write_folder(sd, tmp_path / "saved")
    assert not [*tmp_path.iterdir()]

    (tmp_path / "saved.part").mkdir()  # a killed run's
    export.write_folder(sd, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# ---- the command


@pytest.fixture(scope="module")
def theta(sd):
    """ESD-u's tensors, changed by little and of low rank, as an erasure changes them."""
    rng = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in erase.trainable_copies(sd.unet, "esd-u").items():
        tensor = tensor.detach()
        rows = len(tensor)
        up = torch.randn(rows, 2, generator=rng)
        down = torch.randn(2, tensor.numel() // rows, generator=rng)
        changed[name] = (tensor + 0.01 * (up @ down).view_as(tensor)).half()
    return changed


@pytest.fixture
def exported(sd, folder, theta, tmp_path, capsys):
    """Runs the command; returns the file that it wrote and what it printed."""
    file = tmp_path / "erased.safetensors"
    settings = {"concepts": ["star"], "method": "esd-u", "model": "some/model", "anchor": None}
    erase.save(theta, file, settings, sd)

    def run(form, *flags):
        out = tmp_path / ("folder" if form == "folder" else f"{form}.safetensors")
        arguments = [file, "--as", form, "--model", folder, "--out", out, *flags]
        commands.run(export.main, *arguments)
        return out, capsys.readouterr().out

    run.file = file
    return run


def test_a_folder_and_a_single_file_are_the_erased_model(sd, folder, exported, tmp_path):
    erased = sample.load_erased(sd, exported.file)
    out, _ = exported("folder")
    assert formats.equal(sample.load(out), erased)

    out, _ = exported("single")
    tokenizer = str(folder / "tokenizer")
    configs = sample.read_configs(folder)
    convert.convert_model(out, tmp_path / "back", tokenizer=tokenizer, configs=configs)
    half = sample.load(tmp_path / "back", dtype="float16")
    for part, weights in formats.part_weights(erased).items():
        halved = {name: tensor.half() for name, tensor in weights.items()}
        assert formats.same_tensors(formats.part_weights(half)[part], halved)


def test_the_official_form(theta, exported):
    out, _ = exported("esd")
    assert formats.same_tensors(load_file(out), theta)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata == {
        "format": "erasing-esd-v2",
        "base_model_id": "some/model",
        "train_method": "esd-u",
        "erase_concept": "star",
        "erase_from": "star",
    }


@pytest.mark.parametrize("form, architecture, implementation", [
    ("lora", "stable-diffusion-v1/lora", "diffusers"),
    ("single", "stable-diffusion-v1", "https://github.com/Stability-AI/generative-models"),
])
def test_metadata_for_other_programs(form, architecture, implementation, exported):
    out, _ = exported(form, "--date", "2024-02-29")
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    hint = metadata.pop("modelspec.usage_hint")
    assert ("dial from 0, nothing erased, to 1" in hint) == (form == "lora")
    assert metadata == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": form,
        "modelspec.date": "2024-02-29",
    }

    out.unlink()
    before = date.today()
    exported(form)
    with safe_open(out, "pt") as opened:
        day = date.fromisoformat(opened.metadata()["modelspec.date"])
    assert before <= day <= date.today()


@pytest.mark.parametrize("error", [0.5, 0.05, 0.001])
def test_a_lora_is_the_change_to_the_stated_error(error, sd, theta, exported):
    """up @ down * alpha / rank, as kohya's form has it; convolutions, too."""
    out, printed = exported("lora", "--error", error)
    found = load_file(out)
    before = sd.unet.state_dict()
    matrices = {name for name, tensor in theta.items() if tensor.ndim > 1}
    assert len(found) == 3 * len(matrices)
    assert any(theta[name].ndim == 4 for name in matrices)
    assert f"; {len(theta) - len(matrices)} biases and norms" in printed

    largest = 0
    for name in matrices:
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up = found[f"{layer}.lora_up.weight"].float()
        down = found[f"{layer}.lora_down.weight"].float()
        alpha = found[f"{layer}.alpha"]
        assert up.ndim == down.ndim == theta[name].ndim and up.shape[1] == len(down)
        product = (up.flatten(1) @ down.flatten(1) * alpha / len(down)).view_as(before[name])
        change = theta[name].float() - before[name]
        largest = max(largest, ((product - change).norm() / change.norm()).item())
    assert largest <= error + 1e-3  # float16 of the factors


def test_the_least_rank_is_taken():
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for error, rank in ((0.99, 1), (0.6, 1), (0.5, 2), (0.27, 2), (0.2, 3), (0, 3)):
        up, down = export.low_rank(a, error)
        assert up.shape == (3, rank) and down.shape == (rank, 3), error
        assert (up @ down - a).norm() <= error * a.norm() + 1e-5


@pytest.mark.parametrize("name, change, form, flags, says", [
    ("conv_in.bias", 1.0, "lora", [], "no weight matrix was changed"),
    ("conv_in.bias", torch.inf, "esd", [], "out.safetensors would have numbers that aren't finite"),
    ("conv_in.weight", torch.inf, "lora", [], "conv_in.weight has numbers that aren't finite"),
    ("conv_in.bias", 1.0, "lora", ["--error", 2], "choose at least 0 and less than 1"),
])
def test_what_can_not_be_written_is_refused(
    name, change, form, flags, says, sd, folder, tmp_path, capsys
):
    file, out = tmp_path / "theta.safetensors", tmp_path / "out.safetensors"
    save_file({name: sd.unet.get_parameter(name) + change}, file)
    arguments = [file, "--as", form, "--model", folder, "--out", out, *flags]
    assert says in commands.refusal(capsys, export.main, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("loss, erased_from", [
    ("erase:esd_loss", "star"), ("notebooks.methods.esd_from:loss", "badge"),
])
def test_an_anchor_is_what_is_erased_from_with_the_loss_for_that_alone(loss, erased_from):
    settings = {"concepts": ["star"], "anchor": "badge", "loss": loss}
    assert export.esd_metadata(settings, "some/model")["erase_from"] == erased_from


@pytest.mark.parametrize("form", ["lora", "folder"])
def test_an_existing_output_stays(form, exported, capsys):
    out, _ = exported(form)
    text = commands.refusal(capsys, partial(exported, form))
    assert f"{out} exists; delete it or choose another" in text


@pytest.mark.parametrize("metadata", [{}, {"settings": "theirs"}, {"settings": "[7]"}])
def test_files_that_erase_did_not_write(metadata, folder, tmp_path):
    """The settings are unknown, the weights aren't."""
    file, out = tmp_path / "other.safetensors", tmp_path / "esd.safetensors"
    save_file({"conv_in.bias": torch.ones(32)}, file, metadata)
    commands.run(export.main, file, "--as", "esd", "--model", folder, "--out", out)
    assert load_file(out)["conv_in.bias"].tolist() == [1.0] * 32
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["erase_concept"] == ""
