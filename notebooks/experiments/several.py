"""Several concepts: erased together, or one after the other?

Several concepts in one command are erased together: each trajectory is for a random one of
them. One after the other, each erasure starts from the model that the last one left, which
is then theta* in Eq. 6 (`erase.py --erased FILE`). Both take as many gradient steps for
each concept as ESD-x takes for one.

On SD v1:

```sh
python erase.py "Van Gogh" "Claude Monet" --iterations 2000 --out both.safetensors
python erase.py "Van Gogh" --out van-gogh.safetensors
python erase.py "Claude Monet" --erased van-gogh.safetensors --out one-after-the-other.safetensors
```
"""

from typing import Sequence

from torch import Tensor

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import (
    Answers,
    Cell,
    Column,
    Model,
    by_name,
    in_colours,
    in_contexts,
)
from notebooks.methods import esd
from sample import StableDiffusion


def erase_together(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str], seed: int,
    iterations: int, **settings,
) -> dict[str, Tensor]:
    """Returns theta after `iterations` for each concept, all in one run."""
    return esd.erase(
        sd, concepts, keep=keep, seed=seed, iterations=iterations * len(concepts), **settings
    )


def erase_in_turn(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str], seed: int, **settings
) -> dict[str, Tensor]:
    """Returns theta after each concept was erased from the model that the last one left."""
    theta = {}
    edited = sd
    for prompt, anchor in concepts.items():
        theta = theta | esd.erase(edited, {prompt: anchor}, keep=keep, seed=seed, **settings)
        edited = sample.with_weights(sd, theta)
    return theta


MODELS = [
    models.original,
    Model("together", erase_together, models.ESD_X),
    Model("one after the other", erase_in_turn, models.ESD_X),
]
CONCEPTS = [("star", "heart"), ("star", "heart", "moon", "arrow", "square")]
SEEDS = core.SEEDS
FINDINGS = """\
- Together is better than one after the other: with two concepts and with five, less is left, and
  more of the rest stays (with two concepts, "less is left" may be chance).
- Five of ten objects cost the other five 17 points, even together: they are all close to each
  other.
"""


COLUMNS = (
    Column("left by name, %", by_name),
    Column("left in styles and colours, %", in_contexts),
    Column("other objects, %", by_name, own=False),
    Column("colours of other objects, %", in_colours, own=False, head="colour"),
)


def cells(models: list[Model], concepts: list, seeds: list[int]) -> list[Cell]:
    """Returns what is asked of each model."""
    asks = [by_name, in_contexts, in_colours]
    return core.grid(models, concepts, asks=asks, seeds=seeds)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each set of concepts and each model."""
    rows = []
    for concepts in CONCEPTS:
        for model in models:
            if answers.seeds(model, concepts, by_name):
                found = [answers.count(model, [concepts], column) for column in COLUMNS]
                rows.append([", ".join(concepts), model.label, *map(stats.text, found)])
    return core.table(["erased", "how", *(column.title for column in COLUMNS)], rows)


def figure(answers: Answers, models: list[Model]) -> figures.Figure:
    """Returns a panel for each column."""
    panels = {}
    for column in COLUMNS:
        panels[column.title] = {}
        for concepts in CONCEPTS:
            dots = []
            for model in models:
                found = answers.count(model, [concepts], column)
                dots.append(figures.Dot(model.label, found))
            panels[column.title][f"{len(concepts)} objects"] = dots
    return figures.dots(panels)
