"""Runs experiments: answers what isn't stored, prints the tables, draws the figures.

    python -m notebooks.experiments.run objects eta      # two experiments
    python -m notebooks.experiments.run all --quick      # two iterations, one image a prompt
    python -m notebooks.experiments.run methods robust --method my_file:my_erase --label mine
    python -m notebooks.experiments.run methods --files star.safetensors --concept star

my_erase is called as (sd, concepts: {prompt: anchor}, keep: prompts, seed: int, and what
--set gives) and returns the new weights by name, or a model. methods/README.md has an
example. With new rows, only theirs are answered; the tables have the stored ones, too. The
results in notebooks/experiments/results are read, never written, unless
--results names them: new answers go to runs/. After a kill, run the same command to resume.
"""

import argparse
import concurrent.futures
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from tqdm import tqdm

import erase
import sample
from notebooks.experiments import checksums, core, figures
from notebooks.experiments.core import Answers, Cell, Context, Model
from sample import UsageError

NAMES = (
    "original",
    "objects",
    "styles",
    "implied",
    "quality",
    "works",
    "eta",
    "paraphrase",
    "choices",
    "several",
    "guidance",
    "methods",
    "robust",
    "ground_truth",
    "verdict",
    "layers",
    "cost",
)
SHIPPED = Path(__file__).with_name("results")


def experiment(name: str) -> types.ModuleType:
    """Returns an experiment's module. Its parts:

    MODELS, CONCEPTS, SEEDS: what is combined. cells(models, concepts, seeds): the cells.
    table(answers, models), figure(answers, models): Markdown, a figure. FINDINGS: what
    follows, Markdown. Some have sheet(context, answers), images; READS, the experiments
    whose answers the table is made of; PAPER, the paper's numbers, by a model's label.
    """
    return importlib.import_module(f"notebooks.experiments.{name}")


# ---- stored answers


def reads(name: str) -> tuple[str, ...]:
    """Returns the experiments whose answers an experiment's table is made of."""
    return getattr(experiment(name), "READS", (name,))


def stored(name: str, folder: Path = SHIPPED) -> Answers:
    """Returns the stored answers of an experiment."""
    records = {}
    for each in reads(name):
        records |= read_file(folder / f"{each}.json")
    return Answers(records)


def stored_table(name: str, folder: Path = SHIPPED) -> str:
    """Returns the table of an experiment's stored answers, Markdown."""
    module = experiment(name)
    return module.table(stored(name, folder), module.MODELS)


def read_file(file: Path) -> dict[str, dict]:
    """Returns an experiment's records, none if there is no file. Raises UsageError."""
    records = sample.read_json(file) if file.exists() else {}
    for key, record in records.items():
        try:
            _, _, seed, _ = key.rsplit("/", 3)
            int(seed.removeprefix("seed "))
            record["answer"], {**record["settings"]["weights"]}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file} is damaged, delete it: {key!r} has no answer") from error
    return records


def read_records(folder: Path) -> dict[str, dict[str, dict]]:
    """Returns the records in a folder of results, by experiment and cell."""
    return {name: read_file(folder / f"{name}.json") for name in NAMES}


def write_records(folder: Path, name: str, records: dict[str, dict]) -> None:
    """Writes an experiment's records, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(records[key])}" for key in records]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    sample.write_whole(folder / f"{name}.json", lambda part: part.write_text(text))


def without_fingerprint(settings: dict) -> dict:
    """Returns settings without the fingerprints of models that were trained elsewhere."""
    settings = {**settings}
    for key in {"weights", "against"} & settings.keys():
        settings[key] = {**settings[key]}
        settings[key].pop("fingerprint", None)
    return settings


def question_of(ask: str, settings: dict) -> str:
    """Returns what two cells with one answer have in common, whatever they are called."""
    return f"{ask} {checksums.crc(settings)}"


def by_question(*several: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Returns records by what they depend on, whichever experiment asked."""
    found = {}
    for records in several:
        for of_experiment in records.values():
            for key, record in of_experiment.items():
                ask = key.rpartition("/")[2]
                settings = record["settings"]
                found[question_of(ask, settings)] = record
                # a model that was trained without the concept isn't shipped
                found[question_of(ask, without_fingerprint(settings))] = record
    return found


# ---- new answers


class Setup(NamedTuple):
    """The arguments of `core.open_context`: what a process needs to answer."""

    model: Path
    weights: Path
    quick: bool


class Answered(NamedTuple):
    """A cell with its answer and all that this depends on."""

    cell: Cell
    record: dict


class Failed(NamedTuple):
    """A cell that couldn't be answered."""

    key: str
    line: str  # what the error says
    traceback: str  # "" for input that can't be used


def answer(setup: Setup, cells: list[Cell]) -> list[Answered] | Failed:
    """Answers cells that have the same weights; says what is wrong with a method, if it fails."""
    context = core.open_context(*setup)
    cell = cells[0]
    answered = []
    try:
        sd = context.load(cell.model, cell.concepts, cell.seed)
        for cell in cells:
            record = {
                "settings": context.settings(cell),
                "answer": cell.ask.answer(context, sd, cell),
            }
            answered.append(Answered(cell, json.loads(json.dumps(record))))
    except (OSError, MemoryError):  # a full disk: the others would fail as well
        raise
    except UsageError as error:
        return Failed(cell.key, str(error), traceback="")
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}"
        return Failed(cell.key, line, traceback.format_exc())
    return answered


def end_with_parent() -> None:
    """Ends this process once its parent has ended, even if that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def one_of_several() -> None:
    """Prepares a worker process: it uses one core and leaves Ctrl-C to its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that it cleans up
    threading.Thread(target=end_with_parent, daemon=True).start()


def answers(
    setup: Setup, groups: list[list[Cell]], processes: int
) -> Iterator[list[Answered] | Failed]:
    """Yields the answers of each group, or what is wrong, in the order in which they are done."""
    processes = min(processes, len(groups))
    if processes < 2:
        torch.set_num_threads(1)  # as each of several has: seconds can be compared
        for cells in groups:
            yield answer(setup, cells)
        return

    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, initializer=one_of_several)
    try:
        jobs = [pool.submit(answer, setup, cells) for cells in groups]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
    except BrokenProcessPool as error:
        raise UsageError(
            "a process ended without an answer, perhaps for lack of memory: try --processes 1; "
            "what was answered is kept"
        ) from error
    except BaseException:  # such as Ctrl-C: what is being computed isn't wanted
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def with_equal_weights(context: Context, cells: list[Cell]) -> list[list[Cell]]:
    """Returns the cells in groups: an erasure is made once, for all that is asked of it.

    What only has to be loaded is a group for each cell, so that all processes have work.
    """
    groups = {}
    for i, cell in enumerate(cells):
        settings = context.weights_settings(cell.model, cell.concepts, cell.seed)
        group = checksums.crc(settings) if cell.model.method else i
        groups.setdefault(group, []).append(cell)
    return [*groups.values()]


def those_here(context: Context, cells: list[Cell]) -> list[Cell]:
    """Returns the cells whose model is here; says which was to be trained elsewhere and isn't."""
    here = []
    missing = set()
    for cell in cells:
        settings = context.settings(cell)
        weights = [settings["weights"], settings.get("against", {})]
        trained = [each for each in weights if "folder" in each]
        not_here = {each["folder"] for each in trained if "fingerprint" not in each}
        missing |= not_here
        if not not_here:
            here.append(cell)
    if missing:
        names = ", ".join(sorted(missing))
        print(f"left out, as it isn't trained: {names}; see replicates.py", file=sys.stderr)
    return here


# ---- the command line


def settings_from(given: list[str]) -> dict:
    """Returns what --set gives: NAME=VALUE, a value being JSON or else a string."""
    settings = {}
    for each in given:
        name, is_pair, value = each.partition("=")
        if not is_pair:
            raise UsageError(f"--set {each}: write NAME=VALUE, such as iterations=80")
        if name in ("sd", "concepts", "keep", "seed"):
            raise UsageError(f"--set {each}: a method is given {name} for each cell")
        if value in ("True", "False", "None"):
            raise UsageError(f"--set {each}: write true, false or null, as in JSON")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def check_method(method: Callable, name: str, settings: dict) -> None:
    """Raises UsageError unless it is a function that takes what it will be given."""
    if not inspect.isfunction(method):
        raise UsageError(f"--method {name} isn't a function: write one with def")
    try:
        inspect.signature(method).bind(None, concepts={}, keep=[], seed=0, **settings)
    except TypeError as error:
        raise UsageError(
            f"--method {name}: {error}; it is called with sd, concepts, keep, seed and --set"
        ) from error


def new_models(args: argparse.Namespace) -> list[Model]:
    """Returns the models that the command line adds to the experiments' own."""
    models = []
    together = tuple(args.concept or ())  # what each of them erases
    added = f" ({' and '.join(together)} together)" if len(together) > 1 else ""
    if args.method:
        method = erase.find_function("--method", args.method)
        settings = settings_from(args.set)
        check_method(method, args.method, settings)
        models.append(Model(
            (args.label or args.method) + added, method, settings, together=together,
            times_for_a_style=1,
        ))
    for file in args.files:
        sd = core.open_context(args.model, args.weights, args.quick).sd
        sample.load_erased(sd, file)  # refused here, not in the middle of a run
        models.append(Model(file.stem + added, file=str(file), together=together))
    return models


def models_of(name: str, more: list[Model]) -> list[Model]:
    """Returns an experiment's models and the new ones. Raises UsageError for equal labels."""
    models = [*experiment(name).MODELS, *more]
    labels = [model.label for model in models]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"{name}: two models are called {label!r}: choose another --label, or rename "
                "the file"
            )
    return models


def check_only(labels: list[str], models: dict[str, list[Model]]) -> None:
    """Raises UsageError for a label that none of the experiments has."""
    known = [*dict.fromkeys(model.label for several in models.values() for model in several)]
    for label in labels:
        if label not in known:
            raise UsageError(f"--only {label!r}: choose from {', '.join(known)}")


def concepts_of(name: str, args: argparse.Namespace) -> list:
    """Returns the concepts that an experiment asks about. Raises UsageError if there is none."""
    known = experiment(name).CONCEPTS
    if not args.concept:
        return known[:1] if args.quick else known
    chosen = [each for each in known if {*core.as_tuple(each)} <= {*args.concept}]
    if known and not chosen:
        names = ", ".join("+".join(core.as_tuple(each)) for each in known)
        raise UsageError(f"--concept {' '.join(args.concept)}: {name} asks about {names}")
    return chosen


def cells_of(name: str, args: argparse.Namespace, models: list[Model]) -> list[Cell]:
    """Returns the cells of an experiment's models, as the flags narrow them."""
    module = experiment(name)
    seeds = module.SEEDS if args.seeds is None else range(args.seeds)
    seeds = [*seeds][:1] if args.quick else seeds
    if args.only:
        models = [model for model in models if model.label in args.only]
    cells = module.cells(models, concepts_of(name, args), seeds)
    return [*{cell.key: cell for cell in cells}.values()]


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that don't fit together."""
    if args.processes < 1 or (args.seeds is not None and args.seeds < 1):
        raise UsageError(f"--processes is {args.processes}, --seeds {args.seeds}: 1 or more")
    if args.files and not args.concept:
        raise UsageError("--files: add --concept with all that they erase")
    if (args.label or args.set) and not args.method:
        raise UsageError("--label and --set are of a --method, and there is none")
    for concept in args.concept or ():
        core.kind_of(concept)


def show(name: str, records: dict[str, dict], models: list[Model], folder: Path) -> None:
    """Prints an experiment's table, and draws its figure next to its answers."""
    module = experiment(name)
    found = Answers(records)
    title = module.__doc__.partition("\n")[0]
    print(f"\n**{title}**\n\n{module.table(found, models)}", flush=True)

    if figures.pyplot is None:
        print("no figure: pip install -r notebooks/requirements.txt", file=sys.stderr)
        return
    figures.save(module.figure(found, models), folder / f"{name}.png")


def draw_sheet(name: str, records: dict[str, dict], context: Context, folder: Path) -> None:
    """Draws an experiment's images, if it shows some."""
    module = experiment(name)
    if hasattr(module, "sheet"):
        sheet = module.sheet(context, Answers(records)).quantize(256)
        file = folder / f"{name}_images.png"
        sample.write_whole(file, lambda part: sheet.save(part, format="PNG"))


class Plan:
    """Which cells are wanted, what is known of them, and what is still to be asked."""

    def __init__(
        self, context: Context, wanted: dict[str, list[Cell]], known: dict[str, dict],
        new: dict[str, list[Cell]] | None = None,
    ):
        """wanted: cells by experiment. known: records by question.

        new: those of wanted that may be answered; all of them, if it is None.
        """
        self.known = known
        self.questions = {}  # of each experiment, by key
        self.todo = {}  # a cell for each question, whichever experiments ask it
        for name, cells in wanted.items():
            may_be_answered = {cell.key for cell in (cells if new is None else new[name])}
            self.questions[name] = {}
            for cell in cells:
                question = question_of(cell.ask.name, context.settings(cell))
                self.questions[name][cell.key] = question
                if question not in known and cell.key in may_be_answered:
                    self.todo.setdefault(question, cell)

    def add(self, answered: list[Answered]) -> list[str]:
        """Takes answers in; returns which experiments asked for them."""
        new = {}
        for cell, record in answered:
            new[question_of(cell.ask.name, record["settings"])] = record
        self.known |= new
        return [name for name, asked in self.questions.items() if {*asked.values()} & {*new}]

    def records(self, name: str) -> dict[str, dict]:
        """Returns an experiment's records so far, in the order of its cells."""
        questions = self.questions[name]
        return {key: self.known[q] for key, q in questions.items() if q in self.known}


def write_answers(plan: Plan, name: str, folder: Path, shipped: dict[str, dict]) -> None:
    """Writes what an experiment asked, unless all of it is stored; other answers there stay.

    shipped: records that needn't be written again.
    """
    own = read_file(folder / f"{name}.json")
    records = plan.records(name)
    if any(records[key] not in (own.get(key), shipped.get(key)) for key in records):
        others = {key: own[key] for key in own if key not in plan.questions[name]}
        write_records(folder, name, records | others)


class Outcome(NamedTuple):
    """What became of the cells that were to be answered."""

    changed: set[str]  # experiments that have more answers
    failed: list[Failed]


def answer_all(plan: Plan, setup: Setup, processes: int, folder: Path) -> Outcome:
    """Answers and writes what is still to be asked; one that fails doesn't stop the others."""
    context = core.open_context(*setup)
    cells = those_here(context, [*plan.todo.values()])
    changed = set()
    failed = []
    with tqdm(total=len(cells), unit="answer", disable=not cells) as bar:
        for answered in answers(setup, with_equal_weights(context, cells), processes):
            if isinstance(answered, Failed):
                failed.append(answered)
                bar.write(f"failed: {answered.key}: {answered.line}", file=sys.stderr)
                continue
            for name in plan.add(answered):
                changed.add(name)
                write_answers(plan, name, folder, shipped={})
            bar.set_postfix_str(answered[-1].cell.key, refresh=False)
            bar.update(len(answered))
    return Outcome(changed, failed)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    chosen = NAMES if "all" in args.experiments else [*dict.fromkeys(args.experiments)]
    check(args)
    if args.results is None:
        args.results = Path("runs/quick" if args.quick else "runs/experiments/results")
    more = new_models(args)
    asked = [*dict.fromkeys(each for name in chosen for each in (*reads(name), name))]
    models = {name: models_of(name, more) for name in asked}
    check_only(args.only or [], models)

    setup = Setup(args.model, args.weights, args.quick)
    context = core.open_context(*setup)
    shipped = {} if args.anew else read_records(SHIPPED)
    known = by_question(shipped, read_records(args.results))
    wanted = {name: cells_of(name, args, models[name]) for name in asked}
    new = {name: cells_of(name, args, more) for name in asked} if more else None
    plan = Plan(context, wanted, known, new)
    changed, failed = answer_all(plan, setup, args.processes, args.results)
    for name in asked:  # what it shares with another experiment, too
        write_answers(plan, name, args.results, shipped.get(name, {}))

    is_whole = not (more or args.only or args.concept)
    for name in chosen:
        records = {}
        for each in reads(name):
            records |= plan.records(each)
        show(name, records, models[name], args.results)
        file = f"{name}_images.png"
        has_images = (SHIPPED / file).exists() or (args.results / file).exists()
        if is_whole and not failed and (name in changed or not has_images):
            draw_sheet(name, plan.records(name), context, args.results)
    if failed:
        first = failed[0]
        says = f"{len(failed)} failed, the first is {first.key}: {first.line}"
        if not first.traceback:
            raise UsageError(says)
        print(f"{first.traceback}\n{says}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="The experiments of the paper, and beyond, on the miniature.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="+", choices=["all", *NAMES], metavar="EXPERIMENT",
        help=f"all, or some of {', '.join(NAMES)}")
    add("--quick", action="store_true", help="tries the code: two iterations, few images")
    add("--anew", action="store_true", help="takes no answer from the shipped results")
    add("--only", nargs="+", action="extend", metavar="LABEL",
        help="only these of an experiment's models")
    add("--seeds", type=int, help="erasures of each kind, each with images of its own")

    add("--method", metavar="MODULE:FUNCTION", help="a method of your own: a new row")
    add("--label", help="what its row is called")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of --method")
    add("--files", nargs="+", action="extend", type=Path, default=[],
        help="weights made elsewhere: new rows")
    add("--concept", nargs="+", action="extend", metavar="NAME",
        help="only these; new rows erase all of them, together")

    add("--model", type=Path, default=core.TOY, help="the miniature, with its judge")
    add("--weights", type=Path, default=Path("runs/experiments"), help="keeps erased weights")
    add("--results", type=Path, help="a folder for new answers, figures and images; "
        "runs/experiments/results or, with --quick, runs/quick")
    add("--processes", type=int, default=2, help="each takes a core and 2 GB of memory")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
