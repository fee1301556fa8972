"""ESD for a concept's name in contexts, too: "a red star" loses the star and stays red.

    contexts = {"star": "", "a red star": "a red picture"}
    data = partial(esd_in_contexts.data, sd=sd, contexts=contexts)
    theta = erase.erase(sd, [*contexts], data=data)

Our variation. With Eq. 6 alone, "a red star" would move away from red as well, so its
context takes the place of the empty prompt there. Symbols as in erase.py; k is the
context.
"""

import itertools
from typing import Callable, Iterator

import torch
from torch import Generator

import erase
from erase import Batch, Text
from sample import StableDiffusion, UsageError


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    sd: StableDiffusion, contexts: dict[str, str],
    steps: int = 50, guidance: float = 3.0,
) -> Iterator[Batch]:
    """Yields every x_t of trajectories, each for a random prompt, with k as text.null.

    So x_t is drawn as in the paper, with the empty prompt, but Eq. 6 has the target

    eps_theta*(x_t, k, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, k, t)]

    contexts: {prompt: the same without the concept}, in the order of the prompts to be
    erased. Raises UsageError if there aren't as many as texts.
    """
    if len(contexts) != len(texts):
        raise UsageError(f"{len(contexts)} contexts for {len(texts)} prompts")

    features = sd.encode([*contexts.values()])  # (C, 77, 768)
    while True:
        i = torch.randint(len(texts), (1,), generator=rng).item()
        trajectory = erase.x_t_from_model(
            unet, [texts[i]], shape, rng,
            steps=steps, guidance=guidance, every_step=True,
        )
        for x_t, t, text in itertools.islice(trajectory, steps):
            yield Batch(x_t, t, text._replace(null=features[i].expand_as(text.null)))
