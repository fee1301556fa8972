"""The figures next to the tables: dots with intervals, a scatter, lines, a heat map.

95 % intervals are thin lines, the paper's values crosses. Shares are in percent.
"""

import itertools
import math
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np

try:
    from matplotlib import pyplot
    from matplotlib.figure import Figure
except ImportError:  # a requirement of the notebooks only: tables work without it
    pyplot = None
    Figure = None

import sample
from notebooks.experiments import stats
from notebooks.experiments.stats import Estimate, Interval, Share

COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777",
    "#994455", "#004488", "#997700", "#6699cc", "#ee99aa", "#000000",
)  # Paul Tol's, told apart by the colour-blind
NOTHING = "nothing is stored"  # the title where there is no panel


class Dot(NamedTuple):
    """One estimate in a row of a figure."""

    series: str
    shares: list[Share]


def colour_of(series: int) -> str:
    """Returns the colour of a series by its number; they are used again after the last."""
    return COLOURS[series % len(COLOURS)]


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as PNG, the same bytes each time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sample.write_whole(
        file,
        lambda part: figure.savefig(part, format="png", dpi=110, metadata={"Software": None}),
    )
    pyplot.close(figure)


def one_dot_each(answers, models: Iterable, concepts: Iterable, columns: Iterable) -> dict:
    """Returns panels for `dots`: one for each of `core.Column`, with a dot for each model."""
    panels = {}
    for column in columns:
        panels[column.title] = {}
        for model in models:
            shares = answers.count(model, concepts, column)
            panels[column.title][model.label] = [Dot("here", shares)]
    return panels


def dots(
    panels: dict[str, dict[str, list[Dot]]], paper: dict[str, dict[str, float]] | None = None
) -> Figure:
    """Returns a panel for each thing measured: rows of dots with intervals.

    panels: title -> row -> dots. paper: title -> row -> the paper's value, percent.
    """
    panels = panels or {NOTHING: {}}
    rows = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    series = []
    for of_row in (dots for panel in panels.values() for dots in panel.values()):
        series += [dot.series for dot in of_row if dot.series not in series]
    height = 1.2 + len(rows) * max(0.3, 0.13 * len(series) + 0.1)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1, height), sharey=True, squeeze=False,
        layout="constrained",
    )

    for axis, (title, panel) in zip(axes[0], panels.items()):
        for y, row in enumerate(rows):
            for dot in panel.get(row, []):
                i = series.index(dot.series)
                mean, low, high = stats.estimate(dot.shares)
                at = y + 0.7 * ((i + 0.5) / len(series) - 0.5)
                axis.plot([low, high], [at, at], color=colour_of(i), linewidth=1)
                axis.plot(mean, at, "o", color=colour_of(i), markersize=4)
            if paper and row in paper.get(title, {}):
                axis.plot(paper[title][row], y, "x", color="black")
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-3, 103)
        axis.set_xlabel("%")
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()

    handles = [
        pyplot.Line2D([], [], color=colour_of(i), marker="o", markersize=4, label=name)
        for i, name in enumerate(series)
    ]
    if paper:
        handles.append(
            pyplot.Line2D([], [], color="black", marker="x", linestyle="none", label="the paper")
        )
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def estimates(
    panels: dict[str, dict[str, Estimate]], bands: dict[str, Interval] | None = None,
    grey: Iterable[str] = (),
) -> Figure:
    """Returns a panel for each thing measured, each with its own axis: rows of dots.

    panels: title -> row -> the mean and its interval, in the title's unit. bands: title ->
    a range to compare with. grey: rows to compare with.
    """
    panels = panels or {NOTHING: {}}
    bands = bands or {}
    rows = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1, 1.2 + 0.3 * len(rows)),
        sharey=True, squeeze=False, layout="constrained",
    )

    for axis, (title, panel) in zip(axes[0], panels.items()):
        if title in bands:
            axis.axvspan(*bands[title], color="#999999", alpha=0.25, linewidth=0)
        for row, (mean, low, high) in panel.items():
            y = rows.index(row)
            colour = "#777777" if row in grey else COLOURS[0]
            if math.isfinite(low):  # a single value has no interval
                axis.plot([low, high], [y, y], color=colour, linewidth=1)
            axis.plot(mean, y, "o", color=colour, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    return figure


class Place(NamedTuple):
    """A model in a scatter."""

    label: str
    left: float  # percent of the images that still show the concept
    harm: float  # percent of the others that are no longer right
    score: float  # places are numbered by it


def mark_places(axis, places: list[Place], ours: Iterable[str]) -> None:
    """Draws a point for each model, with its number; lists the names at the side."""
    numbers = {}  # of the models at a point
    for rank, place in enumerate(sorted(places, key=lambda each: -each.score), start=1):
        is_ours = place.label in ours
        colour = "C3" if is_ours else "#555555"
        axis.plot(place.left, place.harm, "o", color=colour, markersize=4)
        axis.text(
            1.04, 1.01 - 0.04 * rank, f"{rank}.  {place.score:.1f}  {place.label}",
            color=colour, fontsize=8, transform=axis.transAxes,
        )
        numbers.setdefault((place.left, place.harm, is_ours), []).append(str(rank))

    for i, (left, harm, is_ours) in enumerate(sorted(numbers)):
        on_the_left = i % 2 == 0  # so that neighbours' numbers don't cover each other
        axis.annotate(
            ", ".join(numbers[left, harm, is_ours]), (left, harm),
            xytext=(-4, 2) if on_the_left else (4, -9), ha="right" if on_the_left else "left",
            textcoords="offset points", color="C3" if is_ours else "#555555", fontsize=8,
        )


def scatter(panels: dict[str, list[Place]], ours: Iterable[str] = ()) -> Figure:
    """Returns a panel for each title: what is left against the harm; `ours` are red.

    Both axes are stretched near 0, where most points are.
    """
    panels = panels or {NOTHING: []}
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (title, places) in zip(axes[0], panels.items()):
        axis.set_xscale("symlog", linthresh=5, linscale=0.35)
        axis.set_yscale("symlog", linthresh=0.5, linscale=0.4)
        axis.set_xticks([0, 5, 10, 20, 50, 100], [0, 5, 10, 20, 50, 100])
        axis.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50], [0, 0.5, 1, 2, 5, 10, 20, 50])
        axis.set_xlim(-1.5, 130)
        axis.set_ylim(-0.1, 80)
        mark_places(axis, places, ours)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("the concept is seen, %")
        axis.set_ylabel("harm: others no longer right, %")
    return figure


class Line(NamedTuple):
    """A line in a figure, with an interval at each point."""

    label: str
    x: list[float]
    shares: list[list[Share]]


class Mark(NamedTuple):
    """A single erasure in a panel of marks."""

    label: str
    x: float
    y: float  # percent


def draw_line(axis, line: Line, colour: str) -> None:
    """Draws a line with a band for its intervals."""
    estimates = [stats.estimate(shares) for shares in line.shares]
    low = [each.low for each in estimates]
    high = [each.high for each in estimates]
    means = [each.mean for each in estimates]
    axis.plot(line.x, means, "o-", color=colour, markersize=4, linewidth=1.2)
    axis.fill_between(line.x, low, high, color=colour, alpha=0.12)


def lines(
    panels: dict[str, list[Line]], x: str, y: str,
    marks: dict[str, list[Mark]] | None = None, x_of_marks: str = "",
) -> Figure:
    """Returns a panel of lines for each title; x and y are the axes' labels.

    marks: panels after those, of single points over another x, with a line at its 0.
    """
    marks = marks or {}
    panels = panels or {NOTHING: []}
    labels = []
    for each in (each for several in (*panels.values(), *marks.values()) for each in several):
        if each.label not in labels:
            labels.append(each.label)
    colours = {label: colour_of(i) for i, label in enumerate(labels)}
    num = len(panels) + len(marks)
    figure, axes = pyplot.subplots(
        1, num, figsize=(4 * num, 4), squeeze=False, sharey=True, layout="constrained"
    )

    for axis, several in zip(axes[0], panels.values()):
        for line in several:
            draw_line(axis, line, colours[line.label])
    for axis, several in zip(axes[0][len(panels):], marks.values()):
        axis.axvline(0, color="#999999", linewidth=0.8)
        for mark in several:
            axis.plot(mark.x, mark.y, "o", color=colours[mark.label], markersize=4, alpha=0.7)
    for i, (axis, title) in enumerate(zip(axes[0], (*panels, *marks))):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x if i < len(panels) else x_of_marks)
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0][0].set_ylabel(y)

    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", markersize=4, label=label)
        for label, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def with_values(panels: dict[str, dict[str, dict[str, Estimate]]]) -> dict:
    """Returns the panels and the rows that have any values; all panels keep the same rows."""
    def is_empty(cells: dict[str, Estimate]) -> bool:
        return all(math.isnan(value.mean) for value in cells.values())

    rows = {}
    for of_concept in panels.values():
        rows |= {label: None for label, cells in of_concept.items() if not is_empty(cells)}
    found = {}
    for concept, of_concept in panels.items():
        chosen = {label: of_concept[label] for label in of_concept if label in rows}
        if not all(is_empty(cells) for cells in chosen.values()):
            found[concept] = chosen
    return found


def heat_map(panels: dict[str, dict[str, dict[str, Estimate]]]) -> Figure:
    """Returns a panel for each title, one below the other: row -> column -> percent.

    All panels have the same rows and columns; nan is blank. A number whose interval has
    zero in it is in parentheses and pale: it may be chance.
    """
    panels = panels or {NOTHING: {}}
    first = next(iter(panels.values()))
    rows = [*first]
    columns = [*first[rows[0]]] if rows else []
    width = 0.75 * len(columns) + 3
    height = (0.35 * len(rows) + 0.5) * len(panels) + 1.5
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(width, height), squeeze=False, sharex=True, layout="constrained"
    )

    for axis, (title, panel) in zip(axes[:, 0], panels.items()):
        means = np.full((len(rows), len(columns)), math.nan)
        alpha = np.ones_like(means)
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            mean, low, high = panel[row][column]
            if math.isnan(mean):
                continue
            may_be_chance = low <= 0 <= high
            means[i, j] = mean
            alpha[i, j] = 0.25 if may_be_chance else 1
            text = f"({mean:.0f})" if may_be_chance else f"{mean:.0f}"
            colour = "white" if mean > 60 and not may_be_chance else "black"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        if columns:
            axis.imshow(means, vmin=0, vmax=100, cmap="Reds", aspect="auto", alpha=alpha)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_title(title, fontsize=10)
    figure.supxlabel("percent; in parentheses where the interval includes zero", fontsize=8)
    return figure
