r"""Styles (5.1, Figures 5 and 6): does the erased style disappear, and do the other four stay?

Every object is asked for in every style ("a star in the style of mosaic"). ESD-x erases "a
picture in the style of mosaic", which names no object, in three times the iterations of an
object.

On SD v1:

```sh
python erase.py "Thomas Kinkade" --out kinkade.safetensors
python -m notebooks.tools.table official/data/short_niche_art_prompts.csv \
    --erased kinkade.safetensors --out kinkade --batch 16
```
"""

from PIL import Image

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import (
    STYLES,
    Answers,
    Cell,
    Column,
    Context,
    Model,
    in_styles,
)
from notebooks.toy.world import with_article

MODELS = [
    models.original,
    models.esd_x(),
    models.sld_medium,
    models.sld_max,
    models.negative_prompt,
]
CONCEPTS = STYLES
SEEDS = core.SEEDS
LEFT = Column("the erased style is seen, %", in_styles, head="style")
OTHERS = Column("the other styles are seen, %", in_styles, own=False, head="style")
PAPER = {  # section 5.1, by people, from 1 to 5; SLD's setting isn't given
    "original": "3.21", "ESD-x": "1.12", "SLD-medium": "2.00 (SLD)", "negative prompt": "2.22",
}
FINDINGS = """\
- ESD-x leaves 6 % of the style (2 to 13 %, of neon most; we aimed at 5), and the others as they
  were.
- The negative prompt and SLD-medium leave a style that the prompt names, and cost the others 13 to
  17 points. SLD-max removes the style, and 58 points of the others.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[in_styles], seeds=seeds)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model: all styles, then what is left of each."""
    styles = answers.erased(models, CONCEPTS, in_styles)
    models = answers.answered(models, styles, in_styles)
    header = [
        "method", LEFT.title, OTHERS.title, *(f"{style} is seen, %" for style in styles),
        "*paper, 5.1: likeness to the artist, 1 to 5*",
    ]
    rows = []
    for model in models:
        cells = [stats.text(answers.count(model, styles, each)) for each in (LEFT, OTHERS)]
        cells += [stats.text(answers.count(model, [style], LEFT)) for style in styles]
        rows.append([model.label, *cells, PAPER.get(model.label, "")])
    return core.table(header, rows)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all styles together."""
    styles = answers.erased(models, CONCEPTS, in_styles)
    models = answers.answered(models, styles, in_styles)
    return figures.dots(figures.one_dot_each(answers, models, styles, columns=(LEFT, OTHERS)))


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws a heart in every style under the original and under five ESD-x models.

    A label says how often the judge sees the style that each prompt asks for, in all images.
    """
    prompts = [f"{with_article('heart')} in the style of {style}" for style in STYLES]
    original, esd_x = MODELS[:2]
    styles = answers.erased([esd_x], CONCEPTS, in_styles)
    rows = []
    for model, concept in [(original, ""), *((esd_x, style) for style in styles)]:
        labels = [f"erased: {concept or 'nothing'}"]
        for style in STYLES:
            share = core.percent(answers, model, concept, in_styles, style, head="style")
            labels.append(f"{style} {share}")
        cell = core.cell_of(model, concept, seed=0, ask=in_styles)
        rows.append((labels, context.row(cell, prompts)))
    return sample.contact_sheet(rows, least=128)
