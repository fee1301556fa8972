"""Safe Latent Diffusion: guidance that steers away from a concept and changes no weight.

    away = safe_latent_diffusion.guided(sd.encode(["star"]), "medium")
    images = sample.generate(sd, ["a red star"], guided=away)

Schramowski et al., "Safe Latent Diffusion", CVPR 2023, https://arxiv.org/abs/2211.05105. One of
the two baselines in the ESD paper. Symbols as in ddim.py; s is the concept to avoid.
"""

from collections import namedtuple
from typing import Callable

import torch
from torch import Tensor

import ddim

# delta: steps, out of 50, before gamma counts; scale is s_S, threshold lambda, beta the decay of nu
Safety = namedtuple("Safety", "delta scale threshold momentum_scale beta")
SETTINGS = {  # the paper's
    "weak": Safety(15, 200, 0.0, 0.0, 0.0), "medium": Safety(10, 1000, 0.01, 0.3, 0.4),
    "strong": Safety(7, 2000, 0.025, 0.5, 0.7), "max": Safety(0, 5000, 1.0, 0.5, 0.7)}


def safe_direction(eps_null: Tensor, eps_c: Tensor, eps_s: Tensor, momentum: Tensor,
                   safety: Safety) -> tuple[Tensor, Tensor]:
    """Returns gamma, which is subtracted from the guidance, and the next momentum nu; (B, 4, H, W).

    mu    = 0 where eps_c - eps_s >= lambda, else min(1, s_S |eps_c - eps_s|)
    gamma = mu (eps_s - eps_null) + s_m nu
    nu    = beta_m nu + (1 - beta_m) gamma

    The paper's eq. 6 has max(1, ...), which would never let mu be small; its code has min.
    """
    mu = (safety.scale * (eps_c - eps_s).abs()).clamp(max=1)
    mu = mu.where(eps_c - eps_s < safety.threshold, 0)
    gamma = mu * (eps_s - eps_null) + safety.momentum_scale * momentum
    return gamma, safety.beta * momentum + (1 - safety.beta) * gamma


def guided(concept: Tensor, setting: str) -> Callable:
    """Returns a function like `ddim.guided` that also steers away from `concept`, (1, 77, 768):

    eps = eps_null + guidance * (eps_c - eps_null - gamma), where gamma counts from step delta on
    """
    safety = SETTINGS[setting]

    def guided_away(unet: Callable, text: Tensor, null: Tensor, guidance: float) -> Callable:
        three, momentum = torch.cat([null, text, concept.expand_as(text)]), torch.zeros(())

        def predict(x_t: Tensor, t: int) -> Tensor:
            nonlocal momentum  # so make a new function for each batch
            eps_null, eps_c, eps_s = unet(torch.cat([x_t] * 3), t, three).chunk(3)
            gamma, momentum = safe_direction(eps_null, eps_c, eps_s, momentum.to(x_t), safety)
            counts = t <= ddim.TRAIN_STEPS * (1 - safety.delta / 50)
            return ddim.guide(eps_null, eps_c - gamma if counts else eps_c, guidance)

        return predict

    return guided_away
