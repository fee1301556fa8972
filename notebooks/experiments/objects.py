"""Objects (5.3, Table 2): does the erased object disappear, and do the other nine stay?

ESD-u tunes what the paper's code tunes: all but cross-attention, time embedding and output
layers. "The paper's rule" tunes what its text says: all but cross-attention.
"""

import functools

from PIL import Image

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Cell, Context, Model, by_name
from notebooks.toy import world
from notebooks.toy.world import with_article

MODELS = [
    models.original,
    models.esd_u(),
    models.esd_u("ESD-u, the paper's rule", method="esd-u of the paper"),
    models.kept(),
    models.esd_x(),
]
CONCEPTS = world.OBJECTS
SEEDS = core.SEEDS
LEFT = "the erased object is seen, %"
OTHERS = "the other nine are seen, %"
PAPER = {  # Table 2, averages
    LEFT: {"original": 78.2, "ESD-u": 12.6},
    OTHERS: {"original": 78.2, "ESD-u": 63.2},
}
FINDINGS = """\
- ESD-u removes the object in nine of ten images, and ESD-x in fourteen of fifteen. The others lose
  three points, and one; in the paper they lose 15.
- With ESD-u the circle and the moon resist: about a fifth is left with every seed. The heart
  resists with one seed of three, in 55 % of the images, and is gone with the other two. A single
  run couldn't tell the one from the other.
- Where the empty prompt is kept as well, 0.7 % are left, at most 5 % of any object with any seed,
  and the others lose no more. So most of what resists is guidance: see the guidance law.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[by_name], seeds=seeds)


def counted(answers: Answers, model: Model, concepts, what: str) -> list[stats.Share]:
    """Returns the shares of several erasures."""
    return answers.pooled(model, concepts, by_name, own=what == LEFT)


def erased(answers: Answers, models: list[Model]) -> list[str]:
    """Returns the objects whose erasures are stored."""
    return [c for c in CONCEPTS if any(answers.seeds(m, c, by_name) for m in models[1:])]


def table(answers: Answers, models: list[Model]) -> str:
    """Returns two tables: what is left of each object, and of the others."""
    concepts = erased(answers, models)
    tables = []
    for what in (LEFT, OTHERS):
        rows = []
        for label, group in [*((c, [c]) for c in concepts), ("**all**", concepts)]:
            cells = [stats.text(counted(answers, model, group, what)) for model in models]
            rows.append([label, *cells])
        of_paper = [f"{PAPER[what].get(model.label, '')}" for model in models]
        rows.append(["*paper, Table 2, average*", *of_paper])
        tables.append(core.table([what, *(model.label for model in models)], rows))
    return "\n\n".join(tables)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all objects together."""
    concepts = erased(answers, models)
    shares = functools.partial(counted, answers, concepts=concepts)
    return figures.dots(figures.one_dot_each(models, shares, titles=(LEFT, OTHERS)), PAPER)


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws every object under the original and under ten ESD-u models, as Figure 5 does.

    A label says how often the judge sees what each prompt asks for, in all images.
    """
    prompts = [with_article(name) for name in world.OBJECTS]
    original, esd_u = MODELS[:2]
    erasures = [(original, ""), *((esd_u, concept) for concept in erased(answers, MODELS))]
    rows = []
    for model, concept in erasures:
        labels = [f"erased: {concept or 'nothing'}"]
        for name in world.OBJECTS:
            labels.append(f"{name} {core.percent(answers, model, concept, by_name, name)}")
        images = context.row(core.cell_of(model, concept, seed=0, ask=by_name), prompts)
        rows.append((labels, images))
    return sample.contact_sheet(rows)
