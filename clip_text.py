"""The text encoder of Stable Diffusion v1: CLIP ViT-L/14's transformer over tokens.

    text = TextEncoder(TextConfig())(tokens)      # (B, 77) -> (B, 77, 768)

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
https://arxiv.org/abs/2103.00020 (section 2.4). A prompt is a start token, its words, an end token,
and end tokens up to 77: transformers' CLIPTokenizer makes them. Attribute names are those of the
published checkpoints without their prefix `text_model.`.

Shapes: B batch, N tokens (77), D width (768), h heads (12).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SHARED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # of every text encoder of SD v1


@dataclass(frozen=True)
class TextConfig:
    """What differs between text encoders of this shape; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77

    @classmethod
    def from_json(cls, config: dict) -> "TextConfig":
        """The config of a published `text_encoder/config.json`.

        Raises ValueError where it describes another architecture than Stable Diffusion v1's.
        """
        for key, value in SHARED.items():
            if config.get(key, value) != value:
                raise ValueError(f"text_encoder/config.json has {key} = {config[key]!r}, Stable "
                                 f"Diffusion v1 has {value!r}: another model, use SD v1 weights")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict:
        """What `text_encoder/config.json` says of this text encoder; `from_json` reads it back."""
        start, end = self.vocab_size - 2, self.vocab_size - 1  # CLIP's last two tokens
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **SHARED,
                **asdict(self), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """A vector for each token plus one for its place: (B, N) -> (B, N, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (N,)
        return self.token_embedding(tokens) + self.position_embedding(place)  # (B, N, D)


class Attention(nn.Module):
    """Causal self-attention, each token sees itself and those before it: (B, N, D) -> (B, N, D)."""

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

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, h, N, D/h)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D), four times as wide inside."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class Layer(nn.Module):
    """A transformer layer, normalised before each part: (B, N, D) -> (B, N, D)."""

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
    """The layers, one after the other. A module of its own for the key: encoder.layers."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEncoder(nn.Module):
    """What the U-Net's cross-attention looks at: one vector per token."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, 77) -> text: (B, 77, 768), the last layer's output, normalised."""
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


def rename(weights: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """Published tensors under this file's names.

    Files have `text_model.` before every name and the constant position_ids, or (since
    transformers 5) neither.
    """
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    weights.pop("embeddings.position_ids", None)
    return weights
