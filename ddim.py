"""DDIM sampling for Stable Diffusion v1: the noise schedule, one step, guidance, the loop.

    for t, x_t in ddim.denoise(ddim.guided(unet, text, null, 7.5), noise, steps=50): ...

Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, https://arxiv.org/abs/2010.02502
Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598

Symbols: t time, from 0 (almost an image) to 999 (noise); x_t latent at time t; eps the noise in
it; abar alpha-bar of DDPM, which the DDIM paper calls alpha; c the prompt, null the empty prompt.
DDIM's own eta is always 0 here: sampling adds no noise, and "eta" is free for ESD's strength.
"""

from typing import Callable, Iterator

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion v1's
SCHEDULE = {  # under each of these names a checkpoint may say how it was trained
    "num_train_timesteps": TRAIN_STEPS, "beta_schedule": "scaled_linear", "beta_start": BETA_START,
    "beta_end": BETA_END, "trained_betas": None, "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon", "modelspec.prediction_type": "epsilon", "parameterization": "eps",
}


def check_schedule(said: dict) -> None:
    """Raises ValueError where a checkpoint's settings name another schedule than SCHEDULE."""
    if other := [f"{key} is {said[key]}, not {value}" for key, value in SCHEDULE.items()
                 if said.get(key, value) != value]:
        raise ValueError(f"this isn't Stable Diffusion v1's schedule: {', '.join(other)}")


def alphas_cumprod() -> Tensor:
    """Returns abar_t for t = 0..999, (1000,): the share of the variance that is still image at t.

    abar_t = product over s <= t of (1 - beta_s); the betas are linear in their square root.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return torch.cumprod(1 - betas, dim=0)


def timesteps(steps: int) -> list[int]:
    """Returns the times that `steps` steps visit, noisiest first; for 50: 981, 961, ..., 21, 1.

    Raises ValueError outside 1..999.
    """
    if not 1 <= steps < TRAIN_STEPS:
        raise ValueError(f"steps is {steps}, choose 1 to {TRAIN_STEPS - 1}")
    stride = TRAIN_STEPS // steps
    return [k * stride + 1 for k in reversed(range(steps))]  # + 1 as in Stable Diffusion's code


def add_noise(x_0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """The forward process: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDIM, eq. 4).

    x_0 and noise are (B, 4, H, W); abar_t is (B,), or () for the whole batch.
    """
    precise = torch.promote_types(x_0.dtype, torch.float32)  # in bfloat16, abar_0 would be 1
    abar_t = abar_t.to(x_0.device, precise).view(-1, 1, 1, 1)
    return (abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise).to(x_0.dtype)


def step(x_t: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """One step towards the image (DDIM, eq. 12 with sigma = 0); abar_t and abar_prev are ().

    x_0    = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev) eps
    """
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return abar_prev.sqrt() * x_0 + (1 - abar_prev).sqrt() * eps


def guide(eps_null: Tensor, eps_c: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, Eq. 3 of ESD: eps_null + guidance * (eps_c - eps_null).

    A negative prompt takes the place of the empty one.
    """
    return eps_null + guidance * (eps_c - eps_null)


def guided(unet: Callable, text: Tensor, null: Tensor, guidance: float) -> Callable:
    """Returns a function predict(x_t, t) -> eps that is guided towards `text`, away from `null`.

    text and null are (B, 77, 768); null is the empty prompt or a negative one. Both predictions
    are made in one batch of 2B.
    """
    both = torch.cat([null, text])

    def predict(x_t: Tensor, t: int) -> Tensor:
        eps_null, eps_c = unet(torch.cat([x_t, x_t]), t, both).chunk(2)
        return guide(eps_null, eps_c, guidance)

    return predict


def denoise(predict: Callable, x_t: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (t, x_t), (B, 4, H, W), from noise to image: first (981, noise), last (0, x at 0).

    `predict(x_t, t)` returns eps, as the function from `guided` does. Each step is computed only
    when the next pair is asked for, so a caller that stops at t pays only for the steps so far.
    """
    abar = alphas_cumprod().to(x_t.device)
    for t in timesteps(steps):
        yield t, x_t
        t_prev = max(t - TRAIN_STEPS // steps, 0)  # the last step ends at abar[0], which isn't 1
        x_t = step(x_t, predict(x_t, t), abar[t], abar[t_prev])
    yield 0, x_t
