r"""ESD against learned prompts: attacks the model before each step, and erases what it found.

    theta = adversarial_esd.erase(sd, {"star": ""}, keep=["a heart", "a moon"])

    python erase.py "star" --method esd-u --loss notebooks.methods.adversarial_esd:loss \
        --data notebooks.methods.adversarial_esd:data

The attack: Huang et al., "Receler", ECCV 2024, https://arxiv.org/abs/2311.17717 (16
learned tokens after the prompt's). The term for prompts to keep: Zhang et al.,
"AdvUnlearn", NeurIPS 2024, https://arxiv.org/abs/2405.15234. Simplified: the learned tokens
are appended after all 77 and learned anew in each step (Receler's overwrite the end token
and padding, right after the word, and are carried over from step to step, with weight
decay); theta are weights of the U-Net (Receler trains an adapter with
a mask, AdvUnlearn the text encoder); x_t is the concept's in both terms (AdvUnlearn draws
others for p). Symbols as in erase.py; delta the learned tokens, p a prompt to keep.
"""

import functools
from typing import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from erase import SCALE, Batch, Text, esd_target, x_t_from_model
from notebooks.methods import esd
from sample import StableDiffusion, UsageError


def attack(
    unet: Callable, target: Tensor, x_t: Tensor, t: Tensor, c: Tensor,
    tokens: int = 16, steps: int = 50, lr: float = 0.1,
) -> Tensor:
    """Returns c with learned tokens after it, (B, 77 + tokens, 768).

    With them, the edited model predicts what the original predicts for the concept:

    min over delta of || eps_theta(x_t, [c, delta], t) - eps_theta*(x_t, c, t) ||^2

    target: eps_theta*(x_t, c, t). Each attack starts from the same delta.
    """
    rng = Generator().manual_seed(0)  # tokens that start alike would stay alike
    delta = torch.rand(len(c), tokens, c.shape[2], generator=rng).to(c.device)
    delta.requires_grad_()
    optimizer = torch.optim.Adam([delta], lr)

    for _ in range(steps):
        eps = unet(x_t, t, torch.cat([c, delta.to(c.dtype)], dim=1))
        error = (eps - target).square().mean()
        # not backward(), which would leave gradients in theta
        (gradient,) = torch.autograd.grad(SCALE * error, delta)
        delta.grad = gradient / SCALE
        optimizer.step()

    return torch.cat([c, delta.detach().to(c.dtype)], dim=1)


def loss(
    unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: esd.Prompts,
    eta: float = 1.0, weight: float = 0.3,
    tokens: int = 16, steps: int = 50, lr: float = 0.1,
) -> Tensor:
    """Returns (B,), the mean over each sample of

    || eps_theta(x_t, [c, delta], t) - target ||^2
        + weight || eps_theta(x_t, p, t) - eps_theta*(x_t, p, t) ||^2

    with Eq. 6's target. p is text.kept. tokens, steps and lr are the attack's. Raises
    UsageError if there is no prompt to keep.
    """
    if not hasattr(text, "kept"):
        raise UsageError("there is no prompt to keep: use adversarial_esd.data")

    p = text.kept
    with torch.no_grad():
        eps_null = frozen(x_t, t, text.null)
        eps_c = frozen(x_t, t, text.concept)
        eps_p = frozen(x_t, t, p)

    attacked = attack(
        unet, eps_c, x_t, t, text.concept, tokens=tokens, steps=steps, lr=lr
    )
    error = unet(x_t, t, attacked) - esd_target(eps_null, eps_c, eta)
    drift = unet(x_t, t, p) - eps_p
    return (error.square() + weight * drift.square()).mean(dim=(1, 2, 3))


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    sd: StableDiffusion, keep: Sequence[str] = ("",),
    steps: int = 50, guidance: float = 3.0, every_step: bool = False,
) -> Iterator[Batch]:
    """Yields what `erase.x_t_from_model` does, with prompts to keep in the text.

    keep: prompts; each sample gets a random one.
    """
    features = sd.encode([*keep])  # (P, 77, 768)
    batches = x_t_from_model(
        unet, texts, shape, rng, steps=steps, guidance=guidance, every_step=every_step
    )

    for x_t, t, text in batches:
        chosen = torch.randint(len(keep), shape[:1], generator=rng)
        prompts = esd.Prompts(text.concept, text.null, text.anchor, kept=features[chosen])
        yield Batch(x_t, t, prompts)


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str = "esd-u", weight: float = 0.3,
    tokens: int = 16, attack_steps: int = 50, attack_lr: float = 0.1, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. settings: see `esd.erase`.

    keep: prompts to keep; without any, the empty one is. Anchors aren't used.
    """
    loss_fn = functools.partial(
        loss, weight=weight, tokens=tokens, steps=attack_steps, lr=attack_lr
    )
    kept = functools.partial(data, sd=sd, keep=[*keep] or [""])
    return esd.erase(
        sd, concepts, seed=seed, method=method, loss_fn=loss_fn, data=kept, **settings
    )
