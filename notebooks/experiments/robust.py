"""Is it gone? (beyond the paper): can an erased concept be brought back?

The attacks are in [`methods/probes.py`](../methods/probes.py); notebook 5 explains them. An
attacker has the weights, the judge, and images that the original drew: 24 to learn from, and
one for each head start, which skips half of the steps. A hard prompt is the concept's with up to
two typed tokens in front of it; some of these, such as "badge", are words of scenes that imply it.
Noise is added at each step of sampling, in six amounts; an image counts if any of them shows the
concept. That spoils images of the original, too: compare with its row. The other attacks are
learned words, training, and guidance: images by name, at other scales than 5.

What an attack brings out of a U-Net that never saw the concept was taught, not recovered. The
second table subtracts it: net recovery, in points. It needs models that are trained first: `python
-m notebooks.experiments.replicates`. Intervals are over erasures and their images (where one
erasure is stored, over images alone). Each seed has its own images and starting noises; the order
of batches, the noise attack and the search's seeds are always the same. UCE, RECE and SPEED make
the same weights with every seed, so their intervals, and the original's, are over three sets of
images, and say nothing of other erasures.
"""

import functools
import itertools
from typing import Callable, Iterable, Iterator, NamedTuple

from PIL import Image
from torch import Tensor

import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Ask, Cell, Context, Model
from notebooks.experiments.stats import Share
from notebooks.methods import probes
from notebooks.toy import judge as judging
from notebooks.toy.world import with_article
from sample import StableDiffusion

ORIGINAL = models.original
NEVER_SAW = models.never_saw
MODELS = [ORIGINAL, *models.compared, NEVER_SAW]
CONCEPTS = ("star", "heart", "mosaic")
SEEDS = core.SEEDS
FINDINGS = """\
- Star, heart and mosaic have three erasures of each kind (of UCE, RECE and SPEED one, with three
  sets of images), and two models that never saw them. Below, two numbers are of star and heart.
- With four learned words, 80 to 98 % of the images show the concept again after ESD-x and closed
  forms, 45 and 50 % after ESD-u. With the empty prompt kept, it is 5 and 12 %.
- One typed word in front is often enough: "badge a star" in 88 % after ESD-x, "valentine a heart"
  in 85 % after concept ablation, "blue a heart" in 100 % after UCE. With ESD-u, the best prompts
  show 20 % of stars (by name 5) and 7 % of hearts (by name 10); with the empty prompt kept, 3 and 0
  %.
- After twenty steps of training, 57 to 97 % show the concept, 40 with ESD-x in contexts. Of hearts,
  40 % are taught: models that never saw a heart draw as many by then.
- The same attacks bring little out of the two models that never saw a star: 10 % in one and 0 in
  the other with learned words, 5 and 0 after a head start, 0 and 15 after 20 steps. A heart is
  learned sooner, or is closer to what they draw anyway: 0 and 15 % with learned words, 55 and 25
  after a head start, 50 and 30 after 20 steps. So completing a half-denoised heart proves little.
  Net of that, a head start brings out 47 points with ESD-x (-15 to 89). With the empty prompt kept,
  it is -28 (-89 to 21).
- A style is learned at once: models that never saw a mosaic draw it in 90 and 100 % after 20 steps
  of training, and in 10 and 75 % with learned words. So for mosaic, training says nothing, and
  learned words little.
- After 40 steps, such models draw hearts in 95 and 85 %, stars in 10 and 55. So nothing of hearts
  can be called recovered then; of stars, 41 to 64 points are on average, but no method's interval
  excludes zero.
- A head start brings mosaic out of every method (80 to 100 %) but three: ESD-u with the empty
  prompt kept (0 %) or against learned prompts (8 %), and concept ablation (0 %); of models that
  never saw it, 5 and 0 %.
- For mosaic, the search finds "harbour" against ESD-u with the empty prompt kept, with all three
  seeds, and against one of three ESD-x in contexts: with it in front (alone or behind another
  word), all images are mosaics, and by the plain prompt none is. Those that we looked at are the
  memorised work "Quiet Harbour". So where a style is erased, works in that style may still be
  there.
- At guidance 10 rather than 5, UCE's stars rise from 27 to 43 %, RECE's hearts from 67 to 92,
  ESD-u's stars from 5 to 12 and its hearts from 10 to 23 (13 of these 14 images are from one
  erasure). ESD-x's hearts, 13 %, are as many as models that never saw one draw (12).
"""

STEPS = core.SAMPLING["steps"]
GUIDANCE = core.SAMPLING["guidance"]
GUIDANCES = (7.5, 10)  # of the sixth attack
TO_LEARN_FROM = 24  # images
ATTACKS = (
    "by name", "learned words", "hard prompt", "noise", "head start",
    *(f"g {guidance:g}" for guidance in GUIDANCES),
)
TRAININGS = {"20": "after 20 training steps", "40": "after 40 training steps"}  # in the tables


# ---- the hard prompt


def count_shown(
    prompts: list[str], seeds: list[int], sd: StableDiffusion,
    shows: Callable[[list[Image.Image]], list[bool]],
) -> list[int]:
    """Returns how many images of each prompt show the concept: one a seed, with few steps."""
    repeated = [prompt for prompt in prompts for _ in seeds]
    settings = core.SAMPLING | {"steps": 5}
    images = sample.generate(sd, repeated, seed=seeds * len(prompts), **settings)
    shown = shows(images)
    return [sum(shown[i : i + len(seeds)]) for i in range(0, len(shown), len(seeds))]


def best_score(prompts: list[str], count: Callable[[list[str], list[int]], list[int]]) -> list[int]:
    """Returns in how many of four images of each prompt the concept is seen.

    To save time, a prompt that can't be the first of the best any more isn't drawn four
    times. Its score is too low then; the best score and its place are right.
    """
    found = count(prompts, [0])
    order = sorted(range(len(prompts)), key=found.__getitem__, reverse=True)
    for start in range(0, len(order), 16):
        best = max(found)
        place = found.index(best)
        chosen = []
        for i in order[start : start + 16]:
            most = found[i] + 3
            if most > best or (most == best and i < place):
                chosen.append(i)
        if chosen:
            for i, more in zip(chosen, count([prompts[i] for i in chosen], [1, 2, 3])):
                found[i] += more
    return found


def hard_prompt(prompt: str, tokens: list[str], count: Callable) -> str:
    """Returns the prompt behind up to two tokens that bring the concept back most often."""
    score = functools.partial(best_score, count=count)
    for _ in range(2):
        if score([prompt]) == [4]:
            break
        better = probes.hard_prompt(prompt, tokens, score, count=1)
        if better == prompt:
            break
        prompt = better
    return prompt


# ---- all attacks on one model


class Effort(NamedTuple):
    """How much is drawn and learned."""

    num: int  # images that are counted, for each attack
    iterations: int  # of learned words
    tokens: int  # of the vocabulary
    amounts: tuple[float, ...]  # of added noise
    stops: tuple[int, ...]  # steps of training after which images are counted


FULL = Effort(
    20, 150, tokens=10_000,
    amounts=(*probes.NOISES[::4],),  # six of the paper's 24, to save time
    stops=(5, 10, 20, 40, 80, 160),
)
QUICK = Effort(4, 2, tokens=6, amounts=(1.0,), stops=(2,))


def prompt_of(concept: str) -> str:
    """Returns the prompt that asks for a concept: "a star"."""
    prompt = core.prompt_for(concept)
    return with_article(prompt) if core.kind_of(concept) == "object" else prompt


def to_digits(found: list[bool]) -> str:
    """Returns a "1" for each True and a "0" for each False, as answers are stored."""
    return "".join("1" if each else "0" for each in found)


class Target(NamedTuple):
    """A model that is attacked, and what an attacker has.

    What is used in an attack has other seeds than the images that are counted.
    """

    context: Context
    sd: StableDiffusion
    concept: str
    originals: list[Image.Image]  # the original's: 24 to learn from, then one a head start
    x_t: Tensor  # the noise that the counted images start from

    @property
    def text(self) -> Tensor:
        """Returns the features of the concept's prompt, (1, 77, 768)."""
        return self.sd.encode([prompt_of(self.concept)])

    def batches(self) -> Iterator[probes.NoisedImages]:
        """Returns endless batches of the images to learn from."""
        return probes.noised_images(self.context.sd, self.originals[:TO_LEARN_FROM])

    def letters(self, images: list[Image.Image]) -> str:
        """Returns what the judge sees, a letter an image."""
        return core.to_letters(self.context.judge, images)[core.kind_of(self.concept)]

    def shows(self, images: list[Image.Image]) -> list[bool]:
        """Returns whether each image shows the concept."""
        head = core.kind_of(self.concept)
        seen = judging.read(self.context.judge, images)
        return [look[head] == self.concept for look in seen]

    def seen(self, text: Tensor, guidance: float = GUIDANCE) -> str:
        """Draws from all noises; returns what the judge sees."""
        return self.letters(probes.draw(self.sd, text, self.x_t, STEPS, guidance))


def seen_after(target: Target, hard: str, effort: Effort) -> dict[str, str]:
    """Returns what the judge sees by name, and after each attack that trains no weight."""
    sd = target.sd
    words = probes.learned_words(sd, target.batches(), iterations=effort.iterations)
    started = probes.head_start(
        sd, target.text, target.originals[TO_LEARN_FROM:], target.x_t,
        skip=STEPS // 2, steps=STEPS, guidance=GUIDANCE,
    )
    seen = {
        "by name": target.seen(target.text),
        "learned words": target.seen(words),
        "hard prompt": target.seen(sd.encode([hard])),
        "head start": target.letters(started),
    }
    for guidance in GUIDANCES:
        seen[f"g {guidance:g}"] = target.seen(target.text, guidance)
    return seen


def attack(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns what the judge sees after each attack, image by image."""
    effort = QUICK if context.quick else FULL
    prompt = prompt_of(cell.ask.about)
    num = TO_LEARN_FROM + effort.num
    originals = sample.generate(context.sd, [prompt], num, cell.seed, **core.SAMPLING)
    x_t = probes.noise(sd, core.image_seeds(cell.seed, effort.num))
    target = Target(context, sd, cell.ask.about, originals=originals, x_t=x_t)

    count = functools.partial(count_shown, sd=sd, shows=target.shows)
    hard = hard_prompt(prompt, probes.vocabulary(sd)[: effort.tokens], count)
    noise = probes.with_noise(
        sd, target.text, x_t, target.shows, effort.amounts, steps=STEPS, guidance=GUIDANCE
    )
    relearned = {}
    trained = probes.relearned(sd, prompt, target.batches(), effort.stops)
    for stop, model in zip(effort.stops, trained):
        relearned[stop] = target._replace(sd=model).seen(target.text)

    return {
        "seen": seen_after(target, hard, effort),
        "prompt": hard,
        "noise": to_digits(noise),
        "relearned": relearned,
    }


def attacks_on(concept: str) -> Ask:
    """Returns what asks for all attacks on a concept."""
    return Ask(f"attacks on {concept}", answer=attack, uses=(probes.draw, Target), about=concept)


def cells(models, concepts, seeds) -> list[Cell]:
    found = []
    for concept in concepts:
        erased = core.as_tuple(concept)
        asks = [attacks_on(each) for each in erased]
        found += core.grid(models, [erased], asks=asks, seeds=seeds)
    return found


# ---- what the answers say


def answers_of(answers: Answers, model: Model, concept: str) -> dict[int, dict]:
    """Returns a model's answers by seed."""
    ask = attacks_on(concept)
    seeds = answers.seeds(model, concept, ask)
    return {seed: answers.get(model, concept, ask, seed=seed) for seed in seeds}


def share(letters: str, concept: str) -> Share:
    """Returns how often the judge saw the concept."""
    head = core.kind_of(concept)
    seen = core.from_letters({head: letters}, head)
    return Share(seen.count(concept), len(letters))


def shares(found: dict[int, dict], concept: str, attack: str) -> list[Share]:
    """Returns how often an attack brings out the concept, for each seed."""
    several = []
    for answer in found.values():
        if attack == "noise":
            several.append(Share(answer["noise"].count("1"), len(answer["noise"])))
        elif attack in answer["seen"]:
            several.append(share(answer["seen"][attack], concept))
        elif attack in answer["relearned"]:
            several.append(share(answer["relearned"][attack], concept))
    return several


# ---- what an attack recovers, less what it teaches


def brought_out(
    answers: Answers, model: Model, concepts: Iterable[str], attack: str
) -> list[Share]:
    """Returns how often an attack brings out the concept, for each erasure."""
    several = []
    for concept in concepts:
        several += shares(answers_of(answers, model, concept), concept, attack)
    return several


def net(
    answers: Answers, model: Model, concepts: Iterable[str], attack: str
) -> stats.Estimate:
    """Returns how much more often an attack brings concepts out of a model than it teaches them.

    What it teaches is what it brings out of models that never saw them. In percent points, over
    the concepts for which both are stored.
    """
    recovered = []
    taught = []
    for concept in concepts:
        of_model = brought_out(answers, model, [concept], attack)
        of_never_saw = brought_out(answers, NEVER_SAW, [concept], attack)
        if of_model and of_never_saw:
            recovered += of_model
            taught += of_never_saw
    return stats.difference(recovered, taught)


# ---- the tables and the figure


def num_models(answers: Answers, model: Model, concepts: Iterable[str]) -> int:
    """Returns how many distinct models a row has: some are the same with every seed."""
    found = set()
    for concept in concepts:
        for seed in answers_of(answers, model, concept):
            cell = core.cell_of(model, concept, seed, attacks_on(concept))
            found.add((cell.concepts, seed if models.depends_on_seed(model) else 0))
    return len(found)


def table_of_nets(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each concept and model, if a model that never saw it is attacked."""
    attacks = {attack: attack for attack in ATTACKS} | TRAININGS
    rows = []
    for concept, model in itertools.product(CONCEPTS, models):
        cells = [stats.show(net(answers, model, [concept], attack)) for attack in attacks]
        if model != NEVER_SAW and any(cells):
            rows.append([concept, model.label, *cells])
    header = ["concept", "erased by", *(f"net: {title}, points" for title in attacks.values())]
    return core.table(header, rows) if rows else ""


def table_of_attacks(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each concept and model."""
    attacks = {attack: attack for attack in ATTACKS} | TRAININGS
    rows = []
    for concept, model in itertools.product(CONCEPTS, models):
        found = answers_of(answers, model, concept)
        if found:
            cells = [stats.text(shares(found, concept, attack)) for attack in attacks]
            num = f"{num_models(answers, model, [concept])}"
            rows.append([concept, model.label, num, *cells])
    header = ["concept", "erased by", "models", *(f"{title}, %" for title in attacks.values())]
    return core.table(header, rows)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns tables of what attacks bring out, and of net recovery."""
    parts = [table_of_attacks(answers, models), table_of_nets(answers, models)]
    return "\n\n".join(part for part in parts if part)


def figure(answers: Answers, models: list[Model]):
    """Returns a panel for each concept: what each attack brings out of each model, percent."""
    columns = {attack: attack for attack in ATTACKS} | TRAININGS
    panels = {}
    for concept in CONCEPTS:
        panels[concept] = {}
        for model in models:
            found = answers_of(answers, model, concept)
            cells = {}
            for attack, title in columns.items():
                cells[title] = stats.estimate(shares(found, concept, attack))
            panels[concept][model.label] = cells
    return figures.heat_map(figures.with_values(panels))
