"""What an erasure costs in U-Net calls, and what they buy, for each way of drawing x_t.

    OMP_NUM_THREADS=1 python -m notebooks.toy.cost    # prints what is stored, makes what is missing

Three objects and three seeds, all with the paper's batch of 1 and with the number of gradient
steps and the learning rate of notebooks/toy/flags. Results are kept in notebooks/toy/cost.json,
erasure by erasure, and the same command goes on from there; from nothing it takes two hours.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Callable, NamedTuple

from torch import nn
from tqdm import tqdm

import erase
import sample
from notebooks.toy import judge as judging
from notebooks.toy import measure, tables
from notebooks.toy.models import RATES, x_t_from_frozen
from sample import StableDiffusion

OBJECTS = ("star", "heart", "moon")
SEEDS = (0, 1, 2)
KINDS = {"object": measure.objects(10), "style": measure.styled(1), "colour": measure.coloured(1)}


# ---- where x_t comes from, and what a gradient step costs


class Source(NamedTuple):
    """Where x_t comes from: trajectories of so many steps."""

    steps: int
    every_step: bool = False
    by_frozen: bool = False  # drawn by the original model, not by the edited one

    def data(self, frozen: nn.Module) -> Callable:
        """Returns what `erase.erase` takes as its `data`."""
        if self.by_frozen:
            return functools.partial(x_t_from_frozen, frozen=frozen, steps=self.steps)
        return functools.partial(
            erase.x_t_from_model, steps=self.steps, every_step=self.every_step
        )

    def expected_calls(self) -> float:
        """Returns the U-Net calls of a gradient step, on average over random times:

        5 + 2 * predictions; 5 = the target's 2, and a forward and a backward pass, which counts
        as two; 2 = the prompt and the empty one; predictions = (steps - 1) / 2, or
        (steps - 1) / steps, where every x_t of a trajectory is used.
        """
        used = self.steps if self.every_step else 2
        return 5 + 2 * (self.steps - 1) / used


SOURCES = {
    "the edited model's trajectory, 50 steps": Source(50),
    "the edited model's trajectory, 20 steps": Source(20),
    "the edited model's trajectory, 8 steps": Source(8),
    "every step of trajectories of 8": Source(8, every_step=True),
    "every step of trajectories of 10": Source(10, every_step=True),
    "every step of trajectories of 20": Source(20, every_step=True),
    "every step of trajectories of 50": Source(50, every_step=True),
    "the frozen model's trajectory, 50 steps": Source(50, by_frozen=True),
}


class Erased(NamedTuple):
    """An edited model, and what it cost."""

    sd: StableDiffusion
    calls: float  # U-Net calls per gradient step: one is one latent; a backward pass counts as two
    seconds: float


def erased(
    sd: StableDiffusion, source: Source, method: str, concept: str, seed: int, iterations: int
) -> Erased:
    """Erases a concept with a batch of 1, and counts what the U-Net is called with."""
    calls = []
    hook = sd.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    began = time.perf_counter()
    try:
        theta = erase.erase(
            sd, [concept], method=method, lr=RATES[method], iterations=iterations, batch=1,
            seed=seed, data=source.data(sd.unet),
        )
    finally:
        hook.remove()
    seconds = time.perf_counter() - began

    forward = sum(calls) / iterations
    return Erased(sample.with_weights(sd, theta), calls=forward + 2, seconds=seconds)


# ---- what the erasures leave


def seen(sd: StableDiffusion, judge: judging.Judge, concept: str) -> dict[str, list[int]]:
    """Returns [images that show what was asked for, images], of the concept ("left") and of other
    objects, styles and colours.
    """
    found = {}
    for head, questions in KINDS.items():
        prompts = []
        wanted = []
        for question in questions:
            prompts += [question.prompt] * question.num
            wanted += [question.wanted] * question.num
        seeds = [1000 + i for i in range(len(prompts))]
        images = sample.generate(sd, prompts, seed=seeds, steps=10, guidance=5.0, batch=50)

        own = []
        others = []
        for asked, look in zip(wanted, judging.read(judge, images)):
            hits = own if asked["object"] == concept else others
            hits.append(asked[head] == look[head])
        found[head] = [sum(others), len(others)]
        if head == "object":
            found["left"] = [sum(own), len(own)]
    return found


# ---- the erasures that are made, and their table


class Cell(NamedTuple):
    """One erasure, or the original model asked for one concept."""

    source: str
    method: str
    concept: str
    seed: str

    @property
    def key(self) -> str:
        return "/".join(self)


def all_cells() -> list[Cell]:
    """Returns all erasures, seed by seed."""
    cells = [Cell("original", "", concept, "") for concept in OBJECTS]
    for seed in SEEDS:
        for method in RATES:
            for source in SOURCES:
                cells += [Cell(source, method, concept, str(seed)) for concept in OBJECTS]
    return cells


def answer(sd: StableDiffusion, judge: judging.Judge, cell: Cell, iterations: int) -> dict:
    """Returns what a cell's images show, and what its erasure cost, if there is one."""
    if not cell.method:
        return seen(sd, judge, cell.concept)
    model, calls, seconds = erased(
        sd, SOURCES[cell.source], method=cell.method, concept=cell.concept, seed=int(cell.seed),
        iterations=iterations,
    )
    return {"calls": calls, "seconds": seconds} | seen(model, judge, cell.concept)


def row(name: str, expected: str, answers: list[dict]) -> list[str]:
    """Returns a line of the table: how many erasures, their means, and pooled shares."""
    means = []
    for key in ("calls", "seconds"):
        values = [answer[key] for answer in answers if key in answer]
        means.append(f"{sum(values) / len(values):.1f}" if values else "")

    pooled = []
    for key in ("left", "object", "style", "colour"):
        hits = sum(answer[key][0] for answer in answers)
        asked = sum(answer[key][1] for answer in answers)
        pooled.append(tables.share(hits, asked))
    return [name, str(len(answers)), expected, *means, *pooled]


def cost_table(found: dict[str, dict]) -> str:
    """Returns the table of what is stored."""
    groups = {}
    for cell in all_cells():
        if cell.key in found:
            groups.setdefault((cell.method, cell.source), []).append(found[cell.key])

    header = [
        "x_t", "erasures", "U-Net calls per gradient step, expected", "measured", "seconds",
        "left, %", "other objects, %", "styles, %", "colours, %",
    ]
    rows = []
    for method in ("", *RATES):
        for source in ("original", *SOURCES):
            if answers := groups.get((method, source)):
                name = f"{method}, {source}" if method else source
                expected = f"{SOURCES[source].expected_calls():.1f}" if method else ""
                rows.append(row(name, expected, answers))
    return tables.table(header, *rows)


# ---- the command line


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    found = sample.read_json(args.results) if args.results.exists() else {}
    todo = [] if args.stored else [cell for cell in all_cells() if cell.key not in found]
    if todo:
        sd = sample.load("notebooks/toy/model")
        judge = judging.load("notebooks/toy/model")
        iterations = measure.flags()["iterations"]

    for cell in tqdm(todo, unit="erasure"):
        found[cell.key] = answer(sd, judge, cell, iterations=iterations)
        text = json.dumps(found) + "\n"
        sample.write_whole(args.results, lambda part: part.write_text(text))
    print(cost_table(found))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="What an erasure costs, and what it buys.")
    add = parser.add_argument
    add("--results", type=Path, default=Path("notebooks/toy/cost.json"), help="a JSON file")
    add("--stored", action="store_true", help="only print what is stored")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
