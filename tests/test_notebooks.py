"""The committed notebooks: outputs match the code, every figure is there, and links work."""

import ast
import functools
import hashlib
import inspect
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence

import erase
from notebooks.course import checks

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.ipynb"))


def code_cells(file: Path) -> list[dict]:
    """Returns a notebook's code cells."""
    notebook = json.loads(file.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_of(file: Path) -> str:
    """Returns all code of a notebook."""
    return "\n".join("".join(cell["source"]) for cell in code_cells(file))


def test_there_are_six():
    assert [file.name[0] for file in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_match_the_code(file):
    """If it fails, run `python notebooks/course/execute.py NUMBER --write`."""
    lines = code_of(file).splitlines()
    code = "\n".join(line for line in lines if "git clone" not in line)
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
    code = code_of(file)
    assert len(re.findall(r"^(?:MODEL|RESULTS) = ", code, re.MULTILINE)) == 1


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_it_takes_from_the_project_exists(file):
    """Each name that it imports from `notebooks`, and each attribute of such a module."""
    pytest.importorskip("matplotlib")
    imported = {}
    for node in ast.walk(ast.parse(code_of(file))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("notebooks"):
            for each in node.names:
                statement = f"from {node.module} import {each.name} as found"
                exec(statement, names := {})
                imported[each.asname or each.name] = names["found"]
    assert "checks" in imported

    for node in ast.walk(ast.parse(code_of(file))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id)
            if inspect.ismodule(module):
                assert hasattr(module, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_code_lines_fit_on_a_page(file):
    assert [line for line in code_of(file).splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_there_are_three_exercises_with_their_checks(file):
    text = "".join("".join(cell["source"]) for cell in json.loads(file.read_text())["cells"])
    number = file.name[0]
    found = re.findall(r"\*\*(\d\.\d), ", text)
    assert len(found) >= 3 and found == [f"{number}.{i + 1}" for i in range(len(found))]
    checked = [name for name in checks.EXERCISES if "(my_" in text and f"({name})" in text]
    assert checked and all(checks.EXERCISES[name].number[0] == number for name in checked)


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md", "notebooks/course/README.md",
                                  "notebooks/toy/README.md"])
def test_links_to_files_work(page):
    file = FOLDER.parent / page
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', file.read_text())
    local = [path for path in map("".join, links) if not path.startswith("http")]
    assert [path for path in local if not (file.parent / path).exists()] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_opened_alone_says_what_to_do(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="clone the whole project"):
        exec("".join(code_cells(file)[0]["source"]), {})


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_on_colab_the_project_is_fetched_once(file, tmp_path, monkeypatch):
    """Where /content is Colab's folder; the second run finds the project there."""
    fetched = []
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "*.ipynb", "*.png")

    def run(command, **settings):
        fetched.append(command)
        shutil.copytree(FOLDER.parent, tmp_path / "minESD", ignore=left_out)

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    first = "".join(code_cells(file)[0]["source"]).replace("/content", str(tmp_path))
    end = re.search("import (matplotlib|torch)", first).start()  # what comes then takes seconds
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        exec(first[:end], {})
        assert Path.cwd() == tmp_path / "minESD"

    assert len(fetched) == 1
    assert fetched[0].startswith("git clone https://github.com/")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_exercises_are_marked_for_nbgrader(file):
    """A cell for the function, one whose value is the point; their outputs give nothing away.

    A stub's `return` is what nbgrader replaces. Code to be mended is an ordinary cell, which
    nbgrader leaves as it is.
    """
    cells = code_cells(file)
    checked = 0
    for cell, check in zip(cells, cells[1:]):
        if "says = checks." in "".join(check["source"]):
            checked += 1
            source = "".join(cell["source"])
            check_marks = check["metadata"]["nbgrader"]
            assert check_marks["grade"] and check_marks["locked"] and check_marks["points"] == 1
            name = check_marks["grade_id"].removesuffix("-check")
            assert f"def {name}(" in source and f"({name})" in "".join(check["source"])
            assert not cell["outputs"] and not check["outputs"]

            if name == "my_denoise":
                assert "nbgrader" not in cell["metadata"]
                continue
            marks = cell["metadata"]["nbgrader"]
            assert marks["solution"] and not marks["grade"] and marks["grade_id"] == name
            assert source.endswith(
                "    ### BEGIN SOLUTION\n    return ...\n    ### END SOLUTION"
            )
    assert checked > 0


# ---- the handout


def handout() -> set[str]:
    """Returns the files that the command of the teachers' page hands out, and their folders."""
    page = (FOLDER / "course" / "README.md").read_text()
    left_out = re.findall(r'":!([^"]+)"', page.partition("git archive")[2].partition("```")[0])
    assert len(left_out) > 5
    never = (".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache")
    found = set()
    for path in FOLDER.parent.rglob("*"):
        name = path.relative_to(FOLDER.parent)
        if not set(name.parts) & {*never}:
            if not any(name.is_relative_to(each) for each in left_out):
                found.add(name.as_posix())
    for each in left_out:
        assert (FOLDER.parent / each).exists(), each
    return found


def test_the_handout_has_no_solutions():
    names = handout()
    assert {"notebooks/course/checks.py", "notebooks/course/cases.py", "tests/test_ddim.py",
            "README.md", "notebooks/toy/model/model_index.json"} <= names
    for name in names:
        assert "solution" not in name
        if name.endswith(".py") and name.startswith(("tests/", "notebooks/")):
            source = (FOLDER.parent / name).read_text()
            assert "course.solutions" not in source and "course import grade" not in source, name


def test_the_handout_names_nothing_that_is_not_in_it():
    """Links, and paths into the folders of which it leaves out a part."""
    names = handout()
    for name in sorted(names):
        file = FOLDER.parent / name
        if file.suffix not in (".md", ".ipynb", ".py", ".toml") or not file.is_file():
            continue
        text = file.read_text()
        paths = re.findall(r"(?:notebooks/course|solutions)/[\w./]*\w", text)
        if file.suffix in (".md", ".ipynb"):
            paths += re.findall(r"tests/[\w./]*\w", text)
            paths += re.findall(r"\]\((?!http)([\w./-]+\.\w+)[)#]", text)
        for path in paths:
            near = [(file.parent / path).resolve(), FOLDER.parent / path]
            within = [each for each in near if each.is_relative_to(FOLDER.parent)]
            found = {each.relative_to(FOLDER.parent).as_posix() for each in within}
            assert found & names, f"{name}: {path}"


# ---- notebook 4: losses and data have no hidden state


def original(x_t, t, c):
    """Predicts something that depends on all three."""
    return x_t * c.mean(dim=(1, 2))[:, None, None, None] + t[:, None, None, None] / 1000


def edited(x_t, t, c):
    return 0.9 * original(x_t, t, c)


def random_batches(unet, texts, shape, rng):
    """Yields batches in the place of `erase.x_t_from_model`."""
    while True:
        i = torch.randint(len(texts), (1,), generator=rng).item()
        x_t = torch.randn(shape, generator=rng)
        yield erase.Batch(x_t, torch.full(shape[:1], 501), texts[i])


@pytest.fixture(scope="module")
def notebook_4(sd):
    """The functions of notebook 4, with what they take from the cells around them."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    body = ast.parse(code_of(NOTEBOOKS[3])).body
    nodes = [node for node in body if isinstance(node, definitions)]
    source = ast.unparse(ast.Module(nodes, []))
    kept = sd.encode(["a heart", "a moon", "a red cross", ""])
    functions = {"sd": sd, "kept": kept, "FLAGS": {"data": random_batches}}
    lines = source.splitlines()  # the tests' environment has no Jupyter
    lines = [line for line in lines if not line.startswith(("from IPython", "import matplotlib"))]
    exec("\n".join(lines).replace("checks, moving", "checks"), functions)
    return functions


def test_a_loss_called_twice_gives_the_same(notebook_4, sd):
    losses = {}
    for name, function in notebook_4.items():
        if inspect.isfunction(function) and name != "my_selective_loss":  # a stub
            if [*inspect.signature(function).parameters][:2] == ["unet", "frozen"]:
                losses[name] = function
    assert losses.keys() == {"anchor_loss", "preserving_loss", "early_loss", "my_loss"}
    losses["anchor_loss"] = functools.partial(
        losses["anchor_loss"], features=notebook_4["kept"][:1]
    )

    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 301, 601, 901])
    text = erase.Text(*(sd.encode([prompt] * 4) for prompt in ("a star", "", "a heart")))
    for name, loss in losses.items():
        first = loss(edited, original, x_t, t, text, 1.0)
        second = loss(edited, original, x_t, t, text, 1.0)
        assert first.shape == (4,), name
        assert torch.equal(first, second), name


@pytest.mark.parametrize("name", ["with_prompts_to_keep", "with_x_t_of_prompts_to_keep"])
def test_data_takes_its_random_numbers_from_rng(notebook_4, sd, name):
    texts = erase.texts_for(sd, ["a star"], batch=4)
    runs = []
    for seed in (3, 3, 4):
        rng = torch.Generator().manual_seed(seed)
        runs.append(notebook_4[name](edited, texts, (4, 4, 8, 8), rng))

    for first, second, other in itertools.islice(zip(*runs), 4):
        assert torch.equal(first.x_t, second.x_t)
        assert torch.equal(first.text.anchor, second.text.anchor)
        assert not torch.equal(first.x_t, other.x_t)


def test_each_sample_has_a_random_prompt_to_keep(notebook_4, sd):
    texts = erase.texts_for(sd, ["a star"], batch=64)
    rng = torch.Generator().manual_seed(0)
    batches = notebook_4["with_prompts_to_keep"](edited, texts, (64, 4, 8, 8), rng)

    text = next(batches).text
    assert torch.equal(text.concept, texts[0].concept)
    assert torch.equal(text.null, texts[0].null)
    found = {anchor.sum().item() for anchor in text.anchor}
    assert found == {features.sum().item() for features in notebook_4["kept"]}


def test_every_second_x_t_is_of_a_prompt_to_keep(notebook_4, sd):
    """Its null is its concept, so Eq. 6's target is the original's prediction for it."""
    texts = erase.texts_for(sd, ["a star"], batch=4)
    rng = torch.Generator().manual_seed(0)
    batches = notebook_4["with_x_t_of_prompts_to_keep"](edited, texts, (4, 4, 8, 8), rng)

    kept = {features.sum().item() for features in notebook_4["kept"]}
    for of_star, of_kept in itertools.islice(zip(batches, batches), 50):
        assert torch.equal(of_star.text.concept, texts[0].concept)
        assert torch.equal(of_kept.text.null, of_kept.text.concept)
        kept.discard(of_kept.text.concept[0].sum().item())
        if not kept:
            break
    assert not kept


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_badges_open_this_notebook(file):
    first = "".join(json.loads(file.read_text())["cells"][0]["source"])
    path = f"OWNER/minESD/blob/main/notebooks/{file.name})"
    assert f"https://colab.research.google.com/github/{path}" in first
    assert f"https://kaggle.com/kernels/welcome?src=https://github.com/{path}" in first


# ---- images that move


def coloured(levels, side=32):
    """Returns an image for each grey level."""
    return [Image.new("RGB", (side, side), (level, level, level)) for level in levels]


def test_a_gif_has_every_frame_in_its_order_and_time():
    moving = pytest.importorskip("notebooks.course.moving")
    shown = moving.gif(coloured([0, 100, 200]), milliseconds=300)
    stored = Image.open(io.BytesIO(shown.data))
    assert stored.format == "GIF"
    levels = []
    times = []
    for frame in ImageSequence.Iterator(stored):
        levels.append(frame.convert("RGB").getpixel((5, 5))[0])
        times.append(frame.info["duration"])
    assert levels == [0, 100, 200]
    assert times == [300, 300, 2000]

    noise = [Image.effect_noise((300, 300), 200 + i) for i in range(9)]
    with pytest.raises(ValueError, match="fewer or smaller frames"):
        moving.gif(noise)


def test_a_slider_shows_the_image_of_its_value():
    moving = pytest.importorskip("notebooks.course.moving")
    images = dict(zip((1, 3, 7.5), coloured([0, 100, 200])))
    widget = moving.slider("guidance", images)
    choose, shown = widget.children
    for value, image in images.items():
        choose.value = value
        assert Image.open(io.BytesIO(shown.value)).tobytes() == image.tobytes()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_state_of_a_slider_is_stored(file):
    notebook = json.loads(file.read_text())
    assert "widgets" not in notebook["metadata"]
