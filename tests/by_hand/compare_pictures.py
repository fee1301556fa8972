"""The same images here and in diffusers: of a model, of a folder that export.py wrote, erased.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1
    python -m tests.by_hand.compare_pictures --model notebooks/toy --erased runs/star.safetensors
"""

import argparse
import tempfile

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

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
    keys = pipe.unet.load_state_dict(load_file(args.erased), strict=False)
    print("the erased weights in diffusers: unexpected keys", keys.unexpected_keys,
          "largest difference", difference(pipe, sample.load_erased(sd, args.erased), args.prompt))


if __name__ == "__main__":
    main()
