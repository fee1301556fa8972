"""Erases a concept from Stable Diffusion by fine-tuning its U-Net, without a single picture: ESD.

    python erase.py "Van Gogh" --model stable-diffusion-v1-4 --out van-gogh.safetensors
    python erase.py "star" --model notebooks/toy --lr 1e-3 --iterations 150 --out star.safetensors

Gandikota, Materzynska, Fiotto-Kaufman, Bau: "Erasing Concepts from Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.07345. Equation numbers are that paper's.

Symbols: c the concept, null the empty prompt; x_t latent at time t; eps predicted noise;
eta strength; `frozen` eps_theta*, the original; `unet` (in a loss) eps_theta, the edited one;
theta the tuned tensors, the only ones in which the two differ.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

import ddim
import sample
from sample import StableDiffusion


# Which parameters a method tunes, as a predicate on their names. esd-x and esd-u are the paper's
# (section 4.1; its code spares the time embedding and the output layers), the others its code's.
SPARED = ("time_embedding.", "conv_norm_out.", "conv_out.")
METHODS: dict[str, Callable[[str], bool]] = {
    "esd-x": lambda name: "attn2" in name,  # cross-attention: tied to the words of the prompt
    "esd-x-strict": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "esd-u": lambda name: "attn2" not in name and not name.startswith(SPARED),
    "selfattn": lambda name: "attn1" in name,
    "full": lambda name: True,
    "notime": lambda name: not name.startswith(SPARED),
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
    """Eq. 6 as a loss: the mean square of eps_theta(x_t, c, t) - target over a sample, (B,).

    unet and frozen are functions of (x_t, t, text); x_t is (B, 4, H, W), t is (B,).
    """
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
          guidance: float = 3.0, steps: int = 50, seed: int = 0, batch: int = 1,
          average: float = 0.0, progress: bool = False) -> dict[str, Tensor]:
    """Runs `iterations` steps of ESD; returns the tuned tensors theta by name, in float32.

    Each iteration draws one concept, a random step of `steps`, and `batch` latents that the edited
    model itself has denoised so far for this concept (section 4); then Adam takes one step down
    `loss_fn(unet, frozen, x_t, t, text, eta)`. With `average`, what returns is the exponential
    average of theta over the iterations, which swings less than the last one (0, as in the paper:
    the last one). `sd` isn't changed. Raises ValueError for an unknown
    method, impossible steps or iterations, and for a model in float16.
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, choose 0 or more")
    concepts = [concepts] if isinstance(concepts, str) else concepts
    if batch < 1 or not 0 <= average < 1:
        raise ValueError(f"batch is {batch}, average {average}: choose 1 or more, and 0 to below 1")
    if sd.dtype == torch.float16:
        raise ValueError("float16 is too coarse for gradients, choose bfloat16 or float32")
    frozen, times = sd.unet, ddim.timesteps(steps)
    parameters = dict(frozen.named_parameters())
    theta = {name: parameters[name].detach().to(torch.float32, copy=True).requires_grad_()
             for name in select(frozen, method)}  # an update of 1e-5 is lost in half precision

    def edited(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        cast = {name: tensor.to(sd.dtype) for name, tensor in theta.items()}
        return functional_call(frozen, cast, (x_t, t, text))

    averaged = {name: tensor.detach().clone() for name, tensor in theta.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    null, features = sd.encode([""] * batch), sd.encode(concepts)
    shape = (batch, sd.unet.config.in_channels, *[sd.unet.config.sample_size] * 2)
    bar = tqdm(range(iterations), "erasing", disable=not progress)
    for _ in bar:
        i = torch.randint(len(concepts), (1,), generator=generator).item()
        stop = times[torch.randint(len(times), (1,), generator=generator).item()]
        noise = torch.randn(shape, generator=generator).to(sd.device)
        c = features[i:i + 1].expand_as(null)  # (B, 77, 768)
        with torch.no_grad():
            for t, x_t in ddim.denoise(ddim.guided(edited, c, null, guidance), noise, steps):
                if t == stop:
                    break
        at = torch.full((batch,), t, device=sd.device)
        loss = loss_fn(edited, frozen, x_t, at, Text(c, null), eta)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, tensor in averaged.items():
            tensor.lerp_(theta[name].detach(), 1 - average)
        bar.set_postfix(loss=f"{loss.mean().item():.4f}", refresh=False)
    return averaged


def save(theta: dict[str, Tensor], path: Path, dtype: torch.dtype, settings: dict) -> None:
    """A safetensors file under the published names, whole or not there at all.

    The settings are JSON in its metadata. Raises ValueError where theta isn't finite, OSError where
    it can't be written.
    """
    for name, tensor in theta.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} isn't finite, nothing was saved: try a smaller --lr or --eta")
    part = path.with_name(path.name + ".part")
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in theta.items()}
    try:
        save_file(tensors, part, metadata={"settings": json.dumps(settings)})
    except SafetensorError as error:
        raise OSError(f"{part} can't be written: {error}") from error
    os.replace(part, path)


def before_after(before: StableDiffusion, after: StableDiffusion, prompts: list[str], seed: int,
                 num: int = 6) -> Image.Image:
    """A contact sheet: each prompt before and after, the same seeds one above the other.

    Drawn as `sample.generate` draws by default: 50 steps, guidance 7.5.
    """
    rows = []
    for name, sd in (("before", before), ("after", after)):
        images = sample.generate(sd, prompts, num, seed, progress=True)
        rows.append([(f"{prompt}, {name}", images[i * num:(i + 1) * num])
                     for i, prompt in enumerate(prompts)])
    return sample.contact_sheet([row for pair in zip(*rows) for row in pair])


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    picture = args.out.with_suffix(".png")
    sample.check_out(args.out, ".safetensors")
    sample.check_out(picture, ".png")
    sd = sample.load(args.model, args.device, args.dtype, args.tokenizer, args.revision)
    names = select(sd.unet, args.method)
    parameters = dict(sd.unet.named_parameters())
    print(f"{args.method} tunes {len(names)} tensors, "
          f"{sum(parameters[name].numel() for name in names):,} parameters")
    settings = {key: getattr(args, key) for key in (
        "concepts", "model", "method", "eta", "lr", "iterations", "guidance", "steps", "seed",
        "batch", "average")}
    theta = erase(sd, args.concepts, args.method, args.eta, args.lr, args.iterations,
                  guidance=args.guidance, steps=args.steps, seed=args.seed, batch=args.batch,
                  average=args.average, progress=True)
    save(theta, args.out, getattr(torch, args.save_dtype), settings)
    print(args.out)
    prompts = args.concepts + args.show
    sheet = before_after(sd, sample.load_erased(sd, args.out), prompts, args.seed)
    sample.save_png(sheet, picture, "\n".join(prompts), settings)
    print(picture)


def main() -> None:
    """The command line of erasing."""
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
    parser.add_argument("--batch", type=int, default=1, help="latents in an iteration")
    parser.add_argument("--average", type=float, default=0.0,
                        help="decay of the average of the tuned tensors; 0: the last ones")
    parser.add_argument("--show", nargs="+", default=[], metavar="PROMPT",
                        help="more rows of the before/after picture: what should stay")
    parser.add_argument("--save-dtype", default="float16", choices=["float16", "float32"],
                        help="of the file")
    parser.add_argument("--out", type=Path, default=Path("erased.safetensors"),
                        help="the tuned tensors; the picture goes beside them")
    sample.fail_in_one_line(run, parser.parse_args())


if __name__ == "__main__":
    main()
