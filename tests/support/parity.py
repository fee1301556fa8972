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
    """What transformers' text encoder answers to small.INPUTS."""
    clip = small.filled(CLIPTextModel(CLIPTextConfig(**small.SMALL["text_encoder"])))
    return clip(*small.INPUTS["text_encoder"]).last_hidden_state


# made at import, before a test can patch anything; copy a model before changing it
MODELS = {part: small.filled(model(MODULES[part].config_from_json(small.SMALL[part])))
          for part, (_, model) in CLASSES.items()}
ANSWERS = {**load_file(small.REFERENCE / "outputs.safetensors"), "text_encoder": clip_text_model()}


def functions(part: str, model: nn.Module) -> dict[str, Callable]:
    """What a model computes, each a function of its small.INPUTS with one output."""
    if part == "vae":
        return {"vae.encode": lambda image: torch.cat(model.encode(image), dim=1),
                "vae.decode": model.decode}
    return {part: model}


def difference(part: str, model: nn.Module) -> float:
    """The largest absolute difference between a model's outputs and the reference's."""
    return max((function(*small.INPUTS[name]) - ANSWERS[name]).abs().max().item()
               for name, function in functions(part, model).items())
