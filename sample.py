"""Images from prompts: loads Stable Diffusion v1 in any published form and samples it with DDIM.

    python sample.py "a red star" --model notebooks/toy --num 4 --out star.png
    sd = sample.load("sd-v1-4.ckpt"); images = sample.generate(sd, ["a red star"], num=4)

Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752. To follow a prompt, see `generate`.
"""

import argparse
import json
import re
import shlex
import signal
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import clip_text
import ddim
import unet
import vae

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"  # the paper's
CLIP = "openai/clip-vit-large-patch14"  # Stable Diffusion v1's tokenizer


@dataclass(frozen=True)
class StableDiffusion:
    """The four parts of a checkpoint."""

    unet: unet.UNet
    vae: vae.VAE
    text_encoder: clip_text.TextEncoder
    tokenizer: Callable  # transformers' CLIPTokenizer

    device = property(lambda sd: sd.unet.conv_in.weight.device)
    dtype = property(lambda sd: sd.unet.conv_in.weight.dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> text features (B, 77, 768). Longer prompts are cut, with a warning."""
        length = self.text_encoder.config.max_position_embeddings
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids):
            if len(ids) > length:
                warnings.warn(f"cut to the first {length} of {len(ids)} tokens: {prompt!r}")
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True)
        return self.text_encoder(torch.tensor(tokens.input_ids, device=self.device))

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """B images, cropped to the model's size -> the U-Net's latents (B, 4, H, W)."""
        side = self.unet.config.sample_size * self.vae.config.factor
        pixels = np.stack([ImageOps.fit(as_seen(image), (side, side)) for image in images])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 8H, 8W)
        mean, _ = self.vae.encode(scaled.to(self.device, self.dtype))
        return (mean * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, x_0: Tensor, what: str = "an image") -> list[Image.Image]:
        """The U-Net's latents (B, 4, H, W) -> B images of 8H x 8W pixels."""
        latents = (x_0 / self.vae.config.scaling_factor).to(self.dtype)
        images = self.vae.decode(latents)  # (B, 3, 8H, 8W), -1..1
        if not images.isfinite().all():
            raise ValueError(f"{what} has non-finite pixels: try --dtype float32")
        pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def as_seen(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: turned as its EXIF says, on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def starting_noise(sd: StableDiffusion, num: int, seed: int,
                   size: int | tuple[int, int] | None) -> Tensor:
    """Returns (num, 4, height/8, width/8), drawn image by image, on the CPU and in float32, so that
    it depends on neither batch nor device. Raises ValueError for a size that doesn't fit.
    """
    factor, levels = sd.vae.config.factor, len(sd.unet.config.block_out_channels)
    size = sd.unet.config.sample_size * factor if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    unit = factor * 2 ** (levels - 1)  # 64 pixels for Stable Diffusion v1
    if min(width, height) < unit or width % unit or height % unit or not 0 <= seed < 2**63:
        raise ValueError(f"size is {width} x {height}, choose multiples of {unit}; seed is {seed}, "
                         f"choose 0 to {2**63 - 1}")
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sd.unet.config.in_channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=generator) for _ in range(num)])


@torch.no_grad()
def generate(sd: StableDiffusion, prompts: list[str], num: int = 1, seed: int | list[int] = 0,
             steps: int = 50, guidance: float = 7.5, size: int | tuple[int, int] | None = None,
             negative: str = "", batch: int = 8, progress: bool = False,
             guided: Callable = ddim.guided) -> list[Image.Image]:
    """Returns `num` images of each prompt, prompt by prompt.
    seed: one number, which gives every prompt the same `num` noises, or one for each prompt.
    size: in pixels, one side or (width, height); None is the size the model was trained on.
    negative: takes the empty prompt's place in the guidance. batch: images made at once.
    guided: another kind of guidance, called once a batch as `ddim.guided` is.
    """
    if num < 1 or batch < 1:
        raise ValueError(f"num is {num}, batch {batch}: choose 1 or more")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    noise = torch.cat([starting_noise(sd, num, s, size) for s in seeds])  # (P*num, 4, H, W)
    text = sd.encode(prompts).repeat_interleave(num, dim=0)  # (P*num, 77, 768)
    null, images = sd.encode([negative]), []
    with tqdm(total=len(noise) * steps, unit="step", delay=1, disable=not progress) as bar:
        for x_t, c in zip(noise.to(sd.device).split(batch), text.split(batch), strict=True):
            for t, x_t in ddim.denoise(guided(sd.unet, c, null.expand_as(c), guidance), x_t, steps):
                bar.update(len(x_t) if t else 0)  # t = 0 is the image, not a step
            images += sd.decode(x_t, f"the batch from {prompts[len(images) // num]!r} on")
    return images


def contact_sheet(rows: list[tuple], least: int = 96) -> Image.Image:
    """Draws rows of (label, images) or (labels, images), each image `least` pixels wide or more."""
    width, most = rows[0][1][0].width, max(len(images) for _, images in rows)
    side, line, gap = width * max(1, -(-least // width)), 22, 4
    sheet = Image.new("RGB", (most * (side + gap) + gap, len(rows) * (side + line + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (labels, images) in enumerate(rows):
        top = i * (side + line + gap)
        for j, label in enumerate([labels] if isinstance(labels, str) else labels):
            draw.text((gap + j * (side + gap), top + 3), label, fill="black", font=font)
        for j, image in enumerate(images):
            sheet.paste(ImageOps.pad(image, (side, side)), (gap + j * (side + gap), top + line))
    return sheet


class Inert:
    """Stands in for what torch doesn't allow in a pickle; no published code is ever run."""
    __init__ = __setstate__ = lambda self, *args: None


INERT = [(Inert, name) for name in (  # found in published checkpoints
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a pickle (.ckpt, .bin, .pt), or of its `state_dict`,
    memory-mapped. torch's restricted unpickler refuses whatever could run. Raises ValueError.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
        if head == b"version h":
            raise ValueError("it is a git-lfs pointer, run `git lfs pull`")
        if head[8:] == b"{":  # safetensors: a length, then JSON
            with safe_open(file, "pt") as opened:
                ddim.check_schedule(opened.metadata() or {})
                return {name: opened.get_tensor(name) for name in opened.keys()}
        with torch.serialization.safe_globals(INERT):
            found = torch.load(file, "cpu", weights_only=True, mmap=head[:2] == b"PK")  # a zip
        return {f"{name}.{key}".rstrip("."): tensor  # of a module, or the tensor itself
                for name, value in found.get("state_dict", found).items()
                for key, tensor in (value.items() if isinstance(value, dict) else [("", value)])
                if isinstance(tensor, Tensor)}
    except Exception as error:  # a damaged file can raise anything
        asked = re.search(r"GLOBAL \S+", str(error))  # by the restricted unpickler
        why = f"{asked[0]}, look for a .safetensors of it" if asked else one_line(error)
        raise ValueError(f"{file} can't be used; nothing in it ran: {why}") from error


def read_json(file: Path) -> dict:
    """Raises ValueError where a file holds no JSON object."""
    try:
        return {**json.loads(file.read_text())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no settings, download it again: {error}") from error


# prefix: of a part's names in CompVis's files; files: its weights in a folder, the first found
Part = namedtuple("Part", "module model config prefix files")
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
DIFFUSERS = ["diffusion_pytorch_model" + ending for ending in ENDINGS]
TRANSFORMERS = [("pytorch_" if "bin" in ending else "") + "model" + ending for ending in ENDINGS]
PARTS = {
    "unet": Part(unet, unet.UNet, unet.UNetConfig, "model.diffusion_model.", DIFFUSERS),
    "vae": Part(vae, vae.VAE, vae.VAEConfig, "first_stage_model.", DIFFUSERS),
    "text_encoder": Part(clip_text, clip_text.TextEncoder, clip_text.TextConfig,
                         "cond_stage_model.transformer.", TRANSFORMERS),
}


def read_model(path: Path, ema: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Each part's config, and all tensors as `unet.NAME`, of a folder in diffusers' layout or a
    single file in CompVis's. ema: of a file's two U-Nets, the averaged one.
    """
    schedule, yaml = path / "scheduler/scheduler_config.json", path.with_suffix(".yaml")
    said, configs, tensors = read_json(schedule) if schedule.is_file() else {}, {}, {}
    single = read_tensors(path) if ema or path.is_file() else {}  # a folder has no second U-Net
    said |= re.findall(r"(parameterization)\W+(\w+)", yaml.read_text() if yaml.is_file() else "")
    ddim.check_schedule(said)
    for name, part in PARTS.items():
        if single:
            configs[name] = part.config()
            own = {key.removeprefix(part.prefix): single.pop(key) for key in [*single]
                   if key.startswith(part.prefix)}
            if ema and name == "unet":  # the EMA's names have no dots, and no "model."
                own = {key: single.pop("model_ema.diffusion_model" + key.replace(".", ""))
                       for key in own}
        else:
            configs[name] = part.module.config_from_json(read_json(path / name / "config.json"))
            files = [path / name / file for file in part.files]
            own = read_tensors(next((file for file in files if file.is_file()), files[0]))
        for field, size in vars(configs[name]).items():
            most = 100 if "layers" in field else 100_000
            if type(size) is not type(getattr(part.config, field)) or not 0 <= np.max(size) <= most:
                raise ValueError(f"{path / name} has {field} = {size}")
        for key, tensor in part.module.rename(own, configs[name]).items():
            tensors[f"{name}.{key}"] = tensor
    return configs, tensors | {key: single[key] for key in single if "." in key}  # not the schedule


def fit(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> list[str]:
    """Gives a model its tensors; returns those left over. Raises ValueError if one is missing."""
    shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
    wrong = [f"{name}: {shapes.get(name, 'missing')}, expected {[*tensor.shape]}"
             for name, tensor in model.state_dict().items() if shapes.get(name) != [*tensor.shape]]
    if wrong:
        raise ValueError(f"{path} doesn't fit Stable Diffusion v1, {len(wrong)} tensors differ: "
                         f"{', '.join(wrong[:3])}; it has {', '.join([*tensors][:3])}")
    _, extra = model.requires_grad_(False).load_state_dict(tensors, strict=False, assign=True)
    return extra


def download(name: str) -> Path:
    """A hub repository's folder in the hub's own cache, also offline; weights in one form only."""
    wanted = ["scheduler/*", "tokenizer/*", *(f"{part}/config.json" for part in PARTS)]
    for i in range(len(ENDINGS) + 1):
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        wanted += [f"{key}/{next_}" for key, part in PARTS.items() for next_ in part.files[i:i + 1]
                   if not any((folder / key / file).exists() for file in part.files)]
    return folder


def load(model: str | Path = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto",
         tokenizer: str | Path | None = None, ema: bool = False) -> StableDiffusion:
    """Loads Stable Diffusion v1 from a folder in diffusers' layout, a CompVis file, or the hub.
    dtype: auto is float32 on the CPU, elsewhere bfloat16, or float16 where that is emulated.
    tokenizer: None is the checkpoint's own. ema: of two U-Nets, the averaged. Raises ValueError.
    """
    from transformers import CLIPTokenizer  # here, so that --help doesn't wait a second for it
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if dtype == "auto":
        emulated = "cuda" in device and not torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "float32" if device == "cpu" else "float16" if emulated else "bfloat16"
    try:
        path = Path(model).absolute() if Path(model).exists() else download(str(model))
        configs, tensors = read_model(path, ema)
        with torch.device("meta"):  # takes no memory
            parts = nn.ModuleDict({name: PARTS[name].model(configs[name]) for name in PARTS})
        extra = fit(parts, tensors, path)
        parts.to(device, getattr(torch, dtype))
        near = path / "tokenizer", path.parent / "tokenizer", path.parent / "vocab.json"
        words = str(tokenizer or next((place for place in near if place.exists()), CLIP))
        try:
            sd = StableDiffusion(*parts.values(),
                                 CLIPTokenizer.from_pretrained(words.removesuffix("vocab.json")))
        except Exception as error:
            raise ValueError(f"no tokenizer in {words}, see --tokenizer: {error}") from error
        text = sd.text_encoder.config
        if (len(sd.tokenizer), text.hidden_size, sd.vae.config.latent_channels) != (
                text.vocab_size, sd.unet.config.cross_attention_dim, sd.unet.config.in_channels):
            raise ValueError(f"its parts and --tokenizer {words} aren't of one model")
    except Exception as error:  # damaged files and missing devices can raise anything
        raise ValueError(f"can't load {model}: {one_line(error)}") from error
    if extra:
        print(f"{path}: left out {len(extra)} tensors: {', '.join(extra[:3])}", file=sys.stderr)
    return sd


def with_tuned(sd: StableDiffusion, tuned: dict, path: str = "theta") -> StableDiffusion:
    """The model with some of the U-Net's tensors replaced, sharing the rest. Raises ValueError."""
    tuned = {name: tensor.detach().to(sd.device, sd.dtype) for name, tensor in tuned.items()}
    with torch.device("meta"):
        edited = unet.UNet(sd.unet.config)
    extra = fit(edited, sd.unet.state_dict() | tuned, path)
    if extra or not tuned:
        raise ValueError(f"{path} has {len(tuned)} tensors, not the U-Net's: {extra[:3]}")
    return replace(sd, unet=edited)


def load_erased(sd: StableDiffusion, path: str | Path) -> StableDiffusion:
    """The model with a file's erased weights, in any published form. Raises ValueError."""
    tensors, prefix = read_tensors(Path(path)), PARTS["unet"].prefix
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)} or tensors
    bare = {name.removeprefix(prefix).removeprefix("unet."): own[name] for name in own}
    return with_tuned(sd, unet.rename(bare, sd.unet.config), str(path))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file next to `path`, then moves it there, so it is never half-written."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_png(image: Image.Image, path: Path, settings: dict, **texts: str) -> None:
    """Writes a PNG whose text chunks say how it was made: `settings` in JSON, and more `texts`."""
    info = PngImagePlugin.PngInfo()
    for key, text in {"settings": json.dumps(settings, default=str), **texts}.items():
        info.add_itxt(key, text)
    write_whole(path, lambda part: image.save(part, format="PNG", pnginfo=info))


def check_out(path: Path, suffix: str, new: bool = False) -> None:
    """Makes a file's folder. With new, neither the file nor the .png next to it may exist."""
    taken = [file for file in (path, path.with_suffix(".png")) if new and file.exists()]
    if path.suffix != suffix or path.is_dir() or taken:
        raise ValueError(f"{[*taken, path][0]} can't be written: choose a new {suffix} name")
    path.parent.mkdir(parents=True, exist_ok=True)


def one_line(error: Exception) -> str:
    """What an error says, in one short line."""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:290]


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    check_out(args.out, ".png")
    sd = load(args.model, args.device, args.dtype, args.tokenizer, args.ema)
    sd = load_erased(sd, args.erased) if args.erased else sd
    images = generate(sd, args.prompts, args.num, args.seed, args.steps, args.guidance, args.size,
                      args.negative, args.batch, progress=True)
    rows = [(prompt, images[i * args.num:][:args.num]) for i, prompt in enumerate(args.prompts)]
    save_png(contact_sheet(rows), args.out, vars(args))
    print(args.out)


def fail_in_one_line(run: Callable, flags: argparse.ArgumentParser) -> None:
    """Runs a command; bad input ends it with one line and exit status 2, without a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half-done stays
    try:
        run(flags.parse_intermixed_args())
    except (ValueError, OSError, RuntimeError) as error:  # torch's for memory, and for a full disk
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parser(description: str, what: str, help: str) -> argparse.ArgumentParser:
    """The flags that sample.py and erase.py share. @FILE: more flags, from a file."""
    parser = argparse.ArgumentParser(description=description, fromfile_prefix_chars="@",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.convert_arg_line_to_args = shlex.split
    add = parser.add_argument
    add(f"{what.lower()}s", nargs="+", metavar=what, help=help)
    add("--model", default=DEFAULT_MODEL, help="a diffusers folder, a CompVis file, or a hub name")
    add("--tokenizer", help=f"a folder or a hub name; if not given, the model's, or {CLIP}")
    add("--ema", action="store_true", help="of a file with two U-Nets, take the averaged one")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--steps", type=int, default=50, help="DDIM steps")
    add("--device", default="auto", help="cpu, cuda, mps, ...")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: float32 on the CPU")
    return parser


def main() -> None:
    """Reads the command line."""
    flags = parser("Images from prompts.", "PROMPT", "one row of images for each")
    add = flags.add_argument
    add("--erased", type=Path, help="weights that erase.py wrote, or any published ones")
    add("--num", type=int, default=1, help="images of each prompt")
    add("--guidance", type=float, default=7.5, help="guidance scale")
    add("--negative", default="", help="prompt to steer away from")
    add("--size", type=int, help="pixels; by default the model's own")
    add("--batch", type=int, default=8, help="images made at once")
    add("--out", type=Path, default=Path("sample.png"), help="the contact sheet")
    fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
