"""Pictures from prompts: loads Stable Diffusion v1 from a folder and samples it with DDIM.

    python sample.py "a red star" --model notebooks/toy --num 4 --out star.png

    sd = sample.load("notebooks/toy")
    images = sample.generate(sd, ["a red star", "a moon"], num=4, seed=0)

Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752. A prompt's way to a picture: tokens,
text encoder (clip_text.py), latents from noise by DDIM (ddim.py) with the U-Net (unet.py), decoder
of the VAE (vae.py).
"""

import argparse
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

import clip_text
import ddim
import vae
from clip_text import TextConfig, TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"  # the paper's


@dataclass(frozen=True)
class StableDiffusion:
    """The four parts of a checkpoint."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> text features (B, 77, 768). What is longer is cut, with a warning."""
        length = self.text_encoder.config.max_position_embeddings
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids):
            if len(ids) > length:
                warnings.warn(f"cut to the first {length} of {len(ids)} tokens: {prompt!r}")
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True)
        return self.text_encoder(torch.tensor(tokens.input_ids, device=self.device))

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> list[Image.Image]:
        """The U-Net's latents (B, 4, H, W) -> B pictures of 8H x 8W pixels."""
        latents = (x_0 / self.vae.config.scaling_factor).to(self.dtype)
        images = self.vae.decode(latents)  # (B, 3, 8H, 8W), -1..1
        pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def check_tensors(found: dict, expected: dict, file: Path, partial: bool = False) -> None:
    """Raises ValueError where `found` has other names or shapes than `expected`.

    With `partial`, names may be missing, but not all of them.
    """
    wrong = [f"{name} isn't in the model" for name in found if name not in expected]
    if not partial:
        wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
              for name in found if name in expected and found[name].shape != expected[name].shape]
    if wrong or not found:
        raise ValueError(f"{file} doesn't fit this model, {len(wrong)} tensors differ: "
                         f"{'; '.join(wrong[:3]) or 'the file is empty'}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read until they are used."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} can't be read as safetensors: {error}") from error


def load_part(folder: Path, file: str, config_class: type, model_class: type,
              rename: Callable = lambda weights: weights) -> nn.Module:
    """One model of a folder: built on the meta device, then given the file's own tensors."""
    for path in (folder / "config.json", folder / file):
        if not path.is_file():
            raise ValueError(f"{path} is missing: --model takes a folder in diffusers' layout "
                             "with unet/, vae/, text_encoder/ and tokenizer/")
    try:
        config = config_class.from_json(json.loads((folder / "config.json").read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json isn't one of Stable Diffusion v1: "
                         f"{type(error).__name__} {error}") from error
    weights = rename(read_tensors(folder / file))
    with torch.device("meta"):  # no memory, no random weights
        model = model_class(config)
    check_tensors(weights, model.state_dict(), folder / file)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def choose_device(device: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU.

    Raises ValueError for a device that isn't there.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} can't be used here: {reason}") from error


def load(model: str | Path, device: str = "auto", dtype: str = "auto") -> StableDiffusion:
    """Stable Diffusion v1 from a folder in diffusers' layout.

    dtype is float32, float16 or bfloat16; auto is float32 on the CPU, bfloat16 elsewhere, whose
    range lets erase.py do without loss scaling.
    Raises ValueError for a folder that holds something else.
    """
    folder, device = Path(model), choose_device(device)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    if not folder.is_dir():
        raise ValueError(f"{model} isn't a folder: --model takes a folder in diffusers' layout")
    vocabularies = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "tokenizer.json"
    if not any(file.is_file() for file in vocabularies):
        raise ValueError(f"{folder}/tokenizer/vocab.json is missing: copy the folder tokenizer/ "
                         f"of {DEFAULT_MODEL} there")
    file = "diffusion_pytorch_model.safetensors"
    parts = [
        load_part(folder / "unet", file, UNetConfig, UNet),
        load_part(folder / "vae", file, VAEConfig, VAE, vae.rename),
        load_part(folder / "text_encoder", "model.safetensors", TextConfig, TextEncoder,
                  clip_text.rename),
    ]
    parts = [part.to(device, getattr(torch, dtype)) for part in parts]
    return StableDiffusion(*parts, CLIPTokenizer.from_pretrained(folder / "tokenizer"))


def with_tuned(sd: StableDiffusion, tuned: dict[str, Tensor]) -> StableDiffusion:
    """The model with some of the U-Net's tensors replaced; it shares all others with `sd`."""
    weights = sd.unet.state_dict()
    weights |= {name: tensor.to(weights[name]) for name, tensor in tuned.items()}
    with torch.device("meta"):
        unet = UNet(sd.unet.config)
    unet.load_state_dict(weights, assign=True)
    return replace(sd, unet=unet.requires_grad_(False))


def load_erased(sd: StableDiffusion, path: str | Path) -> StableDiffusion:
    """The model with the erased weights of a file that erase.py wrote; `sd` stays as it is.

    Raises ValueError where the file has a name or a shape that the U-Net doesn't have.
    """
    tuned = read_tensors(Path(path))
    check_tensors(tuned, sd.unet.state_dict(), Path(path), partial=True)
    return with_tuned(sd, tuned)


def starting_noise(sd: StableDiffusion, num: int, seed: int, size: int | None) -> Tensor:
    """(num, 4, size/8, size/8), drawn one picture after another on the CPU in float32.

    So it depends neither on the batch nor on the device. Raises ValueError for a size that
    the levels of the U-Net don't divide.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, choose 0 to {2**63 - 1}")
    factor, levels = sd.vae.config.factor, len(sd.unet.config.block_out_channels)
    size = sd.unet.config.sample_size * factor if size is None else size
    unit = factor * 2 ** (levels - 1)  # 64 pixels for Stable Diffusion v1
    if size < unit or size % unit:
        raise ValueError(f"size is {size}, choose a multiple of {unit}")
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sd.unet.config.in_channels, size // factor, size // factor)
    return torch.cat([torch.randn(shape, generator=generator) for _ in range(num)])


@torch.no_grad()
def generate(sd: StableDiffusion, prompts: list[str], num: int = 1, seed: int | list[int] = 0,
             steps: int = 50, guidance: float = 7.5, size: int | None = None, negative: str = "",
             batch: int = 8, progress: bool = False) -> list[Image.Image]:
    """`num` pictures of each prompt, one prompt after another.

    `seed` is one number, from which every prompt gets the same `num` noises, or one for each
    prompt. `size` is in pixels (None: what the model was trained on), `negative` takes the empty
    prompt's place in the guidance, `batch` pictures are made at once. Raises ValueError for an
    impossible num, size, steps or seed.
    """
    if num < 1:
        raise ValueError(f"num is {num}, choose 1 or more")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    noise = torch.cat([starting_noise(sd, num, s, size) for s in seeds])  # (P*num, 4, H, W)
    text = sd.encode(prompts).repeat_interleave(num, dim=0)  # (P*num, 77, 768)
    null = sd.encode([negative])
    total = len(noise) * len(ddim.timesteps(steps))
    images = []
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for x_t, c in zip(noise.to(sd.device).split(batch), text.split(batch), strict=True):
            predict = ddim.guided(sd.unet, c, null.expand_as(c), guidance)
            for t, x_t in ddim.denoise(predict, x_t, steps):
                bar.update(len(x_t) if t else 0)
            images += sd.decode(x_t)
    return images


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], least: int = 96) -> Image.Image:
    """Rows of pictures under their labels; small pictures are enlarged to at least `least`."""
    scale = max(1, math.ceil(least / rows[0][1][0].width))
    side, gap, line = rows[0][1][0].width * scale, 4, 22
    width = max(len(images) for _, images in rows) * (side + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (side + line + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (label, images) in enumerate(rows):
        top = i * (side + line + gap)
        draw.text((gap, top + 3), label, fill="black", font=font)
        for j, image in enumerate(images):
            sheet.paste(image.resize((side, side)), (gap + j * (side + gap), top + line))
    return sheet


def save_png(image: Image.Image, path: Path, prompt: str, settings: dict) -> None:
    """A PNG that says in its text chunk how it was made; written whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(settings, default=str))
    part = path.with_name(path.name + ".part")
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


def check_out(path: Path, suffix: str) -> None:
    """Makes the folder of a file to come.

    Raises ValueError for another suffix, OSError where nothing can be written: now, not after
    the work.
    """
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{path} can't be written: choose a file name that ends in {suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    part.unlink()


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    check_out(args.out, ".png")
    if args.singles:
        args.singles.mkdir(parents=True, exist_ok=True)
    sd = load(args.model, args.device, args.dtype)
    if args.erased:
        sd = load_erased(sd, args.erased)
    settings = {key: getattr(args, key) for key in (
        "model", "erased", "seed", "steps", "guidance", "negative", "size", "num")}
    images = generate(sd, args.prompts, args.num, args.seed, args.steps, args.guidance, args.size,
                      args.negative, progress=True)
    rows = [(prompt, images[i * args.num:(i + 1) * args.num])
            for i, prompt in enumerate(args.prompts)]
    save_png(contact_sheet(rows), args.out, "\n".join(args.prompts), settings)
    print(args.out)
    for i, (prompt, pictures) in enumerate(rows if args.singles else []):
        for j, picture in enumerate(pictures):
            save_png(picture, args.singles / f"{i}_{j}.png", prompt, settings | {"picture": j})
            print(args.singles / f"{i}_{j}.png")


def fail_in_one_line(run: Callable, args: argparse.Namespace) -> None:
    """Runs a command; wrong input ends it with one line and exit status 2, without a traceback."""
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that sample.py and erase.py have in common."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder in diffusers' layout")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ...")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "float16", "bfloat16"],
                        help="of the model; auto: float32 on the CPU, else bfloat16")


def main() -> None:
    """The command line of sampling."""
    parser = argparse.ArgumentParser(
        description="Pictures from prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="one row of pictures for each")
    add_model_arguments(parser)
    parser.add_argument("--erased", type=Path, help="weights that erase.py wrote")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--guidance", type=float, default=7.5, help="scale of the guidance")
    parser.add_argument("--negative", default="", help="prompt to steer away from")
    parser.add_argument("--size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="the contact sheet")
    parser.add_argument("--singles", type=Path, help="a folder for each picture on its own")
    fail_in_one_line(run, parser.parse_args())


if __name__ == "__main__":
    main()
