"""Slides of the notebooks' figures, and what the students' page names."""

import base64
import importlib
import io
import json
import re
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from notebooks.course import slides
from support.commands import refusal, run

NOTEBOOKS = Path(slides.__file__).parents[1]
FIRST_NOTEBOOK = NOTEBOOKS / "1_stable_diffusion.ipynb"


# ---- slides


def stored(image: Image.Image) -> dict:
    """Returns the output of a cell that shows an image."""
    file = io.BytesIO()
    image.save(file, "png")
    return {"data": {"image/png": base64.b64encode(file.getvalue()).decode()}}


def notebook(file: Path, *cells: tuple[str, list[dict]]) -> Path:
    """Writes code cells with their outputs."""
    described = []
    for source, outputs in cells:
        described.append({"cell_type": "code", "source": [source], "outputs": outputs})
    file.write_text(json.dumps({"cells": described}))
    return file


RED = stored(Image.new("RGB", (30, 10), "red"))
BLUE = stored(Image.new("RGB", (10, 10), "blue"))


@pytest.mark.robustness  # seconds
def test_each_stored_figure_is_a_slide(tmp_path):
    out = tmp_path / "new" / "slides"
    run(slides.main, FIRST_NOTEBOOK, "--out", out)

    numbers = []
    for cell in json.loads(FIRST_NOTEBOOK.read_text())["cells"]:
        numbers += re.findall(r"\A# Figure (\d+):", "".join(cell["source"]))
    assert len(numbers) >= 9
    names = {file.name for file in out.iterdir()}
    assert names == {f"1_stable_diffusion_figure_{int(number):02d}.png" for number in numbers}
    assert {Image.open(file).size for file in out.iterdir()} == {(1920, 1080)}


def test_a_slide_has_its_title_and_the_cells_last_image(tmp_path):
    file = notebook(
        tmp_path / "own.ipynb",
        ("# Figure 2: a square\n# that is blue\nshow()", [RED, {"output_type": "stream"}, BLUE]),
        ("# Moving: no figure", [RED]),
    )
    name, page = next(slides.slides_of(file))
    assert name == "own_figure_02"
    assert page.getpixel((960, 600)) == (0, 0, 255)
    assert page.crop((0, 0, 1920, 100)).getextrema()[0][0] < 50  # the title's letters
    assert page.getpixel((5, 5)) == (255, 255, 255)
    assert len([*slides.slides_of(file)]) == 1


@pytest.mark.parametrize("title", ["one line", "a long title " * 40])
def test_a_title_and_its_figure_do_not_overlap(title, tmp_path):
    page = slides.slide(f"# Figure 1: {title}", Image.new("RGB", (10, 10), "blue"))
    rows = [y for y in range(1080) if page.getpixel((960, y)) == (0, 0, 255)]
    is_dark = [page.crop((0, y, 1920, y + 1)).getextrema()[0][0] < 50 for y in range(rows[0])]
    lines = sum(dark and not above for above, dark in zip([False, *is_dark], is_dark))
    assert lines == len(textwrap.wrap(f"Figure 1: {title}", 104))  # none is under the figure
    assert rows[-1] < 1080 - 50


@pytest.mark.parametrize("content, why", [
    ("no", "JSONDecodeError|Expecting value"),
    ("[]", "list indices"),
    (json.dumps({"cells": [{"cell_type": "code", "source": "# Figure 3: x", "outputs": []}]}),
     "Figure 3 has no image"),
    (json.dumps({"cells": [{"cell_type": "code", "source": "# Figure 3: x",
                            "outputs": [{"data": {"image/png": "AAAA"}}]}]}), "identify"),
])
def test_what_is_no_notebook_is_refused_in_one_line(content, why, tmp_path, capsys):
    file = tmp_path / "bad.ipynb"
    file.write_text(content)
    says = refusal(capsys, slides.main, file, "--out", tmp_path / "out")
    assert "bad.ipynb" in says and re.search(why, says)
    assert not (tmp_path / "out").exists()


def test_missing_notebooks_and_existing_folders_are_refused(tmp_path, capsys):
    missing = tmp_path / "none.ipynb"
    assert "none.ipynb" in refusal(capsys, slides.main, missing, "--out", tmp_path / "out")
    good = notebook(tmp_path / "good.ipynb", ("# Figure 1: x", [RED]))
    assert "exists" in refusal(capsys, slides.main, good, "--out", tmp_path)


# ---- the students' page


def rows_below(heading: str) -> list[list[str]]:
    """Returns the cells of the table below a heading of the page, without its header."""
    page = (NOTEBOOKS / "README.md").read_text()
    lines = page.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [line.split("|")[1:-1] for line in lines if line.startswith("| ")][1:]


def headings(number: str) -> set[str]:
    """Returns the headings of a notebook's sections."""
    file, = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(file.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return {*re.findall(r"^## (.*)$", "\n".join(texts), flags=re.MULTILINE)}


def test_the_map_of_the_paper_names_sections_and_functions_that_exist():
    rows = rows_below("From the paper to the notebooks")
    assert len(rows) >= 12
    for _, sections, names in rows:
        for part in sections.split(";"):
            named = {*re.findall('"(.*?)"', part)}
            assert not named or named <= headings(part.split()[0].strip(",")), part
        for name in re.findall("`(.*?)`", names):
            module, _, function = name.partition(".")
            if module in ("methods", "experiments", "toy"):
                importlib.import_module(f"notebooks.{name}")
            else:
                assert hasattr(importlib.import_module(module), function), name


def test_a_term_is_explained_once():
    terms = [term.strip() for term, _ in rows_below("Glossary")]
    assert 20 <= len(terms) <= 30
    words = ", ".join(terms).split(", ")
    assert len({*words}) == len(words)
