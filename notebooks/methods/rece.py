"""RECE: finds what still brings a concept back after UCE, and erases that too, round by round.

    theta = rece.erase(sd, {"star": ""}, keep=["heart", "moon"])

Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024,
https://arxiv.org/abs/2407.12383. Symbols as in uce.py; everything has a closed form.
"""

import torch
from torch import Tensor

from notebooks.methods import uce
from sample import StableDiffusion


def adversarial(original: list[Tensor], edited: list[Tensor], c: Tensor, lam: float) -> Tensor:
    """Returns the c' that the edited W' send where the original W sent c; both are (D, n).

    c' = (lam I + sum W'^T W')^-1 (sum W'^T W) c, with sums over all keys and values
    """
    own = sum(new.T @ new for new in edited)
    both = sum(new.T @ old for new, old in zip(edited, original))
    return torch.linalg.solve(lam * torch.eye(len(c)).to(c) + own, both @ c)


@torch.no_grad()
def erase(sd: StableDiffusion, concepts: dict[str, str], keep: list[str] = (), rounds: int = 1,
          lam: float = 0.1, adversary_lam: float = 1e-3) -> dict[str, Tensor]:
    """Returns the edited weights by name: UCE's, then `rounds` more edits that each erase c'.

    concepts: {prompt: guide}; keep: prompts that stay. The smaller adversary_lam, the further c'
    may be from any real prompt. Its code has these values for styles and objects; for nudity, 3
    rounds and 0.1.
    """
    theta = uce.erase(sd, concepts, keep, lam)
    original = [W.double() for name, W in sd.unet.named_parameters() if name in theta]
    c_e, c_g, c_p = uce.tokens(sd, concepts, keep)
    for _ in range(rounds):
        edited = [W.double() for W in theta.values()]
        found = adversarial(original, edited, c_e, adversary_lam)
        theta = {name: uce.edited(W, found, c_g, c_p, lam, uce.keep_weight(keep))
                 for name, W in theta.items()}
    return theta
