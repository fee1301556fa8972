"""Time and memory, ours and diffusers' in turn, at full size with random weights.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1 accelerate matplotlib
    python -m tests.by_hand.benchmark            # 15 GB of disk, 16 GB of memory, 90 minutes
    python -m tests.by_hand.benchmark --quick    # small sizes, to see that it runs

The two sides take turns in one process; times and ratios are medians of five, each on its own.
Memory is the peak of a process that runs one side once, as Linux counts it. The U-Net's cost
against the size of its images is drawn as tests/by_hand/cost_against_size.png. With a GPU, its
tables are printed too, or alone with --gpu.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip_text
import erase
import sample
import unet
import vae
from notebooks.tools import export

TURNS = 5
GB = 1e9


# ---- both sides of a row: each function prepares, and returns what is measured ----

class Sizes(NamedTuple):
    """Latents of 64x64 are Stable Diffusion v1's images of 512x512."""

    side: int = 64
    steps: int = 4


def build(make: Callable, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen model with random weights, which never exists in another dtype."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return make().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def our_unet(dtype: torch.dtype = torch.float32) -> unet.UNet:
    return build(unet.UNet, dtype)


def their_unet(dtype: torch.dtype = torch.float32):
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in export.unet_json(unet.UNetConfig()).items()
              if not key.startswith("_")}
    return build(lambda: UNet2DConditionModel(**config), dtype)


def unet_inputs(side: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(batch, 4, side, side, dtype=dtype), torch.full((batch,), 500),
            torch.randn(batch, 77, 768, dtype=dtype))


def unet_forward(who: str, sizes: Sizes, folder: Path, dtype: torch.dtype = torch.float32,
                 batch: int = 2) -> Callable:
    inputs = unet_inputs(sizes.side, batch, dtype)
    if who == "ours":
        model = our_unet(dtype)
        return torch.no_grad()(lambda: model(*inputs))
    model = their_unet(dtype)
    return torch.no_grad()(lambda: model(*inputs).sample)


def vae_half(who: str, sizes: Sizes, folder: Path, half: str) -> Callable:
    shape = (1, 4, sizes.side, sizes.side) if half == "decode" else (
        1, 3, 8 * sizes.side, 8 * sizes.side)
    x = torch.randn(shape)
    if who == "ours":
        model = vae.VAE(vae.VAEConfig()).requires_grad_(False)
        return torch.no_grad()(lambda: getattr(model, half)(x))
    from diffusers import AutoencoderKL

    config = {key: value for key, value in export.vae_json(vae.VAEConfig()).items()
              if not key.startswith("_")}
    theirs = AutoencoderKL(**config).requires_grad_(False)
    return torch.no_grad()(lambda: getattr(theirs, half)(x))


def text(who: str, sizes: Sizes, folder: Path) -> Callable:
    tokens = torch.randint(49000, (8, 77))
    if who == "ours":
        model = clip_text.TextEncoder(clip_text.TextConfig()).requires_grad_(False)
    else:
        from transformers import CLIPTextConfig, CLIPTextModel

        config = export.text_json(clip_text.TextConfig())
        model = CLIPTextModel(CLIPTextConfig(**config)).requires_grad_(False)
    return torch.no_grad()(lambda: model(tokens))


def load(who: str, sizes: Sizes, folder: Path, name: str) -> Callable:
    if who == "ours":
        return lambda: sample.load(folder / name, "cpu", "float32", folder / "model/tokenizer")
    from diffusers import StableDiffusionPipeline

    quiet = {"torch_dtype": torch.float32, "safety_checker": None}
    if name == "model":
        return lambda: StableDiffusionPipeline.from_pretrained(folder / name, **quiet)
    return lambda: StableDiffusionPipeline.from_single_file(
        str(folder / name), config=str(folder / "model"), local_files_only=True, **quiet)


THEIR_PICTURE = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, steps, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipe = StableDiffusionPipeline.from_pretrained(
    folder, torch_dtype=torch.float32, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe("a", num_inference_steps=steps, height=size, width=size).images[0].save(sys.argv[4])
"""


def run(command: list) -> float:
    """Runs Python with these arguments; polls it until it exits, and returns its peak in GB."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    gigabytes = 0.0
    while process.poll() is None:
        gigabytes = max(gigabytes, peak_of(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return gigabytes


def peak_of(process: int | str) -> float:
    """A process's peak so far, in GB; 0 if it has just ended."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / GB if found else 0.0


def picture(who: str, sizes: Sizes, folder: Path) -> Callable:
    """End to end, in a process of its own."""
    out, size, steps = folder / f"{who}.png", 8 * sizes.side, sizes.steps
    command = ["sample.py", "a", "--model", folder / "model", "--steps", steps, "--size", size,
               "--dtype", "float32", "--device", "cpu", "--out", out] if who == "ours" else [
        "-c", THEIR_PICTURE, folder / "model", steps, size, out]
    return lambda: run(command)


def gradient_step(who: str, sizes: Sizes, folder: Path) -> Callable:
    """One step of ESD-x at x_t = noise, with Adam. Ours holds one U-Net and theta; the other side
    is a plain loop over two of diffusers' U-Nets, one frozen and one edited.
    """
    x_t, t, c = unet_inputs(sizes.side, 1, torch.float32)
    null = torch.randn_like(c)
    if who == "ours":
        frozen = our_unet()
        theta = erase.select(frozen, "esd-x")
        asked = itertools.repeat((x_t, t, erase.Text(c, null, c)))
        losses = erase.esd(erase.edit(frozen, theta), frozen, asked,
                           torch.optim.Adam(theta.values(), 1e-5))
        return lambda: next(losses)
    frozen, edited = their_unet(), their_unet()
    tuned = [p.requires_grad_() for name, p in edited.named_parameters() if "attn2" in name]
    optimizer = torch.optim.Adam(tuned, 1e-5)

    def go():
        with torch.no_grad():
            target = 2 * frozen(x_t, t, null).sample - frozen(x_t, t, c).sample
        loss = (edited(x_t, t, c).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return go


def start(who: str, sizes: Sizes, folder: Path) -> Callable:
    command = ["sample.py", "--help"] if who == "ours" else ["-c", "import torch"]
    return lambda: run(command)


ROWS = {  # name: side, further arguments, what ours is compared with
    "U-Net, batch 2, float32": (unet_forward, {}, "diffusers"),
    "U-Net, batch 2, bfloat16": (unet_forward, {"dtype": torch.bfloat16}, "diffusers"),
    "VAE decode": (vae_half, {"half": "decode"}, "diffusers"),
    "VAE encode": (vae_half, {"half": "encode"}, "diffusers"),
    "text encoder, 8 prompts": (text, {}, "transformers"),
    "load a folder": (load, {"name": "model"}, "from_pretrained"),
    "load a .ckpt": (load, {"name": "v1.ckpt"}, "from_single_file"),
    "load a .safetensors": (load, {"name": "v1.safetensors"}, "from_single_file"),
    "an image, 4 steps, a fresh process": (picture, {}, "diffusers"),
    "a gradient step of ESD-x": (gradient_step, {}, "two U-Nets, Adam"),
    "`python sample.py --help`": (start, {}, "`import torch`"),
}


SIDES_AND_BATCHES = [(side, batch) for side in (32, 64, 96, 128) for batch in (1, 2, 4)]


# ---- measuring ----

def write_models(folder: Path) -> None:
    """A model with random weights as a folder, a .ckpt and a .safetensors file: 13 GB."""
    words = [chr(97 + i) + end for end in ("", "</w>") for i in range(26)]
    words += [f"<{i}>" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "model/tokenizer").mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "model/tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "model/tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "model/tokenizer/tokenizer_config.json").write_text('{"model_max_length": 77}')
    torch.manual_seed(0)
    parts = {name: part.model(part.config()).requires_grad_(False)
             for name, part in sample.PARTS.items()}
    for name, model in parts.items():
        export.write_part(folder / "model", name, model)
    export.write_index(folder / "model")
    tensors = export.single(sample.StableDiffusion(*parts.values(), None))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "v1.safetensors")
    torch.save({"state_dict": tensors}, folder / "v1.ckpt")


def peak(name: str, who: str, folder: Path, args: argparse.Namespace, side: int = 0,
         batch: int = 2) -> float:
    """GB at the peak of a process that runs one side once, or of the process that it starts."""
    command = [sys.executable, "-m", "tests.by_hand.benchmark", "--row", name, "--who", who,
               "--folder", str(folder), "--side", str(side), "--batch", str(batch),
               *(["--quick"] if args.quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_once(args: argparse.Namespace, sizes: Sizes) -> None:
    make, more, _ = ROWS.get(args.row, (unet_forward, {"batch": args.batch}, ""))
    found = make(args.who, sizes._replace(side=args.side or sizes.side), args.folder, **more)()
    print(found if make in (picture, start) else peak_of("self"))


def seconds(go: Callable) -> float:
    began = time.perf_counter()
    go()
    return time.perf_counter() - began


def row(name: str, sizes: Sizes, folder: Path, args: argparse.Namespace) -> str:
    make, more, other = ROWS[name]
    ours, theirs = (make(who, sizes, folder, **more) for who in ("ours", "theirs"))
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(1 if args.quick else TURNS)]
    ratio = statistics.median(a / b for a, b in times)
    mine, its = (statistics.median(side) for side in zip(*times))
    del ours, theirs
    a, b = (peak(name, who, folder, args) for who in ("ours", "theirs"))
    return (f"| {name} | {other} | {mine:.2f} | {its:.2f} | **{ratio:.2f}** | {a:.2f} | {b:.2f} "
            f"| **{a / b:.2f}** |")


def operations(side: int, batch: int) -> int:
    """Multiplications and additions of the U-Net's forward pass, as torch counts them; attention
    is two matrix products for it.
    """
    with torch.device("meta"):
        model, inputs = our_unet(), unet_inputs(side, batch, torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def rate_of_a_matrix_product(n: int = 4096) -> float:
    """This machine's operations per second in a matrix product, the best of five."""
    a = torch.randn(n, n)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


def against_size(args: argparse.Namespace, file: Path) -> str:
    """The U-Net's time and memory for 12 sizes, next to its operations at the machine's rate."""
    rate, model, found = rate_of_a_matrix_product(), our_unet(), []
    for side, batch in [(8, 1), (16, 2)] if args.quick else SIDES_AND_BATCHES:
        inputs = unet_inputs(side, batch, torch.float32)
        go = torch.no_grad()(lambda: model(*inputs))
        spent = statistics.median(seconds(go) for _ in range(1 if args.quick else 3))
        memory = peak("U-Net", "ours", Path(), args, side, batch)
        found.append((side, batch, operations(side, batch) / 1e12, spent, memory))
    draw(found, rate, file)
    lines = [f"A matrix product runs at {rate / 1e9:.0f} * 10^9 operations a second here.\n",
             "| image | batch | 10^12 operations | s at that rate | s | GB |", "|---" * 6 + "|"]
    lines += [f"| {8 * side}x{8 * side} | {batch} | {count:.2f} | {count * 1e12 / rate:.2f} "
              f"| {spent:.2f} | {memory:.2f} |" for side, batch, count, spent, memory in found]
    return "\n".join(lines)


def draw(found: list[tuple], rate: float, file: Path) -> None:
    """Saves the figure. found: of each size its side, batch, 10^12 operations, seconds and GB."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=100)
    for batch in sorted({batch for _, batch, *_ in found}):
        _, _, count, spent, memory = zip(*(one for one in found if one[1] == batch))
        axes[0].plot(count, spent, "o-", label=f"batch {batch}")
        axes[1].plot(count, memory, "o-", label=f"batch {batch}")
    counts = sorted(count for _, _, count, _, _ in found)
    axes[0].plot(counts, [count * 1e12 / rate for count in counts], "k--",
                 label="a matrix product's rate")
    axes[0].set(xscale="log", yscale="log", xlabel="10^12 operations", ylabel="seconds")
    axes[1].set(xscale="log", ylim=0, xlabel="10^12 operations", ylabel="peak memory, GB")
    axes[0].legend(loc="upper left", fontsize="small")
    axes[1].legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(file)


def ways(sizes: Sizes, quick: bool) -> str:
    """Seconds per iteration of ESD-x with 50 steps, at 16x16 latents: the paper's way, every step.

    The paper's way ends at a random t, so its average over 50 iterations varies by 8 %.
    """
    steps = 4 if quick else 50
    frozen = our_unet()
    theta, (c, null) = erase.select(frozen, "esd-x"), torch.randn(2, 1, 77, 768)
    unet_, times = erase.edit(frozen, theta), []
    for every_step in (False, True):
        data = erase.own_ways(unet_, [erase.Text(c, null, c)], (1, 4, 16, 16), steps, 3.0,
                              torch.Generator().manual_seed(0), every_step)
        losses = erase.esd(unet_, frozen, data, torch.optim.Adam(theta.values(), 1e-5))
        count = 2 if quick else steps
        times.append(seconds(lambda: [next(losses) for _ in range(count)]) / count)
    paper, every = times
    return (f"Seconds per iteration of ESD-x with {steps} steps, latents of 16x16, on average: the "
            f"paper's way {paper:.2f}, every step of one way {every:.2f}, a ratio of "
            f"**{every / paper:.2f}**.")


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def gpu_unets() -> None:
    """The U-Net in each precision, ours and diffusers', and how far our eps is from float32's.

    PyTorch lets convolutions in float32 use TF32, which rounds as coarsely as float16; the eps that
    the others are compared with is computed without it.
    """
    print(f"\n{torch.cuda.get_device_name()}, U-Net, 512x512, batch 2; error: the largest "
          f"difference from float32's eps, as a share of the largest eps\n\n"
          f"| dtype | s | diffusers, s | GB | diffusers, GB | error |\n|{'---|' * 6}")
    torch.manual_seed(0)
    x_t, t, words = (x.cuda() for x in unet_inputs(64, 2, torch.float32))
    times, peaks = {}, {}
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        exact = our_unet().to("cuda")(x_t, t, words)
    torch.backends.cudnn.allow_tf32 = True
    for dtype in PRECISIONS:
        inputs = x_t.to(dtype), t, words.to(dtype)
        for make in (our_unet, their_unet):
            model = make().to("cuda", dtype)  # built in float32, so the weights are the same
            go = torch.no_grad()(lambda: model(*inputs))
            eps = go()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            times[make] = statistics.median(seconds(lambda: (go(), torch.cuda.synchronize()))
                                            for _ in range(TURNS))
            peaks[make] = torch.cuda.max_memory_allocated() / GB
            if make is our_unet:
                error = (eps.float() - exact).abs().max() / exact.abs().max()
            del model, go
            torch.cuda.empty_cache()
        print(f"| {str(dtype)[6:]} | {times[our_unet]:.3f} | {times[their_unet]:.3f} "
              f"| {peaks[our_unet]:.2f} | {peaks[their_unet]:.2f} | {error:.1e} |", flush=True)


def gpu() -> None:
    """Seconds per iteration and the peak of reserved memory, under the least limit that will do."""
    gpu_unets()
    total = torch.cuda.get_device_properties(0).total_memory
    name = torch.cuda.get_device_name()
    print(f"\n{name}, 512x512, batch 1, ways of 50 steps:\n\n| method | dtype | x_t | limit, GB "
          f"| seconds per iteration | peak, GB |\n|---|---|---|---|---|---|")
    for method, dtype, every_step in itertools.product(erase.METHODS, PRECISIONS, (False, True)):
        spent = most = "out of memory"
        for limit in (6, 16, 32):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GB / total))
            try:
                spent = f"{gpu_iterations(method, dtype, every_step):.2f}"
                most = f"{torch.cuda.max_memory_reserved() / GB:.1f}"
                break
            except torch.OutOfMemoryError:
                continue
        print(f"| {method} | {str(dtype)[6:]} | {'every step' if every_step else 'the paper'} "
              f"| {limit} | {spent} | {most} |", flush=True)


def gpu_iterations(method: str, dtype: torch.dtype, every_step: bool) -> float:
    frozen = our_unet().to("cuda", dtype)  # tensor by tensor
    c, null = torch.randn(2, 1, 77, 768, device="cuda", dtype=dtype)
    theta = erase.select(frozen, method)
    edited = erase.edit(frozen, theta)
    data = erase.own_ways(edited, [erase.Text(c, null, c)], (1, 4, 64, 64), 50, 3.0,
                          torch.Generator().manual_seed(0), every_step)
    losses = erase.esd(edited, frozen, data, torch.optim.Adam(theta.values(), 1e-5),
                       lambda *args: erase.SCALE * erase.esd_loss(*args))
    next(losses)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()

    def go():
        for _ in range(50):
            next(losses)
        torch.cuda.synchronize()

    return seconds(go) / 50


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory, ours and diffusers'.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn")
    parser.add_argument("--rows", nargs="*", choices=ROWS, metavar="ROW", help="these only")
    parser.add_argument("--gpu", action="store_true", help="the GPU's tables only")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # these five: one side, once
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = Sizes(side=8, steps=1) if args.quick else Sizes()
    if args.row:
        return run_once(args, sizes)
    if args.gpu:
        return gpu()
    import diffusers
    import transformers

    machine = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(f"{machine}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; "
          f"Python {platform.python_version()}, torch {torch.__version__}, diffusers "
          f"{diffusers.__version__}, transformers {transformers.__version__}\n\n"
          f"| | against | s | theirs, s | ratio | GB | theirs, GB | ratio |\n|{'---|' * 8}")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for name in args.rows or ROWS:
            print(row(name, sizes, Path(folder), args), flush=True)
        if args.rows:
            return
        small = Path(folder) / "quick.png"
        figure = small if args.quick else Path(__file__).with_name("cost_against_size.png")
        print("\n" + ways(sizes, args.quick))
        print("\n" + against_size(args, figure))
    if torch.cuda.is_available():
        gpu()


if __name__ == "__main__":
    main()
