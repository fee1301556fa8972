"""Pictures from prompts: loads Stable Diffusion v1 in any published form and samples it with DDIM.

    python sample.py "a red star" --model notebooks/toy --num 4 --out star.png

    sd = sample.load("notebooks/toy")      # or sd-v1-4.ckpt, or a name on the hub
    images = sample.generate(sd, ["a red star", "a moon"], num=4, seed=0)

Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752. A prompt's way to a picture: tokens,
text encoder (clip_text.py), latents from noise by DDIM (ddim.py) with the U-Net (unet.py), decoder
of the VAE (vae.py). Who follows a prompt needs the first two sections, a model and prompts to
pictures. The others: files to tensors; tensors to a model; pictures and models to files; erased
weights; tables of prompts; the command line.
"""

import argparse
import csv
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

import clip_text
import ddim
import unet
import vae

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"  # the paper's
CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer Stable Diffusion v1 has


class Part(NamedTuple):
    """One of the three models of a checkpoint, and where its tensors are."""

    model: type
    config: type
    rename: Callable  # published names -> ours
    compvis: str  # prefix of its names in a single file of CompVis
    files: tuple[str, ...]  # in a folder, the first that is there


DIFFUSERS = [f"diffusion_pytorch_model{end}"
             for end in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")]
TRANSFORMERS = ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
                "pytorch_model.fp16.bin"]
PARTS = {
    "unet": Part(unet.UNet, unet.UNetConfig, unet.rename, "model.diffusion_model.", DIFFUSERS),
    "vae": Part(vae.VAE, vae.VAEConfig, vae.rename, "first_stage_model.", DIFFUSERS),
    "text_encoder": Part(clip_text.TextEncoder, clip_text.TextConfig, clip_text.rename,
                         "cond_stage_model.transformer.", TRANSFORMERS),
}
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
             "special_tokens_map.json")
OTHER_MODELS = {  # in a single file, names that begin so are of another model
    "conditioner.": "SDXL", "cond_stage_model.model.": "Stable Diffusion 2",
    "v_pred": "a v-prediction model", "control_model.": "a ControlNet", "lora_": "a LoRA",
}


@dataclass(frozen=True)
class StableDiffusion:
    """The four parts of a checkpoint."""

    unet: unet.UNet
    vae: vae.VAE
    text_encoder: clip_text.TextEncoder
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
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """B pictures, fitted to the model's size -> the U-Net's latents (B, 4, H, W)."""
        side = self.unet.config.sample_size * self.vae.config.factor
        pixels = np.stack([ImageOps.fit(image.convert("RGB"), (side, side)) for image in images])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 8H, 8W)
        mean, _ = self.vae.encode(scaled.to(self.device, self.dtype))
        return (mean * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> list[Image.Image]:
        """The U-Net's latents (B, 4, H, W) -> B pictures of 8H x 8W pixels."""
        latents = (x_0 / self.vae.config.scaling_factor).to(self.dtype)
        images = self.vae.decode(latents)  # (B, 3, 8H, 8W), -1..1
        pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# ---- prompts to pictures ----

def starting_noise(sd: StableDiffusion, num: int, seed: int,
                   size: int | tuple[int, int] | None) -> Tensor:
    """(num, 4, height/8, width/8), drawn one picture after another on the CPU in float32.

    So it depends neither on the batch nor on the device. Raises ValueError for a size that
    the levels of the U-Net don't divide.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, choose 0 to {2**63 - 1}")
    factor, levels = sd.vae.config.factor, len(sd.unet.config.block_out_channels)
    size = sd.unet.config.sample_size * factor if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    unit = factor * 2 ** (levels - 1)  # 64 pixels for Stable Diffusion v1
    for side in (width, height):
        if side < unit or side % unit:
            raise ValueError(f"size is {side}, choose a multiple of {unit}")
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sd.unet.config.in_channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=generator) for _ in range(num)])


@torch.no_grad()
def generate(sd: StableDiffusion, prompts: list[str], num: int = 1, seed: int | list[int] = 0,
             steps: int = 50, guidance: float = 7.5, size: int | tuple[int, int] | None = None,
             negative: str = "", batch: int = 8, progress: bool = False, safe: str = "",
             sld: str = "medium") -> list[Image.Image]:
    """`num` pictures of each prompt, one prompt after another.

    `seed` is one number, from which every prompt gets the same `num` noises, or one for each
    prompt. `size` is in pixels, one side or (width, height); None is what the model was trained
    on. `negative` takes the empty prompt's place in the guidance, `batch` pictures are made at
    once. `safe` is a concept to avoid by Safe Latent Diffusion, in one of ddim.SLD's settings.
    Raises ValueError for an impossible num, batch, size, steps, seed or sld.
    """
    if num < 1 or batch < 1:
        raise ValueError(f"num is {num}, batch {batch}: choose 1 or more")
    if sld not in ddim.SLD:
        raise ValueError(f"sld is {sld!r}, choose from {', '.join(ddim.SLD)}")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    noise = torch.cat([starting_noise(sd, num, s, size) for s in seeds])  # (P*num, 4, H, W)
    text = sd.encode(prompts).repeat_interleave(num, dim=0)  # (P*num, 77, 768)
    null, avoid = sd.encode([negative]), sd.encode([safe])
    total = len(noise) * len(ddim.timesteps(steps))
    images = []
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for x_t, c in zip(noise.to(sd.device).split(batch), text.split(batch), strict=True):
            null_c, avoid_c = null.expand_as(c), avoid.expand_as(c)
            predict = (ddim.safe_guided(sd.unet, c, null_c, avoid_c, guidance, ddim.SLD[sld])
                       if safe else ddim.guided(sd.unet, c, null_c, guidance))
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


# ---- files to tensors ----

class Inert:
    """Stands for every class in a pickle that isn't of a tensor: takes anything, does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What the published pickles name beyond what torch lets pass; no code of these is ever run.
INERT = [(Inert, name) for name in (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar", "numpy.dtype")]


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, .bin or .pt file, or of the `state_dict` in it; mapped.

    torch's restricted unpickler refuses whatever could run. One level of nesting (module, then
    weight and bias) is joined with dots. Raises ValueError for a pickle with anything unknown.
    """
    mapped = zipfile.is_zipfile(file) and file.suffix != ".safetensors"  # torch goes by that name
    try:
        with torch.serialization.safe_globals(INERT), open(file, "rb") as opened:
            found = torch.load(file if mapped else opened, "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (f"it asks for {asked[1]}, as no published file does" if asked
                  else "it is damaged or no file of tensors")
        raise ValueError(f"{file} was refused and nothing in it was run: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not tensors by name")
    found = found.get("state_dict", found)
    tensors = {}
    for name, value in found.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        tensors |= {f"{name}.{key}".rstrip("."): tensor for key, tensor in inner
                    if isinstance(tensor, Tensor)}
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped and not read until they are used.

    Whether it is a safetensors file or a pickle is told by its content. Raises ValueError where
    it is neither, damaged, or holds more than tensors.
    """
    if not file.is_file():
        raise ValueError(f"{file} isn't there, or isn't a file")
    try:
        with open(file, "rb") as opened:
            is_safetensors = opened.read(9)[8:] == b"{"  # after the length of its JSON header
        return load_file(file) if is_safetensors else read_pickle(file)
    except ValueError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged, incomplete or no file of tensors, download it again: "
                         f"{reason}") from error


def read_json(file: Path) -> dict:
    """Raises ValueError where there is no JSON object in it."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} isn't JSON, download it again: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings, download it again")
    return content


class Found(NamedTuple):
    """What was found of a part: its settings, its tensors, and the file for messages."""

    config: Any
    tensors: dict[str, Tensor]
    file: Path


def read_part(folder: Path, name: str) -> Found:
    """One part of a folder in diffusers' layout. Raises ValueError where it isn't there."""
    part, where = PARTS[name], folder / name
    files = [where / file for file in part.files if (where / file).is_file()]
    if not files or not (where / "config.json").is_file():
        missing = f"{name}/{part.files[0] if not files else 'config.json'}"
        raise ValueError(f"{folder}/{missing} is missing: --model takes a folder in diffusers' "
                         "layout, a .ckpt or .safetensors file, or a name on the hub")
    try:
        config = part.config.from_json(read_json(where / "config.json"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}/config.json isn't one of Stable Diffusion v1: "
                         f"{type(error).__name__} {error}") from error
    return Found(config, part.rename(read_tensors(files[0]), config), files[0])


def read_folder(folder: Path) -> dict[str, Found]:
    """The three parts of a folder. Raises ValueError for a v-prediction model."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        kind = read_json(scheduler).get("prediction_type", "epsilon")
        if kind != "epsilon":
            raise ValueError(f"{scheduler} has prediction_type = {kind!r}, Stable Diffusion v1 "
                             "predicts epsilon: this is another model, use SD v1 weights")
    return {name: read_part(folder, name) for name in PARTS}


def read_single(file: Path) -> dict[str, Found]:
    """The three parts of a file of CompVis. Where it has the EMA of the U-Net, that is taken.

    Raises ValueError for another model and for tensors that belong to no part.
    """
    tensors = read_tensors(file)
    for name in tensors:
        for start, model in OTHER_MODELS.items():
            if name.startswith(start):
                raise ValueError(f"{file} holds {name}: this is {model}, use SD v1 weights")
    prefixes = tuple(part.compvis for part in PARTS.values())
    wrong = [name for name in tensors  # without a dot: the noise schedule
             if "." in name and not name.startswith((*prefixes, "model_ema."))]
    wrong += [f"no {prefix}*" for prefix in prefixes
              if not any(name.startswith(prefix) for name in tensors)]
    if wrong:
        raise ValueError(f"{file} isn't a whole checkpoint of Stable Diffusion v1, {len(wrong)} "
                         f"tensors differ: {'; '.join(wrong[:3])}")
    inputs = tensors[prefixes[0] + "input_blocks.0.0.weight"].shape[1]
    if inputs != PARTS["unet"].config().in_channels:
        raise ValueError(f"{file} has a U-Net with {inputs} input channels, not 4: this is an "
                         "inpainting model or another relative, use SD v1 weights")
    found = {}
    for name, part in PARTS.items():
        own = {key.removeprefix(part.compvis): tensor for key, tensor in tensors.items()
               if key.startswith(part.compvis)}
        # the EMA has names without dots, and without "model."
        ema = {key: f"model_ema.diffusion_model{key.replace('.', '')}" for key in own}
        if name == "unet" and any(key in tensors for key in ema.values()):
            print(f"{file}: taking the EMA of the U-Net's weights", file=sys.stderr)
            own = {key: tensors[average] for key, average in ema.items() if average in tensors}
        found[name] = Found(part.config(), part.rename(own, part.config()), file)
    return found


def needed(files: list[str]) -> list[str]:
    """Which files of a repository in diffusers' layout have to be downloaded: one set of weights.

    Raises ValueError where a part has none.
    """
    chosen = ["scheduler/scheduler_config.json", *(f"tokenizer/{name}" for name in TOKENIZER)]
    for name, part in PARTS.items():
        weights = [file for file in (f"{name}/{file}" for file in part.files) if file in files]
        if not weights:
            raise ValueError(f"it has no {name}/{part.files[0]}; if it holds a .ckpt or "
                             ".safetensors file, download that and give it to --model")
        chosen += [f"{name}/config.json", weights[0]]
    return chosen


def download(name: str, revision: str | None, choose: Callable = needed) -> Path:
    """The folder of a repository on the hub, in the hub's own cache; only the needed files.

    Without a connection, or with HF_HUB_OFFLINE=1, what was downloaded before. Raises ValueError
    where there is no such thing, or where the download breaks off.
    """
    def brief(error: Exception) -> str:
        return " ".join(str(error).split())[:200]

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name} is no file or folder here, and no name on the hub (OWNER/NAME)")
    try:
        files = choose(list_repo_files(name, revision=revision))
    except ValueError as error:
        raise ValueError(f"{name} is no file or folder here and no model on the hub that can be "
                         f"used: {brief(error)}") from error
    except (OSError, HTTPError) as error:
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True,
                                          allow_patterns="*config.json"))
        except (OSError, HTTPError):
            raise ValueError(f"{name} is no file or folder here and can't be had from the hub: "
                             f"{brief(error)}") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, HTTPError) as error:
        raise ValueError(f"the download of {name} broke off, the same command again keeps what is "
                         f"complete: {brief(error)}") from error


def load_tokenizer(beside: Path, given: str | Path | None, single: bool) -> CLIPTokenizer:
    """CLIP's tokenizer: the given one, else tokenizer/ beside the weights, else (of a single file,
    which has none) the hub's. Raises ValueError where there is none.
    """
    folder = Path(given or beside / "tokenizer")
    if not folder.is_dir() and (given or single):
        names = [*TOKENIZER, *(f"tokenizer/{name}" for name in TOKENIZER)]
        folder = download(str(given or CLIP), None, lambda files: names)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ValueError(f"{folder}/vocab.json is missing: --tokenizer takes the folder tokenizer/ "
                         f"of any Stable Diffusion v1, or a name on the hub such as {CLIP}")
    return CLIPTokenizer.from_pretrained(folder)


# ---- tensors to a model ----

def check_tensors(found: dict, expected: dict, file: Path, partial: bool = False) -> None:
    """Raises ValueError where `found` has other names or shapes than `expected`.

    With `partial`, names may be missing, but not all of them.
    """
    wrong = [f"{name} isn't in the model" for name in found if name not in expected]
    if not partial:
        wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
              for name in found if name in expected and found[name].shape != expected[name].shape]
    if not found:
        raise ValueError(f"{file} holds no tensors")
    if wrong:
        raise ValueError(f"{file} doesn't fit this model, {len(wrong)} tensors differ: "
                         f"{'; '.join(wrong[:3])}")


def build(name: str, found: Found) -> nn.Module:
    """A model on the meta device (no memory, no random weights), then given the file's tensors."""
    with torch.device("meta"), ExitStack() as stack:
        for layer in (nn.Linear, nn.Conv2d, nn.Embedding):  # drawing takes time, even on meta
            stack.enter_context(patch.object(layer, "reset_parameters", lambda self: None))
        model = PARTS[name].model(found.config)
    check_tensors(found.tensors, model.state_dict(), found.file)
    model.load_state_dict(found.tensors, assign=True)
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


def load(model: str | Path = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto",
         tokenizer: str | Path | None = None, revision: str | None = None) -> StableDiffusion:
    """Stable Diffusion v1 from a folder in diffusers' layout, a file of CompVis, or the hub.

    dtype is float32, float16 or bfloat16; auto is float32 on the CPU, elsewhere bfloat16 where the
    device really has it, else float16. tokenizer is a folder or a name on the hub, None:
    the checkpoint's own. revision is the hub's branch, tag or commit.
    Raises ValueError for what is another model, incomplete or damaged.
    """
    device, path = choose_device(device), Path(model)
    if dtype == "auto":
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(
            including_emulation=False)
        dtype = "float32" if device.type == "cpu" else "float16" if emulated else "bfloat16"
    single = path.is_file()
    if not path.exists():
        path = download(str(model), revision)
    found = read_single(path) if single else read_folder(path)
    words = load_tokenizer(path.parent if single else path, tokenizer, single)
    configs = {name: part.config for name, part in found.items()}
    for what, a, b in (
            ("the tokenizer and the text encoder count tokens", len(words),
             configs["text_encoder"].vocab_size),
            ("the text encoder and the U-Net have text features of width",
             configs["text_encoder"].hidden_size, configs["unet"].cross_attention_dim),
            ("the VAE and the U-Net have latent channels",
             configs["vae"].latent_channels, configs["unet"].in_channels)):
        if a != b:
            raise ValueError(f"{model}: {what}, {a} and {b}: they are of different models")
    parts = [build(name, part).to(device, getattr(torch, dtype)) for name, part in found.items()]
    return StableDiffusion(*parts, words)


# ---- pictures and models to files ----

def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file beside `path` and moves it there: it is whole or not there at all.

    Two processes may write the same file: each has a name of its own until it is whole.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def open_image(file: Path) -> Image.Image:
    """Raises ValueError for what is no picture."""
    try:
        return Image.open(file).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} can't be opened as a picture: {error}") from error


def save_png(image: Image.Image, path: Path, prompt: str, settings: dict) -> None:
    """A PNG that says in its text chunk how it was made; written whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(settings, default=str))
    write_whole(path, lambda part: image.save(part, format="PNG", pnginfo=info))


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


def write_part(folder: Path, name: str, model: nn.Module) -> None:
    """One part of a folder: config.json and weights, as diffusers and transformers read them."""
    where, file = folder / name, PARTS[name].files[0]
    where.mkdir(parents=True, exist_ok=True)
    (where / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(where / file, lambda part: save_file(weights, part, metadata={"format": "pt"}))


def write_index(folder: Path) -> None:
    """model_index.json and scheduler/, which diffusers needs to open the folder."""
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
             "feature_extractor": [None, None], "safety_checker": [None, None],
             "image_encoder": [None, None], "requires_safety_checker": False,
             "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    schedule = {"_class_name": "DDIMScheduler", "num_train_timesteps": ddim.TRAIN_STEPS,
                "beta_start": ddim.BETA_START, "beta_end": ddim.BETA_END,
                "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
                "steps_offset": 1}
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for file, content in (("scheduler/scheduler_config.json", schedule),
                          ("model_index.json", index)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def save(sd: StableDiffusion, folder: str | Path) -> None:
    """Writes a folder in diffusers' layout, whole or not at all; `load` and diffusers open it.

    Raises ValueError where there is something already.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already: choose another folder")
    part_way = Path(f"{folder}.part")
    shutil.rmtree(part_way, ignore_errors=True)
    for name in PARTS:
        write_part(part_way, name, getattr(sd, name))
    sd.tokenizer.save_pretrained(part_way / "tokenizer")
    write_index(part_way)
    os.replace(part_way, folder)


# ---- erased weights ----

def with_tuned(sd: StableDiffusion, tuned: dict[str, Tensor]) -> StableDiffusion:
    """The model with some of the U-Net's tensors replaced; it shares all others with `sd`."""
    weights = sd.unet.state_dict()
    weights |= {name: tensor.to(weights[name]) for name, tensor in tuned.items()}
    return replace(sd, unet=build("unet", Found(sd.unet.config, weights, Path("tuned weights"))))


def load_erased(sd: StableDiffusion, path: str | Path) -> StableDiffusion:
    """The model with the erased weights of a file; `sd` stays as it is.

    Any published form: a whole or partial U-Net, tensors or modules of tensors, in diffusers'
    names (with or without `unet.`) or CompVis's. Raises ValueError where the file has a name or a
    shape that the U-Net doesn't have, or nothing.
    """
    tensors, compvis = read_tensors(Path(path)), PARTS["unet"].compvis
    if any(name.startswith(compvis) for name in tensors):  # then the other parts are there too
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(compvis)}
    bare = {name.removeprefix(compvis).removeprefix("unet."): tensor
            for name, tensor in tensors.items()}
    tuned = unet.rename(bare, sd.unet.config)
    check_tensors(tuned, sd.unet.state_dict(), Path(path), partial=True)
    return with_tuned(sd, tuned)


# ---- tables of prompts ----

class Row(NamedTuple):
    """A line of a prompt table: what to draw, and how where it says so."""

    case: str
    prompt: str
    seed: int
    guidance: float
    size: tuple[int, int] | int | None


def read_prompts(file: Path, guidance: float, size: int | None) -> list[Row]:
    """The rows of a CSV table with the official evaluation's columns; others don't matter.

    case_number (or image_id), prompt, evaluation_seed, and where there are any
    evaluation_guidance, sd_image_width and sd_image_height. Raises ValueError for what isn't that.
    """
    rows: dict[str, Row] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            for line in csv.DictReader(opened):
                case = line.get("case_number") or line["image_id"]
                if case in rows or not re.fullmatch(r"[\w.-]+", case):
                    raise ValueError(f"case {case!r} is there twice or can't be a file's name")
                own = line.get("sd_image_width") and line.get("sd_image_height")
                rows[case] = Row(
                    case, line["prompt"], int(line["evaluation_seed"]),
                    float(line.get("evaluation_guidance") or guidance),
                    (int(line["sd_image_width"]), int(line["sd_image_height"])) if own else size)
    except KeyError as error:
        raise ValueError(f"{file} has no column {error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{file}, after {len(rows)} rows: {error}") from error
    return [*rows.values()]


def draw_table(sd: StableDiffusion, rows: list[Row], folder: Path, num: int, batch: int,
               how: dict, settings: dict) -> None:
    """Writes {case}_{i}.png for i < num of each row, leaves out what is there, says the count.

    `how`: what `generate` takes beside what a row says. Of several processes under torchrun each
    takes its share of the rows. Raises ValueError as `generate` does.
    """
    if num < 1 or batch < 1:
        raise ValueError(f"num is {num}, batch {batch}: choose 1 or more")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    there = {path.name for path in folder.iterdir()}
    share = rows[rank::processes]
    mine = [row for row in share
            if not all(f"{row.case}_{i}.png" in there for i in range(num))]
    bar = tqdm(total=len(mine), desc="rows", disable=rank > 0)
    together = max(1, batch // num)  # rows
    for (guidance, size), alike in itertools.groupby(mine, lambda row: (row.guidance, row.size)):
        alike = [*alike]
        for part in (alike[i:i + together] for i in range(0, len(alike), together)):
            images = generate(sd, [row.prompt for row in part], num, [row.seed for row in part],
                              guidance=guidance, size=size, batch=batch, **how)
            for i, image in enumerate(images):
                row = part[i // num]
                save_png(image, folder / f"{row.case}_{i % num}.png", row.prompt, settings | {
                    "seed": row.seed, "guidance": guidance, "size": size, "picture": i % num})
            bar.update(len(part))
    bar.close()
    print(f"{folder}: {num * len(mine)} pictures made, {num * len(share)} in all"
          + (f" of process {rank}" if processes > 1 else ""))


# ---- the command line ----

def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    if bool(args.prompts) == bool(args.table):
        raise ValueError("give prompts, or a table of them with --prompts")
    table = read_prompts(args.table, args.guidance, args.size) if args.table else []
    out = args.out or Path("samples" if table else "sample.png")
    if not table:
        check_out(out, ".png")
    folder = out if table else args.singles
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    sd = load(args.model, device, args.dtype, args.tokenizer, args.revision)
    if args.erased:
        sd = load_erased(sd, args.erased)
    settings = {key: getattr(args, key) for key in (
        "model", "erased", "seed", "steps", "guidance", "negative", "safe", "sld", "size", "num")}
    how = {key: settings[key] for key in ("steps", "negative", "safe", "sld")}
    if table:
        draw_table(sd, table, folder, args.num, args.batch, how, settings)
        return
    images = generate(sd, args.prompts, args.num, args.seed, guidance=args.guidance,
                      size=args.size, batch=args.batch, progress=True, **how)
    rows = [(prompt, images[i * args.num:(i + 1) * args.num])
            for i, prompt in enumerate(args.prompts)]
    save_png(contact_sheet(rows), out, "\n".join(args.prompts), settings)
    print(out)
    for i, (prompt, pictures) in enumerate(rows if folder else []):
        for j, picture in enumerate(pictures):
            save_png(picture, folder / f"{i}_{j}.png", prompt, settings | {"picture": j})
            print(folder / f"{i}_{j}.png")


def fail_in_one_line(run: Callable, args: argparse.Namespace) -> None:
    """Runs a command; wrong input ends it with one line and exit status 2, without a traceback."""
    try:
        run(args)
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that sample.py and erase.py have in common."""
    parser.add_argument("--model", default=DEFAULT_MODEL,
                        help="a folder in diffusers' layout, a .ckpt or .safetensors file of "
                             "CompVis, or a name on the Hugging Face hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--tokenizer", help="a folder or a name on the hub; if not given, the "
                                            f"model's, or {CLIP}")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ...")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "float16", "bfloat16"],
                        help="of the model; auto: float32 on the CPU, else bfloat16 or float16")


def main() -> None:
    """The command line of sampling."""
    parser = argparse.ArgumentParser(
        description="Pictures from prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="one row of pictures for each")
    parser.add_argument("--prompts", dest="table", type=Path, metavar="FILE.csv",
                        help="a table with the columns case_number, prompt, evaluation_seed; what "
                             "is in --out already isn't drawn again")
    add_model_arguments(parser)
    parser.add_argument("--erased", type=Path, help="weights that erase.py wrote")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--guidance", type=float, default=7.5, help="scale of the guidance")
    parser.add_argument("--negative", default="", help="prompt to steer away from")
    parser.add_argument("--safe", default="", metavar="CONCEPT",
                        help="concept to avoid by Safe Latent Diffusion")
    parser.add_argument("--sld", default="medium", choices=ddim.SLD, help="how strongly")
    parser.add_argument("--size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--batch", type=int, default=8, help="pictures that are made at once")
    parser.add_argument("--out", type=Path, help="the contact sheet, sample.png if not given; of "
                                                 "--prompts the folder, samples if not given")
    parser.add_argument("--singles", type=Path, help="a folder for each picture on its own")
    fail_in_one_line(run, parser.parse_intermixed_args())


if __name__ == "__main__":
    main()
