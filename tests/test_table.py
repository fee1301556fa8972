"""sample.py --prompts: the prompt tables of the official evaluation."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from test_sample import fails_in_one_line, pixels, run_main

ROOT = Path(__file__).parents[1]

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
def table(tmp_path):
    """name -> a file of that table."""
    def write(name):
        file = tmp_path / f"{name}.csv"
        file.write_text(TABLES[name])
        return file

    return write


def draw(monkeypatch, folder, file, out, *more):
    run_main(monkeypatch, "--prompts", file, "--model", folder, "--steps", 2, "--out", out, *more)


@pytest.mark.parametrize("name, cases", [
    ("artists", ["0", "1"]), ("imagenette", ["0", "1"]), ("i2p", ["a1", "a2", "a3"]),
    ("coco", ["391895", "60623"])])
def test_official_tables(name, cases, table, folder, tmp_path, monkeypatch, capsys):
    draw(monkeypatch, folder, table(name), tmp_path / "out", "--num", 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(f"{case}_{i}.png" for case in cases for i in range(2))
    assert f"{2 * len(cases)} pictures made, {2 * len(cases)} in all" in capsys.readouterr().out


def test_a_table_is_drawn_with_the_flags(table, sd, folder, tmp_path, monkeypatch):
    draw(monkeypatch, folder, table("coco"), tmp_path / "out", "--guidance", 4, "--negative",
         "a moon", "--safe", "a circle", "--sld", "max")
    expected = sample.generate(sd, ["a heart"], seed=12, steps=2, guidance=4, negative="a moon",
                               safe="a circle", sld="max")
    made = Image.open(tmp_path / "out" / "60623_0.png")
    assert (pixels([made]) - pixels(expected)).abs().max() <= 1


def test_a_row_is_what_generate_gives(table, sd, folder, tmp_path, monkeypatch):
    """Guidance and size are the row's own, the pictures of a row share one generator."""
    draw(monkeypatch, folder, table("i2p"), tmp_path / "out", "--num", 2)
    expected = sample.generate(sd, ["a heart"], 2, 12, 2, 3.0, (128, 64))
    found = [Image.open(tmp_path / "out" / f"a2_{i}.png") for i in range(2)]
    assert found[0].size == (128, 64) and found[0].text["prompt"] == "a heart"
    assert (pixels(expected) - pixels(found)).abs().max() <= 1
    other = sample.generate(sd, ["a heart"], 2, 12, 2, 7.5, (128, 64))
    assert (pixels(other) - pixels(found)).abs().max() > 1


def test_rows_of_one_batch_keep_their_seeds(table, sd, folder, tmp_path, monkeypatch):
    draw(monkeypatch, folder, table("coco"), tmp_path / "out")
    for prompt, seed, case in (("a star", 11, "391895"), ("a heart", 12, "60623")):
        found = pixels([Image.open(tmp_path / "out" / f"{case}_0.png")])
        assert (pixels(sample.generate(sd, [prompt], seed=seed, steps=2)) - found).abs().max() <= 1


def test_a_row_depends_on_nothing_but_itself(table, folder, tmp_path, monkeypatch):
    for out, batch in (("one", 1), ("many", 8)):
        draw(monkeypatch, folder, table("i2p"), tmp_path / out, "--batch", batch)
    for name in ("a1_0.png", "a2_0.png", "a3_0.png"):
        one, many = (pixels([Image.open(tmp_path / out / name)]) for out in ("one", "many"))
        assert (one - many).abs().max() <= 1


def test_what_is_there_is_not_drawn_again(table, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    draw(monkeypatch, folder, table("coco"), out)
    first = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "60623_0.png").unlink()
    draw(monkeypatch, folder, table("coco"), out)
    assert "1 pictures made, 2 in all" in capsys.readouterr().out
    again = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert again.keys() == first.keys()
    assert [path.name for path in again if again[path] != first[path]] == ["60623_0.png"]


def test_processes_share_the_rows(folder, tmp_path):
    """Three rows, two processes: no row twice, none left out."""
    (tmp_path / "t.csv").write_text(TABLES["i2p"])
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "sample.py",
         "--prompts", tmp_path / "t.csv", "--model", folder, "--steps", "1", "--out",
         tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "2 pictures made, 2 in all of process 0" in run.stdout
    assert "1 pictures made, 1 in all of process 1" in run.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a1_0.png", "a2_0.png", "a3_0.png"}


def test_thirty_thousand_rows_are_read_in_a_second(tmp_path):
    lines = [f"{i},a picture of number {i},{i}" for i in range(30_000)]
    (tmp_path / "t.csv").write_text("\n".join(["case_number,prompt,evaluation_seed", *lines]))
    began = time.perf_counter()
    rows = sample.read_prompts(tmp_path / "t.csv", 7.5, None)
    assert len(rows) == 30_000 and rows[-1].prompt == "a picture of number 29999"
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("content, says", [
    ("prompt,evaluation_seed\na star,1\n", "has no column 'image_id'"),
    ("case_number,prompt\n1,a star\n", "has no column 'evaluation_seed'"),
    ("case_number,prompt,evaluation_seed\n1,a star,x\n", "after 0 rows: invalid literal"),
    ("case_number,prompt,evaluation_seed\n1,a,1\n1,b,2\n", "after 1 rows: case '1' is there twice"),
    ("case_number,prompt,evaluation_seed\n../x,a,1\n", "case '../x'"),
    ("case_number,prompt,evaluation_seed\n1\n", "after 0 rows"),
])
def test_wrong_tables_get_one_line(content, says, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.csv").write_text(content)
    line = fails_in_one_line(monkeypatch, capsys, "--prompts", tmp_path / "t.csv", "--model",
                             folder, "--out", tmp_path / "out")
    assert says in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--num", "--batch"])
def test_no_pictures_are_no_table(option, table, folder, tmp_path, monkeypatch, capsys):
    line = fails_in_one_line(monkeypatch, capsys, "--prompts", table("coco"), "--model", folder,
                             "--out", tmp_path / "out", option, 0)
    assert "choose 1 or more" in line


def test_prompts_or_a_table_not_both_not_none(table, folder, monkeypatch, capsys):
    for arguments in ([], ["a star", "--prompts", table("coco")]):
        assert "give prompts, or a table" in fails_in_one_line(
            monkeypatch, capsys, *arguments, "--model", folder)


def test_wide_pictures(sd):
    assert sample.generate(sd, "a star", steps=1, size=(192, 64))[0].size == (192, 64)
    assert sample.starting_noise(sd, 2, 0, (192, 64)).shape == (2, 4, 8, 24)
    square = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample.starting_noise(sd, 1, 5, 64), square)
