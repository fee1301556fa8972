"""A model in every form in which Stable Diffusion v1 and its erased weights are published."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sample import StableDiffusion

from . import small

COMPVIS = json.loads((small.REFERENCE / "compvis.json").read_text())  # theirs -> ours, by part
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
OF_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
PICKLED = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "pytorch_model",
}


def part_weights(sd: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each part."""
    return {part: getattr(sd, part).state_dict() for part in PREFIX}


def same_tensors(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two dicts of tensors are the same, to the bit and the dtype."""
    if weights.keys() != others.keys():
        return False
    for name, tensor in weights.items():
        if tensor.dtype != others[name].dtype or not torch.equal(tensor, others[name]):
            return False
    return True


def equal(sd: StableDiffusion, other: StableDiffusion) -> bool:
    """Whether two models are the same, to the bit and the dtype."""
    weights, others = part_weights(sd), part_weights(other)
    return all(same_tensors(weights[part], others[part]) for part in PREFIX)


# ---- folders


def vae_of_2022(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the VAE's tensors, its attention under the names of 2022."""
    for new, old in OF_2022.items():
        weights = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
            for name, tensor in weights.items()
        }
    return weights


def text_on_disk(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the text encoder's tensors as transformers 4 saved them."""
    named = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    return named | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


OLD_NAMES = {"unet": dict, "vae": vae_of_2022, "text_encoder": text_on_disk}


def write_folder(folder: Path, to: Path, suffix: str, dtype: torch.dtype, old: bool) -> Path:
    """Copies a model's folder with other file names, number format and tensor names."""
    shutil.copytree(folder, to)
    for part in PREFIX:
        published, = (to / part).glob("*.safetensors")
        stem = published.stem if suffix.endswith(".safetensors") else PICKLED[part]
        weights = {name: tensor.to(dtype) for name, tensor in load_file(published).items()}
        published.unlink()

        if old:
            weights = OLD_NAMES[part](weights)
        save = save_file if suffix.endswith(".safetensors") else torch.save
        save(weights, to / part / f"{stem}{suffix}")
    return to


# ---- single files in CompVis's format


def compvis_part(part: str, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors of a part as CompVis's code has them."""
    tensors = {}
    for theirs, ours in COMPVIS[part].items():
        if ours not in weights:  # the small text encoder has fewer layers
            continue
        tensor = weights[ours]
        if part == "vae" and "attn_1" in theirs and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a 1x1 convolution
        tensors[prefix + theirs] = tensor
    return tensors


def compvis_weights(sd: StableDiffusion, ema: bool = False) -> dict[str, Tensor]:
    """Returns what a single file holds.

    With ema, the U-Net is in model_ema, and zeros are in its place.
    """
    tensors = {}
    for part, weights in part_weights(sd).items():
        tensors |= compvis_part(part, weights, PREFIX[part])

    if ema:
        for theirs in COMPVIS["unet"]:
            flat = f"diffusion_model.{theirs}".replace(".", "")
            tensors[f"model_ema.{flat}"] = tensors[PREFIX["unet"] + theirs]
            tensors[PREFIX["unet"] + theirs] = torch.zeros_like(tensors[f"model_ema.{flat}"])

    schedule = ("betas", "alphas_cumprod", "posterior_variance")
    tensors |= {name: torch.zeros(1000) for name in schedule}
    return tensors | {
        "model_ema.decay": torch.tensor(0.9999),  # these two are in every file
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


class Stranger:
    """Pickles as a call of a function, which this machine needn't have."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """Returns a class that pickles as `module.name`, whether or not that module exists."""
    cls = type(name, (), {"__module__": module})
    words = module.split(".")
    for i in range(1, len(words) + 1):
        package = ".".join(words[:i])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, cls)
    return cls


def write_ckpt(
    weights: dict[str, Tensor], file: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool = True
) -> Path:
    """Writes a .ckpt with the nine globals of the published ones, Lightning's and numpy's too."""
    number = np.dtype("<f8")
    with monkeypatch.context() as patch:
        lightning = "pytorch_lightning.callbacks.model_checkpoint"
        callback = stand_in(patch, lightning, "ModelCheckpoint")
        scalar = stand_in(patch, "numpy.core.multiarray", "scalar")
        patch.setitem(sys.modules, "numpy", np)  # which really has a dtype
        best = Stranger(scalar, number, b"\x00\x01\x02\x03\xff\xfe\x00\x00")
        content = {
            "epoch": 3,
            "global_step": 470000,
            "state_dict": weights,
            "callbacks": {callback: {"best_model_score": best}},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file


# ---- erased weights


def nested(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns {module: {name: tensor}}, as the demo of the official code saves."""
    modules = {}
    for name, tensor in weights.items():
        module, kind = name.rsplit(".", 1)
        modules.setdefault(f"unet.{module}", {})[kind] = tensor
    return modules


def compvis_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a U-Net's tensors as in a whole checkpoint."""
    return compvis_part("unet", weights, PREFIX["unet"])


def cross_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what ESD-x tunes."""
    return {name: tensor for name, tensor in weights.items() if "attn2" in name}
