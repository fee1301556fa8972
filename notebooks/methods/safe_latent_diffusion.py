"""Safe Latent Diffusion: guidance that steers away from a concept and changes no weight.

    predictor = partial(
        safe_latent_diffusion.SafePredictor,
        concept=sd.encode(["star"]), safety=safe_latent_diffusion.SETTINGS["medium"],
    )
    images = sample.generate(sd, ["a red star"], predictor=predictor)

Schramowski et al., "Safe Latent Diffusion", CVPR 2023, https://arxiv.org/abs/2211.05105.
One of the ESD paper's baselines. Symbols as in ddim.py; s is the concept to
avoid.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

import ddim


class Safety(NamedTuple):
    """How strongly to steer away, and when."""

    delta: int  # steps, out of 50, before gamma is applied
    scale: float  # s_S
    threshold: float  # lambda
    momentum_scale: float  # s_m
    beta: float  # beta_m, the decay of nu


SETTINGS = {  # the paper's
    "weak": Safety(delta=15, scale=200, threshold=0.0, momentum_scale=0.0, beta=0.0),
    "medium": Safety(delta=10, scale=1000, threshold=0.01, momentum_scale=0.3, beta=0.4),
    "strong": Safety(delta=7, scale=2000, threshold=0.025, momentum_scale=0.5, beta=0.7),
    "max": Safety(delta=0, scale=5000, threshold=1.0, momentum_scale=0.5, beta=0.7),
}


def safe_direction(
    eps_null: Tensor, eps_c: Tensor, eps_s: Tensor, momentum: Tensor, safety: Safety
) -> tuple[Tensor, Tensor]:
    """Returns gamma, which is subtracted from the guidance, and the next momentum nu.

    All tensors are (B, 4, H, W).

    mu    = 0 where eps_c - eps_s >= lambda, else min(1, s_S |eps_c - eps_s|)
    gamma = mu (eps_s - eps_null) + s_m nu
    nu    = beta_m nu + (1 - beta_m) gamma

    The paper's eq. 6 has max(1, ...), which would never let mu be small; its code has
    min.
    """
    mu = (safety.scale * (eps_c - eps_s).abs()).clamp(max=1)
    mu = mu.where(eps_c - eps_s < safety.threshold, 0)
    gamma = mu * (eps_s - eps_null) + safety.momentum_scale * momentum
    return gamma, safety.beta * momentum + (1 - safety.beta) * gamma


class SafePredictor:
    """Guides as `ddim.guided_predictor` does, and away from `concept`, (1, 77, 768).

    eps = eps_null + guidance * (eps_c - eps_null - gamma); gamma from step delta on

    An object, since the momentum nu goes from step to step: each batch needs a new one.
    """

    def __init__(
        self, unet: Callable, text: Tensor, null: Tensor, guidance: float,
        concept: Tensor, safety: Safety = SETTINGS["medium"],
    ):
        """text and null are (B, 77, 768)."""
        self.unet = unet
        self.texts = torch.cat([null, text, concept.expand_as(text)])  # (3B, 77, 768)
        self.guidance = guidance
        self.safety = safety
        self.momentum = torch.zeros(())

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns eps, (B, 4, H, W). Called once for each t of a trajectory, in order."""
        eps_null, eps_c, eps_s = self.unet(torch.cat([x_t] * 3), t, self.texts).chunk(3)
        gamma, self.momentum = safe_direction(
            eps_null, eps_c, eps_s, momentum=self.momentum.to(x_t), safety=self.safety
        )
        # after delta of 50 steps; with fewer steps, from the same t on
        if t <= ddim.TRAIN_STEPS * (1 - self.safety.delta / 50):
            eps_c = eps_c - gamma
        return ddim.guide(eps_null, eps_c, self.guidance)
