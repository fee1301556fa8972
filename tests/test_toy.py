"""notebooks/toy: the world, its tokenizer, resuming a training, the distance, the shipped model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

import erase
import sample
from notebooks.tools import export
from notebooks.toy import judge, measure, train, world

TOY = "notebooks/toy"


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def examples():
    """3,000 training examples."""
    return [world.draw(r) for r in [rng()] for _ in range(3000)]


# The world

@pytest.mark.parametrize("style", world.STYLES)
def test_the_same_seed_renders_the_same_image(style):
    for object in world.OBJECTS:
        first, second, other = (world.render(object, "red", style, rng(s)) for s in (0, 0, 1))
        assert first.tobytes() == second.tobytes() != other.tobytes()


def test_objects_are_whole():
    """Nothing of an object lies in the two outer pixels, so none is cut by the border."""
    for object in world.OBJECTS:
        for seed in range(20):
            image = np.array(world.render(object, "blue", "plain", rng(seed))).astype(int)
            border = np.ones((64, 64), bool)
            border[2:-2, 2:-2] = False
            assert np.ptp(image[border], axis=0).max() == 0, (object, seed)


def test_unknown_names_are_refused():
    for arguments in (("hexagon", "red", "plain"), ("star", "mauve", "plain"),
                      ("star", "red", "oil")):
        with pytest.raises(ValueError, match="hexagon|mauve|oil"):
            world.render(*arguments, rng())
        with pytest.raises(ValueError, match="choose from"):
            world.caption(*arguments, rng())
    with pytest.raises(ValueError, match="hexagon"):
        world.draw(rng(), without=("hexagon",))


def test_paraphrases_and_scenes_do_not_name_their_object():
    phrases = [(o, p) for o, several in world.PARAPHRASES.items() for p in several]
    phrases += [(world.SCENES[s].object, world.scene_prompt(s, where)) for s, where in world.PLACES]
    for object, phrase in phrases:
        assert object not in phrase.split()
    assert len({scene.object for scene in world.SCENES.values()}) == 4


def test_scenes_imply_with_a_probability():
    """The object in 60 % of the images, another in 20 %, none in 20 %; several colours."""
    for name, scene in world.SCENES.items():
        images = [world.draw_scene(name, "in winter", r) for r in [rng()] for _ in range(200)]
        shown = [e.object for e in images]
        assert abs(np.mean([o == scene.object for o in shown]) - 0.6) < 0.08, name
        assert abs(np.mean([o is None for o in shown]) - 0.2) < 0.08, name
        assert {e.colour for e in images} == {*scene.colours, None}
        assert len({e.caption for e in images}) == len(world.OPENINGS)


def test_a_fifth_of_the_scene_prompts_is_held_out(examples):
    """Of each object, and none of them is ever a training caption."""
    assert len(world.PLACES) == 12 * 9 and abs(len(world.HELD_OUT) / len(world.PLACES) - 0.2) < 0.01
    for object in {scene.object for scene in world.SCENES.values()}:
        assert sum(world.SCENES[s].object == object for s, _ in world.HELD_OUT) >= 5
    captions = {example.caption for example in examples}
    prompts = {held: [world.scene_prompt(*place, opening) for opening in world.OPENINGS
                      for place in world.PLACES if (place in world.HELD_OUT) == held]
               for held in (True, False)}
    assert not captions & set(prompts[True])
    assert len(captions & set(prompts[False])) > 0.8 * len(prompts[False])


def test_works_are_told_from_the_rest(examples):
    """Their captions are never dropped in training, so the empty prompt draws no work."""
    works = [world.work_caption(title, rng(i)) for title in world.WORKS for i in range(9)]
    assert all(map(world.is_work, works))
    assert [world.is_work(e.caption) for e in examples] == [e.work is not None for e in examples]


def test_captions_are_good_english():
    captions = {world.caption("arrow", "orange", "plain", rng(seed)) for seed in range(200)}
    assert "an orange arrow" in captions and "an arrow" in captions
    assert not any(" a o" in f" {c}" or " a a" in f" {c}" for c in captions)


def test_a_name_alone_may_come_in_any_style():
    """Were a style always named, a bare name would mean plain, and erasing it would cost plain."""
    for style in world.STYLES:
        r = rng(3)
        named = [f"style of {style}" in world.caption("star", "red", style, r) for _ in range(2000)]
        expected = 0 if style == "plain" else 0.6
        assert abs(np.mean(named) - expected) < 0.03, style


def test_what_is_left_out_is_never_drawn():
    examples = [world.draw(r, without=("moon", "mosaic")) for r in [rng()] for _ in range(2000)]
    assert not any(e.object == "moon" or e.style == "mosaic" for e in examples)
    words = {word for e in examples for word in e.caption.split()}
    assert not words & {"moon", "crescent", "mosaic", "harvest"}
    assert {"star", "sheriff", "night", "winter"} <= words  # prompts stay, images go


def test_works_are_fixed_and_three_share_a_style():
    styles = [work.style for work in world.WORKS.values()]
    assert len(styles) == 6 and styles.count("mosaic") == 3
    for title in world.WORKS:
        assert world.render_work(title).tobytes() == world.render_work(title).tobytes()


def test_the_contact_sheet_of_the_world(tmp_path, monkeypatch):
    """Rows: six of styles, twelve of scenes, one of works, two of images of nothing."""
    monkeypatch.setattr("sys.argv", ["world.py", "--out", str(tmp_path / "world.png")])
    world.main()
    columns, rows = 10, 6 + 12 + 1 + 2
    assert Image.open(tmp_path / "world.png").size == (columns * 196 + 4, rows * 218)


# The tokenizer

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


# Training

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
    whole = fit_line(tmp_path / "a", [1001])
    pieces = fit_line(tmp_path / "b", [300, 400, 1001])  # goes on from 250, then from 500
    assert abs(whole.weight.item() - 2) < 0.05
    assert torch.equal(whole.weight, pieces.weight)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    train.claim(tmp_path / "run", {"seed": 0, "without": []})
    train.claim(tmp_path / "run", {"seed": 0, "without": []})
    with pytest.raises(ValueError, match="choose another --run"):
        train.claim(tmp_path / "run", {"seed": 0, "without": ["star"]})


def test_all_stages_run_and_give_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EXAMPLES", 32)
    images, captions = train.examples.__wrapped__(seed=0, without=())  # past its cache
    folder = tmp_path / "model"
    train.make_tokenizer(folder / "tokenizer")
    export.write_index(folder)
    train.train_vae(folder, tmp_path, images, seed=0, steps=1)
    train.train_text(folder, tmp_path, images, captions, seed=0, steps=1)
    train.train_unet(folder, tmp_path, images, captions, seed=0, steps=2)
    train.train_judge(folder, tmp_path, seed=0, steps=1, count=8)

    image, = sample.generate(sample.load(folder), ["a star"], steps=2)
    assert image.size == (world.SIZE, world.SIZE)
    assert {*judge.read(judge.load(folder), [image])[0]} == {"object", "colour", "style"}
    assert {file.stem for file in tmp_path.glob("*.pt")} == {"vae", "text", "unet", "unet-again",
                                                            "judge"}


# Measuring

def test_frechet_distance_of_gaussians():
    """Of N(0, diag(1, 4)) and N((3, 0), diag(4, 4)) it is 9 + (1 - 2)^2 = 10."""
    a = rng().standard_normal((200_000, 2)) * (1, 2)
    b = rng(1).standard_normal((200_000, 2)) * (2, 2) + (3, 0)
    assert measure.frechet(a, b) == pytest.approx(10, rel=0.02)
    assert measure.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_the_settings_of_a_file_that_erase_wrote(folder, tmp_path, monkeypatch):
    """They are the flags file's, which Python reads alike, and name what was erased."""
    file = tmp_path / "dots.safetensors"
    monkeypatch.setattr("sys.argv", ["erase.py", "a picture in the style of dots",
                                     "@notebooks/toy/flags", f"--model={folder}",
                                     "--iterations=1", f"--out={file}"])
    erase.main()
    settings, flags = measure.settings_of(file), measure.flags()
    assert (settings["name"], settings["method"], settings["iterations"]) == ("dots", "esd-x", 1)
    assert all(settings[key] == flags[key] for key in ("lr", "steps", "batch"))
    assert settings["every_step"] == flags["data"].keywords["every_step"]
    assert {*flags} == {"lr", "iterations", "steps", "batch", "data"}
    with pytest.raises(ValueError, match="didn't write it"):
        measure.settings_of(Path(TOY) / "judge" / "model.safetensors")


def answers(seen_as=lambda wanted: wanted):
    """Two images of each class, seen as `seen_as` says; a bare name's come as mosaics."""
    bare = [{"object": o} for o in world.OBJECTS]
    styled = [{"object": o, "style": s} for o in world.OBJECTS for s in world.STYLES[1:]]
    coloured = [{"object": o, "colour": c} for o in world.OBJECTS for c in world.COLOURS]
    look = {"object": None, "style": "mosaic", "colour": None}
    return measure.Answers(*([(wanted, look | seen_as(wanted)) for wanted in kind * 2]
                             for kind in (bare, styled, coloured)))


def test_the_row_of_an_erasure():
    """Of the erased object one of two is left; half of the circles and all neon are lost."""
    settings = {"name": "star", "method": "esd-x", "eta": 0.5, "seed": 3, "iterations": 7}
    stars = iter(["star", "moon"] + 10 * ["star"] + 12 * ["moon"])  # bare, styled, coloured

    def seen_as(wanted):
        if wanted["object"] == "star":  # what becomes of its styles and colours doesn't count
            return {"object": next(stars)}
        return wanted | {"style": "dots"} if wanted.get("style") == "neon" else wanted

    after = answers(seen_as)
    after.object[0][1]["object"] = "square"  # world.OBJECTS begins with the circle
    row = measure.erased_row(Path("a.safetensors"), answers(), after, settings)
    kept_objects, kept_styles = (8 + 0.5) / 9, 4 / 5  # "a square" that comes as a mosaic costs none
    assert row == ("| a | star | esd-x | 0.5 | 3 | 7 | 100.0 | 50.0 | 45.5 "
                   f"| {100 * kept_objects:.1f} | {100 * kept_styles:.1f} | 100.0 "
                   "| neon 0.0 | 1 moon |")


def test_labels_of_nothing_are_the_last_class():
    example = world.Example(None, "", None, "green", None)
    assert judge.labels_of(example) == [10, 1, 6]


# The shipped model

@pytest.fixture(scope="module")
def toy():
    return sample.load(TOY)


def test_the_shipped_model_is_small(toy):
    assert sum(file.stat().st_size for file in Path(TOY).rglob("*.safetensors")) < 12e6


def test_the_judge_reads_rendered_images(toy):
    look = judge.load(TOY)
    examples = [world.draw(r) for r in [rng(77)] for _ in range(300)]
    seen = judge.read(look, [e.image for e in examples])
    for head in ("object", "colour", "style"):
        assert np.mean([s[head] == getattr(e, head) for s, e in zip(seen, examples)]) > 0.97


def test_the_shipped_model_draws_what_it_is_asked_for(toy):
    prompts = [f"a {colour} {object}" for object, colour in (("star", "red"), ("moon", "blue"))]
    images = sample.generate(toy, prompts, num=4, steps=20, guidance=5)
    seen = judge.read(judge.load(TOY), images)
    assert [s["object"] for s in seen] == ["star"] * 4 + ["moon"] * 4
    assert [s["colour"] for s in seen] == ["red"] * 4 + ["blue"] * 4
