"""Ground truth with a scale (beyond the paper): is an erased model like one that never saw it?

A U-Net that never saw the concept is what an erasure should come to. (The text encoder and the
VAE are the original's, and did see it.) Two of these, trained with other seeds, differ as well.
Their distances, of all concepts, are the null: an erasure is within it if its distance from the
models that never saw the concept is below the 95 % limit for as many distances of the kind
(Student's t). With few models that limit is wide, and being below it is no proof of being equal.
How far originals are apart that were trained with other seeds is there to compare. Distances, all
for the concept's own prompt:

- **eps**: the mean of abs(eps - eps') on the same noised images, rendered ones that show the
  concept, at five times each.
- **by name**, **in scenes**: the total variation between what the judge sees in 50 images of
  the prompt, and in those of the held-out scenes (0: the same; 1: nothing in common).
- **FADE**: by how many nats each model knows its own images better than the other does, after
  [Cho et al.](https://arxiv.org/abs/2510.12981), on latents drawn without guidance
  ([`methods/distances.py`](../methods/distances.py)).

Each erasure is compared with each model that never saw the concept. The models to compare
with are trained first, 50 minutes each: `python -m notebooks.experiments.replicates`.
"""

import functools
import itertools
import math
import statistics
from collections import Counter
from typing import Callable, Iterable, NamedTuple

import numpy as np
from PIL import Image

from notebooks.experiments import core, figures, models, robust, stats
from notebooks.experiments.core import (
    Answers,
    Ask,
    Cell,
    Context,
    Model,
    Reference,
    implied,
)
from notebooks.experiments.robust import prompt_of
from notebooks.methods import distances
from notebooks.toy import world
from sample import StableDiffusion

ORIGINAL = models.original
NEVER_SAW = models.never_saw
AGAIN = models.again
MODELS = [ORIGINAL, *models.compared, NEVER_SAW, AGAIN]
CONCEPTS = robust.CONCEPTS
SEEDS = core.SEEDS
FINDINGS = ""

NEVER = [Reference(NEVER_SAW, seed) for seed in NEVER_SAW.seeds]
ORIGINALS = [Reference(ORIGINAL, 0), *(Reference(AGAIN, seed) for seed in AGAIN.seeds)]


# ---- what is asked


def rendered(concept: str, num: int) -> list[Image.Image]:
    """Returns images of the world that show a concept, always the same."""
    rng = np.random.default_rng(0)
    kind = core.kind_of(concept)
    images = []
    while len(images) < num:
        example = world.draw(rng)
        if getattr(example, kind) == concept:
            images.append(example.image)
    return images


def draw_fifty(context: Context, sd: StableDiffusion, cell: Cell) -> dict[str, str]:
    """Draws 50 images of a concept's prompt; returns what the judge sees."""
    prompts = [prompt_of(cell.ask.about)] * context.num(50)
    return core.to_letters(context.judge, context.draw(sd, cell, prompts))


def portrait(concept: str) -> Ask:
    """Returns what asks for a concept by its name, often."""
    return Ask(f"fifty of {concept}", answer=draw_fifty, uses=(prompt_of,), about=concept)


def measure_distances(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns eps, at each time, and FADE, from the model that a cell is compared with."""
    concept = cell.ask.about
    model, seed = cell.ask.against
    other = context.load(model, (concept,), seed=seed)
    prompt = prompt_of(concept)
    x_0 = context.sd.encode_images(rendered(concept, context.num(8)))
    return {
        "eps": distances.eps_distances(sd, other, prompt, x_0),
        "FADE": distances.fade(sd, other, prompt, num=context.num(32), seed=cell.seed),
    }


def distance(concept: str, against: Reference) -> Ask:
    """Returns what asks how far a model is from another one."""
    return Ask(
        f"distance for {concept} from {against.name}", answer=measure_distances,
        uses=(distances.fade, prompt_of), about=concept, against=against,
    )


def compared_with(model: Model, seed: int) -> list[Reference]:
    """Returns what a model is compared with: no pair twice, and no model with itself."""
    own = Reference(model, seed)
    if own in NEVER:
        return NEVER[: NEVER.index(own)]
    if own in ORIGINALS:
        return [*NEVER, *ORIGINALS[: ORIGINALS.index(own)]]
    return NEVER if model != ORIGINAL else []  # its weights are the same with every seed


def cells(models, concepts, seeds) -> list[Cell]:
    found = {}
    for concept in concepts:
        erased = core.as_tuple(concept)
        for model, seed, each in itertools.product(models, seeds, erased):
            asks = [distance(each, against) for against in compared_with(model, seed)]
            asks.append(portrait(each))
            if each in core.IMPLIED:
                asks.append(implied)
            for cell in core.grid([model], [erased], asks=asks, seeds=[seed]):
                found[cell.key] = cell
    return [*found.values()]


# ---- distances


class Pair(NamedTuple):
    """Two models that are compared, and for which concept."""

    concept: str
    one: Reference
    other: Reference


def counts(answers: Answers, of: Reference, concept: str, ask: Ask) -> Counter | None:
    """Returns what the judge saw in a model's images of a concept, if they are stored."""
    letters = answers.get(of.model, concept, ask, seed=of.seed)
    if letters is None:
        return None
    head = core.kind_of(concept)
    seen = core.from_letters(letters, head)
    if ask.questions:
        looks = answers.looks(of.model, concept, ask, seed=of.seed)
        seen = [look.seen[head] for look in looks if look.wanted[head] == concept]
    return Counter(name or "none" for name in seen)


def total_variation(answers: Answers, pair: Pair, ask: Ask) -> float | None:
    """Returns the distance of what the judge saw of two models, if both are stored."""
    both = [counts(answers, of, pair.concept, ask) for of in (pair.one, pair.other)]
    return stats.total_variation(*both) if all(both) else None


def measured(answers: Answers, pair: Pair, key: str) -> float | None:
    """Returns a stored distance; the mean, if there are several."""
    ask = distance(pair.concept, against=pair.other)
    found = answers.get(pair.one.model, pair.concept, ask, seed=pair.one.seed)
    return found and statistics.fmean(np.atleast_1d(found[key]))


def by_name(answers: Answers, pair: Pair) -> float | None:
    return total_variation(answers, pair, portrait(pair.concept))


def in_scenes(answers: Answers, pair: Pair) -> float | None:
    is_implied = pair.concept in core.IMPLIED
    return total_variation(answers, pair, implied) if is_implied else None


DISTANCES: dict[str, Callable[[Answers, Pair], float | None]] = {
    "eps": functools.partial(measured, key="eps"),
    "by name": by_name,
    "in scenes": in_scenes,
    "FADE, nats": functools.partial(measured, key="FADE"),
}


def pairs_of(answers: Answers, model: Model, concept: str) -> list[Pair]:
    """Returns a model's erasures, each with each model that never saw the concept."""
    found = []
    for seed in answers.seeds(model, concept, portrait(concept)):
        for never in NEVER:
            if never in compared_with(model, seed):
                found.append(Pair(concept, Reference(model, seed), never))
    return found


def pairs_among(concepts: Iterable[str], several: list[Reference]) -> list[Pair]:
    """Returns all pairs of models that differ in their seed alone."""
    found = []
    for concept in concepts:
        for i, one in enumerate(several):
            found += [Pair(concept, one, other) for other in several[:i]]
    return found


def values(answers: Answers, pairs: list[Pair], name: str) -> list[float]:
    """Returns the distances of pairs that are stored."""
    found = [DISTANCES[name](answers, pair) for pair in pairs]
    return [value for value in found if value is not None]


def null(answers: Answers, name: str) -> list[float]:
    """Returns the distances among models that never saw a concept, of all concepts."""
    return values(answers, pairs_among(CONCEPTS, NEVER), name=name)


# ---- the table and the figure


def of_erasures(answers: Answers, model: Model, concept: str, name: str) -> list[float]:
    """Returns a distance for each erasure: the mean over the models that never saw it.

    An erasure is what varies; two distances from one erasure are no two erasures.
    """
    by_seed = {}
    for pair in pairs_of(answers, model, concept):
        for value in values(answers, [pair], name=name):
            by_seed.setdefault(pair.one.seed, []).append(value)
    return [statistics.fmean(several) for several in by_seed.values()]


def estimate_text(several: list[float]) -> str:
    """Returns the mean with its interval over erasures: "0.131 (0.120 to 0.142)"."""
    if len(several) < 2:
        return f"{several[0]:.3f}" if several else ""
    mean, low, high = stats.student(several)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def in_units(answers: Answers, model: Model, concept: str) -> float | None:
    """Returns the distance of eps over the mean of the null: 1 is as near as two of these."""
    several = of_erasures(answers, model, concept, name="eps")
    scale = null(answers, "eps")
    return statistics.fmean(several) / statistics.fmean(scale) if several and scale else None


def row(answers: Answers, model: Model, concept: str) -> list[str]:
    """Returns a row of the table, without the model and the concept."""
    cells = []
    near = []
    for name in DISTANCES:
        several = of_erasures(answers, model, concept, name=name)
        cells.append(estimate_text(several))
        limit = stats.below(null(answers, name), num=len(several)) if several else math.inf
        if limit < math.inf:
            near.append(statistics.fmean(several) <= limit)
    units = in_units(answers, model, concept)
    cells.append("" if units is None else f"{units:.2f}")
    cells.append(f"{sum(near)} of {len(near)}" if near else "")
    return cells


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each concept and model, and the null's."""
    rows = []
    for concept in CONCEPTS:
        for model in models:
            cells = row(answers, model, concept)
            if model != NEVER_SAW and any(cells):
                rows.append([concept, model.label, *cells])

    for name, several in (("never saw it", NEVER), ("original", ORIGINALS)):
        pairs = pairs_among(CONCEPTS, several)
        num = len(values(answers, pairs, name="eps"))
        cells = [estimate_text(values(answers, pairs, name=each)) for each in DISTANCES]
        if num:
            rows.append(["all", f"*{name}, {num} pairs of seeds*", *cells, "", ""])
    limits = [stats.below(null(answers, name), num=len(SEEDS)) for name in DISTANCES]
    if any(value < math.inf for value in limits):
        texts = [f"{value:.3f}" if value < math.inf else "" for value in limits]
        rows.append(["all", f"*the null's limit, for {len(SEEDS)} seeds*", *texts, "", ""])
    header = ["concept", "erased by", *DISTANCES, "eps, in units of the null", "within the null"]
    return core.table(header, rows)


def figure(answers: Answers, models: list[Model]) -> figures.Figure:
    """Returns a panel for each distance: a row for each model and concept, and the null."""
    panels = {}
    bands = {}
    for name in DISTANCES:
        panels[name] = {}
        for concept in CONCEPTS:
            for model in models:
                several = of_erasures(answers, model, concept, name=name)
                if several:
                    panels[name][f"{model.label}, {concept}"] = stats.student(several)
        of_null = null(answers, name)
        if len(of_null) > 1:
            bands[name] = stats.Interval(min(of_null), stats.below(of_null))
    return figures.estimates({name: rows for name, rows in panels.items() if rows}, bands)
