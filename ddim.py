"""DDIM sampling for Stable Diffusion v1: the noise schedule, one step, guidance, the whole way.

    for t, x_t in ddim.denoise(ddim.guided(unet, text, null, 7.5), noise, steps=50): ...

Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, https://arxiv.org/abs/2010.02502
Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598
Schramowski et al., "Safe Latent Diffusion", CVPR 2023, https://arxiv.org/abs/2211.05105

Symbols: t time, 0 (nearly a picture) to 999 (noise); x_t latent at time t; eps noise in it; abar
alpha-bar of DDPM, which the DDIM paper writes alpha; c, null the prompt and the empty prompt.
DDIM's own eta is 0 here, always: sampling adds no noise, and "eta" is free for ESD's strength.
"""

from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # of Stable Diffusion v1


def alphas_cumprod() -> Tensor:
    """abar_t for t = 0..999, (1000,): how much of the picture's variance is left at time t.

    abar_t = product over s <= t of (1 - beta_s); the betas are linear in their square root.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return torch.cumprod(1 - betas, dim=0)


def timesteps(steps: int) -> list[int]:
    """The times that `steps` steps visit, noisiest first; for 50: 981, 961, ..., 21, 1.

    Raises ValueError outside 1..999.
    """
    if not 1 <= steps < TRAIN_STEPS:
        raise ValueError(f"steps is {steps}, choose 1 to {TRAIN_STEPS - 1}")
    stride = TRAIN_STEPS // steps
    return [k * stride + 1 for k in reversed(range(steps))]  # + 1 as Stable Diffusion was run


def add_noise(x_0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """The forward process: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDIM, eq. 4).

    x_0 and noise (B, 4, H, W), abar_t (B,) or one for all, ().
    """
    precise = torch.promote_types(x_0.dtype, torch.float32)  # in bfloat16, abar_0 would be 1
    abar_t = abar_t.to(x_0.device, precise).view(-1, 1, 1, 1)
    return (abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise).to(x_0.dtype)


def step(x_t: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """One step towards the picture (DDIM, eq. 12 with sigma = 0); abar_t and abar_prev are ().

    x_0    = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev) eps
    """
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return abar_prev.sqrt() * x_0 + (1 - abar_prev).sqrt() * eps


def guide(eps_null: Tensor, eps_c: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, Eq. 3 of ESD: eps_null + scale * (eps_c - eps_null).

    A negative prompt takes the place of the empty one.
    """
    return eps_null + scale * (eps_c - eps_null)


def guided(unet: Callable, text: Tensor, null: Tensor, scale: float) -> Callable:
    """A function predict(x_t, t) -> eps, guided to `text` and away from `null`.

    text and null: (B, 77, 768); null may be the empty prompt or a negative one. Both predictions
    are made in one batch of 2B.
    """
    both = torch.cat([null, text])

    def predict(x_t: Tensor, t: int) -> Tensor:
        eps_null, eps_c = unet(torch.cat([x_t, x_t]), t, both).chunk(2)
        return guide(eps_null, eps_c, scale)

    return predict


class Safety(NamedTuple):
    """How Safe Latent Diffusion steers away from a concept; its symbols beside ours."""

    delta: int  # steps, out of 50, before it counts
    scale: float  # s_S
    threshold: float  # lambda
    momentum_scale: float  # s_m
    beta: float  # beta_m, decay of the momentum


SLD = {
    "weak": Safety(15, 200, 0.0, 0.0, 0.0),
    "medium": Safety(10, 1000, 0.01, 0.3, 0.4),
    "strong": Safety(7, 2000, 0.025, 0.5, 0.7),
    "max": Safety(0, 5000, 1.0, 0.5, 0.7),
}


def safe_direction(eps_null: Tensor, eps_c: Tensor, eps_s: Tensor, momentum: Tensor,
                   safety: Safety) -> tuple[Tensor, Tensor]:
    """gamma, what Safe Latent Diffusion takes away from the guidance, and the next momentum nu.

    mu    = 0 where eps_c - eps_s >= lambda, else min(1, s_S |eps_c - eps_s|)
    gamma = mu (eps_s - eps_null) + s_m nu
    nu    = beta_m nu + (1 - beta_m) gamma

    s is the concept to avoid; all are (B, 4, H, W). The paper's eq. 6 has max(1, ...), by which mu
    would never be small; min is what its code does.
    """
    mu = (safety.scale * (eps_c - eps_s).abs()).clamp(max=1)
    mu = mu.where(eps_c - eps_s < safety.threshold, 0)
    gamma = mu * (eps_s - eps_null) + safety.momentum_scale * momentum
    return gamma, safety.beta * momentum + (1 - safety.beta) * gamma


def safe_guided(unet: Callable, text: Tensor, null: Tensor, safe: Tensor, scale: float,
                safety: Safety) -> Callable:
    """As `guided`, and away from the concept `safe`, (B, 77, 768): Safe Latent Diffusion.

    eps = eps_null + scale * (eps_c - eps_null - gamma)

    gamma counts from step delta on. The function remembers the momentum: one for each way.
    """
    three, momentum = torch.cat([null, text, safe]), torch.zeros(())

    def predict(x_t: Tensor, t: int) -> Tensor:
        nonlocal momentum
        eps_null, eps_c, eps_s = unet(torch.cat([x_t] * 3), t, three).chunk(3)
        gamma, momentum = safe_direction(eps_null, eps_c, eps_s, momentum.to(x_t), safety)
        counts = t <= TRAIN_STEPS * (1 - safety.delta / 50)
        return guide(eps_null, eps_c - gamma if counts else eps_c, scale)

    return predict


def denoise(predict: Callable, x_t: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (t, x_t), (B, 4, H, W), from noise to picture: first (981, noise), last (0, x at 0).

    `predict(x_t, t)` gives eps, as the function that `guided` returns does.

    What comes after a pair is computed only when it is asked for, so a caller that stops at t has
    paid for the steps before t and no more.
    """
    abar = alphas_cumprod().to(x_t.device)
    for t in timesteps(steps):
        yield t, x_t
        t_prev = max(t - TRAIN_STEPS // steps, 0)  # the last step ends at abar[0], which isn't 1
        x_t = step(x_t, predict(x_t, t), abar[t], abar[t_prev])
    yield 0, x_t
