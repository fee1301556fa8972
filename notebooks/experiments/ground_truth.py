"""Ground truth with a scale (beyond the paper): is an erased model like one that never saw it?

A U-Net that never saw the concept is what an erasure should come to. (The text encoder and the
VAE are the original's, and did see it.) Two of these, trained from other random numbers, differ
as well: how far they are apart is the null. (star_0 has the original's first weights and training
noise, so the original, and all that is erased from it, may be nearer to it than to star_1.)
Distances, all but the last for the concept's own prompt:

- **eps**: the mean of abs(eps - eps') on the same noised images, rendered ones that show the
  concept, at five times each.
- **FADE**: by how many nats each model knows its own images better than the other does, both ways
  added, after [Cho et al.](https://arxiv.org/abs/2510.12981). Likelihoods are approximated: by the
  ELBO's terms at 20 values of t, equally spaced in log SNR, for 32 latents drawn without guidance,
  with one noise for each ([`methods/distances.py`](../methods/distances.py)).
- **by name**: the total variation between what the judge sees in 50 images of the prompt, from
  the same noises for all models (0: the same; 1: nothing in common).
- **in scenes**: the same for the held-out scenes. Images of equal seeds start from equal noises and
  look more alike, so only pairs of unequal seeds count. There are 24 images of the star and 20 of
  the heart, so even two sets from one model differ by chance: by about .35 if it drew ten objects
  equally often, less if it prefers some.

Each erasure is compared with both models that never saw its concept. Eps and FADE are also given in
units of the null: 1 is as far as these two are from each other. How much such a distance varies is
estimated from three originals that were trained from other random numbers: s is the standard
deviation of the log of their distances within a concept. (This takes it that models that never saw
a concept vary, in logs, as originals do. They may vary more, as nothing taught them what to draw.
Then the limit is too low: "within" still holds, "not within" may not.)

A method is **within the null** if its mean is at most exp(t s sqrt(2)) units (Student's t for 95 %,
one-sided, with 6 degrees of freedom, as each of three concepts has three pairs; sqrt(2), since both
the distance and the unit vary). The pairs share three models, so there may be only 2 degrees of
freedom, with which this limit holds in 90 % of cases. To be within isn't to be equal.

What the judge sees has no limit: by name, Student's for one more pair, from the three pairs, is
above 1, which no total variation can be; in scenes, two pairs are too few. So "within the null" is
about eps and FADE alone. The row "original" is the shipped one's alone by eps and FADE, so without
an interval, and the mean of the three by what the judge sees. Intervals "between two originals" are
over three pairs that share models, so they are too narrow.

"Eta by the odds" is Eq. 6 with a strength for each x_t that makes its target the eps of a model
that never saw the concept, if the frozen model is exact: see
[`methods/esd_odds.py`](../methods/esd_odds.py).

The models to compare with are trained first: `python -m
notebooks.experiments.replicates`. Closed forms are one erasure, whatever the seed.
"""

import functools
import itertools
import math
import statistics
from collections import Counter
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

from notebooks.experiments import core, figures, methods, models, robust, stats
from notebooks.experiments.core import (
    Answers,
    Ask,
    Cell,
    Context,
    Model,
    Reference,
    in_scenes,
)
from notebooks.experiments.models import depends_on_seed
from notebooks.experiments.robust import prompt_of
from notebooks.methods import distances
from notebooks.toy import world
from sample import StableDiffusion

ORIGINAL = models.original
NEVER_SAW = models.never_saw
AGAIN = models.again
MODELS = [ORIGINAL, *models.compared, models.by_odds, NEVER_SAW, AGAIN]
CONCEPTS = robust.CONCEPTS
SEEDS = core.SEEDS
FINDINGS = """\
- The null: two models that never saw a star, a heart or a mosaic are 1 unit apart. Two of three
  originals, which were taught what to draw, are .60 to .82 units apart by eps and .33 to .79 by
  FADE. If models that never saw a concept vary no more than these do (in logs; they may), a third
  one is at most 1.10 units away by eps and 1.33 by FADE, in nine of ten cases or more. By name the
  three pairs that never saw a concept differ so much (.50, .16 and .04) that their limit would be
  above 1.
- By eps, no method is within the null, with any concept. With star and heart, no kind of erasure is
  more than .2 units nearer than the original, which is at 1.4 and 1.6. SalUn and eta by the odds
  are nearer with the star, ESD-u with the heart (by .06), by more than their intervals; but of 18
  such intervals about one excludes the original by chance, and the original is a single model. On
  average ESD-x, ESD-u against learned prompts and concept ablation are farther than the original
  with both, SalUn with the heart; only concept ablation with the star (1.95) by more than its
  interval. With mosaic the original is at 2.44, and most are nearer, at 2.07 to 2.35; against
  learned prompts it is 2.71, with concept ablation 6.74, both farther by more than their intervals.
- By FADE, in units of the null, most are nearer than the original, which is at 1.9, 2.7 and 5.6
  (star, heart, mosaic): ESD-x and ESD-u at 1.3 to 2.8, UCE, RECE and SPEED at .93 to 1.3. These
  three are within the null with all concepts. Each is a single model, measured on 32 latents, so it
  has no interval. Too near to the limit of 1.33 to tell: RECE with the heart (1.28) and, with the
  star, SalUn (1.30), ESD-x in contexts (1.31) and ESD-x (1.36). (ESD against learned prompts is
  farther than the original with the star and, by no more than chance, with the heart; concept
  ablation with all: 3.6, 4.4 and 11.5.) And yet UCE's still draws a star in a third of 50 images,
  and RECE's a heart in 40 of them: near isn't erased. FADE compares what each model draws without
  guidance, eps images that show the concept, and the judge sees images drawn with guidance 5.
- For "a star", one of the two draws arrows in half of 50 images (and none of the ten objects in 36
  %), the other triangles (and none in 14 %). So even these two are .50 apart by name, and ESD-u,
  with .41 (.39 with the empty prompt kept), is no farther from them on average: it is nearer to
  star_0, which shares random numbers with the original, than to star_1. For "a heart", both draw
  mostly circles and arrows; the judge takes 10 and 16 % for a heart. (An earlier model, which isn't
  stored, was trained for fewer steps and drew 46 %: too little training may be the reason. A [text
  encoder](https://arxiv.org/abs/2412.07229) that never saw a heart wasn't tried.) They are .16
  apart, and every kind of erasure is .50 or more from them on average.
- For mosaic, both draw plain pictures (44 and 42 of 50), the others with dots. Closed forms, but
  for 4 to 10 % mosaics, and concept ablation do so, too (.16 to .20 from them), and so do ESD-u
  (.28) and SalUn (.30), but for 14 to 22 % mosaics. ESD-x (.65) and ESD-u with the empty prompt
  kept (.71) draw next to no mosaic, but neon and sketches in half of the images or more: erased,
  and yet not like a model that never saw it.
- In scenes, two such models are .21 and .25 apart, and two originals .18 and .15. ESD-u (all kinds
  of it), SalUn and concept ablation are at .26 to .43 from the star's and at .18 to .37 from the
  heart's; ESD-x and SPEED (.55 to .75) about as far as the original (.59, .75), and so are UCE and
  RECE. But each closed form is one set of images against one model; with other seeds, UCE's images
  show 5 stars of 24, not 11. With 24 and 20 images, a part of all these distances is chance.
- By eps, all are a little nearer to star_0, the original by .005 and erasures by .001 to .010. With
  mosaic, where neither model shares random numbers with the original, it is much the same: 24 of 28
  are nearer to mosaic_0, the original by .005, erasures by up to .010. With the heart, 13 of 31 are
  nearer to heart_0, by up to .004, the others to heart_1, by up to .007. So by eps the star's may
  be chance, too. By name, ESD-u is nearer to star_0 with every seed, but two models can't tell why.
- Eta by the odds was made to be nearest. By eps it is with the star (1.25; SalUn, at 1.29, is no
  farther by more than chance), and among the nearest with the heart (1.49). Of its eight
  differences from ESD-x and ESD-u, one excludes zero, as one of eight does by chance in a third of
  cases: with the star, it is nearer than ESD-x by .026 (.019 to .034, seed by seed; with the heart
  .019, -.014 to .052). And 23 % of its images show a star, 46 % a heart. Why isn't known.
"""

NEVER = [Reference(NEVER_SAW, seed) for seed in NEVER_SAW.seeds]
ORIGINALS = [Reference(ORIGINAL, 0), *(Reference(AGAIN, seed) for seed in AGAIN.seeds)]
ALIKE = {  # but for their random numbers
    "between two that never saw it": NEVER,
    "between two originals": ORIGINALS,
}


# ---- what is asked


def rendered(concept: str, num: int) -> list[Image.Image]:
    """Returns images of the world that show a concept, and no memorised work: always the same."""
    rng = np.random.default_rng(0)
    kind = core.kind_of(concept)
    images = []
    while len(images) < num:
        example = world.draw(rng)
        if getattr(example, kind) == concept and not example.work:
            images.append(example.image)
    return images


def draw_fifty(context: Context, sd: StableDiffusion, cell: Cell) -> dict[str, str]:
    """Draws 50 images of a concept's prompt, from the same noises for all models."""
    prompts = [prompt_of(cell.ask.about)] * context.num(50)
    images = context.draw(sd, cell._replace(seed=0), prompts)
    return core.to_letters(context.judge, images)


def portrait(concept: str) -> Ask:
    """Returns what asks for a concept by its name, often."""
    return Ask(f"fifty of {concept}", answer=draw_fifty, uses=(prompt_of,), about=concept)


# each process needs an erasure's and both references' for two distances in a row
@functools.lru_cache(maxsize=4)
def own_images(
    sd: StableDiffusion, prompt: str, num: int, seed: int
) -> distances.OwnImages:
    """Draws what FADE compares."""
    return distances.own_images(sd, prompt, num=num, seed=seed)


def measure_distances(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns eps, at each time, and FADE's terms, from the model that a cell is compared with."""
    concept = cell.ask.about
    model, seed = cell.ask.against
    other = context.load(model, (concept,), seed=seed)
    prompt = prompt_of(concept)

    x_0 = context.sd.encode_images(rendered(concept, context.num(8)))
    own = own_images(sd, prompt, num=context.num(32), seed=cell.seed)
    others = own_images(other, prompt, num=context.num(32), seed=seed)
    terms = distances.fade(own, others).tolist()
    return {
        "eps": distances.eps_distances(sd, other, prompt, x_0),
        "FADE": [[round(term, 3) for term in of_one] for of_one in terms],
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
    return NEVER


def asks_of(model: Model, seed: int, concept: str) -> list[Ask]:
    """Returns what a model is asked about a concept.

    One that never saw it is also asked what methods.py asks, for the verdict.
    """
    asks = [distance(concept, against) for against in compared_with(model, seed)]
    asks.append(portrait(concept))
    if concept in core.IMPLIED:
        asks.append(in_scenes)
    if model == NEVER_SAW:
        of_methods = methods.cells([model], [concept], [seed])
        asks += [cell.ask for cell in of_methods if cell.ask != methods.spending]
    return asks


def cells(models, concepts, seeds) -> list[Cell]:
    found = []
    for concept in concepts:
        erased = core.as_tuple(concept)
        for model, seed, each in itertools.product(models, seeds, erased):
            if seed != SEEDS[0] and not depends_on_seed(model):
                continue
            asks = asks_of(model, seed, each)
            found += core.grid([model], [erased], asks=asks, seeds=[seed])
    return found


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


def measured(answers: Answers, pair: Pair) -> dict | None:
    """Returns the stored distances of a pair."""
    ask = distance(pair.concept, against=pair.other)
    return answers.get(pair.one.model, pair.concept, ask, seed=pair.one.seed)


def eps(answers: Answers, pair: Pair) -> float | None:
    found = measured(answers, pair)
    return found and statistics.fmean(found["eps"])


def fade(answers: Answers, pair: Pair) -> float | None:
    found = measured(answers, pair)
    return found and sum(map(sum, found["FADE"]))


def variation_by_name(answers: Answers, pair: Pair) -> float | None:
    return total_variation(answers, pair, portrait(pair.concept))


def variation_in_scenes(answers: Answers, pair: Pair) -> float | None:
    is_comparable = pair.concept in core.IMPLIED and pair.one.seed != pair.other.seed
    return total_variation(answers, pair, in_scenes) if is_comparable else None


Distance = Callable[[Answers, Pair], float | None]
IN_UNITS: dict[str, Distance] = {"eps": eps, "FADE, nats": fade}
VARIATIONS: dict[str, Distance] = {
    "by name": variation_by_name, "in scenes": variation_in_scenes
}
DISTANCES = IN_UNITS | VARIATIONS


def pairs_of(answers: Answers, model: Model, concept: str) -> list[Pair]:
    """Returns a model's erasures, each with each model that never saw the concept."""
    if model == ORIGINAL:
        several = ORIGINALS
    else:
        seeds = answers.seeds(model, concept, portrait(concept))
        several = [Reference(model, seed) for seed in seeds]
    return [Pair(concept, one, never) for one in several for never in NEVER]


def pairs_among(concept: str, several: list[Reference]) -> list[Pair]:
    """Returns all pairs of models that differ in their random numbers alone."""
    found = []
    for i, one in enumerate(several):
        found += [Pair(concept, one, other) for other in several[:i]]
    return found


def values(answers: Answers, pairs: list[Pair], name: str) -> list[float]:
    """Returns the distances of pairs that are stored."""
    found = [DISTANCES[name](answers, pair) for pair in pairs]
    return [value for value in found if value is not None]


def of_erasures(answers: Answers, model: Model, concept: str, name: str) -> list[float]:
    """Returns a distance for each erasure: the mean over the models that never saw it.

    An erasure is what varies; two distances from one erasure are no two erasures.
    """
    by_erasure = {}
    for pair in pairs_of(answers, model, concept):
        for value in values(answers, [pair], name=name):
            by_erasure.setdefault(pair.one.name, []).append(value)
    return [statistics.fmean(several) for several in by_erasure.values()]


# ---- the null


def null(answers: Answers, name: str, concept: str) -> list[float]:
    """Returns the distances among models that never saw a concept."""
    return values(answers, pairs_among(concept, NEVER), name=name)


def over_null(answers: Answers, several: list[float], name: str, concept: str) -> list[float]:
    """Returns distances in units of the null, if it is stored: 1 is as near as two of these."""
    unit = null(answers, name, concept)
    return [value / statistics.fmean(unit) for value in several] if unit else []


def in_units(answers: Answers, model: Model, concept: str, name: str) -> list[float]:
    """Returns the distance of each erasure in units of the null."""
    several = of_erasures(answers, model, concept, name=name)
    return over_null(answers, several, name=name, concept=concept)


def limit(answers: Answers, name: str) -> float:
    """Returns what a distance from the null stays below in 95 % of cases: see above.

    In units of the null for eps and FADE. Infinite, if too little is stored, or if every
    total variation is below it.
    """
    if name in IN_UNITS:
        logs = []
        for concept in CONCEPTS:
            pairs = pairs_among(concept, ORIGINALS)
            logs.append([math.log(value) for value in values(answers, pairs, name=name)])
        return math.exp(math.sqrt(2) * stats.half_width(logs))

    of_all = [value for concept in CONCEPTS for value in null(answers, name, concept)]
    upper = stats.below(of_all) if len(of_all) > 2 else math.inf
    return upper if upper < 1 else math.inf


def is_within(answers: Answers, model: Model, concept: str, name: str) -> bool | None:
    """Returns whether a method's erasures are within the null on average; None if unknown."""
    distance_of = in_units if name in IN_UNITS else of_erasures
    several = distance_of(answers, model, concept, name=name)
    upper = limit(answers, name)
    return statistics.fmean(several) <= upper if several and upper < math.inf else None


# ---- the table and the figure


POSITIVE = stats.Interval(0, math.inf)


def range_of(name: str) -> stats.Interval:
    """Returns what a distance of a kind can be."""
    return stats.Interval(0, 1) if name in VARIATIONS else POSITIVE


def distance_text(several: list[float], name: str) -> str:
    """Returns the mean of distances of a kind with its interval: "0.131 (0.120 to 0.142)"."""
    digits = 0 if name == "FADE, nats" else 3
    return stats.number(several, digits, within=range_of(name))


def units_text(several: list[float]) -> str:
    """Returns the mean of distances in units of the null with its interval."""
    return stats.number(several, digits=2, within=POSITIVE)


def row(answers: Answers, model: Model, concept: str) -> list[str]:
    """Returns a row of the table, without the model and the concept."""
    cells = []
    for name in DISTANCES:
        several = of_erasures(answers, model, concept, name=name)
        cells.append(distance_text(several, name))
        if name in IN_UNITS:
            units = in_units(answers, model, concept, name=name)
            cells.append(units_text(units))

    within = {name: is_within(answers, model, concept, name=name) for name in DISTANCES}
    known = [name for name in within if within[name] is not None]
    near = [name.removesuffix(", nats") for name in known if within[name]]
    cells.append((", ".join(near) or "nothing") if known else "")
    return cells


def row_of_pairs(answers: Answers, concept: str, several: list[Reference]) -> list[str]:
    """Returns the distances of models that differ in their random numbers alone."""
    cells = []
    for name in DISTANCES:
        found = values(answers, pairs_among(concept, several), name=name)
        cells.append(distance_text(found, name))
        if name in IN_UNITS:
            cells.append(units_text(over_null(answers, found, name=name, concept=concept)))
    return [*cells, ""]


def lines_of_nothing(answers: Answers) -> list[str]:
    """Returns how often models that never saw a concept show nothing of its kind instead."""
    lines = []
    for concept, never in itertools.product(CONCEPTS, NEVER):
        seen = counts(answers, never, concept, portrait(concept))
        if seen:
            percent = 100 * seen["none"] / seen.total()
            what = f'its images of "{prompt_of(concept)}" show none of the kind.'
            lines.append(f"{never.name}: {percent:.0f} % of {what}")
    return lines


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each concept and model, and the null's."""
    rows = []
    for concept in CONCEPTS:
        for model in models:
            cells = row(answers, model, concept)
            if model not in (NEVER_SAW, AGAIN) and any(cells):
                nums = {len(of_erasures(answers, model, concept, name)) for name in DISTANCES}
                num = " or ".join(f"{num}" for num in sorted(nums) if num)  # 1 or 3 originals
                rows.append([concept, model.label, num, *cells])
        for label, several in ALIKE.items():
            cells = row_of_pairs(answers, concept, several)
            if any(cells):
                num = len(values(answers, pairs_among(concept, several), name="by name"))
                rows.append([concept, f"*{label}*", f"{num} pair{'s' * (num > 1)}", *cells])

    limits = []
    for name in DISTANCES:
        upper = limit(answers, name)
        text = f"{upper:.2f}" if upper < math.inf else ""
        limits += ["", text] if name in IN_UNITS else [text]
    if any(limits):
        rows.append(["all", "*limit of the null*", "", *limits, ""])

    header = ["concept", "erased by", "models"]
    for name in DISTANCES:
        header.append(name)
        if name in IN_UNITS:
            header.append("in units of the null")
    table_of_distances = core.table([*header, "within the null"], rows)
    return "\n\n".join([table_of_distances, *lines_of_nothing(answers)])


def in_figure(answers: Answers, models: list[Model], name: str) -> dict[str, list[float]]:
    """Returns the distances that a panel shows, by row: of erasures, then of the null.

    In units of the null, where there are such.
    """
    scaled = name in IN_UNITS
    distance_of = in_units if scaled else of_erasures
    rows = {}
    for concept in CONCEPTS:
        for model in models:
            if model not in (NEVER_SAW, AGAIN):
                rows[f"{model.label}, {concept}"] = distance_of(answers, model, concept, name=name)
        for label, alike in ALIKE.items():
            found = values(answers, pairs_among(concept, alike), name=name)
            if scaled:
                found = over_null(answers, found, name=name, concept=concept)
            rows[f"{label}, {concept}"] = found
    return {row: several for row, several in rows.items() if several}


def figure(answers: Answers, models: list[Model]) -> figures.Figure:
    """Returns a panel for each distance: a row for each model and concept, and the null."""
    panels = {}
    bands = {}
    for name in DISTANCES:
        title = name
        if name in IN_UNITS:
            title = f"{name.removesuffix(', nats')}, in units of the null"
        rows = in_figure(answers, models, name)
        if rows:
            panels[title] = {
                row: stats.student(several, range_of(name)) for row, several in rows.items()
            }
            upper = limit(answers, name)
            if upper < math.inf:
                bands[title] = stats.Interval(0, upper)
    of_null = [f"{label}, {concept}" for label in ALIKE for concept in CONCEPTS]
    return figures.estimates(panels, bands, grey=of_null)
