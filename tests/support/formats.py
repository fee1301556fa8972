"""A model in every form in which Stable Diffusion v1 and its erased weights are published."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sample import PARTS, StableDiffusion

from . import small

COMPVIS = json.loads((small.REFERENCE / "compvis.json").read_text())  # its name -> ours, by part
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
          "text_encoder": "cond_stage_model.transformer."}
OF_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def part_weights(sd: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    return {part: getattr(sd, part).state_dict() for part in PREFIX}


# Folders

def vae_of_2022(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors, its attention under the names of 2022."""
    for new, old in OF_2022.items():
        weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                   for name, tensor in weights.items()}
    return weights


def text_on_disk(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's tensors as transformers 4 saved them."""
    named = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    return named | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def write_folder(folder: Path, to: Path, suffix: str, dtype: torch.dtype, old: bool) -> Path:
    """A copy of a model's folder with other file names, number format and tensor names."""
    shutil.copytree(folder, to)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model" if "safetensors" in suffix else "pytorch_model")):
        published, = (to / part).glob("*.safetensors")
        weights = {name: tensor.to(dtype) for name, tensor in load_file(published).items()}
        published.unlink()
        if old:
            weights = {"vae": vae_of_2022, "text_encoder": text_on_disk}.get(part, dict)(weights)
        save = torch.save if suffix.endswith("bin") else save_file
        save(weights, to / part / (stem + suffix))
    return to


# Single files in CompVis's format

def compvis_weights(sd: StableDiffusion, ema: bool = False) -> dict[str, Tensor]:
    """What a single file holds; with `ema`, the U-Net is in model_ema, and zeros in its place."""
    tensors = {}
    for part, weights in part_weights(sd).items():
        for theirs, ours in COMPVIS[part].items():
            if ours not in weights:  # the small text encoder has fewer layers
                continue
            tensor = weights[ours]
            if part == "vae" and "attn_1" in theirs and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # a 1x1 convolution
            tensors[PREFIX[part] + theirs] = tensor
    if ema:
        for theirs in COMPVIS["unet"]:
            flat = f"diffusion_model.{theirs}".replace(".", "")
            tensors[f"model_ema.{flat}"] = tensors[PREFIX["unet"] + theirs]
            tensors[PREFIX["unet"] + theirs] = torch.zeros_like(tensors[f"model_ema.{flat}"])
    return tensors | {
        "model_ema.decay": torch.tensor(0.9999),  # these two are in every file
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        **{name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "posterior_variance")}}


def read_as_small(folder: Path, monkeypatch) -> None:
    """Single files are taken for full-size ones; from here on, for ones of the folder's size."""
    for name, part in PARTS.items():
        config = json.loads((folder / name / "config.json").read_text())
        defaults = tuple(vars(part.module.config_from_json(config)).values())
        monkeypatch.setattr(part.config.__init__, "__defaults__", defaults)


class Stranger:
    """Pickles as a call of a function, which this machine needn't have."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def stand_in(monkeypatch, module: str, name: str) -> type:
    """A class that pickles as `module.name`, whether or not that module exists."""
    cls = type(name, (), {"__module__": module})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], name, cls)
    return cls


def write_ckpt(weights: dict[str, Tensor], file: Path, monkeypatch, zipped: bool = True) -> Path:
    """A .ckpt with the nine globals of the published ones, Lightning's and numpy's among them."""
    number = np.dtype("<f8")
    with monkeypatch.context() as patch:
        callback = stand_in(patch, "pytorch_lightning.callbacks.model_checkpoint",
                            "ModelCheckpoint")
        scalar = stand_in(patch, "numpy.core.multiarray", "scalar")
        patch.setitem(sys.modules, "numpy", np)  # which really has a dtype
        best = Stranger(scalar, number, b"\x00\x01\x02\x03\xff\xfe\x00\x00")
        torch.save({"epoch": 3, "global_step": 470000, "state_dict": weights,
                    "callbacks": {callback: {"best_model_score": best}},
                    "optimizer_states": [], "lr_schedulers": []}, file,
                   _use_new_zipfile_serialization=zipped)
    return file
