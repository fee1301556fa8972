"""notebooks/tools/export.py: erased models in the forms of other programs."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import erase
import sample
from notebooks.tools import export
from support import formats


@pytest.mark.parametrize("part", sample.PARTS)
def test_names_are_compvis_own(part):
    """The stored lists are of the published checkpoint; every name of ours is in them."""
    config = sample.PARTS[part].config()
    for theirs, ours in formats.COMPVIS[part].items():
        assert export.COMPVIS[part](ours, config) == theirs


@pytest.fixture(scope="module")
def theta(sd):
    """ESD-u's tensors, changed by little and of low rank, as an erasure changes them."""
    rng, changed = torch.Generator().manual_seed(0), {}
    for name, tensor in erase.select(sd.unet, "esd-u").items():
        flat = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
        change = torch.randn(len(flat), 2, generator=rng) @ torch.randn(2, flat[0].numel(),
                                                                        generator=rng)
        changed[name] = (tensor.detach() + 0.01 * change.view_as(tensor)).half()
    return changed


@pytest.fixture
def exported(folder, theta, tmp_path, monkeypatch, capsys):
    """Runs the command; returns the file that it wrote and what it printed."""
    file = tmp_path / "erased.safetensors"
    settings = {"concepts": ["star"], "method": "esd-u", "model": "some/model", "anchor": None}
    erase.save(theta, file, settings)

    def run(form, *flags):
        out = tmp_path / ("folder" if form == "folder" else f"{form}.safetensors")
        monkeypatch.setattr("sys.argv", ["export.py", str(file), "--as", form, "--model",
                                         str(folder), "--out", str(out), *map(str, flags)])
        export.main()
        return out, capsys.readouterr().out

    run.file = file
    return run


def weights(model):
    return model.unet.state_dict()


def test_a_folder_and_a_single_file_are_the_erased_model(sd, folder, exported, monkeypatch):
    erased = sample.load_erased(sd, exported.file)
    out, _ = exported("folder")
    loaded = sample.load(out)
    for part in sample.PARTS:
        expected = getattr(erased, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    out, _ = exported("single")
    formats.read_as_small(folder, monkeypatch)
    loaded = sample.load(out, tokenizer=folder / "tokenizer")
    for part in sample.PARTS:
        expected = getattr(erased, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], expected[name].half().float()) for name in expected)


def test_the_official_form(sd, theta, exported):
    out, _ = exported("esd")
    found = load_file(out)
    assert found.keys() == theta.keys()
    assert all(torch.equal(found[name], theta[name]) for name in theta)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata == {"format": "erasing-esd-v2", "base_model_id": "some/model",
                        "train_method": "esd-u", "erase_concept": "star", "erase_from": "star"}


@pytest.mark.parametrize("error", [0.5, 0.05, 0.001])
def test_a_lora_is_the_change_to_the_stated_error(error, sd, theta, exported):
    """up @ down * alpha / rank, as kohya's form has it; convolutions, too."""
    out, printed = exported("lora", "--error", error)
    found, start = load_file(out), weights(sd)
    matrices = {name for name, tensor in theta.items() if tensor.ndim > 1}
    assert len(found) == 3 * len(matrices) and any(theta[name].ndim == 4 for name in matrices)
    assert f"; {len(theta) - len(matrices)} biases and norms" in printed
    worst = 0
    for name in matrices:
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down, alpha = (found[f"{layer}.{kind}"].float() for kind in (
            "lora_up.weight", "lora_down.weight", "alpha"))
        assert up.ndim == down.ndim == theta[name].ndim and up.shape[1] == len(down)
        product = (up.flatten(1) @ down.flatten(1) * alpha / len(down)).view_as(start[name])
        change = theta[name].float() - start[name]
        worst = max(worst, ((product - change).norm() / change.norm()).item())
    assert worst <= error + 1e-3  # float16 of the factors


def test_the_least_rank_is_taken():
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for error, rank in ((0.99, 1), (0.6, 1), (0.5, 2), (0.27, 2), (0.2, 3), (0, 3)):
        up, down = export.low_rank(a, error)
        assert up.shape == (3, rank) and down.shape == (rank, 3), error
        assert (up @ down - a).norm() <= error * a.norm() + 1e-5


def test_what_a_lora_cannot_hold_is_refused(sd, folder, tmp_path, monkeypatch, capsys):
    name, out = "conv_in.bias", tmp_path / "out.safetensors"
    for change, form, flags, says in (
            (1.0, "lora", [], "no weight matrix was changed"),
            (torch.inf, "esd", [], "aren't finite: nothing was written"),
            (1.0, "lora", ["--error", "2"], "error is 2.0, choose 0 to 1")):
        save_file({name: weights(sd)[name] + change}, tmp_path / "theta.safetensors")
        monkeypatch.setattr("sys.argv", [
            "export.py", str(tmp_path / "theta.safetensors"), "--as", form, "--model", str(folder),
            "--out", str(out), *flags])
        with pytest.raises(SystemExit):
            export.main()
        assert says in capsys.readouterr().err and not out.exists()


def test_an_existing_file_stays(exported, capsys):
    exported("lora")
    with pytest.raises(SystemExit):
        exported("lora")
    assert "can't be written: choose a new" in capsys.readouterr().err


def test_files_that_erase_did_not_write(sd, folder, tmp_path, monkeypatch):
    """The settings are unknown, the weights aren't."""
    save_file({"conv_in.bias": torch.ones(32)}, tmp_path / "other.safetensors")
    out = tmp_path / "esd.safetensors"
    monkeypatch.setattr("sys.argv", ["export.py", str(tmp_path / "other.safetensors"), "--as",
                                     "esd", "--model", str(folder), "--out", str(out)])
    export.main()
    assert load_file(out)["conv_in.bias"].tolist() == [1.0] * 32
    with safe_open(out, "pt") as opened:
        assert json.loads(json.dumps(opened.metadata()))["erase_concept"] == ""
