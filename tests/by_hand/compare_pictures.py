"""The same images here and in diffusers: of a model, and of every file that export.py writes.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1 peft
    python -m tests.by_hand.compare_pictures --model notebooks/toy/model \\
        --erased runs/star.safetensors
"""

import argparse
import sys
import tempfile
from pathlib import Path
from subprocess import run

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import sample
from notebooks.tools import export
from tests.by_hand.lora_dial import with_lora


def open_pipe(folder: str | Path) -> StableDiffusionPipeline:
    """Returns diffusers' pipeline of a folder."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(pipe: StableDiffusionPipeline, sd: sample.StableDiffusion, prompt: str) -> int:
    """Returns the largest difference of two pixels, out of 255, in three images of 20 steps."""
    theirs = pipe(
        prompt,
        num_inference_steps=20,
        num_images_per_prompt=3,
        generator=torch.Generator().manual_seed(5),
        width=64,
        height=64,
    ).images
    ours = sample.generate(sd, [prompt], num=3, seed=5, steps=20, size=64)
    pixels, others = np.stack(ours).astype(int), np.stack(theirs).astype(int)
    return np.abs(pixels - others).max()


def report(form: str, largest: int) -> None:
    """Prints one result."""
    print(f"{form}: largest difference {largest}")


def compare_exports(args: argparse.Namespace, sd, erased, folder: Path) -> None:
    """Compares the erased model with each file that export.py writes of it."""
    for form in ("lora", "single", "folder"):
        out = folder / ("folder" if form == "folder" else f"{form}.safetensors")
        command = [sys.executable, "-m", "notebooks.tools.export", args.erased, "--as", form]
        run([*command, "--model", args.model, "--out", out, "--error", "0.01"], check=True)

        expected = erased
        if form == "lora":  # the erased model but for what a LoRA leaves out
            pipe = open_pipe(args.model)
            pipe.load_lora_weights(folder, weight_name=out.name)
            weights = with_lora(sd.unet.state_dict(), load_file(out), dial=1)
            expected = sample.with_weights(sd, weights)
        elif form == "single":
            pipe = StableDiffusionPipeline.from_single_file(
                str(out), config=args.model, local_files_only=True
            )
            pipe.set_progress_bar_config(disable=True)
        else:
            pipe = open_pipe(out)
        report(f"as {form}", difference(pipe, expected, args.prompt))


def main() -> None:
    """Prints the largest difference for each form."""
    parser = argparse.ArgumentParser(description="The same images here and in diffusers.")
    parser.add_argument("--model", default="notebooks/toy/model")
    parser.add_argument("--erased", required=True)
    parser.add_argument("--prompt", default="a red star")
    args = parser.parse_args()

    sd = sample.load(args.model, device="cpu", dtype="float32")
    erased = sample.load_erased(sd, args.erased)
    with tempfile.TemporaryDirectory() as folder:
        export.write_folder(sd, f"{folder}/model")
        pipe = open_pipe(f"{folder}/model")
        report("a written folder in diffusers", difference(pipe, sd, args.prompt))

    pipe = open_pipe(args.model)
    report("the model in diffusers", difference(pipe, sd, args.prompt))
    keys = pipe.unet.load_state_dict(load_file(args.erased), strict=False)
    print("the erased weights in diffusers: unexpected keys", keys.unexpected_keys)
    report("the erased weights in diffusers", difference(pipe, erased, args.prompt))
    with tempfile.TemporaryDirectory() as folder:
        compare_exports(args, sd, erased, Path(folder))


if __name__ == "__main__":
    main()
