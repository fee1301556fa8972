"""Time and memory, ours and diffusers' in turn, at full size with random weights.

diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1 accelerate matplotlib
    python -m tests.by_hand.benchmark            # 6 GB of disk, 16 GB of memory, 90 minutes
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
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
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


# ---- both sides of a row: each function prepares, and returns what is measured


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

    config = without_private(export.unet_json(unet.UNetConfig()))
    return build(partial(UNet2DConditionModel, **config), dtype)


def without_private(config: dict) -> dict:
    """Returns a config's settings without the class's name and the version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def unet_inputs(side: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x_t, t and the text features."""
    x_t = torch.randn(batch, 4, side, side, dtype=dtype)
    t = torch.full((batch,), 500)
    text = torch.randn(batch, 77, 768, dtype=dtype)
    return x_t, t, text


@torch.no_grad()
def call(model: Callable, *inputs) -> object:
    """Calls a model without a graph."""
    return model(*inputs)


def unet_forward(
    who: str, sizes: Sizes, folder: Path, dtype: torch.dtype = torch.float32, batch: int = 2
) -> Callable:
    make = our_unet if who == "ours" else their_unet
    inputs = unet_inputs(sizes.side, batch, dtype)
    return partial(call, make(dtype), *inputs)


def vae_half(who: str, sizes: Sizes, folder: Path, half: str) -> Callable:
    if half == "decode":
        x = torch.randn(1, 4, sizes.side, sizes.side)
    else:
        x = torch.randn(1, 3, 8 * sizes.side, 8 * sizes.side)

    if who == "ours":
        model = vae.VAE(vae.VAEConfig())
    else:
        from diffusers import AutoencoderKL

        model = AutoencoderKL(**without_private(export.vae_json(vae.VAEConfig())))
    model.requires_grad_(False)
    return partial(call, getattr(model, half), x)


def text(who: str, sizes: Sizes, folder: Path) -> Callable:
    tokens = torch.randint(49000, (8, 77))
    if who == "ours":
        model = clip_text.TextEncoder(clip_text.TextConfig())
    else:
        from transformers import CLIPTextConfig, CLIPTextModel

        config = export.text_json(clip_text.TextConfig())
        model = CLIPTextModel(CLIPTextConfig(**config))
    model.requires_grad_(False)
    return partial(call, model, tokens)


def load(who: str, sizes: Sizes, folder: Path) -> Callable:
    if who == "ours":
        return partial(sample.load, folder / "model", "cpu", "float32")

    from diffusers import StableDiffusionPipeline

    return partial(
        StableDiffusionPipeline.from_pretrained,
        folder / "model",
        torch_dtype=torch.float32,
        safety_checker=None,
    )


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
    """Runs Python with these arguments until it exits; returns its peak in GB."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    gigabytes = 0.0
    while process.poll() is None:
        gigabytes = max(gigabytes, peak_of(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return gigabytes


def peak_of(process: int | str) -> float:
    """Returns a process's peak so far, in GB; 0 if it has just ended."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / GB if found else 0.0


def picture(who: str, sizes: Sizes, folder: Path) -> Callable:
    """End to end, in a process of its own."""
    out = folder / f"{who}.png"
    size = 8 * sizes.side
    if who == "theirs":
        return partial(run, ["-c", THEIR_PICTURE, folder / "model", sizes.steps, size, out])

    command = ["sample.py", "a", "--model", folder / "model", "--steps", sizes.steps]
    command += ["--size", size, "--dtype", "float32", "--device", "cpu", "--out", out]
    return partial(run, command)


def gradient_step(who: str, sizes: Sizes, folder: Path) -> Callable:
    """One step of ESD-x at x_t = noise, with Adam.

    Ours holds one U-Net and theta; the other side is a plain loop over two of diffusers' U-Nets,
    one frozen and one edited.
    """
    x_t, t, c = unet_inputs(sizes.side, 1, torch.float32)
    null = torch.randn_like(c)
    if who == "ours":
        batch = erase.Batch(x_t, t, erase.Text(concept=c, null=null, anchor=c))
        return partial(next, our_steps(our_unet(), "esd-x", itertools.repeat(batch)))

    frozen = their_unet()
    edited = their_unet()
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


def our_steps(frozen: unet.UNet, method: str, data: Iterator | Callable) -> Iterator[float]:
    """Returns gradient steps with Adam; data may be a function of the edited U-Net."""
    theta = erase.trainable_copies(frozen, method)
    edited = erase.with_theta(frozen, theta)
    batches = data(edited) if callable(data) else data
    optimizer = torch.optim.Adam(theta.values(), 1e-5)
    return erase.gradient_steps(edited, frozen, batches, optimizer)


def start(who: str, sizes: Sizes, folder: Path) -> Callable:
    command = ["sample.py", "--help"] if who == "ours" else ["-c", "import torch"]
    return partial(run, command)


class Row(NamedTuple):
    """What is measured on both sides."""

    make: Callable  # called with who, sizes and a folder
    against: str


ROWS = {
    "U-Net, batch 2, float32": Row(unet_forward, "diffusers"),
    "U-Net, batch 2, bfloat16": Row(partial(unet_forward, dtype=torch.bfloat16), "diffusers"),
    "VAE decode": Row(partial(vae_half, half="decode"), "diffusers"),
    "VAE encode": Row(partial(vae_half, half="encode"), "diffusers"),
    "text encoder, 8 prompts": Row(text, "transformers"),
    "load a folder": Row(load, "from_pretrained"),
    "an image, 4 steps, a fresh process": Row(picture, "diffusers"),
    "a gradient step of ESD-x": Row(gradient_step, "two U-Nets, Adam"),
    "`python sample.py --help`": Row(start, "`import torch`"),
}
IN_A_PROCESS = (picture, start)  # these return the peak of a process that they start
SIDES_AND_BATCHES = [(side, batch) for side in (32, 64, 96, 128) for batch in (1, 2, 4)]


# ---- measuring


def write_model(folder: Path) -> None:
    """Writes a model with random weights: 4 GB."""
    words = [chr(97 + i) + end for end in ("", "</w>") for i in range(26)]
    words += [f"<{i}>" for i in range(49406 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 77}')

    torch.manual_seed(0)
    for name, part in sample.PARTS.items():
        export.write_part(folder, name, part.model())
    export.write_index(folder)


def peak(
    name: str, who: str, folder: Path, args: argparse.Namespace, side: int = 0, batch: int = 2
) -> float:
    """GB at the peak of a process that runs one side once, or of the process that it starts."""
    command = [sys.executable, "-m", "tests.by_hand.benchmark", "--row", name, "--who", who]
    command += ["--folder", str(folder), "--side", str(side), "--batch", str(batch)]
    if args.quick:
        command.append("--quick")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def run_once(args: argparse.Namespace, sizes: Sizes) -> None:
    """Runs one side of a row once, and prints the peak."""
    if args.row in ROWS:
        make = ROWS[args.row].make
    else:
        make = partial(unet_forward, batch=args.batch)
    found = make(args.who, sizes._replace(side=args.side or sizes.side), args.folder)()
    print(found if make in IN_A_PROCESS else peak_of("self"))


def seconds(go: Callable) -> float:
    began = time.perf_counter()
    go()
    return time.perf_counter() - began


def measured(name: str, sizes: Sizes, folder: Path, args: argparse.Namespace) -> str:
    """Measures a row, and returns it as a line of the table."""
    make, against = ROWS[name]
    ours = make("ours", sizes, folder)
    theirs = make("theirs", sizes, folder)
    ours()
    theirs()

    times = []
    for _ in range(1 if args.quick else TURNS):
        times.append((seconds(ours), seconds(theirs)))
    ratio = statistics.median(a / b for a, b in times)
    our_time, their_time = (statistics.median(side) for side in zip(*times))
    del ours, theirs  # the models

    our_peak = peak(name, "ours", folder, args)
    their_peak = peak(name, "theirs", folder, args)
    return (
        f"| {name} | {against} | {our_time:.2f} | {their_time:.2f} | **{ratio:.2f}** "
        f"| {our_peak:.2f} | {their_peak:.2f} | **{our_peak / their_peak:.2f}** |"
    )


# ---- against the size of the images


class Cost(NamedTuple):
    """What the U-Net costs for a batch of latents."""

    side: int  # of the latents
    batch: int
    operations: float  # 10^12
    seconds: float
    memory: float  # GB


def operations(side: int, batch: int) -> int:
    """Multiplications and additions of the U-Net's forward pass, as torch counts them.

    Attention is two matrix products for it.
    """
    with torch.device("meta"):
        model = our_unet()
        inputs = unet_inputs(side, batch, torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, *inputs)
    return counter.get_total_flops()


def rate_of_a_matrix_product(n: int = 4096) -> float:
    """This machine's operations per second in a matrix product, the best of five."""
    a = torch.randn(n, n)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


def against_size(args: argparse.Namespace, file: Path) -> str:
    """The U-Net's time and memory for 12 sizes, next to its operations at the machine's rate."""
    rate = rate_of_a_matrix_product()
    model = our_unet()
    costs = []
    for side, batch in [(8, 1), (16, 2)] if args.quick else SIDES_AND_BATCHES:
        go = partial(call, model, *unet_inputs(side, batch, torch.float32))
        spent = statistics.median(seconds(go) for _ in range(1 if args.quick else 3))
        memory = peak("U-Net", "ours", Path(), args, side, batch)
        costs.append(Cost(side, batch, operations(side, batch) / 1e12, spent, memory))
    draw(costs, rate, file)

    lines = [
        f"A matrix product runs at {rate / 1e9:.0f} * 10^9 operations a second here.\n",
        "| image | batch | 10^12 operations | s at that rate | s | GB |",
        "|---" * 6 + "|",
    ]
    for cost in costs:
        pixels = 8 * cost.side
        at_that_rate = cost.operations * 1e12 / rate
        lines.append(
            f"| {pixels}x{pixels} | {cost.batch} | {cost.operations:.2f} | {at_that_rate:.2f} "
            f"| {cost.seconds:.2f} | {cost.memory:.2f} |"
        )
    return "\n".join(lines)


def draw(costs: list[Cost], rate: float, file: Path) -> None:
    """Saves the figure."""
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=100)
    for batch in sorted({cost.batch for cost in costs}):
        found = [cost for cost in costs if cost.batch == batch]
        counts = [cost.operations for cost in found]
        label = f"batch {batch}"
        time_axes.plot(counts, [cost.seconds for cost in found], "o-", label=label)
        memory_axes.plot(counts, [cost.memory for cost in found], "o-", label=label)

    counts = sorted(cost.operations for cost in costs)
    least = [count * 1e12 / rate for count in counts]
    time_axes.plot(counts, least, "k--", label="a matrix product's rate")
    time_axes.set(xscale="log", yscale="log", xlabel="10^12 operations", ylabel="seconds")
    memory_axes.set(xscale="log", ylim=0, xlabel="10^12 operations", ylabel="peak memory, GB")
    time_axes.legend(loc="upper left", fontsize="small")
    memory_axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(file)


# ---- iterations of ESD


def esd_iterations(
    frozen: unet.UNet, method: str, side: int, steps: int, every_step: bool
) -> Iterator[float]:
    """Returns gradient steps on x_t from the edited model; frozen's device and dtype are taken."""
    weight = frozen.conv_in.weight
    c, null = torch.randn(2, 1, 77, 768, device=weight.device, dtype=weight.dtype)
    data = partial(
        erase.x_t_from_model,
        texts=[erase.Text(concept=c, null=null, anchor=c)],
        shape=(1, 4, side, side),
        rng=torch.Generator().manual_seed(0),
        steps=steps,
        every_step=every_step,
    )
    return our_steps(frozen, method, data)


def take(losses: Iterator[float], count: int) -> None:
    """Takes some gradient steps, and waits for a GPU."""
    for _ in range(count):
        next(losses)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kinds_of_x_t(quick: bool) -> str:
    """Seconds per iteration of ESD-x at 16x16 latents: x_t as in the paper, and every step.

    In the paper a trajectory ends at a random t, so the average over 50 iterations varies by 8 %.
    """
    steps = 4 if quick else 50
    count = 2 if quick else steps
    frozen = our_unet()
    times = []
    for every_step in (False, True):
        losses = esd_iterations(frozen, "esd-x", side=16, steps=steps, every_step=every_step)
        times.append(seconds(partial(take, losses, count)) / count)

    paper, every = times
    return (
        f"Seconds per iteration of ESD-x with {steps} steps, latents of 16x16, on average: x_t as "
        f"in the paper {paper:.2f}, every step of a trajectory {every:.2f}, a ratio of "
        f"**{every / paper:.2f}**."
    )


# ---- on a GPU


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def gpu_unets() -> None:
    """The U-Net in each precision, ours and diffusers', and how far our eps is from float32's.

    PyTorch lets convolutions in float32 use TF32, which rounds as coarsely as float16; the eps that
    the others are compared with is computed without it.
    """
    print(
        f"\n{torch.cuda.get_device_name()}, U-Net, 512x512, batch 2; error: the largest "
        f"difference from float32's eps, as a share of the largest eps\n"
    )
    print("| dtype | s | diffusers, s | GB | diffusers, GB | error |")
    print("|---" * 6 + "|")
    torch.manual_seed(0)
    x_t, t, c = (x.cuda() for x in unet_inputs(64, 2, torch.float32))
    torch.backends.cudnn.allow_tf32 = False
    exact = call(our_unet().to("cuda"), x_t, t, c)
    torch.backends.cudnn.allow_tf32 = True

    for dtype in PRECISIONS:
        inputs = x_t.to(dtype), t, c.to(dtype)
        model = our_unet().to("cuda", dtype)  # built in float32, so the weights are the same
        error = (call(model, *inputs).float() - exact).abs().max() / exact.abs().max()
        ours = gpu_forward(model, inputs)
        del model
        theirs = gpu_forward(their_unet().to("cuda", dtype), inputs)
        print(
            f"| {str(dtype)[6:]} | {ours.seconds:.3f} | {theirs.seconds:.3f} "
            f"| {ours.peak:.2f} | {theirs.peak:.2f} | {error:.1e} |",
            flush=True,
        )


class OnGPU(NamedTuple):
    seconds: float
    peak: float  # GB


def gpu_forward(model: torch.nn.Module, inputs: tuple) -> OnGPU:
    """Measures a forward pass, after one that isn't measured."""

    def go():
        call(model, *inputs)
        torch.cuda.synchronize()

    torch.cuda.empty_cache()
    go()
    torch.cuda.reset_peak_memory_stats()
    spent = statistics.median(seconds(go) for _ in range(TURNS))
    return OnGPU(spent, torch.cuda.max_memory_allocated() / GB)


def gpu() -> None:
    """Seconds per iteration and the peak of reserved memory, under the least limit that will do."""
    gpu_unets()
    name = torch.cuda.get_device_name()
    print(f"\n{name}, 512x512, batch 1, trajectories of 50 steps:\n")
    print("| method | dtype | x_t | limit, GB | seconds per iteration | peak, GB |")
    print("|---" * 6 + "|")
    for method, dtype, every_step in itertools.product(erase.METHODS, PRECISIONS, (False, True)):
        x_t = "every step" if every_step else "the paper"
        found = "32 | out of memory | out of memory"
        for limit in (6, 16, 32):
            iteration = gpu_iteration(method, dtype, every_step, limit)
            if iteration:
                found = f"{limit} | {iteration.seconds:.2f} | {iteration.peak:.1f}"
                break
        print(f"| {method} | {str(dtype)[6:]} | {x_t} | {found} |", flush=True)


def gpu_iteration(
    method: str, dtype: torch.dtype, every_step: bool, limit: float
) -> OnGPU | None:
    """Measures 50 iterations after a first one, within `limit` GB; None if that isn't enough."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GB / total))
    try:
        frozen = our_unet().to("cuda", dtype)  # tensor by tensor
        losses = esd_iterations(frozen, method, side=64, steps=50, every_step=every_step)
        take(losses, 1)
        torch.cuda.reset_peak_memory_stats()
        spent = seconds(partial(take, losses, 50)) / 50
        return OnGPU(spent, torch.cuda.max_memory_reserved() / GB)
    except torch.OutOfMemoryError:
        return None


# ---- the command line


def print_machine() -> None:
    """Prints what the numbers were measured on."""
    import diffusers
    import transformers

    machine = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(
        f"{machine}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, transformers {transformers.__version__}\n"
    )


def compare(args: argparse.Namespace, sizes: Sizes, folder: Path) -> None:
    """Prints the table, or some of its rows."""
    print("| | against | s | theirs, s | ratio | GB | theirs, GB | ratio |")
    print("|---" * 8 + "|")
    write_model(folder / "model")
    for name in args.rows or ROWS:
        print(measured(name, sizes, folder, args), flush=True)
    if args.rows:
        return

    figure = Path(__file__).with_name("cost_against_size.png")
    if args.quick:
        figure = folder / "quick.png"
    print("\n" + kinds_of_x_t(args.quick))
    print("\n" + against_size(args, figure))
    if torch.cuda.is_available():
        gpu()


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
        run_once(args, sizes)
    elif args.gpu:
        gpu()
    else:
        print_machine()
        with tempfile.TemporaryDirectory() as folder:
            compare(args, sizes, Path(folder))


if __name__ == "__main__":
    main()
