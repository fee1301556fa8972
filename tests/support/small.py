"""What the tests share with by_hand/record_reference.py: small configs, inputs, weights.

Weights and inputs come from their names alone, so only the reference's outputs need storing.
"""

import json
import math
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

REFERENCE = Path(__file__).parents[1] / "reference"
PUBLISHED = json.loads((REFERENCE / "configs.json").read_text())  # v1.4's, from CompVis

# four levels and every other difference of the full size are kept
SMALL = {
    "unet": PUBLISHED["unet"] | {
        "block_out_channels": [32, 64, 96, 96],
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "vae": PUBLISHED["vae"] | {
        "block_out_channels": [16, 32, 48, 48],
        "norm_num_groups": 8,
    },
    "text_encoder": PUBLISHED["text_encoder"] | {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}
TIMESTEPS = [1, 3, 7, 20, 50, 60, 333]  # numbers of steps whose times are recorded
TRAJECTORIES = [3, 7, 20, 50]  # and those whose trajectories are recorded


def numbers(name: str, *shape: int) -> Tensor:
    """Normally distributed float64 numbers that depend on the name and the shape alone."""
    return torch.from_numpy(np.random.RandomState(crc32(name.encode())).randn(*shape))


def weight(name: str, shape: torch.Size) -> Tensor:
    """The value of a parameter: no two alike, no bias 0, no norm weight 1, activations near 1."""
    z = numbers(name, *shape)
    if len(shape) > 1:
        return 0.5 * z / math.sqrt(z[0].numel())
    is_norm = name.endswith(".weight")  # else it is a bias
    return 0.1 * z + (1 if is_norm else 0)


def filled(model: nn.Module) -> nn.Module:
    """The model in float64, every parameter set from its name."""
    model = model.double().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weight(name, tensor.shape))
    return model


def full_size_weights(model: nn.Module) -> dict[str, Tensor]:
    """A float32 value for every parameter of a model, from its name."""
    return {
        name: weight(name, parameter.shape).float()
        for name, parameter in model.named_parameters()
    }


# t is small: there the rounding of the sinusoids, which are float32, is worth 1e-8 and not 1e-6
INPUTS = {
    "unet": (numbers("x_t", 3, 4, 16, 8), torch.tensor([1, 2, 4]), numbers("text", 3, 10, 24)),
    "vae.encode": (0.5 * numbers("image", 2, 3, 32, 48),),
    "vae.decode": (numbers("latents", 2, 4, 4, 6),),
    "text_encoder": (torch.tensor([[98, 5, 17, 99, 99, 99], [98, 99, 99, 99, 99, 99]]),),
    "add_noise": (
        numbers("x_0", 2, 4, 2, 3),
        numbers("noise", 2, 4, 2, 3),
        torch.tensor([1, 981]),
    ),
    "denoise": (numbers("x_T", 2, 4, 2, 3),),
}
FULL_SIZE_INPUTS = {  # of images of 128x128 pixels, so that a run takes seconds
    "unet": (
        numbers("x_t", 1, 4, 16, 16).float(),
        torch.tensor([4]),
        numbers("text", 1, 77, 768).float(),
    ),
    "vae.encode": (0.5 * numbers("image", 1, 3, 64, 64).float(),),
    "vae.decode": (numbers("latents", 1, 4, 8, 8).float(),),
    "text_encoder": (torch.tensor([[49406, 320, 1674, 539, 320, 6829] + 71 * [49407]]),),
}


def toy_eps(x_t: Tensor, t: Tensor | int) -> Tensor:
    """Takes the U-Net's place in trajectories. Plain arithmetic, so it rounds alike everywhere."""
    return x_t / (1 + x_t * x_t) + int(t) / 1000


class FakeUNet:
    """Predicts the mean of the text plus x_t, and remembers the (batch, t) of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t: Tensor, t: Tensor | int, text: Tensor) -> Tensor:
        self.calls.append((len(x_t), t))
        return x_t + text.mean(dim=(1, 2))[:, None, None, None]


def setting(module: nn.Module) -> str | None:
    """Returns what a layer's weights don't tell about it, in words; None if there is nothing."""
    if isinstance(module, nn.GroupNorm):
        return f"{module.num_groups} groups, eps {module.eps}"
    if isinstance(module, nn.LayerNorm):
        return f"eps {module.eps}"
    if isinstance(module, nn.Conv2d):
        return f"kernel {module.kernel_size}, stride {module.stride}, padding {module.padding}"
    if hasattr(module, "to_q"):
        return f"heads {getattr(module, 'heads', 1)}"  # the VAE's attention has one head
    if hasattr(module, "q_proj"):
        heads = getattr(module, "heads", None) or module.num_heads  # the latter in transformers
        return f"heads {heads}"
    return None


def settings(model: nn.Module) -> dict[str, str]:
    """Returns the setting of each layer that has one, by the layer's name."""
    return {name: setting(layer) for name, layer in model.named_modules() if setting(layer)}


def shapes(model: nn.Module) -> dict[str, str]:
    """Returns the shape of each tensor, such as "320 4 3 3", by its name."""
    tensors = model.state_dict()
    return {name: " ".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
