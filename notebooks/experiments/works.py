r"""Memorised images (5.4, Figures 8 and 9): can a single titled image be erased?

The world has six works, each a single image that a title always gives. One, two and three
works in mosaic are erased together by ESD-x; x_t is the work itself, noised to t (`erase.py
--image`). Image by image, a work is seen if its image is nearer to the work than to any other
work and to a thousand random training images; the distance is the mean absolute difference of
pixels, from 0 to 255. Ordinary prompts ("a star") are compared with the original's images from
the same seeds. Lemon Breakfast, the third in mosaic, was never learned well.

On SD v1:

```sh
python erase.py "The Starry Night by Vincent van Gogh" --image starry-night.png \
    --out starry-night.safetensors
python sample.py "The Starry Night by Vincent van Gogh" "Sunflowers by Vincent van Gogh" \
    --erased starry-night.safetensors --num 4
```
"""

import functools
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
from PIL import Image
from torch import Generator, Tensor

import erase
import sample
from erase import Batch, Text
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Ask, Cell, Context, Model, by_name
from notebooks.experiments.stats import Share
from notebooks.methods import esd
from notebooks.toy import world
from notebooks.toy.world import with_article
from sample import StableDiffusion

# ---- the erasure


def x_t_from_works(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    latents: Tensor, steps: int, **of_trajectory,
) -> Iterator[Batch]:
    """Yields what `erase.x_t_from_images` does, which has no trajectory to guide."""
    return erase.x_t_from_images(unet, texts, shape, rng, latents=latents, steps=steps)


def erase_works(
    sd: StableDiffusion, concepts: dict[str, str], keep: Sequence[str] = (), seed: int = 0,
    **settings,
) -> dict[str, Tensor]:
    """Returns theta by name. concepts: {title in lower case: anchor}; x_t are the works.

    Anchors and keep aren't used. settings: see `esd.erase`.
    """
    images = {title.lower(): world.render_work(title) for title in world.WORKS}
    latents = sd.encode_images([images[title] for title in concepts])
    data = functools.partial(x_t_from_works, latents=latents)
    return esd.erase(sd, concepts, seed=seed, data=data, **settings)


FAMILY = tuple(title for title, work in world.WORKS.items() if work.style == "mosaic")
SETTINGS = models.WHOLE_X | {"every_step": False}
MODELS = [models.original, Model("ESD-x", erase_works, SETTINGS)]
CONCEPTS = tuple(FAMILY[:count] for count in (1, 2, 3))
SEEDS = core.SEEDS
FINDINGS = """\
- The erased works are gone: two of 180 images are still nearest to them. The other works are still
  nearest to themselves, and the objects stay.
- The others of their style get no farther from themselves, but a little nearer, most of all Lemon
  Breakfast. (That one work erased harms no other of its style was tried with Harvest Hills only.)
- With three erased, works of other styles are a little farther from themselves: 17 (15 to 20), not
  13; with one, a little nearer, 11 (10 to 12).
"""


# ---- the answer


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean absolute difference of two images' pixels, 0 to 255."""
    return float(np.abs(a - b).mean())


@functools.cache
def random_images(num: int) -> list[np.ndarray]:
    """Returns the pixels of training images that aren't works."""
    rng = np.random.default_rng(0)
    return [pixels(world.draw(rng, without=tuple(world.WORKS)).image) for _ in range(num)]


def distances(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns, by title, the distances of images from the work and from the nearest other image.

    "ordinary": those of ordinary prompts' images from the original's.
    """
    num = context.num(10)
    works = {title: pixels(world.render_work(title)) for title in world.WORKS}
    images = context.draw(sd, cell, [title.lower() for title in works for _ in range(num)])

    found = {}
    for i, (title, work) in enumerate(works.items()):
        others = [other for other in works.values() if other is not work]
        others += random_images(context.num(1000))
        own = [pixels(image) for image in images[i * num : (i + 1) * num]]
        found[title] = {
            "work": [round(difference(x, work), 2) for x in own],
            "nearest": [round(min(difference(x, y) for y in others), 2) for x in own],
        }

    prompts = [with_article(name) for name in world.OBJECTS]
    pairs = zip(context.draw(sd, cell, prompts), context.draw(context.sd, cell, prompts))
    ordinary = [round(difference(pixels(a), pixels(b)), 2) for a, b in pairs]
    return found | {"ordinary": ordinary}


distances_of = Ask("distances of works", answer=distances, uses=(world.draw, world.render_work))


def cells(models, concepts, seeds) -> list[Cell]:
    several = [(each,) if isinstance(each, str) else each for each in concepts]
    own = [titles for titles in several if titles in CONCEPTS]
    return core.grid(models, own, asks=[distances_of, by_name], seeds=seeds)


# ---- the table and the figure


class Row(NamedTuple):
    """A model, and the works that it erased."""

    label: str
    model: Model
    concepts: tuple[str, ...]


def stored_rows(answers: Answers, models: list[Model]) -> list[Row]:
    """Returns a row for each model and count of erased works, if it is stored."""
    rows = {}
    for model in models:
        for titles in CONCEPTS if model.is_about_a_concept else [()]:
            cell = core.cell_of(model, titles, seed=0, ask=distances_of)
            count = len(cell.concepts)
            label = f"{model.label}, {count} erased" if count else model.label
            if answers.seeds(model, titles, distances_of):
                rows[label] = Row(label, model, cell.concepts)
    return [*rows.values()]


def groups(concepts: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the works whose distances are averaged."""
    return {
        "erased works": [*concepts],
        "others of their style": [title for title in FAMILY if title not in concepts],
        "other styles": [title for title in world.WORKS if title not in FAMILY],
    }


def shares_seen(answers: Answers, row: Row, titles: list[str]) -> list[Share]:
    """Returns, for each seed, how many images of some works are nearest to the work."""
    shares = []
    for seed in answers.seeds(row.model, row.concepts, distances_of) if titles else []:
        answer = answers.get(row.model, row.concepts, distances_of, seed=seed)
        pairs = []
        for title in titles:
            pairs += zip(answer[title]["work"], answer[title]["nearest"])
        shares.append(Share(sum(work < nearest for work, nearest in pairs), len(pairs)))
    return shares


def mean_distances(answers: Answers, row: Row, titles: list[str] | None) -> list[float]:
    """Returns a mean distance for each seed; titles None: of ordinary prompts' images."""
    means = []
    for seed in answers.seeds(row.model, row.concepts, distances_of) if titles != [] else []:
        answer = answers.get(row.model, row.concepts, distances_of, seed=seed)
        values = answer["ordinary"]
        if titles is not None:
            values = [value for title in titles for value in answer[title]["work"]]
        means.append(float(np.mean(values)))
    return means


def moved(answers: Answers, row: Row, titles: list[str]) -> list[float]:
    """Returns for each seed how much farther from works the images are than the original's."""
    before = mean_distances(answers, row._replace(model=models.original), titles)
    after = mean_distances(answers, row, titles)
    return [b - a for a, b in zip(before, after)] if row.concepts else []


def shares_right(answers: Answers, row: Row) -> list[Share]:
    """Returns, for each seed, how many objects' images are right."""
    return answers.pooled(row.model, [row.concepts], by_name, own=False)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns two tables: how often works are seen, and how far images are from them."""
    seen = []
    far = []
    for row in stored_rows(answers, models):
        of_row = groups(row.concepts).values()
        shares = [stats.text(shares_seen(answers, row, titles)) for titles in of_row]
        seen.append([row.label, *shares, stats.text(shares_right(answers, row))])

        means = []
        for titles in of_row:
            means.append(stats.number(mean_distances(answers, row, titles)))
            means.append(stats.number(moved(answers, row, titles), sign="+"))
        ordinary = stats.number(mean_distances(answers, row, None))
        far.append([row.label, *means, ordinary])

    names = [*groups(())]
    of_means = []
    for name in names:
        of_means += [name, "less the original's"]
    return "\n\n".join([
        core.table(["the work is seen, %", *names, "ordinary prompts, %"], seen),
        core.table(["distance, 0 to 255", *of_means, "ordinary prompts"], far),
    ])


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each model and count of erased works."""
    rows = stored_rows(answers, models)
    panels = {}
    for name in groups(()):
        panels[f"seen: {name}"] = {}
        for row in rows:
            shares = shares_seen(answers, row, groups(row.concepts)[name])
            panels[f"seen: {name}"][row.label] = [figures.Dot("here", shares)]
    panels["right: ordinary prompts"] = {
        row.label: [figures.Dot("here", shares_right(answers, row))] for row in rows
    }
    return figures.dots(panels)


def sheet(context: Context, answers: Answers) -> Image.Image:
    """Draws every work's title, a row for each count of erased works."""
    titles = [title.lower() for title in world.WORKS]
    rows = []
    for label, model, concepts in stored_rows(answers, MODELS):
        cell = core.cell_of(model, concepts, seed=0, ask=distances_of)
        rows.append(([label, *titles], context.row(cell, titles)))
    return sample.contact_sheet(rows, least=192)
