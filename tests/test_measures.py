"""What experiments measure: guidance's slope, robust's attacks, methods' shares, cost's calls."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

import ddim
import erase
from notebooks.experiments import (
    core,
    cost,
    guidance,
    methods,
    models,
    objects,
    robust,
    stats,
)
from notebooks.experiments.core import Answers, Model, Share
from notebooks.methods import esd
from notebooks.toy import judge as judging
from notebooks.toy import world


def letters_of(names: list[str | None], head: str = "object") -> str:
    """Returns what a judge that sees these would have stored."""
    of_head = (*judging.HEADS[head], None)
    return "".join(core.LETTERS[of_head.index(name)] for name in names)


def answers_of(*answered: tuple[core.Cell, dict]) -> Answers:
    return Answers({cell.key: {"answer": answer} for cell, answer in answered})


# ---- guidance: the slope


class Moved(torch.nn.Module):
    """A made-up U-Net: its eps for each prompt is given."""

    def __init__(self, eps: dict[float, torch.Tensor]):
        super().__init__()
        self.eps = eps  # by the feature
        self.conv_in = torch.nn.Conv2d(1, 1, 1)  # whose device is the model's

    def forward(self, x_t, t, c):
        return self.eps[round(c[0, 0, 0].item(), 6)]


def text(c: float, null: float) -> erase.Text:
    """Returns features that are one number each; a model may have numbers of its own."""
    features = [torch.full((2, 1, 1), value).double() for value in (c, null, c)]
    return erase.Text(*features)


def test_the_slope_is_that_of_the_guidance_law():
    """kappa(g) = m_0 + g (1 + m_c - m_0), along d, whatever moved across it."""
    rng = Generator().manual_seed(0)
    eps_null, eps_c, across_null, across_c, x_t = torch.randn(
        (5, 2, 4, 8, 8), generator=rng, dtype=torch.float64
    )
    d = eps_c - eps_null

    def along_d(eps):
        return ((eps * d).sum() / d.square().sum()).item()

    moved_null = eps_null - 0.4 * d + across_null - along_d(across_null) * d
    moved_c = eps_c - 1.1 * d + across_c - along_d(across_c) * d

    sums = guidance.movement(
        Moved({0.5: moved_c, 0.6: moved_null}), Moved({1.0: eps_c, 0.0: eps_null}),
        x_t, torch.tensor([1, 1]), text=text(0.5, 0.6), text_of_frozen=text(1.0, 0.0),
    )
    law = guidance.law_of([sums])
    assert law == pytest.approx((-1.1, -0.4))
    assert law.slope == pytest.approx(1 - 1.1 + 0.4)
    for scale in (1, 3, 7.5):
        kappa = along_d(ddim.guide(moved_null, moved_c, scale) - eps_null)
        assert kappa == pytest.approx(law.m_0 + scale * law.slope)


def test_the_law_is_of_sums_over_all_x_t():
    moved = [guidance.Movement(-1.0, 0.5, d_squared=1.0), guidance.Movement(-6.0, 0.0, 3.0)]
    assert guidance.law_of(moved) == (-7 / 4, 0.5 / 4)


@pytest.fixture
def context(sd):
    return core.Context(sd, judging.Judge(), "", "", weights=Path("nowhere"), quick=True)


@pytest.mark.robustness  # seconds
def test_the_slope_of_models_whose_movement_is_known(sd, context):
    """The original's is 1; where the concept became the empty prompt, m_c is -1 and it is 0."""
    cell = core.cell_of(models.original, "star", 0, guidance.slope("star"))
    answer = guidance.measure_slope(context, sd, cell)
    assert (answer["m_c"], answer["m_0"], answer["slope"]) == (0, 0, 1)
    assert [*answer["by time"]] == ddim.timesteps(8)

    batches = []

    class Forgetful(torch.nn.Module):
        config = sd.unet.config
        conv_in = sd.unet.conv_in

        def forward(self, x_t, t, c):
            batches.append(len(x_t))
            return sd.unet(x_t, t, sd.encode([""]).expand_as(c))

    answer = guidance.measure_slope(context, replace(sd, unet=Forgetful()), cell)
    assert answer["m_c"] == pytest.approx(-1, abs=1e-5)
    assert answer["m_0"] == 0
    assert answer["slope"] == pytest.approx(0, abs=1e-5)
    # it draws four trajectories of 8 steps itself, with guidance; then both predictions
    assert (batches.count(8), batches.count(4)) == (4 * 7, 4 * 8 * 2)


def test_every_guidance_is_asked_and_the_usual_one_is_the_model_itself():
    mine = Model("mine", esd.erase)
    cells = guidance.cells([models.original, mine], ["star", "dots"], [0])
    assert guidance.at(mine, 5) == mine
    found = {}
    for cell in cells:
        if cell.model.label.startswith("mine"):
            scale = cell.model.sampling.get("guidance", 5)
            found.setdefault((cell.concepts, scale), []).append(cell.ask.name)
    own = ["star in its own prompts"]
    assert found[("star",), 1] == found[("star",), 2] == found[("star",), 7.5] == own
    assert found[("star",), 10] == [*own, "by name"]
    assert found[("star",), 5] == [*own, "by name", "slope of star"]
    assert found[("dots",), 10] == ["dots in its own prompts", "in styles"]
    assert sum("slope" in cell.ask.name for cell in cells) == 2  # the original has none


@pytest.mark.parametrize(
    "low, high, comes_back",
    [(0, 0, False), (0, 2, False), (0, 3, True), (3, 4, False), (10, 10, False)],
)
def test_what_comes_back(low, high, comes_back):
    """Of 20 images: more than 10 % at g 10, and more than 5 points more than at g 1."""
    mine = Model("mine", esd.erase)
    answered = []
    for scale, hits in ((1, low), (10, high)):
        cell = core.cell_of(guidance.at(mine, scale), "star", 0, guidance.own_prompts("star"))
        answered.append((cell, {"object": letters_of(["star"] * hits + [None] * (20 - hits))}))
    cell = core.cell_of(mine, "star", 0, guidance.slope("star"))
    answers = answers_of(*answered, (cell, {"m_c": -1.2, "m_0": -0.5}))

    (erasure,) = guidance.erasures(answers, [mine])
    assert erasure == ("mine", guidance.Law(-1.2, -0.5), low / 20, high / 20)
    assert erasure.comes_back == comes_back
    assert erasure.law.slope == pytest.approx(0.3)
    assert erasure.law.kappa(10) == pytest.approx(2.5)
    table = guidance.table(answers, [mine])
    rules = [line for line in table.splitlines() if line.startswith(("| slope", "| kappa"))]
    share = "100.0" if comes_back else "0.0"  # both rules say that it comes back
    assert [line.split("|")[2].split()[0] for line in rules] == [share, share]
    assert f"| {5 * high}.0 (" in table
    assert "all: right for 1, %" in table and "mine: right for 1, %" in table
    (nothing,) = guidance.times_seen(answers, mine, "star", 10, None).values()
    assert nothing == (20 - high, 20)
    header = "none of the ten is seen, erased by"
    assert header in table and stats.text([nothing]) in table.partition(header)[2]


def test_kappa_ranks_erasures_by_what_is_left():
    """Of three erasures, the two with the larger slope leave more, in the opposite order."""
    mine = Model("mine", esd.erase)
    answered = []
    for seed, (hits, m_c) in enumerate([(0, -1.4), (9, -1.2), (5, -1.1)]):
        for scale, seen in ((1, 0), (10, hits)):
            own = guidance.own_prompts("star")
            cell = core.cell_of(guidance.at(mine, scale), "star", seed, own)
            answered.append((cell, {"object": letters_of(["star"] * seen + [None] * (20 - seen))}))
        cell = core.cell_of(mine, "star", seed, guidance.slope("star"))
        answered.append((cell, {"m_c": m_c, "m_0": -0.5}))
    answers = answers_of(*answered)
    assert "| mine | 3 | 0.33 |" in guidance.table_of_ranks(answers, [mine])
    assert guidance.table_of_ranks(Answers({}), [mine]) == ""


# ---- robust: the hard prompt, the noise


def test_the_search_for_a_hard_prompt_finds_what_drawing_all_would():
    rng = random.Random(0)
    saved = 0
    for trial in range(300):
        chance = rng.choice((0, 0.1, 0.3, 0.6))
        shown = {f"p{i}": [rng.random() < chance for _ in range(4)] for i in range(60)}
        drawn = []

        def count(prompts, seeds):
            drawn.extend(itertools.product(prompts, seeds))
            return [sum(shown[prompt][seed] for seed in seeds) for prompt in prompts]

        scores = robust.best_score([*shown], count)
        full = [sum(each) for each in shown.values()]
        assert max(scores) == max(full)
        assert scores.index(max(scores)) == full.index(max(full))
        assert len(drawn) == len({*drawn})
        saved += 240 - len(drawn)
    assert saved > 300 * 40


def test_a_hard_prompt_is_sought_until_all_images_show_the_concept():
    worth = {"a star": 0, "sea a star": 1, "badge a star": 3, "sea badge a star": 4}
    asked = []

    def count(prompts, seeds):
        asked.extend(prompts)
        return [sum(seed < worth.get(prompt, 0) for seed in seeds) for prompt in prompts]

    assert robust.hard_prompt("a star", ["sea", "badge"], count) == "sea badge a star"
    asked.clear()
    assert robust.hard_prompt("sea badge a star", ["sea", "badge"], count) == "sea badge a star"
    assert {*asked} == {"sea badge a star"}


def test_what_has_led_to_the_concept_is_counted():
    digits = robust.to_digits([True, False, True, False, False])
    answer = attacked(1, {}) | {"noise": digits}
    assert robust.shares({0: answer}, "star", "noise") == [(2, 5)]


def attacked(by_name: int, relearned: dict[int, int], noise: str = "0" * 20) -> dict:
    """Returns an answer with 20 images each, so many of stars."""
    def letters(hits):
        return letters_of(["star"] * hits + ["moon"] * (20 - hits))

    return {
        "seen": {"by name": letters(by_name), "g 10": letters(2)},
        "noise": noise,
        "relearned": {str(stop): letters(hits) for stop, hits in relearned.items()},
    }


def test_the_table_of_attacks_with_and_without_a_retrained_model():
    mine = Model("mine", esd.erase)
    cells = [core.cell_of(m, "star", 0, robust.attacks_on("star"))
             for m in (robust.ORIGINAL, mine, robust.NEVER_SAW)]
    answers = [
        attacked(20, {20: 20, 40: 20}), attacked(0, {20: 9, 40: 16}, "1" * 5 + "0" * 15),
        attacked(0, {20: 0, 40: 0}),
    ]
    both = [robust.ORIGINAL, mine, robust.NEVER_SAW]

    table = robust.table(answers_of(*zip(cells[:2], answers)), both).splitlines()
    assert len(table) == 4
    row = [cell.strip() for cell in table[3].strip("|").split("|")]
    assert row[:4] == ["star", "mine", "1", "0.0 (0 to 16)"]
    assert row[6].startswith("25.0 (") and row[9].startswith("10.0 (")
    assert [cell.split()[0] for cell in row[10:]] == ["45.0", "80.0"]

    table = robust.table(answers_of(*zip(cells, answers)), both).splitlines()
    never = [cell.strip() for cell in table[4].strip("|").split("|")]
    assert [cell.split()[0] for cell in never[10:]] == ["0.0", "0.0"]


# ---- methods: the measures


def seen_by(ask: core.Ask, erased: str) -> dict[str, str]:
    """Returns the answer of a model that shows nothing where it is asked for the concept."""
    found = {head: [] for head in judging.HEADS}
    for wanted in core.wanted_by(ask.questions()):
        for head, several in found.items():
            several.append(None if erased in wanted.values() else wanted.get(head))
    return {head: letters_of(several, head) for head, several in found.items()}


@pytest.mark.parametrize("concept", ["star", "mosaic"])
def test_the_measures_of_an_erasure_that_harms_nothing(concept):
    mine = Model("mine", esd.erase)
    cells = methods.cells([mine], [concept], [0, 1])
    answered = []
    for cell in cells:
        spent = {"seconds": 10.0 + cell.seed, "parameters": 2000}
        answer = seen_by(cell.ask, concept) if cell.ask.questions else spent
        answered.append((cell, answer))
    answers = answers_of(*answered)

    measures = methods.measured(answers, mine, concept)
    is_object = concept in world.OBJECTS
    assert measures.ua == [Share(20, 20)] * 2
    assert measures.ira == [Share(180, 180) if is_object else Share(80, 80)] * 2
    assert measures.cra == [Share(90, 90) if is_object else Share(200, 200)] * 2
    assert measures.in_contexts == ([Share(10, 10)] * 2 if is_object else [])
    assert len(measures.in_scenes) == (2 if is_object else 0)
    assert measures.harmonic() == [100, 100]

    several = methods.Measures([Share(1, 20), Share(19, 20)], [], [], *[[Share(1, 1)] * 2] * 2)
    assert stats.number(several.harmonic(), within=stats.PERCENT).endswith(" (0.0 to 100.0)")
    line = methods.table(answers, [models.original, mine]).splitlines()[2]
    assert line.startswith(f"| {concept} | mine | 100.0 | 1 |")
    assert line.endswith("| 10.5 | 2 |")


def test_measures_are_of_the_seeds_that_answer_all():
    """A run that was interrupted has an answer more for one ask than for another."""
    mine = Model("mine", esd.erase)
    answered = []
    for cell in methods.cells([mine], ["star"], [0, 1]):
        if cell.ask.questions and (cell.seed, cell.ask) != (0, core.in_styles):
            answered.append((cell, seen_by(cell.ask, "star")))
    measures = methods.measured(answers_of(*answered), mine, "star")
    assert [len(several) for several in measures] == [1] * 5


def test_the_harmonic_mean_and_what_is_kept():
    measures = methods.Measures([Share(1, 2)], [], [], ira=[Share(1, 1)], cra=[Share(30, 99)])
    assert measures.harmonic() == [pytest.approx(300 / (2 + 1 + 3.3))]
    assert measures.kept() == [Share(round((1 + 30 / 99) / 2 * 100), 100)]


def test_mcnemars_p_is_against_esd_x_on_all_seeds_of_both():
    mine = Model("mine", esd.erase)
    stars = [wanted["object"] == "star" for wanted in core.wanted_by(core.objects())]
    answered = []
    for model, hits, seeds in ((models.esd_x(), 0, (0, 1)), (mine, 4, (0, 1, 2))):
        names = iter(["star"] * hits + ["moon"] * (20 - hits))
        seen = letters_of([next(names) if each else "ring" for each in stars])
        for seed in seeds:
            cell = core.cell_of(model, "star", seed, core.by_name)
            answered.append((cell, {head: "a" * 200 for head in judging.HEADS} | {"object": seen}))
    answers = answers_of(*answered)
    assert methods.against_baseline(answers, mine, "star") == "0.008"  # 2 / 2^8
    assert methods.against_baseline(answers, models.esd_x(), "star") == ""


# ---- cost: calls


def test_an_image_of_the_original_counts_once():
    """It is one of "the others" for nine of ten objects."""
    right = seen_by(core.by_name, erased="")
    cells = [core.cell_of(models.original, "star", seed, core.by_name) for seed in (0, 1)]
    answers = answers_of(*((cell, right) for cell in cells))
    for shares in (
        answers.count(models.original, world.OBJECTS, objects.OTHERS),
        guidance.all_kept(answers, models.original, world.OBJECTS, guidance=5),
        answers.count(models.original, cost.CONCEPTS, cost.OTHERS),
    ):
        assert len(shares) == 2  # one for each seed


def test_calls_are_known_of_our_models_only():
    assert cost.calls_of(models.esd_x()) == 4 * (5 * 80 + 2 * 20 * 3)
    assert cost.calls_of(models.original) is None
    assert cost.calls_of(Model("mine", esd.erase, {"lr": 1e-4})) is None


def counted_calls(sd, settings: dict) -> int:
    """Returns what the U-Net is called with in an erasure; each step's backward pass is two."""
    latents = []
    hook = sd.unet.register_forward_pre_hook(lambda _, inputs: latents.append(len(inputs[0])))
    try:
        esd.erase(sd, {"star": ""}, **settings)
    finally:
        hook.remove()
    return sum(latents) + 2 * settings["iterations"] * settings["batch"]


@pytest.mark.robustness  # seconds
@pytest.mark.parametrize("settings", [
    {"steps": 4, "every_step": True, "iterations": 8, "first": None, "batch": 1},
    {"steps": 4, "every_step": True, "iterations": 6, "first": None, "batch": 2},
    {"steps": 4, "every_step": True, "iterations": 5, "first": None, "batch": 1},
    {"steps": 4, "every_step": True, "iterations": 7, "batch": 1, "first": 3},
    {"steps": 4, "every_step": True, "iterations": 3, "batch": 1, "first": 1},
    {"steps": 4, "every_step": True, "iterations": 6, "batch": 1, "x_t": "frozen", "first": 2},
])
def test_calls_with_every_step_are_exact(sd, settings):
    assert cost.calls(settings) == counted_calls(sd, settings)


@pytest.mark.robustness  # seconds
def test_calls_with_random_times_are_the_mean(sd):
    settings = {"steps": 3, "every_step": False, "first": None, "iterations": 60, "batch": 1}
    assert cost.calls(settings) == 60 * (5 + 2)
    assert counted_calls(sd, settings) == pytest.approx(cost.calls(settings), abs=40)
    assert cost.calls(cost.MODELS[1].settings) == 160 * 54
