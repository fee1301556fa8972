"""Puts the figures that notebooks store on slides: PNGs of 1920 x 1080, each with its title.

    python -m notebooks.course.slides --out runs/slides                   # all notebooks
    python -m notebooks.course.slides notebooks/2_erasing.ipynb --out runs/slides

A figure is the last image of a cell that starts with "# Figure N: ..."; the comment is its title.
Figure 3 of 2_erasing.ipynb becomes 2_erasing_figure_03.png. No notebook is run.
"""

import argparse
import base64
import io
import json
import re
import textwrap
from pathlib import Path
from typing import Iterator

from PIL import Image, ImageDraw, ImageFont, ImageOps

import sample

WIDTH, HEIGHT, MARGIN = 1920, 1080, 60  # pixels


def slide(comment: str, image: Image.Image) -> Image.Image:
    """Returns an image below its title, as large as fits. The comment may have several lines."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    draw.font = ImageFont.load_default(38)
    text = textwrap.fill(re.sub(r"^# ?", "", comment, flags=re.MULTILINE), width=104)
    draw.text((MARGIN, MARGIN), text, fill="black")

    top = MARGIN // 2 + round(draw.textbbox((MARGIN, MARGIN), text)[3])
    size = WIDTH - 2 * MARGIN, HEIGHT - MARGIN - top
    page.paste(ImageOps.pad(image, size, color="white"), (MARGIN, top))
    return page


def slides_of(file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yields the name and the slide of each figure. Raises UsageError if one has no image."""
    try:
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            found = re.match(r"# Figure (\d+):.*(\n#.*)*", "".join(cell["source"]))
            if found and cell["cell_type"] == "code":
                data = [output.get("data", {}) for output in cell["outputs"]]
                pngs = ["".join(each["image/png"]) for each in data if "image/png" in each]
                if not pngs:
                    raise ValueError(f"Figure {found[1]} has no image: run it, and save it")
                image = sample.to_rgb(Image.open(io.BytesIO(base64.b64decode(pngs[-1]))))
                yield f"{file.stem}_figure_{int(found[1]):02d}", slide(found[0], image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise sample.UsageError(f"can't use {file}: {sample.one_line(error)}") from error


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.out.exists():
        raise sample.UsageError(f"{args.out} exists; delete it or choose another --out")
    slides = [each for file in args.notebooks for each in slides_of(file)]

    args.out.mkdir(parents=True)
    for name, page in slides:
        page.save(args.out / f"{name}.png")
    print(f"{args.out}: {len(slides)} slides")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    course = sorted(Path(__file__).parents[1].glob("[0-9]_*.ipynb"))
    add("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", default=course, help="default: all")
    add("--out", type=Path, required=True, help="a new folder, for the slides")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
