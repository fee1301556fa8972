"""The paper's experiments in miniature, with its baselines: draws, counts and keeps the answers.

    python -m notebooks.toy.evaluate all                   # makes what isn't stored, prints all
    python -m notebooks.toy.evaluate styles eta            # two experiments
    python -m notebooks.toy.evaluate all --quick           # the same code with two images each

A cell is one contender (a model, and how it is sampled) and what it is asked. Its answers are
kept in --results when it is done, its erased weights in --run; the same command goes on from
there. Tables (tables.py) go to the standard output, contact sheets next to the results. With a
new --results and --run, `all` takes about an hour on two cores.

The censored miniature, which never saw the four objects of `implied`, is trained in an hour and a
half on one core by

    mkdir -p runs/censored/model
    cp -r notebooks/toy/{vae,text_encoder,tokenizer,scheduler,judge} runs/censored/model
    python -m notebooks.toy.train unet --without moon heart star arrow --run runs/censored
"""

import argparse
import functools
import json
import math
import multiprocessing
import signal
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import erase
import sample
from notebooks.methods import safe_latent_diffusion, uce
from notebooks.toy import judge as judging
from notebooks.toy import measure, tables, world
from notebooks.toy.tables import FAMILY, IMPLIED, STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

# notebooks/toy/flags as JSON, to be stored with the answers; all other settings are the paper's.
FLAGS = measure.flags()
FLAGS["data"] = "every step" if FLAGS["data"].keywords["every_step"] else "own way"
RATES = {"esd-x": FLAGS.pop("lr"), "esd-u": measure.LR_ESD_U}
SAMPLING = {"steps": 10, "guidance": 5.0, "batch": 50}
SEED = 1000  # of a cell's first image; each image has its own, the same for all contenders
CENSORED = Path("runs/censored/model")


# ---- who is compared ----

class Contender(NamedTuple):
    """A model and how it is sampled: a row of a table. Both settings are JSON."""

    name: str
    erase: dict = {}  # what `erased_weights` takes on top of FLAGS; empty: nothing is erased
    how: dict = {}  # what `Studio.draw` takes on top of SAMPLING
    censored: bool = False


def contender(name: str, concept: str) -> Contender:
    """Returns a contender by its name in the tables; it erases or avoids the concept."""
    words = f"a picture in the style of {concept}" if concept in STYLES else concept
    esd_x, esd_u = ({"concepts": [words], "method": method} for method in ("esd-x", "esd-u"))
    erasures = {
        "ESD-x": esd_x, "ESD-u": esd_u,
        "ESD-u, the paper's rule": esd_u | {"method": "esd-u of the paper"},
        "ESD-u, eta 3": esd_u | {"eta": 3}, "ESD-u, eta 10": esd_u | {"eta": 10},
        "by its name": esd_x,
        "by a paraphrase": esd_x | {"concepts": [world.PARAPHRASES.get(concept, (words,))[0]]},
        "x_t at every step of a way": esd_x | {"data": "every step"},
        "x_t by the edited model, as in the paper": esd_x | {"data": "own way"},
        "x_t by the frozen model": esd_x | {"data": "frozen"},
        "learning rate falls to 0": esd_x | {"variant": "falling"},
        "weights and Adam in bfloat16": esd_x | {"variant": "bfloat16"},
        "keys and values only": esd_x | {"method": "esd-x-strict"},
        "ESD-u, its code's parameters": esd_u,
    } | {f"ESD-x, {count} erased": {"concepts": [title.lower() for title in FAMILY[:count]],
                                    "method": "esd-x", "data": "works"} for count in (1, 2, 3)}
    samplers = {"original": {}, "negative prompt": {"negative": words}, "censored training": {}} | {
        f"SLD-{sld}": {"safe": words, "sld": sld} for sld in safe_latent_diffusion.SETTINGS}
    if name in erasures:
        return Contender(name, erase=erasures[name])
    return Contender(name, how=samplers[name], censored=name == "censored training")


# ---- how erasures are made: what the names in their settings mean ----

MORE_METHODS = {  # next to those of erase.py
    "esd-u of the paper": lambda name: "attn2" not in name,  # its words; its code leaves out more
    "esd-x-strict": uce.keys_and_values,  # of its code
}


def data_function(sd: StableDiffusion, name: str, concepts: list[str]) -> Callable:
    """Returns what `erase.erase` takes as its `data`."""
    def frozen(unet, *rest):
        return erase.own_ways(sd.unet, *rest)

    def works(unet, texts, shape, steps, guidance, rng):
        images = {title.lower(): world.render_work(title) for title in world.WORKS}
        latents = sd.encode_images([images[concept] for concept in concepts])
        return erase.noised(latents, texts, shape, steps, rng)

    every_step = functools.partial(erase.own_ways, every_step=True)
    return {"own way": erase.own_ways, "every step": every_step, "frozen": frozen,
            "works": works}[name]


def round_to_bfloat16(optimizer: torch.optim.Optimizer) -> None:
    """Rounds weights and Adam's state to what bfloat16 would have kept of them."""
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(tensor.bfloat16())


def own_loop(sd: StableDiffusion, concept: str, variant: str, method: str | Callable,
             data: Callable, lr: float, iterations: int, steps: int, batch: int) -> dict:
    """`erase.erase` for one concept, with a loop that changes something between two steps.

    variant: "falling", the learning rate falls to 0, or "bfloat16", each step is rounded.
    """
    null, config = sd.encode([""] * batch), sd.unet.config
    c = sd.encode([concept]).expand_as(null)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    theta, rng = erase.select(sd.unet, method), torch.Generator().manual_seed(0)
    unet, optimizer = erase.edit(sd.unet, theta), torch.optim.Adam(theta.values(), lr)
    batches = data(unet, [erase.Text(c, null, c)], shape, steps, 3.0, rng)
    losses = erase.esd(unet, sd.unet, batches, optimizer)
    for done in range(iterations):
        if variant == "falling":
            optimizer.param_groups[0]["lr"] = lr * (1 - done / iterations)
        next(losses)
        if variant == "bfloat16":
            round_to_bfloat16(optimizer)
    return {name: tensor.detach() for name, tensor in theta.items()}


def erased_weights(sd: StableDiffusion, concepts: list[str], method: str, data: str,
                   variant: str = "", **settings) -> dict[str, Tensor]:
    """Returns theta by name, as `erase.erase` does, from settings that are JSON."""
    settings |= {"method": MORE_METHODS.get(method, method),
                 "data": data_function(sd, data, concepts)}
    if variant:
        return own_loop(sd, *concepts, variant, **settings)
    return erase.erase(sd, concepts, **settings)


def fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart: a checksum of all weights."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


class Studio(NamedTuple):
    """The miniature, its judge, and what all cells have in common."""

    sd: StableDiffusion
    judge: judging.Judge
    weights: dict[str, str]  # fingerprints: of the U-Net, the judge, the censored U-Net
    run: Path  # where erased weights are kept
    num: int  # images of each class
    iterations: int

    def settings(self, contender: Contender) -> dict:
        """All that `erased_weights` is given for it."""
        if not contender.erase:
            return {}
        rate = RATES["esd-x" if contender.erase["method"].startswith("esd-x") else "esd-u"]
        style = "style of" in contender.erase["concepts"][0]  # a style takes longer
        iterations = self.iterations * (3 if style else 1)
        return FLAGS | {"lr": rate, "iterations": iterations} | contender.erase

    def model(self, contender: Contender) -> StableDiffusion:
        """The contender's model; an erasure is made when it is first asked for."""
        settings = self.settings(contender)
        if not settings:
            return sample.load(CENSORED) if contender.censored else self.sd
        text = json.dumps([self.weights["unet"], settings], sort_keys=True)
        file = self.run / f"{zlib.crc32(text.encode()):08x}.safetensors"
        if not file.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            erase.save(erased_weights(self.sd, **settings), file, settings)
        return sample.load_erased(self.sd, file)

    def draw(self, sd: StableDiffusion, how: dict, prompts: list[str]) -> list[Image.Image]:
        """One image of each prompt, each from a seed of its own."""
        how = SAMPLING | how
        if "safe" in how:
            concept = sd.encode([how.pop("safe")])
            how["guided"] = safe_latent_diffusion.guided(concept, how.pop("sld"))
        return sample.generate(sd, prompts, seed=[SEED + i for i in range(len(prompts))], **how)


# ---- what is asked, and how the answers are counted ----

KINDS = {  # of prompts: questions, what the judge looks for, whether they are of one concept
    "names": (measure.objects, "object", False), "styled": (measure.styled, "style", False),
    "name": (measure.objects, "object", True), "scenes": (measure.scenes, "object", True),
    "paraphrases": (measure.paraphrases, "object", True),
}


def confusion(kind: str, studio: Studio, sd: StableDiffusion, how: dict,
              concept: str) -> dict:
    """What was asked for -> what the judge saw -> how often; and, image by image, what is right.

    "1" is an image that shows what was asked for. The i-th image of all contenders has the same
    prompt and seed, so they can be compared in pairs.
    """
    ask, head, alone = KINDS[kind]
    questions = [q for q in ask(1) if not alone or q.wanted["object"] == concept]
    classes = {q.wanted[head] for q in questions}
    num = math.ceil(studio.num * len(classes) / len(questions))  # of each prompt
    prompts = [q.prompt for q in questions for _ in range(num)]
    asked = [q.wanted[head] for q in questions for _ in range(num)]
    looks = judging.read(studio.judge, studio.draw(sd, how, prompts))
    pairs = list(zip(asked, (look[head] or "none of these" for look in looks)))
    seen = {name: dict(Counter(b for a, b in pairs if a == name)) for name in dict.fromkeys(asked)}
    return {kind: seen, f"{kind}, right": "".join(str(int(a == b)) for a, b in pairs)}


def quality(studio: Studio, sd: StableDiffusion, how: dict, concept: str) -> dict:
    """Captions as in training, none with the concept, and ten times as many as of a class.

    The Frechet distance on the judge's features to other rendered images, and how often all is
    right that a caption names of object, colour and style.
    """
    rng = np.random.default_rng(SEED)
    held_out, second_set = ([world.draw(rng, without=(concept,)) for _ in range(10 * studio.num)]
                            for _ in range(2))
    images = studio.draw(sd, how, [example.caption for example in held_out])
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


def distances(studio: Studio, sd: StableDiffusion, how: dict, concept: str) -> dict:
    """How far the images of each work are from it, and those of each object from the images that
    the original model draws from the same seeds.
    """
    each = math.ceil(studio.num / len(world.WORKS))
    found = {title: difference(studio.draw(sd, how, [title.lower()] * each),
                               [world.render_work(title)] * each) for title in world.WORKS}
    ordinary = [with_article(object) for object in world.OBJECTS]
    found["ordinary"] = difference(studio.draw(sd, how, ordinary),
                                   studio.draw(studio.sd, {}, ordinary))
    return {"distances": found}


ASK = {kind: functools.partial(confusion, kind) for kind in KINDS} | {
    "quality": quality, "distances": distances}


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


EXPERIMENTS = {  # concepts, contenders, and what they are asked
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
}


def cells(experiment: str, few: slice = slice(None)) -> list[Cell]:
    """The cells of an experiment, or of a few of its concepts."""
    concepts, contenders, ask = EXPERIMENTS[experiment]
    shared = [Cell(experiment, "", contender("original", ""), ask)]  # asked for all concepts
    return (shared if experiment in ("objects", "styles") else []) + [
        Cell(experiment, concept, contender(name, concept), ask)
        for concept in concepts[few] for name in contenders]


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
    whose = "censored" if cell.contender.censored else "unet"
    settings = {"erase": studio.settings(cell.contender), "how": SAMPLING | cell.contender.how,
                "seed": SEED, "num": studio.num, "weights": studio.weights.get(whose),
                "judge": studio.weights["judge"]}
    return json.loads(json.dumps(settings))


def is_stored(studio: Studio, cell: Cell, results: dict) -> bool:
    """Whether the results have a cell's answers under the same settings.

    The censored miniature isn't shipped: where it is missing, its answers are taken as they are.
    """
    stored = results.get(cell.key, {}).get("settings", {})
    known = settings_of(studio, cell)
    if known["weights"] is None:
        known["weights"] = stored.get("weights")
    return stored == known


@functools.cache
def open_studio(model: Path, run: Path, num: int, iterations: int) -> Studio:
    """One in each process."""
    sd, judge = sample.load(model), judging.load(model)
    weights = {"unet": fingerprint(sd.unet), "judge": fingerprint(judge)}
    if (CENSORED / "unet").exists():  # it is trained
        weights["censored"] = fingerprint(sample.load(CENSORED).unet)
    return Studio(sd, judge, weights, run, num, iterations)


def answer(place: tuple, cell: Cell) -> tuple[Cell, dict]:
    """A cell with its answers; `place` is what `open_studio` takes."""
    studio = open_studio(*place)
    sd = studio.model(cell.contender)
    found = {"settings": settings_of(studio, cell)}
    for ask in cell.ask:
        found |= ASK[ask](studio, sd, cell.contender.how, cell.concept)
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
    if "censored" not in studio.weights and any(cell.contender.censored for cell in todo):
        print(f"{CENSORED} is missing and left out; evaluate.py says how to train it",
              file=sys.stderr)
        todo = [cell for cell in todo if not cell.contender.censored]
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
