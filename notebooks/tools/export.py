"""Exports an erased model for other programs.

    python -m notebooks.tools.export van-gogh.safetensors --as lora --out lora.safetensors
    python -m notebooks.tools.export van-gogh.safetensors --as single --out whole.safetensors

lora: what was changed, in kohya's form, for A1111, ComfyUI and diffusers; its weight is a dial from
nothing erased (0) to all (1). single: a whole checkpoint in CompVis's form, for A1111 and ComfyUI.
folder: the same for diffusers. esd: erased weights as the official code of 2026 writes them.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Callable

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # then Python wouldn't find our files
    print("error: run it as python -m notebooks.tools.export", file=sys.stderr)
    sys.exit(2)

import clip_text
import ddim
import sample
import unet
import vae
from notebooks.tools import compvis

# ---- a folder in diffusers' layout


def unet_json(config: unet.UNetConfig) -> dict:
    """Returns the contents of `unet/config.json`."""
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_head_dim": config.heads,  # despite its name, it counts heads
        "block_out_channels": config.block_out_channels,
        "center_input_sample": False,
        "class_embed_type": None,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.in_channels,
        "sample_size": config.sample_size,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": False,
    }


def vae_json(config: vae.VAEConfig) -> dict:
    """Returns the contents of `vae/config.json`."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.in_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(config: clip_text.TextConfig) -> dict:
    """Returns the contents of `text_encoder/config.json`, for a tokenizer without added tokens."""
    end = config.vocab_size - 1  # the token before it is the start
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        **asdict(config),
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }


CONFIGS = {"unet": unet_json, "vae": vae_json, "text_encoder": text_json}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": ddim.TRAIN_STEPS,
    "beta_start": ddim.BETA_START,
    "beta_end": ddim.BETA_END,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_json(file: Path, content: dict) -> None:
    """Writes a dict, and makes the file's folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file. Raises sample.UsageError where a tensor isn't finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise sample.UsageError(f"{file.name} would have numbers that aren't finite")

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(contiguous, metadata)
    sample.write_whole(file, lambda part: part.write_bytes(content))


def token_ids(tokenizer: Callable) -> dict[str, int | None]:
    """Returns what `text_encoder/config.json` says of a tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def write_part(folder: Path, name: str, model: nn.Module, **settings: int | None) -> None:
    """Writes the config and the weights of one model; name is one of sample.PARTS.

    settings: entries that replace or extend the config's.
    """
    file = folder / name / sample.PARTS[name].files[0]
    write_json(file.with_name("config.json"), CONFIGS[name](model.config) | settings)
    write_tensors(file, model.state_dict(), {"format": "pt"})


def write_index(folder: Path) -> None:
    """Writes model_index.json and scheduler/, which diffusers needs to open the folder."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)


def write_folder(sd: sample.StableDiffusion, folder: str | Path) -> None:
    """Writes a folder that diffusers and sample.load open; it is never half-written.

    Raises sample.UsageError if the folder exists.
    """
    if Path(folder).exists():
        raise sample.UsageError(f"{folder} exists; delete it or choose another folder")

    unfinished = Path(f"{folder}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name in sample.PARTS:
            settings = token_ids(sd.tokenizer) if name == "text_encoder" else {}
            write_part(unfinished, name, getattr(sd, name), **settings)
        sd.tokenizer.save_pretrained(unfinished / "tokenizer")
        write_index(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---- one file


MODELSPEC = {  # the metadata of each form: SAI ModelSpec 1.0.1
    "lora": {
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "usage_hint": "Its weight is a dial from 0, nothing erased, to 1, all erased.",
    },
    "single": {
        "architecture": "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "usage_hint": "A whole checkpoint, opened as any other; the erasure is in its weights.",
    },
}


def modelspec(form: str, title: str, day: date) -> dict[str, str]:
    """Returns the metadata that other programs show; form is one of MODELSPEC."""
    values = {"sai_model_spec": "1.0.1", "title": title, "date": day.isoformat()}
    values |= MODELSPEC[form]
    return {f"modelspec.{name}": value for name, value in values.items()}


def single(sd: sample.StableDiffusion) -> dict[str, Tensor]:
    """Returns all tensors of a model under CompVis's names."""
    tensors = {}
    for part in sample.PARTS:
        tensors |= compvis.to_theirs(part, getattr(sd, part))
    return tensors


def esd_metadata(settings: dict, model: str) -> dict[str, str]:
    """Returns what the official code writes about erased weights; model: their base.

    settings: those that erase.py wrote. Its anchor is the official `erase_from` with the loss of
    methods/esd_from.py alone; else it only changes what x_t is drawn for.
    """
    concepts = ", ".join(settings.get("concepts", []))
    erased_from = ""
    if "esd_from" in str(settings.get("loss")):
        erased_from = settings.get("anchor")
    return {
        "format": "erasing-esd-v2",
        "base_model_id": str(settings.get("model", model)),
        "train_method": str(settings.get("method", "")),
        "erase_concept": concepts,
        "erase_from": erased_from or concepts,
    }


# ---- LoRA


def low_rank(change: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """Returns up, (out, r), and down, (r, in): the r largest singular values of change, (out, in).

    r is the least for which their product differs from it by at most `error` of its norm.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    lost = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()  # by rank 0, 1, ...
    rank = max(1, int((lost > error).sum()))
    return u[:, :rank] * s[:rank], vh[:rank]


def lora(
    frozen: nn.Module, theta: dict[str, Tensor], error: float
) -> dict[str, Tensor]:
    """Returns theta - theta*, layer by layer, in kohya's form, which has no biases and norms.

    All layers get the same rank, filled up with zeros: diffusers 0.42 scales others wrongly.
    Raises sample.UsageError if no weight matrix was changed.
    """
    before = frozen.state_dict()
    factors = {}
    for name, tensor in theta.items():
        if tensor.ndim > 1:
            change = (tensor.float() - before[name].float()).flatten(1)  # (out, in)
            if not change.isfinite().all():
                raise sample.UsageError(f"{name} has numbers that aren't finite")
            if change.any():
                factors[name] = low_rank(change, error)
    if not factors:
        raise sample.UsageError(
            "no weight matrix was changed, and a LoRA holds nothing else"
        )

    rank = max(len(down) for _, down in factors.values())
    tensors = {}
    for name, (up, down) in factors.items():
        up = F.pad(up, (0, rank - len(down)))  # (out, rank)
        down = F.pad(down, (0, 0, 0, rank - len(down)))  # (rank, in)
        kernel = (1,) * (theta[name].ndim - 2)  # of a convolution
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up = up.view(*up.shape, *kernel)
        tensors[f"{layer}.lora_up.weight"] = up.half()
        down = down.view(rank, *theta[name].shape[1:])
        tensors[f"{layer}.lora_down.weight"] = down.half()
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    return tensors


# ---- the command line


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in float16."""
    return {name: tensor.half() for name, tensor in tensors.items()}


def print_summary(
    tensors: dict[str, Tensor], frozen: nn.Module, theta: dict[str, Tensor]
) -> None:
    """Prints the rank of a LoRA and how many changed tensors it leaves out."""
    before = frozen.state_dict()
    changed = [name for name in theta if not torch.equal(theta[name], before[name])]
    alphas = [
        int(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")
    ]
    left_out = len(changed) - len(alphas)
    print(
        f"rank {alphas[0]}; {left_out} biases and norms that changed too have no place in a LoRA"
    )


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if not 0 <= args.error < 1:
        raise sample.UsageError(f"error is {args.error}, choose at least 0 and less than 1")
    if args.form != "folder":
        sample.check_out(args.out, ".safetensors", new=True)

    sd = sample.load(args.model, "cpu", "float32")
    erased = sample.load_erased(sd, args.file)
    after = erased.unet.state_dict()
    theta = {name: after[name] for name in after if name in erased.edited}

    if args.form == "folder":
        write_folder(erased, args.out)
    elif args.form == "single":
        metadata = modelspec("single", args.out.stem, args.date)
        write_tensors(args.out, halved(single(erased)), metadata)
    elif args.form == "esd":
        _, metadata = sample.read_tensors(args.file)
        metadata = esd_metadata(sample.settings_in(metadata), args.model)
        write_tensors(args.out, halved(theta), metadata)
    else:
        tensors = lora(sd.unet, theta, args.error)
        write_tensors(args.out, tensors, modelspec("lora", args.out.stem, args.date))
        print_summary(tensors, sd.unet, theta)
    print(args.out)


def main() -> None:
    """Reads the command line."""
    flags = argparse.ArgumentParser(
        description="Exports an erased model for other programs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = flags.add_argument
    add("file", type=Path, help="erased weights")
    add("--as", dest="form", required=True, choices=["lora", "single", "folder", "esd"])
    add("--model", default=sample.DEFAULT_MODEL, help="what was erased from")
    add("--error", type=float, default=0.05, help="lora: the share of each change's norm to lose")
    add("--date", type=date.fromisoformat, default=date.today(), help="in a file's metadata")
    add("--out", type=Path, required=True, help="a .safetensors file, or a folder")
    sample.fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
