"""Our small models, the reference's answers to the same inputs, and the difference of the two."""

from typing import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import clip_text
import unet
import vae

from . import small

MODULES = {"unet": unet, "vae": vae, "text_encoder": clip_text}
CLASSES = {
    "unet": (unet.UNetConfig, unet.UNet),
    "vae": (vae.VAEConfig, vae.VAE),
    "text_encoder": (clip_text.TextConfig, clip_text.TextEncoder),
}


def clip_text_model() -> Tensor:
    """Returns the answer of transformers' text encoder to small.INPUTS."""
    config = CLIPTextConfig(**small.SMALL["text_encoder"])
    clip = small.filled(CLIPTextModel(config))
    return clip(*small.INPUTS["text_encoder"]).last_hidden_state


def small_model(part: str) -> nn.Module:
    """Returns our model of the small config, its weights filled in."""
    _, model = CLASSES[part]
    config = MODULES[part].config_from_json(small.SMALL[part])
    return small.filled(model(config))


# made at import, before a test can patch anything; copy a model before changing it
MODELS = {part: small_model(part) for part in CLASSES}
ANSWERS = load_file(small.REFERENCE / "outputs.safetensors")
ANSWERS["text_encoder"] = clip_text_model()


def functions(part: str, model: nn.Module) -> dict[str, Callable]:
    """Returns what a model computes: functions of their small.INPUTS, with one output each."""
    if part != "vae":
        return {part: model}

    def encode(image: Tensor) -> Tensor:
        return torch.cat(model.encode(image), dim=1)

    return {"vae.encode": encode, "vae.decode": model.decode}


def difference(part: str, model: nn.Module) -> float:
    """Returns the largest absolute difference between a model's outputs and the reference's."""
    largest = 0.0
    for name, function in functions(part, model).items():
        off = (function(*small.INPUTS[name]) - ANSWERS[name]).abs().max()
        largest = max(largest, off.item())
    return largest
