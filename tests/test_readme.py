"""The README: its links lead somewhere, its anchors to the right line, its code is the code."""

import inspect
import re
from pathlib import Path

import pytest

import erase

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").rglob("*.md")),
         *sorted((ROOT / "tests").rglob("*.md"))]


def test_an_anchor_is_the_line_where_its_name_is_defined():
    anchors = re.findall(r"\[`(\w+)\.(\w+)`\]\((\w+)\.py#L(\d+)\)", README)
    assert len(anchors) >= 13
    wrong = []
    for label, name, file, line in anchors:
        lines = (ROOT / f"{file}.py").read_text().splitlines()
        right = next(i for i, text in enumerate(lines, 1)
                     if re.match(rf"(def|class) {name}\b|{name}\b.* = ", text))
        if (label, int(line)) != (file, right):
            wrong.append(f"{label}.{name}: #L{right}")
    assert not wrong, wrong


def test_eq_6_is_printed_as_it_is():
    for function in (erase.esd_target, erase.esd_loss):
        assert inspect.getsource(function) in README


def test_the_readme_is_short():
    assert len(README.split()) <= 1400


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page):
    """Whether their files exist is test_notebooks.py's question."""
    for file, heading in re.findall(r"\]\(([^)\s#]*\.md)#([^)\s]+)\)", page.read_text()):
        text = (page.parent / file).read_text()
        titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in slugs, (file, heading)
