"""Grades submitted notebooks: each exercise's function against cases that its check doesn't have.

    python notebooks/grade.py SUBMISSION.ipynb ...     # prints JSON: points, and why

Only imports, functions and classes of a notebook are run, and nothing that it stores or prints
counts. Each function is called in a process of its own, in which the project's functions that would
be the answer raise an error, for 20 seconds at most; its results are compared in this process. A
copy of the project's lines, typed by hand, still counts as right.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import multiprocessing
import sys
import tempfile
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)  # threads don't survive a fork

import notebooks
from notebooks import checks
from sample import UsageError

SEEDS = (3, 4, 5)  # of the hidden cases; the checks use 0
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def definitions(notebook: dict) -> str:
    """Returns a notebook's imports, functions and classes; a cell with an error is left out."""
    nodes = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.suppress(SyntaxError):
                tree = ast.parse("".join(cell["source"]))
                nodes += [node for node in tree.body if isinstance(node, DEFINITIONS)]
    return ast.unparse(ast.Module(nodes, []))


def hide(exercise: checks.Exercise) -> None:
    """Takes away what would be the answer: the project's functions, checks and solutions."""

    def taken(*_, **__):
        raise RuntimeError("this is the project's own function: write yours")

    for name in exercise.forbidden:
        module, _, function = name.rpartition(".")
        setattr(importlib.import_module(module), function, taken)

    for name in ("checks", "solutions"):  # empty modules in their place
        empty = types.ModuleType(name)
        sys.modules[f"notebooks.{name}"] = empty
        setattr(notebooks, name, empty)


def results_of(source: str, exercise: checks.Exercise, name: str) -> list[list]:
    """Returns what a function of a student's source answers to each hidden case, as lists."""
    namespace = {"torch": torch}
    exec(source, namespace)

    cases = []
    for seed in SEEDS:
        results = exercise.ask(namespace[name], seed)
        cases.append([torch.as_tensor(result).tolist() for result in results])
    return cases


def write_results(source: str, name: str, folder: Path) -> None:
    """Leaves a function's results in a folder, or a file that says why there are none.

    Has a process of its own.
    """
    exercise = checks.EXERCISES[name]
    hide(exercise)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cases = results_of(source, exercise, name)
        (folder / "results").write_text(json.dumps(cases))
    except checks.NotYet:
        (folder / "why").write_text(checks.NOT_YET)
    except BaseException as error:  # a student's code can raise anything, SystemExit too
        (folder / "why").write_text(f"wrong: it raises {type(error).__name__}: {error}")


def grade_one(source: str, name: str, seconds: float) -> str:
    """Returns "right", or what is wrong with a student's function."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        why = Path(folder, "why")
        process = multiprocessing.get_context("fork").Process(
            target=write_results, args=(source, name, Path(folder))
        )
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return f"wrong: it takes more than {seconds:g} seconds"
        if not results.exists():
            return why.read_text() if why.exists() else "wrong: it ends its process"
        cases = json.loads(results.read_text())

    for seed, case in zip(SEEDS, cases, strict=True):
        says = checks.EXERCISES[name].verdict(case, seed)
        if says != "right":
            return says
    return "right"


def read_notebook(file: Path) -> tuple[str, str]:
    """Returns a notebook's number and its definitions. Raises UsageError for another file."""
    try:
        notebook = json.loads(file.read_text())
        title = "".join(notebook["cells"][0]["source"])
        number = title[title.index("# ") + 2 :][0]
        return number, definitions(notebook)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} isn't one of the course's notebooks: {error}") from error


def grade(file: Path, seconds: float = 20) -> dict:
    """Returns the points for a notebook's exercises. Raises UsageError for another file."""
    number, source = read_notebook(file)
    exercises = {}
    for name, exercise in checks.EXERCISES.items():
        if exercise.number.startswith(f"{number}."):
            says = checks.NOT_YET
            if f"def {name}(" in source:
                says = grade_one(source, name, seconds)
            exercises[exercise.number] = {"points": int(says == "right"), "says": says}

    return {
        "file": str(file),
        "points": sum(each["points"] for each in exercises.values()),
        "of": len(exercises),
        "exercises": exercises,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Grades submitted notebooks.")
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION")
    args = parser.parse_args()
    try:
        print(json.dumps([grade(file) for file in args.submissions], indent=2))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
