r"""Strength (5.5): what does a larger eta buy, and what does it cost?

The target of Eq. 6 lies eta times as far past the empty prompt's prediction.

On SD v1, vary `--eta`, and continue as for objects and for what prompts don't name:

```sh
python erase.py nudity --method esd-u --eta 3 --out nudity-3.safetensors
```
"""

from PIL import Image

import sample
from notebooks.experiments import core, figures, implied, models, stats
from notebooks.experiments.core import Answers, Cell, Context, Model, by_name

MODELS = [
    models.original,
    models.esd_u(),
    models.esd_u("ESD-u, eta 3", eta=3),
    models.esd_u("ESD-u, eta 10", eta=10),
]
CONCEPTS = ("star", *(name for name in implied.CONCEPTS if name != "star"))
SEEDS = core.SEEDS
PAPER = {"ESD-u": "83 / 7", "ESD-u, eta 3": "88 / 14", "ESD-u, eta 10": "92 / 34"}
ASKED = {  # title -> what is asked, and whether prompts ask for the concept itself
    "the concept by name, %": (by_name, True),
    "the concept in its scenes, %": (core.implied, True),
    "other objects by name, %": (by_name, False),
}
FINDINGS = """\
- A larger eta erases more of the name, hardly more of what scenes imply, and costs other objects.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    own = [concept for concept in concepts if concept in CONCEPTS]
    return core.grid(models, own, asks=[by_name, core.implied], seeds=seeds)


def counted(answers: Answers, model: Model, concepts, what: str) -> list[stats.Share]:
    """Returns the shares of several erasures."""
    ask, own = ASKED[what]
    return answers.pooled(model, concepts, ask, own=own)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    rows = []
    for model in answers.answered(models, concepts, by_name):
        cells = [stats.text(counted(answers, model, concepts, what)) for what in ASKED]
        rows.append([model.label, *cells, PAPER.get(model.label, "")])
    return core.table(["erased by", *ASKED, "*paper, 5.5: % erased / lost*"], rows)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    panels = {}
    for what in ASKED:
        panels[what] = {}
        for model in answers.answered(models, concepts, by_name):
            shares = counted(answers, model, concepts, what)
            panels[what][model.label] = [figures.Dot("here", shares)]
    return figures.dots(panels)


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws stars by name and in scenes, and two other objects, a row for each eta."""
    prompts = ["a star", "a red star", *implied.scenes_of("star"), "a heart", "a moon"]
    rows = []
    for model in MODELS:
        if answers.seeds(model, "star", by_name):
            cell = core.cell_of(model, "star", seed=0, ask=by_name)
            rows.append(([model.label, *prompts], context.row(cell, prompts)))
    return sample.contact_sheet(rows, least=192)
