"""Draws the images of play.html with the miniature, and writes them into it.

    python -m notebooks.play

Three objects, each erased by three methods with two strengths: 18 erasures, which are kept
in --weights, and twelve prompts of each, drawn at three guidance scales. All models' images of
a prompt start from the same noise. Five minutes on two cores. The rest of play.html is
written by hand.
"""

import argparse
import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import sample
from notebooks.experiments import core, models
from notebooks.experiments.core import Context, Model
from notebooks.toy import judge as judging
from notebooks.toy import world
from notebooks.toy.world import with_article
from sample import StableDiffusion, UsageError

PAGE = Path(__file__).with_name("play.html")
BEGIN = "<!-- sprites: begin -->"
END = "<!-- sprites: end -->"
CONCEPTS = ("star", "circle", "heart")
OTHERS = ("square", "triangle", "moon", "cross")  # asked for whatever is erased
GUIDANCES = (1, 5, 10)
QUALITY = 70  # of WebP
SEED = 0  # of the erasures and, as in core.py, of the images
MODELS = {
    "original": models.original,
    "ESD-x, eta 1": models.esd_x(),
    "ESD-x, eta 3": models.esd_x("ESD-x, eta 3", eta=3),
    "ESD-u, eta 1": models.esd_u(),
    "ESD-u, eta 3": models.esd_u("ESD-u, eta 3", eta=3),
    "kept, eta 1": models.kept(),
    "kept, eta 3": models.kept("ESD-u, empty prompt kept, eta 3", eta=3),
}


class Prompt(NamedTuple):
    """What is asked for."""

    text: str
    wanted: str  # the object


class Sheet(NamedTuple):
    """Images of one model: a row for each guidance scale, a column for each prompt."""

    image: Image.Image
    seen: list[list[str | None]]  # which object the judge sees


def prompts_for(concept: str) -> list[Prompt]:
    """Returns six prompts that ask for a concept, then six that ask for other objects."""
    (paraphrase, *_) = world.PARAPHRASES[concept]
    asked_for = [
        concept, f"red {concept}", f"blue {concept}",
        f"{concept} in the style of mosaic", f"{concept} in the style of dots", paraphrase,
    ]
    prompts = [Prompt(with_article(words), concept) for words in asked_for]
    others = [name for name in CONCEPTS if name != concept]
    return prompts + [Prompt(with_article(name), name) for name in (*others, *OTHERS)]


def draw(context: Context, sd: StableDiffusion, prompts: list[Prompt]) -> Sheet:
    """Draws the prompts at each guidance scale, from the same noises."""
    texts = [prompt.text for prompt in prompts]
    seeds = core.image_seeds(SEED, len(texts))
    sheet = Image.new("RGB", (world.SIZE * len(texts), world.SIZE * len(GUIDANCES)))
    seen = []
    for i, guidance in enumerate(GUIDANCES):
        settings = core.SAMPLING | {"guidance": guidance}
        images = sample.generate(sd, texts, seed=seeds, **settings)
        for j, image in enumerate(images):
            sheet.paste(image, (world.SIZE * j, world.SIZE * i))
        seen.append([each["object"] for each in judging.read(context.judge, images)])
    return Sheet(sheet, seen)


def draw_all(context: Context, models: dict[str, Model]) -> dict[str, Sheet]:
    """Returns a sheet for each concept and model, by "star/ESD-x, eta 1"; slow."""
    sheets = {}
    for concept in CONCEPTS:
        for label, model in models.items():
            sd = context.load(model, (concept,), SEED)
            sheets[f"{concept}/{label}"] = draw(context, sd, prompts_for(concept))
            print(f"{concept}/{label}", flush=True)
    return sheets


def to_url(image: Image.Image) -> str:
    """Returns an image as WebP in a data URL."""
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=QUALITY, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def to_block(sheets: dict[str, Sheet]) -> str:
    """Returns what is between the markers: a script element of JSON, a line for each sheet."""
    lines = {
        "guidances": GUIDANCES,
        "prompts": {c: [each._asdict() for each in prompts_for(c)] for c in CONCEPTS},
    }
    for name, sheet in sheets.items():
        lines[name] = {"seen": sheet.seen, "image": to_url(sheet.image)}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(line)}" for name, line in lines.items())
    return f'<script type="application/json" id="sprites">\n{{\n{text}\n}}\n</script>'


def put_between_markers(page: str, block: str) -> str:
    """Returns a page with a new block. Raises UsageError if the markers aren't there."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UsageError(f"the page needs {BEGIN} and then {END}, once each")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    put_between_markers(args.page.read_text(), "")  # fails before the work does
    context = core.open_context(args.model, args.weights, quick=args.quick)
    block = to_block(draw_all(context, MODELS))

    page = put_between_markers(args.page.read_text(), block)
    sample.write_whole(args.page, lambda part: part.write_text(page))
    print(f"{args.page}: {len(block) / 1e6:.2f} MB of images")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--page", type=Path, default=PAGE, help="the file that gets the images")
    add("--quick", action="store_true", help="tries the code: two iterations an erasure")
    add("--model", type=Path, default=core.TOY, help="the miniature, with its judge")
    add("--weights", type=Path, default=Path("runs/experiments"), help="keeps erased weights")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
