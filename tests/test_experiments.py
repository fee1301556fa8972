"""notebooks/experiments: statistics, cells, answers, the command, and every experiment."""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch

import erase
import sample
from notebooks.experiments import checksums, core, figures, models, page, run, stats
from notebooks.experiments.core import Answers, Ask, Model, Share
from notebooks.methods import esd, lora, safe_latent_diffusion, uce
from notebooks.toy import judge as judging
from notebooks.toy import world
from support import commands

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks" / "experiments"


# ---- intervals


@pytest.mark.parametrize(
    "hits, asked, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(hits, asked, low, high):
    """Newcombe, Statistics in Medicine 1998, Table I, method 3."""
    assert stats.wilson(hits, asked) == pytest.approx((low, high), abs=5e-5)
    assert stats.wilson(asked - hits, asked) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def t_of(freedom: int) -> float:
    """Returns the quantile by which `student` widens the standard error."""
    values = [float(i % 3) for i in range(freedom + 1)]
    mean, low, high = stats.student(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert mean - low == pytest.approx(high - mean)
    return (high - mean) * math.sqrt(len(values)) / statistics.stdev(values)


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (60, 2.000), (120, 1.980)]
)
def test_students_t_is_the_published_one(freedom, t):
    assert t_of(freedom) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("freedom", [*range(1, 31), 31, 40, 45, 90, 300])
def test_95_percent_lie_within_students_t(freedom):
    """The density, integrated."""
    t = np.linspace(0, t_of(freedom), 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(log_scale) / math.sqrt(freedom * math.pi)
    density = density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=3e-4)


def test_one_value_has_no_interval_by_students_t():
    no_interval = (3, -math.inf, math.inf)  # so that no figure draws it
    assert stats.student([3.0]) == stats.student([3.0], within=stats.PERCENT) == no_interval
    assert stats.number([3.0]) == "3.0"
    assert stats.number([]) == ""
    assert stats.number([1.0, 2.0, 3.0]) == "2.0 (-0.5 to 4.5)"  # 4.303 / sqrt(3) = 2.48
    assert stats.number([1.0, 2.0, 3.0], digits=2, sign="+") == "+2.00 (-0.48 to +4.48)"
    assert stats.number([1.0, 2.0, 3.0], within=stats.Interval(0, 4)) == "2.0 (0.0 to 4.0)"


def test_seeds_that_vary_have_students_interval_over_erasures():
    """1, 5 and 9 of 20: mean 25 %, standard deviation 20 %; Wilson's would be 16 to 37."""
    shares = [Share(1, 20), Share(5, 20), Share(9, 20)]
    half = 4.303 * 20 / math.sqrt(3)
    assert half > 25
    assert stats.estimate(shares) == pytest.approx((25, 0, 25 + half))
    assert stats.text(shares) == "25.0 (0 to 75)"


@pytest.mark.parametrize("hits", [0, 3, 20])
def test_seeds_that_agree_have_wilsons_interval_over_images(hits):
    low, high = stats.wilson(3 * hits, 60)
    expected = pytest.approx((5 * hits, 100 * low, 100 * high))
    assert stats.estimate([Share(hits, 20)] * 3) == expected
    assert high - low > 0.05


def test_one_seed_has_wilsons_interval():
    low, high = stats.wilson(3, 20)
    assert stats.estimate([Share(3, 20)]) == pytest.approx((15, 100 * low, 100 * high))


def test_the_mean_is_over_erasures_and_what_wasnt_asked_does_not_count():
    assert stats.estimate([Share(1, 1), Share(0, 99)]).mean == 50
    shares = [Share(1, 20), Share(0, 20), Share(4, 20)]
    assert stats.text([Share(0, 0), *shares]) == stats.text(shares)
    assert stats.text([]) == stats.text([Share(0, 0)]) == ""
    assert stats.text(shares) in stats.__doc__


def test_a_mean_is_within_the_interval_that_is_printed():
    """99.9 isn't in "100 to 100"."""
    assert stats.show(stats.Estimate(99.9, 99.6, 100)) == "99.9 (99 to 100)"
    assert stats.show(stats.Estimate(0.1, 0.0, 0.3)) == "0.1 (0 to 1)"
    assert stats.show(stats.Estimate(50.0, 43.4, 56.6)) == "50.0 (43 to 57)"


def test_there_is_no_minus_zero():
    assert stats.number([-0.06, 0.04]) == "0.0 (-0.6 to 0.6)"


# ---- comparisons


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("1100", "1100", (0, 0, 1)),
        ("1100", "0110", (1, 1, 1)),
        ("1" * 8, "0" * 8, (8, 0, 2 / 256)),
        ("0" * 10, "1" * 9 + "0", (0, 9, 2 / 512)),
        ("1110", "0001", (3, 1, 10 / 16)),
        ("1" * 6 + "0" * 15, "0" * 6 + "1" * 15, (6, 15, 82160 / 2**20)),  # p = 0.078
    ],
)
def test_mcnemars_test_counts_where_two_differ(one, other, expected):
    pairs = stats.mcnemar([c == "1" for c in one], [c == "1" for c in other])
    assert pairs == pytest.approx(expected)


@pytest.mark.parametrize(
    "only_one, only_other, p", [(70, 59, 0.378688), (80, 59, 0.089452), (30, 60, 0.00206)]
)
def test_mcnemars_p(only_one, only_other, p):
    """Of VassarStats, as recorded by the tests of statsmodels."""
    one = [True] * only_one + [False] * only_other
    pairs = stats.mcnemar(one, [not right for right in one])
    assert pairs == (only_one, only_other, pytest.approx(p, abs=1e-6))


def test_mcnemars_test_needs_as_many_images_of_both():
    with pytest.raises(ValueError):
        stats.mcnemar([True, True, False], [True, True])


def test_total_variation():
    seen = Counter({"moon": 3, "star": 1})
    others = Counter({"moon": 2, "heart": 6})
    assert stats.total_variation(seen, others) == pytest.approx((0.5 + 0.25 + 0.75) / 2)
    assert stats.total_variation(seen, Counter({"moon": 30, "star": 10})) == 0
    assert stats.total_variation(Counter({"star": 5}), Counter({"heart": 2})) == 1


def with_moments(mean: np.ndarray, cov: np.ndarray, num: int) -> np.ndarray:
    """Returns features (num, D) with exactly this mean and covariance."""
    features = np.random.default_rng(num).normal(size=(num, len(mean)))
    features -= features.mean(0)
    white = features @ np.linalg.inv(np.linalg.cholesky(np.cov(features.T))).T
    return mean + white @ np.linalg.cholesky(cov).T


def test_the_frechet_distance_of_two_gaussians():
    """In two dimensions: trace sqrt(M) = sqrt(trace M + 2 sqrt(det M)); these don't commute."""
    c_a = np.array([[2.0, 0.6], [0.6, 1.0]])
    c_b = np.array([[1.0, -0.5], [-0.5, 3.0]])
    a = with_moments(np.array([1.0, 2.0]), c_a, num=50)
    b = with_moments(np.array([4.0, -2.0]), c_b, num=70)

    product = c_a @ c_b
    assert not np.allclose(product, product.T)
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 3**2 + 4**2 + np.trace(c_a) + np.trace(c_b) - 2 * root
    assert stats.frechet(a, b) == pytest.approx(expected)
    assert stats.frechet(a, a) == pytest.approx(0, abs=1e-9)

    sigmas = np.array([1.0, 2.0, 3.0])
    c = with_moments(np.zeros(3), np.diag(sigmas**2), num=50)
    d = with_moments(np.zeros(3), np.diag(sigmas[::-1] ** 2), num=50)
    assert stats.frechet(c, d) == pytest.approx(((sigmas - sigmas[::-1]) ** 2).sum())


# ---- what is asked


def test_every_class_is_asked_for_equally_often():
    """So that an average over images is one over classes."""
    numbers = {
        core.by_name: 20, core.in_styles: 10, core.in_colours: 12, core.in_contexts: 10,
    }
    for ask, num in numbers.items():
        wanted = core.wanted_by(ask.questions())
        counts = Counter(each["object"] for each in wanted)
        assert counts == dict.fromkeys(world.OBJECTS, num), ask.name

    styles = Counter(each["style"] for each in core.wanted_by(core.styled()))
    assert styles == dict.fromkeys(core.STYLES, 20)
    colours = Counter(each["colour"] for each in core.wanted_by(core.coloured()))
    assert colours == dict.fromkeys(world.COLOURS, 20)

    implied = Counter(each["object"] for each in core.wanted_by(core.scenes()))
    assert implied.keys() == {scene.object for scene in world.SCENES.values()}
    assert min(implied.values()) >= 20
    phrases = Counter(question.wanted["object"] for question in core.paraphrases())
    assert phrases == {name: len(of_name) for name, of_name in world.PARAPHRASES.items()}


def test_a_prompt_says_what_is_wanted():
    asks = (core.objects, core.styled, core.coloured, core.contexts)
    for question in (question for ask in asks for question in ask()):
        words = set(question.prompt.split())
        assert {*question.wanted.values()} <= words
        assert len({*world.OBJECTS, *world.STYLES, *world.COLOURS} & words) == len(question.wanted)

    held_out = {world.scene_prompt(*place, opening)
                for place in world.HELD_OUT for opening in world.OPENINGS}
    assert {question.prompt for question in core.scenes()} == held_out


@pytest.mark.parametrize("name", world.OBJECTS)
def test_contexts_are_exactly_what_contexts_of_does_not_erase(name):
    erased = models.contexts_of((name,))
    asked = {q.prompt for q in core.contexts() if q.wanted["object"] == name}
    everything = {q.prompt for q in core.styled() + core.coloured() if q.wanted["object"] == name}
    assert not asked & {*erased}
    assert asked | {*erased} == everything | {name}

    assert erased[name] == ""
    for prompt, anchor in erased.items():  # the same without the object
        assert anchor.split() == ["a"] * bool(anchor) + [
            "picture" if word == name else word for word in prompt.split()[1:]
        ] or anchor == prompt.replace(world.with_article(name), "a picture")


def test_contexts_of_a_style_are_half_of_the_objects():
    erased = models.contexts_of(("mosaic",))
    assert len(erased) == 1 + 5
    assert erased["a picture in the style of mosaic"] == "a picture"
    assert erased["a circle in the style of mosaic"] == "a circle"
    both = models.contexts_of(("star", "mosaic"))
    assert both == models.contexts_of(("star",)) | erased


@pytest.mark.parametrize(
    "concept, kind, prompt",
    [("star", "object", "star"), ("dots", "style", "a picture in the style of dots")],
)
def test_kinds_and_prompts_of_concepts(concept, kind, prompt):
    assert core.kind_of(concept) == kind
    assert core.by_prompt((concept,)) == {prompt: "a picture"}


@pytest.mark.parametrize("unknown", ["hexagon", "plain", "a star", ""])
def test_an_unknown_concept_is_refused(unknown):
    with pytest.raises(sample.UsageError, match=f"'{unknown}' isn't"):
        core.kind_of(unknown)


# ---- answers


def letters_of(seen: list[dict]) -> dict[str, str]:
    """Returns an answer in which the judge sees this, image by image."""
    letters = {}
    for head, names in judging.HEADS.items():
        places = [(*names, None).index(each.get(head)) for each in seen]
        letters[head] = "".join(core.LETTERS[place] for place in places)
    return letters


def record(answer) -> dict:
    return {"settings": {"weights": {}}, "answer": answer}


def answers_of(*cells: tuple) -> Answers:
    """cells: each with what is seen."""
    return Answers({cell.key: record(letters_of(seen)) for cell, seen in cells})


a_model = Model("a model", method=uce.erase)


def test_letters_come_back_as_what_the_judge_saw(monkeypatch):
    """Every class of every head, "none of these" among them."""
    looks = []
    for head, names in judging.HEADS.items():
        for name in (*names, None):
            looks.append(dict.fromkeys(judging.HEADS) | {head: name})
    monkeypatch.setattr(judging, "read", lambda judge, images: images)
    letters = core.to_letters(None, looks)
    assert json.loads(json.dumps(letters)) == letters
    for head in judging.HEADS:
        assert core.from_letters(letters, head) == [look[head] for look in looks]

    ask = Ask("all", lambda: [core.Question("", len(looks), {})])
    cell = core.cell_of(a_model, "star", 0, ask)
    found = Answers({cell.key: record(letters)}).looks(a_model, "star", ask, seed=0)
    assert [look.seen for look in found] == looks


def test_right_is_counted_of_the_concept_and_of_what_names_none():
    ask = Ask("in styles", core.styled)
    seen = core.wanted_by(core.styled())
    stars = [i for i, each in enumerate(seen) if each["object"] == "star"]
    mosaic = [i for i, each in enumerate(seen) if each["style"] == "mosaic"]
    star_in_neon, = [i for i in stars if seen[i]["style"] == "neon"][:1]
    heart_in_dots, = [i for i, e in enumerate(seen) if {*e.values()} == {"heart", "dots"}][:1]
    changed = [dict(each) for each in seen]
    changed[star_in_neon]["object"] = "moon"
    changed[heart_in_dots]["style"] = None
    answers = answers_of(
        (core.cell_of(a_model, "star", 0, ask), changed),
        (core.cell_of(a_model, "star", 2, ask), seen),
        (core.cell_of(a_model, "mosaic", 0, ask), changed),
    )

    def share(concept, head, own, seed=0):
        right = answers.right(a_model, concept, ask, seed=seed, head=head, own=own)
        return sum(right), len(right)

    assert len(stars) == 10 and len(mosaic) == 20 and len(seen) == 100
    assert share("star", "object", own=True) == (9, 10)
    assert share("star", "object", own=False) == (90, 90)
    assert share("star", "style", own=False) == (89, 90)
    assert share("mosaic", "style", own=True) == (20, 20)
    assert share("mosaic", "style", own=False) == (79, 80)
    assert share("mosaic", "object", own=False) == (79, 80)
    assert share("star", "object", own=True, seed=2) == (10, 10)

    assert answers.seeds(a_model, "star", ask) == [0, 2]
    assert answers.shares(a_model, "star", ask) == [Share(9, 10), Share(10, 10)]
    assert answers.shares(a_model, "heart", ask) == []
    assert answers.get(a_model, "star", ask, seed=1) is None
    assert core.gone([Share(9, 10)]) == [Share(1, 10)]
    assert core.percent(answers, a_model, "star", ask, "star") == "95 %"
    assert core.percent(answers, a_model, "moon", ask, "star") == ""
    assert answers.erased([core.original, a_model], ["moon", "star"], ask) == ["star"]
    pooled = answers.pooled(a_model, ["star", "moon"], ask)
    assert pooled == [Share(9, 10), Share(10, 10)]


def test_differences_are_of_the_same_concept_and_seed():
    """Two models whose shares vary alike: one shows 2 images of 20 more, with each seed."""
    column = core.Column("seen, %", core.by_name)
    others = core.Column("others, %", core.by_name, own=False)
    another = Model("another", method=uce.erase)
    right = core.wanted_by(core.objects())
    answered = []
    for seed, hidden in enumerate([3, 10, 17]):
        for model, fewer in ((a_model, 0), (another, 2)):
            if (model, seed) == (another, 2):
                continue  # not stored: no difference
            seen = [dict(each) for each in right]
            stars = [each for each in seen if each["object"] == "star"]
            for each in stars[: hidden + fewer]:
                each["object"] = None
            answered.append((core.cell_of(model, "star", seed, core.by_name), seen))
    answers = answers_of(*answered)

    assert answers.count(a_model, ["star", "moon"], column) == [
        Share(17, 20), Share(10, 20), Share(3, 20)
    ]
    assert answers.count(a_model, ["star"], others) == [Share(180, 180)] * 3
    differences = answers.differences(a_model, another, ["star", "moon"], column)
    assert differences == pytest.approx([10, 10])
    assert answers.differences(another, a_model, ["star"], column) == pytest.approx([-10, -10])
    assert answers.differences(a_model, another, ["star"], others) == [0, 0]

    table = core.table_of_differences(
        answers, [a_model, another], [("a model", "another"), ("a model", "no such")], ["star"],
        [column, others],
    )
    header, _, row = table.splitlines()
    assert header == "| this | less this | seen, points | others, points |"
    assert row == "| a model | another | 10.0 | 0.0 |"
    nothing = core.table_of_differences(
        answers, [a_model, another], [("a model", "another")], ["moon"], [column]
    )
    assert nothing == ""


def test_the_original_has_one_share_a_seed_however_many_concepts():
    seen = core.wanted_by(core.objects())
    cells = core.grid([core.original], ["star"], [core.by_name], seeds=(0, 1))
    answers = answers_of(*((cell, seen) for cell in cells))
    assert answers.pooled(core.original, ["star", "moon", "heart"], core.by_name) == [
        Share(60, 60), Share(60, 60)
    ]


def test_what_is_erased_together_is_one_answer_for_each_of_them():
    """The hearts are no others of a file that erases star and heart."""
    both = Model("both", file="a.safetensors", together=("star", "heart"))
    cells = core.grid([both], ["star", "heart"], [core.by_name], seeds=[0])
    assert [cell.concepts for cell in cells] == [("star", "heart")]

    seen = core.wanted_by(core.objects())
    seen = [each if each["object"] not in ("star", "heart") else {} for each in seen]
    answers = answers_of((cells[0], seen))
    for concept in ("star", "heart", ("star", "heart")):
        num = 40 if len(concept) == 2 else 20
        assert answers.shares(both, concept, core.by_name) == [Share(0, num)]
        assert answers.shares(both, concept, core.by_name, own=False) == [Share(160, 160)]
    assert answers.shares(both, "moon", core.by_name) == []


def test_a_quick_run_has_one_image_a_prompt():
    seen = [question.wanted for question in core.objects()]
    answers = answers_of((core.cell_of(a_model, "star", 0, core.by_name), seen))
    assert answers.shares(a_model, "star", core.by_name) == [Share(1, 1)]
    assert answers.shares(a_model, "star", core.by_name, own=False) == [Share(9, 9)]


def test_the_grid_has_each_cell_once_and_the_originals_once_for_all_concepts():
    asks = [core.by_name, core.in_scenes]
    cells = core.grid([core.original, a_model], ["star", "moon", "star"], asks, seeds=(0, 1))
    keys = [cell.key for cell in cells]
    assert len(keys) == len({*keys}) == 2 * 2 + 2 * 2 * 2
    assert [key for key in keys if "original" in key] == [
        f"original//seed {seed}/{ask.name}" for seed in (0, 1) for ask in asks
    ]
    assert "a model/moon/seed 1/in scenes" in keys

    avoiding = Model("avoiding", sampling={"avoid": "negative prompt"})
    for model in (avoiding, Model("trained", folder="x"), Model("made", file="x")):
        assert len(core.grid([model], ["star", "moon"], asks, seeds=[0])) == 4


# ---- checksums of code


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """Imports a source under a name."""

    def load(source, name="my_module"):
        file = tmp_path / f"{crc32(source.encode())}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


SOURCE = '''
"""A method."""
from notebooks.methods import helper

def erase(sd, concepts, keep=(), seed=0, size=1):
    """Erases."""
    return helper.scale(size)  # once
'''
HELPER = "def scale(x):\n    return 2 * x\n"


def test_a_codes_checksum_changes_with_what_it_does(module_of):
    helper = "notebooks.methods.helper"

    def checksum(source, of_helper=HELPER):
        module = module_of(of_helper, helper)
        sys.modules["notebooks.methods"].helper = module
        return checksums.code_of(module_of(source))

    try:
        first = checksum(SOURCE)
        for old, new in (
            ('"""A method."""', '"""Another text."""'),
            ('    """Erases."""\n', '    """Erases\n\n    well."""\n\n'),
            ("  # once", "  # always"),
            ("(sd, concepts, ", "(\n    sd, concepts,\n    "),
        ):
            assert old in SOURCE
            assert checksum(SOURCE.replace(old, new)) == first, new
        for old, new in (("size=1", "size=2"), ("scale(size)", "scale(size + 1)")):
            assert checksum(SOURCE.replace(old, new)) != first, new
        assert checksum(SOURCE, HELPER.replace("2 * x", "3 * x")) != first
        assert checksum(SOURCE, HELPER.replace("2 * x", "2 * x  # twice")) == first

        by_name = SOURCE.replace("methods import helper", "methods.helper import scale")
        by_name = by_name.replace("helper.scale", "scale")
        assert checksum(by_name) != checksum(by_name, HELPER.replace("2 * x", "3 * x"))
    finally:
        del sys.modules["notebooks.methods"].helper


def test_what_a_method_of_ones_own_imports_from_its_folder_counts(module_of):
    source = "import json\nimport my_helper\n"
    by_name = "from my_helper import scale\n"
    constant = "from my_helper import LR\n"
    inside = "def erase():\n    import my_helper\n"
    circle = "def back():\n    import my_module\n"

    def checksums_with(of_helper):
        module_of("LR = 1\n" + of_helper + circle, "my_helper")
        sources = (source, by_name, constant, inside)
        return [checksums.code_of(module_of(each)) for each in sources]

    first = checksums_with(HELPER)
    changed = checksums_with(HELPER.replace("2 * x", "3 * x"))
    assert all(a != b for a, b in zip(first, changed))
    assert checksums_with(HELPER + "# once\n") == first


def test_what_a_function_has_yet_to_import_counts(module_of, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_helper.py").write_text("LR = 1\n")
    module = module_of("def erase():\n    from lazy_helper import LR\n    import no_such_file\n")
    assert [*checksums.modules_used(module)] == ["my_module", "lazy_helper"]
    forget("lazy_helper")


def test_our_six_files_do_not_count_where_ones_own_lies_next_to_them(module_of):
    """And of our experiments' imports, only methods do."""
    module_of(HELPER, "erase")
    module = module_of("import erase\n")
    assert [*checksums.modules_used(module)] == [module.__name__]

    module_of(HELPER, "notebooks.experiments.helper")
    source = "import notebooks.experiments.helper\n"
    experiment = module_of(source, "notebooks.experiments.x")
    assert [*checksums.modules_used(experiment)] == [experiment.__name__]


def test_an_edit_during_a_run_does_not_pass_for_what_was_run(module_of):
    module = module_of(HELPER)
    first = checksums.code_of(module)
    Path(module.__file__).write_text(HELPER.replace("2", "345"))
    assert checksums.code_of(module) == first


# ---- settings


class Drawing(NamedTuple):
    """A call of `sample.generate`."""

    sd: sample.StableDiffusion
    prompts: list[str]
    seeds: list[int]
    settings: dict


@functools.cache
def rendered(prompt: str):
    """Returns an image that shows what a prompt names."""
    names = []
    for head, default in (("object", "moon"), ("colour", "red"), ("style", "plain")):
        found = [name for name in judging.HEADS[head] if name in prompt.split()]
        names.append(found[0] if found else default)
    rng = np.random.default_rng(crc32(prompt.encode()))
    return world.render(*names, rng)


@pytest.fixture
def drawings(monkeypatch):
    """All that is drawn: images are rendered in place of a model's."""
    calls = []

    def generate(sd, prompts, seed, **settings):
        calls.append(Drawing(sd, prompts, seed, settings))
        return [rendered(prompt) for prompt in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    return calls


@pytest.fixture(scope="module")
def judge():
    return judging.load(ROOT / "notebooks" / "toy" / "model")


@pytest.fixture
def context(sd, judge, tmp_path):
    run = tmp_path / "run"
    return core.Context(sd, judge, base="base", judged_by="judge", weights=run, quick=False)


def nudge(sd, concepts, keep=(), seed=0, iterations=5, size=0.01):
    """Erases nothing, at once."""
    nudge.calls.append(dict(concepts=concepts, keep=keep, seed=seed, iterations=iterations))
    bias = sample.unet_tensors(sd)["conv_out.bias"]
    return {"conv_out.bias": bias + size * iterations}


def passes_on(sd, concepts, keep=(), seed=0, **settings):
    return settings


def closed(sd, concepts, keep=(), seed=0, lam=1.0):
    return {}


nudged = Model("nudged", nudge)


@pytest.fixture(autouse=True)
def no_calls():
    nudge.calls = []


def test_a_style_takes_three_times_the_iterations(context):
    def iterations(model, concept):
        return context.weights_settings(model, (concept,), seed=0).get("iterations")

    esd_x = models.esd_x()
    assert iterations(esd_x, "star") == models.flags()["iterations"]
    assert iterations(esd_x, "mosaic") == 3 * models.flags()["iterations"]
    assert iterations(nudged, "star") == 5
    assert iterations(nudged, "mosaic") == 15  # the method's default
    assert iterations(nudged._replace(times_for_a_style=1), "mosaic") == 5  # a stranger's
    assert iterations(Model("", nudge, {"iterations": 7}), "mosaic") == 21
    assert iterations(models.uce_, "mosaic") is None
    assert iterations(Model("", passes_on), "mosaic") is None
    assert iterations(Model("", passes_on, {"iterations": 7}), "star") == 7


def test_a_quick_run_is_quick_for_every_method(context):
    quick = context._replace(quick=True)
    for method in (nudge, lora.erase, passes_on, esd.erase):
        for settings in ({}, {"iterations": 100}):
            found = quick.weights_settings(Model("", method, settings), ("mosaic",), seed=0)
            assert found["iterations"] == 2, method
    for method in (closed, uce.erase):  # would refuse it
        assert "iterations" not in quick.weights_settings(Model("", method), ("star",), seed=0)
    assert [question.num for question in quick.questions(core.by_name)] == [1] * 10
    assert quick.num(200) == 4 and context.num(200) == 200


@pytest.mark.robustness  # seconds
def test_flags_are_what_the_command_does_with_their_file(sd, folder, tmp_path):
    """`erase.py star @notebooks/toy/flags`, and ESD as the experiments call it."""
    settings = models.flags()
    assert json.loads(json.dumps(settings)) == settings
    theta = esd.erase(sd, {"star": "a picture"}, **settings | {"iterations": 3})

    file = tmp_path / "star.safetensors"
    words = ["star", f"@{models.FLAGS}", "--model", folder, "--iterations", 3, "--out", file]
    commands.run(erase.main, *words)
    written, _ = sample.read_tensors(file)
    assert written.keys() == theta.keys()
    before = sample.unet_tensors(sd)
    for name, tensor in erase.to_float16(theta).items():
        assert torch.equal(tensor, written[name])
        assert not torch.equal(theta[name], before[name])


def changed_settings(context, cell):
    """Yields a cell's settings after a change of each thing that its answer depends on."""
    weights = {"settings": {"size": 3}, "method": closed}
    for name, value in weights.items():
        yield context.settings(cell._replace(model=cell.model._replace(**{name: value})))
    yield context.settings(cell._replace(model=cell.model._replace(sampling={"guidance": 7.5})))
    yield context.settings(cell._replace(seed=1))
    yield context.settings(cell._replace(concepts=("moon",)))
    yield context.settings(cell._replace(ask=Ask("by name", lambda: core.objects(21))))
    for name, value in {"base": "other", "judged_by": "other", "quick": True}.items():
        yield context._replace(**{name: value}).settings(cell)


def test_an_answer_depends_on_all_of_its_settings(context):
    cell = core.cell_of(nudged, "star", 0, core.by_name)
    first = context.settings(cell)
    assert json.loads(json.dumps(first)) == first
    assert all(found != first for found in changed_settings(context, cell))
    renamed = cell._replace(model=nudged._replace(label="another label"))
    assert context.settings(renamed) == first

    own = core.cell_of(core.original, "star", 0, counted)  # it may draw fewer images, too
    assert context.settings(own) != context._replace(quick=True).settings(own)


def test_two_methods_of_one_file_with_equal_settings_are_two(context):
    """`method` is a setting of ESD's, too."""
    found = []
    for function in (nudge, passes_on):
        model = Model("", function, {"method": "esd-x", "iterations": 3})
        found.append(context.weights_settings(model, ("star",), seed=0))
    assert found[0] != found[1]
    assert found[0]["method"] == found[1]["method"] == "esd-x"


def count(context, sd, cell):
    """An answer of its own."""
    return {"concepts": cell.concepts}


counted = Ask("counted", answer=count)


@pytest.mark.parametrize(
    "model, ask",
    [
        (models.negative_prompt, core.by_name),
        (models.sld_max, core.by_name),
        (Model("trained", folder="nowhere"), counted),  # not {concept}
        (Model("made", file=str(Path(__file__))), counted),
    ],
)
def test_an_answer_about_one_concept_is_not_taken_for_another(context, model, ask):
    star, moon = [context.settings(core.cell_of(model, c, 0, ask)) for c in ("star", "moon")]
    assert star != moon


def test_only_what_avoids_a_concept_depends_on_the_code_that_does(context, monkeypatch):
    def settings():
        of = [core.cell_of(m, "star", 0, core.by_name) for m in (models.sld_max, core.original)]
        return [context.settings(cell) for cell in of]

    before = settings()
    code_of = checksums.code_of
    monkeypatch.setattr(
        checksums, "code_of", lambda *m: "x" if safe_latent_diffusion in m else code_of(*m)
    )
    after = settings()
    assert before[0] != after[0] and before[1] == after[1]


def test_an_answer_of_its_own_depends_on_its_code(context, module_of):
    source = "def twice(x):\n    return 2 * x\n\n"
    source += "def answer(context, sd, cell):\n    return twice(1)\n"

    def settings(source):
        ask = Ask("own", answer=module_of(source).answer)
        return context.settings(core.cell_of(nudged, "star", 0, ask))

    first = settings(source)
    assert settings(source.replace("2 * x", "2 * x  # twice")) == first
    assert settings(source.replace("twice(1)", "twice(2)")) != first
    assert settings(source.replace("2 * x", "3 * x")) != first
    assert settings(source + "\n\ndef unused():\n    pass\n") == first


# ---- weights


def test_an_erasure_is_made_once_and_kept(context):
    loaded = context.load(nudged, ("star", "mosaic"), seed=3)
    assert nudge.calls == [{
        "concepts": {"star": "a picture", "a picture in the style of mosaic": "a picture"},
        "keep": [core.prompt_for(c) for c in (*world.OBJECTS, *core.STYLES)
                 if c not in ("star", "mosaic")],
        "seed": 3, "iterations": 15,
    }]
    moved = sample.unet_tensors(loaded)["conv_out.bias"] - context.sd.unet.conv_out.bias
    assert moved == pytest.approx(0.15, abs=1e-3)  # kept in float16

    again = context.load(nudged, ("star", "mosaic"), seed=3)
    assert len(nudge.calls) == 1
    assert torch.equal(again.unet.conv_out.bias, loaded.unet.conv_out.bias)
    _, metadata = sample.read_tensors(context.file_of(nudged, ("star", "mosaic"), seed=3))
    assert json.loads(metadata["settings"])["seconds"] >= 0
    context.load(nudged, ("star", "mosaic"), seed=4)
    assert len(nudge.calls) == 2


def test_a_method_may_return_a_model(context, drawings):
    """It may change more than the U-Net, so no file can keep it."""
    def other_text(sd, concepts, keep, seed):
        return other

    other = sample.with_weights(context.sd, nudge(context.sd, {}))
    model = Model("other", other_text)
    assert context.load(model, ("star",), seed=0) is other
    assert not context.weights.exists()
    cell = core.cell_of(model, "star", 0, core.by_name)
    answer = core.look(context, context.load(model, ("star",), seed=0), cell)
    assert drawings[0].sd is other
    right = Answers({cell.key: record(answer)}).shares(model, "star", core.by_name)
    assert right == [Share(20, 20)]


def test_what_a_method_does_to_its_model_stays_there(context):
    """It may train in place: the next erasure starts from the original."""
    def in_place(sd, concepts, keep, seed):
        with torch.no_grad():
            sd.unet.conv_out.bias += 1 + torch.rand(()).item()  # a number that it doesn't seed
            sd.text_encoder.final_layer_norm.bias += 1
        return {"conv_out.bias": sd.unet.conv_out.bias}

    before = context.sd.unet.conv_out.bias.clone()
    features = context.sd.encode(["a star"])
    model = Model("in place", in_place)
    moved = []
    for concept, seed in (("star", 0), ("heart", 0), ("star", 1)):
        torch.rand(3)  # as if something else had drawn some
        loaded = context.load(model, (concept,), seed=seed)
        moved.append((loaded.unet.conv_out.bias - before).mean().item())
    assert torch.equal(context.sd.unet.conv_out.bias, before)
    assert torch.equal(context.sd.encode(["a star"]), features)
    assert moved[0] == moved[1] != moved[2] and max(moved) < 2.1


@pytest.mark.parametrize("returned, says", [
    (None, "mine returned a NoneType: return the new weights by name, or a model"),
    ({"conv_out.bias": torch.zeros(3)}, "mine doesn't fit .* conv_out.bias"),
    ({"unet.conv_out.bias": torch.zeros(4)}, "mine has 1 tensors, 1 not the U-Net's"),
])
def test_what_a_method_returns_is_checked_before_it_is_kept(context, returned, says):
    def wrong(sd, concepts, keep, seed):
        return returned

    with pytest.raises(sample.UsageError, match=says):
        context.load(Model("mine", wrong), ("star",), seed=0)
    assert not context.weights.exists()


def test_weights_that_were_made_elsewhere_are_read(context, tmp_path):
    file = tmp_path / "mine.safetensors"
    erase.save(nudge(context.sd, {}, iterations=9), file, settings={}, sd=context.sd)
    loaded = context.load(Model("mine", file=str(file)), ("star",), seed=0)
    moved = loaded.unet.conv_out.bias - context.sd.unet.conv_out.bias
    assert moved == pytest.approx(0.09, abs=1e-3)


def test_a_trained_model_is_found_by_concept_and_seed(context, folder, tmp_path):
    (tmp_path / "star_2").symlink_to(folder)
    model = Model("never saw it", folder=f"{tmp_path}/{{concept}}_{{seed}}")
    assert context.load(model, ("star",), seed=2).latent_shape == context.sd.latent_shape
    here = context.weights_settings(model, ("star",), seed=2)
    assert here["folder"] == f"{tmp_path}/star_2"
    missing = context.weights_settings(model, ("star",), seed=1)
    assert here.keys() - missing.keys() == {"fingerprint"}


# ---- drawing


def test_the_images_of_all_models_are_pairs(context, drawings, monkeypatch):
    """The same seed gives the same prompts and noise; another seed, other noise."""
    monkeypatch.setattr(core, "to_letters", lambda judge, images: {})
    for seed in (0, 1, 2):
        for model in (core.original, nudged, models.negative_prompt, models.sld_max):
            cell = core.cell_of(model, "star", seed, core.in_contexts)
            core.look(context, context.sd, cell)
    prompts = [q.prompt for q in core.contexts() for _ in range(q.num)]
    assert all(drawing.prompts == prompts for drawing in drawings)

    seeds = [drawing.seeds for drawing in drawings]
    assert all(len({*each}) == len(prompts) for each in seeds)
    for of_seed in (seeds[:4], seeds[4:8], seeds[8:]):
        assert all(each == of_seed[0] for each in of_seed)
    assert len({seed for each in seeds for seed in each}) == 3 * len(prompts)
    assert {*core.image_seeds(0, 10_000)}.isdisjoint(core.image_seeds(1, 10_000))


def test_what_is_avoided_is_what_would_be_erased(context, drawings):
    cell = core.cell_of(models.negative_prompt, "dots", 0, core.by_name)
    context.draw(context.sd, cell, ["a star"])
    context.draw(context.sd, core.cell_of(core.original, "dots", 0, core.by_name), ["a star"])
    avoiding, plain = [drawing.settings for drawing in drawings]
    assert avoiding == plain | {"negative": "a picture in the style of dots"}
    assert plain == core.SAMPLING


def test_images_avoid_a_concept_as_safe_latent_diffusion_does(context, monkeypatch):
    short = {"steps": 2, "guidance": 5.0, "batch": 50}
    monkeypatch.setattr(core, "SAMPLING", short)
    prompts = ["a star", "a heart"]
    predictor = functools.partial(
        safe_latent_diffusion.SafePredictor,
        concept=context.sd.encode(["star"]),
        safety=safe_latent_diffusion.SETTINGS["max"],
    )
    seeds = core.image_seeds(0, 2)
    expected = sample.generate(context.sd, prompts, seed=seeds, predictor=predictor, **short)
    plain = sample.generate(context.sd, prompts, seed=seeds, **short)

    cell = core.cell_of(models.sld_max, "star", 0, core.by_name)
    images = context.draw(context.sd, cell, prompts)
    assert [a.tobytes() for a in images] == [b.tobytes() for b in expected]
    assert images[0].tobytes() != plain[0].tobytes()


# ---- the command, with two experiments of a second


TINY = '''
"""Tiny: does it run?"""
from test_experiments import counted, nudge
from notebooks.experiments import core, figures, stats
from notebooks.experiments.core import Model

MODELS = [core.original, Model("nudged", nudge), Model("trained", folder="nowhere/{concept}")]
CONCEPTS = ("star", "heart")
SEEDS = (0, 1)
FINDINGS = ""

def cells(models, concepts, seeds):
    return core.grid(models, concepts, asks=[core.by_name, counted], seeds=seeds)

def table(answers, models):
    rows = []
    for model in models:
        cells = []
        for concept in CONCEPTS:
            for own in (True, False):
                shares = answers.shares(model, concept, core.by_name, own=own)
                cells.append(" + ".join(f"{hits}/{asked}" for hits, asked in shares))
        rows.append([model.label, *cells])
    return core.table(["", "star", "others", "heart", "others"], rows)

def figure(answers, models):
    return figures.dots({})
'''
ALSO_TINY = TINY.replace('"nudged"', '"the same, under another label"').replace(", counted]", "]")


class Command(NamedTuple):
    """The command in a folder of its own, with stand-ins for experiments and models."""

    folder: Path
    drawings: list[Drawing]

    def __call__(self, *words):
        words = words if words[0] in ("tiny", "also_tiny") else ("tiny", *words)
        self.drawings.clear()
        commands.run(run.main, *words, "--results", self.folder / "results", "--processes", 1)

    def records(self, name="tiny", folder="results"):
        return json.loads((self.folder / folder / f"{name}.json").read_text())


@pytest.fixture
def command(sd, judge, drawings, module_of, tmp_path, monkeypatch):
    def open_context(model, run, quick):
        return core.Context(sd, judge, base="base", judged_by="judge", weights=run, quick=quick)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(core, "open_context", open_context)
    monkeypatch.setattr(core, "objects", objects)
    monkeypatch.setattr(core, "by_name", Ask("by name", objects))
    monkeypatch.setattr(run, "NAMES", ("tiny", "also_tiny"))
    monkeypatch.setattr(run, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(figures, "pyplot", None)  # as where it isn't installed
    monkeypatch.setattr(sample, "with_weights", lambda sd, weights, source: sd)  # in no time
    monkeypatch.setattr(core, "copy", SimpleNamespace(deepcopy=lambda sd: sd))
    monkeypatch.setitem(sys.modules, "test_experiments", sys.modules[__name__])
    core.fingerprint_of.cache_clear()  # by relative paths
    module_of(TINY, "notebooks.experiments.tiny")
    module_of(ALSO_TINY, "notebooks.experiments.also_tiny")
    return Command(tmp_path, drawings)


def objects():
    """Two images of each of three objects."""
    names = ("star", "heart", "moon")
    return [core.Question(world.with_article(name), 2, {"object": name}) for name in names]


ROW = "| nudged | 2/2 + 2/2 | 4/4 + 4/4 | 2/2 + 2/2 | 4/4 + 4/4 |"


def test_a_second_run_answers_nothing_again_and_loads_nothing(command, monkeypatch, capsys):
    command("tiny")
    first = capsys.readouterr()
    assert "**Tiny: does it run?**" in first.out and ROW in first.out
    assert "left out, as it isn't trained: nowhere/heart, nowhere/star" in first.err
    assert len(nudge.calls) == 4
    assert len(command.drawings) == 2 + 4
    records = command.records()
    module = run.experiment("tiny")
    keys = [cell.key for cell in module.cells(module.MODELS[:2], module.CONCEPTS, module.SEEDS)]
    assert [*records] == keys  # in the experiment's order
    assert records["nudged/star/seed 1/counted"]["answer"] == {"concepts": ["star"]}

    monkeypatch.setattr(core.Context, "load", None)
    command("tiny")
    assert capsys.readouterr().out == first.out
    assert not command.drawings and len(nudge.calls) == 4
    assert command.records() == records


def test_equal_settings_share_an_answer_under_any_label(command, capsys):
    command("tiny", "also_tiny")
    assert len(nudge.calls) == 4
    assert len(command.drawings) == 2 + 4  # of both
    assert ROW.replace("nudged", "the same, under another label") in capsys.readouterr().out
    first = command.records()

    (command.folder / "results" / "also_tiny.json").unlink()
    command("also_tiny")
    assert not command.drawings and len(nudge.calls) == 4
    assert ROW.replace("nudged", "the same, under another label") in capsys.readouterr().out
    assert command.records() == first


def test_a_stale_answer_is_made_again_and_only_that(command):
    command("tiny")
    records = command.records()
    stale = json.loads(json.dumps(records))
    stale["nudged/star/seed 0/by name"]["settings"]["seed"] = 7
    run.write_records(command.folder / "results", "tiny", stale)
    command("tiny")
    assert len(command.drawings) == 1
    assert command.records() == records
    assert [*command.records()] == [*records]


def test_a_model_whose_training_has_begun_isnt_there_yet(command, capsys):
    """replicates.py copies the other parts before it trains the U-Net."""
    (command.folder / "nowhere" / "star" / "vae").mkdir(parents=True)
    command("tiny")
    assert "left out, as it isn't trained: nowhere/heart, nowhere/star" in capsys.readouterr().err


def test_other_answers_in_the_folder_stay(command):
    command("tiny")
    before = command.records()
    command("tiny", "--only", "nudged", "--concept", "star", "--seeds", 3)
    after = command.records()
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        f"nudged/star/seed 2/{ask}" for ask in ("by name", "counted")
    }


def test_shipped_results_are_read_and_written_only_by_name(command, capsys):
    command("tiny")
    (command.folder / "results").rename(command.folder / "shipped")
    shipped = command.records(folder="shipped")
    capsys.readouterr()
    command("tiny", "--seeds", 2)
    assert not command.drawings
    assert not (command.folder / "results").exists()
    assert ROW in capsys.readouterr().out

    command("tiny", "--seeds", 3)  # one more
    assert len(command.drawings) == 3
    assert command.records(folder="shipped") == shipped
    assert shipped.items() <= command.records().items()

    commands.run(run.main, "tiny", "--results", "shipped", "--seeds", 4, "--processes", 1)
    assert command.records(folder="shipped").keys() > shipped.keys()


def test_anew_takes_nothing_from_the_shipped_results(command):
    command("tiny")
    (command.folder / "results").rename(command.folder / "shipped")
    command("tiny", "--anew")
    assert len(command.drawings) == 6
    command("tiny", "--anew")  # but it goes on
    assert not command.drawings
    assert command.records() == command.records(folder="shipped")


def test_results_go_to_runs_unless_named(command, capsys):
    commands.run(run.main, "tiny", "--quick", "--processes", 1)
    assert {path.name for path in (command.folder / "runs").iterdir()} == {"quick", "experiments"}
    quick = command.records(folder="runs/quick")
    assert [*quick] == [  # one seed and one concept
        f"{label}/seed 0/{ask}" for label in ("original/", "nudged/star")
        for ask in ("by name", "counted")
    ]
    assert {call["iterations"] for call in nudge.calls} == {2}
    assert "| nudged | 1/1 | 2/2 |  |  |" in capsys.readouterr().out

    commands.run(run.main, "tiny", "--only", "original", "--processes", 1)
    assert command.records(folder="runs/experiments/results").keys() == {
        f"original//seed {seed}/{ask}" for seed in (0, 1) for ask in ("by name", "counted")
    }


@pytest.mark.robustness  # seconds
def test_a_trained_model_that_is_missing_leaves_its_stored_answers(command, folder, capsys):
    """It isn't shipped, its answers are. Where it is here, they must be its own."""
    trained = command.folder / "nowhere"
    trained.mkdir()
    for name in ("star", "heart"):
        (trained / name).symlink_to(folder)
    command("tiny")
    records = command.records()
    assert "fingerprint" in records["trained/star/seed 1/by name"]["settings"]["weights"]
    core.fingerprint_of.cache_clear()

    for name in ("star", "heart"):
        (trained / name).unlink()
    capsys.readouterr()
    command("tiny")
    assert not command.drawings
    captured = capsys.readouterr()
    assert "| trained | 2/2 + 2/2 |" in captured.out
    assert captured.err == "" or "left out" not in captured.err
    assert command.records() == records

    core.fingerprint_of.cache_clear()
    core.load_trained.cache_clear()
    for name in ("star", "heart"):
        (trained / name / "unet").mkdir(parents=True)
        (trained / name / "unet" / "other.safetensors").write_bytes(b"other")
    with pytest.raises(SystemExit):
        command("tiny")  # it can't be loaded: so it wasn't taken for the one that was stored
    core.fingerprint_of.cache_clear()


STRANGER = """
import sample

def my_erase(sd, concepts, keep, seed, size=0.01):
    return {"conv_out.bias": sample.unet_tensors(sd)["conv_out.bias"] + size * len(concepts)}
"""
REFUSED = """
import functools

of_one = functools.partial(my_erase, size=1)

def refuses(sd, concepts, keep, seed):
    if seed and "heart" in concepts:
        return my_erase(sd, concepts, keep, seed)
    raise sample.UsageError("lower the rate")
"""


def forget(name):
    """As in a new process."""
    sys.modules.pop(name, None)
    importlib.invalidate_caches()


def test_a_strangers_method_becomes_a_row_and_an_edit_makes_it_stale(command, capsys):
    """Only its own answers are made; of the others, those that are stored are shown."""
    file = command.folder / "my_file.py"
    command("tiny", "--only", "nudged", "--concept", "star")
    words = ["tiny", "--method", "my_file:my_erase", "--label", "mine"]
    row = ROW.replace("nudged", "mine")
    stored = "| nudged | 2/2 + 2/2 | 4/4 + 4/4 |  |  |"

    def drawn(source, *more):
        forget("my_file")
        file.write_text(source)
        command(*words, *more)
        printed = capsys.readouterr().out
        assert row in printed and stored in printed
        assert "| original |  |  |  |  |" in printed
        return len(command.drawings)

    assert drawn(STRANGER) == 4
    assert drawn(STRANGER) == 0
    weights = command.records()["mine/star/seed 0/by name"]["settings"]["weights"]
    assert weights["function"] == "my_file:my_erase"
    args = argparse.Namespace(
        method="my_file:my_erase", label="mine", set=["size=80"], files=[], concept=None)
    (mine,) = run.new_models(args)
    assert (mine.times_for_a_style, mine.settings) == (1, {"size": 80})  # as it was told
    assert drawn(STRANGER.replace("+ size", "+  # added\n            size")) == 0
    assert drawn(STRANGER.replace("+ size", "- size")) == 4
    assert drawn(STRANGER, "--set", "size=2") == 4
    assert command.records()["mine/star/seed 0/by name"]["settings"]["weights"]["size"] == 2
    forget("my_file")


def test_files_become_rows_that_erase_several_at_once(command, sd, capsys):
    """The rows of the experiment's own models erase one each."""
    command("tiny")
    erase.save(nudge(sd, {}), command.folder / "a.safetensors", settings={}, sd=sd)
    erase.save(nudge(sd, {}, size=1), command.folder / "b.safetensors", settings={}, sd=sd)
    command("--files", "a.safetensors", "b.safetensors", "--concept", "star", "heart")
    printed = capsys.readouterr().out
    both = "(star and heart together)"
    for label in ("a", "b"):  # the moon is the only other
        assert f"| {label} {both} | 2/2 + 2/2 | 2/2 + 2/2 | 2/2 + 2/2 | 2/2 + 2/2 |" in printed
    assert ROW in printed
    assert len(command.drawings) == 4  # two seeds of a and of b
    assert f"a {both}/star+heart/seed 0/by name" in command.records()
    assert "nudged/star/seed 0/by name" in command.records()

    erase.save(nudge(sd, {}, size=2), command.folder / "a.safetensors", settings={}, sd=sd)
    command("--files", "a.safetensors", "--concept", "star", "--concept", "heart")
    assert len(command.drawings) == 2  # other weights under the same name


def test_a_refusal_names_the_cell(command, capsys):
    forget("my_file")
    (command.folder / "my_file.py").write_text(STRANGER + REFUSED)
    with pytest.raises(SystemExit):
        command("--method", "my_file:refuses", "--label", "mine")
    printed, errors = capsys.readouterr()
    assert "failed: mine/star/seed 0/by name: lower the rate" in errors
    says = "error: 3 failed, the first is mine/star/seed 0/by name: lower the rate"
    assert errors.splitlines()[-1] == says
    assert "Traceback" not in errors
    assert "| mine |  |  | 2/2 | 4/4 |" in printed  # heart, seed 1
    forget("my_file")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--concept", "hexagon"], "'hexagon' isn't an object"),
        (["--concept", "moon"], "--concept moon: tiny asks about star, heart"),
        (["--processes", 0], "--processes is 0"),
        (["--seeds", 0], "--seeds 0"),
        (["--method", "my_file:my_erase", "--set", "size"], "write NAME=VALUE"),
        (["--method", "my_file:my_erase", "--set", "size=1", "seed=5"], "is given seed for each"),
        (["--method", "my_file:my_erase", "--set", "size=True"], "write true, false or null"),
        (["--method", "my_file:my_erase", "--set", "lr=1", "--set", "size=1"],
         "--method my_file:my_erase: got an unexpected keyword argument 'lr'"),
        (["--method", "my_file:of_one"], "--method my_file:of_one isn't a function: write one"),
        (["--method", "no_such_file:my_erase"], "No module named 'no_such_file'"),
        (["--method", "my_file:other"], "my_file has no function 'other'"),
        (["--method", "my_file.py"], "No module named 'my_file.py'"),
        (["--method", "my-file:my_erase"], "write MODULE:FUNCTION"),
        (["--set", "size=1"], "there is none"),
        (["--files", "none.safetensors", "--concept", "star"], "none.safetensors"),
        (["--files", "my_file.py", "--concept", "star"], "my_file.py is incomplete"),
        (["--files", "my_file.py"], "add --concept"),
        (["--only", "ESD"], "choose from original, nudged, trained"),
        (["--method", "my_file:my_erase", "--label", "nudged"], "two models are called 'nudged'"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, capsys, words, message):
    forget("my_file")
    (command.folder / "my_file.py").write_text(STRANGER + REFUSED)
    line = commands.refusal(capsys, run.main, "tiny", "--results", "results", *words)
    assert message in line
    assert not command.drawings
    forget("my_file")


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "[1]", "\0",
        '{"a/star/seed 0/by name": 3}',
        '{"a/star/seed 0/by name": {"answer": {}}}',
        '{"a/star/seed 0/by name": {"settings": {}, "answer": {}}}',
        '{"by name": {"settings": {"weights": {}}, "answer": {}}}',
    ],
)
def test_damaged_results_are_refused_and_kept(command, capsys, content):
    file = command.folder / "results" / "tiny.json"
    file.parent.mkdir()
    file.write_text(content)
    line = commands.refusal(
        capsys, run.main, "tiny", "--results", file.parent, "--processes", 1
    )
    assert "tiny.json" in line
    assert file.read_text() == content


@pytest.mark.parametrize(
    "error", ["KeyError('mine')", "RuntimeError('mine')", "ValueError('mine')"]
)
def test_a_strangers_own_exception_keeps_its_traceback(command, error, capsys):
    forget("my_file")
    (command.folder / "my_file.py").write_text(
        f"def my_erase(sd, concepts, keep, seed):\n    raise {error}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        command("--only", "mine", "--method", "my_file:my_erase", "--label", "mine")
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and 'my_file.py", line 2' in errors
    name = error.partition("(")[0]
    assert f"4 failed, the first is mine/star/seed 0/by name: {name}: " in errors.splitlines()[-1]
    forget("my_file")


@pytest.mark.robustness  # seconds
def test_sheets_are_drawn_with_new_answers_only(command, monkeypatch):
    """They need erased weights, which aren't shipped."""
    sheets = []

    def sheet(context, answers):
        sheets.append(answers)
        return rendered("a star")

    monkeypatch.setattr(run.experiment("tiny"), "sheet", sheet, raising=False)
    of_one_model = ["--only", "nudged", "--seeds", 3]
    for num, words in ((1, []), (1, []), (1, of_one_model), (2, ["--seeds", 4])):
        command("tiny", *words)
        assert len(sheets) == num, words
    assert (command.folder / "results" / "tiny_images.png").exists()

    (command.folder / "results").rename(command.folder / "shipped")
    command("tiny", "--seeds", 4)
    assert len(sheets) == 2


def test_an_erasure_is_a_group_and_what_is_only_loaded_is_spread(context):
    """An erasure is made by one process; originals are for all processes."""
    asks = [core.by_name, core.in_scenes]
    cells = core.grid([core.original, nudged, models.sld_max], ["star", "moon"], asks, seeds=[0])
    groups = run.with_equal_weights(context, cells)
    assert sorted(len(group) for group in groups) == 6 * [1] + 2 * [2]
    assert [cell for group in groups for cell in group if cell.model is nudged] == [
        cell for cell in cells if cell.model is nudged
    ]
    for group in groups:
        assert len({(cell.model.label, cell.concepts) for cell in group}) == 1


# ---- every experiment


each_experiment = pytest.mark.parametrize("name", run.NAMES)


def all_cells(name: str, more: tuple[Model, ...] = ()) -> list[core.Cell]:
    """Returns all cells that an experiment's table is made of."""
    cells = []
    for each in run.reads(name):
        module = run.experiment(each)
        cells += module.cells([*module.MODELS, *more], module.CONCEPTS, module.SEEDS)
    if name != each:  # several experiments, which share some
        cells = [*{cell.key: cell for cell in cells}.values()]
    return cells


def kind_of_ask(name: str) -> str:
    """Returns an ask's name with the kind of the concept that it is about."""
    kinds = {concept: kind for kind, concepts in core.KINDS.items() for concept in concepts}
    return " ".join(kinds.get(word, word) for word in name.split())


@functools.cache
def answers_in(folder: Path) -> dict[str, dict]:
    """Returns an answer to each kind of ask."""
    answers = {}
    for records in run.read_records(folder).values():
        for key, record in records.items():
            answers[kind_of_ask(key.rpartition("/")[2])] = record["answer"]
    return answers


def shipped_answers() -> dict[str, dict]:
    return answers_in(run.SHIPPED)


def filled(cells: list[core.Cell], examples: dict[str, dict]) -> dict[str, dict]:
    """Returns records in which the judge sees what is asked for; others are examples."""
    letters = {}
    records = {}
    for cell in cells:
        ask = cell.ask
        if ask.questions and ask.name not in letters:
            letters[ask.name] = letters_of(core.wanted_by(ask.questions()))
        answer = letters.get(ask.name, examples.get(kind_of_ask(ask.name)))
        if answer is None:
            pytest.fail(f"{ask.name} isn't stored")
        records[cell.key] = record(answer)
    return records


def rows_of(table: str) -> list[list[str]]:
    """Returns the cells of Markdown tables, each of which must be rectangular."""
    widths = set()
    rows = []
    for line in [*table.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            widths.add(len(rows[-1]))
        else:
            assert len(widths) <= 1, table
            widths = set()
    return rows


@each_experiment
def test_an_experiment_is_whole(name):
    module = run.experiment(name)
    title, colon, question = module.__doc__.partition("\n")[0].partition(":")
    assert title and question.endswith(("?", "."))
    assert isinstance(module.FINDINGS, str)
    labels = [model.label for model in run.models_of(name, [])]
    assert "original" in labels or name in ("cost", "layers")
    assert len(module.SEEDS) == len({*module.SEEDS})


@each_experiment
def test_no_two_cells_of_an_experiment_have_one_key(name, monkeypatch):
    """Of two different ones, an experiment would keep one."""
    made = {}

    def cell_of(*args, **kwargs):
        cell = core_cell_of(*args, **kwargs)
        assert made.setdefault(cell.key, cell) == cell
        return cell

    core_cell_of = core.cell_of
    monkeypatch.setattr(core, "cell_of", cell_of)
    keys = [cell.key for cell in all_cells(name)]
    assert len(keys) > 5 and {*keys} <= {*made}
    assert all(key.count("/") == 3 for key in keys)


@each_experiment
def test_settings_tell_concepts_apart(context, name):
    """Cells that would share an answer ask the same of the same."""
    found = {}
    for cell in all_cells(name):
        settings = context.settings(cell)
        question = run.question_of(cell.ask.name, settings)
        model = cell.model
        prompts = model.prompts(cell.concepts) if model.method or model.sampling else {}
        what = (model.method, model.sampling, prompts, cell.seed, cell.ask)
        assert found.setdefault(question, what) == what or not model.is_about_a_concept


@each_experiment
def test_a_table_of_nothing_is_a_table(name):
    """A reader's own run begins so, and a notebook may. Cells for numbers are empty."""
    for row in rows_of(run.stored_table(name, Path("nowhere"))):
        assert not any(cell.endswith((" %", ")")) and cell[0].isdigit() for cell in row if cell)


def check_tables(name: str, examples: dict[str, dict]) -> None:
    """Every model is in the table, a stranger's too; any may be missing."""
    module = run.experiment(name)
    stranger = Model("a stranger's", nudge)
    records = filled(all_cells(name, (stranger,)), examples)
    models = [*module.MODELS, stranger]
    table = module.table(Answers(records), models)
    starts = {cell for row in rows_of(table) for cell in row}
    for model in [] if name == "original" else models:
        if name == "ground_truth" and model.folder:
            continue  # its rows are of pairs
        label = model.label.partition(", g ")[0]  # guidance: a column for each
        assert any(cell.startswith(label) for cell in starts), label

    if name != "original":  # whose table is of one model alone
        for model in (models[0], models[len(models) // 2], models[-1]):
            of_model = (f"{model.label}/", f"{model.label}, g ")
            rest = {key: r for key, r in records.items() if not key.startswith(of_model)}
            rows_of(module.table(Answers(rest), models))
    for step in (2, 7, len(records)):
        rows_of(module.table(Answers({key: records[key] for key in [*records][::step]}), models))


@pytest.mark.robustness  # seconds
@each_experiment
def test_every_model_is_in_its_table_and_any_may_be_missing(name):
    check_tables(name, shipped_answers())


@pytest.mark.robustness  # the default tests run without matplotlib
def test_figures_show_the_numbers_of_their_tables():
    shares = [Share(1, 4), Share(2, 4)]
    mean, low, high = stats.estimate(shares)

    drawn = figures.dots({"a": {"row": [figures.Dot("here", shares)]}}, {"a": {"row": 7.5}})
    interval, dot, paper = drawn.axes[0].lines
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["here", "the paper"]
    assert [*interval.get_xdata()] == [low, high]
    assert [*dot.get_xdata()] == [mean]
    assert [*paper.get_xdata()] == [7.5] and paper.get_marker() == "x"

    panel = {"row": stats.Estimate(2.0, 1.0, 4.0), "null": stats.Estimate(1.0, 0.5, 1.5)}
    drawn = figures.estimates({"a": panel}, {"a": (0, 1.5)}, grey=["null"])
    interval, dot, of_null, _ = drawn.axes[0].lines
    assert [*interval.get_xdata()] == [1, 4] and [*dot.get_xdata()] == [2]
    assert of_null.get_color() != interval.get_color()
    (band,) = drawn.axes[0].patches
    assert (band.get_x(), band.get_width()) == (0, 1.5)

    line = figures.Line("model", x=[1, 5], shares=[shares, [Share(1, 1)]])
    marks = {"marks": [figures.Mark("model", x=-0.5, y=40)]}
    drawn = figures.lines({"a": [line]}, x="x", y="y", marks=marks)
    assert drawn.axes[0].lines[0].get_xydata().tolist() == [[1, mean], [5, 100]]
    zero, mark = drawn.axes[1].lines
    assert [*zero.get_xdata()] == [0, 0] and mark.get_xydata().tolist() == [[-0.5, 40]]

    places = [figures.Place("worse", 20, 3, score=50), figures.Place("better", 10, 2, score=90)]
    drawn = figures.scatter({"a": places}, ours=["worse"])
    assert [each.get_xydata().tolist() for each in drawn.axes[0].lines] == [[[10, 2]], [[20, 3]]]
    texts = [each.get_text() for each in drawn.axes[0].texts]
    assert texts[:2] == ["1.  90.0  better", "2.  50.0  worse"]

    nothing = stats.estimate([])
    some = {"x": stats.Estimate(12, 1, 30), "y": nothing}
    panel = {"row": some, "other": {"x": stats.Estimate(9, -1, 19), "y": nothing}}
    panel["worse"] = {"x": stats.Estimate(-20, -32, -5), "y": nothing}
    below = {"row": {"x": nothing, "y": nothing}, "other": some, "worse": some}
    drawn = figures.heat_map({"a": panel, "b": below})
    upper, lower = drawn.axes
    assert upper.images[0].get_array().tolist() == [[12, None], [9, None], [-20, None]]
    assert upper.images[0].get_alpha()[:, 0].tolist() == [1, 0.25, 1]
    assert [each.get_text() for each in upper.texts] == ["12", "(9)", "-20"]
    assert [each.get_text() for each in lower.texts] == ["12", "12"]
    assert lower.get_position().y1 < upper.get_position().y0
    figures.pyplot.close("all")


@pytest.mark.robustness  # the default tests run without matplotlib
@each_experiment
def test_a_figure_is_drawn_of_nothing_and_of_a_whole_experiment(name, tmp_path):
    module = run.experiment(name)
    figures.pyplot.close(module.figure(Answers({}), module.MODELS))
    records = filled(all_cells(name), shipped_answers())
    figures.save(module.figure(Answers(records), module.MODELS), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


@each_experiment
def test_each_image_of_a_contact_sheet_has_a_label(context, drawings, monkeypatch, name):
    module = run.experiment(name)
    if not hasattr(module, "sheet"):
        pytest.skip("it has no sheet")
    sheets = []
    monkeypatch.setattr(sample, "contact_sheet", lambda rows, least=96: sheets.append(rows))
    monkeypatch.setattr(core.Context, "load", lambda context, *what: context.sd)
    module.sheet(context, Answers(filled(all_cells(name), shipped_answers())))
    rows, = sheets
    assert len(rows) > 2
    assert all(len(labels) == len(images) > 5 for labels, images in rows)


# ---- the page


def test_links_lead_to_sections():
    anchors = [page.anchor_of(name) for name in run.NAMES]
    assert len({*anchors}) == len(anchors)
    assert page.anchor_of("objects") == "#objects-53-table-2"


def test_the_page_has_what_is_stored(monkeypatch, tmp_path):
    run.write_records(tmp_path, "eta", filled(all_cells("eta"), {}))
    table = run.stored_table("eta", tmp_path)
    monkeypatch.setattr(run, "SHIPPED", tmp_path)
    monkeypatch.setattr(run, "stored_table", functools.partial(run.stored_table, folder=tmp_path))
    text = page.page()
    assert len(table.splitlines()) > 3 and table in text
    assert page.section("eta") in text
    assert f"]({page.anchor_of('eta')})" in text
    assert "paraphrase.py" not in text and "{links}" not in text


def test_the_stored_results_are_of_this_code_and_these_models():
    context = core.open_context(core.TOY, Path("runs/experiments"), quick=False)
    records_of = run.read_records(run.SHIPPED)
    assert all(records_of[name] for name in run.NAMES if run.reads(name) == (name,))
    for name, records in records_of.items():
        module = run.experiment(name)
        cells = module.cells(module.MODELS, module.CONCEPTS, module.SEEDS)
        by_key = {cell.key: cell for cell in cells}
        for key, record in records.items():
            # a model that was trained elsewhere has a fingerprint only where it lies
            settings = run.without_fingerprint(context.settings(by_key[key]))
            assert run.without_fingerprint(record["settings"]) == settings, (name, key)



@pytest.mark.robustness  # seconds
def test_the_page_is_of_the_stored_results():
    assert (FOLDER / "README.md").read_text() == page.page()


# ---- with the miniature itself


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of erased weights for all of these."""
    return tmp_path_factory.mktemp("kept")


@pytest.mark.robustness
@each_experiment
def test_an_experiment_runs(name, kept, tmp_path, capsys):
    """The original and the first erased model, quickly; then from what is stored."""
    if run.reads(name) != (name,):
        pytest.skip("it asks nothing of its own; the gate runs it with all others")
    models = run.experiment(name).MODELS
    labels = [model.label for model in models if model.label == "original"]
    labels += [model.label for model in models if model.method][:1]
    words = [name, "--quick", "--anew", "--only", *labels, "--processes", 1]
    words += ["--weights", kept, "--results", tmp_path]

    commands.run(run.main, *words)
    first = capsys.readouterr()
    records = json.loads((tmp_path / f"{name}.json").read_text())
    assert {key.partition("/")[0].partition(", g ")[0] for key in records} == {*labels}
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    rows = len(rows_of(first.out))
    assert rows > 2 or name == "ground_truth"  # which needs models that are trained first

    commands.run(run.main, *words)
    again = capsys.readouterr()
    assert again.out == first.out
    assert "answer" not in again.err
    assert json.loads((tmp_path / f"{name}.json").read_text()) == records


def start(cwd: Path, *words) -> subprocess.Popen:
    """Starts the command in a folder, with `results` and `weights` there.

    It takes Ctrl-C even if these tests run in the background of a script, where it is ignored.
    """
    toy = ROOT / "notebooks" / "toy" / "model"
    words = [*words, "--quick", "--anew", "--model", toy]
    words += ["--weights", "weights", "--results", "results"]
    return subprocess.Popen(
        [sys.executable, "-m", "notebooks.experiments.run", *map(str, words)],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def working_in(folder: Path) -> list[Path]:
    """Returns the processes in a folder, on Linux."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found += [link.parent] * (link.readlink() == folder)
    return found


def stored_in(folder: Path, name: str = "paraphrase") -> dict[str, dict]:
    file = folder / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.robustness
def test_a_killed_run_goes_on_and_two_processes_give_what_one_gives(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    printed, errors = start(whole, "paraphrase", "--processes", 2).communicate(timeout=300)
    assert len(stored_in(whole)) == 6, errors

    process = start(killed, "paraphrase", "--processes", 2)
    while not stored_in(killed) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = stored_in(killed)
    deadline = time.time() + 20
    while (left := working_in(killed)) and time.time() < deadline:
        time.sleep(0.1)
    assert not left  # no worker goes on
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(before) < 6

    again, errors = start(killed, "paraphrase", "--processes", 1).communicate(timeout=300)
    assert f"/{6 - len(before)} [" in errors
    assert before.items() <= stored_in(killed).items()
    results = [folder / "results" / "paraphrase.json" for folder in (whole, killed)]
    assert results[0].read_bytes() == results[1].read_bytes()
    assert again == printed


@pytest.mark.robustness
def test_ctrl_c_ends_all_processes(tmp_path):
    process = start(tmp_path, "paraphrase", "--processes", 2)
    while not stored_in(tmp_path) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    deadline = time.time() + 20
    while (left := working_in(tmp_path)) and time.time() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.robustness
def test_a_strangers_method_in_the_folder_where_the_command_runs(tmp_path):
    """In several processes, each of which has to find it."""
    (tmp_path / "my_file.py").write_text(STRANGER)
    process = start(tmp_path, "paraphrase", "--only", "original")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    words = ["paraphrase", "--only", "original", "mine", "--label", "mine", "--processes", 2]
    process = start(tmp_path, *words, "--method", "my_file:my_erase", "--set", "size=0")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "| mine |" in printed
    records = stored_in(tmp_path)
    for ask in ("by name", "by paraphrases"):  # size 0 changes nothing
        mine = records[f"mine/star/seed 0/{ask}"]["answer"]
        assert mine == records[f"original//seed 0/{ask}"]["answer"]

    (tmp_path / "my_file.py").write_text(STRANGER.replace("return", "return 1 / 0,"))
    process = start(tmp_path, *words, "--method", "my_file:my_erase")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert 'my_file.py", line 5' in errors  # of the traceback
    last = errors.splitlines()[-1]
    assert last.startswith("1 failed, the first is mine/star/seed 0/")
    assert last.endswith("ZeroDivisionError: division by zero")

    # as if memory had run out; with a style, there are two erasures for two processes
    ends = STRANGER.replace("return", "__import__('os')._exit(9);")
    (tmp_path / "my_file.py").write_text(ends)
    process = start(tmp_path, "styles", *words, "--method", "my_file:my_erase")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: a process ended without an answer")
