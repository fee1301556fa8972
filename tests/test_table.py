"""notebooks/tools/table.py: the prompt tables of the official evaluation."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from notebooks.methods import safe_latent_diffusion
from notebooks.tools import table

ROOT = Path(__file__).parents[1]
HEAD = "case_number,prompt,evaluation_seed\n"

# the columns of the official files, the rows made up
TABLES = {
    "artists": ",prompt,evaluation_seed,artist,case_number\n"
               "0,\"a star, in red\",11,Somebody,0\n1,a heart,12,Somebody,1\n",
    "imagenette": ",case_number,prompt,evaluation_seed,class\n"
                  "0,0,a star,11,star\n1,1,a heart,12,heart\n",
    "i2p": "prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,"
           "sd_image_height,case_number\n"
           "a star,x,0,11,7.5,64,64,a1\na heart,x,0,12,3.0,128,64,a2\n"
           "a moon,x,1,13,3.0,64,128,a3\n",
    "coco": ",image_id,prompt,evaluation_seed\n0,391895,a star,11\n1,60623,a heart,12\n",
}


@pytest.fixture
def draw(folder, tmp_path, monkeypatch):
    """Runs the command on a table's text, with 2 steps of the small model; returns --out."""
    def run(text, *flags, out="out"):
        (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr("sys.argv", [
            "table.py", str(tmp_path / "t.csv"), "--model", str(folder), "--steps", "2",
            "--out", str(tmp_path / out), *map(str, flags)])
        table.main()
        return tmp_path / out

    return run


def pixels(images):
    """Images, or files of them, as one tensor of integers."""
    images = [Image.open(image) if isinstance(image, Path) else image for image in images]
    return torch.stack([torch.tensor(list(image.tobytes())) for image in images])


def differ(images, others):
    """By more than what the batch's rounding can do."""
    return (pixels(images) - pixels(others)).abs().max() > 1


@pytest.mark.parametrize("name, cases", [
    ("artists", ["0", "1"]), ("imagenette", ["0", "1"]), ("i2p", ["a1", "a2", "a3"]),
    ("coco", ["391895", "60623"])])
def test_official_tables(name, cases, draw, capsys):
    out = draw(TABLES[name], "--num", 2)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(f"{case}_{i}.png" for case in cases for i in range(2))
    assert f"{2 * len(cases)} images drawn, {2 * len(cases)} in all\n" in capsys.readouterr().out


def test_the_flags_count(draw, sd):
    found = draw(TABLES["coco"], "--guidance", 4, "--negative", "a moon", "--size", 128)
    expected = sample.generate(sd, ["a heart"], seed=12, steps=2, guidance=4, size=128,
                               negative="a moon")
    assert not differ([found / "60623_0.png"], expected)


def test_safe_latent_diffusion(draw, sd):
    """Two rows with a batch each: the momentum of one doesn't reach the other."""
    found = draw(TABLES["coco"], "--safe", "a circle", "--sld", "max", "--negative", "a moon",
                 "--batch", 1)
    for prompt, seed, case in (("a star", 11, "391895"), ("a heart", 12, "60623")):
        guided = {sld: safe_latent_diffusion.guided(sd.encode(["a circle"]), sld)
                  for sld in ("max", "medium")}
        images = {sld: sample.generate(sd, [prompt], seed=seed, steps=2, negative="a moon",
                                       guided=guided[sld]) for sld in guided}
        assert not differ([found / f"{case}_0.png"], images["max"])
        assert differ([found / f"{case}_0.png"], images["medium"])


def test_erased_weights(draw, sd, tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: -2 * sd.unet.state_dict()[name]}, tmp_path / "erased.safetensors")
    found = draw(TABLES["coco"], "--erased", tmp_path / "erased.safetensors")
    erased = sample.load_erased(sd, tmp_path / "erased.safetensors")
    images = [sample.generate(model, ["a heart"], seed=12, steps=2) for model in (erased, sd)]
    assert not differ([found / "60623_0.png"], images[0])
    assert differ([found / "60623_0.png"], images[1])


def test_an_image_says_how_it_was_made(draw, folder):
    out = draw(TABLES["i2p"], "--num", 2, "--negative", "a moon", "--safe", "a circle")
    settings = json.loads(Image.open(out / "a2_1.png").text["settings"])
    expected = {"case": "a2", "prompt": "a heart", "seed": 12, "image": 1, "guidance": 3.0,
                "size": [128, 64], "steps": 2, "negative": "a moon", "safe": "a circle",
                "sld": "medium", "erased": None, "model": str(folder)}
    assert settings | expected == settings
    own_size = Image.open(draw(TABLES["coco"], out="coco") / "60623_0.png")
    assert json.loads(own_size.text["settings"])["size"] == [64, 64]


def test_a_row_is_what_generate_gives(draw, sd):
    """Guidance and size are the row's own, a row's images share one generator."""
    out = draw(TABLES["i2p"], "--num", 2)
    found = [out / f"a2_{i}.png" for i in range(2)]
    assert Image.open(found[0]).size == (128, 64)
    assert not differ(found, sample.generate(sd, ["a heart"], 2, 12, 2, 3.0, (128, 64)))
    assert differ(found, sample.generate(sd, ["a heart"], 2, 12, 2, 7.5, (128, 64)))


def test_rows_of_one_batch_keep_their_seeds(draw, sd):
    out = draw(TABLES["coco"], "--num", 2)
    for prompt, seed, case in (("a star", 11, "391895"), ("a heart", 12, "60623")):
        expected = sample.generate(sd, [prompt], 2, seed, steps=2)
        assert not differ([out / f"{case}_{i}.png" for i in range(2)], expected)


def test_a_row_depends_on_nothing_but_itself(draw):
    one = draw(TABLES["i2p"], "--batch", 1, out="one")
    many = draw(TABLES["i2p"], "--batch", 8, out="many")
    for name in ("a1_0.png", "a2_0.png", "a3_0.png"):
        assert not differ([one / name], [many / name])


def test_rows_of_equal_guidance_and_size_share_a_batch(draw, monkeypatch):
    calls, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda sd, prompts, *how, **more: (
        calls.append(prompts) or generate(sd, prompts, *how, **more)))
    text = HEAD.replace("\n", ",evaluation_guidance\n") + "".join(
        f"{i},prompt {i},{i},{7 + i % 2}\n" for i in range(6))
    draw(text, "--num", 2, "--batch", 5, "--steps", 1)
    assert calls == [[f"prompt {i}" for i in part] for part in ((0, 2), (4,), (1, 3), (5,))]


def test_existing_images_are_skipped(draw, capsys):
    out = draw(TABLES["coco"])
    first = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "60623_0.png").unlink()
    draw(TABLES["coco"])
    assert "1 images drawn, 2 in all\n" in capsys.readouterr().out
    again = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert again.keys() == first.keys()
    assert [path.name for path in again if again[path] != first[path]] == ["60623_0.png"]
    draw(TABLES["coco"], "--num", 2)
    assert len([*out.iterdir()]) == 4 and "4 images drawn, 4 in all" in capsys.readouterr().out


def test_processes_share_the_rows(folder, tmp_path):
    """Three rows, two processes: no row twice, none left out."""
    (tmp_path / "t.csv").write_text(TABLES["i2p"])
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
         "notebooks.tools.table", tmp_path / "t.csv", "--model", folder, "--steps", "1", "--out",
         tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "2 images drawn, 2 in all, process 0\n" in run.stdout
    assert "1 images drawn, 1 in all, process 1\n" in run.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a1_0.png", "a2_0.png", "a3_0.png"}


def test_thirty_thousand_rows_are_read_in_a_second(tmp_path):
    lines = "".join(f"{i},a picture of number {i},{i}\n" for i in range(30_000))
    (tmp_path / "t.csv").write_text(HEAD + lines)
    began = time.process_time()
    rows = table.read_table(tmp_path / "t.csv")
    assert len(rows) == 30_000
    assert rows[-1] == ("29999", "a picture of number 29999", 29999, 7.5, None)
    assert time.process_time() - began < 1


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbfcase_number,prompt,evaluation_seed,evaluation_guidance\r\n'
        b'7,"two\r\nlines",3,\r\n8,,4,5\r\n')
    assert table.read_table(tmp_path / "t.csv", 4.0, 64) == [
        ("7", "two\r\nlines", 3, 4.0, 64), ("8", "", 4, 5.0, 64)]


def test_images_of_another_run_are_not_taken_for_this_ones(draw, capsys):
    draw(HEAD + "1,a star,5\n")
    capsys.readouterr()
    for content, flags, says in (
            (HEAD + "1,a heart,5\n", [], "prompt = 'a star', not 'a heart'"),
            (HEAD + "1,a star,6\n", [], "seed = 5, not 6"),
            (HEAD + "1,a star,5\n", ["--negative", "blue"], "negative = '', not 'blue'")):
        fails_in_one_line(says, draw, capsys, content, *flags)
    draw(HEAD + "1,a star,5\n2,a heart,6\n")
    assert "1 images drawn, 2 in all" in capsys.readouterr().out


def test_a_rank_without_a_world_is_refused(draw, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fails_in_one_line("RANK is 1 of WORLD_SIZE 1", draw, capsys, TABLES["coco"])


@pytest.mark.parametrize("content, cases", [
    ("case_num,prompt,evaluation_seed\n7,a star,4068.0\n", ["7"]),
    ("image_id,case_number,prompt,evaluation_seed\n1,7,a star,4068\n", ["7"]),
    ("prompt,evaluation_seed\na star,4068\na heart,4068.00\n", ["0", "1"]),
    ("case_number;prompt;evaluation_seed\n7;a star, red;4068\n", ["7"]),
    ("case_number,prompt,evaluation_seed\n7,a star; red,4068\n", ["7"]),
    ("case_number,prompt,evaluation_seed\n7,ein Stern \u2605,4068\n".encode("utf-16"), ["7"]),
    ("case_number,prompt,evaluation_seed,sd_image_width,sd_image_height\n7,a,4068,64.0,128.0\n",
     ["7"]),
])
def test_tables_as_people_have_them(content, cases, tmp_path):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.csv").write_bytes(data)
    rows = table.read_table(tmp_path / "t.csv")
    assert [row.case for row in rows] == cases and {row.seed for row in rows} == {4068}
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
    (TABLES["i2p"].replace("128,64", "100,64"),
     "line 3: size is 100 x 64, choose multiples of 64"),
    (TABLES["coco"].encode() + b"2,5,caf\xe9,1\n", "t.csv is neither UTF-8 nor UTF-16"),
])
def test_bad_tables_get_one_line(content, says, draw, tmp_path, capsys):
    fails_in_one_line(says, draw, capsys, content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt, negative", [
    ("a star", ""), ('a "star": red, 5', "blue, grey: none"), ("two\nlines", "blue"),
    ("a: b, Steps: 3", "")])
def test_an_image_is_drawn_again_from_the_text_that_a1111_writes(prompt, negative, sd, draw):
    """The prompt, a line `Negative prompt: ...` if there is one, a last line of settings."""
    quoted = prompt.replace('"', '""')
    out = draw(f'prompt,evaluation_seed,evaluation_guidance\n"{quoted}",11,3.5\n', "--size", 64,
               *(["--negative", negative] if negative else []))
    with Image.open(out / "0_0.png") as image:
        *lines, last = image.text["parameters"].split("\n")
        drawn = image.tobytes()
    settings = dict(part.split(": ") for part in last.split(", "))
    assert settings.pop("Sampler") == "DDIM" and settings.pop("RNG") == "CPU"
    found = lines.pop().removeprefix("Negative prompt: ") if negative else ""
    assert ("\n".join(lines), found) == (prompt, negative)
    again, = sample.generate(
        sd, "\n".join(lines), seed=int(settings["Seed"]), steps=int(settings["Steps"]),
        guidance=float(settings["CFG scale"]), negative=found,
        size=tuple(map(int, settings["Size"].split("x"))))
    assert again.tobytes() == drawn


def test_what_is_not_finite_is_no_picture(folder, draw, tmp_path, capsys):
    """The rows before it are there, the row itself isn't, so that a second run draws it."""
    prompts, generate = [], sample.generate

    def breaks_down(sd, prompt, *args, **kwargs):
        prompts.append(prompt)
        if len(prompts) == 2:
            with torch.no_grad():
                sd.vae.decoder.conv_out.bias[0] = torch.nan
        return generate(sd, prompt, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", breaks_down)
        with pytest.raises(SystemExit):
            draw(TABLES["coco"], "--batch", 1)
    assert "the batch from 'a heart' on has non-finite pixels" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["391895_0.png"]
    assert len([*draw(TABLES["coco"]).iterdir()]) == 2


@pytest.mark.parametrize("flag", ["--num", "--batch"])
def test_no_images_are_no_table(flag, draw, capsys):
    fails_in_one_line("choose 1 or more", draw, capsys, TABLES["coco"], flag, 0)


def fails_in_one_line(says, draw, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        draw(*arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_wide_images(sd):
    assert sample.generate(sd, "a star", steps=1, size=(192, 64))[0].size == (192, 64)
    assert sample.starting_noise(sd, 2, 0, (192, 64)).shape == (2, 4, 8, 24)
    square = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample.starting_noise(sd, 1, 5, 64), square)
