"""Erases a concept from Stable Diffusion by fine-tuning its U-Net, without a single image: ESD.

    python erase.py "Van Gogh" --out van-gogh.safetensors

Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arxiv.org/abs/2303.07345.
Equations and symbols are the paper's: c concept, null empty prompt, x_t latent at t, eps its noise,
eta strength, `frozen` the original eps_theta*, `unet` the edited eps_theta, theta what was tuned.
"""

import argparse
import json
import pkgutil
import zlib
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from tqdm import tqdm

import ddim
import sample

METHODS: dict[str, Callable[[str], bool]] = {  # which parameters are tuned, by name (section 4.1)
    "esd-x": lambda name: "attn2" in name,  # cross-attention: tied to the words of the prompt
    "esd-u": lambda name: "attn2" not in name and not name.startswith(  # as in the paper's code
        ("time_embedding.", "conv_norm_out.", "conv_out.")),
}
SCALE = 2.0**12  # of the loss, for float16's gradients; and of Adam's eps, so steps stay the same


class Text(NamedTuple):
    """Text features that a loss may use, (B, 77, 768) each."""
    concept: Tensor
    null: Tensor
    anchor: Tensor  # what x_t is drawn for: the concept, unless another prompt is given


def esd_target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """Eq. 6: eps_theta*(x_t, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)]."""
    return eps_null - eta * (eps_c - eps_null)


def esd_loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
             eta: float = 1.0) -> Tensor:
    """Eq. 6 as a loss, (B,): the mean square of eps_theta(x_t, c, t) - target over each sample.
    unet and frozen take (x_t, t, c), c one of the features in text; x_t is (B, 4, H, W), t is (B,).
    """
    with torch.no_grad():
        target = esd_target(frozen(x_t, t, text.null), frozen(x_t, t, text.concept), eta)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


@torch.no_grad()  # holds while it draws, not while it waits
def own_ways(unet: Callable, texts: list[Text], shape: tuple, steps: int, guidance: float,
             rng: Generator, every_step: bool = False) -> Iterator[tuple]:
    """Yields (x_t, t, text) without end: x_t is what the edited model itself has denoised for a
    random concept, down to a random t (section 4), or, cheaper, every x_t on its way to an image.
    """
    times = ddim.timesteps(steps)
    while True:
        text = texts[torch.randint(len(texts), (1,), generator=rng)]
        way = times if every_step else times[:1 + torch.randint(steps, (1,), generator=rng)]
        noise = torch.randn(shape, generator=rng).to(text.null.device)
        predict = ddim.guided(unet, text.anchor, text.null, guidance)
        for t, (_, x_t) in zip(way, ddim.denoise(predict, noise, steps)):
            if every_step or t == way[-1]:
                yield x_t, torch.full(shape[:1], t, device=x_t.device), text


def noised(images: Tensor, texts: list, shape: tuple, steps: int, rng: Generator) -> Iterator:
    """For memorised images (section 5.4): x_t is images[i], noised, with texts[i]; (C, 4, H, W)."""
    while True:
        i = torch.randint(len(texts), (1,), generator=rng).item()
        t = ddim.timesteps(steps)[torch.randint(steps, (1,), generator=rng)]
        noise = torch.randn(shape, generator=rng).to(images.device)
        x_t = ddim.add_noise(images[i].expand(shape), noise, ddim.alphas_cumprod()[t])
        yield x_t, torch.full(shape[:1], t, device=x_t.device), texts[i]


def select(unet: nn.Module, method: str | Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns theta by name: float32 copies of what a method, or a predicate on names, tunes."""
    tuned = METHODS[method] if isinstance(method, str) else method
    return {name: parameter.detach().to(torch.float32, copy=True).requires_grad_()
            for name, parameter in unet.named_parameters() if tuned(name)}


def edit(frozen: nn.Module, theta: dict[str, Tensor]) -> Callable:
    """Returns eps_theta(x_t, t, c): `frozen` with the newest values of theta in place."""
    dtype = next(frozen.parameters()).dtype
    return lambda x_t, t, c: torch.func.functional_call(
        frozen, {name: tensor.to(dtype) for name, tensor in theta.items()}, (x_t, t, c))


def esd(unet: Callable, frozen: Callable, data: Iterator[tuple], optimizer: torch.optim.Optimizer,
        loss_fn: Callable = esd_loss, eta: float = 1.0) -> Iterator[float]:
    """Takes one gradient step for each loss that is asked for, as long as data lasts."""
    for x_t, t, text in data:
        loss = loss_fn(unet, frozen, x_t, t, text, eta).mean()
        if not loss.isfinite():
            raise ValueError(f"the loss at t = {t.tolist()} isn't finite: try a smaller lr or eta")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def erase(sd: sample.StableDiffusion, concepts: list[str] | dict[str, str], method: str = "esd-x",
          eta: float = 1.0, lr: float = 1e-5, iterations: int = 1000, loss_fn: Callable = esd_loss,
          data: Callable = own_ways, guidance: float = 3.0, steps: int = 50, batch: int = 1,
          seed: int = 0, checkpoint: Path | None = None) -> dict[str, Tensor]:
    """Runs ESD, by default with the paper's values; returns theta by name. `sd` isn't changed.
    concepts: prompts, or {prompt: anchor}; each x_t is for a random one. data: called as own_ways.
    checkpoint: a file that keeps the run; the same call goes on from it, to the same bits.
    """
    if iterations < 0 or batch < 1:
        raise ValueError(f"iterations is {iterations}, batch {batch}: choose 0 and 1 or more")
    concepts = [concepts] if isinstance(concepts, str) else concepts
    anchors = [*(concepts.values() if isinstance(concepts, dict) else concepts)]
    null = sd.encode([""] * batch)
    texts = [Text(c.expand_as(null), null, anchor.expand_as(null))
             for c, anchor in zip(sd.encode([*concepts]), sd.encode(anchors))]
    shape = (batch, *sample.starting_noise(sd, 1, seed, None).shape[1:])
    rng, theta, done = Generator().manual_seed(seed), select(sd.unet, method), 0
    unet, optimizer = edit(sd.unet, theta), torch.optim.Adam(theta.values(), lr, eps=SCALE * 1e-8)
    if checkpoint and checkpoint.exists():
        kept, rng_state, moments, done = torch.load(checkpoint, "cpu", weights_only=True)
        rng.set_state(rng_state), optimizer.load_state_dict(moments)
        for name, tensor in theta.items():
            tensor.data.copy_(kept[name])
    losses = esd(unet, sd.unet, data(unet, texts, shape, steps, guidance, rng), optimizer,
                 lambda *args: SCALE * loss_fn(*args), eta)
    bar = tqdm(range(done + 1, iterations + 1), f"from {done}", delay=1, disable=not checkpoint)
    for done in bar:
        bar.set_postfix(loss=next(losses) / SCALE, refresh=False)
        if checkpoint and done % steps == 0:  # with every_step, only between two ways
            state = theta, rng.get_state(), optimizer.state_dict(), done
            sample.write_whole(checkpoint, lambda part: torch.save(state, part))
    return {name: tensor.detach() for name, tensor in theta.items()}


def save(theta: dict[str, Tensor], path: Path, settings: dict) -> None:
    """Writes a float16 safetensors file under the published names; settings are its metadata."""
    tensors = {name: tensor.half().cpu() for name, tensor in theta.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("theta isn't finite, nothing was saved: try a smaller --lr or --eta")
    whole = safetensors.torch.save(tensors, {"settings": json.dumps(settings, default=str)})
    sample.write_whole(path, lambda part: part.write_bytes(whole))


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    kept = args.out.with_suffix(f".{zlib.crc32(repr(args).encode()):08x}.checkpoint")
    if args.out.exists():
        kept.unlink(missing_ok=True)  # of a run that was killed after it had saved its weights
    sample.check_out(args.out, ".safetensors", new=not kept.exists())
    try:
        loss_fn = pkgutil.resolve_name(args.loss).__call__  # an AttributeError if it has none
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--loss {args.loss}: {error}") from error
    if any("," in concept for concept in args.concepts):
        print('A comma is part of a concept. To erase two, write "star" "heart".')
    sd = sample.load(args.model, args.device, args.dtype, args.tokenizer, args.ema)
    data = lambda *how: own_ways(*how, args.every_step)
    if args.image:
        if len(args.image) != len({*args.concepts}):
            raise ValueError(f"{len(args.image)} images for {len({*args.concepts})} concepts")
        images = sd.encode_images([Image.open(file) for file in args.image])
        data = lambda unet, texts, shape, steps, _, rng: noised(images, texts, shape, steps, rng)
    anchored = args.concepts if args.anchor is None else dict.fromkeys(args.concepts, args.anchor)
    theta = erase(sd, anchored, args.method, args.eta, args.lr, args.iterations, loss_fn, data,
                  args.guidance, args.steps, args.batch, args.seed, kept)
    models = {"before": sd, "after": sample.with_tuned(sd, theta)}
    rows = [(f"{text}, {when}", sample.generate(model, [text], 4, args.seed, 25, progress=True))
            for text in args.concepts + args.show for when, model in models.items()]
    sample.save_png(sample.contact_sheet(rows), args.out.with_suffix(".png"), vars(args))
    save(theta, args.out, vars(args))
    kept.unlink(missing_ok=True)
    print(f"{sum(part.numel() for part in theta.values()):,} parameters tuned: {args.out}, .png")


def main() -> None:
    """Reads the command line."""
    flags = sample.parser("Erases concepts from Stable Diffusion (ESD).", "CONCEPT", "a prompt")
    add = flags.add_argument
    add("--method", default="esd-x", choices=METHODS, help="which parameters to tune")
    add("--eta", type=float, default=1.0, help="strength, Eq. 6")
    add("--lr", type=float, default=1e-5, help="Adam's learning rate")
    add("--iterations", type=int, default=1000, help="gradient steps")
    add("--loss", default="erase:esd_loss", metavar="MODULE:FUNCTION", help="a loss of your own")
    add("--every-step", action="store_true", help="learn at every step on the way to an image")
    add("--anchor", metavar="PROMPT", help="what x_t is drawn for, if not for the concept")
    add("--image", type=Path, nargs="+", metavar="FILE", help="one image per concept, for x_t")
    add("--guidance", type=float, default=3.0, help="guidance scale for x_t")
    add("--batch", type=int, default=1, help="latents in a gradient step")
    add("--show", nargs="+", default=[], metavar="PROMPT", help="to be shown before and after, too")
    add("--out", type=Path, default=Path("erased.safetensors"), help="the image goes next to it")
    sample.fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
