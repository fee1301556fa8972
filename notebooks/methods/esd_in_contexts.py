"""ESD for a concept's name in contexts, too: "a red star" loses the star and stays red.

    contexts = {"star": "", "a red star": "a red picture"}
    theta = erase.erase(sd, [*contexts], data=esd_in_contexts.data(sd, contexts))

Our variation. With Eq. 6 alone, "a red star" would move away from red as well, so its context
takes the place of the empty prompt there. Symbols as in erase.py; k is the context.
"""

from typing import Callable, Iterator

import torch
from torch import Tensor

import erase
from erase import Text
from sample import StableDiffusion


def data(sd: StableDiffusion, contexts: dict[str, str]) -> Callable:
    """Returns a function like `erase.own_ways` at every step, whose items turn Eq. 6 into

    target = eps_theta*(x_t, k, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, k, t)]

    contexts: {prompt: the same without the concept}, in the order of the prompts to be erased.
    """
    features = sd.encode([*contexts.values()])  # (C, 77, 768)

    def in_contexts(unet: Callable, texts: list[Text], shape: tuple, steps: int, guidance: float,
                    rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Text]]:
        ways = [erase.own_ways(unet, [text], shape, steps, guidance, rng, every_step=True)
                for text in texts]
        pairs = [*zip(ways, features, strict=True)]
        while True:
            way, k = pairs[torch.randint(len(pairs), (1,), generator=rng)]
            for _ in range(steps):
                x_t, t, text = next(way)
                yield x_t, t, text._replace(null=k.expand_as(text.null))

    return in_contexts
