r"""Key steps: ESD with a gradient step at each of a trajectory's first, noisiest x_t.

    python erase.py "Van Gogh" --steps 8 --data notebooks.methods.key_steps:data \
        --iterations 500 --lr 1.5e-5

Early steps decide what an image shows. A trajectory cut in half takes half the gradient steps,
so half of --iterations sees as many starting noises; the learning rate is then multiplied by 1.5
(cost.py compares). erase.py always hands over its --steps, 50 by default. Related methods choose
the steps in other ways: KSCU (https://arxiv.org/abs/2507.06526) and SPARE
(https://arxiv.org/abs/2602.07058).
"""

import itertools
from typing import Callable, Iterator

from torch import Generator

import erase
from erase import Batch, Text
from sample import UsageError


def data(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    steps: int = 8, first: int | None = None, guidance: float = 3.0,
    x_t: Callable = erase.x_t_from_model,
) -> Iterator[Batch]:
    """Yields the x_t of the first steps of trajectories, from noise on.

    first: how many of the `steps`; by default half, rounded up. x_t: as
    `erase.x_t_from_model`, which draws the trajectories. Raises UsageError unless first is
    1 to steps.
    """
    if first is None:
        first = (steps + 1) // 2
    if not 1 <= first <= steps:
        raise UsageError(f"first is {first}, choose 1 to {steps}")

    while True:
        trajectory = x_t(
            unet, texts, shape, rng, steps=steps, guidance=guidance, every_step=True
        )
        yield from itertools.islice(trajectory, first)
