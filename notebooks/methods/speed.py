"""SPEED, in short: a closed form that moves values only where no kept prompt notices.

    theta = speed.erase(sd, {"star": ""}, keep=["heart", "moon"])

Li et al., "SPEED", ICLR 2026, https://arxiv.org/abs/2503.07392, and its code. Simplified:
prompts to keep are neither filtered nor augmented; all tokens from a prompt's last word on
count (its code: the last word alone); the empty prompt's tokens are averaged (its code:
three clusters). Symbols: W the weight of a value in cross-attention; features of tokens are
columns: C_1 the concept's, C_s its anchor's (the paper's C_*), C_0 of the prompts to keep,
C_2 the start token and the mean of the empty prompt's others, whose values don't change.
"""

from typing import Sequence

import torch
from torch import Tensor

import sample
from notebooks.methods import uce
from sample import StableDiffusion


def null_space(C_0: Tensor, threshold: float) -> Tensor:
    """Returns P, (D, D): projects onto the directions that are almost absent from C_0, (D, m).

    They are those whose singular value in C_0 C_0^T / m is below the threshold.
    """
    U, S, _ = torch.linalg.svd(C_0 @ C_0.T / C_0.shape[1])
    return U[:, S < threshold] @ U[:, S < threshold].T


def edited(W: Tensor, C_1: Tensor, C_s: Tensor, C_2: Tensor, P: Tensor) -> Tensor:
    """Returns W + Delta P, (D_out, D), where Delta minimizes, subject to Delta P C_2 = 0,

    || (W + Delta P) C_1 - W C_s ||^2 + || Delta P ||^2

    Delta P = W (C_s - C_1) C_1^T P Q M
    M       = (C_1 C_1^T P + I)^-1
    Q       = I - M C_2 (C_2^T P M C_2)^-1 C_2^T P

    W is (D_out, D), C_1 and C_s are (D, n), C_2 is (D, 2), P is (D, D).
    """
    W = W.double()
    identity = torch.eye(len(P)).to(P)
    M = torch.linalg.inv(C_1 @ C_1.T @ P + identity)
    Q = identity - M @ C_2 @ torch.linalg.solve(C_2.T @ P @ M @ C_2, C_2.T @ P)
    return (W + W @ (C_s - C_1) @ C_1.T @ P @ Q @ M).float()


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    threshold: float = 0.1,
) -> dict[str, Tensor]:
    """Returns the edited weights by name.

    Without keep, the empty prompt is kept. seed isn't used: nothing is random.
    """
    C_1, C_s, _ = uce.tokens(sd, concepts, keep)
    # never the start token, which C_2 has
    kept = [uce.columns(sd, p, first=max(1, uce.last_word(sd, p))) for p in keep or [""]]
    P = null_space(torch.cat(kept, dim=1), threshold)
    empty = uce.columns(sd, "")  # (D, 77)
    C_2 = torch.stack([empty[:, 0], empty[:, 1:].mean(dim=1)], dim=1)

    theta = {}
    for name, W in sample.unet_tensors(sd).items():
        if "attn2.to_v." in name:
            theta[name] = edited(W, C_1, C_s=C_s, C_2=C_2, P=P)
    return theta
