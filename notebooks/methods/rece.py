"""RECE: finds what still brings a concept back after UCE, and erases that, too.

    theta = rece.erase(sd, {"star": ""}, keep=["heart", "moon"])

Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
ECCV 2024, https://arxiv.org/abs/2407.12383, and its code. Symbols as in uce.py; everything has a
closed form.
"""

from typing import Sequence

import torch
from torch import Tensor

import sample
from notebooks.methods import uce
from sample import StableDiffusion


def adversarial(
    original: list[Tensor], edited: list[Tensor], c: Tensor, lam: float
) -> Tensor:
    """Returns the c' that the edited W' send where the original W sent c, (D, n).

    c' = (lam I + sum W'^T W')^-1 (sum W'^T W) c, with sums over all keys and values
    """
    gram = sum(W_new.T @ W_new for W_new in edited)  # (D, D)
    cross = sum(W_new.T @ W for W_new, W in zip(edited, original))
    return torch.linalg.solve(lam * torch.eye(len(c)).to(c) + gram, cross @ c)


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    rounds: int = 1, lam: float = 0.1, adversary_lam: float = 1e-3, s: float = 0.1,
) -> dict[str, Tensor]:
    """Returns the edited weights by name: UCE's, then `rounds` edits that each erase c'.

    concepts: {prompt: guide}; keep: prompts that stay. seed isn't used: nothing is random.
    adversary_lam pulls c' towards 0: the larger, the weaker the edits. s: how much the
    prompts to keep count in these rounds; UCE has a weight of its own. The defaults are the
    authors' for styles, and for objects that are hard for UCE; easy ones have an
    adversary_lam of 0.1, nudity 0.1 and 3 rounds. Each round starts from the weights of the
    last one, as in their code.
    """
    theta = uce.erase(sd, concepts, keep=keep, lam=lam)
    weights = sample.unet_tensors(sd)
    original = [weights[name].double() for name in theta]

    # unlike UCE, all 77 tokens of the concepts and their guides, with the start token
    c = torch.cat([uce.columns(sd, prompt) for prompt in concepts], dim=1)  # (D, 77 C)
    c_g = torch.cat([uce.columns(sd, guide) for guide in concepts.values()], dim=1)
    c_p = uce.tokens(sd, concepts, keep).c_p

    for _ in range(rounds):
        edited = [W.double() for W in theta.values()]
        c_found = adversarial(original, edited, c=c, lam=adversary_lam)
        for name, W in theta.items():
            theta[name] = uce.edited(W, c_found, c_g=c_g, c_p=c_p, lam=lam, s=s)
    return theta
