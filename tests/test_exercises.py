"""The checks and the grader: solutions are right; stubs, likely mistakes and cheats aren't."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

from notebooks import checks, grade

pytestmark = pytest.mark.robustness

NOTEBOOKS = Path(grade.__file__).parent
NUMBERS = {name: exercise.number for name, exercise in checks.EXERCISES.items()}


def module_of(name):
    return importlib.import_module(f"notebooks.solutions.solution_{NUMBERS[name][0]}")


@pytest.mark.parametrize("name", NUMBERS)
def test_the_solution_is_right(name):
    solution = getattr(module_of(name), name)
    assert [checks.EXERCISES[name](solution, seed) for seed in range(4)] == ["right"] * 4


@pytest.mark.parametrize("name", NUMBERS)
def test_the_stub_is_not(name):
    for stub in (lambda *_: ..., lambda *_: None):
        assert checks.EXERCISES[name](stub) == checks.NOT_YET


@pytest.mark.parametrize("name, what", [(name, what) for name in NUMBERS
                                        for what in checks.EXERCISES[name].mistakes])
def test_a_likely_mistake_is_named(name, what):
    for seed in (0, 3):
        assert checks.EXERCISES[name](checks.EXERCISES[name].mistakes[what], seed) == \
            f"wrong: {what}"


@pytest.mark.parametrize("name, answer, says", [
    ("my_denoise", lambda predict, x_t, steps: x_t, "the times or the values differ"),
    ("my_denoise", checks.sampler(first=0, root=False), "the times of Stable Diffusion's ten"),
    ("my_add_noise", lambda x, n, a: 1 / 0, "it raises ZeroDivisionError: division by zero"),
    ("my_add_noise", lambda x, n, a: x[0], "its results have the shapes [[4, 3, 3]] instead of"),
    ("my_interval", lambda hits, images: hits / images, "it raises TypeError: cannot unpack"),
    ("my_interval", lambda hits, images: (0, hits / images), "for 0 of 50 Wilson's interval is"),
    ("my_mcnemar", lambda one, other: 0.5, "p = min(1, 2 sum C(n, i) / 2^n)"),
    ("my_selective_loss", lambda *_: 0.5, "it raises AttributeError"),
])
def test_another_mistake_gets_one_line_too(name, answer, says):
    said = checks.EXERCISES[name](answer)
    assert said.startswith(f"wrong: {says}") and "\n" not in said


# ---- the grader ----

def submission(folder, number, *cells):
    """A notebook of the course whose code cells are the student's."""
    first = {"cell_type": "markdown", "source": [f"# {number}. A title\n", "\n", "Text"]}
    code = [{"cell_type": "code", "source": cell, "outputs": [{"text": "right"}]} for cell in cells]
    (folder / "mine.ipynb").write_text(json.dumps({"cells": [first, *code]}))
    return folder / "mine.ipynb"


def solved(name):
    """The source of a solution's function, with its module's imports."""
    module = module_of(name)
    imports = [line for line in inspect.getsource(module).splitlines() if line.startswith("import")]
    return "\n".join([*imports, inspect.getsource(getattr(module, name))])


def marks(file, seconds=20):
    return {number: (e["points"], e["says"])
            for number, e in grade.grade(file, seconds)["exercises"].items()}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_solution_gets_its_point(name, tmp_path):
    """Also with a first cell like the notebooks', a helper and a cell that isn't Python."""
    number = NUMBERS[name]
    first = "import ddim\nfrom notebooks import checks\nassert False, 'statements are not run'"
    file = submission(tmp_path, number[0], first, solved(name), "%pip install x",
                      f"print(checks.{name}({name}))")
    assert marks(file)[number] == (1, "right")


@pytest.mark.parametrize("number", "12345")
def test_a_solved_notebook_gets_all_points(number, tmp_path):
    pytest.importorskip("IPython")  # the notebooks' cells import it
    file, = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = json.loads(file.read_text())
    for cell in notebook["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if name in NUMBERS:
            cell["source"] = solved(name)
    (tmp_path / "mine.ipynb").write_text(json.dumps(notebook))

    graded = grade.grade(tmp_path / "mine.ipynb")
    assert graded["points"] == graded["of"] > 0, graded


ADD = "def my_add_noise(x_0, noise, abar_t):\n    "
CHEATS = {  # of exercise 5.2: cells, and what is said
    "prints right": ([ADD + "print('right')\n    return x_0"], "eq. 4"),
    "only prints": (["print('right')"], checks.NOT_YET),
    "a check of its own": (["from notebooks import checks\nchecks.add_noise = lambda f: 'right'",
                            ADD + "return x_0"], "eq. 4"),
    "the project's function": (["import ddim", ADD + "return ddim.add_noise(x_0, noise, abar_t)"],
                               "this is the project's own function"),
    "the project's function by name": (
        ["from ddim import add_noise", ADD + "return add_noise(x_0, noise, abar_t)"],
        "this is the project's own function"),
    "the project's function or nothing": (
        ["import ddim", ADD + "try:\n        return ddim.add_noise(x_0, noise, abar_t)\n"
         "    except Exception:\n        return x_0"], "eq. 4"),
    "the check's answer": (["from notebooks import checks",
                            ADD + "return checks.add_noise.own(x_0, noise, abar_t)"],
                           "it raises AttributeError"),
    "the solution": (["from notebooks.solutions import solution_5",
                      ADD + "return solution_5.my_add_noise(x_0, noise, abar_t)"],
                     "it raises ImportError"),
    "equal to everything": (["import torch\nclass Same(torch.Tensor):\n"
                             "    def __eq__(self, other):\n        return True",
                             ADD + "return x_0.as_subclass(Same)"], "eq. 4"),
    "a patched comparison": (["import torch", ADD + "torch.allclose = lambda *a, **k: True\n"
                              "    return x_0"], "eq. 4"),
    "an endless loop": ([ADD + "while True:\n        pass"], "it takes more than 1 seconds"),
    "an endless loop that can't be interrupted": (
        [ADD + "while True:\n        try:\n            while True: pass\n"
         "        except BaseException:\n            pass"], "it takes more than 1 seconds"),
    "an exit": ([ADD + "raise SystemExit(0)"], "it raises SystemExit: 0"),
    "a hard exit": (["import os", ADD + "os._exit(0)"], "it ends its process"),
    "another shape": (["import torch", ADD + "return torch.tensor(0.0)"],
                                   "its results have the shapes"),
    "not a number": ([ADD + "return x_0 * float('nan')"], "eq. 4"),
    "a string": ([ADD + "return 'right'"], "it raises"),
    "a stub": ([ADD + "return ..."], checks.NOT_YET),
    "an error in another function": (["def broken(:", ADD + "return x_0"], "eq. 4"),
    "an error in the cell": ([ADD + "return x_0 +"], checks.NOT_YET),
    "a helper that is missing": ([ADD + "return helper(x_0)"], "it raises NameError"),
    "half right": ([ADD + "return abar_t * x_0 + (1 - abar_t) * noise"],
                   "abar is a share of the variance"),
    "the exercise's own comparison": (
        ["import sys", ADD + "frame = sys._getframe(2).f_globals\n"
         "    frame['alike'] = lambda *_: True\n    return x_0"], "eq. 4"),
    "right for one abar": ([ADD + "return 0.6 * x_0 + 0.8 * noise"], "eq. 4"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_gets_none(cheat, tmp_path):
    cells, says = CHEATS[cheat]
    (points, said), = marks(submission(tmp_path, 5, *cells), seconds=1).values()
    assert points == 0 and says in said, said


def test_an_exercise_that_is_left_out_counts(tmp_path):
    graded = grade.grade(submission(tmp_path, 2, solved("my_method")))
    assert (graded["points"], graded["of"]) == (1, 2)
    assert graded["exercises"]["2.2"]["says"] == checks.NOT_YET


def test_the_command_prints_json_and_refuses_other_files(tmp_path, monkeypatch, capsys):
    file = submission(tmp_path, 5, solved("my_add_noise"))
    monkeypatch.setattr("sys.argv", ["grade.py", str(file)])
    grade.main()
    assert json.loads(capsys.readouterr().out)[0]["points"] == 1
    (tmp_path / "other.ipynb").write_text("[]")
    monkeypatch.setattr("sys.argv", ["grade.py", str(tmp_path / "other.ipynb")])
    with pytest.raises(SystemExit) as stopped:
        grade.main()
    assert stopped.value.code == 2
    assert "other.ipynb isn't one of the course's notebooks" in capsys.readouterr().err
