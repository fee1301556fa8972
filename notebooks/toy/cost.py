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
from typing import Callable

from tqdm import tqdm

import erase
import sample
from notebooks.toy import judge as judging
from notebooks.toy import measure, tables

OBJECTS, SEEDS = ("star", "heart", "moon"), (0, 1, 2)
RATES = {"esd-x": measure.flags()["lr"], "esd-u": measure.LR_ESD_U}
EVERY_STEP = functools.partial(erase.own_ways, every_step=True)
WAYS: dict[str, tuple[int, Callable | None]] = {  # steps and data; None: drawn by the frozen model
    **{f"the edited model's way, {n} steps": (n, erase.own_ways) for n in (50, 20, 8)},
    **{f"every step of ways of {n}": (n, EVERY_STEP) for n in (8, 10, 20, 50)},
    "the frozen model's way, 50 steps": (50, None),
}
KINDS = {"object": measure.objects(10), "style": measure.styled(1), "colour": measure.coloured(1)}


def erased(sd: sample.StableDiffusion, way: str, method: str, concept: str, seed: int
           ) -> tuple[sample.StableDiffusion, dict]:
    """The edited model, and what it cost: seconds, and U-Net calls per gradient step.

    A call is one latent through the U-Net; a backward pass counts as two.
    """
    steps, data = WAYS[way]
    settings = measure.flags() | {
        "steps": steps, "batch": 1, "lr": RATES[method],
        "data": data or (lambda unet, *rest: erase.own_ways(sd.unet, *rest))}
    calls, began = [], time.perf_counter()
    hook = sd.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    theta = erase.erase(sd, [concept], method, seed=seed, **settings)
    hook.remove()
    seconds = time.perf_counter() - began
    per_step = sum(calls) / settings["iterations"] + 2
    return sample.with_tuned(sd, theta), {"calls": per_step, "seconds": seconds}


def seen(sd: sample.StableDiffusion, judge: judging.Judge, concept: str) -> dict[str, list[int]]:
    """[images that show what was asked for, images], of the concept and of the others' kinds."""
    found = {}
    for head, questions in KINDS.items():
        images = sample.generate(sd, [q.prompt for q in questions for _ in range(q.num)],
                                 seed=[1000 + i for i in range(sum(q.num for q in questions))],
                                 steps=10, guidance=5.0, batch=50)
        wanted = [q.wanted for q in questions for _ in range(q.num)]
        right = [(w["object"] == concept, w[head] == look[head])
                 for w, look in zip(wanted, judging.read(judge, images))]
        found[head] = [sum(hit for own, hit in right if not own), sum(not own for own, _ in right)]
        if head == "object":
            found["left"] = [sum(hit for own, hit in right if own), sum(own for own, _ in right)]
    return found


def row(name: str, cells: list[dict]) -> list[str]:
    """A line of the table: how many erasures, their means, and pooled shares."""
    means = [f"{sum(cell[key] for cell in cells) / len(cells):.1f}" if key in cells[0] else ""
             for key in ("calls", "seconds")]
    pooled = [[sum(cell[key][i] for cell in cells) for i in (0, 1)]
              for key in ("left", "object", "style", "colour")]
    return [name, str(len(cells)), *means, *(tables.share(*pair) for pair in pooled)]


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    found = sample.read_json(args.results) if args.results.exists() else {}
    cells = [("original", "", concept, "") for concept in OBJECTS]
    cells += [(way, method, concept, str(seed)) for seed in SEEDS for method in RATES
              for way in WAYS for concept in OBJECTS]
    todo = [] if args.stored else [cell for cell in cells if "/".join(cell) not in found]
    sd, judge = sample.load("notebooks/toy"), judging.load("notebooks/toy")
    for way, method, concept, seed in tqdm(todo, unit="erasure"):
        model, cost = erased(sd, way, method, concept, int(seed)) if seed else (sd, {})
        found["/".join((way, method, concept, seed))] = cost | seen(model, judge, concept)
        sample.write_whole(args.results, lambda part: part.write_text(json.dumps(found)))
    rows = [row("original", [found[f"original//{concept}/"] for concept in OBJECTS])]
    for method in RATES:
        for way in WAYS:
            mine = [found[key] for key in map("/".join, cells)
                    if key in found and key.startswith(f"{way}/{method}/")]
            rows += [row(f"{method}, {way}", mine)] if mine else []
    print(tables.table(["x_t", "erasures", "U-Net calls per gradient step", "seconds", "left, %",
                        "other objects, %", "styles, %", "colours, %"], *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="What an erasure costs, and what it buys.")
    parser.add_argument("--results", type=Path, default=Path("notebooks/toy/cost.json"))
    parser.add_argument("--stored", action="store_true", help="only print what is stored")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
