"""SPM, in short: ESD in an adapter of rank 1, which leaves random features alone.

    theta = spm.erase(sd, {"star": ""})

Lyu et al., "One-dimensional Adapter to Rule Them All", CVPR 2024,
https://arxiv.org/abs/2312.16145, and its code. Simplified: the adapter is merged into the
weights, without the paper's transport, which sets its strength for each prompt; one r for
each sample, not four; trajectories of 50 steps, not 30; plain Adam, a constant learning
rate. Symbols as in erase.py; a is the anchor, r random features.
"""

import functools
from typing import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor, nn

import sample
from erase import Batch, Text, esd_target, gradient_steps, texts_for, with_theta
from notebooks.methods import esd
from sample import StableDiffusion


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator, **options
) -> Iterator[Batch]:
    """Yields what `esd.x_t_with_prompts` does, with r for a prompt to keep.

    r is noise of 0.8 to 1.2 times the norm of c.
    """
    for x_t, t, text in esd.x_t_with_prompts(unet, texts, shape, rng, **options):
        r = torch.randn(text.concept.shape, generator=rng).to(text.concept)
        norm = (0.8 + 0.4 * torch.rand(len(r), generator=rng)).to(r) * text.concept[0].norm()
        r = r * (norm / r.norm(dim=(1, 2)))[:, None, None]
        yield Batch(x_t, t, text._replace(kept=r))


def loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: esd.Prompts,
         eta: float = 1.0, strength: float = 1000.0) -> Tensor:
    """Returns (B,), the mean over each sample of

    || eps_theta(x_t, c, t) - target ||^2
        + strength || eps_theta(x_t, r, t) - eps_theta*(x_t, r, t) ||^2

    The target is Eq. 6's with a in the place of the empty prompt.
    """
    with torch.no_grad():
        target = esd_target(frozen(x_t, t, text.anchor), frozen(x_t, t, text.concept), eta)
        eps_r = frozen(x_t, t, text.kept)
    error = unet(x_t, t, text.concept) - target
    drift = unet(x_t, t, text.kept) - eps_r
    return (error.square() + strength * drift.square()).mean(dim=(1, 2, 3))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    eta: float = 1.0, strength: float = 1000.0, lr: float = 1e-4, iterations: int = 3000,
    batch: int = 1, **options,
) -> dict[str, Tensor]:
    """Returns theta by name, the matrices of all transformers. keep isn't used.

    options: what `erase.x_t_from_model` takes.
    """
    rng = Generator().manual_seed(seed)
    start, up, down = {}, {}, {}
    for name, W in sample.unet_tensors(sd).items():
        if ".attentions." in name and W.ndim > 1:
            start[name] = W.float()
            up[name] = torch.zeros(len(W), 1, device=W.device)
            row = torch.empty(1, W[0].numel())
            # as in Microsoft's code of LoRA: uniform, up to 1 / sqrt(columns)
            down[name] = nn.init.kaiming_uniform_(row, a=5**0.5, generator=rng).to(W.device)
    leaves = [factor.requires_grad_() for factor in (*up.values(), *down.values())]

    def theta() -> dict[str, Tensor]:
        return {name: W + (up[name] @ down[name]).view_as(W) for name, W in start.items()}

    unet, texts = with_theta(sd.unet, theta), texts_for(sd, [*concepts], batch)
    shape, anchors = (batch, *sd.latent_shape), [*concepts.values()]
    batches = data(unet, texts, shape, rng, sd=sd, anchors=anchors, **options)
    optimizer = torch.optim.Adam(leaves, lr)
    loss_fn = functools.partial(loss, strength=strength)
    losses = gradient_steps(unet, sd.unet, batches, optimizer, loss_fn, eta)
    for _ in range(iterations):
        next(losses)
    return {name: W.detach() for name, W in theta().items()}
