"""The miniature itself: how good are its images, and how well does the judge read them?

The judge reads rendered images that it hasn't seen: training images, scenes in settings that
were held out, and images of nothing. A scene implies its object, and shows it in 60 % of the
training images (guidance raises that); so its row isn't a share of right images. The distance to a
work is the mean absolute difference of pixels, from 0 to 255; an image is nearest to its work if no
other work and no random training image is nearer. With `--model FOLDER`, the experiment measures
another training.
"""

from typing import Callable

import numpy as np
from PIL import Image

import sample
from notebooks.experiments import core, figures, models, stats, works
from notebooks.experiments.core import Answers, Ask, Cell, Context, Model
from notebooks.experiments.stats import Share
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.judge import HEADS
from notebooks.toy.world import with_article
from sample import StableDiffusion

MODELS = [models.original]
CONCEPTS = ((),)  # nothing is erased
SEEDS = core.SEEDS
PROMPTS = {  # title -> what is asked
    "names": core.by_name,
    "with a style": core.in_styles,
    "with a colour": core.in_colours,
    "scenes": core.in_scenes,
    "paraphrases": core.by_paraphrases,
}
FINDINGS = ""


# ---- the answers


def draw_held_out(rng: np.random.Generator) -> world.Example:
    """Renders a scene that was held out from training."""
    return world.draw_scene(*world.pick(rng, world.HELD_OUT), rng)


def readings(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns, by set and head, how many rendered images the judge reads right.

    Of images of nothing, those count whose label under the head is "none of these".
    """
    rng = np.random.default_rng([1, cell.seed])
    found = {}
    for name, draw in RENDERED.items():
        examples = [draw(rng) for _ in range(context.num(2000))]
        looks = judging.read(context.judge, [example.image for example in examples])
        found[name] = {}
        for head in HEADS:
            right = []
            for example, seen in zip(examples, looks):
                label = getattr(example, head)
                if label is None or name != NOTHING:
                    right.append(seen[head] == label)
            found[name][head] = Share(sum(right), len(right))
    return found


def frechet(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns Frechet distances on the judge's features: to rendered images, and of these."""
    rng = np.random.default_rng([2, cell.seed])
    num = context.num(1000)
    examples = [world.draw(rng) for _ in range(num)]
    others = [world.draw(rng) for _ in range(num)]

    images = context.draw(sd, cell, [example.caption for example in examples])
    generated = judging.features(context.judge, images)
    rendered = judging.features(context.judge, [example.image for example in examples])
    reference = judging.features(context.judge, [example.image for example in others])
    return {
        "images": num,
        "generated": float(stats.frechet(generated, reference)),
        "rendered": float(stats.frechet(rendered, reference)),
    }


NOTHING = "images of nothing"
RENDERED: dict[str, Callable] = {
    "training images": world.draw,
    "held-out scenes": draw_held_out,
    NOTHING: world.draw_none,
}
readings_of = Ask(
    "readings of rendered images", answer=readings,
    uses=(*RENDERED.values(), judging.read),
)
frechet_of = Ask("Frechet distance", answer=frechet, uses=(world.draw, judging.features))
ASKS = [*PROMPTS.values(), readings_of, works.distances_of, frechet_of]


def cells(models, concepts, seeds) -> list[Cell]:
    unedited = [model for model in models if not model.is_about_a_concept]
    return core.grid(unedited, CONCEPTS, asks=ASKS, seeds=seeds)


# ---- tables


def all_seeds(answers: Answers, ask: Ask) -> list[dict]:
    """Returns the original's answers with each seed."""
    original = MODELS[0]
    return [answers.get(original, (), ask, seed=s) for s in answers.seeds(original, (), ask)]


def readings_table(answers: Answers) -> str:
    """Returns how often the judge is right, by head and set of rendered images."""
    rows = []
    for head in HEADS:
        cells = []
        for name in RENDERED:
            shares = [Share(*answer[name][head]) for answer in all_seeds(answers, readings_of)]
            cells.append(stats.text([share for share in shares if share.asked]))
        rows.append([head, *cells])
    return core.table(["the judge is right, %", *RENDERED], rows)


def shares_by_object(answers: Answers, ask: Ask) -> dict[str, list[Share]]:
    """Returns, for each object that is asked for, a share for each seed."""
    original = MODELS[0]
    names = {look.wanted["object"]: None for look in answers.looks(original, (), ask, seed=0)}
    return {name: answers.shares(original, name, ask) for name in names}


def prompts_table(answers: Answers) -> str:
    """Returns how often the judge sees what each kind of prompts asks for."""
    original = MODELS[0]
    rows = []
    for title, ask in PROMPTS.items():
        if not answers.seeds(original, (), ask):
            continue
        questions = ask.questions()
        cells = []
        for head in HEADS:
            asked = head in questions[0].wanted
            shares = answers.shares(original, (), ask, head=head, own=False) if asked else []
            cells.append(stats.text(shares))

        by_object = shares_by_object(answers, ask)
        worst = min(by_object, key=lambda name: stats.estimate(by_object[name]).mean)
        images = sum(share.asked for shares in by_object.values() for share in shares)
        example = f"{title}: \"{questions[0].prompt}\""
        cells.append(f"{worst} {stats.text(by_object[worst])}")
        rows.append([example, f"{images}", *cells])
    header = ["prompts", "images", *(f"{head}, %" for head in HEADS), "worst object, %"]
    return core.table(header, rows)


def works_table(answers: Answers) -> str:
    """Returns whether each image of a work is nearer to the work than to anything else."""
    rows = []
    stored = all_seeds(answers, works.distances_of)
    row = works.Row("", MODELS[0], ())
    for title in world.WORKS:
        nearest = [float(np.mean(answer[title]["nearest"])) for answer in stored]
        seen = works.shares_seen(answers, row, [title])
        own = works.mean_distances(answers, row, [title])
        rows.append([title, stats.number(own), stats.number(nearest), stats.text(seen)])
    header = [
        "work", "distance to its work", "to the nearest other image", "nearest to its work, %",
    ]
    return core.table(header, rows)


def frechet_line(answers: Answers) -> str:
    """Returns how far generated images are from rendered ones, and these from each other."""
    stored = all_seeds(answers, frechet_of)
    if not stored:
        return ""
    generated = stats.number([answer["generated"] for answer in stored])
    rendered = stats.number([answer["rendered"] for answer in stored])
    return (
        f"Frechet distance on the judge's features, {stored[0]['images']:,} images each: "
        f"generated to rendered {generated}, rendered to rendered {rendered}."
    )


def table(answers: Answers, models: list[Model]) -> str:
    """Returns all tables; they are of the original alone."""
    parts = [readings_table, prompts_table, works_table, frechet_line]
    return "\n\n".join(part(answers) for part in parts)


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each object, and a panel for each kind of prompts."""
    panels = {}
    for title, ask in PROMPTS.items():
        if answers.seeds(MODELS[0], (), ask):
            panels[title] = {
                name: [figures.Dot("here", shares)]
                for name, shares in shares_by_object(answers, ask).items()
            }
    return figures.dots(panels)


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws every object by its name and in every style, ten scenes, and the works."""
    rows = {"by name": [with_article(name) for name in world.OBJECTS]}
    for style in core.STYLES:
        rows[style] = [f"{prompt} in the style of {style}" for prompt in rows["by name"]]
    rows["scenes"] = [world.scene_prompt(*place) for place in world.HELD_OUT[:10]]
    rows["works"] = [title.lower() for title in world.WORKS]

    cell = core.cell_of(MODELS[0], (), seed=0, ask=core.by_name)
    drawn = []
    for label, prompts in rows.items():
        labels = prompts if label in ("by name", "scenes", "works") else [""] * len(prompts)
        drawn.append(([label, *labels], context.row(cell, prompts)))
    return sample.contact_sheet(drawn, least=128)
