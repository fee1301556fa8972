"""Exports a model for other programs: as a folder in diffusers' layout.

    export.write_folder(sample.load("sd-v1-4.ckpt"), "stable-diffusion-v1-4")
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

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


def write_part(folder: Path, name: str, model: nn.Module) -> None:
    """Writes the config and the weights of one model; name is one of sample.PARTS."""
    write_json(folder / name / "config.json", CONFIGS[name](model.config))
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    sample.write_whole(folder / name / sample.PARTS[name].files[0],
                       lambda part: save_file(weights, part, metadata={"format": "pt"}))


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
