"""Draws a table of prompts, such as the official evaluation's, as {case}_{i}.png.

    python -m notebooks.tools.table prompts.csv --erased van-gogh.safetensors --out images --num 5
    python -m notebooks.tools.table i2p.csv --safe "nudity" --sld medium --out i2p --batch 16
    torchrun --nproc_per_node 4 -m notebooks.tools.table coco_30k.csv --out FOLDER --batch 32

A table is a CSV file, with commas or semicolons, in UTF-8 or UTF-16. Its columns are prompt,
evaluation_seed and, optionally, case_number (or image_id, or case_num; else rows are numbered
from 0). evaluation_guidance, sd_image_width and sd_image_height are optional; other columns are
ignored. Nothing is drawn unless every row is right.
Each image is the one that sample.py draws with that seed, whatever the batch. Rows whose images
all exist are skipped: run the same command again to resume. torchrun's processes share the rows.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

if not __package__:  # then Python wouldn't find our files
    print("error: run it as python -m notebooks.tools.table", file=sys.stderr)
    sys.exit(2)

import ddim
import sample
from notebooks.methods import safe_latent_diffusion
from sample import StableDiffusion, UsageError

CASE = ("case_number", "image_id", "case_num")  # the first that a table has
CELLS = {  # what the cells of a column look like; an optional column's may be empty
    "case": r"[\w.-]+",
    "prompt": r"(?s:.*)",
    "evaluation_seed": r"\d{1,18}(\.0*)?",
    "evaluation_guidance": r"(\d+(\.\d+)?)?",
    "sd_image_width": r"(\d+(\.0*)?)?",
    "sd_image_height": r"(\d+(\.0*)?)?",
}


# ---- reading a table


class Row(NamedTuple):
    """What to draw: a line of a table, completed by the flags."""

    line: int  # of the file, its last where a prompt has several
    case: str
    prompt: str
    seed: int
    guidance: float
    size: tuple[int, int] | int | None  # in pixels; None is the model's own


def whole_number(cell: str) -> int:
    """Returns the number in a cell, such as 512.0; 0 for an empty one."""
    return int(cell.partition(".")[0] or 0)


def read_row(
    cells: dict[str, str], index: int, line: int, guidance: float, size: int | None
) -> Row:
    """Returns the row that the cells of a line describe.

    index, guidance and size are for lines without their own. Raises UsageError for a bad cell.
    """
    if None in cells or None in cells.values():
        raise UsageError("more or fewer cells than columns; quote prompts that have commas")

    case = next((cells[column] for column in CASE if column in cells), str(index))
    cells = dict.fromkeys(CELLS, "") | cells | {"case": case}
    for column, pattern in CELLS.items():
        if not re.fullmatch(pattern, cells[column]):
            raise UsageError(f"{column} can't be {cells[column]!r}")

    width = whole_number(cells["sd_image_width"])
    height = whole_number(cells["sd_image_height"])
    if bool(width) != bool(height):
        raise UsageError("sd_image_width and sd_image_height: give both or none")

    return Row(
        line=line,
        case=case,
        prompt=cells["prompt"],
        seed=whole_number(cells["evaluation_seed"]),
        guidance=float(cells["evaluation_guidance"] or guidance),
        size=(width, height) if width else size,
    )


def read_text(file: Path) -> str:
    """Returns the content of a file in UTF-8 or UTF-16. Raises UsageError."""
    data = file.read_bytes()
    is_utf_16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is neither UTF-8 nor UTF-16: {error}") from error


def read_table(file: Path, guidance: float = 7.5, size: int | None = None) -> list[Row]:
    """Returns all rows of a table.

    guidance and size are for rows without their own. Raises UsageError, which names the line of
    a row that isn't right.
    """
    text = read_text(file)
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)

    rows = {}
    try:
        names = [name.strip() for name in lines.fieldnames or []]
        lines.fieldnames = names
        for needed in ("prompt", "evaluation_seed"):
            if names.count(needed) != 1:
                raise UsageError(f"there must be one column {needed}, not {names}")

        for index, cells in enumerate(lines):
            row = read_row(cells, index, lines.line_num, guidance, size)
            if row.case in rows:
                raise UsageError(f"case {row.case!r} appears twice")
            rows[row.case] = row
        if not rows:
            raise UsageError("there are no rows")
    except (UsageError, csv.Error) as error:
        raise UsageError(f"{file}, line {lines.line_num}: {error}") from error
    return [*rows.values()]


def with_sizes(sd: StableDiffusion, rows: list[Row], file: Path) -> list[Row]:
    """Returns rows whose size is (width, height).

    Raises UsageError, which names the line, for a size that the model can't draw.
    """
    sized = []
    for row in rows:
        try:
            sized.append(row._replace(size=sample.image_size(sd, row.size)))
        except UsageError as error:
            raise UsageError(f"{file}, line {row.line}: {error}") from error
    return sized


# ---- the images


def image_file(row: Row, i: int, args: argparse.Namespace) -> Path:
    """Returns where image i of a row goes."""
    return args.out / f"{row.case}_{i}.png"


def parameters(row: Row, i: int, args: argparse.Namespace) -> str:
    """Returns what A1111 writes into an image, for programs that read it back.

    Without a seed for all but a row's first image: the seed alone would draw that one.
    """
    negative = f"Negative prompt: {args.negative}\n" if args.negative else ""
    seed = f", Seed: {row.seed}" if i == 0 else ""
    width, height = row.size
    return (
        f"{row.prompt}\n{negative}Steps: {args.steps}, Sampler: DDIM, CFG scale: "
        f"{row.guidance:g}{seed}, Size: {width}x{height}, RNG: CPU"
    )


def check_settings(file: Path, row: Row, args: argparse.Namespace) -> None:
    """Raises UsageError if an image was drawn with other settings."""
    with Image.open(file) as image:
        found = sample.settings_in(image.info)
    flags = ("model", "erased", "steps", "negative", "safe", "sld")
    expected = {name: getattr(args, name) for name in flags}
    expected |= {"prompt": row.prompt, "seed": row.seed, "guidance": row.guidance}
    expected["size"] = row.size
    for name, value in json.loads(json.dumps(expected, default=str)).items():
        if found.get(name) != value:
            raise UsageError(
                f"{file} has {name} = {found.get(name)!r}, not {value!r}: choose another --out"
            )


def is_drawn(row: Row, args: argparse.Namespace) -> bool:
    """Whether all images of a row exist. Raises UsageError if one has other settings."""
    files = [image_file(row, i, args) for i in range(args.num)]
    existing = [file for file in files if file.exists()]
    for file in existing:
        check_settings(file, row, args)
    return len(existing) == args.num


def in_batches(rows: list[Row], args: argparse.Namespace) -> list[list[Row]]:
    """Splits rows into parts of equal guidance and size that fill a batch."""
    alike = defaultdict(list)
    for row in rows:
        alike[row.guidance, row.size].append(row)

    rows_at_once = max(1, args.batch // args.num)
    parts = []
    for group in alike.values():
        for i in range(0, len(group), rows_at_once):
            parts.append(group[i : i + rows_at_once])
    return parts


def draw(
    sd: StableDiffusion,
    rows: list[Row],
    predictor: Callable,
    args: argparse.Namespace,
    progress: bool,
) -> None:
    """Writes the images of all rows, batch by batch."""
    batches = in_batches(rows, args)
    for part in tqdm(batches, unit="batch", delay=1, disable=not progress):
        images = sample.generate(
            sd,
            [row.prompt for row in part],
            num=args.num,
            seed=[row.seed for row in part],
            steps=args.steps,
            guidance=part[0].guidance,
            size=part[0].size,
            negative=args.negative,
            batch=args.batch,
            predictor=predictor,
        )

        for k, image in enumerate(images):
            row = part[k // args.num]
            i = k % args.num
            settings = vars(args) | row._asdict() | {"image": i}
            text = parameters(row, i, args)
            sample.save_png(image, image_file(row, i, args), settings, parameters=text)


# ---- the command line


class Process(NamedTuple):
    """Which one of torchrun's processes this is."""

    rank: int
    count: int


def this_process() -> Process:
    """Returns what torchrun says in the environment; one process without it."""
    rank = int(os.environ.get("RANK", 0))
    count = int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < count:
        raise UsageError(f"RANK is {rank} of WORLD_SIZE {count}: unset them, or use torchrun")
    return Process(rank, count)


def predictor_from_flags(sd: StableDiffusion, args: argparse.Namespace) -> Callable:
    """Returns the guidance, as sample.generate takes it."""
    if not args.safe:
        return ddim.guided_predictor
    return partial(
        safe_latent_diffusion.SafePredictor,
        concept=sd.encode([args.safe]),
        safety=safe_latent_diffusion.SETTINGS[args.sld],
    )


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.num < 1 or args.batch < 1:
        raise UsageError(f"num is {args.num}, batch {args.batch}: choose 1 or more")
    rows = read_table(args.table, args.guidance, args.size)
    sample.check_steps_and_seeds(args.steps, [row.seed for row in rows])
    process = this_process()
    if args.device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"

    sd = sample.load(args.model, args.device, args.dtype)
    rows = with_sizes(sd, rows, args.table)
    for file in args.erased:
        sd = sample.load_erased(sd, file)

    args.out.mkdir(parents=True, exist_ok=True)
    share = rows[process.rank :: process.count]
    missing = [row for row in share if not is_drawn(row, args)]
    draw(sd, missing, predictor_from_flags(sd, args), args, progress=process.rank == 0)

    which = f", process {process.rank}" if process.count > 1 else ""
    counts = f"{args.num * len(missing)} images drawn, {args.num * len(share)} in all"
    print(f"{args.out}: {counts}{which}")


def main() -> None:
    """Reads the command line."""
    flags = argparse.ArgumentParser(
        description="Draws a table of prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = flags.add_argument
    add("table", type=Path, metavar="FILE.csv", help="case_number, prompt, evaluation_seed, ...")
    add("--model", default=sample.DEFAULT_MODEL, help="a folder of one, or a hub name")
    add("--steps", type=int, default=50, help="DDIM steps")
    add("--device", default="auto", help="cpu, cuda, mps, ...; with torchrun, a GPU for each")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: float32 on the CPU")
    add("--erased", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="weights that erase.py wrote; of the same weight, the last file's counts")
    add("--num", type=int, default=1, help="images of each row")
    add("--guidance", type=float, default=7.5, help="guidance scale, for rows without their own")
    add("--size", type=int, help="pixels, for rows without their own; by default the model's")
    add("--negative", default="", help="prompt to steer away from")
    add("--safe", default="", metavar="CONCEPT", help="to avoid by Safe Latent Diffusion")
    add("--sld", default="medium", choices=safe_latent_diffusion.SETTINGS, help="how strongly")
    add("--batch", type=int, default=8, help="images made at once")
    add("--out", type=Path, default=Path("samples"), help="the folder for the images")
    sample.fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
