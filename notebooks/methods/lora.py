r"""A LoRA trained with ESD's loss, as an example of a method of your own.

    python -m notebooks.experiments.run methods --method notebooks.methods.lora:erase \
        --label LoRA

Hu et al., "LoRA", ICLR 2022, https://arxiv.org/abs/2106.09685 (section 4.1): a weight
becomes W + up @ down, of low rank (here without a scale), and only up and down are trained.
The defaults are the miniature's.
"""

import torch

from erase import gradient_steps, texts_for, with_theta, x_t_from_model
from notebooks.methods import uce
from sample import unet_tensors


def erase(
    sd, concepts, keep=(), seed=0, rank=4, lr=8e-4, iterations=160, batch=4, steps=8
):
    """Returns theta by name: the keys and values of cross-attention."""
    rng = torch.Generator().manual_seed(seed)
    start, up, down = {}, {}, {}
    for name, W in unet_tensors(sd).items():
        if uce.keys_and_values(name):
            start[name] = W.float()
            up[name] = torch.zeros(len(W), rank, device=W.device)
            down[name] = torch.randn(rank, W.shape[1], generator=rng).to(W.device)
    leaves = [factor.requires_grad_() for factor in (*up.values(), *down.values())]

    def theta():
        return {name: W + up[name] @ down[name] for name, W in start.items()}

    unet = with_theta(sd.unet, theta)
    texts = texts_for(sd, [*concepts], batch)  # the prompts, without their anchors
    shape = (batch, *sd.latent_shape)
    x_t = x_t_from_model(unet, texts, shape, rng, steps=steps, every_step=True)
    losses = gradient_steps(unet, sd.unet, x_t, torch.optim.Adam(leaves, lr))
    for _ in range(iterations):
        next(losses)
    return {name: W.detach() for name, W in theta().items()}
