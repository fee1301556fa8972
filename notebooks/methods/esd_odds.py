"""ESD whose strength is the posterior odds of the concept: Eq. 6 with an eta for each x_t.

    theta = esd_odds.erase(sd, {"star": "a picture"}, prior=0.1)

Our variation. Where eta is p_t(c|x_t) / (1 - p_t(c|x_t)), Eq. 6's target is the eps of a
model that never saw the concept; draw with it at guidance 1. Odds while sampling: Koulischer et
al., "Dynamic Negative Guidance", https://arxiv.org/abs/2410.14398. On the miniature it
comes no nearer to such a model than ESD-u does, by more than chance: see
experiments/ground_truth.py. Symbols as in erase.py.
"""

import functools
from typing import Callable, Sequence

import torch
from torch import Generator, Tensor

import ddim
from erase import Text, esd_loss
from notebooks.methods import esd
from sample import StableDiffusion


@torch.no_grad()
def log_ratio(unet: Callable, x_t: Tensor, t: Tensor, c: Tensor, null: Tensor,
              jumps: int) -> Tensor:
    """Estimates log [p_t(x_t|c) / p_t(x_t)], (B,), from the model's predictions alone.

    Noises x_t further, in jumps, to t = 999, where c and null are taken to be equally likely.
    A jump goes from s to s', with noise n of its own. It is the same in every call, so the
    estimate depends on x_t and t alone, and its error doesn't average out. DDPM's reverse
    step (eq. 7 and 11) goes back, with either prompt. The log of how much likelier c's lands
    where x_s is than null's is

    (|n' - eps_null|^2 - |n' - eps_c|^2) (1 - alpha) / (2 alpha (1 - abar_s))

    where eps is predicted at s', alpha = abar_s' / abar_s, n' = n sqrt((1 - abar_s') /
    (1 - alpha)), and |.|^2 sums over a latent's elements. The sum over all jumps estimates
    the log ratio.
    """
    abar = ddim.alphas_cumprod(x_t.device)
    rng = Generator().manual_seed(0)
    total = 0
    for k in range(jumps):
        s = t + (ddim.TRAIN_STEPS - 1 - t) * k // jumps
        s_next = t + (ddim.TRAIN_STEPS - 1 - t) * (k + 1) // jumps
        alpha = abar[s_next] / abar[s]
        added = (1 - alpha).clamp(min=1e-9)  # 1 - alpha; near t = 999, jumps can be empty
        noise = torch.randn(x_t.shape, generator=rng).to(x_t)  # n
        x_t = ddim.add_noise(x_t, noise, alpha)

        scaled = ddim.per_sample((1 - abar[s_next]) / added, x_t).sqrt() * noise
        # scaled is n'
        error_null = (scaled - unet(x_t, s_next, null)).square()
        error_c = (scaled - unet(x_t, s_next, c)).square()
        gain = (error_null - error_c).sum(dim=(1, 2, 3))  # (B,)
        total = total + gain * added / (2 * alpha * (1 - abar[s]))
    return total


def loss(
    unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
    eta: float = 1.0, prior: float = 0.1, largest: float = 3.0, jumps: int = 8,
) -> Tensor:
    """Returns `erase.esd_loss`, (B,), with eta * min(odds, largest) in place of eta.

    odds = p / (1 - p), where p = p_t(c|x_t) = prior * p_t(x_t|c) / p_t(x_t). prior: P(c), the
    concept's share of all images.
    """
    ratio = log_ratio(frozen, x_t, t, text.concept, null=text.null, jumps=jumps)
    p = (prior * ratio.exp()).clamp(max=largest / (1 + largest))  # the odds are `largest` there
    odds = ddim.per_sample(p / (1 - p), x_t)
    return esd_loss(unet, frozen, x_t, t, text, eta * odds)


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    prior: float = 0.1, largest: float = 3.0, jumps: int = 8, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. Anchors and keep aren't used; settings: see `esd.erase`."""
    loss_fn = functools.partial(loss, prior=prior, largest=largest, jumps=jumps)
    return esd.erase(sd, concepts, seed=seed, loss_fn=loss_fn, **settings)
