"""The same pictures here and in diffusers: of a folder that export.py wrote, and erased.

diffusers is no part of this project, install it by hand:

    pip install diffusers==0.42.1
    python tests/compare_pictures.py --model notebooks/toy --erased runs/star.safetensors
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample  # noqa: E402
from notebooks.tools import export  # noqa: E402


def open_pipe(folder: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(pipe: StableDiffusionPipeline, sd: sample.StableDiffusion, prompt: str) -> int:
    """The largest difference of a pixel, of 255, over three pictures of 20 steps."""
    theirs = pipe(prompt, num_inference_steps=20, num_images_per_prompt=3,
                  generator=torch.Generator().manual_seed(5), width=64, height=64).images
    ours = sample.generate(sd, [prompt], num=3, seed=5, steps=20, size=64)
    return max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()
               for a, b in zip(theirs, ours))


def main() -> None:
    parser = argparse.ArgumentParser(description="The same pictures here and in diffusers.")
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
