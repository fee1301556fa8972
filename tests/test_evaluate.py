"""notebooks/toy/evaluate.py, tables.py and cost.py: erasing, counting, resuming, the results."""

import functools
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

import ddim
import erase
import sample
from notebooks.methods import (
    adversarial_esd,
    concept_ablation,
    probes,
    rece,
    safe_latent_diffusion,
    uce,
)
from notebooks.toy import cost, evaluate, measure, models, robust, tables, world
from support import commands, small

CELLS = {name: evaluate.cells(name) for name in evaluate.EXPERIMENTS}
ALL_CELLS = [cell for cells in CELLS.values() for cell in cells]


@pytest.fixture(scope="module")
def results():
    return json.loads(Path("notebooks/toy/results.json").read_text())


@pytest.fixture(scope="module")
def context():
    """As the stored results were made, but without the retrained miniatures."""
    iterations = models.FLAGS["iterations"]
    here = models.open_context(Path("notebooks/toy/model"), None, num=50, iterations=iterations)
    weights = {key: here.weights[key] for key in ("unet", "judge")}
    return here._replace(weights=weights)


# ---- shares, intervals and tests


@pytest.mark.parametrize(
    "hits, asked, expected",
    [
        (0, 50, "0.0 (0 to 7)"),
        (25, 50, "50.0 (37 to 63)"),
        (50, 50, "100.0 (93 to 100)"),
        (1, 3, "33.3 (6 to 79)"),
        (0, 0, ""),
    ],
)
def test_wilsons_interval(hits, asked, expected):
    assert tables.share(hits, asked) == expected


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("1100", "1100", (0, 0, 1)),
        ("1100", "0110", (1, 1, 1)),
        ("1" * 8, "0" * 8, (8, 0, 2 / 256)),
        ("0" * 10, "1" * 9 + "0", (0, 9, 2 / 512)),
        ("1110", "0001", (3, 1, 10 / 16)),
    ],
)
def test_mcnemars_test_counts_where_two_differ(one, other, expected):
    assert tables.mcnemar(one, other) == expected


def test_mcnemars_test_needs_as_many_images_of_both():
    with pytest.raises(ValueError):
        tables.mcnemar("110", "11")


def test_shares_are_taken_over_all_images_of_the_classes():
    confusion = {"star": {"star": 3, "heart": 1}, "heart": {"heart": 6}, "moon": {"star": 5}}
    assert tables.share_seen([confusion], [["star", "heart"]]) == tables.share(9, 10)
    assert tables.share_seen([confusion], [["moon"]]) == tables.share(0, 5)
    assert tables.share_seen([confusion] * 2, [["star"], ["moon"]]) == tables.share(3, 9)
    assert tables.share_seen([confusion, None], [["star"], ["moon"]]) == tables.share(3, 4)
    assert tables.share_seen([confusion] * 2, [["star"], ["star", "moon"]]) == tables.share(3, 9)


def test_total_variation():
    seen = {"moon": 3, "star": 1}
    others = {"moon": 2, "heart": 6}
    assert tables.total_variation(seen, others) == pytest.approx((0.5 + 0.25 + 0.75) / 2)
    assert tables.total_variation(seen, {"moon": 30, "star": 10}) == 0
    assert tables.total_variation({"star": 5}, {"heart": 2}) == 1


def test_two_sets_from_one_model_differ_as_by_chance():
    """Nine names, 50 images each, drawn from one distribution: 5 % are above what chance gives."""
    rng = random.Random(0)
    above = 0
    for _ in range(15):
        one = Counter(rng.choices(world.OBJECTS[:9], k=50))
        other = Counter(rng.choices(world.OBJECTS[:9], k=50))
        value, chance = map(float, re.findall(r"[\d.]+", tables.against_chance(one, other)))
        above += value > chance
        assert 0.2 < chance < 0.4
    assert above <= 3
    assert tables.against_chance({"star": 50}, {"moon": 50}) == "1.00 (chance 0.20)"


def test_a_means_interval():
    """Of 0, 1 ... 19: mean 9.5, standard deviation 5.916; t is 2.093 for 19 degrees of freedom."""
    assert tables.mean_of_20([*range(20)]) == "9.500 (6.731 to 12.269)"


@pytest.mark.parametrize(
    "hits, expected",
    [
        ((0, 10, 20, 45), "20 (10 to 40)"),
        ((50, 50, 50, 50), "0 (0 to 0)"),
        ((0, 0, 0, 24), "over 40 (40 to over 40)"),
        ((0, 0, 0, 0), "over 40 (over 40 to over 40)"),
    ],
)
def test_the_steps_to_half_of_the_share(hits, expected):
    """Of 50 images; the interval is where the share's bounds reach the half."""
    relearned = dict(zip(("10", "20", "40"), hits[1:]))
    found = {"num": 50, "by name": hits[0], "relearned": relearned}
    assert tables.steps_to(0.3 if hits[1] == 10 else 0.5, found) == expected


# ---- tables


def counted(own: int, rest: int, concept: str) -> dict:
    """Ten images of each object: how many are right of the concept and of each other one."""
    counts = {}
    for name in world.OBJECTS:
        right = own if name == concept else rest
        counts[name] = {name: right, "none of these": 10 - right}
    return counts


def test_the_table_of_methods_counts_what_is_gone():
    styled = ""  # two images of each object in each style
    for style in tables.STYLES:
        for name in world.OBJECTS:
            in_neon = "10" if style == "neon" else "11"
            styled += {"star": "00", "moon": in_neon}.get(name, "11")

    def cell(own, rest, cost):
        return {
            "names": counted(own, rest, "star"),
            "contexts": counted(own + 1, rest, "star"),
            "styled, right": styled,
            "cost": cost,
        }

    answers = {
        "methods/star/UCE": cell(2, 7, {"seconds": 1.25, "parameters": 12345}),
        "methods/star/original": cell(9, 9, {}),
    }
    rows = tables.methods_table(answers).splitlines()
    assert rows[2:] == [
        f"| star (names) | original | {tables.share(1, 10)} | {tables.share(0, 10)} | "
        f"{tables.share(81, 90)} | {tables.share(89, 90)} |  |  |",
        f"| star (names) | UCE | {tables.share(8, 10)} | {tables.share(7, 10)} | "
        f"{tables.share(63, 90)} | {tables.share(89, 90)} | 1.2 | 12 |",
    ]


def test_another_kind_leaves_out_what_names_the_concept():
    """The tables know the order of the questions without loading any model."""
    in_styles = [question.wanted["object"] for question in measure.styled(1)]
    assert in_styles == [*world.OBJECTS] * len(tables.STYLES)
    assert [question.wanted["object"] for question in measure.objects(1)] == [*world.OBJECTS]

    right = "".join("00" if name == "heart" else "11" for name in in_styles)
    answer = {"styled, right": right}
    assert tables.another_kind(answer, "styled", "heart") == tables.share(90, 90)
    answer = {"names, right": "1" * 9 + "0"}
    assert tables.another_kind(answer, "names", "mosaic") == tables.share(9, 10)


def test_the_table_of_objects_keeps_its_columns_apart():
    answers = {
        "objects/original": {"names": counted(10, 9, "star")},
        "objects/star/ESD-u": {"names": counted(1, 8, "star")},
        "objects/star/ESD-u, the paper's rule": {"names": counted(3, 6, "star")},
        "objects/star/ESD-x": {"names": counted(2, 7, "star")},
    }
    line = tables.objects_table(answers).splitlines()[2]
    shares = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
    assert line.startswith("| star |")
    assert shares == [100, 10, 30, 20, 90, 80, 60, 70]


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_every_model_is_in_its_table(results, name):
    """tables.py and evaluate.py each have their list of names."""
    like = {}
    for ask in {ask for cell in CELLS[name] for ask in cell.ask}:
        like |= next(answer for answer in results.values() if ask in answer)
    of_objects = {c: {c: 1} for c in world.OBJECTS}
    for kind in ("names", "name", "scenes", "all scenes", "paraphrases", "contexts"):
        like[kind] = of_objects
    like["styled"] = {style: {style: 1} for style in world.STYLES[1:]}

    answers = {}
    for cell in CELLS[name]:
        asked = {kind: found for kind, found in like.items() if kind.split(",")[0] in cell.ask}
        answers[cell.key] = asked
    table = tables.TABLES[name].make(answers)
    cells = {cell.strip(" ,%") for line in table.splitlines() for cell in line.split("|")}
    assert {cell.model.name for cell in CELLS[name]} - {"original"} <= cells
    assert "original" in cells or name in ("objects", "which")


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_what_is_missing_is_left_out(results, name):
    """Half of the cells, then none: fewer rows and no error."""
    own = [key for key in results if key.startswith(f"{name}/")]
    sizes = []
    for keys in (own, own[::2], own[:1], []):
        table = tables.TABLES[name].make({key: results[key] for key in keys})
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1  # the same columns in all rows
        sizes.append(len(lines))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 2 + (name == "objects") < sizes[0]


def test_the_heading_says_what_most_cells_share(results):
    line = tables.heading(results)
    assert "--iterations 160 --steps 8 --batch 4 --every-step;" in line
    assert "esd-x --lr 0.0004, esd-u --lr 7e-05, a style --iterations 480. At least 50" in line
    assert ", 500 for the quality; 10 DDIM steps, guidance 5;" in line

    erasure = {"iterations": 7, "lr": 1, "method": "esd-x", "data": "every step"}
    settings = results["which/star/keys and values only"]["settings"] | {"erase": erasure}
    other = {"settings": settings}
    assert tables.heading(results | {"one": other}) == line
    alone = tables.heading({"one": other})
    assert "--iterations 7 --every-step; esd-x --lr 1." in alone


def test_tables_load_no_model():
    code = (
        "import sys; from notebooks.toy import tables; "
        "print({'torch', 'sample', 'erase', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_prints_the_stored_tables(results, capsys):
    commands.run(tables.main)
    printed = capsys.readouterr().out
    for title, make in tables.TABLES.values():
        assert make(results) in printed
        assert f"**{title}**" in printed

    commands.run(tables.main, "eta")
    printed = capsys.readouterr().out
    assert tables.eta_table(results) in printed
    assert "ESD-x" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "unknown experiment 'nothing'"),
        (["--results", "none.json"], "can't read"),
        (["--results", "notebooks/toy/flags"], "can't read"),
        (["--results", "notebooks/toy/model_index.json"], "has no results"),
    ],
)
def test_what_has_no_tables_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        commands.run(tables.main, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# ---- models and cells


def test_no_two_cells_have_the_same_key():
    keys = [cell.key for cell in ALL_CELLS]
    assert len(keys) == len(set(keys)) > 100


@pytest.mark.parametrize(
    "concept, prompt", [("star", "star"), ("dots", "a picture in the style of dots")]
)
def test_a_concept_is_erased_and_avoided_by_the_same_prompt(concept, prompt):
    assert models.model_named("ESD-x", concept).erase["concepts"] == [prompt]
    avoiding = models.model_named("negative prompt", concept)
    assert avoiding.sampling == {"negative": prompt}
    avoiding = models.model_named("SLD-max", concept)
    assert avoiding.sampling == {"safe": prompt, "sld": "max"}


def test_an_unknown_model_is_not_the_original_under_another_name():
    with pytest.raises(KeyError):
        models.model_named("ESD-y", "star")


@pytest.mark.parametrize(
    "name, method",
    [
        ("ESD-x", "esd-x"),
        ("ESD-u", "esd-u"),
        ("keys and values only", "esd-x"),
        ("ESD-u, the paper's rule", "esd-u"),
    ],
)
def test_a_rate_belongs_to_what_is_tuned(context, name, method):
    """The parts of ESD-x get its rate; ESD-u's left 98 % of the stars to keys and values."""
    settings = context.settings(models.model_named(name, "star"))
    assert settings["lr"] == models.RATES[method]


@pytest.mark.parametrize(
    "name, concept, times",
    [
        ("ESD-x", "star", 1),
        ("ESD-x, in contexts", "star", 1),
        ("ESD-x", "mosaic", 3),
        ("ESD-u, in contexts", "mosaic", 3),
        ("concept ablation", "star", 3),
        ("concept ablation", "mosaic", 3),
    ],
)
def test_styles_and_concept_ablation_take_longer(context, name, concept, times):
    settings = context.settings(models.model_named(name, concept))
    assert settings["iterations"] == times * models.FLAGS["iterations"]


def test_a_retrained_model_is_found_by_its_name():
    assert models.model_named("never saw it", "heart").retrained == "without_heart"
    assert models.model_named("censored training", "heart").retrained == "censored"
    assert {"without_heart", "censored"} <= models.RETRAINED.keys()


def test_the_settings_are_those_of_the_flags_file_and_are_json(context):
    """But a style is learned three times as long."""
    flags = measure.flags()
    for cell in ALL_CELLS:
        settings = context.settings(cell.model)
        assert json.loads(json.dumps(settings)) == settings
        if cell.model.name == "ESD-x":
            of_data = flags["data"].keywords
            assert settings["data"] == "every step" and of_data["every_step"]
            assert settings["steps"] == of_data["steps"]
            assert settings["lr"] == flags["lr"]
            assert settings["batch"] == flags["batch"]
            times = 3 if cell.concept in tables.STYLES else 1
            assert settings["iterations"] == times * flags["iterations"]


# ---- erasing by what a name in the settings means


SETTINGS = {"iterations": 2, "steps": 2, "lr": 1e-4, "batch": 1}


def erased(sd, method="esd-x", data="edited", **more):
    settings = SETTINGS | more
    return models.erased_weights(sd, ["star"], method=method, data=data, **settings)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_predicates_choose_what_the_paper_and_its_code_say(sd):
    methods = dict(erase.METHODS)
    names = [name for name, _ in sd.unet.named_parameters()]
    written = {*erased(sd, "esd-u of the paper")}
    ours = {*erased(sd, "esd-u")}
    assert written == {name for name in names if "attn2" not in name}

    spared = written - ours
    output_or_time = re.compile(r"(time_embedding|conv_norm_out|conv_out)\.")
    assert spared
    assert all(output_or_time.match(name) for name in spared)

    strict = {*erased(sd, "esd-x-strict")}
    assert strict
    assert strict == {name for name in names if re.search(r"attn2\.to_[kv]", name)}
    assert erase.METHODS == methods


class CountingUNet:
    """The U-Net, which counts its calls."""

    def __init__(self, unet):
        self.unet = unet
        self.calls = 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.unet(*inputs)


def test_each_kind_of_data_is_what_its_name_says(sd):
    """Which U-Net draws x_t, and how many of its calls are used."""
    titles = ["quiet harbour", "harvest hills"]
    texts = erase.texts_for(sd, titles, batch=1)
    shape = (1, *sd.latent_shape)
    edited = CountingUNet(sd.unet)

    def batches(name, count=6):
        edited.calls = 0
        data = models.data_function(sd, name, titles, steps=3)
        found = data(edited, texts, shape, Generator().manual_seed(0))
        return [*itertools.islice(found, count)]

    own = batches("edited")
    assert edited.calls > 0
    frozen = batches("frozen")
    assert edited.calls == 0
    assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(own, frozen))  # edited is sd.unet here

    every_step = batches("every step")
    assert edited.calls == 2 * 2
    assert [batch.t.item() for batch in every_step] == 2 * [667, 334, 1]

    works = batches("works")
    assert edited.calls == 0
    images = [world.render_work(title) for title in ("Quiet Harbour", "Harvest Hills")]
    noised = erase.x_t_from_images(
        None, texts, shape, Generator().manual_seed(0), latents=sd.encode_images(images), steps=3
    )
    for ours, theirs in zip(works, noised):
        assert torch.equal(ours.x_t, theirs.x_t)
        assert ours.text is theirs.text


@pytest.mark.parametrize("name, module", [("uce", uce), ("rece", rece)])
def test_closed_forms_erase_as_their_own_files_do(sd, name, module):
    keep = ["heart", "a picture in the style of dots"]
    found = models.erased_weights(sd, {"star": ""}, method=name, keep=keep)
    assert same(found, module.erase(sd, {"star": ""}, keep))


def test_other_losses_are_given_to_erase(sd, monkeypatch):
    given = {}

    def fake_erase(sd, concepts, **settings):
        given.update(settings)
        return concepts

    def fake_generate(sd, prompts, num, **settings):
        given["prompts"] = prompts
        return [world.render_work("Quiet Harbour")] * num

    monkeypatch.setattr(erase, "erase", fake_erase)
    keep = ["heart"]
    assert erased(sd, variant="adversarial", keep=keep) == ["star"]
    assert given["loss_fn"].func is adversarial_esd.loss
    assert given["data"].func is adversarial_esd.data
    assert given["data"].keywords == {"sd": sd, "keep": keep, "steps": 2, "every_step": True}
    assert given["method"] == "esd-x"

    ablation = models.model_named("concept ablation", "star").erase
    assert ablation["concepts"] == {"star": "circle"}
    monkeypatch.setattr(sample, "generate", fake_generate)
    assert models.erased_weights(sd, **SETTINGS | ablation) == {"star": "circle"}
    assert given["loss_fn"] is concept_ablation.loss
    assert given["prompts"] == ["circle"]
    assert given["method"] is uce.keys_and_values


@pytest.mark.parametrize("name", ["ESD-x, in contexts", "ESD-u against learned prompts"])
def test_data_with_prompts_of_their_own_erases(sd, name):
    """The real ones, end to end: theta moves, and is the same for the same seed."""
    settings = SETTINGS | {"data": "every step"} | models.model_named(name, "star").erase
    settings |= {"iterations": 1, "method": "esd-x-strict"}
    theta = models.erased_weights(sd, **settings)
    assert same(theta, models.erased_weights(sd, **settings))
    before = sample.unet_tensors(sd)
    assert not any(torch.equal(tensor, before[key]) for key, tensor in theta.items())


def test_contexts_name_every_second_colour_and_style_or_object():
    star = models.contexts_of("star")
    assert len(star) == 1 + 3 + 3
    assert star["star"] == ""
    assert star["a red star"] == "a red picture"
    assert star["a star in the style of neon"] == "a picture in the style of neon"

    mosaic = models.contexts_of("mosaic")
    assert len(mosaic) == 6
    assert mosaic["a picture in the style of mosaic"] == "a picture"
    assert mosaic["a circle in the style of mosaic"] == "a circle"

    asked = {question.prompt for question in evaluate.in_contexts(1)}
    assert not asked & {*star}
    assert len(asked) == (3 + 2) * len(world.OBJECTS)


def test_the_cost_of_an_erasure(context, tmp_path):
    here = context._replace(run=tmp_path)
    model = models.model_named("UCE", "star")
    found = here.cost(model)
    assert here.settings(model)["method"] == "uce"
    moved = erase.trainable_copies(here.sd.unet, uce.keys_and_values)
    assert found["parameters"] == sum(tensor.numel() for tensor in moved.values())
    assert 0 < found["seconds"] < 60
    assert here.cost(model) == found  # from the file, not made again

    loaded = sample.load_erased(here.sd, here.erased(model))
    assert same(loaded.unet.state_dict(), here.load(model).unet.state_dict())


def test_bfloat16_rounds_weights_and_state():
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.3]))
    optimizer = torch.optim.Adam([weight], lr=1e-4)
    weight.sum().backward()
    optimizer.step()
    models.round_to_bfloat16(optimizer)
    assert weight[0] == 1  # an update of 1e-4 is lost next to 1
    for tensor in (weight, *optimizer.state[weight].values()):
        assert torch.equal(tensor, tensor.bfloat16().float())
    optimizer.step()
    assert weight[0] != 1


def test_bfloat16_rounds_after_each_step_and_in_its_own_variant_only(sd, monkeypatch):
    rounded = erased(sd, variant="bfloat16")
    assert all(torch.equal(t, t.bfloat16().float()) for t in rounded.values())
    exact = erased(sd)
    assert not all(torch.equal(t, t.bfloat16().float()) for t in exact.values())

    once = erased(sd, variant="bfloat16", iterations=1)
    plain = erased(sd, iterations=1)
    assert same(once, {name: tensor.bfloat16().float() for name, tensor in plain.items()})

    steps = []
    monkeypatch.setattr(models, "round_to_bfloat16", steps.append)
    erased(sd, variant="bfloat16")
    assert len(steps) == 2


def test_the_rate_falls_to_0_in_its_own_variant_only(sd, monkeypatch):
    """The first step has the whole rate, the last of ten a tenth."""
    assert same(erased(sd, variant="falling", iterations=1), erased(sd, iterations=1))

    rates = []
    take_step = torch.optim.Adam.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        take_step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    erased(sd, variant="falling", iterations=10)
    assert rates == pytest.approx([1e-4 * k / 10 for k in range(10, 0, -1)])
    rates.clear()
    erased(sd, variant="bfloat16")
    assert rates == [1e-4, 1e-4]


def test_images_avoid_a_concept_as_safe_latent_diffusion_does(context):
    sampling = models.model_named("SLD-max", "star").sampling
    prompts = ["a star", "a heart"]
    images = context.draw(context.sd, sampling, prompts)

    predictor = functools.partial(
        safe_latent_diffusion.SafePredictor,
        concept=context.sd.encode(["star"]),
        safety=safe_latent_diffusion.SETTINGS["max"],
    )
    seeds = [models.SEED, models.SEED + 1]
    expected = sample.generate(
        context.sd, prompts, seed=seeds, predictor=predictor, **models.SAMPLING
    )
    assert [a.tobytes() for a in images] == [b.tobytes() for b in expected]
    ordinary = context.draw(context.sd, {}, prompts)
    assert images[0].tobytes() != ordinary[0].tobytes()


# ---- what an erasure costs


def no_noise(x_t, t, c):
    """Takes the U-Net's place where only the times matter."""
    return torch.zeros_like(x_t)


def predictions(
    source: cost.Source, iterations: int, shape: tuple[int, ...], seed: int
) -> list[int]:
    """Returns how many predictions each x_t needs, from the times that a source draws."""
    texts = [erase.Text(*[torch.zeros(1, 1, 1)] * 3)]
    data = source.data(frozen=no_noise)
    batches = data(no_noise, texts, (1, *shape), Generator().manual_seed(seed))
    times = ddim.timesteps(source.steps)
    steps = [times.index(batch.t.item()) for batch in itertools.islice(batches, iterations)]
    if source.every_step:
        return [min(step, 1) for step in steps]  # one more than the x_t before it; the first, none
    return steps


@pytest.mark.parametrize("source", cost.SOURCES.values(), ids=cost.SOURCES.keys())
def test_the_u_net_calls_that_are_counted(sd, source):
    """5 for the loss, of which a backward pass is 2, and 2 for each prediction that x_t needs."""
    iterations = source.steps if source.every_step else 3
    found = cost.erased(
        sd, source, method="esd-x", concept="star", seed=1, iterations=iterations
    )
    made = predictions(source, iterations, shape=sd.latent_shape, seed=1)
    assert found.calls == pytest.approx(5 + 2 * sum(made) / iterations)
    if source.every_step:  # a whole trajectory: nothing is left to chance
        assert found.calls == pytest.approx(source.expected_calls())

    assert found.seconds > 0
    assert not sd.unet._forward_pre_hooks


@pytest.mark.parametrize("by_frozen", [False, True])
def test_x_t_are_drawn_by_the_model_that_a_source_names(by_frozen):
    edited = small.FakeUNet()
    frozen = small.FakeUNet()
    texts = [erase.Text(*[torch.zeros(1, 1, 1)] * 3)]
    data = cost.Source(8, by_frozen=by_frozen).data(frozen)
    batches = data(edited, texts, (1, 1, 1, 1), Generator().manual_seed(0))
    assert [*itertools.islice(batches, 5)]
    assert bool(frozen.calls) == by_frozen
    assert bool(edited.calls) != by_frozen


@pytest.mark.parametrize("by_frozen", [False, True])
def test_the_u_net_calls_that_are_expected(by_frozen):
    source = cost.Source(3, by_frozen=by_frozen)
    made = predictions(source, 3000, shape=(1, 1, 1), seed=0)
    assert {*made} == {0, 1, 2}
    assert 5 + 2 * sum(made) / 3000 == pytest.approx(source.expected_calls(), abs=0.1)
    assert cost.Source(50).expected_calls() == 54


def test_the_original_is_in_the_table_of_costs_without_a_cost():
    shares = {"object": [9, 10], "left": [4, 4], "style": [1, 2], "colour": [0, 2]}
    made = {"calls": 6.5, "seconds": 3.0} | shares
    found = {
        "original//star/": shares,
        "every step of trajectories of 8/esd-u/star/0": made,
        "every step of trajectories of 8/esd-u/moon/2": made | {"calls": 7.5, "left": [0, 4]},
    }
    name = "esd-u, every step of trajectories of 8"
    rest = " | ".join(tables.share(*pair) for pair in ((9, 10), (1, 2), (0, 2)))
    twice = " | ".join(tables.share(*pair) for pair in ((18, 20), (2, 4), (0, 4)))
    assert cost.cost_table(found).splitlines()[2:] == [
        f"| original | 1 |  |  |  | {tables.share(4, 4)} | {rest} |",
        f"| {name} | 2 | 6.8 | 7.0 | 3.0 | {tables.share(4, 8)} | {twice} |",
    ]


def test_the_stored_costs_are_complete_and_on_the_miniatures_page(capsys):
    stored = json.loads(Path("notebooks/toy/cost.json").read_text())
    assert stored.keys() == {cell.key for cell in cost.all_cells()}
    commands.run(cost.main, "--stored")
    assert capsys.readouterr().out in Path("notebooks/toy/README.md").read_text()


def test_a_missing_cost_is_made(monkeypatch, tmp_path, capsys):
    stored = json.loads(Path("notebooks/toy/cost.json").read_text())
    key = "every step of trajectories of 8/esd-u/moon/2"
    kept = {each: answer for each, answer in stored.items() if each != key}
    file = tmp_path / "cost.json"
    file.write_text(json.dumps(kept))

    made = []

    def answer(sd, judge, cell, iterations):
        made.append((cell.key, iterations))
        return stored[cell.key]

    monkeypatch.setattr(cost, "answer", answer)
    commands.run(cost.main, "--results", file)
    assert made == [(key, 160)]
    assert json.loads(file.read_text()) == stored


# ---- contact sheets


def rows_of(context, monkeypatch, name, results):
    """The rows of a contact sheet, with prompts in place of images."""
    monkeypatch.setattr(sample, "contact_sheet", lambda rows, least: rows)
    monkeypatch.setattr(models.Context, "load", lambda context, model: None)
    monkeypatch.setattr(models.Context, "draw", lambda context, sd, sampling, prompts: prompts)
    return evaluate.contact_sheet(context, name, CELLS[name], results)


@pytest.mark.parametrize("name", evaluate.SHEETS)
def test_each_image_of_a_contact_sheet_has_a_label(context, monkeypatch, results, name):
    rows = rows_of(context, monkeypatch, name, results)
    assert all(len(labels) == len(images) > 5 for labels, images in rows)
    assert len(rows) == {"objects": 11, "styles": 6, "implied": 6, "works": 4, "eta": 4}[name]


@pytest.mark.parametrize("name", evaluate.SHEETS)
def test_a_quick_run_has_something_for_each_sheet(name):
    quick = evaluate.cells(name, slice(2))
    assert any(evaluate.columns(name, cell.concept) for cell in quick)


def test_a_label_says_how_often_the_concept_is_seen(context, monkeypatch, results):
    def label(key, kind, name):
        found = results[key][kind][name]
        return f"{name} {100 * found.get(name, 0) / sum(found.values()):.0f} %"

    rows = rows_of(context, monkeypatch, "implied", results)
    by_name = {labels[0]: (labels, images) for labels, images in rows}
    assert "SLD-max" not in by_name
    labels, prompts = by_name["SLD-medium"]
    expected = []
    for concept in tables.IMPLIED:
        expected.append(label(f"implied/{concept}/SLD-medium", "scenes", concept))
    assert labels[1::4] == expected
    assert labels[2:5] == [""] * 3
    assert prompts[1:4] == ["a night sky", "a night sky in spring", "a bedtime story by the sea"]

    labels, prompts = rows_of(context, monkeypatch, "styles", results)[-1]
    expected = [label("styles/neon/ESD-x", "styled", style) for style in tables.STYLES]
    assert labels == ["erased: neon", *expected]
    assert prompts[-1] == "a heart in the style of neon"


# ---- probes


class FakeProbes:
    """The probes of "a star" with 6 images, which check what they are given.

    An "image" here is what the judge sees in it.
    """

    NUM = 6

    def __init__(self, original, attacked, never):
        self.original = original
        self.attacked = attacked
        self.never = never
        self.images = [f"original {i}" for i in range(24 + self.NUM)]

    def generate(self, sd, prompts, num, seed, steps, **sampling):
        if sd is self.original:
            assert prompts == ["a star"] and num == len(self.images) and seed == 0
            return self.images
        assert sd is self.attacked and num == 4 and steps == 5
        images = []
        for prompt in prompts:
            images += ["star" if "badge" in prompt else "none"] * num
        return images

    def noise(self, sd, seeds):
        return [*seeds]

    def vocabulary(self, sd):
        return ["a", "badge", "sea"]

    def draw(self, model, text, x_t, **sampling):
        assert x_t == [*range(1000, 1000 + self.NUM)]
        assert sampling == {"steps": 10, "guidance": 5.0}
        shown = {"a star": 1, "badge a star": 3, "learned": 2}
        hits = model if isinstance(model, int) else shown[text]
        return ["star"] * hits + ["none"] * (len(x_t) - hits)

    def noised_images(self, sd, images, seed=0):
        assert sd is self.original and images == self.images[:24]
        return seed

    def learned_words(self, sd, batches):
        assert sd is self.attacked and batches == 0
        return "learned"

    def with_noise(self, sd, text, x_t, shows, **sampling):
        assert sd is self.attacked and text == "a star" and len(x_t) == self.NUM
        assert sampling["steps"] == 10
        return sum(shows(["star", "none", "star", "star", "star"]))

    def head_start(self, sd, text, images, x_t, skip, **sampling):
        assert sd is self.attacked and images == self.images[24:] and text == "a star"
        return ["star"] * skip

    def relearned(self, sd, prompt, batches, stops):
        assert sd is self.attacked and prompt == "a star" and batches == 0
        return iter(range(len(stops)))

    def eps_distances(self, sd, other, prompt, batches):
        assert sd is self.attacked and other is self.never
        assert prompt == "a star" and batches == 1
        return [0.25]


def test_each_attack_is_counted_under_its_own_name(context, monkeypatch):
    attacked = replace(context.sd)
    fakes = FakeProbes(context.sd, attacked, never=object())
    for name in (
        "noise", "vocabulary", "draw", "noised_images", "learned_words", "with_noise",
        "head_start", "relearned", "eps_distances",
    ):
        monkeypatch.setattr(probes, name, getattr(fakes, name))

    def retrained(context, name):
        assert name == "without_star"
        return fakes.never

    def read(judge, images):
        return [{"object": "star" if image == "star" else None} for image in images]

    monkeypatch.setattr(sample, "generate", fakes.generate)
    monkeypatch.setattr(sample.StableDiffusion, "encode", lambda sd, prompts: prompts[0])
    monkeypatch.setattr(models.Context, "retrained", retrained)
    monkeypatch.setattr(robust.judging, "read", read)
    assert robust.probe(context._replace(num=fakes.NUM), attacked, "star") == {
        "num": 6,
        "by name": 1,
        "seen": {"star": 1, "none of these": 5},
        "prompt": "badge a star",
        "learned words": 2,
        "hard prompt": 3,
        "noise": 4,
        "head start": 5,
        "eps": [0.25],
        "relearned": dict(zip(("5", "10", "20", "40", "80", "160"), range(6))),
    }


def test_probes_are_of_the_cells_model_and_concept(context, monkeypatch):
    model = models.model_named("ESD-x", "star")
    cell = evaluate.Cell("robust", "star", model, ("probes",))
    attacked = object()
    monkeypatch.setattr(robust, "probe", lambda *given: given)
    given = evaluate.probes(context, attacked, cell)["probes"]
    assert given == (context, attacked, "star")


# ---- running and resuming


def test_a_second_run_does_nothing_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = [
        "paraphrase", "--quick", "--results", file, "--run", tmp_path / "run", "--processes", 1
    ]
    commands.run(evaluate.main, *arguments)
    first = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert "| star | by a paraphrase |" in printed
    assert "--iterations 2" in printed
    erasure = first["paraphrase/star/by its name"]["settings"]["erase"]
    assert erasure["iterations"] == 2
    assert len([*(tmp_path / "run").iterdir()]) == 4

    monkeypatch.setattr(evaluate, "answer", None)  # would fail where a cell is made again
    commands.run(evaluate.main, *arguments)
    assert capsys.readouterr().out == printed
    assert json.loads(file.read_text()) == first

    first["paraphrase/moon/original"]["settings"]["seed"] = 7  # made otherwise: stale
    file.write_text(json.dumps(first))
    counts = {"moon": {"moon": 1}}
    found = first["paraphrase/star/original"] | {"name": counts, "paraphrases": counts}
    made = []

    def answer(setup, cell):
        made.append(cell.key)
        return evaluate.Answered(cell, found)

    monkeypatch.setattr(evaluate, "answer", answer)
    commands.run(evaluate.main, *arguments)
    assert made == ["paraphrase/moon/original"]


@pytest.mark.robustness
def test_two_processes_give_what_one_gives(tmp_path):
    setup = evaluate.Setup(Path("notebooks/toy/model"), tmp_path, num=2, iterations=2)
    original = models.model_named("original", "")
    cells = []
    for concept in ("star", "moon", "arrow"):
        cells.append(evaluate.Cell("paraphrase", concept, original, ("name",)))

    def answers(processes):
        found = evaluate.answers(setup, cells, processes)
        return sorted(found, key=lambda answered: answered.cell.concept)

    one = answers(1)
    assert one == answers(2)
    assert [answered.cell.concept for answered in one] == ["arrow", "moon", "star"]
    assert one[0].answers["name"] == {"arrow": {"arrow": 2}}


def test_a_retrained_model_that_is_missing_is_named(context, tmp_path, monkeypatch, capsys):
    """Its cells are left out, and nothing is computed."""
    monkeypatch.setattr(evaluate, "open_context", lambda *setup: context)
    monkeypatch.setattr(evaluate, "answer", None)
    file = tmp_path / "results.json"
    commands.run(evaluate.main, "robust", "--results", file, "--run", tmp_path)
    captured = capsys.readouterr()
    assert "left out, as it isn't trained: runs/censored/model, " in captured.err
    assert "runs/without_heart/model" in captured.err
    assert "**Is it gone?**" in captured.out


def test_no_process_is_refused(capsys):
    line = commands.refusal(capsys, evaluate.main, "eta", "--quick", "--processes", 0)
    assert "processes is 0" in line


def test_damaged_results_are_refused(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text("{")
    line = commands.refusal(capsys, evaluate.main, "eta", "--quick", "--results", file)
    assert "holds no settings" in line
    assert file.read_text() == "{"


# ---- the stored results


def test_the_results_are_of_this_code_and_these_models(context, results):
    assert all(evaluate.is_stored(context, cell, results) for cell in ALL_CELLS)
    assert {*results} == {cell.key for cell in ALL_CELLS}


def test_what_is_right_image_by_image_adds_up_to_the_counts(results):
    for key, answer in results.items():
        for kind in evaluate.KINDS:
            if kind in answer:
                right = answer[f"{kind}, right"]
                counts = answer[kind]
                assert right.count("1") == sum(row.get(name, 0) for name, row in counts.items())
                assert len(right) == sum(sum(row.values()) for row in counts.values()), key


def test_an_answer_of_other_settings_or_models_is_not_taken(context):
    """All that it depends on is compared, but a censored model only if it is there."""

    def cell_of(name):
        return evaluate.Cell("implied", "moon", models.model_named(name, "moon"), ("scenes",))

    def answer_to(cell):
        return {"settings": evaluate.settings_of(context, cell)}

    esd = cell_of("ESD-x")
    censored = cell_of("censored training")
    other = {
        "weights": "0", "judge": "0", "seed": 1, "num": 49, "sampling": {}, "erase": {"eta": 7}
    }
    for cell, ignored in ((esd, set()), (censored, {"weights"})):
        answer = answer_to(cell)
        assert evaluate.is_stored(context, cell, {cell.key: answer})
        assert not evaluate.is_stored(context, cell, {})
        for key, value in other.items():
            stale = {"settings": answer["settings"] | {key: value}}
            assert evaluate.is_stored(context, cell, {cell.key: stale}) == (key in ignored), key

    here = context._replace(weights=context.weights | {"censored": "0"})
    assert not evaluate.is_stored(here, censored, {censored.key: answer_to(censored)})


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_the_miniatures_page_has_the_tables_of_the_results(results, name):
    page = Path("notebooks/toy/README.md").read_text()
    assert tables.TABLES[name].make(results) in page
    assert name not in evaluate.SHEETS or Path(f"notebooks/toy/{name}.png").exists()
