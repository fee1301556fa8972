"""Checks of the exercises: each takes a student's function and says "right" or what is wrong.

    print(checks.target(my_target))
"""

from typing import Callable

import torch
from torch import Tensor

import ddim
import erase
import unet
from notebooks.methods import safe_latent_diffusion

NOT_YET = "not yet: write it first"


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Returns standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(answer: Tensor, expected: Tensor) -> bool:
    """Whether an answer is a tensor of the expected shape and values."""
    return (isinstance(answer, Tensor) and answer.shape == expected.shape
            and torch.allclose(answer.double(), expected.double(), atol=1e-5))


def tried(answer: Callable, *arguments) -> tuple[object, str]:
    """Returns the function's result and "", or None and the reason why there is no result."""
    try:
        result = answer(*arguments)
    except Exception as error:  # a student's code can raise anything
        return None, f"wrong: it raises {type(error).__name__}: {error}"
    if result is None or result is ...:
        return None, NOT_YET
    return result, ""


def denoise(answer: Callable) -> str:
    """Exercise 1.2: a sampler, compared with `ddim.denoise`."""
    start, asked = noise(1, 4, 2, 2), []

    def predict(x_t, t):
        asked.append(t)
        return 0.3 * x_t + t / 1000

    result, reason = tried(answer, predict, start, 10)
    if reason:
        return reason
    if asked != ddim.timesteps(10):
        times = ddim.timesteps(10)
        return (f"wrong: it calls the model at the times {asked[:2]} ... {asked[-1:]}; the ten "
                f"steps of Stable Diffusion are at {times[:2]} ... {times[-1:]}")
    *_, (_, expected) = ddim.denoise(predict, start, 10)
    if alike(result, expected):
        return "right"
    abar = ddim.alphas_cumprod()
    no_root = start
    for t in ddim.timesteps(10):
        eps, t_prev = predict(no_root, t), max(t - 100, 0)
        no_root = (abar[t_prev].sqrt() * (no_root - (1 - abar[t]) * eps) / abar[t].sqrt()
                   + (1 - abar[t_prev]).sqrt() * eps)
    if alike(result, no_root):
        return ("wrong: the times are right, but the factor of the noise in x_t isn't 1 - abar: "
                "look at eq. 4 again")
    return ("wrong: the times are right, but the result isn't: check how much noise a step "
            "removes, and where the last step ends")


def target(answer: Callable) -> str:
    """Exercise 2.2: Eq. 6."""
    eps_null, eps_c, eta = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1), 0.7
    result, reason = tried(answer, eps_null, eps_c, eta)
    if reason:
        return reason
    if alike(result, erase.esd_target(eps_null, eps_c, eta)):
        return "right"
    if alike(result, eps_null + eta * (eps_c - eps_null)):
        return "wrong: this sign makes the concept stronger; it is guidance, Eq. 3"
    if alike(result, eps_c - eta * (eps_c - eps_null)):
        return ("wrong: it starts from the prediction for the concept, as the official code of "
                "2025 does, whose g is eta + 1")
    if alike(result, eps_null - eta * eps_c):
        return ("wrong: subtract the difference that the concept makes, not the prediction for "
                "the concept")
    return "wrong: Eq. 6 gives other values"


def method(answer: Callable) -> str:
    """Exercise 2.3: the queries of the cross-attention, among all names of the SD v1 U-Net."""
    with torch.device("meta"):
        names = [name for name, _ in unet.UNet().named_parameters()]
    chosen = []
    for name in names:
        result, reason = tried(answer, name)
        if reason:
            return reason
        chosen += [name] if result else []
    expected = [name for name in names if "attn2.to_q." in name]
    if chosen == expected:
        return "right"
    for name in chosen:
        if name not in expected:
            return (f"wrong: it selects {len(chosen)} tensors instead of {len(expected)}, among "
                    f"them {name}")
    return f"wrong: it selects {len(chosen)} tensors instead of {len(expected)}"


def interval(answer: Callable) -> str:
    """Exercise 3.2: Wilson's interval of a share."""
    for hits, asked, low, high in ((0, 50, 0.0, 0.0713), (25, 50, 0.3664, 0.6336),
                                   (50, 50, 0.9287, 1.0), (1, 3, 0.0615, 0.7923)):
        result, reason = tried(answer, hits, asked)
        if reason:
            return reason
        try:
            close = abs(result[0] - low) < 1e-3 and abs(result[1] - high) < 1e-3
        except (TypeError, IndexError):
            return f"wrong: it returns {result!r} instead of two numbers, low and high"
        if not close:
            none = result[0] == result[1]
            return (f"wrong: for {hits} of {asked} it returns {result[0]:.3f} to {result[1]:.3f}; "
                    f"Wilson's interval is {low} to {high}"
                    + (": 50 images don't make it certain" if none else ""))
    return "right"


def selective_loss(answer: Callable) -> str:
    """Exercise 4.2: Eq. 6 where the concept matters, the original's prediction elsewhere."""
    text = erase.Text(*(torch.full((2, 77, 8), value).double() for value in (3.0, 1.0, 2.0)))
    x_t, t = noise(2, 4, 3, 3), torch.tensor([7, 500])

    def frozen(x_t, t, c):  # the prompt has a large effect, up or down, in two parts of x_t
        much = torch.where(x_t > 0.5, 1.0, torch.where(x_t < -0.5, -1.0, 0.2))
        return 0.5 * x_t + 0.1 * c.mean() * much

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def edited(x_t, t, c):
        return weight * frozen(x_t, t, c) + 0.01

    result, reason = tried(answer, edited, frozen, x_t, t, text, 2.0)
    if reason:
        return reason
    eps_null, eps_c = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)
    matters = (eps_c - eps_null).abs() > 0.1
    eq_6 = erase.esd_target(eps_null, eps_c, 2.0)

    def error(where, elsewhere=eps_c):
        target = torch.where(where, eq_6, elsewhere)
        return (edited(x_t, t, text.concept) - target).detach().square()

    mistakes = (
        (error(torch.ones_like(matters)).mean(dim=(1, 2, 3)), "it applies Eq. 6 everywhere"),
        (error(eps_c - eps_null > 0.1).mean(dim=(1, 2, 3)),
         "a difference of -0.2 is large too: compare the absolute value"),
        (error(~matters).mean(dim=(1, 2, 3)), "it erases where the predictions barely differ"),
        (error(matters, eps_null).mean(dim=(1, 2, 3)),
         "elsewhere, the target is the original's prediction for the concept"),
        (error(matters).sum(dim=(1, 2, 3)), "it sums over the elements of a sample: take the mean"),
        (torch.stack([e[m].mean() for e, m in zip(error(matters), matters)]),
         "take the mean over all elements: where nothing is erased, the model should not change"))
    if not isinstance(result, Tensor) or result.shape != (2,):
        return ("wrong: return one number for each sample, here (2,), instead of "
                f"{getattr(result, 'shape', result)}")
    if not alike(result.detach(), error(matters).mean(dim=(1, 2, 3))):
        return "wrong: " + next((what for loss, what in mistakes if alike(result.detach(), loss)),
                                "the values differ")
    if not result.requires_grad:
        return "wrong: the loss has no gradient: call the edited model outside of no_grad"
    return "right"


def safe_direction(answer: Callable) -> str:
    """Exercise 3.3: what Safe Latent Diffusion subtracts, without momentum."""
    eps_null, eps_c, eps_s = (noise(1, 4, 8, 8, seed=i) for i in range(3))
    scale, threshold = 2.0, 0.1
    result, reason = tried(answer, eps_null, eps_c, eps_s, scale, threshold)
    if reason:
        return reason
    safety = safe_latent_diffusion.Safety(0, scale, threshold, 0.0, 0.0)
    expected, _ = safe_latent_diffusion.safe_direction(eps_null, eps_c, eps_s, torch.zeros(()),
                                                       safety)
    if alike(result, expected):
        return "right"
    difference = eps_c - eps_s
    if alike(result, scale * difference.abs() * (difference < threshold) * (eps_s - eps_null)):
        return "wrong: mu must be at most 1"
    if alike(result, (scale * difference.abs()).clamp(max=1) * (eps_s - eps_null)):
        return "wrong: mu must be 0 where eps_c - eps_s is at or above the threshold"
    if alike(result, (scale * difference.abs()).clamp(min=1) * (difference < threshold)
             * (eps_s - eps_null)):
        return "wrong: this mu is at least 1, as in the paper's text; in its code it is at most 1"
    return "wrong: the equations give other values"


def add_noise(answer: Callable) -> str:
    """Exercise 5.2: the forward process, which adds noise to an image."""
    x_0, eps, abar_t = noise(1, 4, 3, 3), noise(1, 4, 3, 3, seed=1), torch.tensor(0.36)
    result, reason = tried(answer, x_0, eps, abar_t)
    if reason:
        return reason
    if alike(result, ddim.add_noise(x_0, eps, abar_t)):
        return "right"
    if alike(result, 0.36 * x_0 + 0.64 * eps):
        return "wrong: abar is a share of the variance: take square roots"
    if alike(result, 0.8 * x_0 + 0.6 * eps):
        return "wrong: abar is the image's share of the variance, not the noise's"
    if alike(result, x_0 + 0.8 * eps):
        return "wrong: scale the image down as the noise grows, or the variance grows"
    return "wrong: eq. 4 of DDIM gives other values"
