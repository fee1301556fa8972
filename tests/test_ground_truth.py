"""Distances of models, their null, the verdict, and what patches of weights do."""

import itertools
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

import ddim
import erase
import sample
from notebooks.experiments import (
    checksums,
    core,
    ground_truth,
    layers,
    methods,
    models,
    replicates,
    robust,
    run,
    stats,
    verdict,
)
from notebooks.experiments.core import Answers, Model, Reference
from notebooks.experiments.stats import Share
from notebooks.methods import distances, esd
from notebooks.toy import judge as judging
from notebooks.toy import world

mine = Model("mine", esd.erase)


def letters_of(names: list[str | None]) -> str:
    """Returns what a judge that sees these objects would have stored."""
    heads = (*judging.HEADS["object"], None)
    return "".join(core.LETTERS[heads.index(name)] for name in names)


def seen(hits: int, asked: int = 20) -> str:
    """Returns letters for so many stars, and moons."""
    return letters_of(["star"] * hits + ["moon"] * (asked - hits))


def answers_of(*answered: tuple[core.Cell, dict]) -> Answers:
    return Answers({cell.key: {"answer": answer} for cell, answer in answered})


# ---- distances


class Gaussian(torch.nn.Module):
    """Predicts the exact eps for latents that are N(mean, spread^2 I)."""

    def __init__(self, mean: float | torch.Tensor, spread: float):
        super().__init__()
        self.mean = mean
        self.spread = spread
        self.conv_in = torch.nn.Conv2d(1, 1, 1)  # whose device is the model's
        self.config = None

    def forward(self, x_t, t, text):
        abar = ddim.alphas_cumprod()[t].reshape(-1, 1, 1, 1)
        variance = abar * self.spread**2 + 1 - abar
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * self.mean) / variance


def gaussian(sd, mean: float | torch.Tensor, spread: float = 1.0) -> sample.StableDiffusion:
    unet = Gaussian(mean, spread)
    unet.config = sd.unet.config
    return replace(sd, unet=unet)


def test_eps_distances_are_those_of_equal_x_t(sd):
    x_0 = torch.randn((3, *sd.latent_shape), generator=Generator().manual_seed(0))
    signs = torch.tensor([1.0, -1.0]).repeat(x_0.shape[-1] // 2)  # they would cancel in a mean
    one, other = gaussian(sd, 0.0), gaussian(sd, 0.5 * signs)
    found = distances.eps_distances(one, other, "a star", x_0)
    abar = ddim.alphas_cumprod()[list(distances.TIMES)]
    expected = 0.5 * (abar * (1 - abar)).sqrt()  # with variance 1, eps differ by this everywhere
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert distances.eps_distances(sd, sd, "a star", x_0) == [0] * 5
    assert distances.eps_distances(one, other, "a star", x_0) == found


@pytest.mark.parametrize("spread", [1.0, 0.5])
def test_fade_is_the_divergence_of_gaussians(sd, spread):
    """KL(p, q) + KL(q, p) = |mean_p - mean_q|^2 / spread^2, summed over a latent's values.

    DDIM's first x_t should hold 9 % of the mean, and starts from noise without any: so images
    lie a little nearer to 0 than they should.
    """
    values = math.prod(sd.latent_shape)
    one, other = gaussian(sd, 0.0, spread), gaussian(sd, 0.3, spread)
    expected = values * 0.3**2 / spread**2
    own, others = (distances.own_images(each, "a star", num=512) for each in (one, other))
    ways = distances.fade(own, others)
    assert ways.shape == (2, 20)
    assert ways[0].sum().item() == pytest.approx(expected / 2, rel=0.05)  # images around 0
    assert ways.sum().item() == pytest.approx(expected, rel=0.12)
    assert torch.equal(distances.fade(others, own), ways.flip(0))
    assert (distances.fade(own, own) == 0).all()


def test_surprise_differs_as_log_likelihoods_do(sd):
    """For one image: log p - log q of two Gaussians, in nats."""
    x_0 = torch.full((1, *sd.latent_shape), 0.2)
    one, other = gaussian(sd, 0.0), gaussian(sd, 1.0)
    values = math.prod(sd.latent_shape)
    expected = values * (0.8**2 - 0.2**2) / 2
    by_seed = []
    for seed in range(20):
        both = [distances.surprise(each, "a star", x_0, seed=seed) for each in (other, one)]
        by_seed.append((both[0] - both[1]).sum().item())
    assert statistics.fmean(by_seed) == pytest.approx(expected, rel=0.05)


# ---- statistics


def test_below_is_a_prediction_limit():
    assert stats.below([1.0]) == math.inf
    assert stats.below([2.0, 2.0, 2.0]) == 2.0
    # 1, 2, 3: mean 2, s 1, t(2 degrees, one-sided 95 %) = 2.920
    assert stats.below([1.0, 2.0, 3.0]) == pytest.approx(2 + 2.920 * math.sqrt(4 / 3))
    generator = Generator().manual_seed(0)
    draws = torch.randn(4000, 8, generator=generator).tolist()
    covered = [d[5] < stats.below(d[:5]) for d in draws]
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("freedom", [*range(1, 31), 31, 40, 60, 300])
def test_95_percent_lie_below_the_one_sided_t(freedom):
    """Student's density, integrated."""
    values = [float(i % 3) for i in range(freedom + 1)]
    t = np.linspace(0, stats.half_width([values]) / statistics.stdev(values), 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(log_scale) / math.sqrt(freedom * math.pi)
    density = density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + np.trapezoid(density, t) == pytest.approx(0.95, abs=3e-4)


def test_half_width_is_of_the_deviation_within_groups():
    """1, 2, 3 and 11, 12, 13: s is 1 with 4 degrees of freedom, t(one-sided 95 %) = 2.132."""
    assert stats.half_width([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]]) == pytest.approx(2.132)
    assert stats.half_width([[1.0, 3.0], [5.0], []]) == pytest.approx(6.314 * math.sqrt(2))
    assert stats.half_width([[1.0], [2.0], []]) == math.inf


def test_the_interval_of_a_difference_covers():
    """Of erasures that vary, less never-saw models that vary, with 20 images each."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1500):
        shares = []
        for mean, num in ((0.5, 9), (0.2, 6)):
            p = rng.normal(mean, 0.1, num).clip(0, 1)
            shares.append([Share(int(hits), 20) for hits in rng.binomial(20, p)])
        _, low, high = stats.difference(*shares)
        covered.append(low < 30 < high)
    assert 0.94 < statistics.fmean(covered) < 0.985
    none = [Share(0, 20)] * 3
    mean, low, high = stats.difference(none, none)
    assert mean == 0 and low == -high == pytest.approx(-6.0, abs=0.1)  # images alone leave so much
    assert stats.show(stats.difference([], none)) == ""
    assert stats.show(stats.Estimate(20.0, -0.3, 41.6)) == "20.0 (0 to 42)"


def test_kendalls_tau():
    """The first example of Kendall's book (1948): ten boys, two subjects; 21 of 45 pairs agree."""
    mathematics = [7, 4, 3, 10, 6, 2, 9, 8, 1, 5]
    music = [5, 7, 3, 10, 1, 9, 6, 2, 8, 4]
    assert stats.kendall(mathematics, music) == pytest.approx((21 - 24) / 45)
    assert stats.kendall([1, 2, 3], [1, 2, 3]) == 1
    assert stats.kendall([1, 2, 3], [6, 5, 4]) == -1
    # with ties, tau-b: two of the three pairs are untied in one, all in the other
    assert stats.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert stats.kendall([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(stats.kendall([1, 1], [1, 2]))


# ---- ground truth


def test_pairs_of_the_null_differ_in_the_seed_alone_and_come_once():
    pairs = []
    for several in (ground_truth.NEVER, ground_truth.ORIGINALS):
        pairs += ground_truth.pairs_among("star", several)
    assert len(pairs) == 1 + 3
    assert len({frozenset((pair.one.name, pair.other.name)) for pair in pairs}) == len(pairs)
    for pair in pairs:
        trained_on = [each.model == models.never_saw for each in (pair.one, pair.other)]
        assert trained_on[0] == trained_on[1]
        assert pair.other in ground_truth.compared_with(*pair.one)
    first = ground_truth.NEVER[:1]
    assert [ground_truth.compared_with(models.never_saw, i) for i in (0, 1)] == [[], first]
    assert ground_truth.compared_with(mine, 2) == ground_truth.NEVER


def test_every_pair_of_the_tables_is_asked():
    cells = ground_truth.cells(ground_truth.MODELS, ["star"], core.SEEDS)
    asked = {cell.key for cell in cells}
    for several in (ground_truth.NEVER, ground_truth.ORIGINALS):
        for pair in ground_truth.pairs_among("star", several):
            ask = ground_truth.distance("star", pair.other)
            assert core.cell_of(pair.one.model, "star", pair.one.seed, ask).key in asked
    trained = {(cell.model.label, cell.seed) for cell in cells if cell.model.folder}
    assert trained == {
        ("never saw it", 0), ("never saw it", 1),
        ("original, trained again", 1), ("original, trained again", 2),
    }
    # the same weights with every seed
    for model in (models.original, models.uce_, models.rece_, models.speed_):
        assert {cell.seed for cell in cells if cell.model == model} == {0}
    of_never = {cell.ask.name for cell in cells if cell.model == models.never_saw}
    assert {ask.name for ask in (core.by_name, core.in_styles, core.in_contexts)} < of_never
    assert methods.spending.name not in of_never  # of what it took to erase


@pytest.mark.parametrize("model", models.closed_forms, ids=lambda model: model.label)
def test_closed_forms_dont_depend_on_the_seed(model, sd):
    thetas = [
        model.method(sd, {"star": "a picture"}, keep=["moon"], seed=seed, **model.settings)
        for seed in (0, 1)
    ]
    assert all(torch.equal(W, thetas[1][name]) for name, W in thetas[0].items())


def made_up() -> Answers:
    """Returns answers with known distances of eps.

    0.1 between models that never saw a star, 0.2 for a heart; 0.05 and 0.1 between originals;
    mine 0.2 and 0.4 from the first.
    """
    answered = []

    def add(model, seed, stars, eps, concept="star"):
        ask = ground_truth.portrait(concept)
        looks = {"object": seen(stars, 50), "style": "a" * 50}
        answered.append((core.cell_of(model, concept, seed, ask), looks))
        for against in ground_truth.compared_with(model, seed):
            ask = ground_truth.distance(concept, against)
            distance = {"eps": [eps, eps], "FADE": [[4 * eps, eps], [2 * eps, 3 * eps]]}
            answered.append((core.cell_of(model, concept, seed, ask), distance))

    add(core.original, 0, stars=50, eps=0.3)
    for seed, eps in zip(models.again.seeds, (0.05, 0.1)):
        add(models.again, seed, stars=50, eps=eps)
    for seed in models.never_saw.seeds:
        add(models.never_saw, seed, stars=0, eps=0.1)
        add(models.never_saw, seed, stars=0, eps=0.2, concept="heart")
        add(models.never_saw, seed, stars=seed, eps=0.2, concept="mosaic")
    add(mine, 0, stars=5, eps=0.2)
    add(mine, 1, stars=10, eps=0.4)
    add(mine, 0, stars=0, eps=0.2, concept="heart")
    return answers_of(*answered)


def test_an_erasure_is_one_value_however_many_it_is_compared_with():
    answers = made_up()
    of_mine = ground_truth.of_erasures(answers, mine, "star", name="eps")
    assert of_mine == pytest.approx([0.2, 0.4])
    by_name = ground_truth.of_erasures(answers, mine, "star", name="by name")
    assert by_name == pytest.approx([0.1, 0.2])  # 5 and 10 of 50 stars against none
    fade = ground_truth.of_erasures(answers, mine, "star", name="FADE, nats")
    assert fade == pytest.approx([2, 4])  # all terms, both ways
    of_originals = ground_truth.of_erasures(answers, core.original, "star", name="eps")
    assert of_originals == pytest.approx([0.3, 0.05, 0.1])


def test_the_unit_is_the_null_of_the_same_concept():
    answers = made_up()
    assert ground_truth.null(answers, "eps", "star") == pytest.approx([0.1])  # no originals
    assert ground_truth.in_units(answers, mine, "star", name="eps") == pytest.approx([2, 4])
    assert ground_truth.in_units(answers, mine, "heart", name="eps") == pytest.approx([1])
    assert ground_truth.in_units(answers, mine, "mosaic", name="eps") == []


def test_the_limit_is_of_how_originals_vary():
    """Log distances .05, .1, .1: s with 2 degrees of freedom, t 2.920."""
    answers = made_up()
    logs = [math.log(0.05), math.log(0.1), math.log(0.1)]
    expected = math.exp(2.920 * statistics.stdev(logs) * math.sqrt(2))
    assert ground_truth.limit(answers, "eps") == pytest.approx(expected)
    assert ground_truth.is_within(answers, mine, "star", "eps")
    assert ground_truth.is_within(answers, mine, "mosaic", "eps") is None
    # of total variations: 0, 0 and, for mosaic, 0 again: no style was seen
    assert ground_truth.limit(answers, "by name") == 0
    assert not ground_truth.is_within(answers, mine, "star", "by name")
    assert ground_truth.limit(answers, "in scenes") == math.inf


def test_a_limit_above_all_total_variations_is_none(monkeypatch):
    """From three pairs that differ much, it is 1.04: everything would be within the null."""
    nulls = {"star": [0.5], "heart": [0.16], "mosaic": [0.04]}
    monkeypatch.setattr(ground_truth, "null", lambda answers, name, concept: nulls[concept])
    assert stats.below([0.5, 0.16, 0.04]) > 1
    assert ground_truth.limit(made_up(), "by name") == math.inf
    assert ground_truth.is_within(made_up(), mine, "star", "by name") is None


def test_scenes_are_compared_between_unequal_seeds_alone():
    """Images of equal seeds start from equal noises."""
    num = len(core.wanted_by(core.scenes()))
    letters = {"object": seen(0, num), "style": "a" * num, "colour": "a" * num}
    cells = [core.cell_of(models.never_saw, "star", seed, core.in_scenes) for seed in (0, 1)]
    answers = answers_of(*((cell, letters) for cell in cells))
    zero, one = ground_truth.NEVER
    assert ground_truth.variation_in_scenes(answers, ground_truth.Pair("star", one, zero)) == 0
    assert ground_truth.variation_in_scenes(answers, ground_truth.Pair("star", one, one)) is None


def test_all_models_portraits_start_from_the_same_noises(monkeypatch):
    drawn = []
    monkeypatch.setattr(core, "to_letters", lambda judge, images: {})
    context = core.Context(None, judge=None, base="", judged_by="", weights=None, quick=False)
    monkeypatch.setattr(
        core.Context, "draw", lambda self, sd, cell, prompts: drawn.append((cell.seed, prompts))
    )
    for model, seed in ((mine, 2), (models.never_saw, 1)):
        cell = core.cell_of(model, "star", seed, ground_truth.portrait("star"))
        ground_truth.draw_fifty(context, None, cell)
    assert drawn == [(0, ["a star"] * 50)] * 2


@pytest.mark.robustness  # seconds
def test_the_distance_is_that_of_the_model_and_the_trained_one(sd, monkeypatch):
    weights = {n: 1.1 * W for n, W in sample.unet_tensors(sd).items() if "attn2.to_v" in n}
    trained = sample.with_weights(sd, weights)
    loaded = []
    monkeypatch.setattr(core, "load_trained", lambda folder: loaded.append(folder) or trained)
    context = core.Context(sd, judge=None, base="", judged_by="", weights=None, quick=True)
    ask = ground_truth.distance("star", Reference(models.never_saw, 1))
    cell = core.cell_of(core.original, "star", 0, ask)

    found = ground_truth.measure_distances(context, sd, cell)
    assert loaded == ["runs/never_saw/star_1/model"]
    x_0 = sd.encode_images(ground_truth.rendered("star", context.num(8)))
    assert found["eps"] == distances.eps_distances(sd, trained, "a star", x_0)
    assert min(found["eps"]) > 0
    one, other = np.array(found["FADE"])
    assert len(one) == len(other) == 20 and one.any() and other.any()

    found = ground_truth.measure_distances(context, trained, cell)
    assert found == {"eps": [0] * 5, "FADE": [[0] * 20] * 2}


def test_the_table_says_which_distances_are_within_the_null():
    table = ground_truth.table(made_up(), [core.original, mine, models.again, models.never_saw])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    by_label = {row[1]: row for row in rows[2:] if row[0] in ("star", "all")}
    assert by_label["mine"][3] == "0.300 (0.000 to 1.571)"
    assert by_label["mine"][4].startswith("3.00 (")
    assert by_label["mine"][-1] == "eps, FADE"
    assert by_label["*between two that never saw it*"][3:5] == ["0.100", "1.00"]
    assert by_label["*between two originals*"][4].startswith("0.83 (")
    assert by_label["*limit of the null*"][4] == f"{ground_truth.limit(made_up(), 'eps'):.2f}"
    assert "never saw it" not in by_label
    assert "original, trained again" not in by_label


def test_the_null_is_in_the_figure():
    of_models = [core.original, mine, models.again, models.never_saw]
    rows = ground_truth.in_figure(made_up(), of_models, "eps")
    assert [row for row in rows if "star" in row] == [
        "original, star", "mine, star", "between two that never saw it, star",
        "between two originals, star",
    ]
    assert rows["between two that never saw it, star"] == [1.0]
    assert rows["mine, star"] == ground_truth.in_units(made_up(), mine, "star", "eps")
    by_name = ground_truth.in_figure(made_up(), of_models, "by name")
    assert all(0 <= value <= 1 for several in by_name.values() for value in several)


def test_what_is_seen_instead_is_counted():
    looks = {"object": letters_of([None, "moon", "arrow", None]), "style": "a" * 4}
    cell = core.cell_of(models.never_saw, "star", 1, ground_truth.portrait("star"))
    line = 'never saw it 1: 50 % of its images of "a star" show none of the kind.'
    assert ground_truth.lines_of_nothing(answers_of((cell, looks))) == [line]


def test_intervals_hold_possible_distances_alone():
    assert ground_truth.distance_text([0.1, 0.9], "in scenes") == "0.500 (0.000 to 1.000)"
    assert ground_truth.distance_text([0.1, 0.9], "eps") == "0.500 (0.000 to 5.582)"
    assert ground_truth.distance_text([99.6, 200.4], "FADE, nats") == "150 (0 to 790)"
    assert ground_truth.distance_text([0.1], "eps") == "0.100"
    assert ground_truth.units_text([0.1, 0.9]) == "0.50 (0.00 to 5.58)"


def test_without_trained_models_the_table_has_no_unit():
    ask = ground_truth.portrait("star")
    answers = answers_of((core.cell_of(mine, "star", 0, ask), {"object": seen(3, 50)}))
    assert len(ground_truth.table(answers, [core.original, mine]).splitlines()) == 2


def test_rendered_images_show_the_concept_and_are_always_the_same():
    first, again = (ground_truth.rendered("star", 2) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    judge = judging.load(core.TOY)
    assert [look["object"] for look in judging.read(judge, first)] == ["star", "star"]
    mosaic = ground_truth.rendered("mosaic", 8)
    assert {look["style"] for look in judging.read(judge, mosaic)} == {"mosaic"}
    rng = np.random.default_rng(0)
    examples = [world.draw(rng) for _ in range(200)]
    works = {example.image.tobytes() for example in examples if example.work}
    assert works and works.isdisjoint(image.tobytes() for image in mosaic)


# ---- the verdict


def attacks(by_name: int, words: int, training: int) -> dict:
    """Returns an answer of robust.py with so many stars of 20."""
    found = {attack: seen(0) for attack in robust.ATTACKS if attack != "noise"}
    found |= {"by name": seen(by_name), "learned words": seen(words)}
    return {"seen": found, "noise": "0" * 20, "relearned": {"20": seen(training)}}


def test_recovery_is_net_of_what_an_attack_teaches():
    ask = robust.attacks_on("star")
    answers = answers_of(
        (core.cell_of(mine, "star", 0, ask), attacks(1, words=12, training=16)),
        (core.cell_of(models.never_saw, "star", 0, ask), attacks(0, words=2, training=10)),
        (core.cell_of(models.never_saw, "star", 1, ask), attacks(0, words=4, training=10)),
        # without a model that never saw a heart, this can't be net
        (core.cell_of(mine, "heart", 0, robust.attacks_on("heart")),
         attacks(0, words=0, training=0)),
    )
    erasure = verdict.Erasure(mine, "star", 0)
    assert verdict.net(answers, erasure, "learned words") == pytest.approx(0.6 - 0.15)
    assert verdict.net(answers, erasure, "20") == pytest.approx(0.3)
    assert verdict.net(answers, erasure._replace(seed=1), "20") is None
    assert verdict.score(answers, erasure) is None  # nothing is known of the others
    row = verdict.row(answers, mine, ("star",))
    titles = [*verdict.SHARES, *verdict.ATTACKS]
    net = stats.show(robust.net(answers, mine, ["star"], "learned words"))
    assert row[titles.index("learned words")] == net and net.startswith("45.0 (")
    assert robust.net(answers, mine, ["star", "heart"], "learned words").mean == pytest.approx(45)
    assert "| star | mine | 1 | 5.0 (" in robust.table(answers, [mine, models.never_saw])
    assert "| star | never saw it | 2 | 0.0 (" in robust.table(answers, [mine, models.never_saw])
    assert row[titles.index("at g 10")] == "0.0 (0 to 16)"  # of robust.py's images
    assert row[titles.index("by name")] == ""


def test_a_closed_form_is_one_model_whatever_the_seed():
    found = []
    for model in (mine, models.uce_, core.original):
        answers = []
        for concept, seed in itertools.product(("star", "heart"), (0, 1)):
            ask = robust.attacks_on(concept)
            cell = core.cell_of(model, concept, seed, ask)
            answers.append((cell, attacks(1, words=12, training=16)))
        found.append(robust.num_models(answers_of(*answers), model, ("star", "heart")))
    assert found == [4, 2, 1]


def test_the_main_readme_has_rows_of_the_verdict():
    """Rounded, and without intervals."""
    answers = run.stored("verdict")
    by_label = {"the original": models.original}
    by_label |= {model.label: model for model in models.compared}
    columns = {"by name": "by name", "learned words": "learned words", "hard prompt": "hard prompt",
               "20 training steps": "training", "others right": "kept"}
    titles = [*verdict.SHARES, *verdict.ATTACKS]
    page = (Path(__file__).parents[1] / "README.md").read_text()
    _, _, table = page.partition(f"| | {' | '.join(columns)} |\n")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert len(rows) == 6
    for label, *numbers in rows:
        model = by_label[re.sub(r"\[(.*)\]\(.*\)", r"\1", label)]
        cells = verdict.row(answers, model, verdict.CONCEPTS)
        expected = [cells[titles.index(title)].partition(" ")[0] for title in columns.values()]
        assert numbers == [f"{float(value):.0f}" for value in expected], label


def test_a_model_that_knows_of_no_concept_has_one_share_a_seed(monkeypatch):
    """Its images are the same for all concepts: three concepts aren't three times as many."""
    monkeypatch.setitem(verdict.SHARES, "kept", lambda answers, each: Share(each.seed, 10))
    several = verdict.erasures(core.original, ("star", "heart"), seeds=(1, 2))
    assert verdict.shares(Answers({}), several, "kept") == [(2, 20), (4, 20)]
    several = verdict.erasures(mine, ("star", "heart"), seeds=(1, 2))
    assert len(verdict.shares(Answers({}), several, "kept")) == 4


def test_the_score_is_a_harmonic_mean(monkeypatch):
    monkeypatch.setattr(verdict, "seen_by_name", lambda answers, erasure: Share(1, 10))
    monkeypatch.setattr(verdict, "kept", lambda answers, erasure: Share(9, 10))
    monkeypatch.setattr(verdict, "seen_in_contexts", lambda answers, erasure: None)
    brought = {"learned words": 0.4, "20": 1.0}  # training doesn't count
    monkeypatch.setattr(verdict, "net", lambda answers, erasure, attack: brought.get(attack, -0.1))
    score = verdict.score(Answers({}), verdict.Erasure(mine, "star", 0))
    assert score == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.9))
    monkeypatch.setattr(verdict, "seen_in_contexts", lambda answers, erasure: Share(2, 10))
    score = verdict.score(Answers({}), verdict.Erasure(mine, "star", 0))
    assert score == pytest.approx(4 / (1 / 0.9 + 1 / 0.6 + 1 / 0.9 + 1 / 0.8))


def test_the_best_score_has_the_first_rank(monkeypatch):
    values = {"mine": 0.5, "other": 0.9, "third": 0.5}
    monkeypatch.setattr(verdict, "score", lambda answers, each: values.get(each.model.label))
    rivals = [mine._replace(label=label) for label in values]
    ranks = {}
    for line in verdict.table(Answers({}), rivals).splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "all":
            ranks[cells[1]] = cells[3]
    assert ranks == {"mine": "2", "other": "1", "third": "2"}


def test_closed_forms_have_no_interval_and_no_part_in_tau(monkeypatch):
    """Each seed makes the same weights: they'd agree with themselves."""
    closed = next(model for model in models.compared if not models.depends_on_seed(model))
    rivals = [mine, mine._replace(label="other"), closed]
    values = {"mine": (0.5, 0.6, 0.7), "other": (0.8, 0.9, 1.0), closed.label: (0.9, 0.7, 0.2)}
    monkeypatch.setattr(
        verdict, "score", lambda answers, each: values[each.model.label][each.seed]
    )
    assert verdict.agreement(Answers({}), rivals, ("star",)) == "1.00, 1.00, 1.00"
    found = [verdict.row(Answers({}), model, ("star",))[-1] for model in rivals]
    assert found == ["60.0 (35.2 to 84.8)", "90.0 (65.2 to 100.0)", "60.0"]


def test_ranks_are_over_the_erasures_that_all_have(monkeypatch):
    """A method that was tried on the easy concept alone doesn't win by that."""
    easy, hard = ("heart", 0), ("star", 1)
    known = {("mine", *easy): 0.8, ("other", *easy): 0.9, ("other", *hard): 0.1}
    monkeypatch.setattr(
        verdict, "score",
        lambda answers, each: known.get((each.model.label, each.concept, each.seed)),
    )
    rivals = [mine, mine._replace(label="other"), mine._replace(label="not tried")]
    found = verdict.scores(Answers({}), rivals, ("star", "heart"))
    assert found == pytest.approx({"mine": 80, "other": 90})
    del known["mine", *easy]
    known["mine", *hard] = 0.2
    of_stars = verdict.scores(Answers({}), rivals, ("star",))
    of_hearts = verdict.scores(Answers({}), rivals, ("heart",))
    assert of_stars == pytest.approx({"mine": 20, "other": 10})
    assert of_hearts == pytest.approx({"other": 90})


def test_the_verdict_is_made_of_what_other_experiments_ask():
    assert verdict.cells(verdict.MODELS, verdict.CONCEPTS, verdict.SEEDS) == []
    assert run.reads("verdict") == ("methods", "robust", "ground_truth")
    assert run.reads("eta") == ("eta",)


# ---- patches


def test_groups_hold_every_edited_tensor_once_each_way(sd):
    names = [*erase.trainable_copies(sd.unet, "esd-u")]
    groups = layers.groups_of(names)
    kinds = [groups[kind] for kind in layers.KINDS if kind in groups]
    blocks = [groups[group] for group in groups if group not in layers.KINDS]
    for several in (kinds, blocks):
        assert sorted(itertools.chain(*several)) == sorted(names)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert layers.kind_of_layer(name) == "self-attention"
    assert layers.block_of("up_blocks.1.resnets.0.conv1.weight") == "up 1"
    assert layers.block_of("mid_block.resnets.0.conv1.weight") == "mid"
    assert layers.block_of("conv_in.weight") == layers.OUTSIDE
    covered = [range(last, first + 1) for first, last in layers.THIRDS.values()]
    assert sorted(itertools.chain(*covered)) == [*range(1000)]
    used = checksums.sources_used(layers.patch)
    assert {"THIRDS", "DIRECTIONS"} <= {*used}  # with other ones, the answers are stale
    assert not {"EFFECTS", "effects", "table"} & {*used}  # tables may change freely


def test_a_patch_of_everything_is_the_edited_model_and_of_nothing_the_original(
    sd, monkeypatch
):
    """The answer at "only: all" is that of "all but: none", and the other way round."""
    copies = erase.trainable_copies(sd.unet, "esd-x")
    theta = {name: tensor + 0.1 for name, tensor in copies.items()}
    edited = sample.with_weights(sd, theta)
    monkeypatch.setattr(layers, "groups_of", lambda names: {"all": names})
    monkeypatch.setattr(
        layers, "seen_in",
        lambda context, sd, cell, predictor=ddim.guided_predictor: one_step(sd, predictor),
    )
    context = core.Context(sd, judge=None, base="", judged_by="", weights=None, quick=False)
    cell = core.cell_of(mine, "star", 0, layers.patches("star"))
    answer = layers.patch(context, edited, cell)
    only, all_but = answer[layers.ONLY], answer[layers.ALL_BUT]
    assert only["none"] != all_but["none"]
    assert only["all"] == all_but["none"]
    assert all_but["all"] == only["none"]
    # one step, at t = 1: only the last third matters
    first, second, last = layers.THIRDS
    assert only[last] == all_but["none"] and all_but[last] == only["none"]
    assert only[first] == only[second] == only["none"]
    assert [*answer["change"]] == ["cross-attention"]
    json.dumps(answer)


def one_step(sd, predictor) -> list[float]:
    """Returns some of eps at t = 1."""
    c = sd.encode(["a star"])
    x_t = torch.randn((1, *sd.latent_shape), generator=Generator().manual_seed(0))
    with torch.no_grad():
        eps = predictor(sd.unet, c, c, 1.0)(x_t, torch.tensor(1))
    return [round(value, 4) for value in eps.flatten()[:8].tolist()]


def test_the_change_of_a_matrix():
    before = torch.eye(4)
    direction = torch.tensor([1.0, 2.0, 0.0, 2.0])
    change = layers.change_of(before, before + 0.1 * direction.outer(direction))
    assert change.size == pytest.approx(0.1 * 9 / 2)
    assert change.along == pytest.approx([1] * 7)
    four = layers.change_of(before, 2 * before)  # equal directions
    assert four.size == pytest.approx(1)
    assert four.along == pytest.approx([0.25, 0.5, 1, 1, 1, 1, 1])
    assert layers.mean_of([change, four]).along[0] == pytest.approx(0.625)


def patched_answer(by_name: dict[str, int], all_but: dict[str, int]) -> dict:
    """Returns an answer of layers.py with so many stars of 20 in each group."""
    def letters(counts: dict[str, int]) -> dict:
        return {g: {"by name": seen(n), "in scenes": seen(0)} for g, n in counts.items()}

    change = {"size": 0.02, "along": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]}
    return {
        layers.ONLY: letters(by_name), layers.ALL_BUT: letters(all_but),
        "weights": {"mid": 1234}, "change": {"cross-attention": change},
    }


def test_a_groups_size_is_its_weights_and_all_is_the_sum_of_the_kinds():
    """Each weight is of one kind and of one block; a third of the sampling has none."""
    answer = {"weights": {"cross-attention": 3, "feed-forward": 4, "mid": 5, "up 0": 2}}
    sizes = [layers.size_of(answer, group) for group in ("none", "mid", "feed-forward")]
    assert sizes == [7, 5, 4]
    assert layers.size_of(answer, [*layers.THIRDS][0]) == 0


def test_effects_are_counted_from_the_model_that_was_patched():
    """The original shows 20 stars and the edited model 2: "mid" alone leaves 15, without it 8."""
    answer = patched_answer({"none": 20, "mid": 15}, {"none": 2, "mid": 8})
    found = {("star", 0): answer}
    assert layers.effects(found, layers.ONLY, group="mid", where="by name") == [25]
    assert layers.effects(found, layers.ALL_BUT, group="mid", where="by name") == [30]
    for how in layers.EFFECTS:
        assert layers.effects(found, how, group="none", where="by name") == [90]
        assert layers.effects(found, how, group="up 1", where="by name") == []


def table_with_mid(*left: int) -> str:
    """Returns the table of two or more erasures: stars left of 20 with "mid" alone edited."""
    answered = []
    for seed, each in enumerate(left):
        cell = core.cell_of(mine, "star", seed, layers.patches("star"))
        answer = patched_answer({"none": 20, "mid": each}, {"none": 2, "mid": 8})
        answered.append((cell, answer))
    return layers.table(answers_of(*answered), [mine])


def test_the_table_of_patches_counts_erasures():
    table = table_with_mid(15, 13)
    assert "| mine | mid | 1,234 | 30.0 (-33.5 to 93.5) | 0.0 | 30.0 | 0.0 |" in table
    assert "| mine | **all** |  | 90.0 | 0.0 | 90.0 | 0.0 |" in table
    assert "| mine | cross-attention | 2.0 | 50 | 70 | 90 |" in table


def test_points_stay_between_100_less_and_100_more():
    """A group does nothing in one erasure, and all in the other."""
    assert "| mine | mid | 1,234 | 50.0 (-100.0 to 100.0) |" in table_with_mid(20, 0)


# ---- replicates


def test_what_is_trained_is_where_experiments_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = replicates.replicates()
    assert {*known} == {
        "star_0", "heart_0", "mosaic_0", "star_1", "heart_1", "mosaic_1",
        "again_1", "again_2", "censored",
    }
    assert known["star_1"].folder.as_posix() == "runs/never_saw/star_1/model"
    assert known["again_2"].folder.as_posix() == "runs/original_2/model"
    assert known["censored"].folder.as_posix() == models.censored.folder
    assert len({each.folder for each in known.values()}) == len(known)
    taken = [seed for each in known.values() for seed in (each.seed, each.seed + 1)]
    assert len({*taken}) == len(taken)  # by a training and its second half

    trained = []
    monkeypatch.setattr(replicates.train, "run", trained.append)
    original = Path(__file__).parents[1] / core.TOY
    replicates.train_one(known["heart_1"], original=original, unet_steps=9)
    (args,) = trained
    assert args.without == ["heart"] and args.seed == known["heart_1"].seed
    assert args.unet_steps == 9
    assert args.stages == ["unet"] and args.out == known["heart_1"].folder
    assert (args.out / "vae").is_dir() and not (args.out / "unet").exists()
    assert not known["heart_1"].is_trained


def test_what_is_trained_is_not_trained_again(monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        replicates.Replicate, "is_trained", property(lambda each: each.number == 0)
    )
    monkeypatch.setattr(replicates, "train_one", lambda each, *_: trained.append(each.folder))
    args = replicates.argparse.Namespace(
        names=["star_0", "star_1"], list=False, model=core.TOY, unet_steps=9
    )
    replicates.run(args)
    assert trained == [Path("runs/never_saw/star_1/model")]
    assert "star_0 is there" in capsys.readouterr().err


def test_an_unknown_replicate_is_refused(capsys):
    args = replicates.argparse.Namespace(names=["comet_0"], list=False)
    with pytest.raises(sample.UsageError, match="comet_0"):
        replicates.run(args)


def test_a_reference_that_is_not_trained_leaves_its_cells_out(tmp_path, monkeypatch, capsys):
    never = Model("never saw it", folder=str(tmp_path / "nowhere"))
    ask = ground_truth.distance("star", Reference(never, 0))
    context = core.Context(None, judge=None, base="", judged_by="", weights=tmp_path, quick=False)
    cells = [core.cell_of(core.original, "star", 0, each) for each in (ask, core.by_name)]
    assert [cell.ask for cell in run.those_here(context, cells)] == [core.by_name]
    assert "nowhere" in capsys.readouterr().err
    settings = context.settings(cells[0]) | {"against": {"folder": "f", "fingerprint": "1"}}
    assert run.without_fingerprint(settings)["against"] == {"folder": "f"}
    assert settings["against"]["fingerprint"] == "1"
