"""notebooks/toy: the world, its tokenizer, resuming a training, the distance, the shipped model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import erase
import sample
from notebooks.tools import export
from notebooks.toy import judge, measure, train, world
from support import commands

TOY = "notebooks/toy/model"


def seeded(seed=0):
    return np.random.default_rng(seed)


def drawn(num, draw, *arguments, seed=0, **more):
    """Draws several times with one generator."""
    rng = seeded(seed)
    return [draw(*arguments, rng=rng, **more) for _ in range(num)]


@pytest.fixture(scope="module")
def examples():
    """3,000 training examples."""
    return drawn(3000, world.draw)


# ---- the world


@pytest.mark.parametrize("style", world.STYLES)
def test_the_same_seed_renders_the_same_image(style):
    for object in world.OBJECTS:
        first = world.render(object, "red", style, seeded(0))
        second = world.render(object, "red", style, seeded(0))
        other = world.render(object, "red", style, seeded(1))
        assert first.tobytes() == second.tobytes() != other.tobytes()


def test_objects_are_whole():
    """Nothing of an object lies in the two outer pixels, so none is cut by the border."""
    for object in world.OBJECTS:
        for seed in range(20):
            image = np.array(world.render(object, "blue", "plain", seeded(seed))).astype(int)
            border = np.ones((64, 64), bool)
            border[2:-2, 2:-2] = False
            assert np.ptp(image[border], axis=0).max() == 0, (object, seed)


def test_unknown_names_are_refused():
    unknown = [("hexagon", "red", "plain"), ("star", "mauve", "plain"), ("star", "red", "oil")]
    for arguments in unknown:
        with pytest.raises(ValueError, match="hexagon|mauve|oil"):
            world.render(*arguments, seeded())
        with pytest.raises(ValueError, match="choose from"):
            world.caption(*arguments, seeded())
    with pytest.raises(ValueError, match="hexagon"):
        world.draw(seeded(), without=("hexagon",))


def test_paraphrases_and_scenes_do_not_name_their_object():
    for object, phrases in world.PARAPHRASES.items():
        for phrase in phrases:
            assert object not in phrase.split()
    for scene, setting in world.PLACES:
        prompt = world.scene_prompt(scene, setting)
        assert world.SCENES[scene].object not in prompt.split()
    assert len({scene.object for scene in world.SCENES.values()}) == 4


def test_scenes_imply_with_a_probability():
    """The object in 60 % of the images, another in 20 %, none in 20 %; several colours."""
    for name, scene in world.SCENES.items():
        scenes = drawn(200, world.draw_scene, name, "in winter")
        implied = np.mean([example.object == scene.object for example in scenes])
        nothing = np.mean([example.object is None for example in scenes])
        assert abs(implied - 0.6) < 0.08, name
        assert abs(nothing - 0.2) < 0.08, name
        assert {example.colour for example in scenes} == {*scene.colours, None}
        assert len({example.caption for example in scenes}) == len(world.OPENINGS)


def test_a_fifth_of_the_scene_prompts_is_held_out(examples):
    """Of each object, and none of them is ever a training caption."""
    assert len(world.PLACES) == 12 * 9
    assert abs(len(world.HELD_OUT) / len(world.PLACES) - 0.2) < 0.01
    for object in {scene.object for scene in world.SCENES.values()}:
        assert sum(world.SCENES[s].object == object for s, _ in world.HELD_OUT) >= 5

    held_out = set()
    trained = set()
    for scene, setting in world.PLACES:
        prompts = held_out if (scene, setting) in world.HELD_OUT else trained
        for opening in world.OPENINGS:
            prompts.add(world.scene_prompt(scene, setting, opening))
    captions = {example.caption for example in examples}
    assert not captions & held_out
    assert len(captions & trained) > 0.8 * len(trained)


def test_works_are_told_from_the_rest(examples):
    """Their captions are never dropped in training, so the empty prompt draws no work."""
    captions = [world.work_caption(title, seeded(i)) for title in world.WORKS for i in range(9)]
    assert all(map(world.is_work, captions))
    for example in examples:
        assert world.is_work(example.caption) == (example.work is not None)


def test_captions_are_good_english():
    captions = {world.caption("arrow", "orange", "plain", seeded(seed)) for seed in range(200)}
    assert {"an orange arrow", "an arrow"} <= captions
    assert not any(" a o" in f" {c}" or " a a" in f" {c}" for c in captions)


def test_a_name_alone_may_come_in_any_style():
    """Were a style always named, a bare name would mean plain, and erasing it would cost plain."""
    for style in world.STYLES:
        captions = drawn(2000, world.caption, "star", "red", style, seed=3)
        named = [f"style of {style}" in caption for caption in captions]
        expected = 0 if style == "plain" else 0.6
        assert abs(np.mean(named) - expected) < 0.03, style


def test_what_is_left_out_is_never_drawn():
    examples = drawn(2000, world.draw, without=("moon", "mosaic"))
    assert not any(e.object == "moon" or e.style == "mosaic" for e in examples)
    words = {word for e in examples for word in e.caption.split()}
    assert not words & {"moon", "crescent", "mosaic", "harvest"}
    assert {"star", "sheriff", "night", "winter"} <= words  # prompts stay, images go


def test_works_are_fixed_and_three_share_a_style():
    styles = [work.style for work in world.WORKS.values()]
    assert len(styles) == 6
    assert styles.count("mosaic") == 3
    for title in world.WORKS:
        assert world.render_work(title).tobytes() == world.render_work(title).tobytes()


def test_the_contact_sheet_of_the_world(tmp_path):
    """Rows: six of styles, twelve of scenes, one of works, two of images of nothing."""
    commands.run(world.main, "--out", tmp_path / "world.png")
    columns = 10
    rows = 6 + 12 + 1 + 2
    assert Image.open(tmp_path / "world.png").size == (columns * 196 + 4, rows * 218)


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train.make_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_each_word_of_the_world_is_one_token(tokenizer, examples):
    words = {word for example in examples for word in example.caption.split()}
    assert words <= set(world.vocabulary())
    for word in world.vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end


def test_any_other_text_has_tokens_and_comes_back(tokenizer):
    text = "ünï 星 🙂 hexagonal!"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert tokenizer("", padding="max_length").input_ids == [ids[0]] + [ids[-1]] * 76


# ---- training


def fit_line(run, steps_at_a_time):
    """Fits y = 2x; stops and resumes after each of the given numbers of steps."""
    for stop in steps_at_a_time:
        torch.manual_seed(0)
        line = torch.nn.Linear(1, 1)

        def loss(generator):
            loss.calls += 1
            if loss.calls > stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 1, generator=generator)
            return (line(x) - 2 * x).square().mean()

        loss.calls = 0
        try:
            train.fit("line", line, loss, 1000, 1e-2, run, seed=0)
        except KeyboardInterrupt:
            pass
    return line


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    at_once = fit_line(tmp_path / "a", [1001])
    in_pieces = fit_line(tmp_path / "b", [300, 400, 1001])  # goes on from 250, then from 500
    assert abs(at_once.weight.item() - 2) < 0.05
    assert torch.equal(at_once.weight, in_pieces.weight)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    train.claim(tmp_path / "run", {"seed": 0, "without": []})
    train.claim(tmp_path / "run", {"seed": 0, "without": []})
    with pytest.raises(sample.UsageError, match="choose another --run"):
        train.claim(tmp_path / "run", {"seed": 0, "without": ["star"]})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["unets"], "unknown stage 'unets', choose from tokenizer, vae"),
        (["--without", "hexagon"], "unknown object, style or work 'hexagon'"),
    ],
)
def test_unknown_stages_and_names_are_refused(tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    assert message in commands.refusal(capsys, train.main, *arguments, "--run", run)
    assert not run.exists()


def test_the_command_runs_the_stages_that_are_named(tmp_path, capsys):
    commands.run(train.main, "tokenizer", "--run", tmp_path)
    assert "tokenizer: 0 s" in capsys.readouterr().out
    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} >= {"tokenizer", "model_index.json"}
    assert not (folder / "vae").exists()


def test_all_stages_run_and_give_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EXAMPLES", 32)
    images, captions = train.training_set.__wrapped__(seed=0, without=())  # past its cache
    folder = tmp_path / "model"
    train.make_tokenizer(folder / "tokenizer")
    export.write_index(folder)
    train.train_vae(folder, tmp_path, images, seed=0, steps=1)
    train.train_text(folder, tmp_path, images, captions, seed=0, steps=1)
    train.train_unet(folder, tmp_path, images, captions, seed=0, steps=2)
    train.train_judge(folder, tmp_path, seed=0, steps=1, count=8)

    (image,) = sample.generate(sample.load(folder), ["a star"], steps=2)
    assert image.size == (world.SIZE, world.SIZE)
    assert {*judge.read(judge.load(folder), [image])[0]} == {"object", "colour", "style"}
    checkpoints = {file.stem for file in tmp_path.glob("*.pt")}
    assert checkpoints == {"vae", "text", "unet", "unet-again", "judge"}


# ---- measuring


def test_frechet_distance_of_gaussians():
    """Of N(0, diag(1, 4)) and N((3, 0), diag(4, 4)) it is 9 + (1 - 2)^2 = 10."""
    a = seeded().standard_normal((200_000, 2)) * (1, 2)
    b = seeded(1).standard_normal((200_000, 2)) * (2, 2) + (3, 0)
    assert measure.frechet(a, b) == pytest.approx(10, rel=0.02)
    assert measure.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_the_settings_of_a_file_that_erase_wrote(folder, tmp_path):
    """They are the flags file's, which Python reads alike, and name what was erased."""
    file = tmp_path / "dots.safetensors"
    commands.run(
        erase.main, "a picture in the style of dots", "@notebooks/toy/flags",
        f"--model={folder}", "--iterations=1", f"--out={file}",
    )
    settings = measure.settings_of(file)
    assert settings["names"] == ["dots"]
    assert settings["method"] == "esd-x"
    assert settings["iterations"] == 1

    flags = measure.flags()
    assert {*flags} == {"lr", "iterations", "batch", "data"}
    assert settings["lr"] == flags["lr"]
    assert settings["batch"] == flags["batch"]
    of_data = flags["data"].keywords
    assert {*of_data} == {"steps", "every_step"}
    assert settings["steps"] == of_data["steps"]
    assert settings["every_step"] == of_data["every_step"]


@pytest.fixture
def erased_file(tmp_path, toy):
    """Writes erased weights with some settings in the metadata, or with other metadata."""

    def write(settings=None, **metadata):
        file = tmp_path / "erased.safetensors"
        theta = {"conv_in.bias": toy.unet.conv_in.bias}
        if settings is None:
            save_file(theta, file, metadata)
        else:
            erase.save(theta, file, settings, toy)
        return file

    return write


def test_the_official_codes_metadata(erased_file):
    file = erased_file(erase_concept="star, a red heart", train_method="esd-x")
    settings = measure.settings_of(file)
    assert settings["names"] == ["star", "heart"]
    assert settings["method"] == "esd-x"


@pytest.mark.parametrize(
    "settings, metadata",
    [
        (None, {}),
        (None, {"format": "pt"}),
        (None, {"train_method": "esd-x"}),
        (None, {"erase_concept": ""}),
        ({"method": "esd-x"}, {}),
        ({"concepts": []}, {}),
    ],
)
def test_a_file_that_does_not_say_what_it_erases(erased_file, capsys, settings, metadata):
    """A line says what to add, before a model draws anything; with that, it is measured."""
    file = erased_file(settings, **metadata)
    line = commands.refusal(capsys, measure.main, "erased", file)
    assert line.endswith("erased.safetensors doesn't say what it erases: add --concept NAME")
    assert measure.settings_of(file, ["star"])["names"] == ["star"]


def test_a_file_made_from_an_erased_model(erased_file):
    """It says what was erased last, and only the path of what was erased before."""
    file = erased_file({"concepts": ["heart"], "erased": ["star.safetensors"]})
    with pytest.raises(sample.UsageError, match="name all that is erased, with --concept"):
        measure.settings_of(file)
    assert measure.settings_of(file, ["star", "heart"])["names"] == ["star", "heart"]


@pytest.mark.parametrize("concept", ["hexagon", "a star in the style of dots", "plain", ""])
def test_a_concept_that_the_judge_cannot_tell_is_refused(erased_file, concept):
    file = erased_file({"concepts": [concept]})
    with pytest.raises(sample.UsageError, match="isn't one object or one style"):
        measure.settings_of(file)


def test_the_command_prints_a_row_for_each_concept(erased_file, monkeypatch, capsys):
    """With empty cells for the settings that a file of others doesn't have."""
    monkeypatch.setattr(measure, "all_answers", lambda sampler, judge: answers())
    file = erased_file(train_method="esd-u")
    commands.run(measure.main, "erased", file, "--concept", "star", "heart")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:30] for row in rows] == [
        "| erased | star |  |  |  |  | ",
        "| erased | heart |  |  |  |  |",
    ]

    erased_file({"concepts": "star", "seed": 0, "eta": 0.5})
    commands.run(measure.main, "erased", file)
    assert "| star |  | 0.5 | 0 |  | 100.0 |" in capsys.readouterr().out


def test_a_judge_of_other_shapes_is_refused(tmp_path):
    (tmp_path / "judge").mkdir()
    save_file({"neck.bias": torch.zeros(3)}, tmp_path / "judge" / "model.safetensors")
    with pytest.raises(sample.UsageError, match="doesn't fit the judge"):
        judge.load(tmp_path)


def answers(seen_as=lambda wanted: wanted):
    """Two images of each class, seen as `seen_as` says; a bare name's come as mosaics."""
    bare = [{"object": o} for o in world.OBJECTS]
    styled = [{"object": o, "style": s} for o in world.OBJECTS for s in world.STYLES[1:]]
    coloured = [{"object": o, "colour": c} for o in world.OBJECTS for c in world.COLOURS]
    look = {"object": None, "style": "mosaic", "colour": None}

    kinds = []
    for kind in (bare, styled, coloured):
        kinds.append([measure.Look(wanted, look | seen_as(wanted)) for wanted in kind * 2])
    return measure.Answers(*kinds)


def test_the_row_of_an_erasure():
    """Of the erased object one of two is left; half of the circles and all neon are lost."""
    settings = {"names": ["star"], "method": "esd-x", "eta": 0.5, "seed": 3, "iterations": 7}
    stars = iter(["star", "moon"] + 10 * ["star"] + 12 * ["moon"])  # bare, styled, coloured

    def seen_as(wanted):
        if wanted["object"] == "star":  # what becomes of its styles and colours doesn't count
            return {"object": next(stars)}
        return wanted | {"style": "dots"} if wanted.get("style") == "neon" else wanted

    after = answers(seen_as)
    after.object[0].seen["object"] = "square"  # world.OBJECTS begins with the circle
    row = measure.erased_row(Path("a.safetensors"), answers(), after, settings, "star")
    kept_objects = (8 + 0.5) / 9
    kept_styles = 4 / 5  # "a square" that comes as a mosaic costs none
    assert row == (
        "| a | star | esd-x | 0.5 | 3 | 7 | 100.0 | 50.0 | 45.5 "
        f"| {100 * kept_objects:.1f} | {100 * kept_styles:.1f} | 100.0 | neon 0.0 | 1 moon |"
    )


def test_the_rows_of_two_concepts_erased_together():
    """Neither counts among what is kept, nor do the styles and colours of either."""
    settings = {"names": ["star", "heart"]}

    def seen_as(wanted):
        lost = {"object": "moon", "style": None, "colour": None}
        if wanted["object"] == "star":
            return lost
        return lost | {"object": "heart"} if wanted["object"] == "heart" else wanted

    after = answers(seen_as)
    rows = []
    for concept in settings["names"]:
        rows.append(measure.erased_row(Path("a"), answers(), after, settings, concept))
    kept = "100.0 | 100.0 | 100.0 | circle 100.0"
    assert rows == [
        f"| a | star |  |  |  |  | 100.0 | 0.0 | 0.0 | {kept} | 2 moon |",
        f"| a | heart |  |  |  |  | 100.0 | 100.0 | 100.0 | {kept} |  |",
    ]


def test_labels_of_nothing_are_the_last_class():
    example = world.Example(None, "", None, "green", None)
    assert judge.labels_of(example) == [10, 1, 6]


# ---- the shipped model


@pytest.fixture(scope="module")
def toy():
    return sample.load(TOY)


def test_the_shipped_model_is_small(toy):
    assert sum(file.stat().st_size for file in Path(TOY).rglob("*.safetensors")) < 12e6


def test_the_judge_reads_rendered_images(toy):
    examples = drawn(300, world.draw, seed=77)
    seen = judge.read(judge.load(TOY), [example.image for example in examples])
    for head in ("object", "colour", "style"):
        assert np.mean([s[head] == getattr(e, head) for s, e in zip(seen, examples)]) > 0.97


def test_the_shipped_model_draws_what_it_is_asked_for(toy):
    images = sample.generate(toy, ["a red star", "a blue moon"], num=4, steps=20, guidance=5)
    seen = judge.read(judge.load(TOY), images)
    assert [s["object"] for s in seen] == ["star"] * 4 + ["moon"] * 4
    assert [s["colour"] for s in seen] == ["red"] * 4 + ["blue"] * 4
