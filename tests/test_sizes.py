"""The promises of the design that can be counted: columns, functions, parameters, imports."""

import ast
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from support.commands import ROOT

CORE = ["unet", "vae", "clip_text", "ddim", "sample", "erase"]
IMPORTS = {"sample": {"unet", "vae", "clip_text", "ddim"}, "erase": {"sample", "ddim"}}

CORE_FILES = [ROOT / f"{name}.py" for name in CORE]
NOTEBOOK_FILES = sorted((ROOT / "notebooks").rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))

CARD = {*(f"{name}.py" for name in CORE), "notebooks", "tests", "README.md"}
NEEDED = {"requirements.txt", "LICENSE", "pyproject.toml", ".ci", ".gitignore", ".git"}


# ---- the files


def test_the_top_level_is_the_cards():
    """Everything but caches and what .gitignore names is on the card, or a repository needs it."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    names = {path.name for path in ROOT.iterdir() if not path.name.endswith("_cache")}
    assert CARD <= names
    assert names - ignored <= CARD | NEEDED


def imported(file: Path) -> set[str]:
    """Returns the top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", CORE)
def test_imports_point_downwards(name):
    found = imported(ROOT / f"{name}.py")
    assert found & {*CORE} == IMPORTS.get(name, set())
    assert not found & {"notebooks", "tests", "support", "diffusers"}


@pytest.mark.parametrize("file", NOTEBOOK_FILES, ids=lambda file: file.stem)
def test_notebooks_import_no_tests(file):
    assert not imported(file) & {"tests", "support", "diffusers"}


def test_no_line_is_longer_than_100_columns():
    long = []
    for file in CORE_FILES + NOTEBOOK_FILES + TEST_FILES:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if len(line) > 100:
                long.append(f"{file.relative_to(ROOT)}:{number}")
    assert long == []


# ---- the functions


class Function(NamedTuple):
    """What is counted of a function or method."""

    name: str  # such as notebooks/tools/table.py:draw
    length: int  # lines of the body, blank ones too, without docstring and signature
    parameters: int


def count(file: Path, node: ast.FunctionDef) -> Function:
    """The signature isn't part of the length: it has a limit of its own, the parameters."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    length = node.end_lineno - body[0].lineno + 1 if body else 0
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return Function(f"{file.relative_to(ROOT)}:{node.name}", length, len(arguments))


def functions(files: list[Path]) -> Iterator[Function]:
    """Yields every function and method, nested ones too."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield count(file, node)


def test_functions_are_counted_right():
    """Of this one, the five lines below are counted, and not this one."""
    found = {function.name: function for function in functions([Path(__file__)])}

    this = found["tests/test_sizes.py:test_functions_are_counted_right"]
    assert this.length == 5
    assert found["tests/test_sizes.py:count"].parameters == 2


def test_no_function_is_longer_than_40_lines():
    found = [*functions(CORE_FILES + NOTEBOOK_FILES)]
    assert len(found) > 200
    assert [function for function in found if function.length > 40] == []


def test_no_function_has_more_than_14_parameters():
    found = [*functions(CORE_FILES + NOTEBOOK_FILES)]
    assert max(function.parameters for function in found) > 10
    assert [function for function in found if function.parameters > 14] == []


def test_the_method_is_within_150_lines():
    """From `class Text` to the end of `gradient_steps`, with blank lines and docstrings."""
    tree = ast.parse((ROOT / "erase.py").read_text())
    top = {node.name: node for node in tree.body if hasattr(node, "name")}
    first = top["Text"].lineno
    last = top["gradient_steps"].end_lineno
    assert last - first + 1 <= 150

    method = [
        "Text", "Batch", "esd_target", "esd_loss", "x_t_from_model", "x_t_from_images",
        "trainable_copies", "with_theta", "gradient_steps",
    ]
    inside = [name for name, node in top.items() if first <= node.lineno <= last]
    assert inside == method
