r"""Prompts without the concept (Table 1): does an erasure harm prompts that don't contain it?

The star is erased. The prompts are captions like those in training, none of which names a
star. The Frechet distance is between the judge's features of 200 generated and of 200 rendered
images, so compare it only with distances of as many images; the paper's FID is on Inception's
features of 30,000. An image is right if all that its caption names of object, colour and style
is seen; captions that name no object aren't counted.

On SD v1 (coco-val2014 is a folder of COCO's images; `pip install clean-fid`):

```sh
torchrun --nproc_per_node 4 -m notebooks.tools.table official/data/coco_30k.csv \
    --erased nudity.safetensors --out coco --batch 32
python -c "from cleanfid import fid; print(fid.compute_fid('coco', 'coco-val2014'))"
```
"""

import numpy as np

from notebooks.experiments import core, figures, implied, stats
from notebooks.experiments.core import Answers, Ask, Cell, Context, Model
from notebooks.toy import judge as judging
from notebooks.toy import world
from sample import StableDiffusion

MODELS = implied.MODELS
CONCEPTS = ("star",)
SEEDS = core.SEEDS
PAIRS = (
    ("ESD-x", "original"), ("ESD-u", "original"), ("ESD-u, eta 3", "original"),
    ("ESD-u, empty prompt kept", "original"), ("SLD-medium", "original"), ("SLD-max", "original"),
)
PAPER = {
    "original": "14.50 / 0.1592", "ESD-u": "13.68 / 0.1585", "ESD-u, eta 3": "17.27 / 0.1586",
    "SLD-medium": "16.90 / 0.1594", "SLD-max": "18.76 / 0.1583",
}
RIGHT = "all that was asked for is seen, %"
FRECHET = "Frechet distance"
FINDINGS = """\
- ESD changes the share of right images by +1 to -3 points, which three seeds can't distinguish from
  zero. With ESD-u the Frechet distance grows in all three erasures, from 40 to 48; in the paper,
  FID falls.
- Guidance that avoids the concept harms other prompts far more: the Frechet distance grows by 34
  (16 to 53) with SLD-medium, and by 99 (49 to 149) with SLD-max. In the paper SLD's harm is small.
- The model of censored training never saw the moon, the heart and the arrow either, which about a
  third of these prompts ask for: hence its 64 %.
"""


# ---- the answer


def shows_caption(example: world.Example, seen: dict[str, str | None]) -> bool | None:
    """Returns whether all that a caption names is seen; None if it names no object."""
    caption = f" {example.caption} "  # "ring" isn't in "spring"
    nouns = [example.object, *world.PARAPHRASES.get(example.object, ())]
    if not any(f" {noun} " in caption for noun in nouns):
        return None

    asked = ["object"]
    if f" {example.colour} " in caption:
        asked.append("colour")
    if f"style of {example.style}" in caption:
        asked.append("style")
    return all(seen[head] == getattr(example, head) for head in asked)


def quality(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns the Frechet distance to rendered images, and how many images are right.

    The seed gives all models the same captions. None of them names the star, which the
    original isn't asked for either.
    """
    rng = np.random.default_rng(cell.seed)
    num = context.num(200)
    examples = [world.draw(rng, without=CONCEPTS) for _ in range(num)]
    others = [world.draw(rng, without=CONCEPTS) for _ in range(num)]

    images = context.draw(sd, cell, [example.caption for example in examples])
    rendered = [example.image for example in others]
    distance = stats.frechet(
        judging.features(context.judge, images), judging.features(context.judge, rendered)
    )

    looks = judging.read(context.judge, images)
    right = [shows_caption(example, seen) for example, seen in zip(examples, looks)]
    return {
        "frechet": round(float(distance), 3),
        "right": right.count(True),
        "asked": len(right) - right.count(None),
    }


quality_of = Ask("quality", answer=quality, uses=(world.draw, judging.features, judging.read))


# ---- the table and the figure


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[quality_of], seeds=seeds)


def by_seed(answers: Answers, model: Model) -> dict[int, dict]:
    """Returns a model's answers, those of a caption at least."""
    found = {}
    for seed in answers.seeds(model, CONCEPTS, quality_of):
        answer = answers.get(model, CONCEPTS, quality_of, seed=seed)
        if answer["asked"]:
            found[seed] = answer
    return found


def shares_right(answers: Answers, model: Model) -> list[stats.Share]:
    """Returns, for each seed, how many images are right."""
    found = by_seed(answers, model).values()
    return [stats.Share(answer["right"], answer["asked"]) for answer in found]


def distances(answers: Answers, model: Model) -> list[float]:
    """Returns the Frechet distance of each seed."""
    return [answer["frechet"] for answer in by_seed(answers, model).values()]


def table_of_differences(answers: Answers, models: list[Model]) -> str:
    """Returns how far models are from the original, seed by seed: the captions are the same."""
    by_label = {model.label: by_seed(answers, model) for model in models}
    rows = []
    for label, other in PAIRS:
        one = by_label.get(label, {})
        reference = by_label.get(other, {})
        seeds = sorted({*one} & {*reference})
        if not seeds:
            continue
        farther = [one[seed]["frechet"] - reference[seed]["frechet"] for seed in seeds]
        points = []
        for seed in seeds:  # of the same captions
            fewer = one[seed]["right"] - reference[seed]["right"]
            points.append(100 * fewer / reference[seed]["asked"])
        rows.append([label, other, stats.number(farther), stats.number(points)])
    titles = [FRECHET, RIGHT.replace("%", "points")]
    return core.table(["this", "less this", *titles], rows) if rows else ""


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model; then differences from the original."""
    rows = []
    for model in answers.answered(models, CONCEPTS, quality_of):
        distance = stats.number(distances(answers, model))
        right = stats.text(shares_right(answers, model))
        rows.append([model.label, distance, right, PAPER.get(model.label, "")])
    header = ["star erased by", FRECHET, RIGHT, "*paper, Table 1: FID / CLIP*"]
    return f"{core.table(header, rows)}\n\n{table_of_differences(answers, models)}".strip()


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model: the images that are right, and the distance."""
    panels = {RIGHT: {}, FRECHET: {}}
    for model in models:
        if shares := shares_right(answers, model):
            panels[RIGHT][model.label] = stats.estimate(shares)
            panels[FRECHET][model.label] = stats.student(distances(answers, model))
    return figures.estimates(panels)
