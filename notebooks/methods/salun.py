"""SalUn, in short: the concept becomes its anchor, in the weights that matter most for it.

    theta = salun.erase(sd, {"star": "a picture"}, keep=["heart", "moon"])

Fan et al., "SalUn", ICLR 2024, https://arxiv.org/abs/2310.12508, and its code. Simplified:
x_t is drawn by the model, not a noised image; the mask is from the gradient of the loss
below, not of the denoising error; prompts are kept at the same x_t, as the original
predicts them. Symbols as in erase.py; a is the anchor, p a prompt to keep.
"""

import functools
from itertools import islice
from typing import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor

from erase import SCALE, Batch, texts_for, trainable_copies, with_theta
from notebooks.methods import esd
from sample import StableDiffusion, UsageError


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: esd.Prompts,
         eta: float = 1.0, beta: float = 0.5) -> Tensor:
    """Returns (B,), the mean over each sample of

    || eps_theta(x_t, c, t) - sg[eps_theta(x_t, a, t)] ||^2
        + beta || eps_theta(x_t, p, t) - eps_theta*(x_t, p, t) ||^2

    sg: without a gradient. eta isn't used.
    """
    with torch.no_grad():
        target = unet(x_t, t, text.anchor)
        eps_p = frozen(x_t, t, text.kept)
    error = unet(x_t, t, text.concept) - target
    drift = unet(x_t, t, text.kept) - eps_p
    return (error.square() + beta * drift.square()).mean(dim=(1, 2, 3))


def saliency_mask(
    sd: StableDiffusion, method: str, batches: Iterable[Batch], fraction: float
) -> dict[str, Tensor]:
    """Returns by name which weights have the largest |gradient| of the loss, beta 0.

    fraction: of all that the method tunes, from 0 to 1.
    """
    theta = trainable_copies(sd.unet, esd.tuned_by(method))
    unet = with_theta(sd.unet, theta)
    for batch in batches:
        (SCALE * loss(unet, sd.unet, *batch, beta=0.0).mean()).backward()

    gradients = torch.cat([W.grad.abs().flatten() for W in theta.values()])
    rank = int((1 - fraction) * (len(gradients) - 1)) + 1  # from 1, of the smallest that is chosen
    least = gradients.kthvalue(rank).values
    if least == 0 and fraction < 1:
        raise UsageError(f"{1 - fraction:.0%} of the gradients or more are 0: use float32")
    return {name: W.grad.abs() >= least for name, W in theta.items()}


def masked_adam(theta: Iterable, lr: float, mask: dict[str, Tensor]) -> torch.optim.Adam:
    """Returns Adam for (name, weight) pairs; it leaves weights outside the mask alone.

    Where the gradient is always 0, so are Adam's moments. (With weight decay, they'd move.)
    """
    for name, W in theta:
        W.register_hook(functools.partial(torch.mul, mask[name]))  # on each gradient
    return torch.optim.Adam(theta, lr)


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str = "full", fraction: float = 0.5, mask_batches: int = 20, beta: float = 0.5,
    batch: int = 8, steps: int = 50, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name; without keep, the empty prompt is kept. settings: `esd.erase`'s."""
    data = functools.partial(
        esd.x_t_with_prompts, sd=sd, anchors=[*concepts.values()], keep=[*keep] or [""]
    )
    texts = texts_for(sd, [*concepts], batch)
    rng = Generator().manual_seed(seed)
    batches = data(sd.unet, texts, (batch, *sd.latent_shape), rng, steps=steps)
    mask = saliency_mask(sd, method, islice(batches, mask_batches), fraction)

    return esd.erase(
        sd, concepts, seed=seed, method=method, batch=batch, steps=steps, data=data,
        loss_fn=functools.partial(loss, beta=beta),
        optimizer=functools.partial(masked_adam, mask=mask), **settings,
    )
