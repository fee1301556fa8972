"""Forget-Me-Not, in short: pixels no longer attend to the concept's tokens.

    theta = forget_me_not.erase(sd, {"star": ""})

Zhang et al., "Forget-Me-Not", CVPR Workshops 2024, https://arxiv.org/abs/2303.17591
(attention resteering, and its code). Simplified: x_t is drawn by the model, not a noised
image; the concept isn't inverted into tokens of its own first; all words of its prompt
count, also those of "a picture in the style of" (its code: the concept's alone); each
sample has its own norm; no weight decay, and gradients aren't clipped. On the miniature,
use method="esd-x" and end=False: its code's settings erase other objects before the
concept. Symbols as in erase.py.
"""

import functools
from typing import Callable, Sequence

import torch
from torch import Tensor

from erase import Text
from notebooks.methods import esd
from sample import StableDiffusion
from unet import Attention


def tokens_of(sd: StableDiffusion, prompt: str, end: bool) -> list[int]:
    """Returns the places of a prompt's words and, with `end`, of its first end token."""
    count = len(sd.tokenizer(prompt).input_ids)  # with start and end
    return [*range(1, count if end else count - 1)]


def keep_map(layer: Attention, inputs: tuple[Tensor, Tensor], out: Tensor, maps: list) -> None:
    """A forward hook: appends softmax(Q K^T / sqrt(d)), (B, h, N, 77), to maps.

    It is computed once more, since fused attention has no map. The hook changes nothing.
    """
    x, context = inputs
    q = layer.to_q(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # (B, h, N, d)
    k = layer.to_k(context).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))


def attention_maps(sd: StableDiffusion, unet: Callable, *inputs: Tensor) -> list[Tensor]:
    """Returns the map of each cross-attention layer; unet is sd's with any theta.

    While it is called, the layers of `sd.unet` hold that theta.
    """
    maps = []
    hook = functools.partial(keep_map, maps=maps)
    layers = [m for name, m in sd.unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        unet(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def loss(
    unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
    eta: float = 1.0, *, sd: StableDiffusion, tokens: Sequence[list[int]],
) -> Tensor:
    """Returns the norm of all attention to the concept's tokens, (B,).

    tokens: for each concept, the positions of its prompt's words. frozen and eta aren't used.
    """
    maps = attention_maps(sd, unet, x_t, t, text.concept)
    chosen = [each[..., tokens[text.index]].flatten(1) for each in maps]
    return torch.cat(chosen, dim=1).norm(dim=1)


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str = "full", end: bool = True, lr: float = 2e-6, iterations: int = 35, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. Anchors and keep aren't used; settings: see `esd.erase`."""
    tokens = [tokens_of(sd, prompt, end) for prompt in concepts]
    return esd.erase(
        sd, concepts, seed=seed, method=method, lr=lr, iterations=iterations,
        loss_fn=functools.partial(loss, sd=sd, tokens=tokens), **settings,
    )
