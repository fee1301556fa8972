"""notebooks/toy: the world, its tokenizer, resuming a training, the judge, the shipped model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import erase
import sample
from notebooks.experiments import models
from notebooks.tools import export
from notebooks.toy import judge, train, world
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
    """3,000 training examples, of which nothing is drawn: only what they are of is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("render", "render_work"):
            patch.setattr(world, name, lambda *_, **__: None)
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


@pytest.mark.robustness  # seconds
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


@pytest.mark.robustness  # seconds
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
    commands.run(world.main, "--out", tmp_path / "world.bmp")  # a PNG takes longer to write
    columns = 10
    rows = 6 + 12 + 1 + 2
    assert Image.open(tmp_path / "world.bmp").size == (columns * 196 + 4, rows * 218)


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
    assert re.search(r"tokenizer: \d s", capsys.readouterr().out)
    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} >= {"tokenizer", "model_index.json"}
    assert not (folder / "vae").exists()


@pytest.mark.robustness  # seconds, where there is no bfloat16
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


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_training_takes_bfloat16_only_where_the_cpu_has_it(monkeypatch, has_bfloat16):
    """Where it is emulated, a step takes ten times as long as in float32."""
    capabilities = {"avx2": True, "avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with train.mixed_precision():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


# ---- settings, and the judge


@pytest.mark.robustness  # seconds
def test_the_flags_file_is_read_alike_by_the_command_and_from_python(folder, tmp_path):
    file = tmp_path / "dots.safetensors"
    commands.run(
        erase.main, "a picture in the style of dots", "@notebooks/toy/flags",
        f"--model={folder}", "--iterations=1", f"--out={file}",
    )
    _, metadata = sample.read_tensors(file)
    saved = json.loads(metadata["settings"])

    flags = models.flags()
    assert {*flags} == {"lr", "iterations", "batch", "steps", "first"}
    assert saved["data"] == "notebooks.methods.key_steps:data" and flags["first"] == 4
    assert saved["iterations"] == 1
    for name in flags.keys() - {"iterations", "first"}:
        assert saved[name] == flags[name], name


def test_a_judge_of_other_shapes_is_refused(tmp_path):
    (tmp_path / "judge").mkdir()
    save_file({"neck.bias": torch.zeros(3)}, tmp_path / "judge" / "model.safetensors")
    with pytest.raises(sample.UsageError, match="doesn't fit the judge"):
        judge.load(tmp_path)


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
