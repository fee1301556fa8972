"""Mixtures of Gaussians as models: their eps is exact, so that theory can be checked.

    model = plane.Mixture(means, variances)
    predict = plane.erased_predictor(model, c, null=null, eta=1.0)
    x_0 = plane.draw(predict, noise, steps=200)

N points are latents of one pixel, (N, D, 1, 1). A prompt is how much of each Gaussian it
asks for, (K,); null has the weights of the whole mixture. So ddim.py and erase.py take a
mixture as they take a U-Net. Points are float64, the schedule is ddim.py's; symbols as in
erase.py.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

import ddim
import erase


class Mixture(NamedTuple):
    """K Gaussians in D dimensions; called as a U-Net is, it returns the exact eps."""

    means: Tensor  # (K, D)
    variances: Tensor  # (K,)

    def log_density(self, x_t: Tensor, abar_t: Tensor, c: Tensor) -> Tensor:
        """Returns log p_t(x_t | c), (N,); abar_t is (N,) or (), 1 for images without noise.

        p_t(x_t | c) = sum over k of c_k N(x_t; sqrt(abar_t) mean_k, v_k)
        v_k          = abar_t variance_k + 1 - abar_t
        """
        abar_t = abar_t.view(-1, 1)
        v = abar_t * self.variances + 1 - abar_t  # (N or 1, K)
        offsets = x_t[:, None, :, 0, 0] - abar_t.sqrt()[:, :, None] * self.means  # (N, K, D)

        dimensions = self.means.shape[1]
        log_scale = dimensions * (2 * torch.pi * v).log() / 2
        log_normal = -offsets.square().sum(dim=2) / (2 * v) - log_scale  # (N, K)
        return (c.log() + log_normal).logsumexp(dim=1)

    def __call__(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Returns eps = -sqrt(1 - abar_t) grad log p_t(x_t | c), of x_t's shape."""
        abar_t = abar(t)
        score = torch.func.grad(lambda x: self.log_density(x, abar_t, c).sum())(x_t)
        return -(1 - abar_t).sqrt().view(-1, 1, 1, 1) * score


def abar(t: Tensor | int) -> Tensor:
    """Returns abar_t in float64."""
    return ddim.alphas_cumprod().double()[t]


def odds(
    x_t: Tensor, t: Tensor, model: Mixture, c: Tensor, null: Tensor, prior: float
) -> Tensor:
    """Returns p_t(c | x_t) / (1 - p_t(c | x_t)), (N, 1, 1, 1); prior is P(c), c's share of null.

    odds = P(c) p_t(x_t | c) / [p_t(x_t) - P(c) p_t(x_t | c)], by Bayes; the denominator is
    the mixture with weights null - P(c) c.
    """
    inside = model.log_density(x_t, abar(t), prior * c)
    outside = model.log_density(x_t, abar(t), (null - prior * c).clamp(min=0))
    return (inside - outside).exp().view(-1, 1, 1, 1)


def erased_predictor(
    model: Callable, c: Tensor, null: Tensor, eta: float | Callable
) -> Callable:
    """Returns predict(x_t, t), Eq. 6's target; eta is a number or a function of x_t and t."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        strength = eta(x_t, t) if callable(eta) else eta
        return erase.esd_target(model(x_t, t, null), model(x_t, t, c), strength)

    return predict


def draw(predict: Callable, noise: Tensor, steps: int) -> Tensor:
    """Returns the images that DDIM makes of noise, (N, D, 1, 1): (N, D)."""
    *_, (_, x_0) = ddim.denoise(predict, noise, steps)
    return x_0[:, :, 0, 0]
