"""Tables of how good the miniature is, and of what erasures did to it.

    python -m notebooks.toy.measure model --steps 10     # every kind of prompt
    python -m notebooks.toy.measure erased star.safetensors --steps 10   # a row for each concept

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

import erase
import sample
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.judge import HEADS, Judge
from notebooks.toy.world import with_article
from sample import StableDiffusion, UsageError

FLAGS = Path(__file__).with_name("flags")
LR_ESD_U = 7e-5  # tunes more tensors than ESD-x, so smaller steps are enough


def flags() -> dict:
    """Returns notebooks/toy/flags as arguments of `erase.erase`; those of x_t are bound to data."""
    given = {}
    for flag in FLAGS.read_text().split():
        name, _, value = flag.removeprefix("--").partition("=")
        given[name] = value

    given.pop("model")
    every_step = given.pop("every-step", None) is not None
    settings = {name: json.loads(value) for name, value in given.items()}
    data = functools.partial(
        erase.x_t_from_model, steps=settings.pop("steps"), every_step=every_step
    )
    return settings | {"data": data}


# ---- questions


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
    questions = []
    for style in world.STYLES:
        if style == "plain":
            continue
        for o in world.OBJECTS:
            prompt = f"{with_article(o)} in the style of {style}"
            questions.append(Question(prompt, num, {"object": o, "style": style}))
    return questions


def coloured(num: int) -> list[Question]:
    """a red star"""
    questions = []
    for colour in world.COLOURS:
        for o in world.OBJECTS:
            prompt = with_article(f"{colour} {o}")
            questions.append(Question(prompt, num, {"object": o, "colour": colour}))
    return questions


def scenes(num: int) -> list[Question]:
    """a photo of a night sky in winter: the prompts that were held out from training"""
    questions = []
    for scene, setting in world.HELD_OUT:
        for opening in world.OPENINGS:
            prompt = world.scene_prompt(scene, setting, opening)
            questions.append(Question(prompt, num, {"object": world.SCENES[scene].object}))
    return questions


def paraphrases(num: int) -> list[Question]:
    """a five pointed figure"""
    questions = []
    for o, phrases in world.PARAPHRASES.items():
        questions += [Question(with_article(phrase), num, {"object": o}) for phrase in phrases]
    return questions


class Sampler(NamedTuple):
    """A model and how it is sampled."""

    sd: StableDiffusion
    steps: int
    guidance: float
    seed: int

    def draw(
        self, prompts: list[str], num: int = 1, seeds: list[int] | None = None
    ) -> list[Image.Image]:
        """Returns `num` images of each prompt. seeds: one for each prompt, or all have the same."""
        return sample.generate(
            self.sd, prompts, num=num, seed=seeds or self.seed, steps=self.steps,
            guidance=self.guidance, batch=50, progress=True,
        )


def shares(
    sampler: Sampler, judge: Judge, questions: list[Question]
) -> list[dict[str, float]]:
    """Returns for each question the share of images that are right, by each head that it names."""
    num = questions[0].num
    images = sampler.draw([question.prompt for question in questions], num)
    looks = judging.read(judge, images)

    found = []
    for i, question in enumerate(questions):
        own = looks[i * num : (i + 1) * num]
        found.append({
            head: np.mean([look[head] == name for look in own])
            for head, name in question.wanted.items()
        })
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


# ---- how good the model and its judge are


class Reading(NamedTuple):
    """A rendered image, and what the judge sees in it, by head."""

    example: world.Example
    seen: dict[str, str | None]

    def is_right(self, head: str) -> bool:
        return self.seen[head] == getattr(self.example, head)


def readings(judge: Judge, examples: list[world.Example]) -> list[Reading]:
    """Has the judge read rendered images."""
    looks = judging.read(judge, [example.image for example in examples])
    return [Reading(*pair) for pair in zip(examples, looks)]


def judge_table(judge: Judge, seed: int, count: int = 2000) -> None:
    """Prints how the judge reads rendered images that it hasn't seen."""
    rng = np.random.default_rng(seed)
    known = [world.draw(rng) for _ in range(count)]
    scenes = [world.draw_scene(*world.pick(rng, world.HELD_OUT), rng) for _ in range(count)]
    nothing = [world.draw_none(rng) for _ in range(count)]
    sets = [readings(judge, examples) for examples in (known, scenes, nothing)]

    print(
        "| judge | images read right, % | held-out scenes, % "
        "| \"none of these\" where it is, % |\n|---|---|---|---|"
    )
    for head in HEADS:
        none = [each for each in sets[2] if getattr(each.example, head) is None]
        cells = []
        for several in (sets[0], sets[1], none):
            cells.append(percent(np.mean([each.is_right(head) for each in several])))
        print(f"| {head} | {' | '.join(cells)} |")


def prompt_table(sampler: Sampler, judge: Judge) -> None:
    """Prints the shares for every kind of prompt, on average and in the worst cell."""
    print(
        "| prompts | images | object, % | colour, % | style, % | worst object, % |\n"
        "|---|---|---|---|---|---|"
    )
    numbers = {objects: 50, styled: 5, coloured: 5, scenes: 6, paraphrases: 50}
    for kind, num in numbers.items():
        questions = kind(num)
        found = shares(sampler, judge, questions)

        cells = []
        for head in HEADS:
            asked = head in found[0]
            cells.append(percent(np.mean([each[head] for each in found])) if asked else "")

        by_object = {}
        for question, each in zip(questions, found):
            by_object.setdefault(question.wanted["object"], []).append(each["object"])
        means = {name: np.mean(several) for name, several in by_object.items()}
        worst = min(means, key=means.get)

        print(
            f"| {kind.__name__}: \"{questions[0].prompt}\" | {len(questions) * num} | "
            f"{' | '.join(cells)} | {worst} {percent(means[worst])} |"
        )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


class Distances(NamedTuple):
    """The mean difference of a pixel, 0 to 255, from an image of a work to other images."""

    own: float  # to the work
    other: float  # to the nearest other work
    random: float  # to the nearest random image


def works_table(sampler: Sampler, seeds: int = 8, others: int = 1000) -> None:
    """Prints whether each image of a work is nearer to the work than to anything else."""
    rng = np.random.default_rng(sampler.seed)
    works = {title: pixels(world.render_work(title)) for title in world.WORKS}
    random = []
    for _ in range(others):
        example = world.draw(rng)
        if example.work is None:
            random.append(pixels(example.image))
    images = sampler.draw([title.lower() for title in works], seeds)

    print(
        "| work | distance to itself | to the nearest other work | to the nearest random image "
        "| nearest to itself |\n|---|---|---|---|---|"
    )
    for i, (title, work) in enumerate(works.items()):
        rest = [other for other in works.values() if other is not work]
        rows = []
        for image in images[i * seeds : (i + 1) * seeds]:
            own, other, nearest = (
                min(np.abs(pixels(image) - x).mean() for x in several)
                for several in ([work], rest, random)
            )
            rows.append(Distances(own, other, nearest))

        own, other, nearest = np.mean(rows, axis=0)
        hits = sum(row.own == min(row) for row in rows)
        print(f"| {title} | {own:.1f} | {other:.1f} | {nearest:.1f} | {hits} of {seeds} |")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between two Gaussians fitted to features (N, D) and (M, D).

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, eq. 6.
    """
    c_a = np.cov(a.T)
    c_b = np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root


def features(judge: Judge, images: list[Image.Image]) -> np.ndarray:
    """Returns the judge's features of images, (N, 96)."""
    return judge.features(judging.to_tensor(images)).double().numpy()


def frechet_line(sampler: Sampler, judge: Judge, count: int = 1000) -> None:
    """Prints how far generated images are from rendered ones, and these from each other."""
    rng = np.random.default_rng(sampler.seed)
    examples = [world.draw(rng) for _ in range(count)]
    others = [world.draw(rng) for _ in range(count)]
    rendered = features(judge, [example.image for example in examples])
    rendered_too = features(judge, [example.image for example in others])

    captions = [example.caption for example in examples]
    generated = features(judge, sampler.draw(captions, seeds=[*range(count)]))
    print(
        f"Frechet distance on the judge's features, {count} images each: generated to rendered "
        f"{frechet(generated, rendered_too):.2f}, rendered to rendered "
        f"{frechet(rendered, rendered_too):.2f}"
    )


# ---- what an erasure did


class Look(NamedTuple):
    """What a prompt asks for, and what the judge sees in one image of it, by head."""

    wanted: dict[str, str]
    seen: dict[str, str | None]


class Answers(NamedTuple):
    """What the judge saw in a model's images: 50 of a class or more."""

    object: list[Look]  # "a star"
    style: list[Look]  # "a star in the style of mosaic"
    colour: list[Look]  # "a red star"

    def share(self, head: str, name: str, erased: list[str]) -> float:
        """How often `name` is seen in the images that ask for it.

        Those that also ask for something else that was erased don't count.
        """
        others = {*erased} - {name}
        hits = []
        for wanted, seen in getattr(self, head):
            if wanted[head] == name and others.isdisjoint(wanted.values()):
                hits.append(seen[head] == name)
        return np.mean(hits)


def all_answers(sampler: Sampler, judge: Judge) -> Answers:
    """Draws 1050 images, each from a seed of its own, and has them judged."""
    answers = []
    for questions in (objects(50), styled(5), coloured(5)):
        prompts = []
        wanted = []
        for question in questions:
            prompts += [question.prompt] * question.num
            wanted += [question.wanted] * question.num

        seeds = [sampler.seed + i for i in range(len(prompts))]
        seen = judging.read(judge, sampler.draw(prompts, seeds=seeds))
        answers.append([Look(*pair) for pair in zip(wanted, seen)])
    return Answers(*answers)


def name_of(concept: str) -> str:
    """Returns the world's name of what a prompt erases. Raises UsageError if that isn't one."""
    names = [name for name in world.OBJECTS + world.STYLES[1:] if name in concept.split()]
    if len(names) != 1:
        raise UsageError(f"{concept!r} isn't one object or one style of the miniature")
    return names[0]


def settings_of(file: Path, concepts: list[str] | None = None) -> dict:
    """Returns the settings saved in a file and, as `names`, the world's names of what it erases.

    concepts: prompts to use instead of the file's own. Raises UsageError if they are needed: the
    file has none, or it was made from an erased model, of which it has only the path.
    """
    _, metadata = sample.read_tensors(file)
    settings = json.loads(metadata.get("settings", "{}"))
    if metadata.get("erase_concept"):  # the official code's metadata
        settings = {
            "concepts": metadata["erase_concept"].split(", "),
            "method": metadata.get("train_method", ""),
        }

    if not concepts and settings.get("erased"):
        raise UsageError(
            f"{file} was made from an erased model: name all that is erased, with --concept"
        )
    concepts = concepts or settings.get("concepts")
    if not concepts:
        raise UsageError(f"{file} doesn't say what it erases: add --concept NAME")
    if isinstance(concepts, str):
        concepts = [concepts]
    return settings | {"names": [name_of(concept) for concept in concepts]}


NAMES = {  # that prompts ask for by each head; no words ask for plain
    "object": world.OBJECTS,
    "style": world.STYLES[1:],
    "colour": tuple(world.COLOURS),
}


def left_in_contexts(after: Answers, concept: str) -> str:
    """Returns how often an erased object is seen where a style or a colour is asked for, too."""
    hits = []
    for wanted, seen in after.style + after.colour:
        if wanted["object"] == concept:
            hits.append(seen["object"] == concept)
    return percent(np.mean(hits)) if hits else ""


def seen_instead(after: Answers, head: str, concept: str) -> str:
    """Returns what the judge sees most often in place of the concept, and in how many images."""
    instead = Counter()
    for wanted, seen in getattr(after, head):
        if wanted[head] == concept and seen[head] != concept:
            instead[seen[head] or "none of these"] += 1
    return ", ".join(f"{count} {name}" for name, count in instead.most_common(3))


def erased_row(
    file: Path, before: Answers, after: Answers, settings: dict, concept: str
) -> str:
    """Returns what is left of a concept, what is kept of the rest, and what is drawn instead.

    An erased object is counted a second time where a style or a colour is asked for, too.
    Settings that the file doesn't have are empty cells.
    """
    erased = settings["names"]
    kept = {}
    means = []
    for head, names in NAMES.items():
        of_head = {}
        for name in names:
            if name not in erased:
                of_head[name] = after.share(head, name, erased) / before.share(head, name, erased)
        kept |= of_head
        means.append(percent(np.mean([*of_head.values()])))
    worst = min(kept, key=kept.get)

    head = "object" if concept in world.OBJECTS else "style"
    eta = settings.get("eta", "")
    cells = [
        file.stem,
        concept,
        settings.get("method", ""),
        f"{eta:g}" if eta != "" else "",
        settings.get("seed", ""),
        settings.get("iterations", ""),
        percent(before.share(head, concept, erased)),
        percent(after.share(head, concept, erased)),
        left_in_contexts(after, concept),
        *means,
        f"{worst} {percent(kept[worst])}",
        seen_instead(after, head, concept),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def erased_table(
    sampler: Sampler, judge: Judge, files: list[Path], concepts: list[str]
) -> None:
    """Prints a row for each concept of each file; what is kept is in % of what there was before.

    concepts: what all files erase, if they don't say it.
    """
    settings = [settings_of(file, concepts) for file in files]
    print(
        "| file | erased | method | eta | seed | iterations | before, % | left, % "
        "| left in styles and colours, % | objects kept, % | styles kept, % | colours kept, % "
        "| worst of all | most seen in its place, images |\n"
        f"|{'---|' * 14}"
    )
    models = [sample.load_erased(sampler.sd, file) for file in files]
    before = all_answers(sampler, judge)
    for file, sd, made_with in zip(files, models, settings):
        after = all_answers(sampler._replace(sd=sd), judge)
        for concept in made_with["names"]:
            print(erased_row(file, before, after, made_with, concept), flush=True)


# ---- the command line


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    judge = judging.load(args.model)
    sd = sample.load(args.model)
    sampler = Sampler(sd, args.steps, guidance=args.guidance, seed=args.seed)
    if args.what == "erased":
        erased_table(sampler, judge, args.files, args.concept)
    else:
        judge_table(judge, args.seed)
        prompt_table(sampler, judge)
        works_table(sampler)
        frechet_line(sampler, judge)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Tables of what the miniature can do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["model", "erased"], help="what is measured")
    add("files", nargs="*", type=Path, metavar="FILE", help="erased weights that erase.py wrote")
    add("--concept", nargs="+", action="extend", metavar="NAME",
        help="all that the files erase, if they don't say it")
    add("--model", type=Path, default=Path("notebooks/toy/model"), help="the miniature, with its judge")
    add("--steps", type=int, default=20, help="DDIM steps")
    add("--guidance", type=float, default=5.0, help="guidance scale")
    add("--seed", type=int, default=1000, help="of all random numbers")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
