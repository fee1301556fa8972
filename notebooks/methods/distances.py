"""How far apart are two models? By their predictions, and by the likelihood of each other's images.

    x_0 = sd.encode_images(images)                        # images that neither model drew
    distances.eps_distances(erased, never_saw, "a star", x_0)

    one, other = (distances.own_images(sd, "a star") for sd in (erased, never_saw))
    distances.fade(one, other).sum()

Two models that were trained alike, with other seeds, aren't at distance 0 either. So compare
a distance with that of such a pair. Symbols as in ddim.py.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

import ddim
from sample import StableDiffusion

TIMES = (101, 301, 501, 701, 901)


def noise_like(x_0: Tensor, seed: int) -> Tensor:
    """Returns noise of a latent's shape."""
    return torch.randn(x_0.shape, generator=Generator().manual_seed(seed)).to(x_0)


@torch.no_grad()
def eps_distances(
    one: StableDiffusion, other: StableDiffusion, prompt: str, x_0: Tensor, seed: int = 0
) -> list[float]:
    """Returns the mean |eps - eps'| at each of TIMES.

    Both get the same x_t: latents x_0, (B, 4, H, W), with the same noise added.
    """
    texts = [sd.encode([prompt]).expand(len(x_0), -1, -1) for sd in (one, other)]
    noise = noise_like(x_0, seed)
    abar = ddim.alphas_cumprod(x_0.device)

    distances = []
    for t in TIMES:
        x_t = ddim.add_noise(x_0, noise, abar[t])
        times = torch.full((len(x_0),), t, device=x_0.device)
        eps, eps_other = (sd.unet(x_t, times, c) for sd, c in zip((one, other), texts))
        distances.append((eps - eps_other).abs().mean().item())
    return distances


# ---- likelihood


@torch.no_grad()
def surprise(
    sd: StableDiffusion, prompt: str, x_0: Tensor, seed: int = 0, terms: int = 20
) -> Tensor:
    """Returns the terms of the negative ELBO of latents (B, 4, H, W), (terms, B).

    It is a bound on -log p(x_0 | c): how surprised a model is by x_0.

    Their sum estimates the bound, in nats, up to a constant:

        1/2 integral of || eps - eps_theta(x_t, c) ||^2 d(-log SNR_t)

    where || . ||^2 sums over a latent's elements and SNR_t = abar_t / (1 - abar_t): Kingma et
    al., "Variational Diffusion Models", section 5.1, https://arxiv.org/abs/2107.00630. Terms are
    equally spaced in log SNR, from t near 0 to t near 999, and share one noise.
    """
    text = sd.encode([prompt]).expand(len(x_0), -1, -1)
    noise = noise_like(x_0, seed)
    abar = ddim.alphas_cumprod(x_0.device)
    log_snr = (abar / (1 - abar)).log()
    width = (log_snr[0] - log_snr[-1]) / terms

    found = []
    for i in range(terms):
        middle = log_snr[0] - (i + 0.5) * width
        t = (log_snr - middle).abs().argmin().item()
        x_t = ddim.add_noise(x_0, noise, abar[t])
        times = torch.full((len(x_0),), t, device=x_0.device)
        error = (noise - sd.unet(x_t, times, text)).square().sum(dim=(1, 2, 3))
        found.append(0.5 * width * error)
    return torch.stack(found)


class OwnImages(NamedTuple):
    """Latents that a model drew of a prompt, without guidance."""

    sd: StableDiffusion
    prompt: str
    x_0: Tensor  # (B, 4, H, W)
    seed: int  # of the noise that `surprise` adds
    surprise: Tensor  # the model's own, (terms, B)


@torch.no_grad()
def own_images(
    sd: StableDiffusion, prompt: str, num: int = 32, seed: int = 0, steps: int = 20
) -> OwnImages:
    """Draws latents from a model's own p(x_0 | c), by DDIM without guidance."""
    text = sd.encode([prompt]).expand(num, -1, -1)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return sd.unet(x_t, t, text)

    noise = torch.randn((num, *sd.latent_shape), generator=Generator().manual_seed(seed))
    *_, (_, x_0) = ddim.denoise(predict, noise.to(sd.device), steps)
    known = surprise(sd, prompt, x_0, seed=seed + 1)
    return OwnImages(sd, prompt, x_0, seed=seed + 1, surprise=known)


def fade(one: OwnImages, other: OwnImages) -> Tensor:
    """Returns how much better each model knows its own images than the other does, in nats.

    (2, terms):

        E_{x of one} [s_other(x) - s_one(x)]      in the first row
        E_{x of other} [s_one(x) - s_other(x)]    in the second one

    with `surprise` for s. The sum of the first row estimates KL(one, other), that of the second
    KL(other, one). After FADE, Cho et al., https://arxiv.org/abs/2510.12981, which compares
    likelihoods both ways, too; ours are of latents, of one prompt, without guidance.
    """
    rows = []
    for own, foreign in ((one, other), (other, one)):
        strange = surprise(foreign.sd, own.prompt, own.x_0, seed=own.seed)
        rows.append((strange - own.surprise).mean(dim=1))
    return torch.stack(rows)
