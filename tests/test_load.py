"""Loading one model of a folder: strict, uncopied, under every published name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import clip_text
import parity
import sample
import small
import vae
from parity import MODELS

RENAME = {"unet": {}, "vae": {"rename": vae.rename},
          "text_encoder": {"rename": clip_text.rename}}


def save(folder: Path, part: str, weights: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(small.SMALL[part]))
    save_file(weights, folder / "model.safetensors")


def load(folder: Path, part: str) -> nn.Module:
    return sample.load_part(folder, "model.safetensors", *parity.CLASSES[part], **RENAME[part])


@pytest.mark.parametrize("part", MODELS)
def test_what_is_saved_is_loaded(part, tmp_path):
    weights = MODELS[part].state_dict()
    save(tmp_path, part, weights)
    loaded = load(tmp_path, part).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("part", MODELS)
def test_tensors_are_taken_uncopied_and_frozen(part, tmp_path, monkeypatch):
    weights = MODELS[part].state_dict()
    save(tmp_path, part, weights)
    monkeypatch.setattr(sample, "read_tensors", lambda file: weights)
    loaded = load(tmp_path, part)
    assert all(parameter.data_ptr() == weights[name].data_ptr() and not parameter.requires_grad
               for name, parameter in loaded.named_parameters())


def test_text_encoder_may_have_the_names_on_disk(tmp_path):
    weights = MODELS["text_encoder"].state_dict()
    on_disk = {f"text_model.{name}": weight for name, weight in weights.items()}
    on_disk["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save(tmp_path, "text_encoder", on_disk)
    tokens, = small.INPUTS["text_encoder"]
    loaded = load(tmp_path, "text_encoder")
    assert torch.equal(loaded(tokens), MODELS["text_encoder"](tokens))


def test_vae_may_have_the_names_of_2022(tmp_path):
    weights = MODELS["vae"].state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    on_disk = dict(weights)
    for part in ("encoder", "decoder"):
        for new_name, old_name in old.items():
            for kind in ("weight", "bias"):
                path = f"{part}.mid_block.attentions.0"
                on_disk[f"{path}.{old_name}.{kind}"] = on_disk.pop(f"{path}.{new_name}.{kind}")
    save(tmp_path, "vae", on_disk)
    loaded = load(tmp_path, "vae").state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def without_one(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: weights[other] for other in weights if other != name}


def with_one_more(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return weights | {f"{name}.unknown": torch.zeros(1)}


def with_one_shorter(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return weights | {name: weights[name][:-1].clone()}


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("change", [without_one, with_one_more, with_one_shorter])
def test_a_file_that_does_not_fit_is_refused_by_name(change, part, tmp_path):
    weights = MODELS[part].state_dict()
    name = next(reversed(weights))
    save(tmp_path, part, change(weights, name))
    with pytest.raises(ValueError, match=name):
        load(tmp_path, part)
