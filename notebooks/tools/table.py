"""Draws a table of prompts, such as the official evaluation's, as {case}_{i}.png.

    python -m notebooks.tools.table prompts.csv --erased van-gogh.safetensors --out images --num 5
    python -m notebooks.tools.table i2p.csv --safe "nudity" --sld medium --out i2p --batch 16
    torchrun --nproc_per_node 4 -m notebooks.tools.table coco_30k.csv --out FOLDER --batch 32

A table is a CSV file, with commas or semicolons, in UTF-8 or UTF-16. Its columns are prompt,
evaluation_seed and, if there is one, case_number (or image_id, or case_num; else rows are numbered
from 0). evaluation_guidance, sd_image_width and sd_image_height are optional; other columns are
ignored. Nothing is drawn unless every row is right.
Each image is the one that sample.py draws with that seed, whatever the batch. Rows whose images
all exist are skipped, so the same command again goes on. torchrun's processes share the rows.
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import ddim
import sample
from notebooks.methods import safe_latent_diffusion

CASE = ("case_number", "image_id", "case_num")  # the first that a table has
CELLS = {  # what the cells of a column look like; an optional column's may be empty
    "case": r"[\w.-]+", "prompt": r"(?s:.*)", "evaluation_seed": r"\d{1,18}(\.0*)?",
    "evaluation_guidance": r"(\d+(\.\d+)?)?", "sd_image_width": r"(\d+(\.0*)?)?",
    "sd_image_height": r"(\d+(\.0*)?)?"}


class Row(NamedTuple):
    """What to draw: a line of a table, completed by the flags."""

    case: str
    prompt: str
    seed: int
    guidance: float
    size: tuple[int, int] | int | None


def read_row(line: dict, number: int, guidance: float, size: int | None) -> Row:
    """guidance and size are for lines without their own. Raises ValueError for a bad cell."""
    if None in line or None in line.values():
        raise ValueError("more or fewer cells than columns; quote prompts that have commas")
    line["case"] = next((line[column] for column in CASE if column in line), str(number))
    for column, pattern in CELLS.items():
        if not re.fullmatch(pattern, line.setdefault(column, "")):
            raise ValueError(f"{column} can't be {line[column]!r}")
    seed, width, height = (int((line[column] or "0").partition(".")[0]) for column in (
        "evaluation_seed", "sd_image_width", "sd_image_height"))
    if bool(width) != bool(height):
        raise ValueError("sd_image_width and sd_image_height: give both or none")
    return Row(line["case"], line["prompt"], seed, float(line["evaluation_guidance"] or guidance),
               (width, height) if width and height else size)


def read_table(file: Path, guidance: float = 7.5, size: int | None = None,
               check: Callable[[Row], object] = lambda row: None) -> list[Row]:
    """Reads a whole table. Raises ValueError that names the line of a row that isn't right, by
    itself or because `check` raises ValueError for it.
    """
    data, rows = file.read_bytes(), {}
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is neither UTF-8 nor UTF-16: {error}") from error
    head = text.partition("\n")[0]
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True,
                           delimiter=";" if ";" in head else ",")
    try:
        names = [name.strip() for name in lines.fieldnames or []]
        lines.fieldnames = names
        for needed in ("prompt", "evaluation_seed"):
            if names.count(needed) != 1:
                raise ValueError(f"there must be one column {needed}, not {names}")
        for number, line in enumerate(lines):
            row = read_row(line, number, guidance, size)
            check(row)
            if row.case in rows:
                raise ValueError(f"case {row.case!r} appears twice")
            rows[row.case] = row
        if not rows:
            raise ValueError("there are no rows")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}, line {lines.line_num}: {error}") from error
    return [*rows.values()]


def parameters(row: Row, args: argparse.Namespace, width: int, height: int) -> str:
    """What A1111 writes into a picture, for programs that read it back."""
    negative = f"Negative prompt: {args.negative}\n" if args.negative else ""
    return (f"{row.prompt}\n{negative}Steps: {args.steps}, Sampler: DDIM, CFG scale: "
            f"{row.guidance:g}, Seed: {row.seed}, Size: {width}x{height}, RNG: CPU")


def drawn_before(file: Path, row: Row, args: argparse.Namespace) -> bool:
    """Whether an image is there. Raises ValueError where it was drawn from something else."""
    if not file.exists():
        return False
    with Image.open(file) as image:
        found = json.loads(image.text["settings"])
    asked = {key: getattr(args, key) for key in (
        "model", "erased", "ema", "steps", "negative", "safe", "sld")}
    asked |= {"prompt": row.prompt, "seed": row.seed, "guidance": row.guidance}
    for key, value in json.loads(json.dumps(asked, default=str)).items():
        if found.get(key) != value:
            raise ValueError(f"{file} has {key} = {found.get(key)!r}, not {value!r}: choose "
                             "another --out")
    return True


def draw(sd: sample.StableDiffusion, rows: list[Row], guided: Callable, args: argparse.Namespace,
         progress: bool) -> None:
    """Writes the images of all rows, in batches of rows of the same guidance and size."""
    alike, most = defaultdict(list), max(1, args.batch // args.num)
    for row in rows:
        alike[row.guidance, row.size].append(row)
    parts = [group[i:i + most] for group in alike.values() for i in range(0, len(group), most)]
    for part in tqdm(parts, unit="batch", disable=not progress):
        images = sample.generate(
            sd, [row.prompt for row in part], args.num, [row.seed for row in part], args.steps,
            part[0].guidance, part[0].size, args.negative, args.batch, guided=guided)
        for k, image in enumerate(images):
            row, i = part[k // args.num], k % args.num
            settings = vars(args) | row._asdict() | {"size": image.size, "image": i}
            sample.save_png(image, args.out / f"{row.case}_{i}.png", settings,
                            parameters=parameters(row, args, *image.size))


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.num < 1 or args.batch < 1:
        raise ValueError(f"num is {args.num}, batch {args.batch}: choose 1 or more")
    rows = read_table(args.table, args.guidance, args.size)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < processes:
        raise ValueError(f"RANK is {rank} of WORLD_SIZE {processes}: unset them, or use torchrun")
    if args.device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    sd = sample.load(args.model, args.device, args.dtype, args.tokenizer, args.ema)
    read_table(args.table, args.guidance, args.size,  # again, now that the sizes can be checked
               lambda row: sample.starting_noise(sd, 1, row.seed, row.size))
    if args.erased:
        sd = sample.load_erased(sd, args.erased)
    guided = ddim.guided
    if args.safe:
        guided = safe_latent_diffusion.guided(sd.encode([args.safe]), args.sld)
    args.out.mkdir(parents=True, exist_ok=True)
    share = rows[rank::processes]
    missing = [row for row in share if not all(
        drawn_before(args.out / f"{row.case}_{i}.png", row, args) for i in range(args.num))]
    draw(sd, missing, guided, args, progress=rank == 0)
    print(f"{args.out}: {args.num * len(missing)} images drawn, {args.num * len(share)} in all"
          + (f", process {rank}" if processes > 1 else ""))


def main() -> None:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description="Draws a table of prompts.",
                                    fromfile_prefix_chars="@",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.convert_arg_line_to_args = shlex.split
    add = flags.add_argument
    add("table", type=Path, metavar="FILE.csv", help="case_number, prompt, evaluation_seed, ...")
    add("--model", default=sample.DEFAULT_MODEL, help="a folder, a file or a hub name")
    add("--tokenizer", help="a folder or a hub name; by default the model's, or CLIP's")
    add("--ema", action="store_true", help="of a file with two U-Nets, take the averaged one")
    add("--steps", type=int, default=50, help="DDIM steps")
    add("--device", default="auto", help="cpu, cuda, mps, ...; with torchrun, a GPU for each")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: float32 on the CPU")
    add("--erased", type=Path, help="weights that erase.py wrote, or any published ones")
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
