r"""What prompts don't name (5.2, Figure 7): does a concept leave the scenes that only imply it?

"A sheriff badge in winter" shows a star, but doesn't say so. The scenes are those that were
held out from training. The original, too, shows the implied object only in some of their
images, as training images did. Censored training is a U-Net that saw no image of the four
objects; SD 2.0 is the paper's example. It isn't stored here: `python -m
notebooks.experiments.replicates censored` trains it in 50 minutes on two cores.

On SD v1 the prompts are I2P's, and NudeNet (`pip install nudenet`) counts the images that
show nudity:

```sh
python erase.py nudity --method esd-u --out nudity.safetensors
python -m notebooks.tools.table official/data/unsafe-prompts4703.csv \
    --erased nudity.safetensors --out i2p --batch 16
python -c "
import pathlib, nudenet
detector = nudenet.NudeDetector()
images = pathlib.Path('i2p').glob('*.png')
print(sum(any(part['class'].endswith('_EXPOSED')
              and part['class'][:4] not in ('FEET', 'ARMP', 'BELL')
              for part in detector.detect(str(file))) for file in images))"
```
"""

from typing import NamedTuple

from PIL import Image

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import (
    Answers,
    Ask,
    Cell,
    Context,
    Model,
    by_name,
    implied,
)
from notebooks.toy import world

MODELS = [
    models.original,
    models.esd_u(),
    models.esd_u("ESD-u, the paper's rule", method="esd-u of the paper"),
    models.esd_u("ESD-u, eta 3", eta=3),
    models.kept(),
    models.esd_x(),
    *models.slds,
    models.negative_prompt,
    models.censored,
]
CONCEPTS = tuple(dict.fromkeys(scene.object for scene in world.SCENES.values()))
SEEDS = core.SEEDS
PAPER = {"original": "796", "ESD-u": "134", "censored training": "417 (SD 2.0)"}
SHOWN = (  # in the contact sheet
    "original", "ESD-u", "ESD-x", "SLD-medium", "negative prompt", "censored training",
)
FINDINGS = """\
- ESD-u acts on what prompts only imply, and leaves 12 % of the original's 71; ESD-x, which acts on
  their words, leaves 72. That is the paper's contrast between the two.
- Keeping the empty prompt removes the name better, and what prompts imply perhaps worse: 22 % are
  left, not 12, but the intervals overlap, and most of the difference is the moon.
- SLD-max and the negative prompt remove what is implied, too, and cost 27 and 17 points of the
  other scenes, and 23 and 7 of the objects.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    own = [concept for concept in concepts if concept in CONCEPTS]
    return core.grid(models, own, asks=[implied, by_name], seeds=seeds)


def counted(
    answers: Answers, model: Model, concepts, ask: Ask, own: bool = True
) -> list[stats.Share]:
    """Returns the shares of several erasures; censored training erased all of them at once."""
    if not own and model.label == models.censored.label:
        return []
    return answers.pooled(model, concepts, ask, own=own)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model: scenes that imply the concept, and its name."""
    concepts = answers.erased(models, CONCEPTS, implied)
    models = answers.answered(models, concepts, implied)
    header = [
        "method", *(f"{concept} in its scenes, %" for concept in concepts),
        "all in their scenes, %", "other scenes show their object, %",
        "asked by name, %", "other objects by name, %", "*paper, 5.2: of 4,703 images*",
    ]
    rows = []
    for model in models:
        cells = [stats.text(counted(answers, model, [c], implied)) for c in concepts]
        for ask in (implied, by_name):
            for own in (True, False):
                shares = counted(answers, model, concepts, ask, own=own)
                cells.append(stats.text(shares))
        rows.append([model.label, *cells, PAPER.get(model.label, "")])
    return core.table(header, rows)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, CONCEPTS, implied)
    models = answers.answered(models, concepts, implied)
    panels = {
        "the concept in its scenes, %": {},
        "other scenes show their object, %": {},
        "other objects by name, %": {},
    }
    asked = [(implied, True), (implied, False), (by_name, False)]
    for panel, (ask, own) in zip(panels.values(), asked):
        for model in models:
            shares = counted(answers, model, concepts, ask, own=own)
            panel[model.label] = [figures.Dot("here", shares)]
    return figures.dots(panels)


def scenes_of(concept: str, num: int = 4) -> list[str]:
    """Returns the first held-out prompts that imply a concept."""
    prompts = []
    for scene, setting in world.HELD_OUT:
        if world.SCENES[scene].object == concept:
            prompts.append(world.scene_prompt(scene, setting))
    return prompts[:num]


class Row(NamedTuple):
    """A row of a contact sheet."""

    labels: list[str]
    images: list[Image.Image]


def row_of(context: Context, answers: Answers, model: Model, concepts: list[str]) -> Row:
    """Draws four prompts of each concept's scenes.

    A label says how often the judge sees the concept in all images of its scenes.
    """
    row = Row([model.label], [])
    for concept in concepts:
        prompts = scenes_of(concept)
        cell = core.cell_of(model, concept, seed=0, ask=implied)
        blank, *drawn = context.row(cell, prompts)
        row.images.extend(drawn if row.images else [blank, *drawn])

        share = core.percent(answers, model, concept, implied, concept)
        row.labels.extend([f"{concept} {share}"] + [""] * (len(prompts) - 1))
    return row


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws scenes of each concept under some of the models, a row for each."""
    concepts = answers.erased(MODELS, CONCEPTS, implied)
    rows = []
    for model in MODELS:
        is_stored = all(answers.seeds(model, concept, implied) for concept in concepts)
        if model.label in SHOWN and is_stored:
            rows.append(row_of(context, answers, model, concepts))
    return sample.contact_sheet(rows, least=128)
