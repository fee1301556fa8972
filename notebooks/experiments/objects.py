"""Objects (5.3, Table 2): does the erased object disappear, and do the other nine stay?

ESD-u tunes what the paper's code tunes: all but cross-attention, time embedding and output
layers. "The paper's rule" tunes what its text says: all but cross-attention.
"""

from PIL import Image

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Cell, Column, Context, Model, by_name
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
LEFT = Column("the erased object is seen, %", by_name)
OTHERS = Column("the other nine are seen, %", by_name, own=False)
PAPER = {  # Table 2, averages
    LEFT.title: {"original": 78.2, "ESD-u": 12.6},
    OTHERS.title: {"original": 78.2, "ESD-u": 63.2},
}
PAIRS = (
    ("ESD-u", "original"), ("ESD-x", "original"),
    ("ESD-u, the paper's rule", "ESD-u"), ("ESD-u, empty prompt kept", "ESD-u"),
)
FINDINGS = """\
- ESD-u removes the object in nine of ten images, and ESD-x in fourteen of fifteen. The others lose
  three points, and one; in the paper they lose 15. Erasing the circle costs them most, 13 points,
  as French horn does in the paper. The paper's rule for ESD-u leaves 4 points more than its code.
- With ESD-u the circle and the moon resist: about a fifth is left with every seed. The heart
  resists with one seed of three, in 55 % of the images, and is gone with the other two. A single
  erasure would have shown one or the other.
- We aimed at 5 % left with ESD-u, at most 15 of any object, and at 2 with ESD-x, the others seen in
  95 %. Only the variant that keeps the empty prompt reaches this, short of .2 points for the
  others.
- Where the empty prompt is kept as well, 0.7 % are left, at most 5 % of any object with any seed,
  and the others lose no more. Plain ESD-u drawn with guidance 1 leaves as little: what resists is
  brought back by guidance. See the guidance law.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[by_name], seeds=seeds)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns three tables: what is left of each object, and of the others, and differences."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    tables = []
    for column in (LEFT, OTHERS):
        rows = []
        for label, group in [*((c, [c]) for c in concepts), ("**all**", concepts)]:
            cells = [stats.text(answers.count(model, group, column)) for model in models]
            rows.append([label, *cells])
        of_paper = [f"{PAPER[column.title].get(model.label, '')}" for model in models]
        rows.append(["*paper, Table 2, average*", *of_paper])
        tables.append(core.table([column.title, *(model.label for model in models)], rows))
    columns = (LEFT, OTHERS)
    tables.append(core.table_of_differences(answers, models, PAIRS, concepts, columns))
    return "\n\n".join(tables).strip()


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all objects together."""
    concepts = answers.erased(models, CONCEPTS, by_name)
    panels = figures.one_dot_each(answers, models, concepts, columns=(LEFT, OTHERS))
    return figures.dots(panels, PAPER)


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws every object under the original and under ten ESD-u models, as Figure 5 does.

    A label says how often the judge sees what each prompt asks for, in all images.
    """
    prompts = [with_article(name) for name in world.OBJECTS]
    original, esd_u = MODELS[:2]
    concepts = answers.erased([esd_u], CONCEPTS, by_name)
    erasures = [(original, ""), *((esd_u, concept) for concept in concepts)]
    rows = []
    for model, concept in erasures:
        labels = [f"erased: {concept or 'nothing'}"]
        for name in world.OBJECTS:
            labels.append(f"{name} {core.percent(answers, model, concept, by_name, name)}")
        images = context.row(core.cell_of(model, concept, seed=0, ask=by_name), prompts)
        rows.append((labels, images))
    return sample.contact_sheet(rows)
