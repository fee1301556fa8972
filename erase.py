"""Erases a concept from Stable Diffusion by fine-tuning its U-Net, without a single picture: ESD.

    python erase.py "Van Gogh" --out van-gogh.safetensors
    python erase.py "star" --model notebooks/toy --eta 0.9 --lr 4e-4 --iterations 160 \\
        --steps 8 --batch 4 --average 0.97

Gandikota, Materzynska, Fiotto-Kaufman, Bau: "Erasing Concepts from Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.07345. Equation numbers are that paper's.

Symbols: c the concept, null the empty prompt; x_t latent at time t; eps predicted noise;
eta strength; `frozen` eps_theta*, the original; `unet` (in a loss) eps_theta, the edited one;
theta the tuned tensors, the only ones in which the two differ.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

import ddim
import sample
from sample import StableDiffusion


# Which parameters a method tunes, as a predicate on their names. esd-x and esd-u are the paper's
# (section 4.1), but esd-u as in its code, which spares the time embedding and the output layers;
# the others are its code's.
SPARED = ("time_embedding.", "conv_norm_out.", "conv_out.")
METHODS: dict[str, Callable[[str], bool]] = {
    "esd-x": lambda name: "attn2" in name,  # cross-attention: tied to the words of the prompt
    "esd-x-strict": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "esd-u": lambda name: "attn2" not in name and not name.startswith(SPARED),
    "selfattn": lambda name: "attn1" in name,
    "full": lambda name: True,
    "notime": lambda name: not name.startswith(SPARED),
}
ALIASES = {"xattn": "esd-x", "noxattn": "esd-u", "esd-all": "full"}  # of the official code
KEEP_EVERY = 25  # iterations between two checkpoints


class Text(NamedTuple):
    """Text features that a loss may use, (B, 77, 768) each."""

    concept: Tensor
    null: Tensor
    anchor: Tensor  # the wider concept to erase from; the concept itself where none is given


def esd_target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """Eq. 6: eps_theta*(x_t, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)]."""
    return eps_null - eta * (eps_c - eps_null)


def esd_loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
             eta: float = 1.0) -> Tensor:
    """Eq. 6 as a loss: the mean square of eps_theta(x_t, c, t) - target over a sample, (B,).

    unet and frozen take (x_t, t, c), c one of the features in text; x_t is (B, 4, H, W), t is (B,).
    """
    with torch.no_grad():
        target = esd_target(frozen(x_t, t, text.null), frozen(x_t, t, text.concept), eta)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


def esd_from_loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
                  eta: float = 1.0) -> Tensor:
    """Erases c from a wider concept a and leaves the rest of a, (B,). Of the official code, where

    target = eps_theta*(x_t, a, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)].
    """
    with torch.no_grad():
        direction = frozen(x_t, t, text.concept) - frozen(x_t, t, text.null)
        target = frozen(x_t, t, text.anchor) - eta * direction
    eps = unet(x_t, t, text.anchor)
    return (eps - target).square().mean(dim=(1, 2, 3))


def select(unet: torch.nn.Module, method: str) -> list[str]:
    """The names of the parameters that a method tunes.

    Raises ValueError for an unknown method and for one that selects nothing.
    """
    method = ALIASES.get(method, method)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, choose from {', '.join([*METHODS, *ALIASES])}")
    names = [name for name, _ in unet.named_parameters() if METHODS[method](name)]
    if not names:
        raise ValueError(f"method {method!r} selects no parameter of this U-Net")
    return names


def check_settings(concepts: list[str], anchors: list[str], images: list | None, iterations: int,
                   batch: int, average: float, drawn_by: str) -> None:
    """Raises ValueError for what `erase` can't do."""
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, choose 0 or more")
    if batch < 1 or not 0 <= average < 1:
        raise ValueError(f"batch is {batch}, average {average}: choose 1 or more, and 0 to below 1")
    if drawn_by not in ("edited", "frozen"):
        raise ValueError(f"drawn_by is {drawn_by!r}, choose edited or frozen")
    for name, given in (("anchors", anchors), ("images", images or concepts)):  # images: optional
        if len(given) != len(concepts):
            raise ValueError(f"{len(concepts)} concepts and {len(given)} {name}: give one for each")


def erase(sd: StableDiffusion, concepts: list[str], method: str = "esd-x", eta: float = 1.0,
          lr: float = 1e-5, iterations: int = 1000, loss_fn: Callable = esd_loss,
          guidance: float = 3.0, steps: int = 50, seed: int = 0, batch: int = 1,
          average: float = 0.0, lr_decay: bool = False, anchors: list[str] | None = None,
          images: list[Image.Image] | None = None, drawn_by: str = "edited", jitter: bool = False,
          keep: Callable[[dict], None] | None = None, state: dict | None = None,
          progress: bool = False) -> dict[str, Tensor]:
    """Runs `iterations` steps of ESD; returns the tuned tensors theta by name, in float32.

    Each iteration draws one concept, a random step of `steps`, and `batch` latents that the edited
    model itself has denoised so far for this concept (section 4); then Adam takes one step down
    `loss_fn(unet, frozen, x_t, t, text, eta)`. `sd` isn't changed.

    anchors: a wider concept for each, or one for all, that text.anchor holds and x_t shows.
    images: one for each concept; x_t is then the picture itself, noised to t (section 5.4).
    drawn_by: "edited", or "frozen" as in the official code of 2025.
    jitter: t is uniform within its step, as in the official code of 2023.
    average: decay of theta's exponential average, which is then what returns; 0: theta itself.
    lr_decay: the learning rate falls linearly, to 0 after the last iteration.
    keep: called with the state every 25 iterations; `state` goes on from one of those.
    Raises ValueError for impossible settings, and where the loss isn't finite.
    """
    concepts = [concepts] if isinstance(concepts, str) else concepts
    anchors = concepts if anchors is None else anchors
    if len(anchors) == 1:
        anchors = anchors * len(concepts)
    check_settings(concepts, anchors, images, iterations, batch, average, drawn_by)
    frozen, times = sd.unet, ddim.timesteps(steps)
    parameters = dict(frozen.named_parameters())
    theta = {name: parameters[name].detach().to(torch.float32, copy=True).requires_grad_()
             for name in select(frozen, method)}  # an update of 1e-5 is lost in half precision
    averaged = {name: tensor.detach().clone() for name, tensor in theta.items() if average}
    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    scaler = torch.amp.GradScaler(sd.device.type, enabled=sd.dtype == torch.float16)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    if state:
        with torch.no_grad():
            for now, then in ((theta, state["theta"]), (averaged, state["averaged"])):
                for name, tensor in now.items():
                    tensor.copy_(then[name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        generator.set_state(state["generator"])
        start = state["iteration"]

    null, texts, anchor_texts = sd.encode([""] * batch), sd.encode(concepts), sd.encode(anchors)
    pictures = sd.encode_images(images) if images else None  # x_0, (C, 4, H, W)
    config = sd.unet.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    bar = tqdm(range(start, iterations), "erasing", initial=start, total=iterations,
               disable=not progress)
    for iteration in bar:
        i = torch.randint(len(concepts), (1,), generator=generator).item()
        t = times[torch.randint(steps, (1,), generator=generator).item()]
        noise = torch.randn(shape, generator=generator).to(sd.device)
        text = Text(texts[i].expand_as(null), null, anchor_texts[i].expand_as(null))
        cast = {name: tensor.to(sd.dtype) for name, tensor in theta.items()}  # gradients pass

        def edited(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return functional_call(frozen, cast, (x_t, t, c))

        with torch.no_grad():
            if pictures is None:
                predict = ddim.guided(edited if drawn_by == "edited" else frozen, text.anchor, null,
                                      guidance)
                x_t = next(x_t for at, x_t in ddim.denoise(predict, noise, steps) if at == t)
            else:
                x_t = ddim.add_noise(pictures[i].expand(shape), noise, ddim.alphas_cumprod()[t])
        if jitter:  # a step spans TRAIN_STEPS // steps times; the sampler's is the second of them
            t += torch.randint(ddim.TRAIN_STEPS // steps, (1,), generator=generator).item() - 1
        loss = loss_fn(edited, frozen, x_t, torch.full((batch,), t, device=sd.device), text, eta)
        if not loss.isfinite().all():
            raise ValueError(f"the loss at iteration {iteration}, t = {t}, isn't finite: try a "
                             "smaller --lr or --eta, or --dtype float32")
        if lr_decay:
            optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        scaler.scale(loss.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for name, tensor in averaged.items():
            tensor.lerp_(theta[name].detach(), 1 - average)
        bar.set_postfix(loss=f"{loss.mean().item():.4f}", refresh=False)
        if keep and (iteration + 1) % KEEP_EVERY == 0:
            keep({"iteration": iteration + 1, "generator": generator.get_state(),
                  "theta": theta, "averaged": averaged, "optimizer": optimizer.state_dict(),
                  "scaler": scaler.state_dict()})
    return averaged if average else {name: tensor.detach() for name, tensor in theta.items()}


def save(theta: dict[str, Tensor], path: Path, dtype: torch.dtype, settings: dict) -> None:
    """A safetensors file under the published names, whole or not there at all.

    The settings are JSON in its metadata. Raises ValueError where theta isn't finite.
    """
    for name, tensor in theta.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} isn't finite, nothing was saved: try a smaller --lr or --eta")
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in theta.items()}
    metadata = {"settings": json.dumps(settings)}
    sample.write_whole(path, lambda part: save_file(tensors, part, metadata=metadata))


def read_checkpoint(file: Path, settings: dict) -> dict:
    """The state that `erase` goes on from. Raises ValueError where other settings made it."""
    try:
        saved = torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} can't be read, remove it and begin anew") from error
    for key, value in settings.items():
        if saved["settings"].get(key) != value:
            raise ValueError(f"{file} was made with {key} = {saved['settings'].get(key)!r}, not "
                             f"{value!r}: take its settings, or another --out")
    return saved["state"]


def fingerprint(unet: torch.nn.Module) -> str:
    """Tells models apart: a checksum over all weights."""
    crc = 0
    for weight in unet.parameters():
        crc = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def before_after(before: StableDiffusion, after: StableDiffusion, prompts: list[str], seed: int,
                 num: int = 4) -> Image.Image:
    """A contact sheet: each prompt before and after, the same seeds one above the other.

    Drawn with 25 steps, which is enough to see, and guidance 7.5.
    """
    rows = []
    for name, sd in (("before", before), ("after", after)):
        images = sample.generate(sd, prompts, num, seed, steps=25, progress=True)
        rows.append([(f"{prompt}, {name}", images[i * num:(i + 1) * num])
                     for i, prompt in enumerate(prompts)])
    return sample.contact_sheet([row for pair in zip(*rows) for row in pair])


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    picture, checkpoint = args.out.with_suffix(".png"), args.out.with_suffix(".checkpoint")
    sample.check_out(args.out, ".safetensors")
    if args.out.exists():
        raise ValueError(f"{args.out} is there already: choose another --out, or remove it")
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} is there already: go on with --resume, or remove it")
    if args.resume and not checkpoint.exists():
        raise ValueError(f"{checkpoint} isn't there: nothing to resume, leave out --resume")
    sd = sample.load(args.model, args.device, args.dtype, args.tokenizer, args.revision)
    sd.unet.checkpointing = args.checkpointing
    names, parameters = select(sd.unet, args.method), dict(sd.unet.named_parameters())
    print(f"{args.method} tunes {len(names)} tensors, "
          f"{sum(parameters[name].numel() for name in names):,} parameters")
    images = [sample.open_image(file) for file in args.image] or None
    flags = {key: getattr(args, key) for key in (  # as `erase` names them
        "concepts", "anchors", "method", "eta", "lr", "iterations", "guidance", "steps", "seed",
        "batch", "average", "lr_decay", "drawn_by", "jitter")}
    settings = flags | {"model": args.model, "image": [*map(str, args.image)],
                        "dtype": str(sd.dtype), "weights": fingerprint(sd.unet)}
    state = read_checkpoint(checkpoint, settings) if args.resume else None

    def keep(state: dict) -> None:
        content = {"settings": settings, "state": state}
        sample.write_whole(checkpoint, lambda part: torch.save(content, part))

    try:
        theta = erase(sd, **flags, loss_fn=esd_from_loss if args.anchors else esd_loss,
                      images=images, keep=keep, state=state, progress=True)
    except KeyboardInterrupt:
        if checkpoint.exists():
            print(f"{checkpoint} keeps what was reached: go on with --resume", file=sys.stderr)
        raise
    save(theta, args.out, getattr(torch, args.save_dtype), settings)
    checkpoint.unlink(missing_ok=True)
    print(args.out)
    prompts = args.concepts + args.show
    sheet = before_after(sd, sample.load_erased(sd, args.out), prompts, args.seed)
    sample.save_png(sheet, picture, "\n".join(prompts), settings)
    print(picture)


def main() -> None:
    """The command line of erasing."""
    parser = argparse.ArgumentParser(
        description="Erases concepts from the U-Net of Stable Diffusion (ESD).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("concepts", nargs="+", metavar="CONCEPT", help="what to erase, as a prompt")
    sample.add_model_arguments(parser)
    add("--method", default="esd-x", choices=[*METHODS, *ALIASES], help="which parameters to tune")
    add("--eta", type=float, default=1.0,
        help="strength, Eq. 6; --negative_guidance of the official code is eta in its version of "
             "2023, eta + 1 in that of 2025")
    add("--lr", type=float, default=1e-5, help="Adam's learning rate")
    add("--iterations", type=int, default=1000, help="gradient steps")
    add("--from", dest="anchors", nargs="+", metavar="CONCEPT",
        help="erase from this wider concept only: one for all, or one for each")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE",
        help="erase this picture: one for each concept, which is its title")
    add("--guidance", type=float, default=3.0, help="scale of the guidance in drawing x_t")
    add("--drawn-by", default="edited", choices=["edited", "frozen"], help="which model draws x_t")
    add("--jitter", action="store_true", help="draw t uniformly within its step")
    add("--batch", type=int, default=1, help="latents in an iteration")
    add("--average", type=float, default=0.0,
        help="decay of the average of the tuned tensors; 0: the last ones")
    add("--lr-decay", action="store_true", help="the learning rate falls linearly to 0")
    add("--checkpointing", action="store_true", help="less memory, a third more time: activations "
        "are computed twice")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add("--show", nargs="+", default=[], metavar="PROMPT",
        help="more rows of the before/after picture: what should stay")
    add("--save-dtype", default="float16", choices=["float16", "float32"], help="of the file")
    add("--out", type=Path, default=Path("erased.safetensors"),
        help="the tuned tensors; the picture goes beside them")
    sample.fail_in_one_line(run, parser.parse_intermixed_args())


if __name__ == "__main__":
    main()
