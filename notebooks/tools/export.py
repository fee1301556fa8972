"""Exports an erased model for other programs.

    python -m notebooks.tools.export star.safetensors --as lora --out star-lora.safetensors
    python -m notebooks.tools.export star.safetensors --as single --out sd-without-star.safetensors

lora: what was changed, in kohya's form, for A1111, ComfyUI and diffusers; its weight is a dial from
nothing erased (0) to all (1). single: a whole checkpoint in CompVis's form, for A1111 and ComfyUI.
folder: the same for diffusers. esd: erased weights as the official code of 2026 writes them.
"""

import argparse
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import clip_text
import ddim
import sample
import unet
import vae


def unet_json(config: unet.UNetConfig) -> dict:
    """The contents of `unet/config.json`."""
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return {"_class_name": "UNet2DConditionModel",
            "addition_embed_type": None, "use_linear_projection": False, "class_embed_type": None,
            "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
            "downsample_padding": 1, "mid_block_scale_factor": 1, "center_input_sample": False,
            "in_channels": config.in_channels, "out_channels": config.in_channels,
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "cross_attention_dim": config.cross_attention_dim,
            "norm_num_groups": config.norm_num_groups, "sample_size": config.sample_size,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "attention_head_dim": config.heads}  # despite its name, it counts heads


def vae_json(config: vae.VAEConfig) -> dict:
    """The contents of `vae/config.json`."""
    levels = len(config.block_out_channels)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu",
            "in_channels": config.in_channels, "out_channels": config.in_channels,
            "latent_channels": config.latent_channels,
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups, "scaling_factor": config.scaling_factor,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels}


def text_json(config: clip_text.TextConfig) -> dict:
    """The contents of `text_encoder/config.json`."""
    start, end = config.vocab_size - 2, config.vocab_size - 1  # CLIP's last two tokens
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **asdict(config),
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


CONFIGS = {"unet": unet_json, "vae": vae_json, "text_encoder": text_json}


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file. Raises ValueError where a tensor isn't finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{file} would have numbers that aren't finite: nothing was written")
    alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
    whole = safetensors.torch.save(alone, metadata)
    sample.write_whole(file, lambda part: part.write_bytes(whole))


def write_part(folder: Path, name: str, model: nn.Module) -> None:
    """Writes the config and the weights of one model; name is one of sample.PARTS."""
    write_json(folder / name / "config.json", CONFIGS[name](model.config))
    write_tensors(folder / name / sample.PARTS[name].files[0], model.state_dict(), format="pt")


def write_index(folder: Path) -> None:
    """Writes model_index.json and scheduler/, which diffusers needs to open the folder."""
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "DDIMScheduler", "num_train_timesteps": ddim.TRAIN_STEPS,
        "beta_start": ddim.BETA_START, "beta_end": ddim.BETA_END,
        "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
        "steps_offset": 1})
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]})


def write_folder(sd: sample.StableDiffusion, folder: str | Path) -> None:
    """Writes a folder that diffusers and sample.load open; it is never half-written.

    Raises ValueError if the folder exists.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} exists, choose another folder")
    unfinished = Path(f"{folder}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in sample.PARTS:
        write_part(unfinished, name, getattr(sd, name))
    sd.tokenizer.save_pretrained(unfinished / "tokenizer")
    write_index(unfinished)
    os.replace(unfinished, folder)


# CompVis's names: each function undoes what `rename` of its model file does.

def compvis_unet(name: str, config: unet.UNetConfig) -> str:
    per_level = config.layers_per_block + 1
    if "resnets" in name:
        for theirs, ours in unet.COMPVIS.items():
            if theirs.startswith(("in_", "emb_", "out_", "skip_")):
                name = name.replace(f".{ours}.", f".{theirs}.")
    for theirs, ours in unet.COMPVIS.items():
        pattern = re.escape(ours).replace("L", r"(\d+)").replace("P", r"(\d+)") + r"(?=\.)"
        if found := re.match(pattern, name):
            level, place = ([int(number) for number in found.groups()] + [per_level - 1] * 2)[:2]
            if "upsamplers" in ours:
                theirs = f"output_blocks.N.{1 + config.attention[::-1][level]}.conv"
            number = level * per_level + place + theirs.startswith("input_blocks")
            return theirs.replace("N", str(number)) + name[found.end():]
    raise ValueError(f"CompVis has no name for {name}")


def compvis_vae(name: str, config: vae.VAEConfig) -> str:
    coarsest = len(config.block_out_channels) - 1
    compvis = [*vae.PUBLISHED.items()][:-4]  # the rest is diffusers' of 2022
    for theirs, ours in reversed(compvis):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return re.sub(r"(?<=\.up\.)\d+", lambda level: str(coarsest - int(level[0])), name)


COMPVIS = {"unet": compvis_unet, "vae": compvis_vae,
           "text_encoder": lambda name, config: f"text_model.{name}"}


def single(sd: sample.StableDiffusion) -> dict[str, Tensor]:
    """All tensors of a model under CompVis's names."""
    tensors = {}
    for part, described in sample.PARTS.items():
        model = getattr(sd, part)
        for name, tensor in model.state_dict().items():
            theirs = COMPVIS[part](name, model.config)
            if part == "vae" and re.search(r"\.(q|k|v|proj_out)\.weight$", theirs):
                tensor = tensor[:, :, None, None]  # a 1x1 convolution
            tensors[described.prefix + theirs] = tensor
    return tensors


def low_rank(change: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """(out, in) -> up (out, r) and down (r, in), whose product differs from it by at most `error`
    of its norm: the r largest singular values.
    """
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    left_out = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()  # by rank 0, 1, ...
    rank = max(1, int((left_out > error).sum()))
    return u[:, :rank] * s[:rank], v[:rank]


def lora(frozen: nn.Module, theta: dict[str, Tensor], error: float) -> dict[str, Tensor]:
    """theta - theta*, layer by layer, in kohya's form. Biases and norms have no place in it.

    All layers get the same rank, filled up with zeros: diffusers 0.42 scales others wrongly.
    """
    tensors, start = {}, frozen.state_dict()
    changes = {name: (tensor.float() - start[name].float()).flatten(1)
               for name, tensor in theta.items() if tensor.ndim > 1}
    factors = {name: low_rank(change, error) for name, change in changes.items() if change.any()}
    if not factors:
        raise ValueError("no weight matrix was changed, and a LoRA holds nothing else")
    rank = max(len(down) for _, down in factors.values())
    for name, (up, down) in factors.items():
        up = F.pad(up, (0, rank - len(down)))  # (out, rank)
        down = F.pad(down, (0, 0, 0, rank - len(down)))  # (rank, in)
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        kernel = (1,) * (theta[name].ndim - 2)  # of a convolution
        tensors |= {f"{layer}.lora_up.weight": up.view(*up.shape, *kernel).half(),
                    f"{layer}.lora_down.weight": down.view(rank, *theta[name].shape[1:]).half(),
                    f"{layer}.alpha": torch.tensor(float(rank))}
    return tensors


def settings_of(file: Path) -> dict:
    """The settings that erase.py wrote into a file; empty for others' files."""
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get("settings", "{}"))


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if not 0 <= args.error < 1:
        raise ValueError(f"error is {args.error}, choose 0 to 1")
    if args.form != "folder":
        sample.check_out(args.out, ".safetensors", new=True)
    sd = sample.load(args.model, "cpu", "float32", args.tokenizer, args.ema)
    erased = sample.load_erased(sd, args.file)
    start, end = sd.unet.state_dict(), erased.unet.state_dict()
    theta = {name: end[name] for name in end if end[name].data_ptr() != start[name].data_ptr()}
    if args.form == "folder":
        write_folder(erased, args.out)
    elif args.form == "single":
        write_tensors(args.out, {name: t.half() for name, t in single(erased).items()})
    elif args.form == "esd":
        made_by = settings_of(args.file)
        concepts = ", ".join(made_by.get("concepts", []))
        write_tensors(args.out, {name: tensor.half() for name, tensor in theta.items()},
                      format="erasing-esd-v2", base_model_id=str(made_by.get("model", args.model)),
                      train_method=str(made_by.get("method", "")), erase_concept=concepts,
                      erase_from=made_by.get("anchor") or concepts)
    else:
        tensors = lora(sd.unet, theta, args.error)
        write_tensors(args.out, tensors)
        changed = [name for name in theta if not torch.equal(theta[name], start[name])]
        rank = int(next(tensors[name] for name in tensors if name.endswith("alpha")))
        print(f"rank {rank}; {len(changed) - len(tensors) // 3} biases and norms that changed too "
              f"have no place in a LoRA")
    print(args.out)


def main() -> None:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description="Exports an erased model for other programs.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("file", type=Path, help="erased weights")
    add("--as", dest="form", required=True, choices=["lora", "single", "folder", "esd"])
    add("--model", default=sample.DEFAULT_MODEL, help="what was erased from")
    add("--tokenizer", help="a folder or a hub name; by default the model's, or CLIP's")
    add("--ema", action="store_true", help="of a file with two U-Nets, take the averaged one")
    add("--error", type=float, default=0.05, help="lora: the share of each change's norm to lose")
    add("--out", type=Path, required=True, help="a .safetensors file, or a folder")
    sample.fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
