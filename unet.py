"""The U-Net of Stable Diffusion v1: predicts the noise in a latent from its time and a text.

    eps = UNet(UNetConfig())(x_t, t, text)    # (B, 4, 64, 64), (B,), (B, 77, 768) -> (B, 4, 64, 64)

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022,
https://arxiv.org/abs/2112.10752 (section 3.3 and figure 3). Attribute names are those of the
published checkpoints in diffusers' layout, so that a published file loads without a converter.

Shapes: B batch, C channels, H W feature map, N tokens (H*W of the image or 77 of the text),
D width of a token, h heads. emb is the time embedding, (B, 4 * C of the first level).
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a U-Net; the defaults are Stable Diffusion v1's."""

    in_channels: int = 4  # of the latents, in and out
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # C of each level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    layers_per_block: int = 2
    cross_attention_dim: int = 768  # D of the text encoder
    heads: int = 8  # at every level, so a head is 40, 80, 160 or 160 wide
    norm_num_groups: int = 32
    sample_size: int = 64  # H and W of the latents it was trained on


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of t / 10000^(i / (dim/2)) for i < dim/2."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer MLP after the sinusoids: (B, C) -> (B, 4C)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t_emb)))


class ResnetBlock(nn.Module):
    """Two convolutions with the time added in between: (B, C_in, H, W) -> (B, C_out, H, W)."""

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
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Every token of x attends to all of context: (B, N, D), (B, M, D_context) -> (B, N, D).

    softmax(Q K^T / sqrt(d)) V in each head ("Attention Is All You Need", eq. 1).
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list for the key: to_out.0

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(tokens):  # (B, N, D) -> (B, h, N, D/h)
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, D/h)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, D)


class GEGLU(nn.Module):
    """A linear layer gated by another: value * gelu(gate), (B, N, D) -> (B, N, D_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The MLP of a transformer block, four times as wide inside: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        # net.1 is the published model's dropout: it has no weights, but makes the next key net.2
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP: (B, N, D), (B, 77, 768) -> (B, N, D)."""

    def __init__(self, dim: int, text_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, text_dim, heads)  # what ESD-x tunes
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, text_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the resnets
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, text_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        H, W = x.shape[2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = self.transformer_blocks[0](h, text)
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


class Level(nn.Module):
    """The resnets of one level, each followed by a transformer if the level has attention."""

    def __init__(self, inputs: list[int], c_out: int, attention: bool, config: UNetConfig):
        super().__init__()
        emb_dim, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(c, c_out, emb_dim, groups) for c in inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(c_out, config.cross_attention_dim, config.heads, groups)
            for _ in inputs if attention)

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, text) if self.attentions else x


class DownBlock(Level):
    """One level on the way down: returns the output of each layer, all of which are skips."""

    def __init__(self, inputs, c_out, attention, config, last: bool):
        super().__init__(inputs, c_out, attention, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> list[Tensor]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
            skips.append(x)
        for down in self.downsamplers:
            x = down(x)
            skips.append(x)
        return skips


class UpBlock(Level):
    """One level on the way up: each resnet takes x and one skip, the latest first."""

    def __init__(self, inputs, c_out, attention, config, last: bool):
        super().__init__(inputs, c_out, attention, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for i, skip in enumerate(skips):
            x = torch.cat([x, skip], dim=1)  # (B, C_x + C_skip, H, W)
            x = self.layer(i, x, emb, text)
        for up in self.upsamplers:
            x = up(x)
        return x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the coarsest level."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        emb_dim, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.attentions = nn.ModuleList(
            [SpatialTransformer(channels, config.cross_attention_dim, config.heads, groups)])
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, emb_dim, groups) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, text)
        return self.resnets[1](x, emb)


class UNet(nn.Module):
    """eps_theta(x_t, c, t): predicts the noise in x_t, given the time t and the text c."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, n = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        # The input channels of each resnet. skips is pushed and popped as in forward.
        skips, down, up = [widths[0]], [], []
        for i, c in enumerate(widths):
            down.append([skips[-1]] + [c] * (n - 1))
            skips += [c] * (n if i == last else n + 1)  # the last level has no downsampler
        x = skips[-1]
        for c in reversed(widths):
            up.insert(0, [width + skips.pop() for width in [x] + [c] * n])
            x = c

        self.mid_block = MidBlock(widths[-1], config)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(widths):
            self.down_blocks.append(DownBlock(down[i], c, config.attention[i], config, i == last))
            self.up_blocks.insert(0, UpBlock(up[i], c, config.attention[i], config, i == 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor | int, text: Tensor) -> Tensor:
        """x_t: (B, 4, 64, 64), t: (B,) or a number, text: (B, 77, 768) -> eps: (B, 4, 64, 64).

        Computes in the weights' dtype and returns x_t's.
        """
        dtype = self.conv_in.weight.dtype
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))  # (B,)
        t_emb = timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        emb = self.time_embedding(t_emb)

        skips = [self.conv_in(x_t.to(dtype))]
        for block in self.down_blocks:
            skips += block(skips[-1], emb, text)
        x = self.mid_block(skips[-1], emb, text)
        for block in self.up_blocks:
            x = block(x, emb, text, [skips.pop() for _ in block.resnets])
        return self.conv_out(F.silu(self.conv_norm_out(x))).to(x_t.dtype)


def config_from_json(config: dict) -> UNetConfig:
    """Returns the config that a published `unet/config.json` describes."""
    return UNetConfig(
        block_out_channels=tuple(config["block_out_channels"]),
        attention=tuple(name == "CrossAttnDownBlock2D" for name in config["down_block_types"]),
        heads=config.get("attention_head_dim", 8),  # despite its name, it counts heads
        **{name: config[name] for name in ("in_channels", "layers_per_block", "sample_size",
                                           "cross_attention_dim", "norm_num_groups")})


# CompVis's names -> ours. CompVis numbers layers across levels: N is layer P of level L.
COMPVIS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "input_blocks.N.0.op": "down_blocks.L.downsamplers.0.conv",
    "input_blocks.N.0": "down_blocks.L.resnets.P", "input_blocks.N.1": "down_blocks.L.attentions.P",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.N.1.conv": "up_blocks.L.upsamplers.0.conv",  # in a level without attention
    "output_blocks.N.2.conv": "up_blocks.L.upsamplers.0.conv",
    "output_blocks.N.0": "up_blocks.L.resnets.P", "output_blocks.N.1": "up_blocks.L.attentions.P",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}


def rename(weights: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Renames published tensors, in diffusers' or CompVis's format, to this file's names."""
    per_level = config.layers_per_block + 1  # counts the downsampler, or an up block's extra resnet
    patterns = {r"(?<![^.])" + re.escape(theirs).replace("N", r"(\d+)") + r"(?=\.)": new
                for theirs, new in COMPVIS.items()}

    def ours(name: str) -> str:
        for pattern, new in patterns.items():
            if found := re.search(pattern, name):
                n = int(found[1]) if found.groups() else 0
                n -= name.startswith("input_blocks")  # number 0 is conv_in
                new = new.replace("L", str(n // per_level)).replace("P", str(n % per_level))
                name = name[:found.start()] + new + name[found.end():]
        return name

    return {ours(name): tensor for name, tensor in weights.items()}
