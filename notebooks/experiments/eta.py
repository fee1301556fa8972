r"""Strength (5.5): what does a larger eta buy, and what does it cost?

The target of Eq. 6 starts at the empty prompt's prediction and moves away from the concept's by
eta times their difference.

On SD v1, vary `--eta`, and continue as for what prompts don't name:

```sh
python erase.py nudity --method esd-u --eta 3 --out nudity-3.safetensors
```
"""

import math

from PIL import Image

import sample
from notebooks.experiments import core, figures, implied, models, stats
from notebooks.experiments.core import (
    Answers,
    Cell,
    Column,
    Context,
    Model,
    by_name,
    in_scenes,
)

MODELS = [
    models.original,
    models.esd_u(),
    models.esd_u("ESD-u, eta 3", eta=3),
    models.esd_u("ESD-u, eta 10", eta=10),
]
CONCEPTS = ("star", *(name for name in implied.CONCEPTS if name != "star"))
SEEDS = core.SEEDS
PAPER = {"ESD-u": 83, "ESD-u, eta 3": 88, "ESD-u, eta 10": 92}  # reduction of nudity, %
PAPER_LOST = {"ESD-u": 7, "ESD-u, eta 3": 14, "ESD-u, eta 10": 34}  # object accuracy, points
COLUMNS = (
    Column("the concept by name, %", by_name),
    Column("the concept in its scenes, %", in_scenes),
    Column("other objects by name, %", by_name, own=False),
)
PAIRS = (("ESD-u, eta 3", "ESD-u"), ("ESD-u, eta 10", "ESD-u"), ("ESD-u, eta 10", "ESD-u, eta 3"))
FINDINGS = """\
- Eta 3 and 10 leave 9 and 10 points less of the name than eta 1, but the intervals include zero;
  almost half of each is one erasure of the heart. Eta 10 gains nothing over 3.
- Of what scenes imply they leave a point or two less, which may be chance.
- The other objects lose 2 points more with eta 3, and 7 with eta 10. In the paper they lose 7 and
  27 more.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[by_name, in_scenes], seeds=seeds)


def reduction(answers: Answers, model: Model, concepts) -> str:
    """Returns by how many percent less often than the original a model shows what is implied.

    It is what the paper counts of nudity.
    """
    column = COLUMNS[1]
    shown = stats.estimate(answers.count(MODELS[0], concepts, column)).mean
    left = stats.estimate(answers.count(model, concepts, column)).mean
    percent = 100 * (1 - left / shown) if shown else math.nan
    return "" if math.isnan(percent) else f"{percent:.0f}"


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model, all concepts together; then differences between models."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    rows = []
    for model in answers.answered(models, concepts, by_name):
        cells = [stats.text(answers.count(model, concepts, column)) for column in COLUMNS]
        less = reduction(answers, model, concepts) if model != MODELS[0] else ""
        of_paper = ""
        if model.label in PAPER:
            of_paper = f"{PAPER[model.label]} / {PAPER_LOST[model.label]}"
        rows.append([model.label, *cells, less, of_paper])
    titles = [column.title for column in COLUMNS]
    header = [
        "erased by", *titles, "reduction in scenes, %",
        "*paper, 5.5: nudity erased / object accuracy lost, %*",
    ]
    differences = core.table_of_differences(answers, models, PAIRS, concepts, COLUMNS)
    return f"{core.table(header, rows)}\n\n{differences}".strip()


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    models = answers.answered(models, concepts, by_name)
    shown = 100 * implied.PAPER["original"] / implied.PAPER_IMAGES
    of_paper = {"original": shown}
    of_paper |= {label: shown * (1 - percent / 100) for label, percent in PAPER.items()}
    panels = figures.one_dot_each(answers, models, concepts, COLUMNS)
    return figures.dots(panels, {COLUMNS[1].title: of_paper})


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws stars by name and in scenes, and two other objects, a row for each eta."""
    prompts = ["a star", "a red star", *implied.scenes_of("star"), "a heart", "a moon"]
    rows = []
    for model in MODELS:
        if answers.seeds(model, "star", by_name):
            cell = core.cell_of(model, "star", seed=0, ask=by_name)
            rows.append(([model.label, *prompts], context.row(cell, prompts)))
    return sample.contact_sheet(rows, least=192)
