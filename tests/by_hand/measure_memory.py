"""The memory that erasing needs on Stable Diffusion v1 at 512x512, batch 1: counted, and checked.

    python -m tests.by_hand.measure_memory                  # the table, needs no weights
    python -m tests.by_hand.measure_memory --check esd-x    # one iteration on the CPU, in float32

The table counts bytes on the meta device: weights, gradients and Adam from their shapes,
activations as the most that autograd keeps at one time in a forward and a backward pass. The
libraries' workspaces and the device's own memory aren't counted.
"""

import argparse
import resource
from collections import Counter
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import erase
import sample
from clip_text import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

GB = 1e9


class Kept:
    """A tensor that autograd keeps; counts the bytes that are kept at a time."""

    users: Counter = Counter()
    live = peak = 0

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.key = tensor.untyped_storage()._cdata
        Kept.users[self.key] += 1
        if Kept.users[self.key] == 1:
            Kept.live += tensor.untyped_storage().nbytes()
            Kept.peak = max(Kept.peak, Kept.live)

    def __del__(self):
        Kept.users[self.key] -= 1
        if Kept.users[self.key] == 0:
            Kept.live -= self.tensor.untyped_storage().nbytes()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a CPU or GPU runs; left to itself, the meta device keeps the matrix of all pairs."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def full_size_unet(dtype: torch.dtype = torch.float32) -> UNet:
    """Returns a U-Net whose tensors have shapes alone."""
    with torch.device("meta"):
        return UNet(UNetConfig()).to(dtype).requires_grad_(False)


def activations(method: str, dtype: torch.dtype) -> int:
    """Returns the most bytes that autograd keeps at one time."""
    unet = full_size_unet(dtype)
    with torch.device("meta"):
        x_t = torch.empty(1, 4, 64, 64)
        t = torch.ones(1)
        text = torch.empty(1, 77, 768, dtype=dtype)

    theta = erase.trainable_copies(unet, method)
    cast = {name: tensor.to(dtype) for name, tensor in theta.items()}
    tensors = [*unet.parameters(), *theta.values(), *cast.values()]
    weights = {tensor.untyped_storage()._cdata for tensor in tensors}
    Kept.users = Counter()
    Kept.live = 0
    Kept.peak = 0

    def pack(tensor):
        is_weight = tensor.untyped_storage()._cdata in weights
        return tensor if is_weight else Kept(tensor)

    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = functional_call(unet, cast, (x_t, t, text)).square().mean()
        after_forward = Kept.live
        loss.backward()
    assert Kept.peak >= after_forward
    assert Kept.live == 0
    return Kept.peak


class Memory(NamedTuple):
    """Bytes that erasing needs."""

    model: int  # theta* and the other models
    training: int  # theta, its gradient and Adam
    copy: int  # theta in half precision
    activations: int


def numel(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


@mock.patch.object(F, "scaled_dot_product_attention", attention)
def count(method: str, dtype: torch.dtype) -> Memory:
    """Counts what a method needs with models of this dtype."""
    with torch.device("meta"):
        others = [VAE(VAEConfig()), TextEncoder(TextConfig())]
    unet = full_size_unet()
    all_of_it = sum(numel(model.parameters()) for model in [unet, *others])
    tuned = numel(erase.trainable_copies(unet, method).values())
    bytes_each = torch.empty((), dtype=dtype).element_size()

    return Memory(
        model=all_of_it * bytes_each,
        training=tuned * 4 * 4,
        copy=0 if dtype == torch.float32 else tuned * bytes_each,
        activations=activations(method, dtype),
    )


def print_table(dtype: torch.dtype) -> None:
    heads = ["method", "model", "theta, gradient, Adam", "theta, half precision", "activations"]
    print(f"| {' | '.join(heads)} | in all |")
    print("|---" * 6 + "|")
    for method in erase.METHODS:
        memory = count(method, dtype)
        cells = [f"{part / GB:.2f}" for part in [*memory, sum(memory)]]
        print(f"| {method} | {' | '.join(cells)} |")


class OneToken:
    """Takes the place of CLIP's tokenizer, whose vocabulary isn't needed here."""

    def __call__(self, prompts, **_):
        ids = [[49406] + 76 * [49407] for _ in prompts]
        return argparse.Namespace(input_ids=ids)


def peak_of_process() -> int:
    """Returns the most bytes that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(method: str) -> None:
    """Runs one iteration with random weights; prints the process's peak, and the count."""
    unet = UNet(UNetConfig()).requires_grad_(False)
    vae = VAE(VAEConfig()).requires_grad_(False)
    text_encoder = TextEncoder(TextConfig()).requires_grad_(False)
    sd = sample.StableDiffusion(unet, vae, text_encoder, tokenizer=OneToken())
    weights = 4 * sum(numel(part.parameters()) for part in (unet, vae, text_encoder))
    libraries = peak_of_process() - weights

    data = partial(erase.x_t_from_model, steps=1)
    erase.erase(sd, ["a concept"], method, iterations=1, data=data)
    counted = sum(count(method, torch.float32))
    print(
        f"{method}, float32: counted {counted / GB:.2f} GB, peak of the process "
        f"{peak_of_process() / GB:.2f} GB, of which Python and libraries {libraries / GB:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that erasing needs, in GB.")
    parser.add_argument("--check", choices=erase.METHODS, metavar="METHOD")
    args = parser.parse_args()
    if args.check:
        check(args.check)
    else:
        print_table(torch.bfloat16)


if __name__ == "__main__":
    main()
