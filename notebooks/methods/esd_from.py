"""Erases a concept from a wider one and leaves the rest of it: "hat" from "cowboy".

    theta = esd_from.erase(sd, {"hat": ""}, wider="cowboy")

    python erase.py "hat" --anchor "cowboy" --loss notebooks.methods.esd_from:loss

From the official code since 2025 (--erase_from), not from the paper. Symbols as in
erase.py; a is the anchor, the wider concept.
"""

from typing import Callable, Sequence

import torch
from torch import Tensor

from erase import Text
from notebooks.methods import esd
from sample import StableDiffusion


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
         eta: float = 1.0) -> Tensor:
    """Returns (B,), the mean square of eps_theta(x_t, a, t) - target over each sample:

    target = eps_theta*(x_t, a, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)].

    eta is the official code's flag itself; without an anchor, that flag is eta + 1.
    """
    with torch.no_grad():
        direction = frozen(x_t, t, text.concept) - frozen(x_t, t, text.null)
        target = frozen(x_t, t, text.anchor) - eta * direction
    eps = unet(x_t, t, text.anchor)
    return (eps - target).square().mean(dim=(1, 2, 3))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    *, wider: str, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. settings: see `esd.erase`.

    wider: the concept that the others are taken out of, a above; x_t is drawn for it. The
    anchors of `concepts` and keep aren't used.
    """
    return esd.erase(
        sd, concepts, seed=seed, loss_fn=loss, drawn_for=wider, **settings
    )
