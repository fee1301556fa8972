"""The U-Net of Stable Diffusion v1: predicts a latent's noise, given time and text.

    eps = UNet(UNetConfig())(x_t, t, context)
    # (B, 4, 64, 64), (B,), (B, 77, 768) -> (B, 4, 64, 64)

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
CVPR 2022, https://arxiv.org/abs/2112.10752 (section 3.3 and figure 3). Attribute names
are those of the published checkpoints in diffusers' layout, so that they load as they
are.

Shapes: B batch, C channels, H W feature map, N = H*W tokens of it, M tokens of context
(N in self-attention, the prompt's 77 in cross-attention), D width of a token, h heads,
d = D/h; in forward, h is the hidden features. emb is the time embedding, (B, 4 * C of the
first level); from TransformerBlock on, context is the prompt's features, (B, 77, 768).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a U-Net; the defaults are Stable Diffusion v1's."""

    in_channels: int = 4  # of the latents, in and out
    # of each level, finest first: C, and whether it has transformers
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    cross_attention_dim: int = 768  # D of the text encoder
    heads: int = 8  # at every level, so a head is 40, 80, 160 or 160 wide
    norm_num_groups: int = 32
    sample_size: int = 64  # H and W of the latents it was trained on


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of t / 10000^(i / (dim/2)), i < dim/2.

    "Attention Is All You Need", section 3.5, which has sines and cosines in turn.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeMLP(nn.Module):
    """The two-layer MLP after the sinusoids: (B, C) -> (B, 4C)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t_emb)))


class ResnetBlock(nn.Module):
    """Two convolutions, time added in between: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        time = self.time_emb_proj(F.silu(emb))  # (B, C_out)
        h = h + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Every token of x attends to all of context.

    (B, N, D), (B, M, D_context) -> (B, N, D)
    softmax(Q K^T / sqrt(d)) V in each head ("Attention Is All You Need", eq. 1).
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, for to_out.0

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(tokens):  # (B, N or M, D) -> (B, h, N or M, D/h)
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = split(self.to_q(x))
        k = split(self.to_k(context))
        v = split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, D/h)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, D)


class GEGLU(nn.Module):
    """A gated linear layer, value * gelu(gate): (B, N, D) -> (B, N, D_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, D_out) each
        return value * F.gelu(gate)  # exact, not the tanh approximation


class FeedForward(nn.Module):
    """A transformer block's MLP, four times as wide inside: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        # net.1 is the published model's dropout: it has no weights, but makes the next
        # key net.2
        self.net = nn.Sequential(
            GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP: (B, N, D), (B, 77, 768) -> (B, N, D)."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, context_dim, heads)  # what ESD-x tunes
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over a feature map's pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in resnets
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, heads)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        H, W = x.shape[2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (B, H*W, C)

        h = self.transformer_blocks[0](h, context)

        h = h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level_layers(
    inputs: list[int], c_out: int, attention: bool, config: UNetConfig
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Returns a level's resnets, and as many transformers, or none without attention.

    inputs: the input channels of each resnet.
    """
    emb_dim = 4 * config.block_out_channels[0]
    groups = config.norm_num_groups

    resnets = nn.ModuleList()
    for c_in in inputs:
        resnets.append(ResnetBlock(c_in, c_out, emb_dim, groups))

    transformers = nn.ModuleList()
    if attention:
        for _ in inputs:
            transformers.append(
                SpatialTransformer(c_out, config.cross_attention_dim, config.heads, groups)
            )
    return resnets, transformers


class DownBlock(nn.Module):
    """One level on the way down: returns x, and the output of each layer as a skip."""

    def __init__(
        self,
        inputs: list[int],
        c_out: int,
        attention: bool,
        config: UNetConfig,
        resample: bool,
    ):
        super().__init__()
        self.resnets, self.attentions = level_layers(inputs, c_out, attention, config)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if resample else [])

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)  # (B, C_out, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)

        for down in self.downsamplers:
            x = down(x)  # (B, C_out, H/2, W/2)
            skips.append(x)

        return x, skips


class UpBlock(nn.Module):
    """One level on the way up: each resnet takes x and one skip, the latest first."""

    def __init__(
        self,
        inputs: list[int],
        c_out: int,
        attention: bool,
        config: UNetConfig,
        resample: bool,
    ):
        super().__init__()
        self.resnets, self.attentions = level_layers(inputs, c_out, attention, config)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if resample else [])

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips[-1 - i]], dim=1)  # (B, C_x + C_skip, H, W)
            x = resnet(x, emb)  # (B, C_out, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)

        for up in self.upsamplers:
            x = up(x)  # (B, C_out, 2H, 2W)

        return x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the coarsest level."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        emb_dim = 4 * config.block_out_channels[0]
        groups = config.norm_num_groups

        self.attentions = nn.ModuleList(
            [SpatialTransformer(channels, config.cross_attention_dim, config.heads, groups)]
        )
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, emb_dim, groups) for _ in range(2)]
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UNet(nn.Module):
    """eps_theta(x_t, c, t): predicts the noise in x_t, given time t and the prompt c."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        last = len(widths) - 1
        layers = config.layers_per_block

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(widths[0], 4 * widths[0])
        self.mid_block = MidBlock(widths[-1], config)

        # Down: every output is a skip, conv_in's first. Stable Diffusion v1's have
        # 320, 320 320 320, 640 640 640, 1280 1280 1280, 1280 1280 channels.
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (layers - 1)
            attention = config.attention[level]
            resample = level < last
            self.down_blocks.append(DownBlock(inputs, width, attention, config, resample))
            skips += [width] * len(inputs)
            if resample:
                skips.append(width)  # the downsampler's

        # Up: a resnet's input is the output before it and the latest skip, together
        # 2560 2560 2560, 2560 2560 1920, 1920 1280 960, 960 640 640 channels.
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            inputs = []
            for _ in range(layers + 1):
                inputs.append(before + skips.pop())  # the latest first, as in forward
                before = width
            attention = config.attention[level]
            resample = level > 0
            self.up_blocks.append(UpBlock(inputs, width, attention, config, resample))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """x_t: (B, 4, 64, 64), t: (B,), () or a number, context: (B, 77, 768) -> eps, as x_t.

        context: the prompt's features, c. Computes in the weights' dtype and returns x_t's.
        """
        dtype = self.conv_in.weight.dtype
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))  # (B,)
        t_emb = timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        emb = self.time_embedding(t_emb)  # (B, 1280)

        x = self.conv_in(x_t.to(dtype))  # (B, 320, 64, 64)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, emb, context)
            skips += new_skips

        x = self.mid_block(x, emb, context)  # (B, 1280, 8, 8)

        for block in self.up_blocks:
            used = len(block.resnets)  # one skip each, the latest
            x = block(x, emb, context, skips[-used:])
            skips = skips[:-used]

        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 4, 64, 64)
        return x.to(x_t.dtype)


def config_from_json(config: dict) -> UNetConfig:
    """Returns the config that a published `unet/config.json` describes."""
    types = config["down_block_types"]
    return UNetConfig(
        in_channels=config["in_channels"],
        block_out_channels=tuple(config["block_out_channels"]),
        attention=tuple(each == "CrossAttnDownBlock2D" for each in types),
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=config["cross_attention_dim"],
        heads=config.get("attention_head_dim", 8),  # despite its name, it counts heads
        norm_num_groups=config["norm_num_groups"],
        sample_size=config["sample_size"],
    )
