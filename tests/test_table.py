"""notebooks/tools/table.py: the prompt tables of the official evaluation."""

import json
import os
import runpy
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import sample
from notebooks.methods.safe_latent_diffusion import SETTINGS, SafePredictor
from notebooks.tools import table
from support import commands
from support.commands import difference

pytestmark = pytest.mark.robustness

HEAD = "case_number,prompt,evaluation_seed\n"

# the columns of the official files, the rows made up
TABLES = {
    "artists": ",prompt,evaluation_seed,artist,case_number\n"
    '0,"a star, in red",11,Somebody,0\n'
    "1,a heart,12,Somebody,1\n",
    "imagenette": ",case_number,prompt,evaluation_seed,class\n"
    "0,0,a star,11,star\n"
    "1,1,a heart,12,heart\n",
    "i2p": "prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,"
    "sd_image_height,case_number\n"
    "a star,x,0,11,7.5,64,64,a1\n"
    "a heart,x,0,12,3.0,128,64,a2\n"
    "a moon,x,1,13,3.0,64,128,a3\n",
    "coco": ",image_id,prompt,evaluation_seed\n"
    "0,391895,a star,11\n"
    "1,60623,a heart,12\n",
}


@pytest.fixture
def arguments(folder, tmp_path):
    """Writes a table, and returns the command's arguments: 2 steps of the small model."""

    def write(text, *flags, out="out"):
        file = tmp_path / "t.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [file, "--model", folder, "--steps", 2, "--out", tmp_path / out, *flags]

    return write


@pytest.fixture
def draw(arguments, tmp_path):
    """Runs the command on a table's text; returns --out."""

    def run(text, *flags, out="out"):
        commands.run(table.main, *arguments(text, *flags, out=out))
        return tmp_path / out

    return run


@pytest.fixture
def refusal(arguments, capsys):
    """Runs the command on a table's text; returns the one line with which it must end."""

    def run(text, *flags):
        return commands.refusal(capsys, table.main, *arguments(text, *flags))

    return run


def opened(folder, *names):
    """Returns the images of these names."""
    return [Image.open(folder / f"{name}.png") for name in names]


# ---- which images are drawn


@pytest.mark.parametrize("name, cases", [
    ("artists", ["0", "1"]),
    ("imagenette", ["0", "1"]),
    ("i2p", ["a1", "a2", "a3"]),
    ("coco", ["391895", "60623"]),
])
def test_official_tables(name, cases, draw, capsys):
    out = draw(TABLES[name], "--num", 2)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(f"{case}_{i}.png" for case in cases for i in range(2))
    assert f"{2 * len(cases)} images drawn, {2 * len(cases)} in all\n" in capsys.readouterr().out


def test_the_flags_count(draw, sd):
    flags = ["--guidance", 4, "--negative", "a moon", "--size", 128]
    found = draw(TABLES["coco"], *flags)
    expected = sample.generate(
        sd, ["a heart"], seed=12, steps=2, guidance=4, size=128, negative="a moon"
    )
    assert difference(opened(found, "60623_0"), expected) <= 1


def test_safe_latent_diffusion(draw, sd):
    """Two rows with a batch each: the momentum of one doesn't reach the other."""
    found = draw(
        TABLES["coco"], "--safe", "a circle", "--sld", "max", "--negative", "a moon", "--batch", 1
    )
    concept = sd.encode(["a circle"])
    for prompt, seed, case in (("a star", 11, "391895"), ("a heart", 12, "60623")):
        images = {}
        for name in ("max", "medium"):
            predictor = partial(SafePredictor, concept=concept, safety=SETTINGS[name])
            images[name] = sample.generate(
                sd, [prompt], seed=seed, steps=2, negative="a moon", predictor=predictor
            )
        assert difference(opened(found, f"{case}_0"), images["max"]) <= 1
        assert difference(opened(found, f"{case}_0"), images["medium"]) > 1


def test_erased_weights(draw, sd, tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    file = tmp_path / "erased.safetensors"
    save_file({name: -2 * sd.unet.state_dict()[name]}, file)

    found = draw(TABLES["coco"], "--erased", file)
    erased = sample.generate(sample.load_erased(sd, file), ["a heart"], seed=12, steps=2)
    original = sample.generate(sd, ["a heart"], seed=12, steps=2)
    assert difference(opened(found, "60623_0"), erased) <= 1
    assert difference(opened(found, "60623_0"), original) > 1


def test_an_image_says_how_it_was_made(draw, folder):
    out = draw(TABLES["i2p"], "--num", 2, "--negative", "a moon", "--safe", "a circle")
    image, = opened(out, "a2_1")
    settings = json.loads(image.text["settings"])
    expected = {
        "case": "a2",
        "prompt": "a heart",
        "seed": 12,
        "image": 1,
        "guidance": 3.0,
        "size": [128, 64],
        "steps": 2,
        "negative": "a moon",
        "safe": "a circle",
        "sld": "medium",
        "erased": [],
        "model": str(folder),
    }
    assert settings | expected == settings

    first, = opened(out, "a2_0")  # a seed draws the first image, so only that one names it
    assert "Seed: 12" in first.text["parameters"]
    assert "Seed" not in image.text["parameters"]

    of_its_own_size, = opened(draw(TABLES["coco"], out="coco"), "60623_0")
    assert json.loads(of_its_own_size.text["settings"])["size"] == [64, 64]


def test_a_row_is_what_generate_gives(draw, sd):
    """Guidance and size are the row's own, a row's images share one generator."""
    found = opened(draw(TABLES["i2p"], "--num", 2), "a2_0", "a2_1")
    assert found[0].size == (128, 64)

    row = {"num": 2, "seed": 12, "steps": 2, "size": (128, 64)}
    assert difference(found, sample.generate(sd, ["a heart"], guidance=3.0, **row)) <= 1
    assert difference(found, sample.generate(sd, ["a heart"], guidance=7.5, **row)) > 1


def test_rows_of_one_batch_keep_their_seeds(draw, sd):
    out = draw(TABLES["coco"], "--num", 2)
    for prompt, seed, case in (("a star", 11, "391895"), ("a heart", 12, "60623")):
        expected = sample.generate(sd, [prompt], num=2, seed=seed, steps=2)
        assert difference(opened(out, f"{case}_0", f"{case}_1"), expected) <= 1


def test_a_row_depends_on_nothing_but_itself(draw):
    one = draw(TABLES["i2p"], "--batch", 1, out="one")
    many = draw(TABLES["i2p"], "--batch", 8, out="many")
    for name in ("a1_0", "a2_0", "a3_0"):
        assert difference(opened(one, name), opened(many, name)) <= 1


def test_rows_of_equal_guidance_and_size_share_a_batch(draw, monkeypatch):
    batches = []
    generate = sample.generate

    def noted(sd, prompts, **settings):
        batches.append(prompts)
        return generate(sd, prompts, **settings)

    monkeypatch.setattr(sample, "generate", noted)
    head = HEAD.replace("\n", ",evaluation_guidance\n")
    lines = [f"{i},prompt {i},{i},{7 + i % 2}\n" for i in range(6)]
    draw(head + "".join(lines), "--num", 2, "--batch", 5, "--steps", 1)
    assert batches == [
        ["prompt 0", "prompt 2"],
        ["prompt 4"],
        ["prompt 1", "prompt 3"],
        ["prompt 5"],
    ]


# ---- the same command again


def modified(folder):
    """Returns when each file was written, by name."""
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_existing_images_are_skipped(draw, capsys):
    out = draw(TABLES["coco"])
    first = modified(out)
    (out / "60623_0.png").unlink()
    draw(TABLES["coco"])
    assert "1 images drawn, 2 in all\n" in capsys.readouterr().out

    again = modified(out)
    assert again.keys() == first.keys()
    assert [name for name in again if again[name] != first[name]] == ["60623_0.png"]

    draw(TABLES["coco"], "--num", 2)
    assert len([*out.iterdir()]) == 4
    assert "4 images drawn, 4 in all" in capsys.readouterr().out


def test_an_image_of_another_program_is_not_taken_for_one_of_ours(draw, refusal):
    """The names are those of the official evaluation, so it may well be there."""
    out = draw(HEAD + "1,a star,5\n")
    (file,) = out.glob("*.png")
    for settings in ("{", "[3]", ""):
        info = PngImagePlugin.PngInfo()
        info.add_text("settings", settings)
        Image.new("RGB", (64, 64)).save(file, pnginfo=info)
        assert "has model = None, not" in refusal(HEAD + "1,a star,5\n")
    for suffix in ("PNG", "JPEG"):  # under the same name
        Image.new("RGB", (64, 64)).save(file, format=suffix)
        assert "has model = None, not" in refusal(HEAD + "1,a star,5\n")


@pytest.mark.parametrize("row, flags, says", [
    ("1,a heart,5\n", [], "prompt = 'a star', not 'a heart'"),
    ("1,a star,6\n", [], "seed = 5, not 6"),
    ("1,a star,5\n", ["--negative", "blue"], "negative = '', not 'blue'"),
    ("1,a star,5\n", ["--guidance", 3], "guidance = 7.5, not 3.0"),
    ("1,a star,5\n", ["--safe", "a heart"], "safe = '', not 'a heart'"),
    ("1,a star,5\n", ["--size", 128], "size = [64, 64], not [128, 128]"),
])
def test_images_of_another_run_are_not_taken_for_this_ones(row, flags, says, draw, refusal):
    draw(HEAD + "1,a star,5\n")
    line = refusal(HEAD + row, *flags)
    assert says in line
    assert line.endswith("choose another --out")


def test_rows_may_be_added(draw, capsys):
    draw(HEAD + "1,a star,5\n")
    draw(HEAD + "1,a star,5\n2,a heart,6\n")
    assert "1 images drawn, 2 in all" in capsys.readouterr().out


def test_non_finite_pixels_are_no_image(draw, refusal, tmp_path):
    """The images before them are kept, theirs isn't written, so a second run draws it."""
    prompts = []
    generate = sample.generate

    def breaks_down(sd, prompt, **settings):
        prompts.append(prompt)
        if len(prompts) == 2:
            with torch.no_grad():
                sd.vae.decoder.conv_out.bias[0] = torch.nan
        return generate(sd, prompt, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", breaks_down)
        line = refusal(TABLES["coco"], "--batch", 1)
    assert "the batch from 'a heart' on has non-finite pixels" in line
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["391895_0.png"]
    assert len([*draw(TABLES["coco"]).iterdir()]) == 2


# ---- several processes


@pytest.mark.robustness
def test_processes_share_the_rows(arguments, tmp_path):
    """Three rows, two processes: no row twice, none left out."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    words = arguments(TABLES["i2p"], "--steps", 1)
    run = subprocess.run(
        [sys.executable, *torchrun, "notebooks.tools.table", *map(str, words)],
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "2 images drawn, 2 in all, process 0\n" in run.stdout
    assert "1 images drawn, 1 in all, process 1\n" in run.stdout
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert drawn == {"a1_0.png", "a2_0.png", "a3_0.png"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_draws_its_share(rank, draw, capsys, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = draw(TABLES["i2p"])
    cases = [["a1", "a3"], ["a2"]][rank]
    assert sorted(file.name for file in out.iterdir()) == [f"{case}_0.png" for case in cases]
    assert f"in all, process {rank}\n" in capsys.readouterr().out


@pytest.mark.parametrize("rank", ["1", "-1"])
def test_a_rank_without_a_world_is_refused(rank, refusal, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert f"RANK is {rank} of WORLD_SIZE 1" in refusal(TABLES["coco"])


# ---- what a table may look like


def test_thirty_thousand_rows_are_read_in_a_second(tmp_path):
    lines = [f"{i},a picture of number {i},{i}\n" for i in range(30_000)]
    (tmp_path / "t.csv").write_text(HEAD + "".join(lines))
    began = time.process_time()
    rows = table.read_table(tmp_path / "t.csv")
    assert time.process_time() - began < 1
    assert len(rows) == 30_000
    assert rows[-1] == table.Row(
        line=30_001,
        case="29999",
        prompt="a picture of number 29999",
        seed=29999,
        guidance=7.5,
        size=None,
    )


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b"\xef\xbb\xbfcase_number,prompt,evaluation_seed,evaluation_guidance\r\n"
        b'7,"two\r\nlines",3,\r\n8,,4,5\r\n'
    )
    first, second = table.read_table(tmp_path / "t.csv", guidance=4.0, size=64)
    assert first == table.Row(3, "7", "two\r\nlines", seed=3, guidance=4.0, size=64)
    assert second == table.Row(4, "8", "", seed=4, guidance=5.0, size=64)


@pytest.mark.parametrize("content, cases", [
    ("case_num,prompt,evaluation_seed\n7,a star,4068.0\n", ["7"]),
    ("image_id,case_number,prompt,evaluation_seed\n1,7,a star,4068\n", ["7"]),
    ("prompt,evaluation_seed\na star,4068\na heart,4068.00\n", ["0", "1"]),
    ("case_number;prompt;evaluation_seed\n7;a star, red;4068\n", ["7"]),
    ("case_number,prompt,evaluation_seed\n7,a star; red,4068\n", ["7"]),
    ("case_number,prompt,evaluation_seed\n7,ein Stern \u2605,4068\n".encode("utf-16"), ["7"]),
    (
        "case_number,prompt,evaluation_seed,sd_image_width,sd_image_height\n"
        "7,a,4068,64.0,128.0\n",
        ["7"],
    ),
])
def test_tables_as_people_have_them(content, cases, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.csv").write_bytes(data)

    rows = table.read_table(tmp_path / "t.csv")
    assert [row.case for row in rows] == cases
    assert {row.seed for row in rows} == {4068}
    assert rows[0].prompt in ("a star", "a star, red", "a star; red", "ein Stern \u2605", "a")
    assert rows[0].size == ((64, 128) if "sd_image_width" in data.decode("latin1") else None)


@pytest.mark.parametrize("content, says", [
    ("case_number,prompt\n1,a star\n", "line 1: there must be one column evaluation_seed, not"),
    ("case_number,evaluation_seed\n1,1\n", "line 1: there must be one column prompt, not"),
    ("", "line 0: there must be one column prompt, not []"),
    (HEAD, "line 1: there are no rows"),
    (HEAD + "1,a star,x\n", "line 2: evaluation_seed can't be 'x'"),
    (HEAD + "1,\"a\nb\",1\n2,a star,-1\n", "line 4: evaluation_seed can't be '-1'"),
    (HEAD + "1,a,9999999999999999999\n", "evaluation_seed can't be '9999999999999999999'"),
    (HEAD + "1,a,1\n1,b,2\n", "line 3: case '1' appears twice"),
    (HEAD + "../x,a,1\n", "line 2: case can't be '../x'"),
    (HEAD + ",a,1\n", "line 2: case can't be ''"),
    ("prompt," + HEAD + "b,1,a,5\n", "there must be one column prompt, not ['prompt', 'case_n"),
    (HEAD + '1,"a star,5\n2,a heart,6\n', "unexpected end of data"),
    (HEAD + '1,"a star,5\n2,"a heart",6\n', "',' expected after '\"'"),
    (TABLES["i2p"].replace("128,64", "128,"), "sd_image_width and sd_image_height: give both"),
    (HEAD + "1,a,1.5\n", "line 2: evaluation_seed can't be '1.5'"),
    (HEAD + "1\n", "line 2: more or fewer cells than columns"),
    (HEAD + "1,a red, star,5\n", "line 2: more or fewer cells than columns"),
    (TABLES["i2p"].replace("7.5", "high"), "line 2: evaluation_guidance can't be 'high'"),
    (TABLES["i2p"].replace("128,64", "wide,64"), "line 3: sd_image_width can't be 'wide'"),
    (TABLES["i2p"].replace("128,64", "100,64"), "line 3: size is 100 x 64, choose multiples of 64"),
    (TABLES["coco"].encode() + b"2,5,caf\xe9,1\n", "t.csv is neither UTF-8 nor UTF-16"),
])
def test_bad_tables_get_one_line(content, says, refusal, tmp_path):
    assert says in refusal(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, says", [
    (["--num", 0], "choose 1 or more"),
    (["--batch", 0], "choose 1 or more"),
    (["--steps", 1000], "steps is 1000"),
    (["--size", 100], "line 2: size is 100 x 100"),
])
def test_bad_flags_get_one_line(flags, says, refusal, tmp_path):
    assert says in refusal(TABLES["coco"], *flags)
    assert not (tmp_path / "out").exists()


# ---- what other programs read


@pytest.mark.parametrize("prompt, negative", [
    ("a star", ""),
    ('a "star": red, 5', "blue, grey: none"),
    ("two\nlines", "blue"),
    ("a: b, Steps: 3", ""),
])
def test_an_image_is_drawn_again_from_the_text_that_a1111_writes(prompt, negative, sd, draw):
    """The prompt, a line `Negative prompt: ...` if there is one, a last line of settings."""
    quoted = prompt.replace('"', '""')
    flags = ["--negative", negative] if negative else []
    text = f'prompt,evaluation_seed,evaluation_guidance\n"{quoted}",11,3.5\n'
    image, = opened(draw(text, "--size", 64, *flags), "0_0")

    *lines, last = image.text["parameters"].split("\n")
    settings = dict(part.split(": ") for part in last.split(", "))
    assert settings.pop("Sampler") == "DDIM"
    assert settings.pop("RNG") == "CPU"
    found = lines.pop().removeprefix("Negative prompt: ") if negative else ""
    assert found == negative
    assert "\n".join(lines) == prompt

    again, = sample.generate(
        sd,
        "\n".join(lines),
        seed=int(settings["Seed"]),
        steps=int(settings["Steps"]),
        guidance=float(settings["CFG scale"]),
        negative=found,
        size=tuple(map(int, settings["Size"].split("x"))),
    )
    assert again.tobytes() == image.tobytes()


def test_as_a_script_it_says_how_to_run_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(table.__file__, run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: run it as python -m notebooks.tools.table\n"
