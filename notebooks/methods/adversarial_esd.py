"""ESD against learned prompts: attacks the model before each step, and erases what it found.

    loss = adversarial_esd.against(keep=sd.encode(["a heart", "a moon"]))
    theta = erase.erase(sd, ["star"], method="esd-u", loss_fn=loss)

The attack: Huang et al., "Receler", ECCV 2024, https://arxiv.org/abs/2311.17717 (16 learned tokens
after the prompt's). The term for prompts to keep: Zhang et al., "AdvUnlearn", NeurIPS 2024,
https://arxiv.org/abs/2405.15234. Symbols as in erase.py; p is a prompt to keep.
"""

from typing import Callable

import torch
from torch import Tensor

import erase
from erase import Text


def attack(unet: Callable, target: Tensor, x_t: Tensor, t: Tensor, c: Tensor, tokens: int,
           steps: int, lr: float) -> Tensor:
    """Returns c with learned tokens after it, (B, 77 + tokens, 768), with which the edited model
    predicts what the original predicts for the concept:

    min over delta of || eps_theta(x_t, [c, delta], t) - eps_theta*(x_t, c, t) ||^2
    """
    rng = torch.Generator().manual_seed(0)  # tokens that start alike would stay alike
    delta = torch.rand(len(c), tokens, c.shape[2], generator=rng).to(c.device).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr)
    for _ in range(steps):
        eps = unet(x_t, t, torch.cat([c, delta.to(c.dtype)], dim=1))
        delta.grad, = torch.autograd.grad((eps - target).square().mean(), delta)
        optimizer.step()
    return torch.cat([c, delta.detach().to(c.dtype)], dim=1)


def against(keep: Tensor, weight: float = 0.3, tokens: int = 16, steps: int = 50,
            lr: float = 0.1) -> Callable:
    """Returns a loss for `erase.erase`; keep: the features of prompts to keep, (P, 77, 768).

    || eps_theta(x_t, [c, delta], t) - target ||^2
        + weight || eps_theta(x_t, p, t) - eps_theta*(x_t, p, t) ||^2,

    with Eq. 6's target and a random p for each sample.
    """
    rng = torch.Generator().manual_seed(0)

    def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
             eta: float = 1.0) -> Tensor:
        with torch.no_grad():
            eps_null, eps_c = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)
            p = keep[torch.randint(len(keep), (len(x_t),), generator=rng)]
            kept = frozen(x_t, t, p)
        attacked = attack(unet, eps_c, x_t, t, text.concept, tokens, steps, lr)
        error = unet(x_t, t, attacked) - erase.esd_target(eps_null, eps_c, eta)
        drift = unet(x_t, t, p) - kept
        return (error.square() + weight * drift.square()).mean(dim=(1, 2, 3))

    return loss
