"""Unified Concept Editing (UCE): erases in closed form, without any training.

    theta = uce.erase(sd, {"star": ""}, keep=["heart", "moon"])

Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024,
https://arxiv.org/abs/2308.14761; tokens and s as in its code of 2023; lam is the default of
that code's function (its script passes 0.5). Symbols: W the weight of a key or a value in
cross-attention; c the features of a token, e of the concept, g of its guide, p of a
prompt to keep. Afterwards the concept's tokens have nearly the guide's keys and values.
(The guide is what others call the anchor.)
"""

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

import sample
from sample import StableDiffusion


def keys_and_values(name: str) -> bool:
    """Whether a weight is one of those that UCE edits."""
    return "attn2.to_k." in name or "attn2.to_v." in name


# ---- the tokens


class Tokens(NamedTuple):
    """The features of tokens, as columns, in float64."""

    c_e: Tensor  # (D, n), of the concepts
    c_g: Tensor  # (D, n), of their guides: each column belongs to that of c_e
    c_p: Tensor  # (D, m), of the prompts to keep


def columns(sd: StableDiffusion, prompt: str, first: int = 0) -> Tensor:
    """Returns the features of a prompt's tokens from `first` on, (D, 77 - first)."""
    return sd.encode([prompt])[0, first:].double().T


def last_word(sd: StableDiffusion, prompt: str) -> int:
    """Returns the index of a prompt's last token; of a split word, that is its last piece.

    Of the empty prompt, it is the start token, as in its code.
    """
    return len(sd.tokenizer(prompt).input_ids) - 2


def tokens(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str]
) -> Tokens:
    """Returns which tokens are edited, which take their place, and which stay.

    Of concept and guide, the tokens from the last word on, as many as both have; of
    prompts to keep, the empty one among them, all 77.
    """
    of_concepts = []
    of_guides = []
    for concept, guide in concepts.items():
        c_e = columns(sd, concept, first=last_word(sd, concept))
        c_g = columns(sd, guide, first=last_word(sd, guide))
        length = min(c_e.shape[1], c_g.shape[1])
        of_concepts.append(c_e[:, :length])
        of_guides.append(c_g[:, :length])

    return Tokens(
        c_e=torch.cat(of_concepts, dim=1),
        c_g=torch.cat(of_guides, dim=1),
        c_p=torch.cat([columns(sd, prompt) for prompt in ("", *keep)], dim=1),
    )


# ---- the edit (eq. 7)


def edited(
    W: Tensor, c_e: Tensor, c_g: Tensor, c_p: Tensor, lam: float, s: float
) -> Tensor:
    """Returns the W' that sends c_e near where W sends c_g, and c_p near where it went:

    W' = A B^-1
    A  = lam W + sum W c_g c_e^T + s sum W c_p c_p^T
    B  = lam I + sum c_e c_e^T + s sum c_p c_p^T

    W and W' are (D_out, D).
    """
    W = W.double()
    A = lam * W + W @ c_g @ c_e.T + s * W @ c_p @ c_p.T
    B = lam * torch.eye(len(c_e)).to(W) + c_e @ c_e.T + s * c_p @ c_p.T  # (D, D)
    return torch.linalg.solve(B, A, left=False).float()


def keep_weight(keep: Sequence[str]) -> float:
    """Returns s: 1 / (number of prompts to keep, with the empty one), but at least 0.1."""
    return max(0.1, 1 / (1 + len(keep)))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    lam: float = 0.1,
) -> dict[str, Tensor]:
    """Returns the edited weights by name.

    concepts: {prompt: guide}; keep: prompts that stay. seed isn't used: nothing is random.
    """
    c_e, c_g, c_p = tokens(sd, concepts, keep)
    s = keep_weight(keep)

    theta = {}
    for name, W in sample.unet_tensors(sd).items():
        if keys_and_values(name):
            theta[name] = edited(W, c_e, c_g=c_g, c_p=c_p, lam=lam, s=s)
    return theta
