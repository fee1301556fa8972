"""Concept ablation as published: the concept becomes its anchor, learned on the anchor's images.

    images = sample.generate(sd, ["a circle"], num=200, steps=20)
    theta = erase.erase(sd, {"star": "circle"}, method=uce.keys_and_values,
                        loss_fn=concept_ablation.loss, data=concept_ablation.data(sd, images))

Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.13516 (eq. 5, and its code). It tunes keys and values of cross-attention.
Symbols as in erase.py; a is the anchor.
"""

from typing import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

import ddim
from erase import Text
from sample import StableDiffusion


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
         eta: float = 1.0) -> Tensor:
    """|| eps_theta(x_t, c, t) - sg[eps_theta(x_t, a, t)] ||^2 over each sample, (B,).

    The target is the model in training itself, without a gradient; eta isn't used.
    """
    with torch.no_grad():
        target = unet(x_t, t, text.anchor)
    return (unet(x_t, t, text.concept) - target).square().mean(dim=(1, 2, 3))


def data(sd: StableDiffusion, images: list[Image.Image]) -> Callable:
    """Returns a function like `erase.own_ways`: x_t are images of the anchor, noised to any t."""
    latents, abar = sd.encode_images(images), ddim.alphas_cumprod()

    def noised(unet: Callable, texts: list[Text], shape: tuple, steps: int, guidance: float,
               rng: torch.Generator) -> Iterator[tuple]:
        while True:
            some = torch.randint(len(latents), shape[:1], generator=rng)
            t = torch.randint(ddim.TRAIN_STEPS, shape[:1], generator=rng)
            noise = torch.randn(shape, generator=rng).to(latents)
            yield ddim.add_noise(latents[some], noise, abar[t]), t.to(latents.device), texts[0]

    return noised
