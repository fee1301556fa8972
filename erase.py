"""Erases a concept from Stable Diffusion by fine-tuning its U-Net, without a single picture: ESD.

    python erase.py "Van Gogh" --method esd-x --out van-gogh.safetensors      # the paper's settings
    python sample.py "a starry night by Van Gogh" --erased van-gogh.safetensors

Gandikota, Materzynska, Fiotto-Kaufman, Bau: "Erasing Concepts from Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.07345. Equation numbers are that paper's.

Symbols: c the concept, null the empty prompt; x_t latent at time t; eps predicted noise;
eta strength; `frozen` eps_theta*, the original; `unet` (in a loss) eps_theta, the edited one;
theta the tuned tensors, the only ones in which the two differ.
"""

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

import ddim
import sample
from sample import StableDiffusion


def is_output(name: str) -> bool:
    """The U-Net's last norm and convolution."""
    return name.startswith(("conv_norm_out.", "conv_out."))


# Which parameters a method tunes, as a predicate on their names (section 4.1).
METHODS: dict[str, Callable[[str], bool]] = {
    "esd-x": lambda name: "attn2" in name,  # cross-attention: tied to the words of the prompt
    "esd-x-strict": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "esd-u": lambda name: not ("attn2" in name or "time_embedding" in name or is_output(name)),
    "selfattn": lambda name: "attn1" in name,
    "full": lambda name: True,
    "notime": lambda name: not ("time_embedding" in name or is_output(name)),
}
ALIASES = {"xattn": "esd-x", "noxattn": "esd-u", "esd-all": "full"}  # of the official code


class Text(NamedTuple):
    """Text features that a loss may use, (B, 77, 768) each."""

    concept: Tensor
    null: Tensor


def esd_target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """Eq. 6: eps_theta*(x_t, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)]."""
    return eps_null - eta * (eps_c - eps_null)


def esd_loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
             eta: float = 1.0) -> Tensor:
    """Eq. 6 as a loss, one number per sample: ||eps_theta(x_t, c, t) - target||^2, (B,)."""
    with torch.no_grad():
        target = esd_target(frozen(x_t, t, text.null), frozen(x_t, t, text.concept), eta)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


def select(unet: torch.nn.Module, method: str) -> list[str]:
    """The names of the parameters that a method tunes.

    Raises ValueError for an unknown method and for one that selects nothing.
    """
    method = ALIASES.get(method, method)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, choose from {', '.join([*METHODS, *ALIASES])}")
    names = [name for name, _ in unet.named_parameters() if METHODS[method](name)]
    if not names:
        raise ValueError(f"method {method!r} selects no parameter of this U-Net")
    return names


def erase(sd: StableDiffusion, concepts: list[str], method: str = "esd-x", eta: float = 1.0,
          lr: float = 1e-5, iterations: int = 1000, loss_fn: Callable = esd_loss,
          guidance: float = 3.0, steps: int = 50, seed: int = 0,
          progress: bool = False) -> dict[str, Tensor]:
    """Fine-tunes until a prompt with a concept is drawn as one without it; returns theta, float32.

    Each iteration draws one concept, a random step of `steps`, and a latent that the edited model
    itself has denoised so far for this concept (section 4); then Adam takes one step down
    `loss_fn(unet, frozen, x_t, t, text, eta)`. `sd` isn't changed.
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, choose 0 or more")
    concepts = [concepts] if isinstance(concepts, str) else concepts
    frozen = sd.unet
    parameters = dict(frozen.named_parameters())
    theta = {name: parameters[name].float().clone().requires_grad_()  # updates of 1e-5 need float32
             for name in select(frozen, method)}

    def edited(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        in_place = {name: tensor.to(sd.dtype) for name, tensor in theta.items()}
        return functional_call(frozen, in_place, (x_t, t, text))

    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    null, features = sd.encode([""]), sd.encode(concepts)
    shape = (1, sd.unet.config.in_channels, *[sd.unet.config.sample_size] * 2)
    times = ddim.timesteps(steps)
    bar = tqdm(range(iterations), "erasing", disable=not progress)
    for _ in bar:
        i = torch.randint(len(concepts), (1,), generator=generator).item()
        k = torch.randint(len(times), (1,), generator=generator).item()
        noise = torch.randn(shape, generator=generator).to(sd.device, sd.dtype)
        c = features[i:i + 1]
        with torch.no_grad():
            way = ddim.denoise(ddim.guided(edited, c, null, guidance), noise, steps)
            t, x_t = next(itertools.islice(way, k, None))  # k steps on from noise
        loss = loss_fn(edited, frozen, x_t, torch.tensor([t], device=sd.device), Text(c, null), eta)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.mean().item():.4f}", refresh=False)
    return {name: tensor.detach() for name, tensor in theta.items()}


def save(theta: dict[str, Tensor], path: Path, dtype: torch.dtype, settings: dict) -> None:
    """A safetensors file under the published names, whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.to("cpu", dtype).contiguous() for name, tensor in theta.items()}, part,
              metadata={key: json.dumps(value) for key, value in settings.items()})
    os.replace(part, path)


def before_after(before: StableDiffusion, after: StableDiffusion, prompts: list[str], seed: int,
                 steps: int, num: int = 6):
    """A contact sheet: each prompt before and after, the same seeds one above the other."""
    rows = []
    for name, sd in (("before", before), ("after", after)):
        images = sample.generate(sd, prompts, num, seed, steps, progress=True, batch=num)
        rows.append([(f"{prompt}, {name}", images[i * num:(i + 1) * num])
                     for i, prompt in enumerate(prompts)])
    return sample.contact_sheet([row for pair in zip(*rows) for row in pair])


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    sd = sample.load(args.model, args.device, args.dtype)
    names = select(sd.unet, args.method)
    parameters = dict(sd.unet.named_parameters())
    print(f"{args.method} tunes {len(names)} tensors, "
          f"{sum(parameters[name].numel() for name in names):,} parameters")
    settings = {key: getattr(args, key) for key in (
        "concepts", "model", "method", "eta", "lr", "iterations", "guidance", "steps", "seed")}
    theta = erase(sd, args.concepts, args.method, args.eta, args.lr, args.iterations,
                  guidance=args.guidance, steps=args.steps, seed=args.seed, progress=True)
    save(theta, args.out, getattr(torch, args.save_dtype), settings)
    print(args.out)
    prompts = args.concepts + args.show
    sheet = before_after(sd, sample.load_erased(sd, args.out), prompts, args.seed, args.steps)
    picture = args.out.with_suffix(".png")
    sample.save_png(sheet, picture, "\n".join(prompts), settings)
    print(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Erases concepts from the U-Net of Stable Diffusion (ESD).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("concepts", nargs="+", metavar="CONCEPT", help="what to erase, as a prompt")
    sample.add_model_arguments(parser)
    parser.add_argument("--method", default="esd-x", choices=[*METHODS, *ALIASES],
                        help="which parameters to tune")
    parser.add_argument("--eta", type=float, default=1.0, help="strength, Eq. 6")
    parser.add_argument("--lr", type=float, default=1e-5, help="Adam's learning rate")
    parser.add_argument("--iterations", type=int, default=1000, help="gradient steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of it in drawing x_t")
    parser.add_argument("--show", nargs="+", default=[], metavar="PROMPT",
                        help="more rows of the before/after picture: what should stay")
    parser.add_argument("--save-dtype", default="float16", choices=["float16", "float32"],
                        help="of the file")
    parser.add_argument("--out", type=Path, default=Path("erased.safetensors"),
                        help="the tuned tensors; the picture goes beside them")
    sample.fail_in_one_line(run, parser.parse_args())


if __name__ == "__main__":
    main()
