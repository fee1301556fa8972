"""Tables of how good the miniature is, and of what erasures did to it.

    python -m notebooks.toy.measure model --steps 10     # every kind of prompt
    python -m notebooks.toy.measure erased star.safetensors --steps 10    # a row for each file

A share counts the images in which the judge sees what the prompt asks for.
"""

import argparse
import functools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors import safe_open

import erase
import sample
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.judge import HEADS, Judge
from notebooks.toy.world import with_article
from sample import StableDiffusion


FLAGS = Path(__file__).with_name("flags")
LR_ESD_U = 7e-5  # tunes more tensors than ESD-x, so smaller steps are enough


def flags() -> dict:
    """notebooks/toy/flags as keyword arguments of `erase.erase`."""
    given = dict(line.removeprefix("--").partition("=")[::2] for line in FLAGS.read_text().split())
    every_step = "every-step" in given
    settings = {name: json.loads(value) for name, value in given.items()
                if name not in ("model", "every-step")}
    return settings | {"data": functools.partial(erase.own_ways, every_step=every_step)}


class Question(NamedTuple):
    """A prompt, how many images of it, and what the judge should see in them."""

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
    """a photo of a night sky in winter: the prompts that were held out from training"""
    return [Question(world.scene_prompt(scene, setting, opening), num,
                     {"object": world.SCENES[scene].object})
            for scene, setting in world.HELD_OUT for opening in world.OPENINGS]


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
    """Returns for each question the share of images that are right, by each head that it names."""
    num = questions[0].num
    images = painter([q.prompt for q in questions], num)
    seen = judging.read(judge, images)
    return [{head: np.mean([look[head] == name for look in seen[i * num:(i + 1) * num]])
             for head, name in q.wanted.items()} for i, q in enumerate(questions)]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def judge_table(judge: Judge, seed: int, count: int = 2000) -> None:
    """The judge on rendered images that it hasn't seen."""
    rng = np.random.default_rng(seed)
    sets = [[world.draw(rng) for _ in range(count)],
            [world.draw_scene(*world.pick(rng, world.HELD_OUT), rng) for _ in range(count)],
            [world.draw_none(rng) for _ in range(count)]]
    looks = [judging.read(judge, [e.image for e in examples]) for examples in sets]
    print("| judge | images read right, % | held-out scenes, % "
          "| \"none of these\" where it is, % |\n|---|---|---|---|")
    for head in HEADS:
        known, scenes, none = ([(look[head], getattr(e, head)) for look, e in zip(*pair)]
                               for pair in zip(looks, sets))
        none = [pair for pair in none if pair[1] is None]
        shares = [percent(np.mean([a == b for a, b in some])) for some in (known, scenes, none)]
        print(f"| {head} | {' | '.join(shares)} |")


def prompt_table(painter: Painter, judge: Judge) -> None:
    """The shares for every kind of prompt, on average and in the worst cell."""
    print("| prompts | images | object, % | colour, % | style, % | worst object, % |\n"
          "|---|---|---|---|---|---|")
    for ask_for, num in ((objects, 50), (styled, 5), (coloured, 5), (scenes, 6),
                         (paraphrases, 50)):
        kind = ask_for(num)
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
    """Whether each image of a work is nearer to the work than to anything else."""
    rng = np.random.default_rng(painter.seed)

    def array(image):
        return np.asarray(image, dtype=float)

    works = {title: array(world.render_work(title)) for title in world.WORKS}
    random = [array(world.draw(rng).image) for _ in range(others)]
    random = [x for x in random if min(np.abs(x - w).max() for w in works.values()) > 0]
    images = painter([title.lower() for title in works], seeds)
    print("| work | distance to itself | to the nearest other work | to the nearest random image "
          "| nearest to itself |\n|---|---|---|---|---|")
    for i, (title, work) in enumerate(works.items()):
        rows = []
        for image in images[i * seeds:(i + 1) * seeds]:
            own, *others = [np.abs(array(image) - x).mean() for x in
                            (work, *(w for w in works.values() if w is not work), *random)]
            rows.append([own, min(others[:len(works) - 1]), min(others[len(works) - 1:])])
        own, other, random_image = np.mean(rows, axis=0)
        nearest = sum(row[0] == min(row) for row in rows)
        print(f"| {title} | {own:.1f} | {other:.1f} | {random_image:.1f} | {nearest} of {seeds} |")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between two Gaussians fitted to features (N, D) and (M, D).

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, eq. 6.
    """
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root


def frechet_line(painter: Painter, judge: Judge, count: int = 1000) -> None:
    """Generated against rendered images, and rendered against rendered ones for comparison."""
    rng = np.random.default_rng(painter.seed)
    sets = [[world.draw(rng) for _ in range(count)] for _ in range(2)]
    rendered = [judge.features(judging.to_tensor([e.image for e in examples])).double().numpy()
                for examples in sets]
    captions = [e.caption for e in sets[0]]
    images = sample.generate(painter.sd, captions, seed=list(range(count)), steps=painter.steps,
                             guidance=painter.guidance, batch=50, progress=True)
    made = judge.features(judging.to_tensor(images)).double().numpy()
    print(f"Frechet distance on the judge's features, {count} images each: generated to rendered "
          f"{frechet(made, rendered[1]):.2f}, rendered to rendered {frechet(*rendered):.2f}")


class Answers(NamedTuple):
    """What the judge saw in a model's images, (wanted, seen) for each: 50 of a class or more."""

    object: list[tuple[dict, dict]]  # "a star"
    style: list[tuple[dict, dict]]  # "a star in the style of mosaic"
    colour: list[tuple[dict, dict]]  # "a red star"

    def share(self, head: str, name: str, concept: str) -> float:
        """How often `name` is seen in the images that ask for it.

        Those that ask for the erased concept too don't count, unless it is `name` itself.
        """
        return np.mean([seen[head] == name for wanted, seen in getattr(self, head)
                        if wanted[head] == name
                        and (name == concept or concept not in wanted.values())])


def all_answers(painter: Painter, judge: Judge) -> Answers:
    """Draws 1050 images, each from a seed of its own, and has them judged."""
    kinds = []
    for questions in (objects(50), styled(5), coloured(5)):
        prompts = [q.prompt for q in questions for _ in range(q.num)]
        wanted = [q.wanted for q in questions for _ in range(q.num)]
        seeds = [painter.seed + i for i in range(len(prompts))]
        images = sample.generate(painter.sd, prompts, seed=seeds, steps=painter.steps,
                                 guidance=painter.guidance, batch=50, progress=True)
        kinds.append(list(zip(wanted, judging.read(judge, images))))
    return Answers(*kinds)


def saved_settings(file: Path) -> dict:
    """Returns the settings with which erase.py made a file. Raises ValueError for other files."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if "settings" not in metadata:
        raise ValueError(f"{file} doesn't say what was erased: erase.py didn't write it")
    return json.loads(metadata["settings"])


def settings_of(file: Path) -> dict:
    """Returns a file's settings, with the world's name of what it erased.

    Raises ValueError for a file that erase.py didn't make, and unless it erases one object or one
    style.
    """
    settings = saved_settings(file)
    words = " ".join(settings["concepts"]).split()
    names = [name for name in world.OBJECTS + world.STYLES[1:] if name in words]
    if len(names) != 1:
        raise ValueError(f"{file} erases {settings['concepts']}, not one object or one style")
    return settings | {"name": names[0]}


def erased_row(file: Path, before: Answers, after: Answers, settings: dict) -> str:
    """What is left of the concept, what was kept of the rest, and what is drawn instead.

    An erased object is counted a second time where a style or a colour is asked for, too.
    """
    concept = settings["name"]
    head = "object" if concept in world.OBJECTS else "style"
    names = {"object": world.OBJECTS, "style": world.STYLES[1:],  # no words ask for plain
             "colour": tuple(world.COLOURS)}
    kept = {h: {n: after.share(h, n, concept) / before.share(h, n, concept)
                for n in names[h] if n != concept} for h in names}
    each = kept["object"] | kept["style"] | kept["colour"]
    worst = min(each, key=each.get)
    place = Counter(seen[head] or "none of these" for wanted, seen in getattr(after, head)
                    if wanted[head] == concept and seen[head] != concept)
    still_seen = [seen["object"] == concept for wanted, seen in after.style + after.colour
                  if wanted["object"] == concept]
    left_there = percent(np.mean(still_seen)) if still_seen else ""
    others = " | ".join(percent(np.mean(list(kept[h].values()))) for h in names)
    return (f"| {file.stem} | {concept} | {settings['method']} | {settings['eta']:g} "
            f"| {settings['seed']} | {settings['iterations']} "
            f"| {percent(before.share(head, concept, concept))} "
            f"| {percent(after.share(head, concept, concept))} | {left_there} | {others} "
            f"| {worst} {percent(each[worst])} "
            f"| {', '.join(f'{n} {name}' for name, n in place.most_common(3))} |")


def erased_table(painter: Painter, judge: Judge, files: list[Path]) -> None:
    """A row for each file; what is kept is in % of what there was before."""
    print("| file | erased | method | eta | seed | iterations | before, % | left, % "
          "| left in styles and colours, % | objects kept, % | styles kept, % | colours kept, % "
          "| worst of all | most seen in its place, images |\n"
          f"|{'---|' * 14}")
    settings = [settings_of(file) for file in files]
    models = [sample.load_erased(painter.sd, file) for file in files]
    before = all_answers(painter, judge)
    for file, model, made_by in zip(files, models, settings):
        after = all_answers(painter._replace(sd=model), judge)
        print(erased_row(file, before, after, made_by), flush=True)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    judge, sd = judging.load(args.model), sample.load(args.model)
    painter = Painter(sd, args.steps, args.guidance, args.seed)
    if args.what == "erased":
        erased_table(painter, judge, args.files)
    else:
        judge_table(judge, args.seed)
        prompt_table(painter, judge)
        works_table(painter)
        frechet_line(painter, judge)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of what the miniature can do.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["model", "erased"], help="what is measured")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="erased weights that erase.py wrote")
    parser.add_argument("--model", type=Path, default=Path("notebooks/toy"),
                        help="the miniature, with its judge")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=1000, help="of all random numbers")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
