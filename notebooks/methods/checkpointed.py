"""Activation checkpointing: stores each layer's inputs only, and recomputes its activations.

    small = replace(sd, unet=checkpointed.checkpointed(sd.unet))
    theta = erase.erase(small, ["star"], method="esd-u")

The same theta in less memory, for one more forward pass in each gradient step.

Torch's `checkpoint` around each layer isn't enough: `erase.with_theta` puts theta in
place for a call, but the second computation comes later, in the backward pass, when the
module has theta* again. That ends in a CheckpointError or, with use_reentrant=True,
leaves theta without a gradient and says nothing. So a layer here also keeps the weights
that it was called with.
"""

import copy

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from unet import UNet


class Checkpointed(nn.Module):
    """Wraps a layer, under the same parameter names, and recomputes its activations."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.plain = [layer]  # a list, so that it isn't registered, or names would begin with it
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = dict(self.named_parameters())  # theta's, inside `erase.with_theta`
        return checkpoint(
            functional_call, self.plain[0], weights, inputs, use_reentrant=False
        )


def checkpointed(unet: UNet) -> UNet:
    """Returns a U-Net with the same weights, not copied, whose layers recompute."""
    shared = {id(parameter): parameter for parameter in unet.parameters()}
    unet = copy.deepcopy(unet, memo=shared)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.resnets = nn.ModuleList(map(Checkpointed, block.resnets))
        block.attentions = nn.ModuleList(map(Checkpointed, block.attentions))
    return unet
