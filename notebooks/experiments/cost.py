"""What an erasure costs (beyond the paper): which x_t are needed, and how many gradient steps?

A call is one latent through the U-Net; a backward pass counts as two. The loss takes 5 calls, and
each prediction on the way to x_t takes 2. In the paper's code, x_t are at a random one of 50 steps,
after 24.5 predictions on average, so 54 calls are expected for a gradient step; with one at every
step of 8, it is 7. Calls are computed from the settings: exactly, where every step of a trajectory
is used, else on average over random times. "The first 4 of 8" are the noisiest x_t of a trajectory
of 8 steps, at each of which a gradient step is taken.

All rows make 160 gradient steps, with a learning rate of 4e-4 (ESD-x) or 7e-5 (ESD-u), unless
they say otherwise, and have the paper's batch of 1; "ESD-x" and "ESD-u" alone have the settings
of the other tables, with a batch of 4. Seconds are for one core of a busy machine: read them
as ratios.
"""

from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Cell, Model, by_name
from notebooks.experiments.methods import mean_spent, spending
from notebooks.experiments.objects import LEFT, OTHERS
from notebooks.methods import esd

ITERATIONS = models.WHOLE_X["iterations"]
AS_IN_THE_PAPER = {"steps": 50, "every_step": False}
SOURCES = {
    "50 steps, as in the paper": AS_IN_THE_PAPER,
    "50 steps by the original": AS_IN_THE_PAPER | {"x_t": "frozen"},
    "8 steps": {"steps": 8, "every_step": False},
    "every step of 8": {},
}
FEWER = {  # with half of the gradient steps
    "every step of 8": {},
    "the first 6 of 8": {"first": 6},
    "the first 4 of 8": {"first": 4},
}


def ways(base: dict) -> dict[str, dict]:
    """Returns the settings of all ways to draw x_t, by name."""
    base = base | {"batch": 1}
    half = base | {"iterations": ITERATIONS // 2}
    faster = half | {"lr": 1.5 * base["lr"]}
    fewer = f"{ITERATIONS // 2} iterations"

    found = {x_t: base | settings for x_t, settings in SOURCES.items()}
    found[f"every step of 8, {fewer}"] = half
    for x_t, settings in FEWER.items():
        found[f"{x_t}, {fewer}, lr x 1.5"] = faster | settings
    return found


def variants(usual: Model, base: dict) -> dict[str, Model]:
    """Returns a model for each way to draw x_t, by its name; `usual` is that of other tables."""
    found = {}
    for way, settings in ways(base).items():
        found[way] = Model(f"{usual.label}, {way}", esd.erase, settings)
    return found | {"as in other tables": usual}


PAPERS = "50 steps, as in the paper"
VARIANTS = {
    "ESD-x": variants(models.esd_x(), models.WHOLE_X),
    "ESD-u": variants(models.esd_u(), models.ESD_U),
}
MODELS = [models.original, *(model for found in VARIANTS.values() for model in found.values())]
CONCEPTS = ("star", "heart", "moon")
SEEDS = core.SEEDS
PAIRS = [
    (model.label, found[PAPERS].label)
    for found in VARIANTS.values() for model in found.values() if model != found[PAPERS]
]
FINDINGS = """\
- For 0.06 of the paper's calls, ESD-x leaves as much as with the paper's x_t: 7.2 % each, give or
  take 10 points (more stars, fewer hearts), and the others are seen as often. It takes a gradient
  step at each of the first four steps of a trajectory of eight, half as many in all, with 1.5 times
  the learning rate.
- With ESD-u, as many calls leave 37 %, where the paper's leave 26: nine erasures don't tell these
  apart. A batch of 4 for half of the paper's calls leaves 12 points less than the paper's.
- If the original draws x_t, for the same calls, ESD-u leaves 59 points more and ESD-x 11. Halving
  the iterations, at every step of 8, leaves 34 and 7 more.
- We aimed at the paper's result for .07 of its calls: ESD-x has it, ESD-u doesn't. Weights for each
  t, another way to save steps, weren't tried.
"""


def cells(models, concepts, seeds) -> list[Cell]:
    return core.grid(models, concepts, asks=[by_name, spending], seeds=seeds)


# ---- calls


def calls(settings: dict) -> float:
    """Returns the U-Net calls of an erasure with these settings of `esd.erase`:

    batch * (5 iterations + 2 predictions)

    5 are the target's two, and a forward and a backward pass. Each prediction on the way to
    x_t is for the prompt and the empty one. A trajectory of n used steps takes n - 1
    predictions; where one random step is used, (steps - 1) / 2 on average.
    """
    iterations = settings["iterations"]
    predictions = iterations * (settings["steps"] - 1) / 2
    if settings.get("every_step") or settings["first"]:
        used = settings["first"] or settings["steps"]
        whole, rest = divmod(iterations, used)  # trajectories, and steps of the last one
        predictions = whole * (used - 1) + max(0, rest - 1)
    return settings["batch"] * (5 * iterations + 2 * predictions)


def calls_of(model: Model) -> float | None:
    """Returns the calls of one of ours; another model's aren't known."""
    return calls(model.settings) if model in MODELS and model.method else None


# ---- the table and the figure


def mean_seconds(answers: Answers, model: Model) -> str:
    """Returns the mean over concepts of an erasure's seconds, if there are any."""
    means = [mean_spent(answers, model, concept, "seconds") for concept in CONCEPTS]
    means = [mean for mean in means if mean is not None]
    return f"{sum(means) / len(means):.1f}" if means else ""


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model: calls, and what they buy; then differences."""
    of_paper = calls(VARIANTS["ESD-x"][PAPERS].settings)
    rows = []
    for model in models:
        left = answers.count(model, CONCEPTS, LEFT)
        if not left:
            continue
        number = calls_of(model)
        rows.append([
            model.label,
            str(len(left)),
            "" if number is None else f"{number:,.0f}",
            "" if number is None else f"{number / of_paper:.2f}",
            mean_seconds(answers, model),
            stats.text(left),
            stats.text(answers.count(model, CONCEPTS, OTHERS)),
        ])
    header = [
        "erased by", "erasures", "U-Net calls", "calls / the paper's", "seconds", LEFT.title,
        OTHERS.title,
    ]
    differences = core.table_of_differences(answers, models, PAIRS, CONCEPTS, (LEFT, OTHERS))
    return f"{core.table(header, rows)}\n\n{differences}".strip()


def figure(answers: Answers, models: list[Model]):
    """Returns a row for each way to draw x_t, ESD-x and ESD-u in it; then other models."""
    known = {}
    for name, found in VARIANTS.items():
        known |= {model.label: (way, name) for way, model in found.items()}

    panels = {}
    for column in (LEFT, OTHERS):
        panels[column.title] = panel = {}
        for model in models:
            way, name = known.get(model.label, (model.label, "other models"))
            if shares := answers.count(model, CONCEPTS, column):
                panel.setdefault(way, []).append(figures.Dot(name, shares))
    return figures.dots(panels)
