"""Grades submitted notebooks: each exercise's function, on cases that its check doesn't have.

    python -m notebooks.course.grade SUBMISSION.ipynb ...           # JSON: points, and why
    python -m notebooks.course.grade SUBMISSION.ipynb ... --csv     # a row for each notebook
    python -m notebooks.course.grade SUBMISSION.ipynb --gradescope  # Gradescope's results.json

Nothing that a notebook stores or prints counts. Each function runs in a fresh interpreter, in a
copy of the project without solutions, checks and the functions that would be the answer, for 20
seconds at most; its results are compared here. A copy of the project's lines, typed by hand, still
counts as right. A submission can do what the user who runs this can do: notebooks/course/README.md
has a container.
"""

import argparse
import ast
import contextlib
import csv
import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from notebooks.course import cases, checks, submission
from sample import UsageError

ROOT = Path(__file__).parents[2]
SEEDS = (3, 4, 5)  # of the hidden cases; the checks use 0
UNREADABLE = "wrong: its results can't be read"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
TAKEN = f'''def {{name}}(*_, **__):
    raise RuntimeError("{checks.NOT_ALLOWED}")
'''


# ---- a copy of the project, without answers


def take_away(folder: Path, forbidden: str) -> None:
    """Replaces a function in a copy of the project by one that raises."""
    *path, name = forbidden.split(".")
    file = folder.joinpath(*path).with_suffix(".py")
    source = file.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            function = ast.get_source_segment(source, node)
            file.write_text(source.replace(function, TAKEN.format(name=name)))


@functools.cache
def project_files() -> dict[str, bytes]:
    """Returns what a submission may use, by path: no solutions, no checks.

    It is read once: a submission that deletes the project takes nothing from the others.
    """
    course = ROOT / "notebooks" / "course"
    files = [*ROOT.glob("*.py"), course / "cases.py", course / "answer.py"]
    for file in sorted((ROOT / "notebooks").rglob("*")):
        parts = file.relative_to(ROOT).parts
        left_out = {"course", "results", "__pycache__"}.intersection(parts)
        is_hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not left_out and not is_hidden:
            if file.suffix not in (".ipynb", ".png"):
                files.append(file)
    return {str(file.relative_to(ROOT)): file.read_bytes() for file in files}


def copy_project(folder: Path, forbidden: tuple[str, ...]) -> None:
    """Writes what a submission may use, without the functions that are the answer."""
    for name, content in project_files().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for function in forbidden:
        take_away(folder, function)


# ---- a process of its own


@functools.cache
def other_user() -> dict:
    """Returns Popen's settings for a user without rights, if root runs this; {} otherwise."""
    if os.geteuid() != 0:
        return {}
    with contextlib.suppress(OSError):
        command = [sys.executable, "-c", "import torch"]
        if subprocess.run(command, cwd="/", capture_output=True, **NOBODY).returncode == 0:
            return NOBODY

    print(
        "submissions run as root, since nobody else can run this Python: they can delete "
        "anything; use a container", file=sys.stderr,
    )
    return {}


def children() -> set[int]:
    """Returns this process's children, on Linux."""
    found = set()
    for file in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, file.read_text().split()))
    return found


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, on Linux."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill_all_but(kept: set[int]) -> None:
    """Ends all children but some; what these leave behind becomes a child, and ends, too."""
    while new := children() - kept:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def ask(folder: Path, question: dict, seconds: int) -> dict:
    """Returns the answer of a process that runs in a folder: {"results": ...} or {"why": ...}."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # it could lead to the solutions
    adopt_orphans()
    user = other_user()
    others = children()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "notebooks.course.answer", str(out.fileno())],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[out.fileno()],
            start_new_session=True,
            **user,
        )
        try:
            process.communicate(json.dumps(question).encode(), timeout=60 + seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            kill_all_but(others)  # also in a session of its own

        if process.returncode == -signal.SIGXCPU:
            return {"why": f"wrong: it takes more than {seconds} seconds"}
        if process.returncode == -signal.SIGKILL:
            return {"why": f"wrong: it takes more than {seconds} seconds, or too much memory"}
        out.seek(0)
        written = out.read(2**26)
    if not written:
        return {"why": "wrong: it ends its process"}
    try:
        return dict(json.loads(written))
    except (ValueError, TypeError, RecursionError):  # the submission has written something else
        return {"why": UNREADABLE}


# ---- points


def verdict(exercise: checks.Exercise, results: list) -> str:
    """Returns "right", or what is wrong with results, lists for each of the hidden cases."""
    try:
        for seed, case in zip(SEEDS, results, strict=True):
            tensors = [torch.tensor(result, dtype=torch.float64) for result in case]
            says = exercise.verdict(tensors, seed)
            if says != "right":
                return says
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return UNREADABLE
    return "right"


def grade_one(cells: list[str], name: str, seconds: int) -> str:
    """Returns "right", or what is wrong with a student's function."""
    exercise = checks.EXERCISES[name]
    try:
        statements = submission.statements_for(cells, name)
    except SyntaxError as error:
        line = (error.text or "").strip()
        return f"wrong: line {error.lineno} of its cell isn't Python: {line} ({error.msg})"
    except (ValueError, RecursionError, MemoryError) as error:  # half an emoji, endless sums
        return f"wrong: its cell can't be read: {error}"
    if not statements:
        return cases.NOT_YET

    question = {
        "ask": exercise.ask.__name__,
        "name": name,
        "statements": statements,
        "seeds": SEEDS,
        "seconds": seconds,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        copy_project(folder, exercise.forbidden)
        if other_user():
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY["user"], NOBODY["group"])
        answer = ask(folder, question, seconds)

    if "results" in answer:
        return verdict(exercise, answer["results"])
    why = str(answer.get("why"))
    return why if why.startswith(("wrong:", cases.NOT_YET)) else UNREADABLE


def chapter_of(number: str, cells: list[str]) -> str:
    """Returns a notebook's number: its heading's, if it has a function of that one.

    Else that of which it has the most functions.
    """
    found = []
    for name, exercise in checks.EXERCISES.items():
        found += [exercise.number[0]] * any(re.search(rf"\b{name}\b", cell) for cell in cells)
    return number if number in found else max(found, key=found.count, default=number)


def read(file: Path) -> submission.Submission | UsageError:
    """Returns a notebook's code, or what is wrong with the file."""
    try:
        return submission.read(file)
    except UsageError as error:
        return error


def grade(
    file: Path, seconds: int = 20, content: submission.Submission | UsageError | None = None
) -> dict:
    """Returns the points for a notebook's exercises; for another file, none and an error.

    content: what `read` has returned for it, if it was read before.
    """
    graded = {"file": str(file), "points": 0, "of": 0, "exercises": {}}
    content = content or read(file)
    if isinstance(content, UsageError):
        return graded | {"error": str(content)}

    number, cells = content
    chapter = chapter_of(number, cells)
    for name, exercise in checks.EXERCISES.items():
        if exercise.number[0] == chapter:
            says = grade_one(cells, name, seconds)
            points = int(says == "right")
            graded["exercises"][exercise.number] = {"points": points, "says": says}
            graded["points"] += points
            graded["of"] += 1
    if not graded["of"]:
        graded["error"] = f"{file} has none of the course's exercises"
    return graded


# ---- other forms


def print_csv(graded: list[dict]) -> None:
    """Prints a row for each notebook, and a column for each exercise."""
    numbers = sorted({number for each in graded for number in each["exercises"]})
    out = csv.writer(sys.stdout)
    out.writerow(["file", "points", "of", *numbers, "why"])
    for each in graded:
        points = []
        why = [each["error"]] if "error" in each else []
        for number in numbers:
            exercise = each["exercises"].get(number, {"points": "", "says": "right"})
            points.append(exercise["points"])
            if exercise["says"] != "right":
                why.append(f"{number} {exercise['says']}")
        out.writerow([each["file"], each["points"], each["of"], *points, "; ".join(why)])


def gradescope(graded: list[dict]) -> dict:
    """Returns Gradescope's results.json for one student's notebooks."""
    tests = []
    for each in graded:
        for number, exercise in each["exercises"].items():
            tests.append({
                "name": number,
                "score": exercise["points"],
                "max_score": 1,
                "status": "passed" if exercise["points"] else "failed",
                "output": exercise["says"],
            })
    errors = [each["error"] for each in graded if "error" in each]
    return {
        "score": sum(test["score"] for test in tests),
        "output": "\n".join(errors),
        "tests": tests,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Grades submitted notebooks.")
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print a row for each notebook")
    form.add_argument("--gradescope", action="store_true", help="print Gradescope's results.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    project_files()  # all is read before the first submission runs
    contents = [read(file) for file in args.submissions]
    graded = []
    for file, content in zip(args.submissions, contents):
        graded.append(grade(file, content=content))
    if args.csv:
        print_csv(graded)
    else:
        print(json.dumps(gradescope(graded) if args.gradescope else graded, indent=2))


if __name__ == "__main__":
    main()
