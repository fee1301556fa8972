"""The promises of the design that can be counted: lines, parameters, imports."""

import ast
import inspect
from pathlib import Path

import pytest

import clip_text
import ddim
import erase
import sample
import unet
import vae

ROOT = Path(__file__).parents[1]
LIMITS = {unet: 340, vae: 245, clip_text: 135, ddim: 110, sample: 400, erase: 205}
OURS = {module.__name__ for module in LIMITS}
IMPORTS = {"sample": {"unet", "vae", "clip_text", "ddim"}, "erase": {"sample", "ddim"}}


def lines(file):
    return len(Path(file).read_text().splitlines())


@pytest.mark.parametrize("module", LIMITS, ids=lambda module: module.__name__)
def test_a_file_is_read_in_minutes(module):
    assert lines(module.__file__) <= LIMITS[module]


def test_the_method_is_in_the_first_130_lines_of_erase():
    """All that comes before `erase`, which puts it together, and nothing of it comes later."""
    names = ["esd_target", "esd_loss", "own_ways", "noised", "select", "edit", "esd"]
    ends = {}
    for name in names:
        source, first = inspect.getsourcelines(getattr(erase, name))
        ends[name] = first + len(source) - 1
    assert max(ends.values()) <= 130, ends


def test_the_readme_is_short():
    assert lines(ROOT / "README.md") <= 180


def functions():
    """The public functions and methods of the six files, `module.name`."""
    found = {}
    for module in LIMITS:
        classes = [item for _, item in inspect.getmembers(module, inspect.isclass)]
        for owner in (module, *classes):
            for name, item in vars(owner).items():
                item = getattr(item, "__func__", item)
                if inspect.isfunction(item) and item.__module__ == module.__name__ and (
                        not name.startswith("_") or name == "__init__"):
                    found[f"{item.__module__}.{item.__qualname__}"] = item
    return found


def test_no_public_function_has_more_than_14_parameters():
    counts = {name: len(inspect.signature(item).parameters) for name, item in functions().items()}
    assert {"erase.erase", "sample.generate", "unet.UNet.forward"} < counts.keys()
    assert max(counts.values()) <= 14, max(counts, key=counts.get)


def imported(file):
    """The top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
            assert not node.level, f"{file}: a relative import"
    return names


@pytest.mark.parametrize("module", LIMITS, ids=lambda module: module.__name__)
def test_imports_point_downwards(module):
    found = imported(module.__file__)
    assert found & OURS == IMPORTS.get(module.__name__, set())
    assert not found & {"notebooks", "tests", "support", "diffusers"}


def test_no_line_is_longer_than_100_columns():
    files = [Path(module.__file__) for module in LIMITS]
    files += [file for folder in ("notebooks", "tests") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    long = [f"{file.relative_to(ROOT)}:{i}" for file in files
            for i, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
    assert not long, long
