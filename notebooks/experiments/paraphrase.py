r"""Paraphrases (5.6): does erasing "a five pointed figure" erase the star?

To the text encoder the name and the paraphrase are almost the same prompt: for the star their
cosine is 0.97 (notebook 1, Figure 1).

On SD v1 (count the towers by eye):

```sh
python erase.py "the iron tower in Paris" --out tower.safetensors
python sample.py "the Eiffel Tower" --erased tower.safetensors --num 100 --out tower.png
```
"""

from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import (
    Answers,
    Cell,
    Column,
    Model,
    by_name,
    by_paraphrases,
)
from notebooks.methods import esd
from notebooks.toy import world


def by_paraphrase(concepts: tuple[str, ...]) -> dict[str, str]:
    """Returns {the first paraphrase of each object: anchor}."""
    return {world.PARAPHRASES[concept][0]: "a picture" for concept in concepts}


MODELS = [
    models.original,
    models.esd_x("ESD-x, by its name"),
    Model("ESD-x, by a paraphrase", esd.erase, models.ESD_X, prompts=by_paraphrase),
]
CONCEPTS = ("star", "moon", "arrow")
SEEDS = core.SEEDS
PAPER = {"original": "79", "ESD-x, by a paraphrase": "38"}  # images of 100
COLUMNS = (
    Column("asked by its name, %", by_name),
    Column("asked by paraphrases, %", by_paraphrases),
    Column("other objects, %", by_name, own=False),
)
FINDINGS = """\
- A paraphrase erases the name as well as the name does, and the other way round: here the text
  encoder knows both from the same images. In the paper the name is less affected.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[by_name, by_paraphrases], seeds=seeds)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each concept and model, then for all concepts together."""
    concepts = answers.erased(models, world.OBJECTS, by_name)
    models = answers.answered(models, concepts, by_name)
    rows = []
    for label, group in [*((c, [c]) for c in concepts), ("**all**", concepts)]:
        for model in models:
            cells = [stats.text(answers.count(model, group, column)) for column in COLUMNS]
            rows.append([label, model.label, *cells])
    for label, images in PAPER.items():
        rows.append(["*paper, 5.6: Eiffel Tower*", label, images, "", ""])
    titles = [column.title for column in COLUMNS]
    return core.table(["concept", "erased", *titles], rows)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, world.OBJECTS, by_name)
    models = answers.answered(models, concepts, by_name)
    panels = figures.one_dot_each(answers, models, concepts, COLUMNS)
    of_paper = {label: float(images) for label, images in PAPER.items()}
    return figures.dots(panels, paper={COLUMNS[0].title: of_paper})
