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
        self.tensor, self.key = tensor, tensor.untyped_storage()._cdata
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


def activations(method: str, dtype: torch.dtype) -> int:
    """The most that autograd keeps at one time."""
    with torch.device("meta"):
        unet = UNet(UNetConfig()).to(dtype).requires_grad_(False)
        x_t, t, text = torch.empty(1, 4, 64, 64), torch.ones(1), torch.empty(1, 77, 768)
    theta = erase.select(unet, method)
    cast = {name: tensor.to(dtype) for name, tensor in theta.items()}
    weights = {w.untyped_storage()._cdata for w in (*unet.parameters(), *cast.values(),
                                                    *theta.values())}
    Kept.users, Kept.live, Kept.peak = Counter(), 0, 0

    def pack(tensor):
        return tensor if tensor.untyped_storage()._cdata in weights else Kept(tensor)

    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = functional_call(unet, cast, (x_t, t, text.to(dtype))).square().mean()
        after_forward = Kept.live
        loss.backward()
    assert Kept.peak >= after_forward and Kept.live == 0
    return Kept.peak


def others() -> int:
    """Parameters of the VAE and the text encoder."""
    with torch.device("meta"):
        models = VAE(VAEConfig()), TextEncoder(TextConfig())
    return sum(p.numel() for model in models for p in model.parameters())


@mock.patch.object(F, "scaled_dot_product_attention", attention)
def count(method: str, dtype: torch.dtype) -> list[float]:
    """GB of: theta* and the other models; theta, its gradient and Adam; theta in half precision;
    and activations."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    whole = sum(p.numel() for p in unet.parameters())
    tuned = sum(tensor.numel() for tensor in erase.select(unet, method).values())
    width = torch.empty((), dtype=dtype).element_size()
    copy = 0 if dtype == torch.float32 else tuned * width
    return [x / GB for x in (
        (whole + others()) * width, tuned * 4 * 4, copy,
        activations(method, dtype))]


def table(dtype: torch.dtype) -> None:
    print("| method | model | theta, gradient, Adam | theta, half precision | activations "
          "| in all |\n|---|---|---|---|---|---|")
    for method in erase.METHODS:
        parts = count(method, dtype)
        cells = [*parts, sum(parts)]
        print(f"| {method} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


class OneToken:
    """Takes the place of CLIP's tokenizer, whose vocabulary isn't needed here."""

    def __call__(self, prompts, **_):
        ids = [[49406] + 76 * [49407] for _ in prompts]
        return argparse.Namespace(input_ids=ids)


def check(method: str) -> None:
    """One iteration with random weights; the process's peak, to compare with the count."""
    parts = [model(config()).requires_grad_(False) for model, config in (
        (UNet, UNetConfig), (VAE, VAEConfig), (TextEncoder, TextConfig))]
    sd = sample.StableDiffusion(*parts, OneToken())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.numel() * 4 for part in parts for p in part.parameters()) / GB
    erase.erase(sd, ["a concept"], method, iterations=1, steps=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    counted = sum(count(method, torch.float32))
    print(f"{method}, float32: counted {counted:.2f} GB, peak of the process {peak:.2f} GB, "
          f"of which Python and libraries {before * 1024 / GB - weights:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that erasing needs, in GB.")
    parser.add_argument("--check", choices=erase.METHODS, metavar="METHOD")
    args = parser.parse_args()
    check(args.check) if args.check else table(torch.bfloat16)


if __name__ == "__main__":
    main()
