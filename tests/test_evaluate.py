"""notebooks/toy/evaluate.py and tables.py: erasing by seams, counting, resuming, the results."""

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

import erase
import sample
from notebooks.methods import concept_ablation, probes, rece, safe_latent_diffusion, uce
from notebooks.toy import contenders, evaluate, measure, robust, tables, world

CELLS = {name: evaluate.cells(name) for name in evaluate.EXPERIMENTS}


@pytest.fixture(scope="module")
def results():
    return json.loads(Path("notebooks/toy/results.json").read_text())


@pytest.fixture(scope="module")
def studio():
    """As the stored results were made, but without the censored miniature."""
    here = contenders.open_studio(Path("notebooks/toy"), None, 50, contenders.FLAGS["iterations"])
    return here._replace(weights={key: here.weights[key] for key in ("unet", "judge")})


# Tables

@pytest.mark.parametrize("hits, asked, expected", [
    (0, 50, "0.0 (0 to 7)"), (25, 50, "50.0 (37 to 63)"), (50, 50, "100.0 (93 to 100)"),
    (1, 3, "33.3 (6 to 79)"), (0, 0, "")])
def test_wilsons_interval(hits, asked, expected):
    assert tables.share(hits, asked) == expected


@pytest.mark.parametrize("one, other, expected", [
    ("1100", "1100", (0, 0, 1)), ("1100", "0110", (1, 1, 1)), ("1" * 8, "0" * 8, (8, 0, 2 / 256)),
    ("0" * 10, "1" * 9 + "0", (0, 9, 2 / 512)), ("1110", "0001", (3, 1, 10 / 16))])
def test_mcnemars_test_counts_where_two_differ(one, other, expected):
    assert tables.mcnemar(one, other) == expected


def test_shares_are_taken_over_all_images_of_the_classes():
    confusion = {"star": {"star": 3, "heart": 1}, "heart": {"heart": 6}, "moon": {"star": 5}}
    assert tables.share_seen([confusion], [["star", "heart"]]) == tables.share(9, 10)
    assert tables.share_seen([confusion], [["moon"]]) == tables.share(0, 5)
    assert tables.share_seen([confusion] * 2, [["star"], ["moon"]]) == tables.share(3, 9)
    assert tables.share_seen([confusion, None], [["star"], ["moon"]]) == tables.share(3, 4)
    assert tables.share_seen([confusion] * 2, [["star"], ["star", "moon"]]) == tables.share(3, 9)


def test_total_variation():
    seen, others = {"moon": 3, "star": 1}, {"moon": 2, "heart": 6}
    assert tables.total_variation(seen, others) == pytest.approx((0.5 + 0.25 + 0.75) / 2)
    assert tables.total_variation(seen, {"moon": 30, "star": 10}) == 0
    assert tables.total_variation({"star": 5}, {"heart": 2}) == 1


def test_two_sets_from_one_model_differ_as_by_chance():
    """Nine names, 50 images each, drawn from one distribution: 5 % are above what chance gives."""
    rng = random.Random(0)
    above = 0
    for _ in range(15):
        one, other = (Counter(rng.choices(world.OBJECTS[:9], k=50)) for _ in range(2))
        value, chance = map(float, re.findall(r"[\d.]+", tables.against_chance(one, other)))
        above += value > chance
        assert 0.2 < chance < 0.4
    assert above <= 3
    assert tables.against_chance({"star": 50}, {"moon": 50}) == "1.00 (chance 0.20)"


def test_a_means_interval():
    """Of 0, 1 ... 19: mean 9.5, standard deviation 5.916; t is 2.093 for 19 degrees of freedom."""
    assert tables.mean_of_20([*range(20)]) == "9.500 (6.731 to 12.269)"


@pytest.mark.parametrize("hits, expected", [
    ((0, 10, 20, 45), "20 (10 to 40)"), ((50, 50, 50, 50), "0 (0 to 0)"),
    ((0, 0, 0, 24), "over 40 (40 to over 40)"), ((0, 0, 0, 0), "over 40 (over 40 to over 40)")])
def test_the_steps_to_half_of_the_share(hits, expected):
    """Of 50 images; the interval is where the share's bounds reach the half."""
    found = {"num": 50, "by name": hits[0], "relearned": dict(zip(("10", "20", "40"), hits[1:]))}
    assert tables.steps_to(0.3 if hits[1] == 10 else 0.5, found) == expected


def test_the_table_of_methods_counts_what_is_gone():
    def cell(own, rest, cost):
        styled = "".join("00" if o == "star" else "10" if o == "moon" and s == "neon" else "11"
                         for s in tables.STYLES for o in world.OBJECTS)
        return {"names": counted(own, rest, "star"), "contexts": counted(own + 1, rest, "star"),
                "styled, right": styled, "cost": cost}

    answers = {"methods/star/UCE": cell(2, 7, {"seconds": 1.25, "parameters": 12345}),
               "methods/star/original": cell(9, 9, {})}
    rows = tables.methods_table(answers).splitlines()
    assert rows[2:] == [
        f"| star (names) | original | {tables.share(1, 10)} | {tables.share(0, 10)} | "
        f"{tables.share(81, 90)} | {tables.share(89, 90)} |  |  |",
        f"| star (names) | UCE | {tables.share(8, 10)} | {tables.share(7, 10)} | "
        f"{tables.share(63, 90)} | {tables.share(89, 90)} | 1.2 | 12 |"]


def test_another_kind_leaves_out_what_names_the_concept():
    """The tables know the order of the questions without loading any model."""
    assert [q.wanted["object"] for q in measure.styled(1)] == [
        o for _ in tables.STYLES for o in world.OBJECTS]
    assert [q.wanted["object"] for q in measure.objects(1)] == [*world.OBJECTS]
    right = "".join("00" if q.wanted["object"] == "heart" else "11" for q in measure.styled(1))
    assert tables.another_kind({"styled, right": right}, "styled", "heart") == tables.share(90, 90)
    assert tables.another_kind({"names, right": "1" * 9 + "0"}, "names", "mosaic") == (
        tables.share(9, 10))


def counted(own: int, rest: int, concept: str) -> dict:
    """Ten images of each object: how many are right of the concept and of each other one."""
    return {name: {name: right, "none of these": 10 - right}
            for name in world.OBJECTS for right in [own if name == concept else rest]}


def test_the_table_of_objects_keeps_its_columns_apart():
    answers = {"objects/original": {"names": counted(10, 9, "star")},
               "objects/star/ESD-u": {"names": counted(1, 8, "star")},
               "objects/star/ESD-u, the paper's rule": {"names": counted(3, 6, "star")},
               "objects/star/ESD-x": {"names": counted(2, 7, "star")}}
    line = tables.objects_table(answers).splitlines()[2]
    shares = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
    assert line.startswith("| star |") and shares == [100, 10, 30, 20, 90, 80, 60, 70]


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_every_contender_is_in_its_table(results, name):
    """tables.py and evaluate.py each have their list of names."""
    like = {}
    for ask in {ask for cell in CELLS[name] for ask in cell.ask}:
        like |= next(answer for answer in results.values() if ask in answer)
    like["scenes"] = like["names"] = {c: {c: 1} for c in world.OBJECTS}
    like["styled"] = {style: {style: 1} for style in world.STYLES[1:]}
    like["name"] = like["paraphrases"] = like["all scenes"] = like["contexts"] = like["names"]
    made = tables.TABLES[name][1]({cell.key: {kind: found for kind, found in like.items()
                                              if kind.split(",")[0] in cell.ask}
                                   for cell in CELLS[name]})
    cells = {cell.strip(" ,%") for line in made.splitlines() for cell in line.split("|")}
    assert {cell.contender.name for cell in CELLS[name]} - {"original"} <= cells
    assert "original" in cells or name in ("objects", "which")


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_what_is_missing_is_left_out(results, name):
    """Half of the cells, then none: fewer rows and no error."""
    own = [key for key in results if key.startswith(f"{name}/")]
    make, sizes = tables.TABLES[name][1], []
    for keys in (own, own[::2], own[:1], []):
        lines = make({key: results[key] for key in keys}).splitlines()
        assert len({line.count("|") for line in lines}) == 1  # the same columns in all rows
        sizes.append(len(lines))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 2 + (name == "objects") < sizes[0]


def test_the_heading_says_what_most_cells_share(results):
    line = tables.heading(results)
    assert "--iterations 160 --steps 8 --batch 4 --every-step;" in line
    assert "esd-x --lr 0.0004, esd-u --lr 7e-05, a style --iterations 480. At least 50" in line
    assert ", 500 for the quality; 10 DDIM steps, guidance 5;" in line
    other = {"settings": results["which/star/keys and values only"]["settings"] | {"erase": {
        "iterations": 7, "lr": 1, "method": "esd-x", "data": "every step"}}}
    assert tables.heading(results | {"one": other}) == line
    alone = tables.heading({"one": other})
    assert "--iterations 7 --every-step; esd-x --lr 1." in alone


def test_tables_load_no_model():
    code = ("import sys; from notebooks.toy import tables; "
            "print({'torch', 'sample', 'erase', 'transformers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def print_tables(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tables.py", *map(str, arguments)])
    tables.main()


def test_the_command_prints_the_stored_tables(results, monkeypatch, capsys):
    print_tables(monkeypatch)
    printed = capsys.readouterr().out
    assert all(make(results) in printed and f"**{title}**" in printed
               for title, make in tables.TABLES.values())
    print_tables(monkeypatch, "eta")
    printed = capsys.readouterr().out
    assert tables.eta_table(results) in printed and "ESD-x" not in printed


@pytest.mark.parametrize("arguments, message", [
    (["nothing"], "unknown experiment 'nothing'"), (["--results", "none.json"], "can't read"),
    (["--results", "notebooks/toy/flags"], "can't read"),
    (["--results", "notebooks/toy/model_index.json"], "has no results")])
def test_what_has_no_tables_is_refused(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        print_tables(monkeypatch, *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


# Contenders and cells

def test_no_two_cells_have_the_same_key():
    keys = [cell.key for cells in CELLS.values() for cell in cells]
    assert len(keys) == len(set(keys)) > 100


def test_a_concept_is_erased_and_avoided_by_the_same_words():
    for concept, words in (("star", "star"), ("dots", "a picture in the style of dots")):
        assert contenders.contender("ESD-x", concept).erase["concepts"] == [words]
        assert contenders.contender("negative prompt", concept).how == {"negative": words}
        assert contenders.contender("SLD-max", concept).how == {"safe": words, "sld": "max"}
    with pytest.raises(KeyError):
        contenders.contender("ESD-y", "star")  # not the original under another name


def test_a_rate_belongs_to_what_is_tuned(studio):
    """The parts of ESD-x get its rate; ESD-u's left 98 % of the stars to keys and values."""
    for name, method in (("ESD-x", "esd-x"), ("ESD-u", "esd-u"), ("keys and values only", "esd-x"),
                         ("ESD-u, the paper's rule", "esd-u")):
        contender = contenders.contender(name, "star")
        assert studio.settings(contender)["lr"] == contenders.RATES[method]


@pytest.mark.parametrize("name, concept, times", [
    ("ESD-x", "star", 1), ("ESD-x, in contexts", "star", 1), ("ESD-x", "mosaic", 3),
    ("ESD-u, in contexts", "mosaic", 3), ("concept ablation", "star", 3),
    ("concept ablation", "mosaic", 3)])
def test_styles_and_concept_ablation_take_longer(studio, name, concept, times):
    settings = studio.settings(contenders.contender(name, concept))
    assert settings["iterations"] == times * contenders.FLAGS["iterations"]


def test_a_retrained_model_is_found_by_its_name():
    assert contenders.contender("never saw it", "heart").retrained == "without_heart"
    assert contenders.contender("censored training", "heart").retrained == "censored"
    assert {"without_heart", "censored"} <= contenders.RETRAINED.keys()


def test_the_settings_are_those_of_the_flags_file_and_are_json(studio):
    """But a style is learned three times as long."""
    flags = measure.flags()
    for cell in (cell for cells in CELLS.values() for cell in cells):
        settings = studio.settings(cell.contender)
        assert json.loads(json.dumps(settings)) == settings
        if cell.contender.name == "ESD-x":
            assert settings["data"] == "every step" and flags["data"].keywords["every_step"]
            times = 3 if cell.concept in tables.STYLES else 1
            assert settings["iterations"] == times * flags["iterations"]
            assert all(settings[key] == flags[key] for key in ("lr", "steps", "batch"))


# Erasing by what a name in the settings means

HOW = {"iterations": 2, "steps": 2, "lr": 1e-4, "batch": 1}


def erased(sd, method="esd-x", data="own way", **more):
    return contenders.erased_weights(sd, ["star"], method, data, **HOW | more)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_predicates_choose_what_the_paper_and_its_code_say(sd):
    methods, names = dict(erase.METHODS), [name for name, _ in sd.unet.named_parameters()]
    written, ours = erased(sd, "esd-u of the paper"), erased(sd, "esd-u")
    assert set(written) == {name for name in names if "attn2" not in name}
    spared = set(written) - set(ours)
    assert spared and all(re.match(r"(time_embedding|conv_norm_out|conv_out)\.", name)
                          for name in spared)
    strict = set(erased(sd, "esd-x-strict"))
    assert strict and strict == {name for name in names if re.search(r"attn2\.to_[kv]", name)}
    assert erase.METHODS == methods


def test_each_kind_of_data_is_what_its_name_says(sd):
    """Which U-Net draws x_t, and how many of its calls are used."""
    calls = []

    def edited(*inputs):
        calls.append(inputs)
        return sd.unet(*inputs)

    null, *texts = sd.encode(["", "quiet harbour", "harvest hills"])[:, None]
    texts, shape = [erase.Text(c, null, c) for c in texts], (1, 4, 8, 8)

    def batches(name, count=6):
        calls.clear()
        data = contenders.data_function(sd, name, ["quiet harbour", "harvest hills"])
        found = data(edited, texts, shape, 3, 3.0, torch.Generator().manual_seed(0))
        return [next(found) for _ in range(count)]

    own, own_calls = batches("own way"), len(calls)
    frozen, frozen_calls = batches("frozen"), len(calls)
    every, every_calls = batches("every step"), len(calls)
    works, works_calls = batches("works"), len(calls)
    assert own_calls and not frozen_calls and not works_calls
    assert all(torch.equal(a[0], b[0]) for a, b in zip(own, frozen))  # edited is sd.unet here
    assert [t.item() for _, t, _ in every] == 2 * [667, 334, 1] and every_calls == 2 * 2
    images = sd.encode_images([world.render_work(title) for title in ("Quiet Harbour",
                                                                      "Harvest Hills")])
    noised = erase.noised(images, texts, shape, 3, torch.Generator().manual_seed(0))
    assert all(torch.equal(a[0], b[0]) and a[2] is b[2] for a, b in zip(works, noised))


def test_other_methods_erase_as_their_own_files_do(sd, monkeypatch):
    keep, made = ["heart", "a picture in the style of dots"], {}
    for name, module in (("uce", uce), ("rece", rece)):
        found = contenders.erased_weights(sd, {"star": ""}, name, keep=keep)
        assert same(found, module.erase(sd, {"star": ""}, keep))

    monkeypatch.setattr(erase, "erase", lambda sd, concepts, **how: made.update(how) or concepts)
    assert erased(sd, variant="adversarial", keep=keep) == ["star"]
    assert made["loss_fn"].__qualname__.startswith("against") and made["method"] == "esd-x"
    ablated = contenders.contender("concept ablation", "star").erase
    assert ablated["concepts"] == {"star": "circle"}
    monkeypatch.setattr(sample, "generate", lambda sd, prompts, num, **how: made.update(
        prompts=prompts) or [world.render_work("Quiet Harbour")] * num)
    assert contenders.erased_weights(sd, **ablated, **HOW) == {"star": "circle"}
    assert made["loss_fn"] is concept_ablation.loss and made["prompts"] == ["circle"]
    assert made["method"] is uce.keys_and_values


def test_contexts_name_every_second_colour_and_style_or_object():
    star, mosaic = (contenders.contexts_of(concept) for concept in ("star", "mosaic"))
    assert star["star"] == "" and len(star) == 1 + 3 + 3
    assert star["a red star"] == "a red picture"
    assert star["a star in the style of neon"] == "a picture in the style of neon"
    assert mosaic["a picture in the style of mosaic"] == "a picture" and len(mosaic) == 6
    assert mosaic["a circle in the style of mosaic"] == "a circle"
    asked = {q.prompt for q in evaluate.in_contexts(1)}
    assert not asked & {*star} and len(asked) == (3 + 2) * len(world.OBJECTS)


def test_the_cost_of_an_erasure(studio, tmp_path):
    here = studio._replace(run=tmp_path)
    who = contenders.contender("UCE", "star")
    cost = here.cost(who)
    moved = here.settings(who) and erase.select(here.sd.unet, uce.keys_and_values)
    assert cost["parameters"] == sum(tensor.numel() for tensor in moved.values())
    assert 0 < cost["seconds"] < 60 and here.settings(who)["method"] == "uce"
    assert here.cost(who) == cost  # from the file, not made again
    assert same(sample.load_erased(here.sd, here.erased(who)).unet.state_dict(),
                here.model(who).unet.state_dict())


def test_bfloat16_rounds_weights_and_state():
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.3]))
    optimizer = torch.optim.Adam([weight], lr=1e-4)
    weight.sum().backward()
    optimizer.step()
    contenders.round_to_bfloat16(optimizer)
    assert weight[0] == 1  # an update of 1e-4 is lost next to 1
    for tensor in (weight, *optimizer.state[weight].values()):
        assert torch.equal(tensor, tensor.bfloat16().float())
    optimizer.step()
    assert weight[0] != 1


def test_bfloat16_rounds_after_each_step_and_in_its_own_loop_only(sd, monkeypatch):
    rounded = erased(sd, variant="bfloat16")
    assert all(torch.equal(t, t.bfloat16().float()) for t in rounded.values())
    exact = erased(sd)
    assert not all(torch.equal(t, t.bfloat16().float()) for t in exact.values())
    once = erased(sd, variant="bfloat16", iterations=1)
    plain = erased(sd, iterations=1)
    assert same(once, {name: tensor.bfloat16().float() for name, tensor in plain.items()})
    steps = []
    monkeypatch.setattr(contenders, "round_to_bfloat16", steps.append)
    erased(sd, variant="bfloat16")
    assert len(steps) == 2


def test_the_loop_of_its_own_is_that_of_erase_and_its_rate_falls(sd, monkeypatch):
    """The first step has the whole rate, the last of ten a tenth."""
    assert same(erased(sd, variant="falling", iterations=1), erased(sd, iterations=1))
    rates, esd = [], erase.esd

    def watched(unet, frozen, data, optimizer):
        for loss in esd(unet, frozen, data, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            yield loss

    monkeypatch.setattr(erase, "esd", watched)
    erased(sd, variant="falling", iterations=10)
    assert rates == pytest.approx([1e-4 * k / 10 for k in range(10, 0, -1)])
    rates.clear()
    erased(sd, variant="bfloat16")
    assert rates == [1e-4, 1e-4]


def test_images_avoid_a_concept_as_safe_latent_diffusion_does(studio):
    how = contenders.contender("SLD-max", "star").how
    prompts = ["a star", "a heart"]
    images = studio.draw(studio.sd, how, prompts)
    guided = safe_latent_diffusion.guided(studio.sd.encode(["star"]), "max")
    expected = sample.generate(studio.sd, prompts, seed=[contenders.SEED, contenders.SEED + 1],
                               guided=guided, **contenders.SAMPLING)
    assert [a.tobytes() for a in images] == [b.tobytes() for b in expected]
    assert images[0].tobytes() != studio.draw(studio.sd, {}, prompts)[0].tobytes()


# Contact sheets

def rows_of(studio, monkeypatch, name, results):
    """The rows of a contact sheet, with prompts in place of images."""
    monkeypatch.setattr(sample, "contact_sheet", lambda rows, least: rows)
    monkeypatch.setattr(contenders.Studio, "model", lambda studio, contender: None)
    monkeypatch.setattr(contenders.Studio, "draw", lambda studio, sd, how, prompts: prompts)
    return evaluate.contact_sheet(studio, name, CELLS[name], results)


@pytest.mark.parametrize("name", evaluate.SHEETS)
def test_each_image_of_a_contact_sheet_has_a_label(studio, monkeypatch, results, name):
    rows = rows_of(studio, monkeypatch, name, results)
    assert all(len(labels) == len(images) > 5 for labels, images in rows)
    assert len(rows) == {"objects": 11, "styles": 6, "implied": 6, "works": 4, "eta": 4}[name]


@pytest.mark.parametrize("name", evaluate.SHEETS)
def test_a_quick_run_has_something_for_each_sheet(name):
    quick = evaluate.cells(name, slice(2))
    assert any(evaluate.columns(name, cell.concept) for cell in quick)


def test_a_label_says_how_often_the_concept_is_seen(studio, monkeypatch, results):
    def label(key, kind, name):
        found = results[key][kind][name]
        return f"{name} {100 * found.get(name, 0) / sum(found.values()):.0f} %"

    rows = {labels[0]: (labels, images) for labels, images in
            rows_of(studio, monkeypatch, "implied", results)}
    labels, prompts = rows["SLD-medium"]
    assert labels[1::4] == [label(f"implied/{concept}/SLD-medium", "scenes", concept)
                            for concept in tables.IMPLIED]
    assert labels[2:5] == [""] * 3 and "SLD-max" not in rows
    assert prompts[1:4] == ["a night sky", "a night sky in spring", "a bedtime story by the sea"]
    labels, prompts = rows_of(studio, monkeypatch, "styles", results)[-1]
    assert labels == ["erased: neon", *(label("styles/neon/ESD-x", "styled", style)
                                        for style in tables.STYLES)]
    assert prompts[-1] == "a heart in the style of neon"


# Probes

def test_each_attack_is_counted_under_its_own_name(studio, monkeypatch):
    """An "image" here is what the judge sees in it. The fakes check what they are given."""
    original, attacked = studio.sd, replace(studio.sd)
    star, none, never, num = "star", "none", object(), 6
    images = [f"original {i}" for i in range(24 + num)]
    shown = {"a star": 1, "badge a star": 3, "learned": 2}

    def generate(sd, prompts, num, seed, steps, **how):
        if sd is original:
            assert prompts == ["a star"] and num == len(images) and seed == 0
            return images
        assert sd is attacked and num == 4 and steps == 5
        return [star if "badge" in prompt else none for prompt in prompts for _ in range(num)]

    def draw(model, text, x_t, **how):
        assert x_t == [*range(1000, 1000 + num)] and how == {"steps": 10, "guidance": 5.0}
        hits = model if isinstance(model, int) else shown[text]
        return [star] * hits + [none] * (len(x_t) - hits)

    def noised(sd, some, seed=0):
        assert sd is original and some == images[:24]
        return seed

    def learned_words(sd, batches):
        assert sd is attacked and batches == 0
        return "learned"

    def with_noise(sd, text, x_t, shows, **how):
        assert sd is attacked and text == "a star" and len(x_t) == num and how["steps"] == 10
        return sum(shows([star, none, star, star, star]))

    def head_start(sd, text, some, x_t, skip, **how):
        assert sd is attacked and some == images[24:] and text == "a star"
        return [star] * skip

    def relearned(sd, prompt, batches, stops):
        assert sd is attacked and prompt == "a star" and batches == 0
        return iter(range(len(stops)))

    def eps_distances(sd, other, prompt, batches):
        assert sd is attacked and other is never and prompt == "a star" and batches == 1
        return [0.25]

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample.StableDiffusion, "encode", lambda sd, prompts: prompts[0])
    monkeypatch.setattr(contenders.Studio, "retrained", lambda studio, name: {
        "without_star": never}[name])
    monkeypatch.setattr(robust.judging, "read", lambda judge, images: [
        {"object": star if image == star else None} for image in images])
    monkeypatch.setattr(probes, "noise", lambda sd, seeds: [*seeds])
    monkeypatch.setattr(probes, "vocabulary", lambda sd: ["a", "badge", "sea"])
    for fake in (draw, noised, learned_words, with_noise, head_start, relearned, eps_distances):
        monkeypatch.setattr(probes, fake.__name__, fake)
    assert robust.probe(studio._replace(num=num), attacked, "star") == {
        "num": 6, "by name": 1, "seen": {"star": 1, "none of these": 5},
        "prompt": "badge a star", "learned words": 2, "hard prompt": 3, "noise": 4,
        "head start": 5, "eps": [0.25],
        "relearned": dict(zip(("5", "10", "20", "40", "80", "160"), range(6)))}
    cell = evaluate.Cell("robust", "star", contenders.contender("ESD-x", "star"), ("probes",))
    monkeypatch.setattr(robust, "probe", lambda *given: given)
    given = evaluate.probes(studio, attacked, cell)["probes"]
    assert given[1] is attacked and given[2] == "star"


# Running and resuming

def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_a_second_run_does_nothing_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    how = ["paraphrase", "--quick", "--results", file, "--run", tmp_path / "run",
           "--processes", 1]
    run(monkeypatch, *how)
    first, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert "| star | by a paraphrase |" in printed and "--iterations 2" in printed
    made = first["paraphrase/star/by its name"]["settings"]["erase"]
    assert made["iterations"] == 2 and len(list((tmp_path / "run").iterdir())) == 4
    monkeypatch.setattr(evaluate, "answer", None)  # would fail where a cell is made again
    run(monkeypatch, *how)
    assert capsys.readouterr().out == printed and json.loads(file.read_text()) == first

    first["paraphrase/moon/original"]["settings"]["seed"] = 7  # made otherwise: stale
    file.write_text(json.dumps(first))
    made = []
    found = first["paraphrase/star/original"] | {"name": {"moon": {"moon": 1}},
                                                 "paraphrases": {"moon": {"moon": 1}}}
    monkeypatch.setattr(evaluate, "answer",
                        lambda place, cell: made.append(cell.key) or (cell, found))
    run(monkeypatch, *how)
    assert made == ["paraphrase/moon/original"]


def test_two_processes_give_what_one_gives(tmp_path):
    place = (Path("notebooks/toy"), tmp_path, 2, 2)
    cells = [evaluate.Cell("paraphrase", concept, contenders.contender("original", ""), ("name",))
             for concept in ("star", "moon", "arrow")]
    one, two = (sorted(evaluate.answers(place, cells, n), key=lambda pair: pair[0].concept)
                for n in (1, 2))
    assert one == two and [cell.concept for cell, _ in one] == ["arrow", "moon", "star"]
    assert one[0][1]["name"] == {"arrow": {"arrow": 2}}


def test_no_process_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "eta", "--quick", "--processes", 0)
    assert end.value.code == 2 and "processes is 0" in capsys.readouterr().err


def test_damaged_results_are_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    file.write_text("{")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "eta", "--quick", "--results", str(file)])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    assert end.value.code == 2 and "holds no settings" in capsys.readouterr().err
    assert file.read_text() == "{"


# The stored results

def test_the_results_are_of_this_code_and_these_models(studio, results):
    cells = [cell for cells in CELLS.values() for cell in cells]
    assert all(evaluate.is_stored(studio, cell, results) for cell in cells)
    assert {*results} == {cell.key for cell in cells}


def test_what_is_right_image_by_image_adds_up_to_the_counts(results):
    for key, answer in results.items():
        for kind in (kind for kind in evaluate.KINDS if kind in answer):
            right = answer[f"{kind}, right"]
            assert right.count("1") == sum(row.get(name, 0) for name, row in answer[kind].items())
            assert len(right) == sum(sum(row.values()) for row in answer[kind].values()), key


def test_an_answer_of_other_settings_or_models_is_not_taken(studio):
    """All that it depends on is compared, but a censored model only if it is there."""
    def cell_of(name):
        return evaluate.Cell("implied", "moon", contenders.contender(name, "moon"), ("scenes",))

    esd, censored = cell_of("ESD-x"), cell_of("censored training")
    other = {"weights": "0", "judge": "0", "seed": 1, "num": 49, "how": {}, "erase": {"eta": 7}}
    for cell, free in ((esd, set()), (censored, {"weights"})):
        answer = {"settings": evaluate.settings_of(studio, cell)}
        assert evaluate.is_stored(studio, cell, {cell.key: answer})
        assert not evaluate.is_stored(studio, cell, {})
        for key, value in other.items():
            stale = {"settings": answer["settings"] | {key: value}}
            assert evaluate.is_stored(studio, cell, {cell.key: stale}) == (key in free), key
    here = studio._replace(weights=studio.weights | {"censored": "0"})
    assert not evaluate.is_stored(here, censored, {
        censored.key: {"settings": evaluate.settings_of(studio, censored)}})


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_the_miniatures_page_has_the_tables_of_the_results(results, name):
    assert tables.TABLES[name][1](results) in Path("notebooks/toy/README.md").read_text()
    assert name not in evaluate.SHEETS or Path(f"notebooks/toy/{name}.png").exists()
