"""Unified Concept Editing (UCE): erases in closed form, without any training.

    theta = uce.erase(sd, {"star": ""}, keep=["heart", "moon"])

Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024,
https://arxiv.org/abs/2308.14761; tokens and strengths as in its code of 2023. Symbols: W the weight
of a key or a value in cross-attention; c the features of a token, e of the concept, g of its guide,
p of a prompt to keep. Afterwards the concept's tokens have nearly the guide's keys and values.
"""

import torch
from torch import Tensor

from sample import StableDiffusion


def keys_and_values(name: str) -> bool:
    return "attn2.to_k." in name or "attn2.to_v." in name


def tokens(sd: StableDiffusion, concepts: dict[str, str], keep: list[str]) -> tuple[Tensor, ...]:
    """Returns c_e, c_g and c_p as columns, (D, n), (D, n) and (D, m), in float64.

    Of concept and guide, the tokens from the last word on (of the empty prompt, from the start
    token on); of prompts to keep, the empty one among them, all 77.
    """
    def columns(prompt: str, first: int = 0) -> Tensor:
        return sd.encode([prompt])[0, first:].double().T

    def both(*pair: str) -> list[Tensor]:  # cut to the shorter one
        firsts = [len(ids) - 2 for ids in sd.tokenizer([*pair]).input_ids]
        length = sd.text_encoder.config.max_position_embeddings - max(firsts)
        return [columns(prompt, first)[:, :length] for prompt, first in zip(pair, firsts)]

    c_e, c_g = (torch.cat(some, dim=1) for some in zip(*(both(*pair) for pair in concepts.items())))
    return c_e, c_g, torch.cat([*map(columns, ["", *keep])], dim=1)


def edited(W: Tensor, c_e: Tensor, c_g: Tensor, c_p: Tensor, lam: float, s: float) -> Tensor:
    """Returns the W' that sends c_e near where W sends c_g, and c_p near where it went (eq. 7):

    W' = (lam W + sum W c_g c_e^T + s sum W c_p c_p^T) (lam I + sum c_e c_e^T + s sum c_p c_p^T)^-1
    """
    W = W.double()  # (D_out, D)
    wanted = lam * W + W @ c_g @ c_e.T + s * W @ c_p @ c_p.T
    met = lam * torch.eye(len(c_e)).to(W) + c_e @ c_e.T + s * c_p @ c_p.T  # (D, D)
    return torch.linalg.solve(met, wanted, left=False).float()


def keep_weight(keep: list[str]) -> float:
    return max(0.1, 1 / (1 + len(keep)))  # s in eq. 7; the empty prompt is kept, too


@torch.no_grad()
def erase(sd: StableDiffusion, concepts: dict[str, str], keep: list[str] = (),
          lam: float = 0.1) -> dict[str, Tensor]:
    """Returns the edited weights by name. concepts: {prompt: guide}; keep: prompts that stay."""
    c_e, c_g, c_p = tokens(sd, concepts, keep)
    return {name: edited(W, c_e, c_g, c_p, lam, keep_weight(keep))
            for name, W in sd.unet.named_parameters() if keys_and_values(name)}
