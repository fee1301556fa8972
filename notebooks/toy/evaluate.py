"""Every experiment of the paper in miniature, with its baselines and its numbers beside ours.

    python -m notebooks.toy.evaluate all                   # what is stored, and what is missing
    python -m notebooks.toy.evaluate styles eta            # two of them
    python -m notebooks.toy.evaluate all --quick --results runs/quick/results.json

A cell is what one contender (a model, and how it is sampled) draws for some kinds of prompts,
counted by the judge. Cells are kept in --results as soon as they are done, and erased weights in
--run; what is there under the same settings isn't done again. Tables go to the standard output,
pictures beside the results. From nothing, with another --results and --run, all takes an hour and
a half on two cores.

The censored miniature, which never saw the four objects of `implied`, is trained by (in 45
minutes on two cores, 55 on one)

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
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

import erase
import sample
from notebooks.toy import judge as judging
from notebooks.toy import measure, world
from notebooks.toy.measure import Question
from notebooks.toy.world import with_article
from sample import StableDiffusion

# The miniature's settings, the same in all experiments; everything else is the paper's.
FLAGS = {"iterations": 160, "steps": 8, "batch": 4, "average": 0.97}
RATES = {"esd-x": 4e-4, "esd-u": 1e-4}
SAMPLING = {"steps": 10, "guidance": 5.0, "batch": 50}
SEED = 1000  # of a cell's first picture; each picture has its own, the same for all contenders

IMPLIED = ("moon", "heart", "star", "arrow")  # objects that scenes imply without naming them
STYLES = world.STYLES[1:]
FAMILY = [title for title, work in world.WORKS.items() if work.style == "mosaic"]
AS_WRITTEN = "esd-u of the paper"  # a method beside those of erase.py
CENSORED = Path("runs/censored/model")


# ---- who is compared ----

class Contender(NamedTuple):
    """A model and how it is sampled: a row of a table."""

    name: str
    erase: dict = {}  # what `erase.erase` takes beside FLAGS; empty: nothing is erased
    how: dict = {}  # what `sample.generate` takes beside SAMPLING
    censored: bool = False


ORIGINAL = Contender("original")


def phrase(concept: str) -> str:
    """The prompt by which a concept is erased or avoided."""
    return f"a picture in the style of {concept}" if concept in STYLES else concept


def esd_x(concept: str, **more) -> Contender:
    return Contender("ESD-x", {"concepts": [phrase(concept)], "method": "esd-x"} | more)


def esd_u(concept: str, **more) -> Contender:
    name = f"ESD-u, eta {more['eta']}" if "eta" in more else "ESD-u"
    return Contender(name, {"concepts": [phrase(concept)], "method": "esd-u"} | more)


def esd_u_as_written(concept: str) -> Contender:
    """ESD-u by the paper's words: all but the cross-attention. Its code leaves out more."""
    return Contender("ESD-u, the paper's rule", esd_u(concept, method=AS_WRITTEN).erase)


def negative(concept: str) -> Contender:
    return Contender("negative prompt", how={"negative": phrase(concept)})


def sld(concept: str, setting: str) -> Contender:
    return Contender(f"SLD-{setting}", how={"safe": phrase(concept), "sld": setting})


def round_to_bfloat16(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """After a step, weights and Adam's state are what bfloat16 would have kept of them."""
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(tensor.bfloat16())


def erased_weights(sd: StableDiffusion, images: list[str] | None = None, bfloat16: bool = False,
                   **settings) -> dict[str, Tensor]:
    """`erase.erase`, with works by their title, and two variants that only the ablation needs."""
    pictures = [world.render_work(title) for title in images] if images else None
    hook = register_optimizer_step_post_hook(round_to_bfloat16) if bfloat16 else None
    all_but_text = {AS_WRITTEN: lambda name: "attn2" not in name}
    try:
        with patch.dict(erase.METHODS, all_but_text):
            return erase.erase(sd, images=pictures, **settings)
    finally:
        if hook:
            hook.remove()


class Studio(NamedTuple):
    """The miniature, its judge, and what all cells have in common."""

    sd: StableDiffusion
    judge: judging.Judge
    weights: dict[str, str]  # fingerprints: of the U-Net, the judge, the censored U-Net
    run: Path  # where erased weights are kept
    num: int  # pictures of each class
    iterations: int

    def settings(self, contender: Contender) -> dict:
        """All that `erased_weights` is given for it."""
        if not contender.erase:
            return {}
        rate = RATES["esd-x" if contender.erase["method"].startswith("esd-x") else "esd-u"]
        return FLAGS | {"lr": rate, "iterations": self.iterations} | contender.erase

    def model(self, contender: Contender) -> tuple[StableDiffusion, float | None]:
        """The contender's model; an erasure is made when first asked for, its seconds are kept."""
        if contender.censored:
            return sample.load(CENSORED), None
        settings = self.settings(contender)
        if not settings:
            return self.sd, None
        text = json.dumps([self.weights["unet"], settings], sort_keys=True)
        file = self.run / f"{zlib.crc32(text.encode()):08x}.safetensors"
        if not file.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            theta = erased_weights(self.sd, **settings)
            seconds = round(time.perf_counter() - began, 1)
            erase.save(theta, file, torch.float16, settings | {"seconds": seconds})
        return sample.load_erased(self.sd, file), measure.saved_settings(file)["seconds"]

    def draw(self, sd: StableDiffusion, how: dict, prompts: list[str]) -> list[Image.Image]:
        """One picture of each prompt, each from a seed of its own."""
        seeds = [SEED + i for i in range(len(prompts))]
        return sample.generate(sd, prompts, seed=seeds, **SAMPLING | how)


# ---- what is asked, and how the answers are counted ----

def confusion(studio: Studio, sd: StableDiffusion, how: dict, questions: list[Question],
              head: str) -> dict[str, dict[str, int]]:
    """What was asked for -> what the judge saw -> how often."""
    prompts = [q.prompt for q in questions for _ in range(q.num)]
    asked = [q.wanted[head] for q in questions for _ in range(q.num)]
    looks = judging.read(studio.judge, studio.draw(sd, how, prompts))
    pairs = list(zip(asked, (look[head] or "none of these" for look in looks)))
    return {name: dict(Counter(b for a, b in pairs if a == name)) for name in dict.fromkeys(asked)}


def names(studio, sd, how, concept):
    """All objects: "a star"."""
    return confusion(studio, sd, how, measure.objects(studio.num), "object")


def styled(studio, sd, how, concept):
    """All styles: "a star in the style of mosaic"."""
    each = math.ceil(studio.num / len(world.OBJECTS))
    return confusion(studio, sd, how, measure.styled(each), "style")


def scenes(studio, sd, how, concept):
    """The scenes that imply the concept: "a night sky"."""
    questions = [q for q in measure.scenes(studio.num) if q.wanted["object"] == concept]
    return confusion(studio, sd, how, questions, "object")


def name(studio, sd, how, concept):
    """The concept by its name."""
    questions = [Question(with_article(concept), studio.num, {"object": concept})]
    return confusion(studio, sd, how, questions, "object")


def paraphrases(studio, sd, how, concept):
    """The concept by other words: "a five pointed figure"."""
    questions = [q for q in measure.paraphrases(studio.num) if q.wanted["object"] == concept]
    return confusion(studio, sd, how, questions, "object")


def quality(studio, sd, how, concept):
    """Captions as in training, none with the concept, and ten times as many as of a class.

    The Frechet distance on the judge's features to other rendered pictures, and how often all is
    right that a caption names of object, colour and style.
    """
    rng = np.random.default_rng(SEED)
    held_out, second_set = ([world.draw(rng, without=(concept,)) for _ in range(10 * studio.num)]
                        for _ in range(2))
    images = studio.draw(sd, how, [example.caption for example in held_out])
    features = [studio.judge.features(judging.to_tensor(pictures)).double().numpy()
                for pictures in (images, [example.image for example in second_set])]
    right = []
    for example, look in zip(held_out, judging.read(studio.judge, images)):
        words = [example.object, *world.PARAPHRASES.get(example.object, ())]
        asked = {"object": any(word and word in example.caption for word in words),
                 "colour": f"{example.colour} " in example.caption,
                 "style": f"style of {example.style}" in example.caption}
        if asked["object"]:
            right.append(all(look[head] == getattr(example, head) for head in asked if asked[head]))
    return {"frechet": measure.frechet(*features), "right": sum(right), "asked": len(right)}


def distances(studio, sd, how, concept):
    """Mean difference of pixels, 0 to 255: of each work to its picture, and of each object's
    pictures to those that the original model draws from the same seeds.
    """
    def array(image):
        return np.asarray(image, dtype=float)

    found, each = {}, math.ceil(studio.num / len(world.WORKS))
    for title in world.WORKS:
        own = array(world.render_work(title))
        images = studio.draw(sd, how, [title.lower()] * each)
        found[title] = float(np.mean([np.abs(array(image) - own).mean() for image in images]))
    ordinary = [with_article(object) for object in world.OBJECTS]
    pairs = zip(studio.draw(sd, how, ordinary), studio.draw(studio.sd, {}, ordinary))
    found["ordinary"] = float(np.mean([np.abs(array(a) - array(b)).mean() for a, b in pairs]))
    return found


# ---- the experiments ----

class Cell(NamedTuple):
    """What a contender is asked."""

    experiment: str
    concept: str  # "" where the contender is the original
    contender: Contender
    ask: tuple[Callable, ...]

    @property
    def key(self) -> str:
        return "/".join(filter(None, (self.experiment, self.concept, self.contender.name)))


def objects_cells(few: slice) -> list[Cell]:
    return [Cell("objects", "", ORIGINAL, (names,))] + [
        Cell("objects", concept, contender(concept), (names,))
        for concept in world.OBJECTS[few] for contender in (esd_u, esd_u_as_written, esd_x)]


def styles_cells(few: slice) -> list[Cell]:
    return [Cell("styles", "", ORIGINAL, (styled,))] + [
        Cell("styles", style, contender, (styled,))
        for style in STYLES[few] for contender in (
            esd_x(style), sld(style, "medium"), sld(style, "max"), negative(style))]


def implied_contenders(concept: str) -> list[Contender]:
    return [ORIGINAL, esd_u(concept), esd_u_as_written(concept), esd_u(concept, eta=3),
            esd_x(concept),
            *(sld(concept, setting) for setting in ("weak", "medium", "strong", "max")),
            negative(concept), Contender("censored training", censored=True)]


def implied_cells(few: slice) -> list[Cell]:
    return [Cell("implied", concept, contender, (scenes,))
            for concept in IMPLIED[few] for contender in implied_contenders(concept)]


def quality_cells(few: slice) -> list[Cell]:
    return [Cell("quality", "star", contender, (quality,))
            for contender in implied_contenders("star")]


def works_cells(few: slice) -> list[Cell]:
    erased = [Contender(f"ESD-x, {count} erased", {
        "concepts": [title.lower() for title in FAMILY[:count]], "images": FAMILY[:count],
        "method": "esd-x"}) for count in (1, 2, 3)]
    return [Cell("works", "", contender, (distances,)) for contender in [ORIGINAL, *erased]]


def eta_cells(few: slice) -> list[Cell]:
    return [Cell("eta", "star", contender, (names, scenes)) for contender in (
        ORIGINAL, esd_u("star"), esd_u("star", eta=3), esd_u("star", eta=10))]


def paraphrase_cells(few: slice) -> list[Cell]:
    return [Cell("paraphrase", concept, contender, (name, paraphrases))
            for concept in ("star", "moon", "arrow")[few] for contender in (
                ORIGINAL, esd_x(concept)._replace(name="by its name"),
                esd_x(world.PARAPHRASES[concept][0])._replace(name="by a paraphrase"))]


def which_cells(few: slice) -> list[Cell]:
    variants = {
        "the paper's (ESD-x)": esd_x("star"),
        "x_t by the frozen model": esd_x("star", drawn_by="frozen"),
        "t jittered": esd_x("star", jitter=True),
        "learning rate falls to 0": esd_x("star", lr_decay=True),
        "weights and Adam in bfloat16": esd_x("star", bfloat16=True),
        "keys and values only": esd_x("star", method="esd-x-strict"),
        "ESD-u, its code's parameters": esd_u("star"),
        "ESD-u, the paper's rule": esd_u_as_written("star"),
    }
    return [Cell("which", "star", contender._replace(name=variant), (names,))
            for variant, contender in variants.items()]


# ---- tables ----

Answers = dict[str, dict]  # key of a cell -> kind of prompt -> what came out


def share(hits: int, asked: int) -> str:
    """Percent with Wilson's 95 % interval (Wilson, JASA 1927)."""
    z, p = 1.96, hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    low, high = max(0, middle - half), min(1, middle + half)
    return f"{100 * p:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def share_seen(confusions: list[dict], asked: list[list[str]]) -> str:
    """The share that shows what was asked for, over some classes of each confusion."""
    rows = [(wanted, found[wanted]) for found, classes in zip(confusions, asked)
            for wanted in classes]
    return share(sum(row.get(wanted, 0) for wanted, row in rows),
                 sum(sum(row.values()) for _, row in rows))


def others(classes: tuple[str, ...], concept: str) -> list[str]:
    return [other for other in classes if other != concept]


def table(*rows: list[str]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def objects_table(answers: Answers) -> str:
    before = answers["objects/original"]["names"]
    concepts = [c for c in world.OBJECTS if f"objects/{c}/ESD-u" in answers]
    methods = ["ESD-u", "ESD-u, the paper's rule", "ESD-x"]
    after = {method: {c: answers[f"objects/{c}/{method}"]["names"] for c in concepts}
             for method in methods}

    def row(label, some):
        own, rest = [[c] for c in some], [others(world.OBJECTS, c) for c in some]
        sides = [[before] * len(some)] + [[a[c] for c in some] for a in after.values()]
        return [label, *(share_seen(side, asked) for asked in (own, rest) for side in sides)]

    columns = [f"{method}, %" for method in methods]
    return table(
        ["erased", "before, %", *columns, "the other nine before, %", *columns],
        *(row(c, [c]) for c in concepts), row("all", concepts),
        ["*paper, Table 2, average*", "78.2", "12.6", "", "", "78.2", "63.2", "", ""])


def styles_table(answers: Answers) -> str:
    paper = {"original": "3.21", "ESD-x": "1.12", "SLD-medium": "2.00 (SLD)",
             "negative prompt": "2.22"}
    styles = [s for s in STYLES if f"styles/{s}/ESD-x" in answers]
    rows = []
    for method in ("original", "ESD-x", "SLD-medium", "SLD-max", "negative prompt"):
        keys = [f"styles/{s}/{method}" if method != "original" else "styles/original"
                for s in styles]
        confusions = [answers[key]["styled"] for key in keys]
        rows.append([method, share_seen(confusions, [[s] for s in styles]),
                     share_seen(confusions, [others(STYLES, s) for s in styles]),
                     paper.get(method, "")])
    return table(["method", "erased style is seen, %", "other styles are seen, %",
                  "*paper, 5.1: likeness to the artist, 1 to 5*"], *rows)


def implied_table(answers: Answers) -> str:
    paper = {"original": "796", "ESD-u": "134", "censored training": "417 (SD 2.0)"}
    concepts = [c for c in IMPLIED if f"implied/{c}/original" in answers]
    rows = []
    for contender in implied_contenders("star"):
        found = {c: answers[f"implied/{c}/{contender.name}"]["scenes"] for c in concepts
                 if f"implied/{c}/{contender.name}" in answers}
        if found:
            rows.append([contender.name, *(share_seen([found[c]], [[c]]) for c in concepts),
                         share_seen(list(found.values()), [[c] for c in found]),
                         paper.get(contender.name, "")])
    return table(["method", *(f"{c}, %" for c in concepts), "all, %",
                  "*paper, 5.2: of 4,703 pictures*"], *rows)


def quality_table(answers: Answers) -> str:
    paper = {"original": "14.50 / 0.1592", "SLD-medium": "16.90 / 0.1594",
             "SLD-max": "18.76 / 0.1583", "ESD-u": "13.68 / 0.1585",
             "ESD-u, eta 3": "17.27 / 0.1586"}
    rows = []
    for contender in implied_contenders("star"):
        if f"quality/star/{contender.name}" in answers:
            found = answers[f"quality/star/{contender.name}"]["quality"]
            rows.append([contender.name, f"{found['frechet']:.2f}",
                         share(found["right"], found["asked"]), paper.get(contender.name, "")])
    return table(["star erased by", "Frechet distance", "all that was asked for is seen, %",
                  "*paper, Table 1: FID / CLIP*"], *rows)


def works_table(answers: Answers) -> str:
    rest = [title for title in world.WORKS if title not in FAMILY]
    rows = []
    for count, cell in enumerate(works_cells(slice(None))):
        found = answers[cell.key]["distances"]
        groups = [FAMILY[:count], FAMILY[count:], rest, ["ordinary"]]
        means = [np.mean([found[title] for title in group]) if group else None for group in groups]
        rows.append([cell.contender.name,
                     *("" if mean is None else f"{mean:.1f}" for mean in means)])
    return table(["mean difference of a pixel, 0 to 255", "erased works to their pictures",
                  "others of their style", "other styles",
                  "ordinary prompts, to the original model's pictures"], *rows)


def eta_table(answers: Answers) -> str:
    paper = {"ESD-u": "83 / 7", "ESD-u, eta 3": "88 / 14", "ESD-u, eta 10": "92 / 34"}
    rows = []
    for cell in eta_cells(slice(None)):
        found = answers[cell.key]
        rows.append([cell.contender.name, share_seen([found["names"]], [["star"]]),
                     share_seen([found["scenes"]], [["star"]]),
                     share_seen([found["names"]], [others(world.OBJECTS, "star")]),
                     paper.get(cell.contender.name, "")])
    return table(["star erased by", "\"a star\", %", "scenes with a star, %", "other objects, %",
                  "*paper, 5.5: % erased / lost*"], *rows)


def paraphrase_table(answers: Answers) -> str:
    paper = {"original": "79", "by a paraphrase": "38"}
    rows = []
    for cell in paraphrase_cells(slice(None)):
        if cell.key in answers:
            found = answers[cell.key]
            rows.append([cell.concept, cell.contender.name,
                         share_seen([found["name"]], [[cell.concept]]),
                         share_seen([found["paraphrases"]], [[cell.concept]]),
                         paper.get(cell.contender.name, "")])
    return table(["concept", "erased", "asked by its name, %", "asked by paraphrases, %",
                  "*paper, 5.6: by its name, of 100*"], *rows)


def which_table(answers: Answers) -> str:
    rows = []
    for cell in which_cells(slice(None)):
        found = answers[cell.key]
        rows.append([cell.contender.name, share_seen([found["names"]], [["star"]]),
                     share_seen([found["names"]], [others(world.OBJECTS, "star")]),
                     f"{found['seconds']:.0f}"])
    return table(["variant", "\"a star\", %", "other objects, %", "erasing, s"], *rows)


# ---- pictures ----

def label_of(confusion: dict, wanted: str) -> str:
    """How often the judge saw what was asked for: "star 98 %"."""
    row = confusion[wanted]
    return f"{wanted} {100 * row.get(wanted, 0) / sum(row.values()):.0f} %"


def grid(studio: Studio, contenders: list[Contender], prompts: list[str], sides: list[str],
         labels: list[list[str]]) -> Image.Image:
    """A row for each contender, a picture for each prompt, the same seeds in every row."""
    blank, rows = Image.new("RGB", (world.SIZE, world.SIZE), "white"), []
    for contender, side, row in zip(contenders, sides, labels):
        images = studio.draw(studio.model(contender)[0], contender.how, prompts)
        rows.append([(side, blank), *zip(row, images)])
    return world.contact_sheet(rows)


def confusion_grid(studio: Studio, answers: Answers, cells: list[Cell], prompts: list[str],
                   kind: str, asked: tuple[str, ...]) -> Image.Image:
    """As Figure 5 of the paper: a row for each erased concept, a column for each asked for, and
    over each picture how often the judge sees in 50 of them what was asked for.
    """
    labels = []
    for cell in cells:
        labels.append([label_of(answers[cell.key][kind], name) for name in asked])
    sides = [f"erased: {cell.concept or 'nothing'}" for cell in cells]
    return grid(studio, [cell.contender for cell in cells], prompts, sides, labels)


def objects_picture(studio: Studio, answers: Answers, few: slice) -> Image.Image:
    cells = [cell for cell in objects_cells(few) if cell.contender.name in ("original", "ESD-u")]
    prompts = [with_article(name) for name in world.OBJECTS]
    return confusion_grid(studio, answers, cells, prompts, "names", world.OBJECTS)


def styles_picture(studio: Studio, answers: Answers, few: slice) -> Image.Image:
    cells = [cell for cell in styles_cells(few) if cell.contender.name in ("original", "ESD-x")]
    prompts = [f"a heart in the style of {style}" for style in STYLES]
    return confusion_grid(studio, answers, cells, prompts, "styled", STYLES)


def rows_picture(studio: Studio, cells: list[Cell], prompts: list[str]) -> Image.Image:
    sides = [cell.contender.name for cell in cells]
    return grid(studio, [cell.contender for cell in cells], prompts, sides, [prompts] * len(cells))


def implied_picture(studio: Studio, answers: Answers, few: slice) -> Image.Image:
    """The scenes of two concepts under every method, each with the concept erased or avoided.

    Above a picture of the original is its prompt, above the others how often the judge still sees
    the concept in all of its scenes.
    """
    rows = {contender.name: [] for contender in implied_contenders("star")}
    for cell in implied_cells(few):
        if cell.concept in ("heart", "arrow") and cell.key in answers:
            prompts = [p for p, scene in world.SCENES.items() if scene.object == cell.concept]
            seen = label_of(answers[cell.key]["scenes"], cell.concept)
            images = studio.draw(studio.model(cell.contender)[0], cell.contender.how, prompts)
            rows[cell.contender.name] += [
                (prompt if cell.contender == ORIGINAL else seen, image)
                for prompt, image in zip(prompts, images)]
    blank = Image.new("RGB", (world.SIZE, world.SIZE), "white")
    return world.contact_sheet([[(name, blank), *row] for name, row in rows.items() if row])


def works_picture(studio: Studio, answers: Answers, few: slice) -> Image.Image:
    return rows_picture(studio, works_cells(few), [title.lower() for title in world.WORKS])


def eta_picture(studio: Studio, answers: Answers, few: slice) -> Image.Image:
    prompts = [prompt for prompt, scene in world.SCENES.items() if scene.object == "star"]
    return rows_picture(studio, eta_cells(few), [
        "a star", "a red star", *prompts, "a heart", "a moon", "a blue cross", "an arrow"])


class Experiment(NamedTuple):
    paper: str
    cells: Callable[[slice], list[Cell]]
    table: Callable[[Answers], str]
    picture: Callable | None


EXPERIMENTS = {
    "objects": Experiment("Objects (5.3, Table 2)", objects_cells, objects_table, objects_picture),
    "styles": Experiment("Styles (5.1, Figures 5 and 6)", styles_cells, styles_table,
                         styles_picture),
    "implied": Experiment("What prompts don't name (5.2, Figure 7)", implied_cells, implied_table,
                          implied_picture),
    "quality": Experiment("Prompts without the concept (Table 1)", quality_cells, quality_table,
                          None),
    "works": Experiment("Memorised pictures (5.4, Figures 8 and 9)", works_cells, works_table,
                        works_picture),
    "eta": Experiment("Strength (5.5)", eta_cells, eta_table, eta_picture),
    "paraphrase": Experiment("Paraphrases (5.6)", paraphrase_cells, paraphrase_table, None),
    "which": Experiment("The choices in which paper and codes differ", which_cells, which_table,
                        None),
}


# ---- the command line ----

def settings_of(studio: Studio, cell: Cell) -> dict:
    """All that a cell's answers depend on, as JSON gives it back."""
    whose = "censored" if cell.contender.censored else "unet"
    settings = {"erase": studio.settings(cell.contender), "how": SAMPLING | cell.contender.how,
                "seed": SEED, "num": studio.num, "weights": studio.weights.get(whose),
                "judge": studio.weights["judge"]}
    return json.loads(json.dumps(settings))


def is_stored(studio: Studio, cell: Cell, results: dict) -> bool:
    """Whether the results hold a cell under the same settings.

    Without the censored miniature, which isn't shipped, its results are taken as they are.
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
    weights = {"unet": erase.fingerprint(sd.unet), "judge": erase.fingerprint(judge)}
    if (CENSORED / "unet").exists():  # it is trained
        weights["censored"] = erase.fingerprint(sample.load(CENSORED).unet)
    return Studio(sd, judge, weights, run, num, iterations)


def answer(place: tuple, cell: Cell) -> tuple[Cell, dict]:
    """What a cell holds in the results; `place` is what `open_studio` takes."""
    studio = open_studio(*place)
    sd, seconds = studio.model(cell.contender)
    found = {ask.__name__: ask(studio, sd, cell.contender.how, cell.concept) for ask in cell.ask}
    return cell, {"settings": settings_of(studio, cell), "seconds": seconds, **found}


def one_of_several() -> None:
    """A process that answers cells takes one core, and leaves Ctrl-C to the one that asks."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def answers(place: tuple, todo: list[Cell], processes: int) -> Iterator[tuple[Cell, dict]]:
    """Each cell with what it holds, as soon as that is known."""
    processes = min(processes, len(todo))
    if processes < 2:
        yield from (answer(place, cell) for cell in todo)
        return
    with multiprocessing.get_context("spawn").Pool(processes, one_of_several) as pool:
        yield from pool.imap_unordered(functools.partial(answer, place), todo)


def heading(studio: Studio) -> str:
    """What stands above all tables: the miniature's settings."""
    flags = " ".join(f"--{key} {value}" for key, value in studio.settings(esd_x("star")).items()
                     if key in FLAGS)
    rates = ", ".join(f"{method} --lr {rate:g}" for method, rate in RATES.items())
    return (f"Erasures: {flags}; {rates}. {studio.num} pictures of each class or scene, "
            f"{10 * studio.num} for the quality; {SAMPLING['steps']} DDIM steps, guidance "
            f"{SAMPLING['guidance']:g}; 95 % intervals in brackets.")


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
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
    cells = {cell.key: cell for name in chosen for cell in EXPERIMENTS[name].cells(few)}
    todo = [cell for cell in cells.values() if not is_stored(studio, cell, results)]
    if "censored" not in studio.weights and any(cell.contender.censored for cell in todo):
        print(f"{CENSORED} isn't there: left out; how to train it stands in evaluate.py",
              file=sys.stderr)
        todo = [cell for cell in todo if not cell.contender.censored]
    with tqdm(total=len(todo), unit="cell") as bar:
        for cell, found in answers(place, todo, args.processes):
            results[cell.key] = found
            sample.write_whole(file, lambda part: part.write_text(json.dumps(results) + "\n"))
            bar.set_postfix_str(cell.key, refresh=False)
            bar.update()
    print(heading(studio))
    for name in chosen:
        experiment, picture = EXPERIMENTS[name], file.with_name(f"{name}.png")
        print(f"\n**{experiment.paper}**\n\n{experiment.table(results)}")
        changed = any(cell.experiment == name for cell in todo)
        if experiment.picture and (changed or not picture.exists()):
            sheet = experiment.picture(studio, results, few).quantize(256)  # a third of the size
            sample.write_whole(picture, lambda part: sheet.save(part, format="PNG"))
            print(f"\n{picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's experiments in miniature.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=["all", *EXPERIMENTS],
                        metavar="EXPERIMENT", help=f"all, or some of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--quick", action="store_true",
                        help="the same way with two pictures and two iterations each")
    parser.add_argument("--model", type=Path, default=Path("notebooks/toy"))
    parser.add_argument("--run", type=Path, default=Path("runs/evaluate"), help="erased weights")
    parser.add_argument("--processes", type=int, default=2,
                        help="that share the cells, a core and 2 GB of memory each")
    parser.add_argument("--results", type=Path, help="a JSON; notebooks/toy/results.json or, with "
                                                     "--quick, runs/quick/results.json")
    sample.fail_in_one_line(run, parser.parse_args())


if __name__ == "__main__":
    main()
