r"""ESD that keeps the empty prompt's prediction, so that guidance doesn't bring a concept back.

    theta = keep_empty_prompt.erase(sd, {"circle": "a picture"}, iterations=1500)

    python erase.py "circle" --method esd-u --iterations 1500 \
        --loss notebooks.methods.keep_empty_prompt:loss

Our variation. Eq. 6 says nothing of eps_theta(x_t, t), and ESD-u moves it, too: images are
drawn with eps_null + g (eps_c - eps_null), in which the concept can come back as g grows.
A step has two aims, so take 1.5 times as many steps: on the miniature, 240. What a prompt
implies without its name is erased less. Symbols as in erase.py.
"""

import functools
from typing import Callable, Sequence

import torch
from torch import Tensor

from erase import Text, esd_target
from notebooks.methods import esd
from sample import StableDiffusion


def loss(
    unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
    eta: float = 1.0, weight: float = 1.0,
) -> Tensor:
    """Returns (B,), the mean over each sample of

    || eps_theta(x_t, c, t) - target ||^2
        + weight || eps_theta(x_t, t) - eps_theta*(x_t, t) ||^2

    with Eq. 6's target, which has eps_theta*(x_t, t), too: it is computed once.
    """
    with torch.no_grad():
        eps_null = frozen(x_t, t, text.null)
        target = esd_target(eps_null, frozen(x_t, t, text.concept), eta)

    error = unet(x_t, t, text.concept) - target
    drift = unet(x_t, t, text.null) - eps_null
    return (error.square() + weight * drift.square()).mean(dim=(1, 2, 3))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str = "esd-u", weight: float = 1.0, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. Anchors and keep aren't used; settings: see `esd.erase`."""
    loss_fn = functools.partial(loss, weight=weight)
    return esd.erase(sd, concepts, seed=seed, method=method, loss_fn=loss_fn, **settings)
