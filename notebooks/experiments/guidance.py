"""The guidance law (beyond the paper): does a higher guidance scale bring a concept back?

Eq. 6 says where eps_theta(x_t, c) should go, and nothing of eps_theta(x_t), the empty prompt's
prediction. Images are drawn with both. If training moved them by m_c d and m_0 d, where
d = eps_theta*(x_t, c) - eps_theta*(x_t), then the eps that guidance g draws with is

    eps_theta*(x_t) + kappa(g) d + what isn't along d,    kappa(g) = m_0 + g (1 + m_c - m_0)

(notebook 6). Where the slope 1 + m_c - m_0 is positive, raising g leads back to the concept. Here
m_c and m_0 are measured for the prompt "star", or "a picture in the style of dots", on the x_t of
the edited model's own trajectories (8 steps, guidance 3), as sums over all of them:
m = sum <movement, d> / sum <d, d>. Images are drawn for "a star", or for each object in the style,
in 10 steps. "Comes back" means: at g 10 more than 10 % of the images show the concept, and more
than 5 points more than at g 1. (The empty prompt, kappa 0, shows an object in 10 % on average.)
Images start from other noises than in other tables.

On SD v1, draw from an erasure by ESD-u at several scales:

    python erase.py church --method esd-u --out church.safetensors
    for g in 1 3 7.5 12; do
        python sample.py "a church" --erased church.safetensors --guidance $g --num 40 --out $g.png
    done
"""

import itertools
import math
from typing import Callable, Iterable, NamedTuple

import torch
from torch import Generator, Tensor

import erase
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import (
    STYLES,
    Answers,
    Ask,
    Cell,
    Context,
    Model,
    by_name,
    in_styles,
)
from notebooks.experiments.stats import Share
from notebooks.toy import world
from notebooks.toy.world import with_article
from sample import StableDiffusion

GUIDANCES = (1, 2, 3, 5, 7.5, 10)
KEPT_AT = (5, 10)  # where the other objects or styles are asked for, too
PLAIN = models.esd_u()
KEPT = models.kept()
MODELS = [  # each is drawn with at every guidance
    models.original,
    models.esd_x(),
    PLAIN,
    models.esd_u("ESD-u, eta 3", eta=3),
    KEPT,
    models.uce_,
    models.ablation,
]
CONCEPTS = (*world.OBJECTS, *STYLES)
SEEDS = core.SEEDS
FINDINGS = """\
- With ESD-u, a higher guidance scale brings the concept back: 1 % of the images of the ten objects
  show them at g 1, 11 % at g 5 and 25 % at g 10; of five styles 2, 41 and 56 %. With ESD-x a
  little: 2, 6 and 9 % of the objects.
- With the empty prompt kept, it doesn't: 0.7 % of the objects at g 5 and 0.3 % at g 10, and at most
  0.3 % of the styles at any g. The others are right as often as with plain ESD-u.
- Then 28 % of the images at g 5 and 36 % at g 10 show none of the ten objects (a broken one counts
  as none); with plain ESD-u 20 and 23 %. For the star that may be no loss: at g 5, 38 % show none,
  and 36 and 14 % from the two models that never saw one. For the heart it is one: 25 %, and 2 and 8
  %.
- Eta 3 hardly brings objects back (3 % at g 10), but 15 % of the styles, and costs more: 89 % of
  the other objects are right, and 77 % of the other styles. Concept ablation brings back 5 % of the
  objects and no style, and costs most: 81 and 33 %.
- UCE makes the concept's prediction the empty prompt's: m_c is -1.01 to -.99 and m_0 -.01 to 0, so
  kappa is near 0 at every g (-.12 to .14 at 10). Yet what is left of its objects rises, from 10 %
  at g 1 to 18 at g 10: of stars from 8 to 43 %. The law doesn't explain that: half of the 14 that
  come back have a slope of 0 or below. (Its weights are the same with every seed.)
- Predicted, and true: the slope is positive for every concept with plain ESD-u, and near 0 or below
  with the empty prompt kept.
- We predicted that the slope's sign would be right for nine erasures in ten. It is right for 55 %,
  and "never" for 74 %. Of its 121 errors, 103 are positive slopes without a return (36 of them with
  concept ablation; 34 with eta 3, whose kappa starts far below 0); 18 come back with a slope of 0
  or below, which the law doesn't explain.
- "kappa(10) above 1/2" is right for 79 %. For ESD-u it is right for 89 %, "always" for 71 %; for
  the others it is right as often as "never", or less. We chose the 1/2 by looking at seed 0 of six
  objects; without seed 0 of all objects it is right for 80 %.
- With ESD-u, kappa(10) ranks how much comes back among styles (tau .70), but hardly among objects
  (.28); with ESD-x not at all (.11).
- So a claim of erasure must name its guidance scale: here 5, unless a column names another.
"""


def at(model: Model, guidance: float) -> Model:
    """Returns a model that draws with a guidance scale; at the usual one, it is itself."""
    if guidance == core.SAMPLING["guidance"]:
        return model
    sampling = model.sampling | {"guidance": guidance}
    return model._replace(label=f"{model.label}, g {guidance:g}", sampling=sampling)


# ---- how often the concept is seen


def draw_own(context: Context, sd: StableDiffusion, cell: Cell) -> dict[str, str]:
    """Draws 20 images of the prompts that name a concept; returns what the judge sees."""
    concept = cell.ask.about
    prompts = [with_article(concept)] * 20
    if concept in STYLES:
        styled = [f"{with_article(name)} in the style of {concept}" for name in world.OBJECTS]
        prompts = styled * 2
    images = context.draw(sd, cell, prompts[: context.num(len(prompts))])
    return core.to_letters(context.judge, images)


def own_prompts(concept: str) -> Ask:
    """Returns what asks for a concept, and for nothing else."""
    return Ask(f"{concept} in its own prompts", answer=draw_own, about=concept)


# ---- the slope


class Movement(NamedTuple):
    """Sums over some x_t: how far two predictions moved along d, and d's length."""

    of_c: float  # <eps_theta(x_t, c) - eps_theta*(x_t, c), d>
    of_null: float  # <eps_theta(x_t) - eps_theta*(x_t), d>
    d_squared: float  # <d, d>


@torch.no_grad()
def movement(
    edited: Callable, frozen: Callable, x_t: Tensor, t: Tensor,
    text: erase.Text, text_of_frozen: erase.Text,
) -> Movement:
    """Returns the sums over a batch. text is the edited model's, if it tunes the encoder."""
    frozen_c = frozen(x_t, t, text_of_frozen.concept)
    frozen_null = frozen(x_t, t, text_of_frozen.null)
    d = frozen_c - frozen_null
    moved_c = edited(x_t, t, text.concept) - frozen_c
    moved_null = edited(x_t, t, text.null) - frozen_null
    sums = [(each * d).sum().item() for each in (moved_c, moved_null, d)]
    return Movement(*sums)


class Law(NamedTuple):
    """m_c and m_0 of kappa(g) = m_0 + g (1 + m_c - m_0)."""

    m_c: float
    m_0: float

    @property
    def slope(self) -> float:
        """Returns 1 + m_c - m_0."""
        return 1 + self.m_c - self.m_0

    def kappa(self, guidance: float) -> float:
        """Returns m_0 + g (1 + m_c - m_0)."""
        return self.m_0 + guidance * self.slope


def law_of(movements: Iterable[Movement]) -> Law:
    """Returns m = sum <movement, d> / sum <d, d>."""
    of_c, of_null, d_squared = (sum(each) for each in zip(*movements))
    return Law(of_c / d_squared, of_null / d_squared)


def measure_slope(
    context: Context, sd: StableDiffusion, cell: Cell, trajectories: int = 4, batch: int = 4
) -> dict:
    """Returns m_c, m_0 and the slope, over all x_t and for each time."""
    prompts = [core.prompt_for(cell.ask.about)]
    (text,) = erase.texts_for(sd, prompts, batch)
    (text_of_frozen,) = erase.texts_for(context.sd, prompts, batch)
    rng = Generator().manual_seed(cell.seed)
    steps = 8
    batches = erase.x_t_from_model(
        sd.unet, [text], (batch, *sd.latent_shape), rng, steps=steps, every_step=True
    )

    at_time = {}
    for x_t, t, _ in itertools.islice(batches, trajectories * steps):
        moved = movement(sd.unet, context.sd.unet, x_t, t, text, text_of_frozen)
        at_time.setdefault(t[0].item(), []).append(moved)

    law = law_of(each for movements in at_time.values() for each in movements)
    by_time = {t: law_of(movements)._asdict() for t, movements in at_time.items()}
    return law._asdict() | {"slope": law.slope, "by time": by_time}


def slope(concept: str) -> Ask:
    """Returns what asks for the slope of a concept."""
    return Ask(f"slope of {concept}", answer=measure_slope, about=concept)


# ---- cells


def rest_of(concept: str) -> Ask:
    """Returns what asks for the concept's kind."""
    return in_styles if concept in STYLES else by_name


def asks_of(model: Model, concepts: tuple[str, ...], guidance: float) -> list[Ask]:
    """Returns what a model is asked at a guidance scale."""
    asks = [own_prompts(concept) for concept in concepts]
    if guidance in KEPT_AT:
        asks += {rest_of(concept): None for concept in concepts}
    if guidance == core.SAMPLING["guidance"] and model.is_about_a_concept:
        asks += [slope(concept) for concept in concepts]
    return asks


def cells(models, concepts, seeds) -> list[Cell]:
    found = []
    for concept in concepts:
        erased = core.as_tuple(concept)
        for model in models:
            for guidance in GUIDANCES:
                asks = asks_of(model, erased, guidance)
                found += core.grid([at(model, guidance)], [erased], asks=asks, seeds=seeds)
    return found


# ---- shares


def left(answers: Answers, model: Model, concept: str, guidance: float) -> dict[int, Share]:
    """Returns how often a concept is seen at a guidance scale, for each seed."""
    return times_seen(answers, model, concept, guidance, concept)


def times_seen(
    answers: Answers, model: Model, concept: str, guidance: float, name: str | None
) -> dict[int, Share]:
    """Returns how often a name is seen where a concept is asked for; None: nothing of its kind."""
    ask = own_prompts(concept)
    drawn_by = at(model, guidance)
    head = core.kind_of(concept)
    shares = {}
    for seed in answers.seeds(drawn_by, concept, ask):
        seen = core.from_letters(answers.get(drawn_by, concept, ask, seed=seed), head)
        shares[seed] = Share(seen.count(name), len(seen))
    return shares


def all_left(
    answers: Answers, model: Model, concepts: Iterable[str], guidance: float
) -> list[Share]:
    """Returns the shares of several concepts."""
    shares = []
    for concept in concepts:
        shares += left(answers, model, concept, guidance).values()
    return shares


def all_kept(
    answers: Answers, model: Model, concepts: Iterable[str], guidance: float
) -> list[Share]:
    """Returns how often the rest of each concept's kind is right."""
    concepts = [*concepts]  # of one kind
    head = core.kind_of(concepts[0])
    ask = rest_of(concepts[0])
    return answers.pooled(at(model, guidance), concepts, ask, head=head, own=False)


def laws(answers: Answers, model: Model, concept: str) -> dict[int, Law]:
    """Returns the law of each seed's erasure."""
    ask = slope(concept)
    found = {}
    for seed in answers.seeds(model, concept, ask):
        measured = answers.get(model, concept, ask, seed=seed)
        found[seed] = Law(measured["m_c"], measured["m_0"])
    return found


class Erasure(NamedTuple):
    """What the law says of one erasure, and what is seen."""

    label: str  # of the model
    law: Law
    low: float  # shares of images that show the concept, at the lowest g
    high: float  # and at the highest

    @property
    def comes_back(self) -> bool:
        """Whether raising g brings the concept back."""
        return self.high > 0.1 and round(self.high - self.low, 6) > 0.05


def erasures(answers: Answers, models: list[Model]) -> list[Erasure]:
    """Returns all that have a law, and images at the lowest and the highest g."""
    found = []
    for model, concept in itertools.product(models, CONCEPTS):
        low = left(answers, model, concept, GUIDANCES[0])
        high = left(answers, model, concept, GUIDANCES[-1])
        for seed, law in laws(answers, model, concept).items():
            if seed in low and seed in high:
                shares = [each[seed].hits / each[seed].asked for each in (low, high)]
                found.append(Erasure(model.label, law, *shares))
    return found


# ---- tables and the figure


def table_by_guidance(answers: Answers, models: list[Model], kind: str) -> str:
    """Returns a row for each model: how much is left at each g, and how much is kept."""
    concepts = core.KINDS[kind]
    rows = []
    for model in models:
        shares = [all_left(answers, model, concepts, guidance) for guidance in GUIDANCES]
        shares += [all_kept(answers, model, concepts, guidance) for guidance in KEPT_AT]
        if any(shares[: len(GUIDANCES)]):
            rows.append([model.label, *(stats.text(each) for each in shares)])
    header = [
        f"{kind}s, erased by",
        *(f"left at g {guidance:g}, %" for guidance in GUIDANCES),
        *(f"others right at g {guidance:g}, %" for guidance in KEPT_AT),
    ]
    return core.table(header, rows) if rows else ""


def table_by_concept(answers: Answers) -> str:
    """Returns a row for each concept: ESD-u, plain and with the empty prompt kept."""
    rows = []
    for concept in CONCEPTS:
        cells = []
        for model in (PLAIN, KEPT):
            found = laws(answers, model, concept).values()
            slopes = [law.slope for law in found]
            kappas = [law.kappa(GUIDANCES[-1]) for law in found]
            cells += [stats.number(values, digits=2, sign="+") for values in (slopes, kappas)]
            for guidance in (GUIDANCES[0], GUIDANCES[-1]):
                cells.append(stats.text([*left(answers, model, concept, guidance).values()]))
        if any(cells):
            rows.append([concept, *cells])
    header = ["concept"]
    for model in (PLAIN, KEPT):
        header += [f"{model.label}: slope", f"{model.label}: kappa({GUIDANCES[-1]})"]
        for guidance in (GUIDANCES[0], GUIDANCES[-1]):
            header.append(f"{model.label}: left at g {guidance:g}, %")
    return core.table(header, rows) if rows else ""


RULES = {  # what each says of an erasure: whether the concept comes back
    "slope above 0": lambda law: law.slope > 0,
    f"kappa({GUIDANCES[-1]}) above 1/2, nearer to the concept than to the empty prompt":
        lambda law: law.kappa(GUIDANCES[-1]) > 0.5,
    "always": lambda law: True,
    "never": lambda law: False,
}


def table_of_rules(answers: Answers, models: list[Model]) -> str:
    """Returns how often each rule is right: for all erasures, for those with anything left at
    the highest g, and for each model's.
    """
    found = erasures(answers, models)
    if not found:
        return ""
    groups = {"all": found, "anything left": [each for each in found if each.high > 0]}
    for each in found:
        groups.setdefault(each.label, []).append(each)
    rows = []
    for name, rule in RULES.items():
        row = [name]
        for group in groups.values():
            right = [rule(each.law) == each.comes_back for each in group]
            row.append(stats.text([Share(sum(right), len(right))] if right else []))
        rows.append(row)
    columns = [f"{name}: right for {len(group)}, %" for name, group in groups.items()]
    return core.table(["the concept comes back if", *columns], rows)


def table_of_ranks(answers: Answers, models: list[Model]) -> str:
    """Returns how far kappa at the highest g ranks erasures by what is left, a row for a model."""
    rows = []
    for model in models:
        found = erasures(answers, [model])
        if len(found) > 1:
            kappas = [each.law.kappa(GUIDANCES[-1]) for each in found]
            tau = stats.kendall(kappas, [each.high for each in found])
            rows.append([model.label, str(len(found)), "" if math.isnan(tau) else f"{tau:.2f}"])
    header = [
        "erased by", "erasures",
        f"Kendall's tau of kappa({GUIDANCES[-1]}) and what is left at g {GUIDANCES[-1]}",
    ]
    return core.table(header, rows) if rows else ""


def table_of_nothing(answers: Answers, models: list[Model]) -> str:
    """Returns how often none of the ten objects is seen where one is asked for, by model."""
    rows = []
    for model in models:
        cells = []
        for guidance in GUIDANCES:
            shares = []
            for concept in core.KINDS["object"]:
                shares += times_seen(answers, model, concept, guidance, None).values()
            cells.append(stats.text(shares))
        if any(cells):
            rows.append([model.label, *cells])
    columns = [f"at g {guidance:g}, %" for guidance in GUIDANCES]
    return core.table(["none of the ten is seen, erased by", *columns], rows) if rows else ""


def table(answers: Answers, models: list[Model]) -> str:
    """Returns tables of objects and of styles, by concept, and of what the law predicts."""
    parts = [table_by_guidance(answers, models, kind) for kind in core.KINDS]
    parts.append(table_of_nothing(answers, models))
    parts += [table_by_concept(answers), table_of_rules(answers, models)]
    parts.append(table_of_ranks(answers, models))
    return "\n\n".join(part for part in parts if part)


def figure(answers: Answers, models: list[Model]):
    """Returns what is left against g, and what is left at the highest g against the slope."""
    panels = {}
    for kind, concepts in core.KINDS.items():
        title = f"{kind}s"
        panels[title] = []
        for model in models:
            shares = {g: all_left(answers, model, concepts, g) for g in GUIDANCES}
            asked = [g for g, several in shares.items() if several]
            if asked:
                line = figures.Line(model.label, x=asked, shares=[shares[g] for g in asked])
                panels[title].append(line)

    marks = []
    for each in erasures(answers, models):
        marks.append(figures.Mark(each.label, x=each.law.slope, y=100 * each.high))
    return figures.lines(
        panels, x="guidance scale g", y="the erased concept is seen, %",
        marks={f"each erasure at g {GUIDANCES[-1]}": marks}, x_of_marks="slope 1 + m_c - m_0",
    )
