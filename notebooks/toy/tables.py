"""The stored results of evaluate.py as Markdown tables, next to the paper's numbers.

    python -m notebooks.toy.tables               # every table
    python -m notebooks.toy.tables styles eta    # two of them

Loads no model. A share is given in percent with its 95 % interval, counted by the judge. Rows
that aren't stored are left out.
"""

import argparse
import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

from notebooks.toy import world

Answers = dict[str, dict]  # "experiment/concept/model", or without concept -> what came out

STYLES = world.STYLES[1:]  # no words ask for plain
IMPLIED = tuple(dict.fromkeys(scene.object for scene in world.SCENES.values()))
FAMILY = [title for title, work in world.WORKS.items() if work.style == "mosaic"]
MODELS = (  # of "implied" and "quality"
    "original", "ESD-u", "ESD-u, the paper's rule", "ESD-u, eta 3", "ESD-x", "SLD-weak",
    "SLD-medium", "SLD-strong", "SLD-max", "negative prompt", "censored training",
)
VARIANTS = (  # of "which"
    "x_t at every step of a trajectory", "x_t by the edited model, as in the paper",
    "x_t by the frozen model", "learning rate falls to 0", "weights and Adam in bfloat16",
    "keys and values only", "ESD-u, its code's parameters", "ESD-u, the paper's rule",
)
METHODS = (  # of "methods"
    "original", "ESD-x", "ESD-x, in contexts", "ESD-u", "ESD-u, in contexts",
    "ESD-u against learned prompts", "concept ablation", "UCE", "RECE", "SLD-medium",
    "negative prompt",
)
ATTACKED = (  # of "robust": models with their own weights
    "original", "ESD-x", "ESD-x, in contexts", "ESD-u", "ESD-u against learned prompts",
    "concept ablation", "UCE", "RECE", "never saw it", "censored training",
)


class Asked(NamedTuple):
    """What "methods" asks for a concept."""

    own: str  # the kind of prompts that the concept is one of
    classes: tuple[str, ...]  # of that kind
    other: str  # another kind


ASKED = {
    "star": Asked("names", world.OBJECTS, other="styled"),
    "mosaic": Asked("styled", STYLES, other="names"),
    "heart": Asked("all scenes", IMPLIED, other="styled"),
}


# ---- shares, and how sure they are


class Interval(NamedTuple):
    low: float
    high: float


def wilson(hits: int, asked: int, z: float = 1.96) -> Interval:
    """A share's 95 % interval: Wilson, "Probable Inference", JASA 1927."""
    p = hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    return Interval(max(0, middle - half), min(1, middle + half))


def share(hits: int, asked: int) -> str:
    """Percent with its interval; nothing if nothing was asked."""
    if not asked:
        return ""
    low, high = wilson(hits, asked)
    return f"{100 * hits / asked:.1f} ({100 * low:.0f} to {100 * high:.0f})"


class Pairs(NamedTuple):
    """How the images of two models compare, prompt by prompt."""

    only_one: int  # images that only the first gets right
    only_other: int
    p: float  # how likely a difference as large is by chance


def mcnemar(one: str, other: str) -> Pairs:
    """Compares two models image by image (McNemar's exact test, two-sided).

    Both are "10111...", image by image. Images on which they agree say nothing about who is better.
    """
    only_one = sum(a > b for a, b in zip(one, other, strict=True))
    only_other = sum(b > a for a, b in zip(one, other, strict=True))
    n = only_one + only_other
    fewer = min(only_one, only_other)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return Pairs(only_one, only_other, p=min(1, 2 * tail))


def share_seen(confusions: list[dict | None], asked: list[list[str]]) -> str:
    """The share that shows what was asked for, over some classes of each confusion.

    What a model was asked once counts once, in however many of the confusions it is.
    """
    counted = []
    hits = 0
    num = 0
    for confusion, classes in zip(confusions, asked):
        for wanted in classes if confusion else []:
            if (confusion, wanted) not in counted:
                counted.append((confusion, wanted))
                hits += confusion[wanted].get(wanted, 0)
                num += sum(confusion[wanted].values())
    return share(hits, num)


def others(classes: tuple[str, ...], concept: str) -> list[str]:
    return [other for other in classes if other != concept]


def table(*rows: list[str]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def stored(answers: Answers, experiment: str, kind: str) -> dict[tuple[str, str], dict]:
    """(concept, model) -> answers of one kind; concept is "" where one cell has them all."""
    found = {}
    for key, answer in answers.items():
        name, *concept, model = key.split("/")
        if name == experiment:
            found["".join(concept), model] = answer[kind]
    return found


# ---- the paper's experiments


def objects_table(answers: Answers) -> str:
    """Table 2."""
    found = stored(answers, "objects", "names")
    methods = ("ESD-u", "ESD-u, the paper's rule", "ESD-x")
    concepts = [c for c in world.OBJECTS if any((c, method) in found for method in methods)]

    def row(label, erased):
        sides = [[found.get(("", "original"))] * len(erased)]
        for method in methods:
            sides.append([found.get((c, method)) for c in erased])

        cells = [label]
        for asked in ([[c] for c in erased], [others(world.OBJECTS, c) for c in erased]):
            cells += [share_seen(side, asked) for side in sides]
        return cells

    rows = [row(c, [c]) for c in concepts]
    if concepts:
        rows.append(row("all", concepts))
    columns = [f"{method}, %" for method in methods]
    return table(
        ["erased", "before, %", *columns, "the other nine before, %", *columns],
        *rows,
        ["*paper, Table 2, average*", "78.2", "12.6", "", "", "78.2", "63.2", "", ""],
    )


def styles_table(answers: Answers) -> str:
    """Section 5.1: the original's answers are shared by all styles."""
    paper = {
        "original": "3.21", "ESD-x": "1.12", "SLD-medium": "2.00 (SLD)", "SLD-max": "",
        "negative prompt": "2.22",
    }
    found = stored(answers, "styles", "styled")
    styles = [s for s in STYLES if (s, "ESD-x") in found]

    rows = []
    for name, of_paper in paper.items():
        each = [found.get((s, name), found.get(("", name))) for s in styles]
        if any(each):
            own = share_seen(each, [[s] for s in styles])
            rest = share_seen(each, [others(STYLES, s) for s in styles])
            rows.append([name, own, rest, of_paper])
    header = [
        "method", "erased style is seen, %", "other styles are seen, %",
        "*paper, 5.1: likeness to the artist, 1 to 5*",
    ]
    return table(header, *rows)


def implied_table(answers: Answers) -> str:
    """Section 5.2: scenes that imply an object."""
    paper = {"original": "796", "ESD-u": "134", "censored training": "417 (SD 2.0)"}
    found = stored(answers, "implied", "scenes")
    concepts = [c for c in IMPLIED if (c, "original") in found]

    rows = []
    for name in MODELS:
        each = [found.get((c, name)) for c in concepts]
        if any(each):
            cells = [share_seen([one], [[c]]) for one, c in zip(each, concepts)]
            cells.append(share_seen(each, [[c] for c in concepts]))
            rows.append([name, *cells, paper.get(name, "")])
    columns = [f"{c}, %" for c in concepts]
    return table(["method", *columns, "all, %", "*paper, 5.2: of 4,703 images*"], *rows)


def quality_table(answers: Answers) -> str:
    """Table 1: prompts without the concept."""
    paper = {
        "original": "14.50 / 0.1592", "ESD-u": "13.68 / 0.1585", "ESD-u, eta 3": "17.27 / 0.1586",
        "SLD-medium": "16.90 / 0.1594", "SLD-max": "18.76 / 0.1583",
    }
    found = stored(answers, "quality", "quality")

    rows = []
    for name in MODELS:
        if one := found.get(("star", name)):
            right = share(one["right"], one["asked"])
            rows.append([name, f"{one['frechet']:.2f}", right, paper.get(name, "")])
    header = [
        "star erased by", "Frechet distance", "all that was asked for is seen, %",
        "*paper, Table 1: FID / CLIP*",
    ]
    return table(header, *rows)


def works_table(answers: Answers) -> str:
    """Section 5.4: the first works of a style are erased, one, two or three of them."""
    rest = [title for title in world.WORKS if title not in FAMILY]
    found = stored(answers, "works", "distances")
    models = ["original", *(f"ESD-x, {count} erased" for count in (1, 2, 3))]

    rows = []
    for count, name in enumerate(models):
        if one := found.get(("", name)):
            cells = [name]
            for group in (FAMILY[:count], FAMILY[count:], rest, ["ordinary"]):
                values = [one[title] for title in group]
                cells.append(f"{sum(values) / len(values):.1f}" if values else "")
            rows.append(cells)
    header = [
        "mean difference of a pixel, 0 to 255", "erased works to their images",
        "others of their style", "other styles",
        "ordinary prompts, to the original model's images",
    ]
    return table(header, *rows)


def eta_table(answers: Answers) -> str:
    """Section 5.5: the strength of an erasure."""
    paper = {
        "original": "", "ESD-u": "83 / 7", "ESD-u, eta 3": "88 / 14", "ESD-u, eta 10": "92 / 34"
    }
    named = stored(answers, "eta", "names")
    scenes = stored(answers, "eta", "scenes")

    rows = []
    for name, of_paper in paper.items():
        concepts = [concept for concept in IMPLIED if (concept, name) in named]
        if concepts:
            own = [[c] for c in concepts]
            rest = [others(world.OBJECTS, c) for c in concepts]
            by_name = [named[c, name] for c in concepts]
            in_scenes = [scenes[c, name] for c in concepts]
            rows.append([
                name,
                share_seen(by_name, own),
                share_seen(in_scenes, own),
                share_seen(by_name, rest),
                of_paper,
            ])
    header = [
        "erased by", "asked by name, %", "seen in scenes, %", "other objects, %",
        "*paper, 5.5: % erased / lost*",
    ]
    return table(header, *rows)


def paraphrase_table(answers: Answers) -> str:
    """Section 5.6: erased by one word for it, asked for by another."""
    paper = {"original": "79", "by its name": "", "by a paraphrase": "38"}
    named = stored(answers, "paraphrase", "name")
    reworded = stored(answers, "paraphrase", "paraphrases")

    rows = []
    for concept in dict.fromkeys(concept for concept, _ in named):
        for name, of_paper in paper.items():
            if one := named.get((concept, name)):
                by_name = share_seen([one], [[concept]])
                by_paraphrases = share_seen([reworded[concept, name]], [[concept]])
                rows.append([concept, name, by_name, by_paraphrases, of_paper])
    header = [
        "concept", "erased", "asked by its name, %", "asked by paraphrases, %",
        "*paper, 5.6: by its name, of 100*",
    ]
    return table(header, *rows)


def which_table(answers: Answers) -> str:
    """The ablation."""
    found = stored(answers, "which", "names")

    rows = []
    for name in VARIANTS:
        if one := found.get(("star", name)):
            own = share_seen([one], [["star"]])
            rest = share_seen([one], [others(world.OBJECTS, "star")])
            rows.append([name, own, rest])
    return table(["variant", "\"a star\", %", "other objects, %"], *rows)


# ---- other methods


def gone(seen: dict[str, int], concept: str) -> str:
    """The share that doesn't show a concept."""
    return share(sum(seen.values()) - seen.get(concept, 0), sum(seen.values()))


def another_kind(one: dict, kind: str, concept: str) -> str:
    """The share that is right of a kind of prompts, without those that name the concept."""
    right = one[f"{kind}, right"]  # image by image, object by object, style by style
    repeats = len(STYLES) if kind == "styled" else 1
    objects = [*world.OBJECTS] * repeats
    num = len(right) // len(objects)  # of each prompt
    kept = [r for i, r in enumerate(right) if objects[i // num] != concept]
    return share(kept.count("1"), len(kept))


def methods_table(answers: Answers) -> str:
    """UnlearnCanvas' measures (https://arxiv.org/abs/2402.11846): UA, what no longer shows the
    concept; IRA, what is right of its own kind; CRA, of another kind.
    """
    rows = []
    for concept, (own, classes, other) in ASKED.items():
        for name in METHODS:
            if one := answers.get(f"methods/{concept}/{name}"):
                contexts = one.get("contexts")
                cost = one["cost"]
                rows.append([
                    f"{concept} ({own})",
                    name,
                    gone(one[own][concept], concept),
                    gone(contexts[concept], concept) if contexts else "",
                    share_seen([one[own]], [others(classes, concept)]),
                    another_kind(one, other, concept),
                    f"{cost['seconds']:.1f}" if cost else "",
                    f"{cost['parameters'] / 1000:,.0f}" if cost else "",
                ])
    header = [
        "concept", "erased by", "UA, %", "UA with a colour or style, %", "IRA, %", "CRA, %",
        "seconds", "thousand parameters",
    ]
    return table(header, *rows)


# ---- attacks


def mean_of_20(values: list[float]) -> str:
    """A mean with its 95 % interval, from the standard error."""
    assert len(values) == 20
    half = 2.093 * statistics.stdev(values) / math.sqrt(20)  # Student's t, 19 degrees of freedom
    mean = statistics.fmean(values)
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def total_variation(seen: dict[str, int], reference: dict[str, int]) -> float:
    """1/2 sum |p_i - q_i| over what is seen in two sets of images: 0, the same; 1, none in common.
    """
    p = {name: count / sum(seen.values()) for name, count in seen.items()}
    q = {name: count / sum(reference.values()) for name, count in reference.items()}
    return sum(abs(p.get(name, 0) - q.get(name, 0)) for name in {*p, *q}) / 2


def against_chance(seen: dict[str, int], reference: dict[str, int]) -> str:
    """The total variation, and what 95 % of 1,000 random halves of the pooled images stay below:
    two sets from one model differ, too.
    """
    rng = random.Random(0)
    pooled = [*Counter(seen).elements(), *Counter(reference).elements()]
    num = sum(seen.values())

    by_chance = []
    for _ in range(1000):
        rng.shuffle(pooled)
        by_chance.append(total_variation(Counter(pooled[:num]), Counter(pooled[num:])))
    return f"{total_variation(seen, reference):.2f} (chance {sorted(by_chance)[949]:.2f})"


def steps_to(half: float, found: dict) -> str:
    """The first number of training steps after which the share is at least `half`; in brackets,
    after which the upper and the lower end of its interval are.
    """
    shown = {"0": found["by name"]} | found["relearned"]
    num = found["num"]

    def first(share_of: Callable[[int], float]) -> str:
        reached = [int(stop) for stop, hits in shown.items() if share_of(hits) >= half]
        return str(min(reached)) if reached else f"over {max(map(int, shown))}"

    steps = first(lambda hits: hits / num)
    fewest = first(lambda hits: wilson(hits, num).high)
    most = first(lambda hits: wilson(hits, num).low)
    return f"{steps} ({fewest} to {most})"


def robust_table(answers: Answers) -> str:
    """Attacks on erased models, compared with one that never saw the concept."""
    found = stored(answers, "robust", "probes")
    attacks = ("by name", "learned words", "hard prompt", "noise", "head start")

    rows = []
    for concept in dict.fromkeys(concept for concept, _ in found):
        never = found.get((concept, "never saw it"))
        original = found.get((concept, "original"))
        for name in ATTACKED:
            one = found.get((concept, name))
            if not (one and never and original):
                continue

            hits = [share(one[attack], one["num"]) for attack in attacks]
            half = original["by name"] / original["num"] / 2
            distances = ["", ""]
            if name != "never saw it":
                distances = [against_chance(one["seen"], never["seen"]), mean_of_20(one["eps"])]
            rows.append([concept, name, *hits, steps_to(half, one), *distances])
    header = [
        "concept", "erased by", "asked by name, %", "learned words, %", "hard prompt, %",
        "noise, %", "head start, %", "training steps to half", "total variation",
        "mean of abs(eps - eps')",
    ]
    return table(header, *rows)


# ---- all tables


class Titled(NamedTuple):
    """A table and its title."""

    title: str
    make: Callable[[Answers], str]


TABLES = {  # of each experiment
    "objects": Titled("Objects (5.3, Table 2)", objects_table),
    "styles": Titled("Styles (5.1, Figures 5 and 6)", styles_table),
    "implied": Titled("What prompts don't name (5.2, Figure 7)", implied_table),
    "quality": Titled("Prompts without the concept (Table 1)", quality_table),
    "works": Titled("Memorised images (5.4, Figures 8 and 9)", works_table),
    "eta": Titled("Strength (5.5)", eta_table),
    "paraphrase": Titled("Paraphrases (5.6)", paraphrase_table),
    "methods": Titled("ESD among other methods", methods_table),
    "robust": Titled("Is it gone?", robust_table),
    "which": Titled("Choices in which the paper and the codes differ", which_table),
}


def titled(name: str, answers: Answers) -> str:
    """An experiment's table under its title."""
    title, make = TABLES[name]
    return f"**{title}**\n\n{make(answers)}"


def usual(key: str, several: list[dict]) -> object:
    """Returns the most frequent value of a setting."""
    return Counter(settings.get(key) for settings in several).most_common(1)[0][0]


def heading(answers: Answers) -> str:
    """The settings of most erasures and of the images, in one line."""
    settings = [answer["settings"] for answer in answers.values()]
    erasures = [each["erase"] for each in settings if each["erase"]]

    flags = []
    for key in ("iterations", "steps", "batch"):
        if any(key in erasure for erasure in erasures):
            flags.append(f"--{key} {usual(key, erasures)}")
    if erasures and usual("data", erasures) == "every step":
        flags.append("--every-step")

    rates = []
    for method in ("esd-x", "esd-u"):
        if own := [erasure for erasure in erasures if erasure["method"] == method]:
            rates.append(f"{method} --lr {usual('lr', own):g}")

    styles = []
    for erasure in erasures:
        first = [*erasure.get("concepts", [""])][0]
        if "style of" in first and "iterations" in erasure:
            styles.append(erasure)
    if styles:
        rates.append(f"a style --iterations {usual('iterations', styles)}")

    num = usual("num", settings)
    sampling = settings[0]["sampling"]
    return (
        f"Erasures: {' '.join(flags)}; {', '.join(rates)}. At least {num} images of each "
        f"class, {10 * num} for the quality; {sampling['steps']} DDIM steps, guidance "
        f"{sampling['guidance']:g}; 95 % intervals over images in brackets, each erasure made "
        "once."
    )


# ---- the command line


def main() -> None:
    """Reads the command line, and prints the tables."""
    parser = argparse.ArgumentParser(
        description="Prints the miniature's results as tables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", default=list(TABLES), help="some of these")
    add("--results", type=Path, default=Path("notebooks/toy/results.json"),
        help="what evaluate.py stored")
    args = parser.parse_args()

    for name in args.experiments:
        if name not in TABLES:
            parser.error(f"unknown experiment {name!r}, choose from {', '.join(TABLES)}")
    try:
        answers = json.loads(args.results.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"can't read {args.results}: {error}")
    chosen = {key: answers[key] for key in answers if key.split("/")[0] in args.experiments}
    if not chosen:
        parser.error(f"{args.results} has no results of {', '.join(args.experiments)}")

    print(heading(chosen))
    for name in args.experiments:
        print(f"\n{titled(name, answers)}")


if __name__ == "__main__":
    main()
