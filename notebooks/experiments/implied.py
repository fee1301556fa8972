r"""What prompts don't name (5.2, Figure 7): does a concept leave the scenes that only imply it?

"A sheriff badge by the sea" shows a star, but doesn't say so. The prompts join a scene and a
setting that were never together in training, where each had others. The original, too, shows the
implied object only in some of their images, as training images did. Censored training is a U-Net
that saw no image of the four objects; SD 2.0 is the paper's example. `python -m
notebooks.experiments.replicates censored` trains it.

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
    Cell,
    Column,
    Context,
    Model,
    by_name,
    in_scenes,
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
PAPER = {"original": 796, "ESD-u": 134, "censored training": 417}  # images; the last: SD 2.0
PAPER_IMAGES = 4703
SHOWN = (  # in the contact sheet
    "original", "ESD-u", "ESD-x", "SLD-medium", "negative prompt", "censored training",
)
COLUMNS = (
    Column("all in their scenes, %", in_scenes),
    Column("other scenes show their object, %", in_scenes, own=False),
    Column("asked by name, %", by_name),
    Column("other objects by name, %", by_name, own=False),
)
PAIRS = (
    ("ESD-u", "original"), ("ESD-x", "original"), ("SLD-max", "original"),
    ("negative prompt", "original"), ("ESD-u, empty prompt kept", "ESD-u"),
    ("ESD-u, eta 3", "ESD-u"), ("ESD-u, the paper's rule", "ESD-u"),
)
FINDINGS = """\
- ESD-u acts on what prompts only imply, and leaves 12 %, where the original shows 71; ESD-x, which
  acts on words, leaves 72. That is the paper's contrast between the two.
- Keeping the empty prompt removes the name better, and what prompts imply worse: 10 points more are
  left, 16 of 26 more images being moons, 9 of these from one erasure.
- SLD-max and the negative prompt remove what is implied, too, and cost 27 and 18 points of the
  other scenes, and 23 and 7 of the objects. ESD-u and ESD-x cost 6 and 7 of the scenes.
- Censored training, of all four objects at once, leaves 1 % of what prompts imply, and 2 % by name.
  In the paper SD 2.0 leaves 417 of 796 images, presumably because its filter let much through; ours
  lets nothing through.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[in_scenes, by_name], seeds=seeds)


def counted(answers: Answers, model: Model, concepts, column: Column) -> list[stats.Share]:
    """Returns a column's shares. Censored training erased all concepts: there are no others."""
    if not column.own and model.label == models.censored.label:
        return []
    return answers.count(model, concepts, column)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model: scenes that imply the concept, its name; then differences."""
    concepts = answers.erased(models, CONCEPTS, in_scenes)
    rows = []
    for model in answers.answered(models, concepts, in_scenes):
        shares = [counted(answers, model, [c], COLUMNS[0]) for c in concepts]
        shares += [counted(answers, model, concepts, column) for column in COLUMNS]
        rows.append([model.label, *map(stats.text, shares), f"{PAPER.get(model.label, '')}"])
    of_concepts = [f"{concept} in its scenes, %" for concept in concepts]
    titles = [column.title for column in COLUMNS]
    of_paper = f"*paper, 5.2 (censored: SD 2.0): of {PAPER_IMAGES:,} images*"
    header = ["method", *of_concepts, *titles, of_paper]
    differences = core.table_of_differences(answers, models, PAIRS, concepts, COLUMNS)
    return f"{core.table(header, rows)}\n\n{differences}".strip()


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: all concepts together."""
    concepts = answers.erased(models, CONCEPTS, in_scenes)
    panels = {}
    for column in COLUMNS:
        panels[column.title] = {}
        for model in answers.answered(models, concepts, in_scenes):
            shares = counted(answers, model, concepts, column)
            panels[column.title][model.label] = [figures.Dot("here", shares)]
    of_paper = {label: 100 * images / PAPER_IMAGES for label, images in PAPER.items()}
    return figures.dots(panels, {COLUMNS[0].title: of_paper})


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
        cell = core.cell_of(model, concept, seed=0, ask=in_scenes)
        blank, *drawn = context.row(cell, prompts)
        row.images.extend(drawn if row.images else [blank, *drawn])

        share = core.percent(answers, model, concept, in_scenes, concept)
        row.labels.extend([f"{concept} {share}"] + [""] * (len(prompts) - 1))
    return row


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws scenes of each concept under some of the models, a row for each."""
    concepts = answers.erased(MODELS, CONCEPTS, in_scenes)
    rows = []
    for model in MODELS:
        is_stored = all(answers.seeds(model, concept, in_scenes) for concept in concepts)
        if model.label in SHOWN and is_stored:
            rows.append(row_of(context, answers, model, concepts))
    return sample.contact_sheet(rows, least=128)
