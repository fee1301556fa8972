"""The same images here and in diffusers: of a model, and of every file that export.py writes.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1 peft
    python -m tests.by_hand.compare_pictures --model notebooks/toy --erased runs/star.safetensors
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
from torch import Tensor

import sample
from notebooks.tools import export


def open_pipe(folder: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(pipe: StableDiffusionPipeline, sd: sample.StableDiffusion, prompt: str) -> int:
    """The largest difference between two pixels, out of 255, in three images of 20 steps."""
    theirs = pipe(prompt, num_inference_steps=20, num_images_per_prompt=3,
                  generator=torch.Generator().manual_seed(5), width=64, height=64).images
    ours = sample.generate(sd, [prompt], num=3, seed=5, steps=20, size=64)
    return max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()
               for a, b in zip(theirs, ours))


def with_lora(weights: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA in kohya's form makes of a U-Net's weights."""
    changed = {}
    for name, tensor in weights.items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{layer}.alpha" in lora:
            up, down = (lora[f"{layer}.lora_{kind}.weight"].float() for kind in ("up", "down"))
            change = up.flatten(1) @ down.flatten(1) * lora[f"{layer}.alpha"] / len(down)
            changed[name] = tensor + change.view_as(tensor)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description="The same images here and in diffusers.")
    parser.add_argument("--model", default="notebooks/toy")
    parser.add_argument("--erased", required=True)
    parser.add_argument("--prompt", default="a red star")
    args = parser.parse_args()
    sd = sample.load(args.model, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        export.write_folder(sd, f"{folder}/model")
        pipe = open_pipe(f"{folder}/model")
    print("a written folder in diffusers: largest difference", difference(pipe, sd, args.prompt))
    pipe = open_pipe(args.model)
    print("the model in diffusers: largest difference", difference(pipe, sd, args.prompt))
    erased = sample.load_erased(sd, args.erased)
    keys = pipe.unet.load_state_dict(load_file(args.erased), strict=False)
    print("the erased weights in diffusers: unexpected keys", keys.unexpected_keys,
          "largest difference", difference(pipe, erased, args.prompt))
    with tempfile.TemporaryDirectory() as folder:
        for form in ("lora", "single", "folder"):
            out = Path(folder) / ("folder" if form == "folder" else f"{form}.safetensors")
            run([sys.executable, "-m", "notebooks.tools.export", args.erased, "--as", form,
                 "--model", args.model, "--out", out, "--error", "0.01"], check=True)
            expected = erased
            if form == "lora":  # the erased model but for what a LoRA leaves out
                pipe = open_pipe(args.model)
                pipe.load_lora_weights(folder, weight_name=out.name)
                expected = sample.with_tuned(sd, with_lora(sd.unet.state_dict(), load_file(out)))
            elif form == "single":
                pipe = StableDiffusionPipeline.from_single_file(
                    str(out), config=args.model, local_files_only=True)
                pipe.set_progress_bar_config(disable=True)
            else:
                pipe = open_pipe(out)
            print(f"as {form}: largest difference", difference(pipe, expected, args.prompt))


if __name__ == "__main__":
    main()
