"""Trains the miniature Stable Diffusion from scratch, with this project's own modules.

    python -m notebooks.toy.train      # every stage, 86 minutes on two cores that have bfloat16
    python -m notebooks.toy.train --without star --run runs/without_star    # censored data

Stages, in order: tokenizer, vae, text (contrastive, then frozen), unet, judge; a stage needs what
the earlier ones left in `--out`. A stage saves a checkpoint in `--run` every few hundred steps; the
same command resumes from it. The result is a folder in diffusers' layout, which
`sample.load(out)` opens.
"""

import argparse
import functools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTokenizer

import clip_text
import ddim
import sample
import unet
import vae
from notebooks.tools import export
from notebooks.toy import world
from notebooks.toy.judge import Judge, labels_of
from sample import UsageError

EXAMPLES = 48_000
SAVE_EVERY = 250  # steps between two checkpoints
VAE = vae.VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4)
TEXT = clip_text.TextConfig(  # its vocabulary is the tokenizer's
    hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4
)
UNET = unet.UNetConfig(
    block_out_channels=(64, 128), attention=(True, True), layers_per_block=1,
    cross_attention_dim=96, heads=4, norm_num_groups=16, sample_size=8,
)


# ---- the training set


class TrainingSet(NamedTuple):
    """Images and their captions."""

    images: Tensor  # (EXAMPLES, 3, 64, 64), uint8
    captions: list[str]


def to_uint8(example: world.Example) -> Tensor:
    """Returns an example's image, (3, 64, 64), uint8."""
    return torch.from_numpy(np.array(example.image)).permute(2, 0, 1)


@functools.cache
def training_set(seed: int, without: tuple[str, ...]) -> TrainingSet:
    """Draws the training set; cached, since three stages need it."""
    rng = np.random.default_rng(seed)
    images = torch.empty(EXAMPLES, 3, world.SIZE, world.SIZE, dtype=torch.uint8)
    captions = []
    for i in tqdm(range(EXAMPLES), "rendering the world"):
        example = world.draw(rng, without)
        images[i] = to_uint8(example)
        captions.append(example.caption)
    return TrainingSet(images, captions)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


# ---- the training loop


class Training:
    """A model in training: its weights, their average, the optimizer, and how far it is."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
        self.average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.done = 0  # steps

    def resume(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.done = state["step"]

    def save(self, checkpoint: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.done,
        }
        sample.write_whole(checkpoint, functools.partial(torch.save, state))

    def step(self, loss: Tensor, rate: float, decay: float) -> None:
        """Takes a gradient step, and brings the average a little nearer to the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1

        decay = min(decay, self.done / (self.done + 9))  # the first weights are random
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                self.average[name].lerp_(tensor, 1 - decay)


def fit(
    name: str, model: nn.Module, loss: Callable[[Generator], Tensor], steps: int, lr: float,
    run: Path, seed: int, decay: float = 0.998,
) -> None:
    """Minimises `loss(generator)` over the model's parameters, then replaces them by an average.

    AdamW, a short warm-up, a cosine to zero, gradients clipped to norm 1, and an exponential
    average of the weights. A step draws all its randomness from one generator seeded by the step,
    so a run that was interrupted goes on exactly as it would have.
    """
    checkpoint = run / f"{name}.pt"
    training = Training(model)
    if checkpoint.exists():
        training.resume(checkpoint)

    shown = None
    start = training.done
    progress = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5)
    for step in progress:
        warm_up = min(1, (step + 1) / 100)
        rate = lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(Generator().manual_seed(seed * 10_000_000 + step))
        training.step(value, rate, decay=decay)

        shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
        progress.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if training.done % SAVE_EVERY == 0 or training.done == steps:
            training.save(checkpoint)
    model.load_state_dict(training.average)


# ---- stage 1: the tokenizer


def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Returns a word's pieces, with each occurrence of a pair joined, from the left."""
    pieces = []
    i = 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        pieces.append("".join(pair) if is_pair else word[i])
        i += 2 if is_pair else 1
    return pieces


class BytePairs(NamedTuple):
    """What byte-pair encoding has learned."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]


def byte_pairs(words: list[str]) -> BytePairs:
    """Trains byte-pair encoding until every word is one token.

    As in CLIP, the vocabulary starts with all 256 bytes, alone and at the end of a word, so that
    any text has tokens; then come the merges, then the start and the end token.
    """
    # as in GPT-2: a printable character for every byte
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [byte for byte in range(256) if byte not in visible]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(invisible))]

    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        pairs = [pair for word in spelled for pair in zip(word, word[1:])]
        if not pairs:
            break
        # of equally frequent pairs, the first in the alphabet
        pair = max(sorted(set(pairs)), key=pairs.count)
        merges.append(pair)
        spelled = [merged(word, pair) for word in spelled]

    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return BytePairs({token: i for i, token in enumerate(tokens)}, merges)


def make_tokenizer(folder: Path) -> None:
    """Writes vocab.json and merges.txt, the form in which CLIP's own tokenizer is published."""
    vocabulary, merges = byte_pairs(world.vocabulary())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- the arithmetic of all stages but the text encoder's


def mixed_precision() -> torch.autocast:
    """Returns a context that computes in bfloat16, where the CPU has instructions for it.

    Where it has none, bfloat16 takes ten times as long as float32, which is used there.
    """
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16)


# ---- stage 2: the VAE


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the differences between neighbouring pixels, across and down."""
    return x.diff(dim=3), x.diff(dim=2)


def train_vae(out: Path, run: Path, images: Tensor, seed: int, steps: int = 12000) -> None:
    """Trains the VAE on pixels, their edges and a little KL, and writes it.

    Measures its scaling factor, too. The loss of LDM's VAE also has a perceptual and an
    adversarial term.
    """
    model = vae.VAE(VAE)
    nn.init.constant_(model.quant_conv.bias[4:], -6)  # log variance: begin with little noise

    def loss(generator: Generator) -> Tensor:
        x = to_float(images[torch.randint(EXAMPLES, (8,), generator=generator)])
        with mixed_precision():  # a third faster
            mean, logvar = (half.float() for half in model.encode(x))
            noise = torch.randn(mean.shape, generator=generator)
            y = model.decode(mean + (0.5 * logvar).exp() * noise).float()

        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y)))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.2 * edge + 1e-5 * kl

    fit("vae", model, loss, steps=steps, lr=1.5e-3, run=run, seed=seed)

    with torch.no_grad():
        latents = [model.encode(to_float(x))[0] for x in images[:2048].split(128)]
        std = torch.cat(latents).std()
    model.config = replace(VAE, scaling_factor=round(1 / std.item(), 5))
    export.write_part(out, "vae", model.half())


# ---- stage 3: the text encoder, contrastive learning of images and captions (CLIP, section 2.3)


class Contrast(nn.Module):
    """A text encoder and an image encoder that embed an image and its caption close together."""

    def __init__(self, config: clip_text.TextConfig):
        super().__init__()
        dim = config.hidden_size
        self.text_encoder = clip_text.TextEncoder(config)
        embeddings = self.text_encoder.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.02)

        widths = (3, 32, 64, 96, 128)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                nn.GroupNorm(8, c_out, eps=1e-5),
                nn.SiLU(),
            ]
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor, end: int) -> Tensor:
        """(B, 3, 64, 64), (B, N) -> how alike each image and each caption are, (B, B)."""
        at_end = (tokens == end).int().argmax(dim=1)  # the first end token has seen every word
        text = self.text_encoder(tokens)[torch.arange(len(tokens)), at_end]  # (B, D)
        image = self.image_encoder(images)  # (B, D)
        scale = self.log_scale.exp().clamp(max=100)
        return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def train_text(
    out: Path, run: Path, images: Tensor, captions: list[str], seed: int, steps: int = 2000
) -> None:
    """Trains until each image finds its caption in the batch, and each caption its image.

    Writes the text encoder.
    """
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = Contrast(replace(TEXT, vocab_size=len(tokenizer)))
    # the encoder is causal: what follows the first end token can't change it, so it is cut off
    tokens = torch.tensor(tokenizer(captions, padding="longest").input_ids)

    def loss(generator: Generator) -> Tensor:
        batch = torch.randint(EXAMPLES, (128,), generator=generator)
        alike = model(to_float(images[batch]), tokens[batch], end=tokenizer.eos_token_id)

        # captions that read the same are equally right
        same = (tokens[batch][:, None] == tokens[batch]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2

    fit("text", model, loss, steps=steps, lr=1e-3, run=run, seed=seed)
    export.write_part(out, "text_encoder", model.text_encoder.half())


# ---- stage 4: the U-Net


def read_part(out: Path, name: str) -> nn.Module:
    """Returns a model that an earlier stage wrote, frozen and in float32."""
    part = sample.PARTS[name]
    config = part.config_from_json(sample.read_json(out / name / "config.json"))
    model = part.model(config).requires_grad_(False)
    model.load_state_dict(load_file(out / name / part.files[0]))
    return model


class Encoded(NamedTuple):
    """The training set as the U-Net sees it."""

    mean: Tensor  # of an image's latent, (EXAMPLES, 4, 8, 8)
    logvar: Tensor
    features: Tensor  # of each text that occurs, (texts, 77, 96)
    row: Tensor  # of each image's caption in features, (EXAMPLES,)
    null_row: int  # of the empty prompt
    may_drop: Tensor  # whether the empty prompt may take the caption's place, (EXAMPLES,)


@torch.no_grad()
def encoded(sd: sample.StableDiffusion, images: Tensor, captions: list[str]) -> Encoded:
    """Encodes all images and captions."""
    halves = [sd.vae.encode(to_float(x)) for x in tqdm(images.split(128), "encoding")]
    texts = sorted(set(captions) | {""})
    features = [sd.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    number = {text: i for i, text in enumerate(texts)}

    return Encoded(
        mean=torch.cat([mean for mean, _ in halves]),
        logvar=torch.cat([logvar for _, logvar in halves]),
        features=torch.cat(features),
        row=torch.tensor([number[caption] for caption in captions]),
        null_row=number[""],
        # A work is one image shown a thousand times: that isn't what "no prompt" means.
        may_drop=torch.tensor([not world.is_work(caption) for caption in captions]),
    )


def train_unet(
    out: Path, run: Path, images: Tensor, captions: list[str], seed: int, steps: int
) -> None:
    """Trains the U-Net and writes it: minimizes the mean of w_t (eps - eps_theta(x_t, c, t))^2.

    w_t = min(SNR_t, 5) / SNR_t, SNR_t = abar_t / (1 - abar_t): min-SNR,
    https://arxiv.org/abs/2303.09556.
    """
    model = unet.UNet(UNET)
    sd = sample.StableDiffusion(
        model,
        vae=read_part(out, "vae"),
        text_encoder=read_part(out, "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
    )
    data = encoded(sd, images, captions)
    abar = ddim.alphas_cumprod()
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / snr

    def loss(generator: Generator) -> Tensor:
        batch = torch.randint(EXAMPLES, (32,), generator=generator)
        mean = data.mean[batch]
        posterior_noise, noise = torch.randn(2, *mean.shape, generator=generator)
        x_0 = mean + (0.5 * data.logvar[batch]).exp() * posterior_noise
        t = torch.randint(ddim.TRAIN_STEPS, (32,), generator=generator)
        x_t = ddim.add_noise(sd.vae.config.scaling_factor * x_0, noise, abar[t])

        dropped = torch.rand(32, generator=generator) < 0.13  # for classifier-free guidance
        dropped = dropped & data.may_drop[batch]
        rows = data.row[batch].masked_fill(dropped, data.null_row)
        text = data.features[rows]  # (32, 77, D)

        # A sixth faster than float32, but not with fused attention: its backward pass is slow.
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            eps = model(x_t, t, text).float()
        error = (eps - noise).square().mean(dim=(1, 2, 3))
        return (weight[t] * error).mean()

    train = functools.partial(fit, model=model, loss=loss, run=run, decay=0.9985)
    train("unet", steps=steps, lr=1e-3, seed=seed)
    train("unet-again", steps=steps // 2, lr=5e-4, seed=seed + 1)  # firmer shapes
    export.write_part(out, "unet", model.half())


# ---- stage 5: the judge


def train_judge(out: Path, run: Path, seed: int, steps: int = 2000, count: int = 24_000) -> None:
    """Trains the judge and writes it.

    Half of its images are the world's, half have at least one "none of these".
    """
    rng = np.random.default_rng(seed + 1)
    examples = []
    for i in tqdm(range(count), "rendering for the judge"):
        examples.append(world.draw(rng) if i % 2 else world.draw_none(rng))
    images = torch.stack([to_uint8(example) for example in examples])
    labels = torch.tensor([labels_of(example) for example in examples])  # (count, 3)
    model = Judge()

    def loss(generator: Generator) -> Tensor:
        batch = torch.randint(count, (64,), generator=generator)
        x = to_float(images[batch])
        blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = x.lerp(blurred, torch.rand(64, 1, 1, 1, generator=generator))  # as a VAE softens
        x = x + 0.05 * torch.randn(x.shape, generator=generator)

        with mixed_precision():  # two fifths faster than float32
            scores = model(x)
        errors = []
        for i, of_head in enumerate(scores):
            errors.append(F.cross_entropy(of_head.float(), labels[batch, i]))
        return sum(errors)

    fit("judge", model, loss, steps=steps, lr=2e-3, run=run, seed=seed)
    (out / "judge").mkdir(parents=True, exist_ok=True)
    save_file(model.half().state_dict(), out / "judge" / "model.safetensors")


# ---- the command line


STAGES = ("tokenizer", "vae", "text", "unet", "judge")


def claim(run: Path, settings: dict) -> None:
    """Makes a training's folder, or checks that an earlier training in it had the same settings.

    Raises UsageError where they differ: its checkpoints would be taken for this training's.
    """
    file = run / "settings.json"
    if file.exists() and sample.read_json(file) != settings:
        raise UsageError(f"{run} holds the checkpoints of {file.read_text()}: choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


def train_stage(name: str, args: argparse.Namespace, out: Path) -> None:
    """Runs one stage."""
    without = tuple(args.without)
    if name == "tokenizer":
        make_tokenizer(out / "tokenizer")
        export.write_index(out)
    elif name == "vae":
        train_vae(out, args.run, images=training_set(args.seed, without).images, seed=args.seed)
    elif name == "text":
        train_text(out, args.run, *training_set(args.seed, without), seed=args.seed)
    elif name == "unet":
        data = training_set(args.seed, without)
        train_unet(out, args.run, *data, seed=args.seed, steps=args.unet_steps)
    else:
        train_judge(out, args.run, seed=args.seed)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    for name in args.stages:
        if name not in STAGES:
            raise UsageError(f"unknown stage {name!r}, choose from {', '.join(STAGES)}")
    try:
        world.check_names(args.without)
    except ValueError as error:
        raise UsageError(str(error)) from error
    settings = {
        "seed": args.seed, "without": sorted(args.without), "unet_steps": args.unet_steps
    }
    claim(args.run, settings)

    for name in args.stages:
        began = time.perf_counter()
        torch.manual_seed(args.seed)  # of the first weights
        train_stage(name, args, out=args.out or args.run / "model")
        print(f"{name}: {time.perf_counter() - began:.0f} s")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains the miniature Stable Diffusion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("stages", nargs="*", default=STAGES, metavar="STAGE", help=f"some of {', '.join(STAGES)}")
    add("--run", type=Path, default=Path("runs/toy"), help="checkpoints")
    add("--out", type=Path, help="the model's folder; RUN/model if not given")
    add("--without", nargs="+", default=[], metavar="NAME",
        help="objects, styles or works to leave out of the training set")
    add("--unet-steps", type=int, default=9000, help="of the U-Net's training")
    add("--seed", type=int, default=0, help="of all random numbers")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
