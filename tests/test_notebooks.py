"""The committed notebooks: outputs match the code, every figure is there, and links work."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from notebooks import checks

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.ipynb"))


def code_cells(file: Path) -> list[dict]:
    notebook = json.loads(file.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_five():
    assert [file.name[0] for file in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_match_the_code(file):
    """If it fails, run `python notebooks/execute.py NUMBER --write`."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(file))
    code = "\n".join(line for line in code.splitlines() if "git clone" not in line)
    made_by = json.loads(file.read_text())["metadata"]["code"]
    assert hashlib.sha256(code.encode()).hexdigest() == made_by
    assert all(cell["execution_count"] for cell in code_cells(file))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_error_is_stored_and_every_figure_is(file):
    for cell in code_cells(file):
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        if "".join(cell["source"]).startswith("# Figure"):
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_model_is_chosen_in_one_line(file):
    code = "\n".join("".join(cell["source"]) for cell in code_cells(file))
    assert len(re.findall(r"^(?:MODEL|RESULTS) = ", code, re.MULTILINE)) == 1


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_code_lines_fit_on_a_page(file):
    lines = "\n".join("".join(cell["source"]) for cell in code_cells(file)).splitlines()
    assert [line for line in lines if len(line) > 110] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_there_are_three_exercises_with_their_checks(file):
    text = "".join("".join(cell["source"]) for cell in json.loads(file.read_text())["cells"])
    number = file.name[0]
    found = re.findall(r"\*\*(\d\.\d), ", text)
    assert len(found) >= 3 and found == [f"{number}.{i + 1}" for i in range(len(found))]
    checked = [name for name in checks.EXERCISES if f"(my_" in text and f"({name})" in text]
    assert checked and all(checks.EXERCISES[name].number[0] == number for name in checked)


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md", "notebooks/toy/README.md"])
def test_links_to_files_work(page):
    file = FOLDER.parent / page
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', file.read_text())
    local = [path for path in map("".join, links) if not path.startswith("http")]
    assert all((file.parent / path).exists() for path in local), local


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_opened_alone_says_what_to_do(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="clone the whole project"):
        exec("".join(code_cells(file)[0]["source"]), {})


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_on_colab_the_project_is_fetched_once(file, tmp_path, monkeypatch):
    """Where /content is Colab's folder; the second run finds the project there."""
    fetched = []

    def run(command, **how):
        fetched.append(command)
        shutil.copytree(FOLDER.parent, tmp_path / "minESD", ignore=shutil.ignore_patterns(
            ".*", "runs", "tests", "*.ipynb", "*.png"))

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    first = "".join(code_cells(file)[0]["source"]).replace("/content", str(tmp_path))
    first = first[:first.index("import matplotlib") if "import matplotlib" in first
                  else first.index("import torch")]
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        exec(first, {})
        assert Path.cwd() == tmp_path / "minESD"
    assert len(fetched) == 1 and fetched[0].startswith("git clone https://github.com/")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_exercises_are_marked_for_nbgrader(file):
    """A cell for the function, one whose value is the point; their outputs give nothing away."""
    cells = code_cells(file)
    for cell, check in zip(cells, cells[1:]):
        if "says = checks." in "".join(check["source"]):
            marks, checks_marks = cell["metadata"]["nbgrader"], check["metadata"]["nbgrader"]
            assert marks["solution"] and not marks["grade"]
            assert checks_marks["grade"] and checks_marks["locked"] and checks_marks["points"] == 1
            assert f"def {marks['grade_id']}(" in "".join(cell["source"])
            assert f"({marks['grade_id']})" in "".join(check["source"])
            assert not cell["outputs"] and not check["outputs"]
