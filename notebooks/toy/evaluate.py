"""The paper's experiments in miniature, with its baselines: draws, counts and keeps the answers.

    python -m notebooks.toy.evaluate all                   # makes what isn't stored, prints all
    python -m notebooks.toy.evaluate styles eta            # two experiments
    python -m notebooks.toy.evaluate all --quick           # the same code with two images each

A cell is one model, how it is sampled, and what it is asked. Its answers are kept in --results
when it is done, its erased weights in --run; the same command goes on from there. Tables
(tables.py) go to the standard output, contact sheets next to the results. With a new --results
and --run, `all` takes about three hours on two cores.

Some models are miniatures whose U-Net was trained without a concept: `censored`, without the four
objects of `implied`, in 50 minutes on two cores, and three more with fewer steps, in half of that
time each.

    for name in censored without_{star,heart,mosaic}; do
        mkdir -p runs/$name/model
        cp -r notebooks/toy/{vae,text_encoder,tokenizer,scheduler,judge} runs/$name/model
    done
    python -m notebooks.toy.train unet --without moon heart star arrow --run runs/censored
    for name in star heart mosaic; do
        python -m notebooks.toy.train unet --without $name --run runs/without_$name \
            --unet-steps 4000
    done
"""

import argparse
import functools
import json
import math
import multiprocessing
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sample
from notebooks.toy import judge as judging
from notebooks.toy import measure, robust, tables, world
from notebooks.toy.models import (
    FLAGS,
    RETRAINED,
    SAMPLING,
    SEED,
    WITHOUT,
    Context,
    Model,
    model_named,
    open_context,
)
from notebooks.toy.tables import IMPLIED, STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion, UsageError


class Cell(NamedTuple):
    """What a model is asked."""

    experiment: str
    concept: str  # "" where one cell has all concepts
    model: Model
    ask: tuple[str, ...]  # keys of ASK

    @property
    def key(self) -> str:
        return "/".join(filter(None, (self.experiment, self.concept, self.model.name)))

    @property
    def compared_with(self) -> str:
        """The retrained model that the probes compare with."""
        return f"without_{self.concept}" if "probes" in self.ask else ""

    @property
    def retrained(self) -> set[str]:
        """The retrained models that its answers need."""
        return {self.model.retrained, self.compared_with} - {""}


# ---- what is asked, and how the answers are counted


def in_contexts(num: int) -> list[measure.Question]:
    """an orange star, a star in the style of stripes: what `contexts_of` leaves out"""
    questions = []
    for question in measure.coloured(num):
        if question.wanted["colour"] not in [*world.COLOURS][::2]:
            questions.append(question)
    for question in measure.styled(num):
        if question.wanted["style"] not in STYLES[::2]:
            questions.append(question)
    return questions


class Kind(NamedTuple):
    """A kind of prompts."""

    questions: Callable[[int], list[measure.Question]]
    head: str  # what the judge looks for
    one_concept: bool = False  # whether only prompts of the cell's concept are asked


KINDS = {
    "names": Kind(measure.objects, "object"),
    "styled": Kind(measure.styled, "style"),
    "name": Kind(measure.objects, "object", one_concept=True),
    "scenes": Kind(measure.scenes, "object", one_concept=True),
    "all scenes": Kind(measure.scenes, "object"),
    "contexts": Kind(in_contexts, "object"),
    "paraphrases": Kind(measure.paraphrases, "object", one_concept=True),
}


def confusion(name: str, context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """What was asked for -> what the judge saw -> how often; and, image by image, what is right.

    "1" is an image that shows what was asked for. The i-th image of all models has the same prompt
    and seed, so they can be compared in pairs. name: a key of KINDS.
    """
    kind = KINDS[name]
    questions = kind.questions(1)
    if kind.one_concept:
        questions = [each for each in questions if each.wanted["object"] == cell.concept]
    classes = {question.wanted[kind.head] for question in questions}
    num = math.ceil(context.num * len(classes) / len(questions))  # of each prompt

    prompts = []
    wanted = []
    for question in questions:
        prompts += [question.prompt] * num
        wanted += [question.wanted[kind.head]] * num
    images = context.draw(sd, cell.model.sampling, prompts)
    looks = judging.read(context.judge, images)
    seen = [look[kind.head] or "none of these" for look in looks]

    counts = {each: Counter() for each in wanted}
    for asked, shown in zip(wanted, seen):
        counts[asked][shown] += 1
    right = "".join(str(int(asked == shown)) for asked, shown in zip(wanted, seen))
    return {name: {each: dict(of) for each, of in counts.items()}, f"{name}, right": right}


def shows_caption(example: world.Example, look: dict[str, str | None]) -> bool | None:
    """Whether all that a caption names of object, colour and style is seen; None: no object."""
    caption = f" {example.caption} "  # "ring" isn't in "spring"
    nouns = [example.object, *world.PARAPHRASES.get(example.object, ())]
    if not any(f" {noun} " in caption for noun in nouns):
        return None

    asked = ["object"]
    if f" {example.colour} " in caption:
        asked.append("colour")
    if f"style of {example.style}" in caption:
        asked.append("style")
    return all(look[head] == getattr(example, head) for head in asked)


def quality(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Captions as in training, none of which names the concept; ten times as many as of a class.

    The Frechet distance on the judge's features to other rendered images, and how often all is
    right that a caption names of object, colour and style.
    """
    rng = np.random.default_rng(SEED)
    num = 10 * context.num
    held_out = [world.draw(rng, (cell.concept,)) for _ in range(num)]
    others = [world.draw(rng, (cell.concept,)) for _ in range(num)]

    captions = [example.caption for example in held_out]
    images = context.draw(sd, cell.model.sampling, captions)
    frechet = measure.frechet(
        measure.features(context.judge, images),
        measure.features(context.judge, [example.image for example in others]),
    )

    looks = judging.read(context.judge, images)
    right = [shows_caption(example, look) for example, look in zip(held_out, looks)]
    return {
        "quality": {
            "frechet": frechet,
            "right": right.count(True),
            "asked": len(right) - right.count(None),
        }
    }


def difference(images: list[Image.Image], others: list[Image.Image]) -> float:
    """The mean difference of two pixels, 0 to 255."""
    a = np.array([measure.pixels(image) for image in images])
    b = np.array([measure.pixels(image) for image in others])
    return float(np.abs(a - b).mean())


def distances(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """How far the images of each work are from it, and those of each object from the images that
    the original model draws from the same seeds.
    """
    num = math.ceil(context.num / len(world.WORKS))
    sampling = cell.model.sampling
    found = {}
    for title in world.WORKS:
        images = context.draw(sd, sampling, [title.lower()] * num)
        found[title] = difference(images, [world.render_work(title)] * num)

    prompts = [with_article(name) for name in world.OBJECTS]
    found["ordinary"] = difference(
        context.draw(sd, sampling, prompts), context.draw(context.sd, {}, prompts)
    )
    return {"distances": found}


def cost(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """What the erasure cost, if there is one."""
    return {"cost": context.cost(cell.model) if cell.model.erase else {}}


def probes(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Whether the concept can be brought back."""
    return {"probes": robust.probe(context, sd, cell.concept)}


ASK = {name: functools.partial(confusion, name) for name in KINDS}
ASK |= {"quality": quality, "distances": distances, "cost": cost, "probes": probes}


# ---- the experiments


class Experiment(NamedTuple):
    """Which models are compared, and what they are asked."""

    concepts: tuple[str, ...]
    models: tuple[str, ...]  # names in the tables
    ask: tuple[str, ...] | dict[str, tuple[str, ...]]  # of all concepts, or of each


def asked_of_methods() -> dict[str, tuple[str, ...]]:
    """What `methods` asks for each concept."""
    asked = {}
    for concept, (own, _, other) in tables.ASKED.items():
        is_object = concept in world.OBJECTS
        asked[concept] = (own, other, *["contexts"] * is_object, "cost")
    return asked


EXPERIMENTS = {
    "objects": Experiment(
        world.OBJECTS, ("ESD-u", "ESD-u, the paper's rule", "ESD-x"), ("names",)
    ),
    "styles": Experiment(
        STYLES, ("ESD-x", "SLD-medium", "SLD-max", "negative prompt"), ("styled",)
    ),
    "implied": Experiment(IMPLIED, tables.MODELS, ("scenes",)),
    "quality": Experiment(("star",), tables.MODELS, ("quality",)),
    "works": Experiment(
        ("",), ("original", "ESD-x, 1 erased", "ESD-x, 2 erased", "ESD-x, 3 erased"),
        ("distances",),
    ),
    "eta": Experiment(
        ("star", "moon", "heart", "arrow"),  # the star first: its sheet is in a quick run, too
        ("original", "ESD-u", "ESD-u, eta 3", "ESD-u, eta 10"),
        ("names", "scenes"),
    ),
    "paraphrase": Experiment(
        ("star", "moon", "arrow"), ("original", "by its name", "by a paraphrase"),
        ("name", "paraphrases"),
    ),
    "which": Experiment(("star",), tables.VARIANTS, ("names",)),
    "methods": Experiment((*tables.ASKED,), tables.METHODS, asked_of_methods()),
    "robust": Experiment(WITHOUT, tables.ATTACKED, ("probes",)),
}


def cells(name: str, few: slice = slice(None)) -> list[Cell]:
    """Returns the cells of an experiment, or of a few of its concepts."""
    concepts, models, ask = EXPERIMENTS[name]
    found = []
    if name in ("objects", "styles"):  # asked for all concepts
        found.append(Cell(name, "", model=model_named("original", ""), ask=ask))

    for concept in concepts[few]:
        asked = ask[concept] if isinstance(ask, dict) else ask
        for model in models:
            if model == "censored training" and concept not in IMPLIED:
                continue  # it saw all the others
            found.append(Cell(name, concept, model=model_named(model, concept), ask=asked))
    return found


# ---- contact sheets


def scenes_of(concept: str) -> list[str]:
    """Returns the first four held-out prompts that imply a concept."""
    prompts = []
    for scene, setting in world.HELD_OUT:
        if world.SCENES[scene].object == concept:
            prompts.append(world.scene_prompt(scene, setting))
    return prompts[:4]


STAR_PROMPTS = [
    "a star", "a red star", "a sheriff badge by the sea", "a sheriff badge in the forest",
    "a film award in the city", "a film award at a party", "a heart", "a moon",
]
SHEETS = {  # the models in an experiment's rows; none named: all
    "objects": ("original", "ESD-u"),
    "styles": ("original", "ESD-x"),
    "works": (),
    "eta": (),
    "implied": ("original", "ESD-u", "ESD-x", "SLD-medium", "negative prompt", "censored training"),
}


def columns(experiment: str, concept: str) -> list[str]:
    """Returns the prompts of a contact sheet's row that show a concept's erasure."""
    return {
        "objects": [with_article(name) for name in world.OBJECTS],
        "styles": [f"a heart in the style of {style}" for style in STYLES],
        "implied": scenes_of(concept) if concept else [],
        "works": [title.lower() for title in world.WORKS],
        "eta": STAR_PROMPTS if concept == "star" else [],
    }[experiment]


def share_seen(confusion: dict, wanted: str) -> str:
    """How often the judge saw what was asked for: "star 98 %"."""
    counts = confusion[wanted]
    return f"{wanted} {100 * counts.get(wanted, 0) / sum(counts.values()):.0f} %"


def row_of(cell: Cell) -> str:
    """Returns the row of a contact sheet that a cell's images are in."""
    if cell.experiment in ("objects", "styles"):  # as Figure 5
        return f"erased: {cell.concept or 'nothing'}"
    return cell.model.name


def labels_of(cell: Cell, prompts: list[str], answer: dict) -> list[str]:
    """Returns a label for each image: its prompt, or how often the judge sees in all images of the
    cell what was asked for.
    """
    if cell.experiment in ("objects", "styles"):
        counts = answer[cell.ask[0]]
        return [share_seen(counts, wanted) for wanted in counts]
    if cell.experiment == "implied":
        return [share_seen(answer["scenes"], cell.concept)] + [""] * (len(prompts) - 1)
    return prompts


def contact_sheet(
    context: Context, experiment: str, cells: list[Cell], results: tables.Answers
) -> Image.Image:
    """Draws an experiment's rows, with the same seeds in each."""
    blank = Image.new("RGB", (world.SIZE, world.SIZE), "white")
    labels = {}
    images = {}
    for cell in cells:
        prompts = columns(experiment, cell.concept)
        answer = results.get(cell.key)
        is_shown = cell.model.name in (SHEETS[experiment] or [cell.model.name])
        if prompts and answer and is_shown:
            row = row_of(cell)
            labels.setdefault(row, [row])
            images.setdefault(row, [blank])
            labels[row] += labels_of(cell, prompts, answer)
            images[row] += context.draw(context.load(cell.model), cell.model.sampling, prompts)

    longest = max(len(label) for several in labels.values() for label in several)
    rows = [(labels[row], images[row]) for row in labels]
    return sample.contact_sheet(rows, least=128 if longest < 20 else 192)


# ---- stored answers, and new ones


def settings_of(context: Context, cell: Cell) -> dict:
    """Returns all that a cell's answers depend on, as JSON gives it back."""
    settings = {
        "erase": context.settings(cell.model),
        "sampling": SAMPLING | cell.model.sampling,
        "seed": SEED,
        "num": context.num,
        "weights": context.weights.get(cell.model.retrained or "unet"),
        "judge": context.weights["judge"],
    }
    if cell.compared_with:
        settings["compared with"] = context.weights.get(cell.compared_with)
    return json.loads(json.dumps(settings))


def is_stored(context: Context, cell: Cell, results: dict) -> bool:
    """Whether the results have a cell's answers under the same settings.

    Retrained miniatures aren't shipped: where one is missing, its answers are taken as they are.
    """
    stored = results.get(cell.key, {}).get("settings", {})
    known = {}
    for key, value in settings_of(context, cell).items():
        known[key] = stored.get(key) if value is None else value
    return stored == known


class Setup(NamedTuple):
    """The arguments of `open_context`: what a process needs to make cells."""

    folder: Path
    run: Path
    num: int
    iterations: int


class Answered(NamedTuple):
    """A cell with its answers."""

    cell: Cell
    answers: dict


def answer(setup: Setup, cell: Cell) -> Answered:
    """Asks a cell's model everything."""
    context = open_context(*setup)
    sd = context.load(cell.model)
    answers = {"settings": settings_of(context, cell)}
    for name in cell.ask:
        answers |= ASK[name](context, sd, cell)
    return Answered(cell, answers)


def one_of_several() -> None:
    """Prepares a worker process: it uses one core and leaves Ctrl-C to its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def answers(setup: Setup, todo: list[Cell], processes: int) -> Iterator[Answered]:
    """Yields each cell with its answers, in the order in which they are done."""
    processes = min(processes, len(todo))
    if processes < 2:
        for cell in todo:
            yield answer(setup, cell)
        return

    with multiprocessing.get_context("spawn").Pool(processes, one_of_several) as pool:
        yield from pool.imap_unordered(functools.partial(answer, setup), todo)


# ---- the command line


def without_untrained(context: Context, todo: list[Cell]) -> list[Cell]:
    """Returns the cells that can be made, and says which retrained models the others need."""
    missing = set()
    possible = []
    for cell in todo:
        needed = cell.retrained - context.weights.keys()
        missing |= needed
        if not needed:
            possible.append(cell)

    if missing:
        folders = ", ".join(str(RETRAINED[name]) for name in sorted(missing))
        print(f"left out, as it isn't trained: {folders}; evaluate.py says how", file=sys.stderr)
    return possible


def print_experiment(
    context: Context, name: str, cells: list[Cell], results: dict, png: Path, changed: bool
) -> None:
    """Prints an experiment's table, and draws its contact sheet if that isn't up to date."""
    print(f"\n{tables.titled(name, results)}")
    if name in SHEETS and (changed or not png.exists()):
        sheet = contact_sheet(context, name, cells, results).quantize(256)
        sample.write_whole(png, lambda part: sheet.save(part, format="PNG"))
        print(f"\n{png}")


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.processes < 1:
        raise UsageError(f"processes is {args.processes}, choose 1 or more")
    chosen = list(EXPERIMENTS) if "all" in args.experiments else args.experiments
    folder = "runs/quick" if args.quick else "notebooks/toy"
    file = args.results or Path(folder, "results.json")
    few = slice(2) if args.quick else slice(None)
    num = 2 if args.quick else 50
    iterations = 2 if args.quick else FLAGS["iterations"]

    setup = Setup(args.model, args.run, num=num, iterations=iterations)
    context = open_context(*setup)
    results = sample.read_json(file) if file.exists() else {}
    sample.check_out(file, ".json")

    wanted = {name: cells(name, few) for name in chosen}
    all_wanted = [cell for several in wanted.values() for cell in several]
    todo = [cell for cell in all_wanted if not is_stored(context, cell, results)]
    todo = without_untrained(context, todo)
    with tqdm(total=len(todo), unit="cell") as bar:
        for cell, found in answers(setup, todo, args.processes):
            results[cell.key] = found
            text = json.dumps(results) + "\n"
            sample.write_whole(file, lambda part: part.write_text(text))
            bar.set_postfix_str(cell.key, refresh=False)
            bar.update()

    stored = {cell.key: results[cell.key] for cell in all_wanted if cell.key in results}
    if stored:
        print(tables.heading(stored))
    changed = {cell.experiment for cell in todo}
    for name, own_cells in wanted.items():
        png = file.with_name(f"{name}.png")
        print_experiment(
            context, name, own_cells, results=results, png=png, changed=name in changed
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="The paper's experiments in miniature.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="+", choices=["all", *EXPERIMENTS], metavar="EXPERIMENT",
        help=f"all, or some of {', '.join(EXPERIMENTS)}")
    add("--quick", action="store_true", help="two images and two iterations each, few concepts")
    add("--model", type=Path, default=Path("notebooks/toy/model"), help="the miniature, with its judge")
    add("--run", type=Path, default=Path("runs/evaluate"), help="erased weights are kept here")
    add("--processes", type=int, default=2, help="each takes a core and 2 GB of memory")
    add("--results", type=Path, help="a JSON file; notebooks/toy/results.json or, with --quick, "
                                     "runs/quick/results.json")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
