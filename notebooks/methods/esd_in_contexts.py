"""ESD for a concept's name in contexts, too: "a red star" loses the star and stays red.

    theta = esd_in_contexts.erase(sd, {"star": "", "a red star": "a red picture"})

Our variation. With Eq. 6 alone, "a red star" would move away from red as well, so its
context takes the place of the empty prompt there, as the anchor does in spm.py. Symbols
as in erase.py; k is the context.
"""

import functools
import itertools
from typing import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from erase import Batch, Text, x_t_from_model
from notebooks.methods import esd
from sample import StableDiffusion, UsageError


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    sd: StableDiffusion, contexts: dict[str, str],
    steps: int = 50, guidance: float = 3.0, every_step: bool = True,
) -> Iterator[Batch]:
    """Yields x_t of trajectories, each for a random prompt; its text.null is k.

    x_t is guided from the empty prompt, as in the paper. k takes its place in the loss alone,
    so Eq. 6's target is

    eps_theta*(x_t, k, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, k, t)]

    contexts: {prompt: the same without the concept}, in the order of the prompts to be
    erased. Raises UsageError if there aren't as many as texts.
    """
    if len(contexts) != len(texts):
        raise UsageError(f"{len(contexts)} contexts for {len(texts)} prompts")

    features = sd.encode([*contexts.values()])  # (C, 77, 768)
    while True:
        i = torch.randint(len(texts), (1,), generator=rng).item()
        batches = x_t_from_model(
            unet, [texts[i]], shape, rng,
            steps=steps, guidance=guidance, every_step=every_step,
        )
        for x_t, t, text in itertools.islice(batches, steps if every_step else 1):
            yield Batch(x_t, t, text._replace(null=features[i].expand_as(text.null)))


def erase(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    every_step: bool = True, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. settings: see `esd.erase`.

    concepts: {prompt: anchor}; the anchor is k, the same prompt without the concept. keep
    isn't used.
    """
    contexts = functools.partial(data, sd=sd, contexts=concepts)
    return esd.erase(
        sd, concepts, seed=seed, data=contexts, every_step=every_step, **settings
    )
