"""The one way to draw, judge and count: models, what they are asked, and their answers.

An experiment (objects.py is a short one) has models, concepts and asks. `grid` makes a
cell of each combination, for each seed; `run.py` answers the cells that aren't stored,
and gives `Answers` to the experiment's table. One seed is that of an erasure and
of its images: with the same seed, the i-th images of all models have the same prompt
and start from the same noise, so they can be compared in pairs.

All of a cell's settings are stored with its answer, the code of a method as a checksum.
An answer whose settings have changed is computed anew; one that another experiment has
is taken from there.
"""

import copy
import functools
import inspect
import json
import time
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import torch
from PIL import Image
from torch import nn

import erase
import sample
from notebooks.experiments import checksums, stats
from notebooks.experiments.stats import Share
from notebooks.methods import safe_latent_diffusion
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.world import with_article
from sample import StableDiffusion, UsageError

TOY = Path("notebooks/toy/model")
SAMPLING = {"steps": 10, "guidance": 5.0, "batch": 50}
SEEDS = (0, 1, 2)
STYLES = world.STYLES[1:]  # no words ask for plain
KINDS = {"object": world.OBJECTS, "style": STYLES}  # what a concept can be
IMPLIED = {scene.object for scene in world.SCENES.values()}  # objects that scenes imply
LETTERS = "abcdefghijk"  # of the judge's classes, in their order


# ---- models


def kind_of(concept: str) -> str:
    """Returns "object", "style" or "work". Raises UsageError for what isn't the world's."""
    for kind, names in {**KINDS, "work": world.WORKS}.items():
        if concept in names:
            return kind
    raise UsageError(f"{concept!r} isn't an object, a style or a work of the miniature")


def prompt_for(concept: str) -> str:
    """Returns the prompt that names a concept: "star", "a picture in the style of dots"."""
    kind = kind_of(concept)
    if kind == "style":
        return f"a picture in the style of {concept}"
    return concept if kind == "object" else concept.lower()  # a work's title


def by_prompt(concepts: tuple[str, ...]) -> dict[str, str]:
    """Returns {prompt: anchor}; the anchor is the prompt that replaces the concept."""
    return {prompt_for(concept): "a picture" for concept in concepts}


class Model(NamedTuple):
    """A row of a table: what makes its weights, and how images are drawn with them."""

    label: str
    # (sd, concepts: {prompt: anchor}, keep, seed, **settings) -> theta, or a model
    method: Callable | None = None
    settings: dict = {}  # of the method, JSON
    sampling: dict = {}  # what `draw` takes on top of SAMPLING, JSON
    prompts: Callable[[tuple[str, ...]], dict[str, str]] = by_prompt  # concepts -> {prompt: anchor}
    folder: str = ""  # of a model that was trained without the concept; {concept}, {seed}
    file: str = ""  # of weights that were made elsewhere
    together: tuple[str, ...] = ()  # what it erases at once, whichever of these is asked for
    seeds: tuple[int, ...] = ()  # that it was trained with, in a folder each
    times_for_a_style: int = 3  # as many iterations as for an object; 1 for a stranger's method

    @property
    def is_about_a_concept(self) -> bool:
        """Whether its images depend on what is erased or avoided."""
        return bool(self.method or self.folder or self.file or "avoid" in self.sampling)


original = Model("original")


# ---- what is asked


class Question(NamedTuple):
    """A prompt, how many images of it, and what the judge should see in them."""

    prompt: str
    num: int
    wanted: dict[str, str]


def objects(num: int = 20) -> list[Question]:
    """Returns what asks for each object by its name: "a star"."""
    return [Question(with_article(name), num, {"object": name}) for name in world.OBJECTS]


def styled(num: int = 2, styles: Iterable[str] = STYLES) -> list[Question]:
    """Returns what asks for each object in each style: "a star in the style of mosaic"."""
    questions = []
    for style in styles:
        for name in world.OBJECTS:
            prompt = f"{with_article(name)} in the style of {style}"
            questions.append(Question(prompt, num, {"object": name, "style": style}))
    return questions


def coloured(num: int = 2, colours: Iterable[str] = world.COLOURS) -> list[Question]:
    """Returns what asks for each object in each colour: "a red star"."""
    questions = []
    for colour in colours:
        for name in world.OBJECTS:
            prompt = with_article(f"{colour} {name}")
            questions.append(Question(prompt, num, {"object": name, "colour": colour}))
    return questions


def contexts(num: int = 2) -> list[Question]:
    """Returns what asks for each object in every second colour and style: "a green star".

    `models.contexts_of` erases in the others.
    """
    colours = [*world.COLOURS][1::2]
    return coloured(num, colours) + styled(num, STYLES[1::2])


def scenes(num: int = 1) -> list[Question]:
    """Returns scenes in settings that weren't trained: "a photo of a sheriff badge by the sea"."""
    questions = []
    for scene, setting in world.HELD_OUT:
        for opening in world.OPENINGS:
            prompt = world.scene_prompt(scene, setting, opening)
            questions.append(Question(prompt, num, {"object": world.SCENES[scene].object}))
    return questions


def paraphrases(num: int = 10) -> list[Question]:
    """Returns what asks for each object in other words: "a five pointed figure"."""
    questions = []
    for name, phrases in world.PARAPHRASES.items():
        for phrase in phrases:
            questions.append(Question(with_article(phrase), num, {"object": name}))
    return questions


class Look(NamedTuple):
    """What a prompt asks for, and what the judge sees in one image of it, by head."""

    wanted: dict[str, str]
    seen: dict[str, str | None]


def some_of(questions: list[Question]) -> list[Question]:
    """Returns what a quick run asks: one image a prompt, of many prompts every fourth."""
    step = 4 if len(questions) > 20 else 1
    return [question._replace(num=1) for question in questions[::step]]


def wanted_by(questions: list[Question]) -> list[dict[str, str]]:
    """Returns what each image should show, in the order in which they are drawn."""
    return [question.wanted for question in questions for _ in range(question.num)]


def to_letters(judge: judging.Judge, images: list[Image.Image]) -> dict[str, str]:
    """Returns what the judge sees, by head: a letter an image."""
    seen = judging.read(judge, images)
    letters = {}
    for head, names in judging.HEADS.items():
        places = [(*names, None).index(each[head]) for each in seen]
        letters[head] = "".join(LETTERS[place] for place in places)
    return letters


def from_letters(letters: dict[str, str], head: str) -> list[str | None]:
    """Returns what the judge saw, image by image; None is "none of these"."""
    names = (*judging.HEADS[head], None)
    return [names[LETTERS.index(letter)] for letter in letters[head]]


def look(context: "Context", sd: StableDiffusion, cell: "Cell") -> dict[str, str]:
    """Draws what a cell asks for; returns what the judge sees, as letters."""
    prompts = []
    for question in context.questions(cell.ask):
        prompts += [question.prompt] * question.num
    return to_letters(context.judge, context.draw(sd, cell, prompts))


class Ask(NamedTuple):
    """A set of questions that the judge answers; or a function with an answer of its own."""

    name: str
    questions: Callable[[], list[Question]] | None = None
    answer: Callable[["Context", StableDiffusion, "Cell"], dict] = look
    # functions whose code the answer depends on; for one of methods/, its whole file counts
    uses: tuple[Callable, ...] = ()
    about: str = ""  # the concept, where the model itself may know of none
    against: "Reference | None" = None  # the model that it is compared with


class Reference(NamedTuple):
    """A model that others are compared with: the original, or one that was trained apart."""

    model: Model
    seed: int

    @property
    def name(self) -> str:
        """Returns "never saw it 0"."""
        return f"{self.model.label} {self.seed}"


class Column(NamedTuple):
    """What a table counts: in which images, and whether of the concept or of the others."""

    title: str
    ask: Ask
    own: bool = True  # prompts that ask for the concept; else those that ask for none of them
    head: str = "object"


by_name = Ask("by name", objects)
in_styles = Ask("in styles", styled)
in_colours = Ask("in colours", coloured)
in_contexts = Ask("in contexts", contexts)
in_scenes = Ask("in scenes", scenes)
by_paraphrases = Ask("by paraphrases", paraphrases)


# ---- cells


class Cell(NamedTuple):
    """One model with one seed, and what it is asked."""

    model: Model
    concepts: tuple[str, ...]  # that are erased or avoided, together
    seed: int
    ask: Ask

    @property
    def key(self) -> str:
        """Returns its name in the results."""
        names = "+".join(self.concepts)
        return "/".join([self.model.label, names, f"seed {self.seed}", self.ask.name])


def as_tuple(concepts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns a single concept as a tuple of one."""
    return (concepts,) if isinstance(concepts, str) else concepts


def cell_of(model: Model, concepts: str | tuple[str, ...], seed: int, ask: Ask) -> Cell:
    """Returns a cell; all concepts share those of a model that knows of none."""
    concepts = as_tuple(concepts)
    if {*concepts} <= {*model.together}:
        concepts = model.together
    return Cell(model, concepts if model.is_about_a_concept else (), seed, ask)


def grid(
    models: Iterable[Model], concepts: Iterable, asks: Iterable[Ask],
    seeds: Iterable[int] = SEEDS,
) -> list[Cell]:
    """Returns a cell for each combination, each once."""
    cells = {}
    for concept in concepts:
        for model in models:
            for seed in seeds:
                if model.seeds and seed not in model.seeds:
                    continue
                for ask in asks:
                    cell = cell_of(model, concept, seed=seed, ask=ask)
                    cells[cell.key] = cell
    return [*cells.values()]


# ---- answers


class Answers:
    """Stored answers, as tables ask for them."""

    def __init__(self, records: dict[str, dict]):
        """records: the answer and its settings, by a cell's key."""
        self.records = records
        self.seeds_of = {}  # the seeds, by the rest of a cell's key
        for key in records:
            label, names, seed, ask = key.rsplit("/", 3)
            seeds = self.seeds_of.setdefault((label, names, ask), [])
            seeds.append(int(seed.removeprefix("seed ")))

    def get(
        self, model: Model, concepts: str | tuple[str, ...], ask: Ask, seed: int = 0
    ) -> dict | None:
        """Returns an answer, if there is one."""
        record = self.records.get(cell_of(model, concepts, seed=seed, ask=ask).key)
        return record and record["answer"]

    def seeds(self, model: Model, concepts: str | tuple[str, ...], ask: Ask) -> list[int]:
        """Returns the seeds that are answered, in ascending order."""
        label, names, _, name = cell_of(model, concepts, seed=0, ask=ask).key.rsplit("/", 3)
        return sorted(self.seeds_of.get((label, names, name), []))

    def looks(
        self, model: Model, concepts: str | tuple[str, ...], ask: Ask, seed: int
    ) -> list[Look]:
        """Returns what each image should show, and what the judge saw in it."""
        letters = self.get(model, concepts, ask, seed=seed)
        wanted = wanted_by(ask.questions())
        num = len(next(iter(letters.values())))
        if num < len(wanted):
            wanted = wanted_by(some_of(ask.questions()))

        seen = {head: from_letters(letters, head) for head in judging.HEADS}
        looks = []
        for i, each in enumerate(wanted):
            looks.append(Look(each, {head: names[i] for head, names in seen.items()}))
        return looks

    def right(
        self, model: Model, concepts: str | tuple[str, ...], ask: Ask, seed: int,
        head: str = "object", own: bool = True,
    ) -> list[bool]:
        """Returns image by image whether what was asked for is seen.

        own: only of prompts that ask for one of the concepts; else only of prompts that
        ask for nothing erased, neither as an object nor as a style or a colour.
        """
        concepts = as_tuple(concepts)
        erased = {*concepts, *model.together}
        right = []
        for wanted, seen in self.looks(model, concepts, ask, seed):
            asked_for_own = wanted[head] in concepts
            counts = asked_for_own if own else erased.isdisjoint(wanted.values())
            if counts:
                right.append(seen[head] == wanted[head])
        return right

    def shares(
        self, model: Model, concepts: str | tuple[str, ...], ask: Ask,
        head: str = "object", own: bool = True, seeds: Iterable[int] | None = None,
    ) -> list[Share]:
        """Returns, for each seed, how many images show what was asked for: see `right`.

        seeds: all that are answered, if it is None.
        """
        shares = []
        for seed in self.seeds(model, concepts, ask) if seeds is None else seeds:
            right = self.right(model, concepts, ask, seed=seed, head=head, own=own)
            shares.append(Share(sum(right), len(right)))
        return shares

    def pooled(
        self, model: Model, concepts: Iterable, ask: Ask,
        head: str = "object", own: bool = True,
    ) -> list[Share]:
        """Returns the shares of several erasures, one for each concept and seed.

        A model that knows of no concept has the same images for all of them: it has one
        share for each seed.
        """
        by_concept = [self.shares(model, each, ask, head=head, own=own) for each in concepts]
        if model.is_about_a_concept:
            shares = [share for several in by_concept for share in several]
        else:
            shares = []
            for of_seed in zip(*by_concept):
                hits = sum(share.hits for share in of_seed)
                shares.append(Share(hits, sum(share.asked for share in of_seed)))
        return [share for share in shares if share.asked]

    def count(self, model: Model, concepts: Iterable, column: Column) -> list[Share]:
        """Returns what a column counts of several erasures: see `pooled`."""
        return self.pooled(model, concepts, column.ask, head=column.head, own=column.own)

    def differences(
        self, model: Model, other: Model, concepts: Iterable, column: Column
    ) -> list[float]:
        """Returns a model's share less another's, in points, for each concept and seed of both.

        With equal seeds they draw the same prompts from the same noises.
        """
        points = []
        for concept in concepts:
            seeds = {*self.seeds(model, concept, column.ask)}
            seeds &= {*self.seeds(other, concept, column.ask)}
            several = []
            for each in (model, other):
                several.append(self.shares(
                    each, concept, column.ask, head=column.head, own=column.own,
                    seeds=sorted(seeds),
                ))
            for a, b in zip(*several, strict=True):
                if a.asked and b.asked:
                    points.append(100 * (a.hits / a.asked - b.hits / b.asked))
        return points

    def erased(self, models: Iterable[Model], concepts: Iterable, ask: Ask) -> list:
        """Returns the concepts of which some model's erasure is stored."""
        about_one = [model for model in models if model.is_about_a_concept]
        return [c for c in concepts if any(self.seeds(model, c, ask) for model in about_one)]

    def answered(self, models: Iterable[Model], concepts: list, ask: Ask) -> list[Model]:
        """Returns the models with a stored answer for one of the concepts, or more."""
        return [m for m in models if any(self.seeds(m, c, ask) for c in concepts)]


def percent(
    answers: Answers, model: Model, concepts: str | tuple[str, ...], ask: Ask, name: str,
    head: str = "object",
) -> str:
    """Returns how often a name is seen in all images that ask for it: "98 %"."""
    right = []
    for seed in answers.seeds(model, concepts, ask):
        for wanted, seen in answers.looks(model, concepts, ask, seed=seed):
            if wanted[head] == name:
                right.append(seen[head] == name)
    return f"{100 * sum(right) / len(right):.0f} %" if right else ""


def gone(shares: list[Share]) -> list[Share]:
    """Returns the shares of what isn't seen."""
    return [Share(asked - hits, asked) for hits, asked in shares]


# ---- the miniature, and what all cells have in common


class Context(NamedTuple):
    """The original and its judge, and where erased weights are kept."""

    sd: StableDiffusion
    judge: judging.Judge
    base: str  # a checksum of the original
    judged_by: str
    weights: Path
    quick: bool

    def questions(self, ask: Ask) -> list[Question]:
        """Returns an ask's questions; some of them in a quick run."""
        questions = ask.questions()
        return some_of(questions) if self.quick else questions

    def num(self, num: int) -> int:
        """Returns how many images an answer of its own may draw."""
        return min(num, 4) if self.quick else num

    def weights_settings(self, model: Model, concepts: tuple[str, ...], seed: int) -> dict:
        """Returns all that a model's weights depend on, as JSON."""
        if model.folder:
            folder = model.folder.format(concept="+".join(concepts), seed=seed)
            return {"folder": folder, **fingerprint_of(Path(folder))}
        if model.file:
            file = checksums.crc(Path(model.file).read_bytes())
            return {"file": file, "original": self.base}
        if not model.method:
            return {"original": self.base}

        others = [name for names in KINDS.values() for name in names if name not in concepts]
        settings = {
            "function": f"{model.method.__module__}:{model.method.__qualname__}",
            "code": checksums.code_of_method(model.method),
            "original": self.base,
            "concepts": model.prompts(concepts),
            "keep": [prompt_for(name) for name in others],
            "seed": seed,
            **model.settings,
        }
        iterations = self.iterations(model, concepts)
        return settings if iterations is None else settings | {"iterations": iterations}

    def iterations(self, model: Model, concepts: tuple[str, ...]) -> int | None:
        """Returns how many steps a method takes, if it counts any."""
        parameters = inspect.signature(model.method).parameters.values()
        given = {each.name: each.default for each in parameters} | model.settings
        number = given.get("iterations")
        passes_on = any(each.kind is each.VAR_KEYWORD for each in parameters)  # to erase.erase
        if self.quick and ("iterations" in given or passes_on):
            return 2
        if not isinstance(number, int):
            return None
        return model.times_for_a_style * number if "style" in map(kind_of, concepts) else number

    def settings(self, cell: Cell) -> dict:
        """Returns all that a cell's answer depends on, as JSON gives it back."""
        sampling = SAMPLING | cell.model.sampling
        settings = {
            "weights": self.weights_settings(cell.model, cell.concepts, cell.seed),
            "sampling": sampling,
            "judge": self.judged_by,
            "seed": cell.seed,
            "quick": self.quick,
        }
        if "avoid" in sampling:
            settings["avoided"] = [*cell.model.prompts(cell.concepts)]
            settings["code of sampling"] = checksums.code_of(safe_latent_diffusion)
        if cell.ask.questions:
            questions = [each._asdict() for each in self.questions(cell.ask)]
            settings["questions"] = checksums.crc(questions)
        else:
            settings["code"] = checksums.code_of_answer(cell.ask.answer)
            settings["code it uses"] = checksums.code_of_functions(cell.ask.uses)
            settings["concepts"] = cell.concepts
        if cell.ask.against:
            model, seed = cell.ask.against
            settings["against"] = self.weights_settings(model, (cell.ask.about,), seed)
        return json.loads(json.dumps(settings))

    def load(self, model: Model, concepts: tuple[str, ...], seed: int) -> StableDiffusion:
        """Returns a model with its weights; an erasure is made when it is first asked for."""
        if model.folder:
            return load_trained(model.folder.format(concept="+".join(concepts), seed=seed))
        if model.file:
            return sample.load_erased(self.sd, Path(model.file))
        if not model.method:
            return self.sd
        return self.erased(model, concepts, seed)

    def file_of(self, model: Model, concepts: tuple[str, ...], seed: int) -> Path:
        """Returns where an erasure is kept."""
        settings = self.weights_settings(model, concepts, seed)
        return self.weights / f"{checksums.crc(settings)}.safetensors"

    def erased(self, model: Model, concepts: tuple[str, ...], seed: int) -> StableDiffusion:
        """Erases, or reads what was erased before."""
        file = self.file_of(model, concepts, seed)
        if file.exists():
            return sample.load_erased(self.sd, file)

        settings = self.weights_settings(model, concepts, seed)
        given = {key: settings[key] for key in ("concepts", "keep", "seed")}
        if "iterations" in settings:
            given["iterations"] = settings["iterations"]
        own = copy.deepcopy(self.sd)  # whatever the method does to it, others start afresh
        torch.manual_seed(seed)  # for methods with random numbers that they don't seed
        began = time.perf_counter()
        made = model.method(own, **model.settings | given)
        seconds = time.perf_counter() - began
        if isinstance(made, StableDiffusion):  # it changes more than the U-Net: not kept
            return made

        if not isinstance(made, dict):
            what = type(made).__name__
            raise UsageError(
                f"{model.label} returned a {what}: return the new weights by name, or a model"
            )
        sample.with_weights(self.sd, made, source=model.label)  # refuses what the U-Net hasn't
        self.weights.mkdir(parents=True, exist_ok=True)
        erase.save(made, file, settings=settings | {"seconds": seconds}, sd=self.sd)
        return sample.load_erased(self.sd, file)

    def draw(
        self, sd: StableDiffusion, cell: Cell, prompts: list[str]
    ) -> list[Image.Image]:
        """Returns an image of each prompt, each from a seed of its own, as the cell asks.

        sampling["avoid"]: how what the cell erases is avoided instead, "negative prompt"
        or one of the settings of Safe Latent Diffusion.
        """
        settings = SAMPLING | cell.model.sampling
        avoid = settings.pop("avoid", None)
        prompt = ", ".join(cell.model.prompts(cell.concepts)) if avoid else ""
        if avoid == "negative prompt":
            settings["negative"] = prompt
        elif avoid:
            settings["predictor"] = functools.partial(
                safe_latent_diffusion.SafePredictor,
                concept=sd.encode([prompt]),
                safety=safe_latent_diffusion.SETTINGS[avoid],
            )
        seeds = image_seeds(cell.seed, len(prompts))
        return sample.generate(sd, prompts, seed=seeds, **settings)

    def row(self, cell: Cell, prompts: list[str]) -> list[Image.Image]:
        """Returns a row of a contact sheet: a blank for its label, an image of each prompt."""
        sd = self.load(cell.model, cell.concepts, cell.seed)
        blank = Image.new("RGB", (world.SIZE, world.SIZE), "white")
        return [blank, *self.draw(sd, cell, prompts)]


@functools.lru_cache(maxsize=2)  # what erasures are compared with, one after the other
def load_trained(folder: str) -> StableDiffusion:
    """Loads a model that was trained elsewhere."""
    return sample.load(folder)


@functools.cache
def fingerprint_of(folder: Path) -> dict[str, str]:
    """Returns a checksum of a trained U-Net as a setting; nothing if it wasn't trained."""
    files = sorted(folder.glob("unet/*.safetensors"))
    if not files:
        return {}
    return {"fingerprint": checksums.crc(b"".join(file.read_bytes() for file in files))}


def image_seeds(seed: int, num: int) -> list[int]:
    """Returns the seeds of a cell's images: a stretch of its own for each cell's seed."""
    first = 1000 + 10_000 * seed
    return [first + i for i in range(num)]


def checksum_of(*models: nn.Module) -> str:
    """Returns a checksum of all weights."""
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    # as bytes: numpy has no bfloat16
    parts = [tensor.cpu().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return checksums.crc(b"".join(parts))


@functools.cache
def open_context(model: Path, weights: Path, quick: bool) -> Context:
    """Loads the original and its judge; cached, so a process loads them once."""
    sd = sample.load(model)
    judge = judging.load(model)
    return Context(
        sd, judge, base=checksum_of(sd.unet, sd.text_encoder, sd.vae),
        judged_by=checksum_of(judge), weights=weights, quick=quick,
    )


# ---- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_differences(
    answers: Answers, models: list[Model], pairs: Iterable[tuple[str, str]],
    concepts: Iterable, columns: Iterable[Column],
) -> str:
    """Returns by how many points models differ, erasure by erasure, with intervals, Markdown.

    pairs: labels; the second one's share is taken off the first one's.
    """
    by_label = {model.label: model for model in models}
    rows = []
    for label, other in pairs:
        if {label, other} <= by_label.keys():
            points = []
            for column in columns:
                points.append(answers.differences(
                    by_label[label], by_label[other], concepts, column
                ))
            if any(points):
                rows.append([label, other, *map(stats.number, points)])
    titles = [column.title.replace("%", "points") for column in columns]
    return table(["this", "less this", *titles], rows) if rows else ""
