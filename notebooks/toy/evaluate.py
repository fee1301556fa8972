"""The paper's experiments in miniature, with its baselines: draws, counts and keeps the answers.

    python -m notebooks.toy.evaluate all                   # makes what isn't stored, prints all
    python -m notebooks.toy.evaluate styles eta            # two experiments
    python -m notebooks.toy.evaluate all --quick           # the same code with two images each

A cell is one contender (a model, and how it is sampled) and what it is asked. Its answers are
kept in --results when it is done, its erased weights in --run; the same command goes on from
there. Tables (tables.py) go to the standard output, contact sheets next to the results. With a
new --results and --run, `all` takes about three hours on two cores.

Some contenders are miniatures whose U-Net was trained without a concept: `censored`, without the
four objects of `implied`, in 50 minutes on two cores, and three more with fewer steps, in half of
that time each.

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
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sample
from notebooks.toy import judge as judging
from notebooks.toy import measure, robust, tables, world
from notebooks.toy.contenders import (FLAGS, RETRAINED, SAMPLING, SEED, WITHOUT, Contender, Studio,
                                      contender, open_studio)
from notebooks.toy.tables import IMPLIED, STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

# ---- what is asked, and how the answers are counted ----

def in_contexts(num: int) -> list[measure.Question]:
    """an orange star, a star in the style of stripes: what `contexts_of` leaves out"""
    known = [list(world.COLOURS)[::2], STYLES[::2]]
    return [q for head, some, questions in zip(("colour", "style"), known, (
                measure.coloured(num), measure.styled(num)))
            for q in questions if q.wanted[head] not in some]


KINDS = {  # of prompts: questions, what the judge looks for, whether they are of one concept
    "names": (measure.objects, "object", False), "styled": (measure.styled, "style", False),
    "name": (measure.objects, "object", True), "scenes": (measure.scenes, "object", True),
    "all scenes": (measure.scenes, "object", False), "contexts": (in_contexts, "object", False),
    "paraphrases": (measure.paraphrases, "object", True),
}


def confusion(kind: str, studio: Studio, sd: StableDiffusion, cell: "Cell") -> dict:
    """What was asked for -> what the judge saw -> how often; and, image by image, what is right.

    "1" is an image that shows what was asked for. The i-th image of all contenders has the same
    prompt and seed, so they can be compared in pairs.
    """
    ask, head, alone = KINDS[kind]
    questions = [q for q in ask(1) if not alone or q.wanted["object"] == cell.concept]
    classes = {q.wanted[head] for q in questions}
    num = math.ceil(studio.num * len(classes) / len(questions))  # of each prompt
    prompts = [q.prompt for q in questions for _ in range(num)]
    asked = [q.wanted[head] for q in questions for _ in range(num)]
    looks = judging.read(studio.judge, studio.draw(sd, cell.contender.how, prompts))
    pairs = list(zip(asked, (look[head] or "none of these" for look in looks)))
    seen = {name: dict(Counter(b for a, b in pairs if a == name)) for name in dict.fromkeys(asked)}
    return {kind: seen, f"{kind}, right": "".join(str(int(a == b)) for a, b in pairs)}


def quality(studio: Studio, sd: StableDiffusion, cell: "Cell") -> dict:
    """Captions as in training, none of which names the concept; ten times as many as of a class.

    The Frechet distance on the judge's features to other rendered images, and how often all is
    right that a caption names of object, colour and style.
    """
    rng = np.random.default_rng(SEED)
    num, without = 10 * studio.num, (cell.concept,)
    held_out, second_set = ([world.draw(rng, without) for _ in range(num)] for _ in range(2))
    images = studio.draw(sd, cell.contender.how, [example.caption for example in held_out])
    features = [studio.judge.features(judging.to_tensor(some)).double().numpy()
                for some in (images, [example.image for example in second_set])]
    right = []
    for example, look in zip(held_out, judging.read(studio.judge, images)):
        words = [example.object, *world.PARAPHRASES.get(example.object, ())]
        caption = f" {example.caption} "  # "ring" isn't in "spring"
        asked = {"object": any(f" {word} " in caption for word in words),
                 "colour": f" {example.colour} " in caption,
                 "style": f"style of {example.style}" in caption}
        if asked["object"]:
            right.append(all(look[head] == getattr(example, head) for head in asked if asked[head]))
    return {"quality": {"frechet": measure.frechet(*features), "right": sum(right),
                        "asked": len(right)}}


def difference(images: list[Image.Image], others: list[Image.Image]) -> float:
    """The mean difference of two pixels, 0 to 255."""
    a, b = (np.array([np.asarray(image, dtype=float) for image in some])
            for some in (images, others))
    return float(np.abs(a - b).mean())


def distances(studio: Studio, sd: StableDiffusion, cell: "Cell") -> dict:
    """How far the images of each work are from it, and those of each object from the images that
    the original model draws from the same seeds.
    """
    each = math.ceil(studio.num / len(world.WORKS))
    how = cell.contender.how
    found = {title: difference(studio.draw(sd, how, [title.lower()] * each),
                               [world.render_work(title)] * each) for title in world.WORKS}
    ordinary = [with_article(object) for object in world.OBJECTS]
    found["ordinary"] = difference(studio.draw(sd, how, ordinary),
                                   studio.draw(studio.sd, {}, ordinary))
    return {"distances": found}


def cost(studio: Studio, sd: StableDiffusion, cell: "Cell") -> dict:
    """What the erasure cost, if there is one."""
    return {"cost": studio.cost(cell.contender) if cell.contender.erase else {}}


def probes(studio: Studio, sd: StableDiffusion, cell: "Cell") -> dict:
    """Whether the concept can be brought back."""
    return {"probes": robust.probe(studio, sd, cell.concept)}


ASK = {kind: functools.partial(confusion, kind) for kind in KINDS} | {
    "quality": quality, "distances": distances, "cost": cost, "probes": probes}


# ---- the experiments ----

class Cell(NamedTuple):
    """What a contender is asked."""

    experiment: str
    concept: str  # "" where one cell has all concepts
    contender: Contender
    ask: tuple[str, ...]  # keys of ASK

    @property
    def key(self) -> str:
        return "/".join(filter(None, (self.experiment, self.concept, self.contender.name)))

    @property
    def compared_with(self) -> str:
        """The retrained model that the probes compare with."""
        return f"without_{self.concept}" if "probes" in self.ask else ""


EXPERIMENTS = {  # concepts, contenders, and what they are asked, of all concepts or of each
    "objects": (world.OBJECTS, ("ESD-u", "ESD-u, the paper's rule", "ESD-x"), ("names",)),
    "styles": (STYLES, ("ESD-x", "SLD-medium", "SLD-max", "negative prompt"), ("styled",)),
    "implied": (IMPLIED, tables.CONTENDERS, ("scenes",)),
    "quality": (("star",), tables.CONTENDERS, ("quality",)),
    "works": (("",), ("original", *(f"ESD-x, {count} erased" for count in (1, 2, 3))),
              ("distances",)),
    "eta": (("star", "moon", "heart", "arrow"),  # the star first: its sheet is in a quick run, too
            ("original", "ESD-u", "ESD-u, eta 3", "ESD-u, eta 10"), ("names", "scenes")),
    "paraphrase": (("star", "moon", "arrow"), ("original", "by its name", "by a paraphrase"),
                   ("name", "paraphrases")),
    "which": (("star",), tables.VARIANTS, ("names",)),
    "methods": (tuple(tables.ASKED), tables.METHODS, {
        concept: (own, other, *["contexts"] * (concept in world.OBJECTS), "cost")
        for concept, (own, _, other) in tables.ASKED.items()}),
    "robust": (WITHOUT, tables.ATTACKED, ("probes",)),
}


def cells(experiment: str, few: slice = slice(None)) -> list[Cell]:
    """The cells of an experiment, or of a few of its concepts."""
    concepts, contenders, ask = EXPERIMENTS[experiment]
    shared = [Cell(experiment, "", contender("original", ""), ask)]  # asked for all concepts
    return (shared if experiment in ("objects", "styles") else []) + [
        Cell(experiment, concept, contender(name, concept),
             ask[concept] if isinstance(ask, dict) else ask)
        for concept in concepts[few] for name in contenders
        if name != "censored training" or concept in IMPLIED]  # it saw all the others


# ---- contact sheets ----

def scenes_of(concept: str) -> list[str]:
    """The first four held-out prompts that imply a concept."""
    return [world.scene_prompt(*place) for place in world.HELD_OUT
            if world.SCENES[place[0]].object == concept][:4]


def columns(experiment: str, concept: str) -> list[str]:
    """The prompts of a contact sheet's row that show a concept's erasure."""
    star = ["a star", "a red star", "a sheriff badge by the sea", "a sheriff badge in the forest",
            "a film award in the city", "a film award at a party", "a heart", "a moon"]
    return {"objects": [with_article(name) for name in world.OBJECTS],
            "styles": [f"a heart in the style of {style}" for style in STYLES],
            "implied": scenes_of(concept) if concept else [],
            "works": [title.lower() for title in world.WORKS],
            "eta": star if concept == "star" else []}[experiment]


SHEETS = {  # the contenders in an experiment's rows; none named: all
    "objects": ("original", "ESD-u"), "styles": ("original", "ESD-x"), "works": (), "eta": (),
    "implied": ("original", "ESD-u", "ESD-x", "SLD-medium", "negative prompt", "censored training"),
}


def seen(confusion: dict, wanted: str) -> str:
    """How often the judge saw what was asked for: "star 98 %"."""
    row = confusion[wanted]
    return f"{wanted} {100 * row.get(wanted, 0) / sum(row.values()):.0f} %"


def contact_sheet(studio: Studio, experiment: str, cells: list[Cell],
                  results: tables.Answers) -> Image.Image:
    """The same seeds in every row. An image's label is its prompt, or how often the judge sees in
    all images of the cell what was asked for.
    """
    blank, rows = Image.new("RGB", (world.SIZE, world.SIZE), "white"), {}
    for cell in cells:
        row, answer = cell.contender.name, results.get(cell.key)
        prompts = columns(experiment, cell.concept)
        if not prompts or not answer or row not in (SHEETS[experiment] or [row]):
            continue
        labels = prompts
        if experiment in ("objects", "styles"):  # as Figure 5
            row, found = f"erased: {cell.concept or 'nothing'}", answer[cell.ask[0]]
            labels = [seen(found, wanted) for wanted in found]
        elif experiment == "implied":
            labels = [seen(answer["scenes"], cell.concept)] + [""] * (len(prompts) - 1)
        over, images = rows.setdefault(row, ([row], [blank]))
        over += labels
        images += studio.draw(studio.model(cell.contender), cell.contender.how, prompts)
    longest = max(len(label) for labels, _ in rows.values() for label in labels)
    return sample.contact_sheet(list(rows.values()), least=128 if longest < 20 else 192)


# ---- the command line ----

def settings_of(studio: Studio, cell: Cell) -> dict:
    """All that a cell's answers depend on, as JSON gives it back."""
    settings = {"erase": studio.settings(cell.contender), "how": SAMPLING | cell.contender.how,
                "seed": SEED, "num": studio.num,
                "weights": studio.weights.get(cell.contender.retrained or "unet"),
                "judge": studio.weights["judge"]}
    if cell.compared_with:
        settings["compared with"] = studio.weights.get(cell.compared_with)
    return json.loads(json.dumps(settings))


def is_stored(studio: Studio, cell: Cell, results: dict) -> bool:
    """Whether the results have a cell's answers under the same settings.

    Retrained miniatures aren't shipped: where one is missing, its answers are taken as they are.
    """
    stored = results.get(cell.key, {}).get("settings", {})
    known = {key: stored.get(key) if value is None else value
             for key, value in settings_of(studio, cell).items()}
    return stored == known


def answer(place: tuple, cell: Cell) -> tuple[Cell, dict]:
    """A cell with its answers; `place` is what `open_studio` takes."""
    studio = open_studio(*place)
    sd = studio.model(cell.contender)
    found = {"settings": settings_of(studio, cell)}
    for ask in cell.ask:
        found |= ASK[ask](studio, sd, cell)
    return cell, found


def one_of_several() -> None:
    """Prepares a worker process: it uses one core and leaves Ctrl-C to its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def answers(place: tuple, todo: list[Cell], processes: int) -> Iterator[tuple[Cell, dict]]:
    """Yields each cell with its answers, in the order in which they are done."""
    processes = min(processes, len(todo))
    if processes < 2:
        yield from (answer(place, cell) for cell in todo)
        return
    with multiprocessing.get_context("spawn").Pool(processes, one_of_several) as pool:
        yield from pool.imap_unordered(functools.partial(answer, place), todo)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.processes < 1:
        raise ValueError(f"processes is {args.processes}, choose 1 or more")
    chosen = list(EXPERIMENTS) if "all" in args.experiments else args.experiments
    file = args.results or Path("runs/quick/results.json" if args.quick
                                else "notebooks/toy/results.json")
    few, num, iterations = (slice(2), 2, 2) if args.quick else (
        slice(None), 50, FLAGS["iterations"])
    place = (args.model, args.run, num, iterations)
    studio = open_studio(*place)
    results = sample.read_json(file) if file.exists() else {}
    sample.check_out(file, ".json")
    wanted = {cell.key: cell for name in chosen for cell in cells(name, few)}
    todo = [cell for cell in wanted.values() if not is_stored(studio, cell, results)]
    needs = {cell.key: {cell.contender.retrained, cell.compared_with} - {"", *studio.weights}
             for cell in todo}
    if missing := set().union(*needs.values()):
        folders = ", ".join(str(RETRAINED[name]) for name in sorted(missing))
        print(f"left out, as it isn't trained: {folders}; evaluate.py says how", file=sys.stderr)
        todo = [cell for cell in todo if not needs[cell.key]]
    with tqdm(total=len(todo), unit="cell") as bar:
        for cell, found in answers(place, todo, args.processes):
            results[cell.key] = found
            sample.write_whole(file, lambda part: part.write_text(json.dumps(results) + "\n"))
            bar.set_postfix_str(cell.key, refresh=False)
            bar.update()
    print(tables.heading({key: results[key] for key in wanted if key in results}))
    for name in chosen:
        print(f"\n{tables.titled(name, results)}")
        png, changed = file.with_name(f"{name}.png"), any(c.experiment == name for c in todo)
        if name in SHEETS and (changed or not png.exists()):
            sheet = contact_sheet(studio, name, cells(name, few), results).quantize(256)
            sample.write_whole(png, lambda part: sheet.save(part, format="PNG"))
            print(f"\n{png}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="The paper's experiments in miniature.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("experiments", nargs="+", choices=["all", *EXPERIMENTS], metavar="EXPERIMENT",
        help=f"all, or some of {', '.join(EXPERIMENTS)}")
    add("--quick", action="store_true", help="two images and two iterations each, few concepts")
    add("--model", type=Path, default=Path("notebooks/toy"), help="the miniature, with its judge")
    add("--run", type=Path, default=Path("runs/evaluate"), help="erased weights are kept here")
    add("--processes", type=int, default=2, help="each takes a core and 2 GB of memory")
    add("--results", type=Path, help="a JSON file; notebooks/toy/results.json or, with --quick, "
                                     "runs/quick/results.json")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
