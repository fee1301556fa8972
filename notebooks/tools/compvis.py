"""CompVis's names of Stable Diffusion v1's tensors, and ours (diffusers'): one dict for each part.

    names = theirs_to_ours("unet", unet.UNetConfig())
    names["time_embed.0.weight"]    # "time_embedding.linear_1.weight"

CompVis numbers the U-Net's layers consecutively (input_blocks.0 to 11, output_blocks.0 to 11), we
number them level by level. Each function below is the loop that both numberings follow.
"""

from typing import Any

import torch
from torch import Tensor, nn

import clip_text
import sample
import unet
import vae

PREFIXES = {  # of each part's names in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


# ---- modules: {theirs: ours}

UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def inside(theirs: str, ours: str, layers: dict[str, str]) -> dict[str, str]:
    """Returns the names of a block's layers, prefixed with the block's two names."""
    return {f"{theirs}.{layer}": f"{ours}.{layers[layer]}" for layer in layers}


def unet_modules(config: unet.UNetConfig) -> dict[str, str]:
    """Returns the U-Net's modules. A transformer's layers have the same names in both."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    names |= inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    names |= inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return names | down_modules(config) | up_modules(config)


def down_modules(config: unet.UNetConfig) -> dict[str, str]:
    """Returns the modules on the way down, where a downsampler has a number of its own."""
    names = {}
    number = 1  # 0 is conv_in
    for level, attention in enumerate(config.attention):
        block = f"down_blocks.{level}"
        for i in range(config.layers_per_block):
            theirs = f"input_blocks.{number}"
            names |= inside(f"{theirs}.0", f"{block}.resnets.{i}", UNET_RESNET)
            if attention:
                names[f"{theirs}.1"] = f"{block}.attentions.{i}"
            number += 1

        if level < len(config.attention) - 1:
            names[f"input_blocks.{number}.0.op"] = f"{block}.downsamplers.0.conv"
            number += 1
    return names


def up_modules(config: unet.UNetConfig) -> dict[str, str]:
    """Returns the modules on the way up, where an upsampler ends the last layer of its level."""
    names = {}
    number = 0
    for level, attention in enumerate(reversed(config.attention)):
        block = f"up_blocks.{level}"
        for i in range(config.layers_per_block + 1):
            theirs = f"output_blocks.{number}"
            names |= inside(f"{theirs}.0", f"{block}.resnets.{i}", UNET_RESNET)
            if attention:
                names[f"{theirs}.1"] = f"{block}.attentions.{i}"
            number += 1

        if level < len(config.attention) - 1:
            place = 2 if attention else 1
            last = f"output_blocks.{number - 1}"
            names[f"{last}.{place}.conv"] = f"{block}.upsamplers.0.conv"
    return names


def vae_modules(config: vae.VAEConfig) -> dict[str, str]:
    """Returns the VAE's modules. CompVis numbers the decoder's levels from the finest."""
    coarsest = len(config.block_out_channels) - 1
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    for half in ("encoder", "decoder"):
        names[f"{half}.conv_in"] = f"{half}.conv_in"
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        names[f"{half}.conv_out"] = f"{half}.conv_out"
        theirs = f"{half}.mid"
        ours = f"{half}.mid_block"
        names |= inside(f"{theirs}.block_1", f"{ours}.resnets.0", VAE_RESNET)
        names |= inside(f"{theirs}.attn_1", f"{ours}.attentions.0", VAE_ATTENTION)
        names |= inside(f"{theirs}.block_2", f"{ours}.resnets.1", VAE_RESNET)

    for level in range(coarsest + 1):
        theirs = f"encoder.down.{level}"
        ours = f"encoder.down_blocks.{level}"
        for i in range(config.layers_per_block):
            names |= inside(f"{theirs}.block.{i}", f"{ours}.resnets.{i}", VAE_RESNET)
        if level < coarsest:
            names[f"{theirs}.downsample.conv"] = f"{ours}.downsamplers.0.conv"

    for level in range(coarsest + 1):
        theirs = f"decoder.up.{coarsest - level}"
        ours = f"decoder.up_blocks.{level}"
        for i in range(config.layers_per_block + 1):
            names |= inside(f"{theirs}.block.{i}", f"{ours}.resnets.{i}", VAE_RESNET)
        if level < coarsest:
            names[f"{theirs}.upsample.conv"] = f"{ours}.upsamplers.0.conv"
    return names


def text_modules(config: clip_text.TextConfig) -> dict[str, str]:
    """Returns the text encoder's modules, which have transformers' names in both."""
    modules = ("embeddings", "encoder", "final_layer_norm")
    return {f"text_model.{module}": module for module in modules}


MODULES = {"unet": unet_modules, "vae": vae_modules, "text_encoder": text_modules}


# ---- tensors


def theirs_to_ours(part: str, config: Any) -> dict[str, str]:
    """Returns {theirs: ours} for all tensors of a part of this size, one to one."""
    with torch.device("meta"):  # takes no memory
        model = sample.PARTS[part].model(config)

    names = {}
    for theirs, ours in MODULES[part](config).items():
        for tensor in model.get_submodule(ours).state_dict():
            names[f"{theirs}.{tensor}"] = f"{ours}.{tensor}"
    return names


def is_attention_weight(part: str, name: str) -> bool:
    """Whether a tensor of that name, ours, is (C, C) here and a 1x1 convolution's in CompVis's."""
    return part == "vae" and ".attentions.0.to_" in name and name.endswith(".weight")


def to_ours(part: str, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Returns the tensors under our names; those that CompVis's code doesn't have keep theirs."""
    names = theirs_to_ours(part, config)
    renamed = {}
    for theirs, tensor in tensors.items():
        name = names.get(theirs, theirs)
        if is_attention_weight(part, name) and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        renamed[name] = tensor
    return renamed


def to_theirs(part: str, model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's tensors as a single file has them, prefix and all."""
    tensors = model.state_dict()
    renamed = {}
    for theirs, ours in theirs_to_ours(part, model.config).items():
        tensor = tensors[ours]
        if is_attention_weight(part, ours):
            tensor = tensor[:, :, None, None]
        renamed[PREFIXES[part] + theirs] = tensor
    return renamed
