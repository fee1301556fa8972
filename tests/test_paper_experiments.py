"""notebooks/experiments: the answers of their own that the paper's experiments have."""

import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddim
import erase
from notebooks.experiments import (
    checksums,
    choices,
    core,
    eta,
    original,
    paraphrase,
    quality,
    works,
)
from notebooks.experiments.core import Answers, Model
from notebooks.methods import esd
from notebooks.toy import judge as judging
from notebooks.toy import world

TOY = Path(__file__).parents[1] / "notebooks" / "toy" / "model"


@pytest.fixture(scope="module")
def context(sd) -> core.Context:
    """A small model, and the miniature's judge."""
    return core.Context(
        sd, judging.load(TOY), base="", judged_by="", weights=Path(), quick=True
    )


def drawing(monkeypatch, images_of) -> None:
    """Has `images_of(prompt, i)` draw in place of a model."""

    def draw(context, sd, cell, prompts):
        return [images_of(prompt, i) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(core.Context, "draw", draw)


# ---- quality


@pytest.mark.parametrize(
    "caption, seen, expected",
    [
        ("a red star in the style of dots", {}, True),
        ("a red star in the style of dots", {"object": "moon"}, False),
        ("a red star in the style of dots", {"colour": "blue"}, False),
        ("a red star in the style of dots", {"style": "neon"}, False),
        ("a five pointed figure", {"colour": "blue", "style": "neon"}, True),
        ("a star in spring", {"colour": None}, True),
        ("a picture in the style of dots", {}, None),
        ("", {}, None),
        ("a sheriff badge in winter", {}, None),
    ],
)
def test_an_image_is_right_if_all_that_the_caption_names_is_seen(caption, seen, expected):
    example = world.Example(None, caption, object="star", colour="red", style="dots")
    looks = {"object": "star", "colour": "red", "style": "dots"} | seen
    assert quality.shows_caption(example, looks) is expected


def test_a_word_within_a_word_is_no_object():
    example = world.Example(None, "a picture in spring", object="ring", style="plain")
    assert quality.shows_caption(example, {"object": "ring", "style": "plain"}) is None


def test_quality_asks_captions_without_the_star_and_compares_with_other_images(
    context, monkeypatch
):
    """With the rendered images of the captions themselves, all is right."""
    rng = np.random.default_rng(7)
    examples = [world.draw(rng, without=("star",)) for _ in range(4)]
    asked = []

    def images_of(caption, i):
        asked.append(caption)
        return examples[i].image

    drawing(monkeypatch, images_of)
    cell = core.cell_of(core.original, "star", seed=7, ask=quality.quality_of)
    answer = quality.quality(context, context.sd, cell)
    assert asked == [example.caption for example in examples]
    assert answer["right"] == answer["asked"] > 0
    assert answer["frechet"] > 1  # 0 to the same images

    drawing(monkeypatch, lambda caption, i: Image.new("RGB", (64, 64)))
    assert quality.quality(context, context.sd, cell)["right"] == 0


# ---- works


def test_a_work_is_seen_if_nothing_else_is_nearer(context, monkeypatch):
    """One work is drawn as another, one is a little darker; the others are themselves."""
    swapped = {"harvest hills": "Coral Garden"}

    def images_of(prompt, i):
        titles = {title.lower(): title for title in world.WORKS}
        if prompt not in titles:  # ordinary prompts: the original's are redder
            ordinary.append(prompt)
            return Image.new("RGB", (64, 64), (30 if len(ordinary) > 10 else 0, 0, 0))
        image = world.render_work(swapped.get(prompt, titles[prompt]))
        if prompt == "desert noon":
            image = Image.fromarray(np.asarray(image) - np.uint8(10))
        return image

    ordinary = []
    drawing(monkeypatch, images_of)
    cell = core.cell_of(core.original, (), seed=0, ask=works.distances_of)
    answer = works.distances(context, context.sd, cell)
    records = {cell.key: {"settings": {}, "answer": answer}}
    row = works.Row("", core.original, ())

    for title in world.WORKS:
        hits = works.shares_seen(Answers(records), row, [title])
        assert hits == [core.Share(0 if title == "Harvest Hills" else 4, 4)], title
        mean, = works.mean_distances(Answers(records), row, [title])
        if title == "Desert Noon":
            assert mean == pytest.approx(10)
        else:
            assert (mean == 0) == (title != "Harvest Hills")
    assert answer["Harvest Hills"]["nearest"] == [0] * 4
    assert answer["ordinary"] == [10] * 10  # one channel of three


def test_x_t_of_works_are_the_works_with_noise(sd, monkeypatch):
    """Each with its own text, without a trajectory."""
    batches = []

    def steps(sd, prompts, data, method, seed):
        texts = erase.texts_for(sd, prompts, 2)
        rng = torch.Generator().manual_seed(seed)
        found = data(None, texts, (2, *sd.latent_shape), rng)
        batches.extend(itertools.islice(found, 12))
        return prompts

    monkeypatch.setattr(erase, "erase", steps)
    titles = ["quiet harbour", "coral garden"]
    prompts = works.erase_works(
        sd, dict.fromkeys(titles, "a picture"), ["star"], seed=3, steps=8, every_step=False
    )
    assert prompts == titles

    latents = sd.encode_images([world.render_work(t) for t in ("Quiet Harbour", "Coral Garden")])
    abar = ddim.alphas_cumprod()
    rng = torch.Generator().manual_seed(3)
    indices = set()
    for x_t, t, text in batches:
        i = torch.randint(2, (1,), generator=rng).item()
        time = ddim.timesteps(8)[torch.randint(8, (1,), generator=rng).item()]
        noise = torch.randn((2, *sd.latent_shape), generator=rng)
        assert t.tolist() == [time] * 2 and text.index == i
        assert torch.equal(x_t, ddim.add_noise(latents[i].expand_as(noise), noise, abar[time]))
        indices.add(i)
    assert indices == {0, 1}


def test_works_are_erased_by_their_titles():
    _, esd_x = works.MODELS
    cells = works.cells(works.MODELS, works.CONCEPTS, seeds=[0])
    erased = {cell.concepts for cell in cells if cell.model is esd_x}
    assert [len(titles) for titles in sorted(erased)] == [1, 2, 3]
    assert esd_x.prompts(("Quiet Harbour",)) == {"quiet harbour": "a picture"}
    assert works.cells(works.MODELS, ["star", "Desert Noon"], seeds=[0]) == []
    assert works.cells([esd_x], ["Harvest Hills"], seeds=[0])


def test_a_strangers_file_that_erases_two_works_is_one_row():
    model = Model("mine", file="mine.safetensors", together=works.FAMILY[:2])
    cell = core.cell_of(model, works.FAMILY[:1], seed=0, ask=works.distances_of)
    rows = works.stored_rows(Answers({cell.key: {"answer": {}}}), [*works.MODELS, model])
    assert rows == [works.Row("mine, 2 erased", model, works.FAMILY[:2])]


# ---- the original


def test_readings_count_what_the_judge_reads_right(context, monkeypatch):
    answer = original.readings(context, context.sd, core.cell_of(
        core.original, (), seed=0, ask=original.readings_of
    ))
    assert answer["training images"] == {head: (4, 4) for head in judging.HEADS}
    assert answer["held-out scenes"]["style"] == (4, 4)
    nothing = answer["images of nothing"]
    assert all(0 < right == asked <= 4 for right, asked in nothing.values())

    monkeypatch.setattr(
        judging, "read", lambda judge, images: [dict.fromkeys(judging.HEADS)] * len(images)
    )
    answer = original.readings(context, context.sd, core.cell_of(
        core.original, (), seed=0, ask=original.readings_of
    ))
    assert {right for right, _ in answer["training images"].values()} <= {0, 1}  # of a work
    assert answer["images of nothing"] == nothing


def test_the_original_is_measured_alone():
    cells = original.cells([core.original, Model("mine", core.grid)], original.CONCEPTS, [0, 1])
    assert all(cell.model == core.original for cell in cells)
    assert len(cells) == 2 * len(original.ASKS)


# ---- what is erased


def test_a_paraphrase_is_erased_in_place_of_the_name():
    by_name, by_paraphrase = paraphrase.MODELS[1:]
    assert by_name.prompts(("star",)) == {"star": "a picture"}
    assert by_paraphrase.prompts(("star",)) == {"five pointed figure": "a picture"}
    assert by_name._replace(label="", prompts=None) == by_paraphrase._replace(
        label="", prompts=None
    )


def test_the_choices_are_what_their_labels_say():
    settings = {model.label: model.settings for model in choices.MODELS}
    every_step, edited, frozen, first, values, code, rule = [*settings.values()][1:]
    assert every_step["every_step"] and not edited["every_step"] and not frozen["every_step"]
    assert {each["first"] for each in (every_step, edited, frozen, code)} == {None}
    assert frozen["x_t"] == "frozen" and "x_t" not in edited
    assert first["first"] == 4 and values == first | {"method": "esd-x-strict"}
    assert code["method"] == "esd-u" and rule == code | {"method": "esd-u of the paper"}
    assert [model.settings.get("eta", 1) for model in eta.MODELS[1:]] == [1, 3, 10]


def test_the_reduction_is_of_what_the_original_shows():
    """It shows a star in half of the star's scenes, the erased model in an eighth: 75 % less."""
    original, erased = eta.MODELS[:2]
    wanted = core.wanted_by(core.in_scenes.questions())
    stars = [i for i, each in enumerate(wanted) if each["object"] == "star"]
    records = {}
    for model, every in ((original, 2), (erased, 8)):
        letters = [core.LETTERS[-1]] * len(wanted)  # nothing
        for i in stars[::every]:
            letters[i] = core.LETTERS[world.OBJECTS.index("star")]
        cell = core.cell_of(model, "star", 0, core.in_scenes)
        seen = {head: "a" * len(wanted) for head in judging.HEADS} | {"object": "".join(letters)}
        records[cell.key] = {"answer": seen}
    assert len(stars) % 8 == 0
    assert eta.reduction(core.Answers(records), erased, ["star"]) == "75"
    assert eta.reduction(core.Answers({}), erased, ["star"]) == ""


def test_quality_is_compared_with_the_original_on_the_same_captions():
    """The distance by its difference, the images that are right in points of those asked."""
    records = {}
    for label, fewer in (("original", 0), ("ESD-u", 9), ("SLD-max", 60)):
        model = next(each for each in quality.MODELS if each.label == label)
        for seed, asked in enumerate([150, 180]):
            cell = core.cell_of(model, "star", seed, quality.quality_of)
            answer = {"frechet": 10.0 + seed + fewer, "right": asked - fewer, "asked": asked}
            records[cell.key] = {"answer": answer}
    rows = quality.table_of_differences(core.Answers(records), quality.MODELS).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| ESD-u", "| SLD-max"]
    assert rows[2].split(" | ")[2:] == ["9.0", "-5.5 (-11.9 to 0.9) |"]  # -6 and -5
    assert quality.table(core.Answers({}), quality.MODELS).count("\n") == 1


# ---- checksums


def test_an_answer_depends_on_its_helpers_and_not_on_the_findings(tmp_path, monkeypatch):
    """An experiment's file also has its tables, which don't make an answer stale."""
    source = '''
import functools
FINDINGS = "none"
HALF = 0.5

@functools.cache
def helper(x):
    """Halves."""
    return helper(x) * HALF if x else 0

def answer(context, sd, cell):
    return {"a": [helper(x) for x in (1, 2)]}

def table():
    return FINDINGS
'''
    monkeypatch.syspath_prepend(tmp_path)

    def checksum(changed, i):
        (tmp_path / f"experiment_{i}.py").write_text(changed)
        return checksums.sources_used(__import__(f"experiment_{i}").answer)

    first = checksum(source, 0)
    assert first.keys() == {"answer", "helper", "HALF"}
    assert checksum(source.replace("none", "many").replace("Halves", "Halves it"), 1) == first
    for i, (old, new) in enumerate([("0.5", "0.6"), ("else 0", "else 1"), ("(1, 2)", "(1, 3)")]):
        assert checksum(source.replace(old, new), 2 + i) != first


def test_a_method_in_an_experiments_file_has_a_checksum_of_its_own(monkeypatch):
    """The methods that it imports are in it, the experiment's file as a whole isn't."""
    code_of_method = inspect.unwrap(checksums.code_of_method)
    first = code_of_method(works.erase_works)
    modules = []
    monkeypatch.setattr(checksums, "code_of", lambda *several: modules.extend(several))
    code_of_method(works.erase_works)
    assert esd in modules and works not in modules

    monkeypatch.undo()
    monkeypatch.setattr(checksums, "sources_used", lambda function: {"erase_works": "changed"})
    assert code_of_method(works.erase_works) != first
