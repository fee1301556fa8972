"""DDIM sampling for Stable Diffusion v1: the schedule, one step, guidance, the loop.

    predict = ddim.guided_predictor(unet, c, null, guidance=7.5)
    for t, x_t in ddim.denoise(predict, noise, steps=50):
        ...

Song et al., "Denoising Diffusion Implicit Models", ICLR 2021,
https://arxiv.org/abs/2010.02502
Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022,
https://arxiv.org/abs/2207.12598

Symbols: t time, from 0 (almost an image) to 999 (noise); x_t latent at time t; eps the
noise in it; abar alpha-bar of DDPM, which the DDIM paper calls alpha; c the prompt,
null the empty prompt. DDIM's own eta is always 0 here: sampling adds no noise, and
"eta" is free for ESD's strength.
"""

from typing import Callable, Iterator

import torch
from torch import Generator, Tensor

TRAIN_STEPS = 1000
MAX_STEPS = TRAIN_STEPS // 2  # 501 would have a stride of 1: times 501, 500, ..., 1
BETA_START = 0.00085  # Stable Diffusion v1's
BETA_END = 0.012


def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """Returns abar_t for t = 0..999, (1000,): how much of the variance is image at t.

    abar_t = product over s <= t of (1 - beta_s); sqrt(beta_s) is linear in s.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return torch.cumprod(1 - betas, dim=0).to(device)


def timesteps(steps: int) -> list[int]:
    """Returns the times of `steps` steps, noisiest first; of 50: 981, ..., 21, 1.

    Choose a divisor of 1000. For other numbers the times are diffusers', which takes
    exactly `steps` steps (CompVis's code takes more), and the first is lower: 799 for 400
    steps. For 1, 2 and 3 steps it is 1, 501 and 667, although sampling starts from noise.
    Raises ValueError outside 1..500.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}, choose 1 to {MAX_STEPS}")

    stride = TRAIN_STEPS // steps
    return [k * stride + 1 for k in reversed(range(steps))]  # + 1 as in SD's own code


def per_sample(abar: Tensor, x: Tensor) -> Tensor:
    """Returns abar, () or (B,), as (1, 1, 1, 1) or (B, 1, 1, 1), to multiply x by.

    In float32 or better, also for x in bfloat16, in which abar_0 would be 1.
    """
    dtype = torch.promote_types(abar.dtype, torch.float32)
    return abar.to(x.device, dtype).view(-1, 1, 1, 1)


def add_noise(x_0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """The forward process (DDIM, eq. 4): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

    x_0 and noise are (B, 4, H, W); abar_t is (B,), or () for the whole batch.
    """
    abar_t = per_sample(abar_t, x_0)
    x_t = abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise
    return x_t.to(x_0.dtype)


def predicted_x_0(x_t: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """Returns the x_0 that eps implies, (B, 4, H, W): DDIM, eq. 9, or eq. 4 solved for it.

    x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); abar_t is (B,) or ().
    """
    abar_t = per_sample(abar_t, x_t)
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return x_0.to(x_t.dtype)


def step(x_t: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """One step towards x_0 (DDIM, eq. 12 with sigma = 0); both abar are (B,) or ().

    x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev) eps
    """
    x_0 = predicted_x_0(x_t, eps, abar_t)
    return add_noise(x_0, eps, abar_prev)


def guide(eps_null: Tensor, eps_c: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, Eq. 3 of ESD: eps_null + guidance * (eps_c - eps_null).

    guidance is ESD's alpha, and 1 + w of Ho and Salimans; 1 follows the prompt alone.
    A negative prompt takes the place of the empty one.
    """
    return eps_null + guidance * (eps_c - eps_null)


def guided_predictor(
    unet: Callable, c: Tensor, null: Tensor, guidance: float
) -> Callable:
    """Returns a function predict(x_t, t) -> eps that is guided from `null` to `c`.

    c and null are (B, 77, 768); null is the empty prompt or a negative one. t is one
    time for the whole batch, (). Both predictions are made in one batch of 2B.
    """
    both = torch.cat([null, c])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_c = unet(torch.cat([x_t, x_t]), t, both).chunk(2)
        return guide(eps_null, eps_c, guidance)

    return predict


def denoise(
    predict: Callable, x_t: Tensor, steps: int, rng: Generator | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yields (t, x_t): for 50 steps (981, noise), ..., (1, x_1), (0, the result).

    x_t is (B, 4, H, W). predict(x_t, t) returns eps, as `guided_predictor`'s does; t is a
    tensor, (). Each step is computed only when the next pair is asked for: stop at t, and
    you pay for the steps so far; change the model in between, and the changed one takes
    the next step.
    rng: not used; a sampler that adds noise takes it in the same place.
    """
    abar = alphas_cumprod(x_t.device)
    for t in timesteps(steps):
        yield t, x_t
        # the last step ends at abar[0] = 0.99915, not at 1, as in Stable Diffusion's code
        t_prev = max(t - TRAIN_STEPS // steps, 0)
        # a tensor, as each new int would recompile a compiled U-Net
        t_tensor = torch.tensor(t, device=x_t.device)
        x_t = step(x_t, predict(x_t, t_tensor), abar[t], abar[t_prev])

    yield 0, x_t
