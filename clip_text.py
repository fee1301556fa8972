"""The text encoder of Stable Diffusion v1: the text transformer of CLIP ViT-L/14.

    c = TextEncoder(TextConfig())(tokens)      # (B, 77) -> (B, 77, 768)

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, https://arxiv.org/abs/2103.00020 (section 2.4). tokens are the start
token 49406, the prompt's, and the end token 49407 repeated up to 77. Attribute names are
those of the published checkpoints without the prefix `text_model.`.

Shapes: B batch, N tokens (77), D width (768), h heads (12).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text encoder; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Token embedding plus position embedding: (B, N) -> (B, N, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(
            config.max_position_embeddings, config.hidden_size
        )

    def forward(self, tokens: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)  # (N,)
        return self.token_embedding(tokens) + self.position_embedding(position)  # (B, N, D)


class Attention(nn.Module):
    """Causal self-attention: no token sees a later one. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        def split(tokens):  # (B, N, D) -> (B, h, N, D/h)
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = split(self.q_proj(x))
        k = split(self.k_proj(x))
        v = split(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, h, N, D/h)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two layers, four times as wide inside: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers, a module of its own for the key encoder.layers."""

    def __init__(self, config: TextConfig):
        super().__init__()
        layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEncoder(nn.Module):
    """Encodes a prompt as a vector per token, for the U-Net's cross-attention."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 77) -> features (B, 77, 768): the last layer's, after final_layer_norm.

        Neither pooled nor projected, and not of unit length.
        """
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


def config_from_json(config: dict) -> TextConfig:
    """Returns the config that a published `text_encoder/config.json` describes."""
    act = config.get("hidden_act", "quick_gelu")
    if act != "quick_gelu":  # OpenCLIP's ViT-L/14 has exact GELU and the same shapes
        raise ValueError(
            f"text_encoder/config.json has hidden_act = {act!r}, not 'quick_gelu'"
        )
    known = {name: config[name] for name in TextConfig.__dataclass_fields__}
    return TextConfig(**known)


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the prefix and the constant position_ids; transformers 5 writes neither."""
    renamed = {}
    for name, tensor in weights.items():
        if not name.endswith("position_ids"):
            renamed[name.removeprefix("text_model.")] = tensor
    return renamed
