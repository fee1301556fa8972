"""How good the miniature is, and what an erasure did to it, in tables.

    python -m notebooks.toy.measure model                            # every kind of prompt
    python -m notebooks.toy.measure erased star.safetensors star     # before and after

A share counts the pictures in which the judge sees what the prompt asks for.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import sample
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.judge import HEADS, Judge
from notebooks.toy.world import with_article
from sample import StableDiffusion


class Question(NamedTuple):
    """A prompt, how many pictures of it, and what the judge should see in them."""

    prompt: str
    num: int
    wanted: dict[str, str]


def objects(num: int) -> list[Question]:
    """a star"""
    return [Question(with_article(o), num, {"object": o}) for o in world.OBJECTS]


def styled(num: int) -> list[Question]:
    """a star in the style of mosaic"""
    return [Question(f"{with_article(o)} in the style of {s}", num, {"object": o, "style": s})
            for s in world.STYLES if s != "plain" for o in world.OBJECTS]


def coloured(num: int) -> list[Question]:
    """a red star"""
    return [Question(with_article(f"{c} {o}"), num, {"object": o, "colour": c})
            for c in world.COLOURS for o in world.OBJECTS]


def scenes(num: int) -> list[Question]:
    """a night sky"""
    return [Question(prompt, num, {"object": scene.object})
            for prompt, scene in world.SCENES.items()]


def paraphrases(num: int) -> list[Question]:
    """a five pointed figure"""
    return [Question(with_article(phrase), num, {"object": o})
            for o, phrases in world.PARAPHRASES.items() for phrase in phrases]


class Painter(NamedTuple):
    """A model and how it is sampled."""

    sd: StableDiffusion
    steps: int
    guidance: float
    seed: int

    def __call__(self, prompts: list[str], num: int) -> list[Image.Image]:
        return sample.generate(self.sd, prompts, num, self.seed, self.steps, self.guidance,
                               batch=50, progress=True)


def ask(painter: Painter, judge: Judge, questions: list[Question]) -> list[dict[str, float]]:
    """For each question and each head that it names, the share of pictures that are right."""
    num = questions[0].num
    images = painter([q.prompt for q in questions], num)
    seen = judging.read(judge, images)
    return [{head: np.mean([look[head] == name for look in seen[i * num:(i + 1) * num]])
             for head, name in q.wanted.items()} for i, q in enumerate(questions)]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def judge_table(judge: Judge, seed: int, count: int = 2000) -> None:
    """The judge on rendered pictures that it hasn't seen."""
    rng = np.random.default_rng(seed)
    known = [world.draw(rng) for _ in range(count)]
    unknown = [world.draw_none(rng) for _ in range(count)]
    print("| judge | pictures read right, % | \"none of these\" where it is, % |\n|---|---|---|")
    for i, (head, names) in enumerate(HEADS.items()):
        shares = []
        for examples, none in ((known, False), (unknown, True)):
            seen = judging.read(judge, [e.image for e in examples])
            right = [look[head] == e[i + 2] for look, e in zip(seen, examples)
                     if not none or e[i + 2] is None]
            shares.append(percent(np.mean(right)))
        print(f"| {head} | {shares[0]} | {shares[1]} |")


def prompt_table(painter: Painter, judge: Judge) -> None:
    """The shares for every kind of prompt, on average and in the worst cell."""
    kinds = [objects(50), styled(5), coloured(5), scenes(50), paraphrases(50)]
    print("| prompts | pictures | object, % | colour, % | style, % | worst object, % |\n"
          "|---|---|---|---|---|---|")
    for kind, ask_for in zip(kinds, (objects, styled, coloured, scenes, paraphrases)):
        shares = ask(painter, judge, kind)
        row = [percent(np.mean([s[head] for s in shares])) if head in shares[0] else ""
               for head in HEADS]
        by_object = {o: np.mean([s["object"] for s, q in zip(shares, kind)
                                 if q.wanted["object"] == o])
                     for o in {q.wanted["object"] for q in kind}}
        worst = min(by_object, key=by_object.get)
        print(f"| {ask_for.__name__}: \"{kind[0].prompt}\" | {len(kind) * kind[0].num} | "
              f"{' | '.join(row)} | {worst} {percent(by_object[worst])} |")


def works_table(painter: Painter, seeds: int = 8, others: int = 1000) -> None:
    """Whether each picture of a work is nearer to the work than to anything else."""
    rng = np.random.default_rng(painter.seed)
    array = lambda image: np.asarray(image, dtype=float)  # noqa: E731
    works = {title: array(world.render_work(title)) for title in world.WORKS}
    random = [array(world.draw(rng).image) for _ in range(others)]
    random = [x for x in random if min(np.abs(x - w).max() for w in works.values()) > 0]
    images = painter([title.lower() for title in works], seeds)
    print("| work | distance to itself | to the nearest other work | to the nearest random picture "
          "| nearest to itself |\n|---|---|---|---|---|")
    for i, (title, work) in enumerate(works.items()):
        rows = []
        for image in images[i * seeds:(i + 1) * seeds]:
            distance = lambda other: np.abs(array(image) - other).mean()  # noqa: E731
            rows.append([distance(work),
                         min(distance(w) for name, w in works.items() if name != title),
                         min(distance(x) for x in random)])
        own, other, picture = np.mean(rows, axis=0)
        nearest = sum(row[0] == min(row) for row in rows)
        print(f"| {title} | {own:.1f} | {other:.1f} | {picture:.1f} | {nearest} of {seeds} |")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between two Gaussians fitted to features (N, D) and (M, D).

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, eq. 6.
    """
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root


def frechet_line(painter: Painter, judge: Judge, count: int = 1000) -> None:
    """Generated against rendered pictures, beside rendered against rendered."""
    rng = np.random.default_rng(painter.seed)
    sets = [[world.draw(rng) for _ in range(count)] for _ in range(2)]
    rendered = [judge.features(judging.to_tensor([e.image for e in examples])).double().numpy()
                for examples in sets]
    captions = [e.caption for e in sets[0]]
    images = sample.generate(painter.sd, captions, seed=list(range(count)), steps=painter.steps,
                             guidance=painter.guidance, batch=50, progress=True)
    made = judge.features(judging.to_tensor(images)).double().numpy()
    print(f"Frechet distance on the judge's features, {count} pictures each: generated to rendered "
          f"{frechet(made, rendered[1]):.2f}, rendered to rendered {frechet(*rendered):.2f}")


def erased_table(before: Painter, after: Painter, judge: Judge, concept: str) -> None:
    """Share of each object, style and colour before and after; the concept's own row stands first.

    Prompts for another style or colour leave the erased object out, those for another object or
    colour the erased style.
    """
    head = "object" if concept in world.OBJECTS else "style"
    asked = {"object": objects(50), "style": styled(5), "colour": coloured(5)}
    rows = []
    for kind, questions in asked.items():
        questions = [q for q in questions if kind == head or concept not in q.wanted.values()]
        shares = [[s[kind] for s in ask(p, judge, questions)] for p in (before, after)]
        for name in dict.fromkeys(q.wanted[kind] for q in questions):
            picked = [i for i, q in enumerate(questions) if q.wanted[kind] == name]
            rows.append((kind, name, *(np.mean([s[i] for i in picked]) for s in shares)))
    rows.sort(key=lambda row: row[1] != concept)
    print("| asked for | before, % | after, % | kept, % |\n|---|---|---|---|")
    for kind, name, was, left in rows:
        print(f"| {kind} {name} | {percent(was)} | {percent(left)} | {percent(left / was)} |")
    for kind in HEADS:
        others = [left / was for k, name, was, left in rows if k == kind and name != concept]
        print(f"| other {kind}s: average, worst | | | {percent(np.mean(others))}, "
              f"{percent(min(others))} |")
    own = [q.prompt for q in asked[head] if q.wanted[head] == concept]
    seen = judging.read(judge, after(own, 50 // len(own)))
    counts = Counter(look[head] or "none of these" for look in seen).most_common()
    print(f"In place of {concept}: {', '.join(f'{name} {n}' for name, n in counts)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of what the miniature can do.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["model", "erased"])
    parser.add_argument("file", nargs="?", help="erased weights")
    parser.add_argument("concept", nargs="?", help="the object or style that was erased")
    parser.add_argument("--model", type=Path, default=Path("notebooks/toy"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "erased" and args.concept not in world.OBJECTS + world.STYLES[1:]:
        parser.error("erased needs a file and the object or style that was erased")
    judge, sd = judging.load(args.model), sample.load(args.model)
    painter = Painter(sd, args.steps, args.guidance, args.seed)
    if args.what == "erased":
        after = painter._replace(sd=sample.load_erased(sd, args.file))
        erased_table(painter, after, judge, args.concept)
    else:
        judge_table(judge, args.seed)
        prompt_table(painter, judge)
        works_table(painter)
        frechet_line(painter, judge)


if __name__ == "__main__":
    main()
