"""Writes README.md: every experiment's docstring, table, figure and findings.

    python -m notebooks.experiments.page
"""

from pathlib import Path

import sample
from notebooks.experiments import figures, run

FOLDER = Path(__file__).parent


def title_of(name: str) -> str:
    """Returns the first line of an experiment's docstring, up to the colon."""
    return run.experiment(name).__doc__.partition("\n")[0].partition(":")[0]


def anchor_of(name: str) -> str:
    """Returns the link that GitHub makes of a title."""
    kept = [letter for letter in title_of(name).lower() if letter.isalnum() or letter in " -"]
    return "#" + "".join(kept).replace(" ", "-")


def is_stored(name: str) -> bool:
    """Whether all that an experiment's table is made of has stored answers."""
    return all((run.SHIPPED / f"{each}.json").exists() for each in run.reads(name))


def stored(name: str) -> str:
    """Returns how many of an experiment's answers are stored: "120 of 123 answers"."""
    module = run.experiment(name)
    cells = module.cells(module.MODELS, module.CONCEPTS, module.SEEDS)
    keys = {cell.key for cell in cells}
    return f"{len(keys & {*run.stored(name).records})} of {len(keys)} answers"


def section(name: str) -> str:
    """Returns what the page says of an experiment."""
    module = run.experiment(name)
    first, _, rest = module.__doc__.strip().partition("\n")
    question = first.partition(":")[2].strip()
    images = run.SHIPPED / f"{name}_images.png"

    parts = [
        f"## {title_of(name)}",
        f"{question[:1].upper()}{question[1:]}",
        rest.strip(),
        run.stored_table(name),
        f"![{title_of(name)}: the table as a figure](results/{name}.png)",
        f"![{title_of(name)}: images](results/{name}_images.png)" if images.exists() else "",
        module.FINDINGS.strip(),
        f"`python -m notebooks.experiments.run {name}` · [`{name}.py`]({name}.py)",
    ]
    for each in run.reads(name):
        parts[-1] += f" · [`results/{each}.json`](results/{each}.json): {stored(each)}"
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    """Returns the page."""
    stored = [name for name in run.NAMES if is_stored(name)]
    links = [f"[{title_of(name)}]({anchor_of(name)})" for name in stored]
    head = (FOLDER / "page.md").read_text().replace("{links}", " · ".join(links))
    return "\n\n".join([head.strip(), *(section(name) for name in stored)]) + "\n"


def main() -> None:
    """Writes the page and its figures; the images are drawn by run.py."""
    for name in run.NAMES:
        if is_stored(name):
            module = run.experiment(name)
            figure = module.figure(run.stored(name), module.MODELS)
            figures.save(figure, run.SHIPPED / f"{name}.png")
    sample.write_whole(FOLDER / "README.md", lambda part: part.write_text(page()))
    print(FOLDER / "README.md")


if __name__ == "__main__":
    main()
