"""Trains the U-Nets that erased models are compared with: without a concept, or on all of it again.

    python -m notebooks.experiments.replicates --list                  # names; which are trained
    python -m notebooks.experiments.replicates star_0 star_1 again_1   # these, one after the other
    python -m notebooks.experiments.replicates                         # all that are missing

Each has the miniature's VAE and text encoder, which saw every concept, as many steps as its U-Net
had, and random numbers of its own, except star_0, which has the original's: compare the original's
distances from star_0 and star_1. A U-Net takes 50 minutes on a quiet core that computes in
bfloat16, one to two hours on one that doesn't. The same command resumes after an interruption. The
U-Nets go to `runs/` and aren't shipped; only their answers are stored, with the experiments.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import sample
from notebooks.experiments import core, models, robust
from notebooks.toy import train
from sample import UsageError


class Replicate(NamedTuple):
    """A U-Net to train."""

    model: core.Model
    without: tuple[str, ...]  # what its training set doesn't have
    number: int  # in its name: experiments call it the model's seed
    seed: int  # of the training

    @property
    def folder(self) -> Path:
        """Returns where the model goes, as experiments look for it."""
        return Path(self.model.folder.format(concept="+".join(self.without), seed=self.number))

    @property
    def is_trained(self) -> bool:
        """Whether it is there."""
        return (self.folder / "unet" / sample.DIFFUSERS[0]).exists()


def replicates() -> dict[str, Replicate]:
    """Returns all of them, by name, the most useful first."""
    wanted = {}
    for number in models.never_saw.seeds:
        for concept in robust.CONCEPTS:
            wanted[f"{concept}_{number}"] = models.never_saw, (concept,), number
    for number in models.again.seeds:
        wanted[f"again_{number}"] = models.again, (), number
    wanted["censored"] = models.censored, tuple(sorted(core.IMPLIED)), 0

    # train.py takes the next seed, too
    return {name: Replicate(*each, seed=10 * i) for i, (name, each) in enumerate(wanted.items())}


def train_one(replicate: Replicate, original: Path, unet_steps: int) -> None:
    """Copies the other parts from the original, and trains a U-Net, or goes on with it."""
    others = shutil.ignore_patterns("unet")
    shutil.copytree(original, replicate.folder, ignore=others, dirs_exist_ok=True)
    train.run(argparse.Namespace(
        stages=["unet"], run=replicate.folder.parent, out=replicate.folder,
        without=[*replicate.without], unet_steps=unet_steps, seed=replicate.seed,
    ))
    train.training_set.cache_clear()  # 0.6 GB


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    known = replicates()
    for name in args.names:
        if name not in known:
            raise UsageError(f"unknown model {name!r}, choose from {', '.join(known)}")
    if args.list:
        for name, replicate in known.items():
            state = "trained" if replicate.is_trained else "missing"
            print(f"{name:10} {state}  {replicate.folder}")
        return

    for name in args.names or known:
        if known[name].is_trained:
            print(f"{name} is there: {known[name].folder}", file=sys.stderr)
            continue
        print(name, flush=True)
        train_one(known[name], args.model, args.unet_steps)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains U-Nets that never saw a concept, and the original again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="those of --list; all that are missing if none")
    add("--list", action="store_true", help="print the names and train nothing")
    add("--model", type=Path, default=core.TOY, help="the original")
    add("--unet-steps", type=int, default=9000, help="as many as the original had")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
