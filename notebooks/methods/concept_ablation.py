"""Concept ablation as published: the concept becomes its anchor, learned on the anchor's images.

    images = sample.generate(sd, ["a circle"], num=200, steps=20)
    data = partial(concept_ablation.data, latents=sd.encode_images(images))
    theta = erase.erase(
        sd, {"star": "circle"}, method=uce.keys_and_values,
        loss_fn=concept_ablation.loss, data=data,
    )

Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.13516 (eq. 5, and its code). It tunes the keys and values of
cross-attention. Symbols as in erase.py; a is the anchor.
"""

from typing import Callable, Iterator

import torch
from torch import Generator, Tensor

import ddim
from erase import Batch, Text
from sample import UsageError


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
         eta: float = 1.0) -> Tensor:
    """|| eps_theta(x_t, c, t) - sg[eps_theta(x_t, a, t)] ||^2 over each sample, (B,).

    The target is from the model in training itself, without a gradient. frozen and eta
    aren't used.
    """
    with torch.no_grad():
        target = unet(x_t, t, text.anchor)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    latents: Tensor,
) -> Iterator[Batch]:
    """Yields random images of the anchor, each noised to a random t of 0..999.

    latents: the images, (N, 4, H, W), for the only one of the texts. unet isn't used.
    Raises UsageError for several texts.
    """
    if len(texts) != 1:
        raise UsageError(f"concept ablation erases one concept, not {len(texts)}")

    abar = ddim.alphas_cumprod()
    while True:
        chosen = torch.randint(len(latents), shape[:1], generator=rng)
        t = torch.randint(ddim.TRAIN_STEPS, shape[:1], generator=rng)
        noise = torch.randn(shape, generator=rng).to(latents)

        x_t = ddim.add_noise(latents[chosen], noise, abar[t])
        yield Batch(x_t, t.to(x_t.device), texts[0])
