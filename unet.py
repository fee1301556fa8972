"""The U-Net of Stable Diffusion v1: predicts the noise in a latent, given the time and a text.

    eps = UNet(UNetConfig())(x_t, t, text)    # (B, 4, 64, 64), (B,), (B, 77, 768) -> (B, 4, 64, 64)

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022,
https://arxiv.org/abs/2112.10752 (section 3.3 and figure 3). Attribute names are those of the
published checkpoints in diffusers' layout, so that a published file loads without a converter.

Shapes: B batch, C channels, H W feature map, N tokens (H*W of the image or 77 of the text),
D width of a token, h heads. emb is the time embedding, (B, 4 * C of the first level).
"""

import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


SHARED = {  # what every U-Net of Stable Diffusion v1 has, as `unet/config.json` words it
    "addition_embed_type": None, "use_linear_projection": False, "class_embed_type": None,
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "center_input_sample": False,
}
RELATIVES = {"addition_embed_type": "SDXL", "use_linear_projection": "Stable Diffusion 2"}


@dataclass(frozen=True)
class UNetConfig:
    """What differs between U-Nets of this shape; the defaults are Stable Diffusion v1."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # C of each level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels look at the text
    layers_per_block: int = 2
    cross_attention_dim: int = 768  # D of the text encoder
    heads: int = 8  # at every level; so heads are 40, 80, 160 and 160 wide
    norm_num_groups: int = 32
    sample_size: int = 64  # H and W of the latents that it was trained on

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """The config of a published `unet/config.json`.

        Raises ValueError where it describes another architecture than Stable Diffusion v1's.
        """
        for key, value in SHARED.items():
            if config.get(key, value) != value:
                raise ValueError(f"unet/config.json has {key} = {config[key]!r}, Stable Diffusion "
                                 f"v1 has {value!r}: this is {RELATIVES.get(key, 'another model')}"
                                 ", use SD v1 weights")
        heads = config.get("attention_head_dim", 8)  # published under this name; it counts heads
        if not isinstance(heads, int):
            raise ValueError(f"unet/config.json has attention_head_dim = {heads!r}, one number "
                             "for each level: this is Stable Diffusion 2, use SD v1 weights")
        if config["in_channels"] != config["out_channels"]:
            raise ValueError(f"unet/config.json has in_channels = {config['in_channels']}: this is "
                             "an inpainting or another relative, use SD v1 weights")
        same = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim",
                "norm_num_groups", "sample_size")
        return cls(
            block_out_channels=tuple(config["block_out_channels"]),
            attention=tuple(name == "CrossAttnDownBlock2D" for name in config["down_block_types"]),
            heads=heads,
            **{name: config[name] for name in same},
        )

    def to_json(self) -> dict:
        """What `unet/config.json` says of this U-Net; `from_json` reads it back."""
        config = {"_class_name": "UNet2DConditionModel", **SHARED, **asdict(self)}
        kinds = ["CrossAttn" if attention else "" for attention in config.pop("attention")]
        config["down_block_types"] = [f"{kind}DownBlock2D" for kind in kinds]
        config["up_block_types"] = [f"{kind}UpBlock2D" for kind in reversed(kinds)]
        config["attention_head_dim"] = config.pop("heads")
        return config


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, of t / 10000^(i / (dim/2)) for i < dim/2."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer MLP behind the sinusoids: (B, C) -> (B, 4C)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t_emb)))


class ResnetBlock(nn.Module):
    """Two convolutions around the time embedding: (B, C_in, H, W) -> (B, C_out, H, W)."""

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
    """Every token of x looks at every token of context: (B, N, D), (B, M, D_context) -> (B, N, D).

    softmax(Q K^T / sqrt(d)) V, once for each head ("Attention Is All You Need", eq. 1).
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
        # net.1 is a dropout in the published model: it has no weights, but the key is net.2
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
    """The resnets of one level, each followed by a transformer where the level has attention."""

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
    """One level on the way down: returns its output and what the way up will be shown again."""

    def __init__(self, inputs, c_out, attention, config, last: bool):
        super().__init__(inputs, c_out, attention, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
            skips.append(x)
        for down in self.downsamplers:
            x = down(x)
            skips.append(x)
        return x, skips


class UpBlock(Level):
    """One level on the way up: each resnet sees x beside a skip, the latest first."""

    def __init__(self, inputs, c_out, attention, config, last: bool):
        super().__init__(inputs, c_out, attention, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for i, skip in enumerate(reversed(skips)):
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
        self.checkpointing = False  # True: gradients take less memory and more time
        widths, n = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.mid_block = MidBlock(widths[-1], config)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(widths):
            finer, coarser = widths[max(i - 1, 0)], widths[min(i + 1, last)]
            inputs = [finer] + [c] * (n - 1)
            self.down_blocks.append(DownBlock(inputs, c, config.attention[i], config, i == last))
            # on the way up, x comes first from the coarser level, the last skip from the finer
            inputs = [x + skip for x, skip in zip([coarser] + [c] * n, [c] * n + [finer])]
            self.up_blocks.insert(0, UpBlock(inputs, c, config.attention[i], config, i == 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def call_block(self, block: nn.Module, *inputs: Tensor | list[Tensor]) -> Tensor | tuple:
        """A block's output. With `checkpointing`, what happens inside is forgotten and computed
        again for the gradient: with the weights of now, since erase.py swaps them for one call.
        """
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        weights = dict(block.named_parameters())
        return checkpoint(functional_call, block, weights, inputs, use_reentrant=False)

    def forward(self, x_t: Tensor, t: Tensor | int, text: Tensor) -> Tensor:
        """x_t: (B, 4, 64, 64), t: (B,) or a number, text: (B, 77, 768) -> eps: (B, 4, 64, 64).

        Computes in the weights' dtype and answers in that of x_t.
        """
        dtype = self.conv_in.weight.dtype
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))  # (B,)
        t_emb = timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        emb = self.time_embedding(t_emb)

        x = self.conv_in(x_t.to(dtype))
        skips = [x]
        for block in self.down_blocks:
            x, new = self.call_block(block, x, emb, text)
            skips += new
        x = self.call_block(self.mid_block, x, emb, text)
        for block in self.up_blocks:
            n = len(block.resnets)
            x = self.call_block(block, x, emb, text, skips[-n:])
            skips = skips[:-n]
        return self.conv_out(F.silu(self.conv_norm_out(x))).to(x_t.dtype)


# CompVis's names -> these. N counts blocks through all levels: it is block P of level L.
COMPVIS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.N.0.op": "down_blocks.L.downsamplers.0.conv",
    "input_blocks.N.0": "down_blocks.L.resnets.P",
    "input_blocks.N.1": "down_blocks.L.attentions.P",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.N.0": "up_blocks.L.resnets.P",
    "output_blocks.N.1.conv": "up_blocks.L.upsamplers.0.conv",  # of a level without attention
    "output_blocks.N.2.conv": "up_blocks.L.upsamplers.0.conv",
    "output_blocks.N.1": "up_blocks.L.attentions.P",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
COMPVIS_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}


def rename(weights: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Published tensors under this file's names, be they CompVis's or diffusers'."""
    per_level = config.layers_per_block + 1  # input_blocks end a level with the downsampler
    patterns = [(re.compile(re.escape(theirs).replace("N", r"(\d+)") + r"(?=\.)"), new)
                for theirs, new in COMPVIS.items()]

    def ours(name: str) -> str:
        for theirs, new in patterns:
            found = theirs.match(name)
            if found:
                n = int(found[1]) if found.groups() else 0
                n -= name.startswith("input_blocks")  # number 0 is conv_in
                new = new.replace("L", str(n // per_level)).replace("P", str(n % per_level))
                name = new + name[found.end():]
                break
        for theirs, new in COMPVIS_RESNET.items():
            name = name.replace(f".{theirs}.", f".{new}.")
        return name

    return {ours(name): tensor for name, tensor in weights.items()}
