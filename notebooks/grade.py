"""Grades submitted notebooks: each exercise's function against cases that its check doesn't have.

    python notebooks/grade.py SUBMISSION.ipynb ...     # prints JSON: points, and why

Only imports, functions and classes of a notebook are run, and nothing that it stores or prints
counts. Each function is asked in a process of its own, in which the project's functions that would
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

SEEDS = (3, 4, 5)  # of the hidden cases; the checks use 0


def definitions(notebook: dict) -> str:
    """Returns a notebook's imports, functions and classes; a cell with an error is left out."""
    kept = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.suppress(SyntaxError):
                kept += [node for node in ast.parse("".join(cell["source"])).body if isinstance(
                    node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))]
    return ast.unparse(ast.Module(kept, []))


def hide(exercise: checks.Exercise) -> None:
    """Takes away what would be the answer: the project's functions, checks and solutions."""
    def taken(*_, **__):
        raise RuntimeError("this is the project's own function: write yours")

    for name in exercise.tabu:
        module, function = name.split(".")
        place = "notebooks.methods." if module == "safe_latent_diffusion" else ""
        place = "notebooks.toy." if module == "tables" else place
        setattr(importlib.import_module(place + module), function, taken)
    for name in ("checks", "solutions"):  # empty modules in their place
        empty = types.ModuleType(name)
        sys.modules[f"notebooks.{name}"] = empty
        setattr(notebooks, name, empty)


def answers(source: str, name: str, folder: str) -> None:
    """Runs a function on the hidden cases; leaves its results in a folder, or why there are none.

    Has a process of its own.
    """
    exercise = checks.EXERCISES[name]
    hide(exercise)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            space = {"torch": torch}
            exec(source, space)
            found = [[torch.as_tensor(result).tolist() for result in
                      exercise.ask(space[name], seed)] for seed in SEEDS]
        Path(folder, "found").write_text(json.dumps(found))
    except checks.NotYet:
        Path(folder, "why").write_text(checks.NOT_YET)
    except BaseException as error:  # a student's code can raise anything, SystemExit too
        Path(folder, "why").write_text(f"wrong: it raises {type(error).__name__}: {error}")


def grade_one(source: str, name: str, seconds: float) -> str:
    """Returns "right", or what is wrong with a student's function."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(
            target=answers, args=(source, name, folder))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return f"wrong: it takes more than {seconds:g} seconds"
        found, why = Path(folder, "found"), Path(folder, "why")
        if not found.exists():
            return why.read_text() if why.exists() else "wrong: it ends its process"
        for seed, results in zip(SEEDS, json.loads(found.read_text()), strict=True):
            says = checks.EXERCISES[name].verdict(results, seed)
            if says != "right":
                return says
        return says


def grade(file: Path, seconds: float = 20) -> dict:
    """Returns the points for a notebook's exercises. Raises ValueError for another file."""
    try:
        notebook = json.loads(file.read_text())
        title = "".join(notebook["cells"][0]["source"])
        number = title[title.index("# ") + 2:][0]
        source = definitions(notebook)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} isn't one of the course's notebooks: {error}") from error
    exercises = {}
    for name, exercise in checks.EXERCISES.items():
        if exercise.number.startswith(f"{number}."):
            says = grade_one(source, name, seconds) if f"def {name}(" in source else checks.NOT_YET
            exercises[exercise.number] = {"points": int(says == "right"), "says": says}
    return {"file": str(file), "points": sum(e["points"] for e in exercises.values()),
            "of": len(exercises), "exercises": exercises}


def main() -> None:
    parser = argparse.ArgumentParser(description="Grades submitted notebooks.")
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION")
    try:
        print(json.dumps([grade(file) for file in parser.parse_args().submissions], indent=2))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
