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

from notebooks.toy import world

Answers = dict[str, dict]  # "experiment/concept/contender", or without concept -> what came out

STYLES = world.STYLES[1:]  # no words ask for plain
IMPLIED = tuple(dict.fromkeys(scene.object for scene in world.SCENES.values()))
FAMILY = [title for title, work in world.WORKS.items() if work.style == "mosaic"]
CONTENDERS = (  # of "implied" and "quality"
    "original", "ESD-u", "ESD-u, the paper's rule", "ESD-u, eta 3", "ESD-x", "SLD-weak",
    "SLD-medium", "SLD-strong", "SLD-max", "negative prompt", "censored training")
VARIANTS = (  # of "which"
    "x_t at every step of a way", "x_t by the edited model, as in the paper",
    "x_t by the frozen model", "learning rate falls to 0", "weights and Adam in bfloat16",
    "keys and values only", "ESD-u, its code's parameters", "ESD-u, the paper's rule")

METHODS = (  # of "methods"
    "original", "ESD-x", "ESD-x, in contexts", "ESD-u", "ESD-u, in contexts",
    "ESD-u against learned prompts", "concept ablation", "UCE", "RECE", "SLD-medium",
    "negative prompt")
ATTACKED = (  # of "robust": models with their own weights
    "original", "ESD-x", "ESD-x, in contexts", "ESD-u", "ESD-u against learned prompts",
    "concept ablation", "UCE", "RECE", "never saw it", "censored training")
ASKED = {  # of "methods": what is asked for a concept and its kind, and for another kind
    "star": ("names", world.OBJECTS, "styled"),
    "mosaic": ("styled", STYLES, "names"),
    "heart": ("all scenes", IMPLIED, "styled"),
}


def wilson(hits: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """A share's 95 % interval: Wilson, "Probable Inference", JASA 1927."""
    p = hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    return max(0, middle - half), min(1, middle + half)


def share(hits: int, asked: int) -> str:
    """Percent with its interval; nothing if nothing was asked."""
    if not asked:
        return ""
    low, high = wilson(hits, asked)
    return f"{100 * hits / asked:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def mcnemar(one: str, other: str) -> tuple[int, int, float]:
    """Images that only one contender gets right, and only the other; how likely a difference as
    large is by chance (McNemar's exact test, two-sided).

    Both are "10111...", image by image. Images on which they agree say nothing about who is better.
    """
    lost, won = (sum(a > b for a, b in zip(*pair, strict=True))
                 for pair in ((one, other), (other, one)))
    n, fewer = lost + won, min(lost, won)
    return lost, won, min(1, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def share_seen(confusions: list[dict | None], asked: list[list[str]]) -> str:
    """The share that shows what was asked for, over some classes of each confusion."""
    pairs = [(found, wanted) for found, classes in zip(confusions, asked) if found
             for wanted in classes]  # what a model was asked once also counts once
    rows = [(wanted, found[wanted]) for i, (found, wanted) in enumerate(pairs)
            if (found, wanted) not in pairs[:i]]
    return share(sum(row.get(wanted, 0) for wanted, row in rows),
                 sum(sum(row.values()) for _, row in rows))


def others(classes: tuple[str, ...], concept: str) -> list[str]:
    return [other for other in classes if other != concept]


def table(*rows: list[str]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def stored(answers: Answers, experiment: str, kind: str) -> dict[tuple[str, str], dict]:
    """(concept, contender) -> answers of one kind; concept is "" where one cell has them all."""
    found = {}
    for key, answer in answers.items():
        name, *concept, contender = key.split("/")
        if name == experiment:
            found["".join(concept), contender] = answer[kind]
    return found


def objects_table(answers: Answers) -> str:
    """Table 2."""
    found = stored(answers, "objects", "names")
    methods = ("ESD-u", "ESD-u, the paper's rule", "ESD-x")
    concepts = [c for c in world.OBJECTS if any((c, method) in found for method in methods)]

    def row(label, some):
        own, rest = [[c] for c in some], [others(world.OBJECTS, c) for c in some]
        sides = [[found.get(("", "original"))] * len(some)]
        sides += [[found.get((c, method)) for c in some] for method in methods]
        return [label, *(share_seen(side, asked) for asked in (own, rest) for side in sides)]

    rows = [row(c, [c]) for c in concepts] + ([row("all", concepts)] if concepts else [])
    columns = [f"{method}, %" for method in methods]
    return table(["erased", "before, %", *columns, "the other nine before, %", *columns], *rows,
                 ["*paper, Table 2, average*", "78.2", "12.6", "", "", "78.2", "63.2", "", ""])


def styles_table(answers: Answers) -> str:
    """Section 5.1: the original's answers are shared by all styles."""
    paper = {"original": "3.21", "ESD-x": "1.12", "SLD-medium": "2.00 (SLD)", "SLD-max": "",
             "negative prompt": "2.22"}
    found, rows = stored(answers, "styles", "styled"), []
    styles = [s for s in STYLES if (s, "ESD-x") in found]
    for name, of_paper in paper.items():
        each = [found.get((s, name), found.get(("", name))) for s in styles]
        if any(each):
            rows.append([name, share_seen(each, [[s] for s in styles]),
                         share_seen(each, [others(STYLES, s) for s in styles]), of_paper])
    return table(["method", "erased style is seen, %", "other styles are seen, %",
                  "*paper, 5.1: likeness to the artist, 1 to 5*"], *rows)


def implied_table(answers: Answers) -> str:
    """Section 5.2: scenes that imply an object."""
    paper = {"original": "796", "ESD-u": "134", "censored training": "417 (SD 2.0)"}
    found, rows = stored(answers, "implied", "scenes"), []
    concepts = [c for c in IMPLIED if (c, "original") in found]
    for name in CONTENDERS:
        each = [found.get((c, name)) for c in concepts]
        if any(each):
            rows.append([name, *(share_seen([one], [[c]]) for one, c in zip(each, concepts)),
                         share_seen(each, [[c] for c in concepts]), paper.get(name, "")])
    return table(["method", *(f"{c}, %" for c in concepts), "all, %",
                  "*paper, 5.2: of 4,703 images*"], *rows)


def quality_table(answers: Answers) -> str:
    """Table 1: prompts without the concept."""
    paper = {"original": "14.50 / 0.1592", "ESD-u": "13.68 / 0.1585", "ESD-u, eta 3":
             "17.27 / 0.1586", "SLD-medium": "16.90 / 0.1594", "SLD-max": "18.76 / 0.1583"}
    found, rows = stored(answers, "quality", "quality"), []
    for name in CONTENDERS:
        if one := found.get(("star", name)):
            rows.append([name, f"{one['frechet']:.2f}", share(one["right"], one["asked"]),
                         paper.get(name, "")])
    return table(["star erased by", "Frechet distance", "all that was asked for is seen, %",
                  "*paper, Table 1: FID / CLIP*"], *rows)


def works_table(answers: Answers) -> str:
    """Section 5.4: the first works of a style are erased, one, two or three of them."""
    rest = [title for title in world.WORKS if title not in FAMILY]
    found, rows = stored(answers, "works", "distances"), []
    for count, name in enumerate(["original", *(f"ESD-x, {i} erased" for i in (1, 2, 3))]):
        if one := found.get(("", name)):
            groups = [FAMILY[:count], FAMILY[count:], rest, ["ordinary"]]
            rows.append([name, *(f"{sum(one[title] for title in group) / len(group):.1f}"
                                 if group else "" for group in groups)])
    return table(["mean difference of a pixel, 0 to 255", "erased works to their images",
                  "others of their style", "other styles",
                  "ordinary prompts, to the original model's images"], *rows)


def eta_table(answers: Answers) -> str:
    """Section 5.5: the strength of an erasure."""
    paper = {"original": "", "ESD-u": "83 / 7", "ESD-u, eta 3": "88 / 14",
             "ESD-u, eta 10": "92 / 34"}
    rows = []
    named, scenes = (stored(answers, "eta", kind) for kind in ("names", "scenes"))
    for name, of_paper in paper.items():
        if some := [concept for concept in IMPLIED if (concept, name) in named]:
            own, rest = [[c] for c in some], [others(world.OBJECTS, c) for c in some]
            each = [named[c, name] for c in some]
            rows.append([name, share_seen(each, own),
                         share_seen([scenes[c, name] for c in some], own),
                         share_seen(each, rest), of_paper])
    return table(["erased by", "asked by name, %", "seen in scenes, %", "other objects, %",
                  "*paper, 5.5: % erased / lost*"], *rows)


def paraphrase_table(answers: Answers) -> str:
    """Section 5.6: erased by one word for it, asked for by another."""
    paper = {"original": "79", "by its name": "", "by a paraphrase": "38"}
    rows = []
    named, reworded = (stored(answers, "paraphrase", kind) for kind in ("name", "paraphrases"))
    for concept in dict.fromkeys(concept for concept, _ in named):
        for name, of_paper in paper.items():
            if one := named.get((concept, name)):
                rows.append([concept, name, share_seen([one], [[concept]]),
                             share_seen([reworded[concept, name]], [[concept]]), of_paper])
    return table(["concept", "erased", "asked by its name, %", "asked by paraphrases, %",
                  "*paper, 5.6: by its name, of 100*"], *rows)


def which_table(answers: Answers) -> str:
    """The ablation."""
    found, rows = stored(answers, "which", "names"), []
    for name in VARIANTS:
        if one := found.get(("star", name)):
            rows.append([name, share_seen([one], [["star"]]),
                         share_seen([one], [others(world.OBJECTS, "star")])])
    return table(["variant", "\"a star\", %", "other objects, %"], *rows)


def gone(seen: dict[str, int], concept: str) -> str:
    """The share that doesn't show a concept."""
    return share(sum(seen.values()) - seen.get(concept, 0), sum(seen.values()))


def another_kind(one: dict, kind: str, concept: str) -> str:
    """The share that is right of a kind of prompts, without those that name the concept."""
    right = one[f"{kind}, right"]  # image by image, object by object, style by style
    objects = [o for _ in (STYLES if kind == "styled" else [""]) for o in world.OBJECTS]
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
                contexts, cost = one.get("contexts"), one["cost"]
                rows.append([
                    f"{concept} ({own})", name, gone(one[own][concept], concept),
                    gone(contexts[concept], concept) if contexts else "",
                    share_seen([one[own]], [others(classes, concept)]),
                    another_kind(one, other, concept),
                    f"{cost['seconds']:.1f}" if cost else "",
                    f"{cost['parameters'] / 1000:,.0f}" if cost else ""])
    return table(["concept", "erased by", "UA, %", "UA with a colour or style, %", "IRA, %",
                  "CRA, %", "seconds", "thousand parameters"], *rows)


def mean_of_20(values: list[float]) -> str:
    """A mean with its 95 % interval, from the standard error."""
    assert len(values) == 20
    half = 2.093 * statistics.stdev(values) / math.sqrt(20)  # Student's t, 19 degrees of freedom
    mean = statistics.fmean(values)
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def total_variation(seen: dict[str, int], reference: dict[str, int]) -> float:
    """1/2 sum |p_i - q_i| over what is seen in two sets of images: 0, the same; 1, none in common.
    """
    p, q = ({name: n / sum(counts.values()) for name, n in counts.items()}
            for counts in (seen, reference))
    return sum(abs(p.get(name, 0) - q.get(name, 0)) for name in {*p, *q}) / 2


def against_chance(seen: dict[str, int], reference: dict[str, int]) -> str:
    """The total variation, and what 95 % of 1,000 random halves of the pooled images stay below:
    two sets from one model differ, too.
    """
    rng, pooled = random.Random(0), [*Counter(seen).elements(), *Counter(reference).elements()]
    several, num = [], sum(seen.values())
    for _ in range(1000):
        rng.shuffle(pooled)
        several.append(total_variation(Counter(pooled[:num]), Counter(pooled[num:])))
    return f"{total_variation(seen, reference):.2f} (chance {sorted(several)[949]:.2f})"


def steps_to(half: float, found: dict) -> str:
    """The first number of training steps after which the share is at least `half`; in brackets,
    after which the upper and the lower end of its interval are.
    """
    shown = {"0": found["by name"]} | found["relearned"]

    def first(share_of):
        reached = [int(stop) for stop, hits in shown.items()
                   if share_of(hits, found["num"]) >= half]
        return str(min(reached)) if reached else f"over {max(map(int, shown))}"

    low, high = (first(lambda hits, asked: wilson(hits, asked)[i]) for i in (1, 0))
    return f"{first(lambda hits, asked: hits / asked)} ({low} to {high})"


def robust_table(answers: Answers) -> str:
    """Attacks on erased models, compared with one that never saw the concept."""
    found, rows = stored(answers, "robust", "probes"), []
    for concept in dict.fromkeys(concept for concept, _ in found):
        never, original = found.get((concept, "never saw it")), found.get((concept, "original"))
        for name in ATTACKED:
            one = found.get((concept, name))
            if not (one and never and original):
                continue
            hits = (share(one[key], one["num"]) for key in
                    ("by name", "learned words", "hard prompt", "noise", "head start"))
            half = original["by name"] / original["num"] / 2
            far = ["", ""] if name == "never saw it" else [
                against_chance(one["seen"], never["seen"]), mean_of_20(one["eps"])]
            rows.append([concept, name, *hits, steps_to(half, one), *far])
    return table(["concept", "erased by", "asked by name, %", "learned words, %", "hard prompt, %",
                  "noise, %", "head start, %", "training steps to half", "total variation",
                  "mean of abs(eps - eps')"], *rows)


TABLES = {  # title and table of each experiment
    "objects": ("Objects (5.3, Table 2)", objects_table),
    "styles": ("Styles (5.1, Figures 5 and 6)", styles_table),
    "implied": ("What prompts don't name (5.2, Figure 7)", implied_table),
    "quality": ("Prompts without the concept (Table 1)", quality_table),
    "works": ("Memorised images (5.4, Figures 8 and 9)", works_table),
    "eta": ("Strength (5.5)", eta_table),
    "paraphrase": ("Paraphrases (5.6)", paraphrase_table),
    "methods": ("ESD among other methods", methods_table),
    "robust": ("Is it gone?", robust_table),
    "which": ("Choices in which the paper and the codes differ", which_table),
}


def titled(name: str, answers: Answers) -> str:
    """An experiment's table under its title."""
    title, make = TABLES[name]
    return f"**{title}**\n\n{make(answers)}"


def heading(answers: Answers) -> str:
    """The settings of most erasures and of the images, in one line."""
    made = [answer["settings"] for answer in answers.values()]
    erased = [settings["erase"] for settings in made if settings["erase"]]

    def usual(key, several):
        return Counter(settings.get(key) for settings in several).most_common(1)[0][0]

    flags = [f"--{key} {usual(key, erased)}" for key in ("iterations", "steps", "batch")
             if any(key in settings for settings in erased)]
    flags += ["--every-step"] if erased and usual("data", erased) == "every step" else []
    rates = [f"{method} --lr {usual('lr', own):g}" for method in ("esd-x", "esd-u")
             if (own := [settings for settings in erased if settings["method"] == method])]
    if styles := [each for each in erased if "style of" in [*each.get("concepts", [""])][0]
                  and "iterations" in each]:
        rates += [f"a style --iterations {usual('iterations', styles)}"]
    num, how = usual("num", made), made[0]["how"]
    return (f"Erasures: {' '.join(flags)}; {', '.join(rates)}. At least {num} images of each "
            f"class, {10 * num} for the quality; {how['steps']} DDIM steps, guidance "
            f"{how['guidance']:g}; 95 % intervals over images in brackets, each erasure made "
            "once.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the miniature's results as tables.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", default=list(TABLES),
                        help="some of these")
    parser.add_argument("--results", type=Path, default=Path("notebooks/toy/results.json"))
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
