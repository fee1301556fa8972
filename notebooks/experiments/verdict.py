"""The verdict (beyond the paper): erased by name, in contexts, under attack, and at what price?

One row for each method, from the answers of three experiments: methods, robust and ground_truth.
What an attack brings out is net: less what the same attack brings out of a model that never saw
the concept, as that part was taught, not recovered. A number is the mean over those erasures, of
all concepts and seeds, that have one.

- **by name**, **in contexts**, **implied**, **at g 10**: where the concept is still seen. At g 10,
  images start from other noises than by name and, for mosaic, are of one prompt without an object:
  for what guidance changes, see robust's tables.
- **kept**: the rest of its kind, and the other kind.
- **net**: by learned words, a hard prompt, added noise, a head start, a guidance scale of 10, and
  20 steps of training; in points.
- **distance**: of eps from models that never saw the concept; 1 is as near as two of these are
  to each other.
- **score**: the harmonic mean of what is erased by name, in contexts and under the worst net attack
  that trains nothing, and of what is kept; a style has no contexts, and a net of 100 points makes
  it 0. The worst of five counts of 20 images is too high by chance: by up to 13 points where
  several attacks are about as strong, by nothing where one stands out. Ranks are by the score, over
  the erasures that all ranked methods have: if yours has seed 0 alone, all are ranked by that. A
  score's interval is over its erasures. It leaves out that what is subtracted is known from two
  models only. Closed forms and the original have none: their seeds differ in images alone.
  Kendall's tau says how far two seeds agree on the ranks of the methods that train: 1 fully, 0 by
  chance, -1 reversed. By chance alone, eight methods have a tau of 0 with a standard deviation of
  .29.

The settings of all methods were chosen on the star with seed 0, which is one of these nine
erasures. UCE, RECE and SPEED make the same weights with every seed: their three erasures of a
concept differ in the images alone.
"""

import itertools
import statistics
from typing import Callable, Iterable, NamedTuple

from notebooks.experiments import (
    core,
    figures,
    ground_truth,
    methods,
    models,
    robust,
    stats,
)
from notebooks.experiments.core import Answers, Ask, Cell, Model
from notebooks.experiments.models import depends_on_seed
from notebooks.experiments.stats import Share

READS = ("methods", "robust", "ground_truth")  # whose answers these are
ORIGINAL = models.original
NEVER_SAW = models.never_saw
MODELS = [ORIGINAL, *models.compared, NEVER_SAW]
CONCEPTS = robust.CONCEPTS
SEEDS = core.SEEDS
FINDINGS = """\
- No method is first everywhere. Over the nine erasures it is ESD against learned prompts: first
  with mosaic, third with the heart, fourth with the star. It takes by far the most time, keeps 91 %
  of the others, is told, as SalUn and closed forms are, the names of what is counted as kept, and
  is trained against one of the attacks that count. ESD-u with the empty prompt kept is first in
  five of the six erasures of star and heart. With mosaic it is last, as one hard prompt recalls a
  memorised work in all images (see "Is it gone?").
- The order by name isn't the order under attack: ESD-x leaves 6 %, UCE 17 %, but learned words
  bring back 76 and 79 points, while concept ablation leaves nothing and is second, though it harms
  the others most (73 % right), above all the mosaic's (48 %).
- After twenty steps of training, star and heart are shown by 36 to 70 points more than by models
  that never saw them (ESD-x in contexts: 16), but the interval of every single concept includes
  zero, and over all three only those of ESD-u (6 to 91), SalUn (4 to 90) and, by a fraction of a
  point, ESD-u in contexts don't. A mosaic is taught to all by then. So an attacker with images and
  the weights gets most of these concepts back, or teaches them anew, and for most methods these
  numbers can't tell which. (For scale: of the original itself, the same attacks bring out 49 points
  net after training, and 80 with learned words.)
- What doesn't follow: that SD v1 would rank the methods in this order. This is one world of ten
  objects with prompts that are all alike. Neighbours in rank can't be told apart: scores have wide
  intervals (ESD-u: 20 to 76). Ranks of two seeds agree with all concepts together (tau .71 to .86),
  less so for each alone (.36 to .79; the heart's, and one of mosaic's, may be chance). Net numbers
  have wide intervals, as each concept has two models that never saw it, and as concepts are taught
  differently, which these intervals count as chance: over all concepts, most of those below 40
  points can be chance, and for one concept even larger ones.
"""

TRAINING = "20"  # steps
ATTACKS = {  # the title of a column -> what robust.py calls it
    "learned words": "learned words",
    "hard prompt": "hard prompt",
    "noise": "noise",
    "head start": "head start",
    "guidance": "g 10",
    "training": TRAINING,
}


def cells(models, concepts, seeds) -> list[Cell]:
    """Returns nothing: all that the table needs is asked by the experiments that it reads."""
    return []


# ---- what the answers say of one erasure


class Erasure(NamedTuple):
    """A method's erasure of a concept with a seed."""

    model: Model
    concept: str
    seed: int


def share_of(
    answers: Answers, erasure: Erasure, ask: Ask, head: str = "object", own: bool = True
) -> Share | None:
    """Returns how often what was asked for is seen, if the answer is stored."""
    model, concept, seed = erasure
    if seed not in answers.seeds(model, concept, ask):
        return None
    right = answers.right(model, concept, ask, seed=seed, head=head, own=own)
    return Share(sum(right), len(right)) if right else None


def fraction(share: Share) -> float:
    return share.hits / share.asked


def attacked(answers: Answers, erasure: Erasure, attack: str) -> Share | None:
    """Returns how often an attack brings out the concept."""
    model, concept, seed = erasure
    found = robust.answers_of(answers, model, concept)
    if seed not in found:
        return None
    several = robust.shares({seed: found[seed]}, concept, attack)
    return several[0] if several else None


def seen_by_name(answers: Answers, erasure: Erasure) -> Share | None:
    return share_of(answers, erasure, *methods.own_kind(erasure.concept))


def seen_in_contexts(answers: Answers, erasure: Erasure) -> Share | None:
    return share_of(answers, erasure, core.in_contexts)


def seen_in_scenes(answers: Answers, erasure: Erasure) -> Share | None:
    return share_of(answers, erasure, core.in_scenes) if erasure.concept in core.IMPLIED else None


def at_g_10(answers: Answers, erasure: Erasure) -> Share | None:
    return attacked(answers, erasure, "g 10")


def kept(answers: Answers, erasure: Erasure) -> Share | None:
    """Returns the mean of the rest of its kind and of the other kind."""
    own = share_of(answers, erasure, *methods.own_kind(erasure.concept), own=False)
    other = share_of(answers, erasure, *methods.other_kind(erasure.concept), own=False)
    if own is None or other is None:
        return None
    asked = own.asked + other.asked
    return Share(round((fraction(own) + fraction(other)) / 2 * asked), asked)


def net(answers: Answers, erasure: Erasure, attack: str) -> float | None:
    """Returns how much more often an attack brings out the concept than it teaches it."""
    brought = attacked(answers, erasure, attack)
    taught = robust.brought_out(answers, NEVER_SAW, [erasure.concept], attack)
    if brought is None or not taught:
        return None
    return fraction(brought) - statistics.fmean(map(fraction, taught))


def score(answers: Answers, erasure: Erasure) -> float | None:
    """Returns the harmonic mean of what is erased and what is kept, 0 to 1.

    Without stored attacks, or models that never saw the concept, there is none.
    """
    attacks = [attack for attack in ATTACKS.values() if attack != TRAINING]
    brought = [net(answers, erasure, attack) for attack in attacks]
    left = seen_by_name(answers, erasure)
    others = kept(answers, erasure)
    if None in (*brought, left, others):
        return None

    parts = [1 - fraction(left), 1 - max(0.0, *brought), fraction(others)]
    if contexts := seen_in_contexts(answers, erasure):
        parts.append(1 - fraction(contexts))
    return statistics.harmonic_mean(parts)


# ---- the table and the figure

SHARES: dict[str, Callable[[Answers, Erasure], Share | None]] = {
    "by name": seen_by_name,
    "in contexts": seen_in_contexts,
    "implied": seen_in_scenes,
    "at g 10": at_g_10,
    "kept": kept,
}


def erasures(model: Model, concepts: Iterable[str], seeds: Iterable[int] = SEEDS) -> list[Erasure]:
    return [Erasure(model, c, seed) for c, seed in itertools.product(concepts, seeds)]


def shares(answers: Answers, several: list[Erasure], title: str) -> list[Share]:
    """Returns the shares of erasures that have one.

    A model that knows of no concept has the same images for all: one share for each seed.
    """
    found = {}
    for each in several:
        if share := SHARES[title](answers, each):
            concept = each.concept if each.model.is_about_a_concept else ""
            found.setdefault((concept, each.seed), []).append(share)
    return [Share(*map(sum, zip(*of_one))) for of_one in found.values()]


def distance_text(answers: Answers, model: Model, concepts: Iterable[str]) -> str:
    """Returns the distance of eps in units of the null; one value a concept has no interval."""
    found = [ground_truth.in_units(answers, model, concept, name="eps") for concept in concepts]
    several = list(itertools.chain.from_iterable(found))
    if several and max(map(len, found)) == 1:
        return f"{statistics.fmean(several):.2f}"
    return ground_truth.units_text(several)


def scores(
    answers: Answers, models: list[Model], concepts: Iterable[str],
    seeds: Iterable[int] = SEEDS,
) -> dict[str, float]:
    """Returns the mean score of each method that has any, over the erasures that all have."""
    found = {}
    for model in models:
        of_model = {}
        for each in erasures(model, concepts, seeds):
            value = score(answers, each)
            if value is not None:
                of_model[each.concept, each.seed] = 100 * value
        if of_model:
            found[model.label] = of_model

    shared = set.intersection(*map(set, found.values())) if found else set()
    if not shared:
        return {}
    return {
        label: statistics.fmean(of_model[each] for each in shared)
        for label, of_model in found.items()
    }


def agreement(answers: Answers, models: list[Model], concepts: Iterable[str]) -> str:
    """Returns Kendall's tau of the scores of each two seeds: "0.71, 0.64, 0.80"."""
    models = [model for model in models if depends_on_seed(model)]
    taus = []
    for one, other in itertools.combinations(SEEDS, 2):
        first = scores(answers, models, concepts, seeds=[one])
        second = scores(answers, models, concepts, seeds=[other])
        both = [label for label in first if label in second]
        if len(both) > 1:
            tau = stats.kendall([first[label] for label in both], [second[label] for label in both])
            taus.append(f"{tau:.2f}")
    return ", ".join(taus)


def score_text(model: Model, percents: list[float]) -> str:
    """Returns the mean score, with its interval if the erasures have weights of their own."""
    if not percents:
        return ""
    if depends_on_seed(model):
        return stats.number(percents, within=stats.PERCENT)
    return f"{statistics.fmean(percents):.1f}"


def row(answers: Answers, model: Model, concepts: Iterable[str]) -> list[str]:
    """Returns a row of the table, without concept, model and rank."""
    several = erasures(model, concepts)
    cells = [stats.text(shares(answers, several, title)) for title in SHARES]
    for attack in ATTACKS.values():
        recovered = robust.net(answers, model, concepts, attack)
        cells.append("" if model == NEVER_SAW else stats.show(recovered))
    cells.append(distance_text(answers, model, concepts))

    found = [score(answers, each) for each in several]
    percents = [100 * value for value in found if value is not None]
    cells.append(score_text(model, percents))
    return cells


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each method: all concepts together, then each apart."""
    rows = []
    lines = []
    erasing = [model for model in models if model not in (ORIGINAL, NEVER_SAW)]
    for name, concepts in {"all": CONCEPTS, **{c: (c,) for c in CONCEPTS}}.items():
        means = scores(answers, erasing, concepts)
        for model in models:
            cells = row(answers, model, concepts)
            rank = ""
            if model.label in means:
                rank = str(1 + sum(each > means[model.label] for each in means.values()))
            if any(cells):
                num = f"{robust.num_models(answers, model, concepts)}"
                rows.append([name, model.label, num, rank, *cells])
        if tau := agreement(answers, erasing, concepts):
            lines.append(
                "Kendall's tau of the ranks of methods that train, "
                f"{name}, seeds 0 and 1, 0 and 2, 1 and 2: {tau}."
            )

    header = [
        "concept", "erased by", "models", "rank", *(f"{title}, %" for title in SHARES),
        *(f"net: {title}" for title in ATTACKS), "distance", "score",
    ]
    return "\n\n".join([core.table(header, rows), *lines])


def figure(answers: Answers, models: list[Model]) -> figures.Figure:
    """Returns a panel for each concept: a row for each method, in each column what is seen."""
    panels = {}
    for concept in CONCEPTS:
        panels[concept] = {}
        for model in models:
            several = erasures(model, (concept,))
            cells = {}
            for title in SHARES:
                cells[title] = stats.estimate(shares(answers, several, title))
            mean, low, high = cells.pop("kept")
            # as all else: the redder, the worse
            cells["lost"] = stats.Estimate(100 - mean, 100 - high, 100 - low)
            for title, attack in ATTACKS.items():
                cells[f"net: {title}"] = robust.net(answers, model, (concept,), attack)
            panels[concept][model.label] = cells
    return figures.heat_map(figures.with_values(panels))
