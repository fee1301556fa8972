"""Runs the notebooks, each in a fresh kernel, as CI does.

    pip install -r notebooks/requirements.txt
    python notebooks/course/execute.py                 # runs all six and writes nothing
    python notebooks/course/execute.py 2 4 --write     # runs two and stores their outputs

Two notebooks run at once, each on one core. Fails if a cell raises, if a cell that starts with
"# Figure" shows no image, or if a notebook takes more than fifteen minutes: on a machine with
avx512, none takes more than three; without it, all takes four times as long.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = Path(__file__).parents[1]
LIMIT = 900  # seconds
WIDGET = "application/vnd.jupyter.widget-view+json"


def code_of(notebook: nbformat.NotebookNode) -> str:
    """Returns a hash of all code: stored with the outputs, it tells whether they are current.

    The line that fetches the project isn't counted: each fork has its own.
    """
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    code = "\n".join(line for line in code.splitlines() if "git clone" not in line)
    return hashlib.sha256(code.encode()).hexdigest()


def missing_figures(notebook: nbformat.NotebookNode) -> list[str]:
    """Returns the first lines of the figure cells that show no image."""
    missing = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("# Figure"):
            if not any("image/png" in output.get("data", {}) for output in cell.outputs):
                missing.append(cell.source.splitlines()[0])
    return missing


def write_outputs(notebook: nbformat.NotebookNode, file: Path) -> None:
    """Writes the notebook with its outputs."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps, which change with every run
        if "says = checks." in cell.source:
            cell.outputs = []  # what a check says of the unsolved exercise may give a hint away
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output.data["text/plain"] = "(a slider, in a running notebook)"

    notebook.metadata.pop("widgets", None)  # the state of sliders
    notebook.metadata["code"] = code_of(notebook)
    nbformat.write(notebook, file)


def execute(file: Path, write: bool) -> str:
    """Runs one notebook; returns what is wrong, or "" if nothing is."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )

    began = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        return f"{file.name}: {error}"
    seconds = time.perf_counter() - began

    missing = missing_figures(notebook)
    if missing:
        return f"{file.name}: no image in {missing}"
    if seconds > LIMIT:
        return f"{file.name}: took {seconds:.0f} s, the limit is {LIMIT} s"

    print(f"{file.name}: {seconds:.0f} s", flush=True)
    if write:
        write_outputs(notebook, file)
    return ""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Runs the notebooks.")
    parser.add_argument("numbers", nargs="*", help="which notebooks to run; by default all")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--processes", type=int, default=2, help="each takes one core")
    args = parser.parse_args()

    files = sorted(FOLDER.glob("[0-9]_*.ipynb"))
    if args.numbers:
        known = {file.name[0]: file for file in files}
        if unknown := {*args.numbers} - {*known}:
            wrong = " ".join(sorted(unknown))
            parser.exit(2, f"error: no notebook {wrong}: choose from {' '.join(known)}\n")
        files = [known[number] for number in args.numbers]

    os.environ["OMP_NUM_THREADS"] = "1"  # the kernels inherit it
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        problems = [*filter(None, pool.map(functools.partial(execute, write=args.write), files))]
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
