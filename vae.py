"""The autoencoder of Stable Diffusion v1: maps images to latents and back.

    mean, logvar = VAE(VAEConfig()).encode(image)      # (B, 3, 512, 512) -> two of (B, 4, 64, 64)
    image = VAE(VAEConfig()).decode(latents)           # (B, 4, 64, 64) -> (B, 3, 512, 512)

Kingma and Welling, "Auto-Encoding Variational Bayes", https://arxiv.org/abs/1312.6114,
in the form of Rombach et al., CVPR 2022, https://arxiv.org/abs/2112.10752 (section
3.1). Images are in -1..1. The U-Net works on these latents times `scaling_factor`;
sample.py does the scaling. Attribute names are those of the published checkpoints.

Shapes: B batch, C channels, H W feature map.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder; the defaults are Stable Diffusion v1's."""

    in_channels: int = 3  # of the images, in and out
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # C of each level, finest first
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents

    @property
    def factor(self) -> int:
        """LDM's downsampling factor f: 8 for Stable Diffusion v1."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)  # 1e-6 everywhere in the VAE
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Every pixel attends to every pixel, with one head: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, for to_out.0

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)

        # one head; the fast kernels take four dimensions only
        q = self.to_q(tokens)[:, None]  # (B, 1, H*W, C)
        k = self.to_k(tokens)[:, None]
        v = self.to_v(tokens)[:, None]
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)

        out = self.to_out[0](out)
        return x + out.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level_resnets(c_in: int, c_out: int, layers: int, groups: int) -> nn.ModuleList:
    """The resnets of one level, the first of which changes the number of channels."""
    inputs = [c_in] + [c_out] * (layers - 1)
    return nn.ModuleList(ResnetBlock(channels, c_out, groups) for channels in inputs)


class DownBlock(nn.Module):
    """One level of the encoder: resnets, then a downsampler but for the last level."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: bool):
        super().__init__()
        self.resnets = level_resnets(c_in, c_out, layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One level of the decoder: resnets, then an upsampler but for the last level."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: bool):
        super().__init__()
        self.resnets = level_resnets(c_in, c_out, layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """(B, 3, 8H, 8W) -> (B, 2 * 4, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        groups = config.norm_num_groups
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        c_in = widths[0]
        for level, width in enumerate(widths):
            resample = level < last
            self.down_blocks.append(
                DownBlock(c_in, width, config.layers_per_block, groups, resample)
            )
            c_in = width
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, 4, H, W) -> (B, 3, 8H, 8W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]  # coarsest first
        groups = config.norm_num_groups
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        c_in = widths[0]
        for level, width in enumerate(widths):
            resample = level < last
            self.up_blocks.append(
                UpBlock(c_in, width, config.layers_per_block + 1, groups, resample)
            )
            c_in = width
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Encoder q(z|x) and decoder p(x|z)."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 8H, 8W) in -1..1 -> mean and log variance of q(z|x), (B, 4, H, W) each."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # as published: keeps exp(logvar) finite

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, H, W), unscaled -> (B, 3, 8H, 8W), about -1..1."""
        return self.decoder(self.post_quant_conv(latents))


def config_from_json(config: dict) -> VAEConfig:
    """Returns the config that a published `vae/config.json` describes.

    Older ones lack the last two entries.
    """
    return VAEConfig(
        in_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config.get("norm_num_groups", VAEConfig.norm_num_groups),
        scaling_factor=config.get("scaling_factor", VAEConfig.scaling_factor),
    )


OLD_ATTENTION_NAMES = {
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"
}


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the attention's tensors, which older files spell as diffusers did until 2023."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in OLD_ATTENTION_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        renamed[name] = tensor
    return renamed
