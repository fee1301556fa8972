"""Concept ablation, in short: the concept becomes its anchor, learned on the anchor's images.

    theta = concept_ablation.erase(sd, {"star": "circle"}, image_steps=20)

Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.13516 (eq. 5, and its code for diffusers). It tunes the keys and
values of cross-attention. Simplified: one concept; all images are of one anchor prompt
(the code: of many, for an object written by a language model), neither cropped nor
flipped; Adam without weight decay; lr and batch are those of `erase.erase`. Symbols as
in erase.py; a is the anchor.
"""

import functools
from typing import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

import ddim
import erase as training
import sample
from erase import Batch, Text
from notebooks.methods import esd
from sample import StableDiffusion, UsageError


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
         eta: float = 1.0) -> Tensor:
    """Returns (B,), the mean over each sample of

    || eps_theta(x_t, c, t) - sg[eps_theta(x_t, a, t)] ||^2

    The target is from the model in training itself, without a gradient. frozen and eta
    aren't used.
    """
    with torch.no_grad():
        target = unet(x_t, t, text.anchor)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


def check_single(concepts: Sequence) -> None:
    """Raises UsageError unless there is one concept, given as prompts or texts."""
    if len(concepts) != 1:
        raise UsageError(f"concept ablation erases one concept, not {len(concepts)}")


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    latents: Tensor,
) -> Iterator[Batch]:
    """Yields random images of the anchor, each noised to a random t of 0..999.

    latents: the anchor's images, (N, 4, H, W); there must be one text. unet isn't used.
    Raises UsageError for several texts.
    """
    check_single(texts)
    abar = ddim.alphas_cumprod()
    while True:
        chosen = torch.randint(len(latents), shape[:1], generator=rng)
        t = torch.randint(ddim.TRAIN_STEPS, shape[:1], generator=rng)
        noise = torch.randn(shape, generator=rng).to(latents)

        x_t = ddim.add_noise(latents[chosen], noise, abar[t])
        yield Batch(x_t, t.to(x_t.device), texts[0])


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str = "esd-x-strict", images: int = 200, image_steps: int = 50,
    image_guidance: float = 7.5, iterations: int = 100, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. settings: those of `erase.erase`, such as lr and batch.

    concepts: one {prompt: anchor}. First, `images` images of the anchor are drawn, from
    seed. keep isn't used. Raises UsageError for several concepts.
    """
    check_single(concepts)
    drawn = sample.generate(
        sd, [*concepts.values()], num=images, seed=seed,
        steps=image_steps, guidance=image_guidance,
    )
    latents = sd.encode_images(drawn)
    return training.erase(
        sd, concepts, method=esd.tuned_by(method), seed=seed, iterations=iterations,
        loss_fn=loss, data=functools.partial(data, latents=latents), **settings,
    )
