"""Full size: time and memory of loading and one picture, ours beside diffusers'.

diffusers is no part of this project, install it by hand:

    pip install diffusers==0.42.1 accelerate
    python tests/compare_loading.py FOLDER [--single FILE ...]

FOLDER is Stable Diffusion v1 in diffusers' layout. Each row is a process of its own; it loads six
times and gives the median of the last five (the file is then in the page cache), and the process's
peak after one picture of 256x256 in two steps.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def ours(path, tokenizer):
    import sample
    return lambda: sample.load(path, device="cpu", dtype="float32", tokenizer=tokenizer), (
        lambda sd: sample.generate(sd, ["a picture"], steps=2, size=256)[0])


def theirs(path, _):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    def load():
        return StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False)

    def draw(pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe("a picture", num_inference_steps=2, height=256, width=256).images[0]

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
    print("| who | what | loading, s | peak with one picture, GB |\n|---|---|---|---|", flush=True)
    rows = [("diffusers", []), ("minESD", [])] + [("minESD", [file]) for file in args.single]
    for who, single in rows:
        subprocess.run([sys.executable, __file__, args.folder, "--who", who, "--single", *single],
                       check=True)


if __name__ == "__main__":
    main()
