"""Images from prompts: loads Stable Diffusion v1 and samples it with DDIM.

    python sample.py "a red star" --model notebooks/toy/model --num 4 --out star.png

    sd = sample.load("CompVis/stable-diffusion-v1-4")
    images = sample.generate(sd, ["a red star"], num=4)

Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752. `generate` turns prompts
into images. A model is a folder in diffusers' layout with safetensors, local or on the
hub; notebooks/tools/convert.py brings everything else into that form.
"""

import argparse
import json
import math
import shlex
import signal
import sys
import unicodedata
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, nn
from tqdm import tqdm

import clip_text
import ddim
import unet
import vae

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"  # the paper's


class UsageError(ValueError):
    """Input that can't be used. A command prints it as one line, without a traceback."""


# ---- the model


@dataclass(eq=False)  # compares by identity, so it can be the key of a cache
class StableDiffusion:
    """The four parts of a model."""

    unet: unet.UNet
    vae: vae.VAE
    text_encoder: clip_text.TextEncoder
    tokenizer: Callable  # transformers' CLIPTokenizer
    edited: frozenset[str] = field(default=frozenset(), repr=False)  # replaced in the U-Net

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, 64, 64): of one latent of the size that the model was trained on."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> text features (B, 77, 768). Longer prompts are cut, with a warning."""
        if not prompts:
            raise UsageError("there is no prompt to encode")
        length = self.text_encoder.config.max_position_embeddings
        token_ids = self.tokenizer(prompts, verbose=False).input_ids  # we warn ourselves
        for prompt, ids in zip(prompts, token_ids):
            if len(ids) > length:
                warnings.warn(f"cut from {len(ids)} to {length} tokens: {prompt!r}")

        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True
        )
        return self.text_encoder(torch.tensor(tokens.input_ids, device=self.device))

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """B images, fitted to the model's size -> the U-Net's latents (B, 4, H, W)."""
        side = self.unet.config.sample_size * self.vae.config.factor
        fitted = [ImageOps.fit(to_rgb(image), (side, side)) for image in images]
        pixels = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # (B, 3, 8H, 8W)
        scaled = pixels / 127.5 - 1

        # the mean of q(z|x), where LDM draws a sample: one image, one latent
        mean, _ = self.vae.encode(scaled.to(self.device, self.dtype))
        return mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x_0: Tensor, source: str = "an image") -> list[Image.Image]:
        """The U-Net's latents (B, 4, H, W) -> B images of 8H x 8W pixels."""
        latents = (x_0 / self.vae.config.scaling_factor).to(self.dtype)
        images = self.vae.decode(latents).float()  # (B, 3, 8H, 8W), -1..1
        if not images.isfinite().all():
            raise UsageError(f"{source} has non-finite pixels: try --dtype float32")

        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, 8H, 8W, 3)
        return [Image.fromarray(image) for image in pixels]


# ---- from prompts to images


def image_size(sd: StableDiffusion, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Returns (width, height) in pixels. size: one side, both, or None, the model's own.

    Raises UsageError unless both are multiples of 64: the VAE and the U-Net halve them
    three times each.
    """
    factor = sd.vae.config.factor
    if size is None:
        size = sd.unet.config.sample_size * factor
    width, height = (size, size) if isinstance(size, int) else size

    unit = factor * 2 ** (len(sd.unet.config.block_out_channels) - 1)  # 64 for SD v1
    if min(width, height) < unit or width % unit or height % unit:
        raise UsageError(f"size is {width} x {height}, choose multiples of {unit}")
    return width, height


def check_steps_and_seeds(steps: int, seeds: list[int]) -> None:
    """Raises UsageError for an invalid number of steps or seed."""
    if not 1 <= steps <= ddim.MAX_STEPS:
        raise UsageError(f"steps is {steps}, choose 1 to {ddim.MAX_STEPS}")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed is {seed}, choose 0 to {2**63 - 1}")


def starting_noise(shape: tuple[int, int, int], num: int, seed: int) -> Tensor:
    """Returns (num, *shape), drawn image by image, on the CPU and in float32.

    So an image's noise depends on neither batch nor device.
    """
    rng = Generator().manual_seed(seed)
    return torch.cat([torch.randn((1, *shape), generator=rng) for _ in range(num)])


@torch.no_grad()
def generate(
    sd: StableDiffusion,
    prompts: list[str],
    num: int = 1,
    seed: int | list[int] = 0,
    steps: int = 50,
    guidance: float = 7.5,
    size: int | tuple[int, int] | None = None,
    negative: str = "",
    batch: int = 8,
    progress: bool = False,
    predictor: Callable = ddim.guided_predictor,
    denoise: Callable = ddim.denoise,
) -> list[Image.Image]:
    """Returns `num` images of each prompt, prompt by prompt. Raises UsageError.

    seed: one number, which gives every prompt the same `num` noises, or one for each.
    size: in pixels, one side or (width, height); None is what the model was trained on.
    negative: takes the empty prompt's place in the guidance. batch: images made at
    once.
    predictor, denoise: another guidance, another sampler, called as those of ddim.py
    are; the sampler's rng is seeded with the first seed, so its own noise depends on
    the batch.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    check_steps_and_seeds(steps, seeds)
    if num < 1 or batch < 1:
        raise UsageError(f"num is {num}, batch {batch}: choose 1 or more")
    if len(seeds) != len(prompts):
        raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts")

    width, height = image_size(sd, size)
    factor = sd.vae.config.factor
    shape = (sd.unet.config.in_channels, height // factor, width // factor)
    features = sd.encode(prompts).repeat_interleave(num, dim=0)  # (P * num, 77, 768)
    noise = torch.cat([starting_noise(shape, num, each) for each in seeds])
    null = sd.encode([negative])  # (1, 77, 768)
    rng = Generator().manual_seed(seeds[0])

    images = []
    bar = tqdm(total=len(noise) * steps, unit="step", delay=1, disable=not progress)
    for x_T, c in zip(noise.split(batch), features.split(batch)):
        predict = predictor(sd.unet, c, null.expand_as(c), guidance)
        for t, x_t in denoise(predict, x_T.to(sd.device), steps, rng):
            if t > 0:  # 0 is the image, not a step
                bar.update(len(x_t))
        first = prompts[len(images) // num]
        images += sd.decode(x_t, f"the batch from {first!r} on")  # the last x_t is x_0
    bar.close()
    return images


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns what a viewer shows: turned as EXIF says, on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image) / 257
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def printable(label: str) -> str:
    """Returns a label in ASCII, which is what Pillow's own font has: é as e, ж as ?."""
    letters = unicodedata.normalize("NFKD", " ".join(label.split()))
    bare = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return bare.encode("ascii", "replace").decode()


def shortened(label: str, width: int, font: ImageFont.ImageFont) -> str:
    """Returns as much of a label as fits into `width` pixels, with dots if that isn't all."""
    text = printable(label)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def contact_sheet(rows: list[tuple], least: int = 96) -> Image.Image:
    """Draws rows of (label, images), or (labels, images) with one for each image.

    Small images are enlarged by a whole number, to `least` pixels or more. Labels are in
    ASCII, and shortened to the width of the row, or of the image.
    """
    line, gap = 22, 4  # pixels: of a line of text, between images
    _, first_images = rows[0]
    image_width = first_images[0].width
    side = image_width * max(1, math.ceil(least / image_width))
    columns = max(len(images) for _, images in rows)
    sheet_size = (gap + columns * (side + gap), len(rows) * (line + side + gap))

    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for i, (labels, images) in enumerate(rows):
        top = i * (line + side + gap)
        label_width = side
        if isinstance(labels, str):
            labels = [labels]
            label_width = sheet.width - 2 * gap
        for j, label in enumerate(labels):
            left = gap + j * (side + gap)
            text = shortened(label, label_width, font)
            draw.text((left, top + 3), text, fill="black", font=font)
        for j, image in enumerate(images):
            left = gap + j * (side + gap)
            sheet.paste(ImageOps.pad(image, (side, side)), (left, top + line))
    return sheet


# ---- loading a folder in diffusers' layout, or a hub repository


class Part(NamedTuple):
    """How one part of a model's folder is read."""

    model: type
    config_from_json: Callable
    rename: Callable | None  # from older spellings of its tensors' names
    files: list[str]  # its weights, the most precise first


DIFFUSERS = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
TRANSFORMERS = ["model.safetensors", "model.fp16.safetensors"]
PARTS = {
    "unet": Part(unet.UNet, unet.config_from_json, None, DIFFUSERS),
    "vae": Part(vae.VAE, vae.config_from_json, vae.rename, DIFFUSERS),
    "text_encoder": Part(
        clip_text.TextEncoder, clip_text.config_from_json, clip_text.rename, TRANSFORMERS
    ),
}
SCHEDULE = {  # what scheduler_config.json says under each of these keys, if it has it
    "num_train_timesteps": ddim.TRAIN_STEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": ddim.BETA_START,
    "beta_end": ddim.BETA_END,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}


def check_schedule(settings: dict) -> None:
    """Raises UsageError where a model's settings name a different schedule."""
    for key, value in SCHEDULE.items():
        if settings.get(key, value) != value:
            raise UsageError(
                f"this isn't Stable Diffusion v1's schedule: {key} is {settings[key]}, not {value}"
            )


def check_sizes(config: Any, source: Path) -> None:
    """Raises UsageError unless each size has its default's type and a plausible value.

    Tuples have an entry for each level, so they must be of one length.
    """
    lengths = set()
    for name, size in vars(config).items():
        largest = 100 if "layers" in name else 100_000  # else building it would never end
        default = getattr(type(config), name)
        fits = type(size) is type(default)
        if fits and isinstance(size, tuple):
            lengths.add(len(size))
            fits = {*map(type, size)} == {*map(type, default)} and len(lengths) == 1
        if not fits or not 0 <= np.max(size) <= largest:
            raise UsageError(f"{source} has {name} = {size}")


def read_json(file: Path) -> dict:
    """Raises UsageError where a file holds no JSON object."""
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} holds no settings, download it again: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{file} holds no settings, download it again: {settings}")
    return settings


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns a safetensors file's tensors, memory-mapped, and its metadata."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise UsageError(f"{file} is incomplete, or not safetensors: {error}") from error


def check_kind(folder: Path) -> None:
    """Raises a UsageError that says what the model is, unless it may be SD v1."""
    file = folder / "unet" / "config.json"
    config = read_json(file) if file.is_file() else {}
    signs = {
        "SDXL": config.get("addition_embed_type"),
        "Stable Diffusion 2": config.get("use_linear_projection"),
        "an inpainting model": config.get("in_channels") == 9,
    }
    for kind, found in signs.items():
        if found:
            raise UsageError(f"this is {kind}, not Stable Diffusion v1")


def read_configs(folder: Path) -> dict[str, Any]:
    """Returns the config of each part. Raises UsageError unless they are of SD v1's kind."""
    check_kind(folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        check_schedule(read_json(schedule))

    configs = {}
    for name, part in PARTS.items():
        file = folder / name / "config.json"
        try:
            configs[name] = part.config_from_json(read_json(file))
        except KeyError as error:
            raise UsageError(f"{file} has no {error}") from error
        check_sizes(configs[name], source=file)
    return configs


def read_weights(folder: Path, source: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of all parts, named `unet.conv_in.weight` and so on.

    source: the name under which the user knows the folder, for the error.
    """
    tensors = {}
    for name, part in PARTS.items():
        files = [folder / name / file for file in part.files]
        found = [file for file in files if file.is_file()]
        if not found:
            raise UsageError(f"{files[0]} is missing; {convert_hint(source)}")

        weights, _ = read_tensors(found[0])
        if part.rename:
            weights = part.rename(weights)
        tensors |= {f"{name}.{key}": tensor for key, tensor in weights.items()}
    return tensors


def assign_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> list[str]:
    """Gives a model its tensors, uncopied and frozen; returns the names of those left over.

    Raises UsageError if one is missing or has another shape.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = []
    for name, tensor in model.state_dict().items():
        expected = list(tensor.shape)
        if shapes.get(name) != expected:
            wrong.append(f"{name}: {shapes.get(name, 'missing')}, expected {expected}")
    if wrong:
        raise UsageError(
            f"{source} doesn't fit the model's config, {len(wrong)} tensors differ: "
            f"{', '.join(wrong[:3])}; it has {', '.join([*tensors][:3])}"
        )

    model.requires_grad_(False)
    _, leftover = model.load_state_dict(tensors, strict=False, assign=True)
    return leftover


def print_left_out(source: str | Path, names: list[str]) -> None:
    """Prints how many of a source's tensors aren't used, if any, and the first three."""
    if names:
        first = ", ".join(names[:3])
        print(f"{source}: left out {len(names)} tensors: {first}", file=sys.stderr)


def download(name: str) -> Path:
    """Returns a hub repository's folder in the hub's cache: once there, no network is needed.

    The configs come first and are checked, then one file of weights for each part.
    """
    wanted = ["scheduler/*", "tokenizer/*"]
    wanted += [f"{part}/config.json" for part in PARTS]
    folder = Path(snapshot_download(name, allow_patterns=wanted))
    read_configs(folder)

    for precision in (0, 1):  # float32, then float16 for the parts that lack it
        for part_name, part in PARTS.items():
            if not any((folder / part_name / file).exists() for file in part.files):
                wanted.append(f"{part_name}/{part.files[precision]}")
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    return folder


def load_tokenizer(source: str | Path) -> Callable:
    """Returns the tokenizer of a folder or a hub repository."""
    from transformers import CLIPTokenizer  # here, so that --help doesn't wait a second for it

    try:
        return CLIPTokenizer.from_pretrained(source)
    except Exception as error:  # damaged files can raise anything
        raise UsageError(f"no tokenizer in {source}: {error}") from error


def check_parts(sd: StableDiffusion) -> None:
    """Raises UsageError unless the parts are of one model."""
    text_config = sd.text_encoder.config
    tokens = {*sd.tokenizer.get_vocab().values()}  # a damaged file may give an id twice
    pairs = [
        (len(tokens), text_config.vocab_size),
        (text_config.hidden_size, sd.unet.config.cross_attention_dim),
        (sd.vae.config.latent_channels, sd.unet.config.in_channels),
    ]
    if any(a != b for a, b in pairs):
        raise UsageError(f"its parts aren't of one model: each pair should be equal: {pairs}")


def convert_hint(source: str | Path, out: str = "", *flags: str) -> str:
    """Returns the command that converts weights in another format."""
    out = out or f"{Path(source).stem}-converted"
    words = ["python", "-m", "notebooks.tools.convert", str(source), *flags, "--out", out]
    return f"convert it: {shlex.join(words)}"


def find_folder(model: str | Path) -> Path:
    """Returns a model's folder, downloaded if there is none here. Raises UsageError."""
    folder = Path(model).absolute()
    if folder.is_file():
        raise UsageError(f"it is a file, not a folder; {convert_hint(model)}")
    if folder.exists():
        return folder
    try:
        return download(str(model))
    except Exception as error:  # of the network, the hub, or damaged files
        raise UsageError(f"no such folder here; on the hub: {one_line(error)}") from error


def choose_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Replaces "auto": the accelerator, if there is one, and half precision on it."""
    if device.isdigit():
        device = f"cuda:{device}"
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
        if "cuda" in device and not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "float16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {dtype}, choose float32, bfloat16 or float16")
    return device, getattr(torch, dtype)


def load(
    model: str | Path = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto"
) -> StableDiffusion:
    """Loads Stable Diffusion v1 from a folder in diffusers' layout, or from the hub.

    dtype: auto is float32 on the CPU, elsewhere bfloat16, or float16 where that is
    emulated.
    Raises UsageError, whose message for other published forms ends with the command that
    converts them. In float32 on the CPU, weights stay mapped from their files: don't
    overwrite those.
    """
    try:
        folder = find_folder(model)
        configs = read_configs(folder)
        tensors = read_weights(folder, model)
        tokenizer = load_tokenizer(folder / "tokenizer")
    except Exception as error:  # damaged files can raise anything
        raise UsageError(f"can't load {model}: {one_line(error)}") from error

    try:
        with torch.device("meta"):  # takes no memory
            parts = nn.ModuleDict({name: PARTS[name].model(configs[name]) for name in PARTS})
        leftover = assign_tensors(parts, tensors, folder)
        parts.to(*choose_device(device, dtype))
        sd = StableDiffusion(**parts, tokenizer=tokenizer)
        check_parts(sd)
    except (ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        # sizes that don't fit, or no such device. Others, such as a TypeError or an
        # AttributeError, are mistakes in a model's code and keep their traceback
        raise UsageError(f"can't load {model}: {one_line(error)}") from error

    print_left_out(folder, leftover)
    return sd


# ---- erased weights


def unet_tensors(sd: StableDiffusion) -> dict[str, Tensor]:
    """Returns the U-Net's tensors by their published names, also of a compiled U-Net."""
    tensors = sd.unet.state_dict()
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


def with_weights(
    sd: StableDiffusion, weights: dict[str, Tensor], source: str | Path = "theta"
) -> StableDiffusion:
    """Returns a model with copies of some U-Net weights in place; it shares the others.

    Raises UsageError if the U-Net has no tensor of such a name or shape.
    """
    current = unet_tensors(sd)
    unknown = [name for name in weights if name not in current]
    if unknown or not weights:
        raise UsageError(
            f"{source} has {len(weights)} tensors, {len(unknown)} not the U-Net's: {unknown[:3]}"
        )

    copies = {}
    for name, tensor in weights.items():
        copies[name] = tensor.detach().to(sd.device, sd.dtype, copy=True)
    with torch.device("meta"):
        edited = unet.UNet(sd.unet.config)
    assign_tensors(edited, current | copies, source)
    return replace(sd, unet=edited, edited=sd.edited.union(weights))


def fingerprint(sd: StableDiffusion, without: Iterable[str] = ()) -> list[float]:
    """Returns the first number of each U-Net tensor not in `without`, in order of names.

    It tells models apart, and loading one in half precision hardly changes it.
    """
    tensors = unet_tensors(sd)
    firsts = [tensors[name].flatten()[0].float() for name in sorted({*tensors} - {*without})]
    return torch.stack(firsts).tolist() if firsts else []


def load_erased(sd: StableDiffusion, path: str | Path) -> StableDiffusion:
    """Returns the model with the weights of a file that erase.py wrote, or the official code.

    Prints a line if the file was made from another model, or if it replaces weights
    that were edited before. Raises UsageError, whose message ends with the way out: the
    model that it was made from, or the command that converts other published forms.
    """
    made_from = ""
    try:
        weights, metadata = read_tensors(Path(path))
        made_from = settings_in(metadata).get("model", "")
        erased = with_weights(sd, weights, source=path)
    except UsageError as error:
        out = f"{Path(path).stem}-converted.safetensors"
        way_out = convert_hint(path, out, "--erased")
        if made_from:
            way_out = f"it was made from --model {made_from}"
        raise UsageError(f"{error}; {way_out}") from error

    old, new = unet_tensors(sd), unet_tensors(erased)
    replaced = [name for name in sd.edited & weights.keys() if not old[name].equal(new[name])]
    if replaced:
        print(f"{path} replaces {len(replaced)} already edited weights", file=sys.stderr)
    if not is_base(sd, weights, metadata):
        print(f"{path} was made from a different model", file=sys.stderr)
    return erased


def is_base(sd: StableDiffusion, weights: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """Whether a file's `base` is the fingerprint of sd; True for files that have none."""
    ours = fingerprint(sd, without=weights.keys())
    try:
        base = np.array(settings_in(metadata)["base"], dtype=float)
    except (KeyError, TypeError, ValueError):
        return True
    return base.shape == (len(ours),) and np.allclose(base, ours, rtol=0.01, atol=1e-4)


# ---- files


def settings_in(metadata: dict) -> dict:
    """Returns the settings that this project wrote into a file; {} for others' files."""
    try:
        settings = json.loads(metadata.get("settings", "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file next to `path`, then moves it there, so it is never half-written."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_png(image: Image.Image, path: Path, settings: dict, **texts: str) -> None:
    """Writes a PNG whose text chunks say how it was made: `settings` in JSON, and more `texts`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", json.dumps(settings, default=str))
    for key, text in texts.items():
        info.add_itxt(key, text)
    write_whole(path, lambda part: image.save(part, format="PNG", pnginfo=info))


def check_out(path: Path, suffix: str, new: bool = False) -> None:
    """Makes a file's folder. Raises UsageError for a name with another suffix.

    new: raises it also if the file exists.
    """
    if path.suffix != suffix or path.is_dir():
        raise UsageError(f"{path} isn't the name of a {suffix} file: choose another --out")
    if new and path.exists():
        raise UsageError(f"{path} exists; delete it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)


# ---- the command line


def one_line(error: Exception) -> str:
    """Returns what an error says in one line of at most 500 characters, cut in the middle."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= 500 else f"{text[:195]} ... {text[-300:]}"


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error's message is one of torch's for running out of memory."""
    return any(text in str(error) for text in ("out of memory", "allocate memory"))


def read_flags(file: Path) -> list[str]:
    """Returns the words of a flags file; --name=./PATH is relative to the file's folder."""
    words = []
    for word in shlex.split(file.read_text()):
        name, _, value = word.partition("=")
        words.append(f"{name}={file.parent / value}" if value.startswith("./") else word)
    return words


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parses a command line: prompts, then options; @FILE has more of them.

    Raises UsageError for an option before the prompts: where its value lacks quotes,
    argparse would take the rest of it for prompts. (Some tools take none.)
    """
    expanded = []
    for word in words:
        expanded += read_flags(Path(word[1:])) if word.startswith("@") else [word]

    args, stray = parser.parse_known_args(expanded)
    if {"prompts", "concepts"} & vars(args).keys() and words[0].startswith("-"):
        raise UsageError(f"put prompts before options, not after {words[0]}")
    if stray:
        raise UsageError(
            f"no use for {shlex.join(stray)}: see --help; quote each prompt and each value"
        )
    return args


def fail_in_one_line(run: Callable, parser: argparse.ArgumentParser) -> None:
    """Runs a command; bad input ends it with one line and exit status 2, without a traceback."""
    # as Ctrl-C does, SIGTERM leaves no half-written file
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(parse(parser, sys.argv[1:]))
    except (
        UsageError, OSError, MemoryError, Image.DecompressionBombError, RuntimeError
    ) as error:
        if isinstance(error, RuntimeError) and not ran_out_of_memory(error):
            raise  # a mistake in somebody's code
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def shared_parser(description: str, words: str, help_text: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that sample.py and erase.py share.

    words: what comes first, "prompts" or "concepts".
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(words, nargs="+", metavar=words.removesuffix("s").upper(), help=help_text)

    add("--model", default=DEFAULT_MODEL, help="a folder in diffusers' layout, or a hub name")
    add("--erased", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="weights that erase.py wrote; of the same weight, the last file's counts")

    add("--seed", type=int, default=0, help="of all random numbers")
    add("--steps", type=int, default=50, help="DDIM steps")
    add("--device", default="auto", help="cpu, cuda, mps, ...")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: float32 on the CPU")
    return parser


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    check_out(args.out, ".png")
    sd = load(args.model, args.device, args.dtype)
    for file in args.erased:
        sd = load_erased(sd, file)

    images = generate(
        sd,
        args.prompts,
        num=args.num,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        size=args.size,
        negative=args.negative,
        batch=args.batch,
        progress=True,
    )
    rows = []
    for i, prompt in enumerate(args.prompts):
        rows.append((prompt, images[i * args.num : (i + 1) * args.num]))
    save_png(contact_sheet(rows), args.out, vars(args))
    print(args.out)


def main() -> None:
    """Reads the command line."""
    parser = shared_parser("Images from prompts.", "prompts", "one row of images for each")
    add = parser.add_argument
    add("--num", type=int, default=1, help="images of each prompt")
    add("--guidance", type=float, default=7.5, help="guidance scale")
    add("--negative", default="", help="prompt to steer away from")
    add("--size", type=int, help="pixels; by default the model's own")
    add("--batch", type=int, default=8, help="images made at once")
    add("--out", type=Path, default=Path("sample.png"), help="the contact sheet")
    fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
