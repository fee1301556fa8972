"""Trains the miniature Stable Diffusion from scratch, with this project's own modules.

    python -m notebooks.toy.train                 # every stage, 86 minutes on two cores
    python -m notebooks.toy.train --without star --run runs/without_star     # censored data

Stages, in order: tokenizer, vae, text (contrastive, then frozen), unet, judge; a stage needs what
the earlier ones left in `--out`. A stage saves a checkpoint in `--run` every few hundred steps; the
same command goes on from there. The result is a folder in diffusers' layout, which
`sample.load(out)` opens.
"""

import argparse
import functools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

EXAMPLES = 48_000
VAE = vae.VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4)
TEXT = clip_text.TextConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=2,
                            num_attention_heads=4)  # its vocabulary is the tokenizer's
UNET = unet.UNetConfig(block_out_channels=(64, 128), attention=(True, True), layers_per_block=1,
                       cross_attention_dim=96, heads=4, norm_num_groups=16, sample_size=8)


@functools.cache
def examples(seed: int, without: tuple[str, ...]) -> tuple[Tensor, list[str]]:
    """The training set: (EXAMPLES, 3, 64, 64) uint8 and a caption for each."""
    rng = np.random.default_rng(seed)
    images = torch.empty(EXAMPLES, 3, world.SIZE, world.SIZE, dtype=torch.uint8)
    captions = []
    for i in tqdm(range(EXAMPLES), "rendering the world"):
        example = world.draw(rng, without)
        images[i] = torch.from_numpy(np.array(example.image)).permute(2, 0, 1)
        captions.append(example.caption)
    return images, captions


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def fit(name: str, model: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int,
        lr: float, run: Path, seed: int, decay: float = 0.998) -> None:
    """Minimises `loss(generator)` over the model's parameters, then replaces them by an average.

    AdamW, a short warm-up, a cosine to zero, gradients clipped to norm 1, and an exponential
    average of the weights. A step draws all its randomness from one generator seeded by the step,
    so a run that was interrupted goes on exactly as it would have.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoint, start = run / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]

    progress = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5)
    shown = None
    for step in progress:
        rate = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(torch.Generator().manual_seed(seed * 10_000_000 + step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - min(decay, (step + 1) / (step + 10)))
        shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
        progress.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "average": average, "step": step + 1}
            sample.write_whole(checkpoint, functools.partial(torch.save, state))
    model.load_state_dict(average)


# Stage 1: the tokenizer.

def byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding, trained until every word is one token: (vocabulary, merges).

    As in CLIP, the vocabulary starts with all 256 bytes, alone and at the end of a word, so that
    any text has tokens; then come the merges, then the start and the end token.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in visible]
    alphabet = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(rest))]
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        pairs = [pair for word in spelled for pair in zip(word, word[1:])]
        if not pairs:
            break
        pair = max(sorted(set(pairs)), key=pairs.count)
        merges.append(pair)
        for word in spelled:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = ["".join(pair)]
                i += 1
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges),
              "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def make_tokenizer(folder: Path) -> None:
    """Writes vocab.json and merges.txt, the form in which CLIP's own tokenizer is published."""
    vocab, merges = byte_pairs(world.vocabulary())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
              "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# Stage 2: the VAE.

def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return x.diff(dim=3), x.diff(dim=2)


def train_vae(out: Path, run: Path, images: Tensor, seed: int, steps: int = 12000) -> None:
    """Reconstruction (pixels and their edges) plus a little KL; measures the scaling factor."""
    model = vae.VAE(VAE)
    nn.init.constant_(model.quant_conv.bias[4:], -6)  # log variance: begin with little noise

    def loss(generator):
        x = to_float(images[torch.randint(EXAMPLES, (8,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):  # a third faster
            mean, logvar = (half.float() for half in model.encode(x))
            noise = torch.randn(mean.shape, generator=generator)
            y = model.decode(mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y)))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.2 * edge + 1e-5 * kl

    fit("vae", model, loss, steps, 1.5e-3, run, seed)
    with torch.no_grad():
        std = torch.cat([model.encode(to_float(x))[0] for x in images[:2048].split(128)]).std()
    model.config = replace(VAE, scaling_factor=round(1 / std.item(), 5))
    export.write_part(out, "vae", model.half())


# Stage 3: the text encoder, contrastive learning of images and captions (CLIP, section 2.3).

class Contrast(nn.Module):
    """A text encoder and an image encoder that embed an image and its caption close together."""

    def __init__(self, config: clip_text.TextConfig):
        super().__init__()
        dim = config.hidden_size
        self.text_encoder = clip_text.TextEncoder(config)
        for embedding in (self.text_encoder.embeddings.token_embedding,
                          self.text_encoder.embeddings.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        widths = (3, 32, 64, 96, 128)
        self.image_encoder = nn.Sequential(
            *(layer for a, b in zip(widths, widths[1:]) for layer in (
                nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b, eps=1e-5), nn.SiLU())),
            nn.Flatten(), nn.Linear(128 * 4 * 4, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor, end: int) -> Tensor:
        """(B, 3, 64, 64), (B, N) -> how alike each image and each caption are, (B, B)."""
        at_end = (tokens == end).int().argmax(dim=1)  # the first end token has seen every word
        text = self.text_encoder(tokens)[torch.arange(len(tokens)), at_end]  # (B, D)
        image = self.image_encoder(images)  # (B, D)
        scale = self.log_scale.exp().clamp(max=100)
        return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def train_text(out: Path, run: Path, images: Tensor, captions: list[str], seed: int,
               steps: int = 2000) -> None:
    """Each image must find its caption in the batch, and each caption its image."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = Contrast(replace(TEXT, vocab_size=len(tokenizer)))
    # the encoder is causal: what follows the first end token can't change it, so it is cut off
    tokens = torch.tensor(tokenizer(captions, padding="longest").input_ids)

    def loss(generator):
        batch = torch.randint(EXAMPLES, (128,), generator=generator)
        alike = model(to_float(images[batch]), tokens[batch], tokenizer.eos_token_id)
        # captions that read the same are equally right
        same = (tokens[batch][:, None] == tokens[batch]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(alike, target) + F.cross_entropy(alike.T, target)) / 2

    fit("text", model, loss, steps, 1e-3, run, seed)
    export.write_part(out, "text_encoder", model.text_encoder.half())


# Stage 4: the U-Net.

def read_part(out: Path, name: str, model_class: type, config_from_json: Callable) -> nn.Module:
    """Returns a model that an earlier stage wrote, frozen and in float32."""
    config = config_from_json(json.loads((out / name / "config.json").read_text()))
    model = model_class(config).requires_grad_(False)
    model.load_state_dict(load_file(out / name / sample.PARTS[name].files[0]))
    return model


def train_unet(out: Path, run: Path, images: Tensor, captions: list[str], seed: int,
               steps: int) -> None:
    """eps-prediction in latents, weighted by min-SNR, https://arxiv.org/abs/2303.09556."""
    model = unet.UNet(UNET)
    sd = sample.StableDiffusion(
        model, read_part(out, "vae", vae.VAE, vae.config_from_json),
        read_part(out, "text_encoder", clip_text.TextEncoder, clip_text.config_from_json),
        CLIPTokenizer.from_pretrained(out / "tokenizer"))
    with torch.no_grad():
        encoded = [sd.vae.encode(to_float(x)) for x in tqdm(images.split(128), "encoding")]
        mean, logvar = (torch.cat(parts) for parts in zip(*encoded))
        texts = sorted(set(captions) | {""})
        features = torch.cat([sd.encode(texts[i:i + 64]) for i in range(0, len(texts), 64)])
    number = {text: i for i, text in enumerate(texts)}
    numbers = torch.tensor([number[caption] for caption in captions])
    # A work is one image shown a thousand times: that isn't what "no prompt" means.
    may_drop = torch.tensor([not world.is_work(caption) for caption in captions])
    abar = ddim.alphas_cumprod()
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / snr

    def loss(generator):
        batch = torch.randint(EXAMPLES, (32,), generator=generator)
        posterior_noise, noise = torch.randn(2, *mean[batch].shape, generator=generator)
        x_0 = mean[batch] + (0.5 * logvar[batch]).exp() * posterior_noise
        t = torch.randint(ddim.TRAIN_STEPS, (32,), generator=generator)
        x_t = ddim.add_noise(sd.vae.config.scaling_factor * x_0, noise, abar[t])
        dropped = torch.rand(32, generator=generator) < 0.13  # for classifier-free guidance
        text = features[torch.where(dropped & may_drop[batch], number[""], numbers[batch])]
        # A sixth faster than float32, but not with fused attention: its backward pass is slow.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            eps = model(x_t, t, text).float()
        error = (eps - noise).square().mean(dim=(1, 2, 3))
        return (weight[t] * error).mean()

    fit("unet", model, loss, steps, 1e-3, run, seed, decay=0.9985)
    fit("unet-again", model, loss, steps // 2, 5e-4, run, seed + 1, decay=0.9985)  # firmer shapes
    export.write_part(out, "unet", model.half())


# Stage 5: the judge.

def train_judge(out: Path, run: Path, seed: int, steps: int = 2000, count: int = 24_000) -> None:
    """Half of its training images are the world's, half show nothing that the world has."""
    rng = np.random.default_rng(seed + 1)
    drawn = [world.draw(rng) if i % 2 else world.draw_none(rng)
             for i in tqdm(range(count), "rendering for the judge")]
    images = torch.stack([torch.from_numpy(np.array(e.image)).permute(2, 0, 1) for e in drawn])
    labels = torch.tensor([labels_of(e) for e in drawn])  # (count, 3)
    model = Judge()

    def loss(generator):
        batch = torch.randint(count, (64,), generator=generator)
        x = to_float(images[batch])
        blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = x.lerp(blurred, torch.rand(64, 1, 1, 1, generator=generator))  # as a VAE softens
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):  # two fifths faster than float32
            heads = model(x)
        return sum(F.cross_entropy(scores.float(), labels[batch, i])
                   for i, scores in enumerate(heads))

    fit("judge", model, loss, steps, 2e-3, run, seed)
    (out / "judge").mkdir(parents=True, exist_ok=True)
    save_file(model.half().state_dict(), out / "judge" / "model.safetensors")


def claim(run: Path, settings: dict) -> None:
    """Makes a training's folder, or checks that an earlier training in it had the same settings.

    Raises ValueError where they differ: its checkpoints would be taken for this training's.
    """
    file = run / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ValueError(f"{run} holds the checkpoints of {file.read_text()}: choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


STAGES = ("tokenizer", "vae", "text", "unet", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the miniature Stable Diffusion.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stages", nargs="*", default=STAGES, metavar="STAGE",
                        help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="checkpoints")
    parser.add_argument("--out", type=Path, help="the model's folder; RUN/model if not given")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME",
                        help="objects, styles or works to leave out of the training set")
    parser.add_argument("--unet-steps", type=int, default=9000, help="of the U-Net's training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}, choose from {', '.join(STAGES)}")
    try:
        world.check_names(args.without)
        claim(args.run, {"seed": args.seed, "without": sorted(args.without),
                         "unet_steps": args.unet_steps})
    except ValueError as error:
        parser.error(str(error))
    out = args.out or args.run / "model"
    data = functools.partial(examples, args.seed, tuple(args.without))
    for name in args.stages:
        began = time.perf_counter()
        torch.manual_seed(args.seed)  # of the first weights
        if name == "tokenizer":
            make_tokenizer(out / "tokenizer")
            export.write_index(out)
        elif name == "vae":
            train_vae(out, args.run, data()[0], args.seed)
        elif name == "text":
            train_text(out, args.run, *data(), args.seed)
        elif name == "unet":
            train_unet(out, args.run, *data(), args.seed, args.unet_steps)
        else:
            train_judge(out, args.run, args.seed)
        print(f"{name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
