"""ESD itself, under the interface of all methods: erase(sd, concepts, keep, seed, **settings).

    theta = esd.erase(sd, {"star": "a picture"}, method="esd-u", steps=8, every_step=True)

Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.07345. Everything is in erase.py; this file gives names to what
its papers and codes do differently, so that settings are plain JSON. README.md describes
the interface.
"""

import functools
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Generator, Tensor, nn

import erase as training
from erase import Batch, Text
from notebooks.methods import key_steps, uce
from sample import StableDiffusion, UsageError

METHODS = training.METHODS | {
    # section 4.1 to the letter; the paper's code also leaves out time and output layers
    "esd-u of the paper": lambda name: "attn2" not in name,
    "esd-x-strict": uce.keys_and_values,  # the official code's name for it
    "full": lambda name: True,
}


def tuned_by(method: str | Callable[[str], bool]) -> Callable[[str], bool]:
    """Returns which weights a method tunes, a predicate on names. Raises UsageError."""
    if callable(method):
        return method
    if method not in METHODS:
        raise UsageError(f"method is {method!r}, choose {' or '.join(METHODS)}")
    return METHODS[method]


def x_t_from_frozen(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    frozen: nn.Module, data: Callable = training.x_t_from_model, **options,
) -> Iterator[Batch]:
    """Yields what `data` does, drawn by the original model in place of `unet`.

    `esd_sd.py`, official code, has done so since 2025. options: what `data` takes.
    """
    return data(frozen, texts, shape, rng, **options)


class Prompts(NamedTuple):
    """The text features of a loss with anchors and prompts to keep, (B, 77, 768) each."""

    concept: Tensor  # c
    null: Tensor
    anchor: Tensor  # a, what takes the concept's place
    kept: Tensor  # p, whose output stays


def x_t_with_prompts(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    sd: StableDiffusion, anchors: Sequence[str], keep: Sequence[str] = ("",), **options,
) -> Iterator[Batch]:
    """Yields what `erase.x_t_from_model` does, x_t of the concept, with Prompts as text.

    anchors: one for each of the texts; keep: each sample gets a random one. options: what
    `erase.x_t_from_model` takes.
    """
    features = sd.encode([*anchors])  # (C, 77, 768)
    kept = sd.encode([*keep])  # (P, 77, 768)
    for x_t, t, text in training.x_t_from_model(unet, texts, shape, rng, **options):
        anchor = features[text.index].expand_as(text.null)
        chosen = torch.randint(len(kept), shape[:1], generator=rng)
        yield Batch(x_t, t, Prompts(text.concept, text.null, anchor, kept[chosen]))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    method: str | Callable[[str], bool] = "esd-x", x_t: str = "edited",
    drawn_for: str | None = None, steps: int = 50, guidance: float = 3.0,
    every_step: bool = False, first: int | None = None,
    data: Callable = training.x_t_from_model, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. Raises UsageError.

    concepts: {prompt: anchor}. ESD replaces a concept by nothing in particular, so it
    doesn't use the anchor: as in the paper, x_t is drawn for the concept. keep isn't
    used either.
    method: a name in METHODS, or a predicate on the names of weights.
    x_t: which model draws it, "edited" or "frozen", in `steps` steps.
    drawn_for: the prompt that x_t is drawn for, if not for the concept.
    first: takes x_t at each of so many first steps of a trajectory, as key_steps.py does;
    every_step is then ignored.
    data: as in erase.py; also takes steps, guidance and every_step.
    settings: what `erase.erase` takes, such as eta, lr, iterations, batch and loss_fn.
    """
    if x_t not in ("edited", "frozen"):
        raise UsageError(f"x_t is {x_t!r}, choose edited or frozen")
    if x_t == "frozen":
        data = functools.partial(x_t_from_frozen, frozen=sd.unet, data=data)
    if first is None:
        data = functools.partial(data, every_step=every_step)
    else:
        data = functools.partial(key_steps.data, first=first, x_t=data)
    data = functools.partial(data, steps=steps, guidance=guidance)

    prompts = [*concepts]
    if drawn_for is not None:
        prompts = dict.fromkeys(concepts, drawn_for)

    return training.erase(
        sd, prompts, method=tuned_by(method), seed=seed, data=data, **settings
    )
