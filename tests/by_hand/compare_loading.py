"""Full size: time and memory for loading and one image, compared with diffusers.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1 accelerate
    python -m tests.by_hand.compare_loading FOLDER [--single FILE ...]

FOLDER is Stable Diffusion v1 in diffusers' layout. Each row is measured in a process of its own. It
loads six times and prints the median of the last five, when the file is in the page cache, and
the peak memory of the process after one image of 256x256 in two steps.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def ours(path, tokenizer):
    import sample
    return lambda: sample.load(path, device="cpu", dtype="float32", tokenizer=tokenizer), (
        lambda sd: sample.generate(sd, ["an image"], steps=2, size=256)[0])


def theirs(path, _):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    def load():
        return StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False)

    def draw(pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe("an image", num_inference_steps=2, height=256, width=256).images[0]

    return load, draw


def measure(who: str, path: str, tokenizer: str) -> None:
    load, draw = {"minESD": ours, "diffusers": theirs}[who](path, tokenizer)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        model = load()
        times.append(time.perf_counter() - began)
    draw(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"| {who} | {Path(path).name} | {statistics.median(times[1:]):.2f} | {peak:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of loading.")
    parser.add_argument("folder")
    parser.add_argument("--single", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--who", help="for one row: minESD or diffusers")
    args = parser.parse_args()
    tokenizer = f"{args.folder}/tokenizer"
    if args.who:
        return measure(args.who, (args.single or [args.folder])[0], tokenizer)
    print("| who | what | loading, s | peak with one image, GB |\n|---|---|---|---|", flush=True)
    rows = [("diffusers", []), ("minESD", [])] + [("minESD", [file]) for file in args.single]
    for who, single in rows:
        subprocess.run([sys.executable, "-m", "tests.by_hand.compare_loading", args.folder,
                        "--who", who, "--single", *single], check=True)


if __name__ == "__main__":
    main()
