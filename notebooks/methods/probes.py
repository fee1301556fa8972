"""Is a concept gone from a model, or can it be brought back? Five attacks.

    batches = probes.noised_images(sd, images)  # of the concept
    text = probes.learned_words(erased, batches)
    images = probes.draw(erased, text, probes.noise(erased, range(20)))

Symbols as in ddim.py. learned_words, head_start and relearned take images of the concept;
hard_prompt and with_noise take a judge of images.
"""

from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.func import functional_call

import ddim
import erase
import sample
from sample import StableDiffusion

NOISES = [  # Lu et al. have six values of DDIM's eta, and four scales; here one factor
    coarse * fine
    for coarse in (1, 1.17, 1.34, 1.51, 1.68, 1.85)
    for fine in (1, 1.02, 1.03, 1.04)
]


# ---- images, noised; and drawing


class NoisedImages(NamedTuple):
    """A batch of images with noise added, and the noise."""

    x_t: Tensor  # (B, 4, H, W)
    t: Tensor  # (B,)
    eps: Tensor  # (B, 4, H, W)


def noised_images(
    sd: StableDiffusion, images: list[Image.Image], batch: int = 8, seed: int = 0
) -> Iterator[NoisedImages]:
    """Yields batches without end, of randomly chosen images, noised to random times."""
    x_0 = sd.encode_images(images)
    abar = ddim.alphas_cumprod()
    rng = Generator().manual_seed(seed)

    while True:
        chosen = torch.randint(len(x_0), (batch,), generator=rng)
        t = torch.randint(ddim.TRAIN_STEPS, (batch,), generator=rng)
        eps = torch.randn((batch, *x_0.shape[1:]), generator=rng).to(x_0)

        x_t = ddim.add_noise(x_0[chosen], eps, abar[t])
        yield NoisedImages(x_t, t.to(x_t.device), eps)


def denoising_error(unet: Callable, text: Tensor, batch: NoisedImages) -> Tensor:
    """Returns how badly the U-Net predicts the noise in images, a number.

    The mean, over samples and elements, of w_t (eps - eps_theta(x_t, c, t))^2, where
    w_t = min(SNR_t, 5) / SNR_t and SNR_t = abar_t / (1 - abar_t): Hang et al., "min-SNR",
    https://arxiv.org/abs/2303.09556. text: a prompt's features, (1, 77, 768).
    """
    x_t, t, eps = batch
    abar_t = ddim.alphas_cumprod(x_t.device)[t]
    snr = abar_t / (1 - abar_t)
    weight = snr.clamp(max=5) / snr

    predicted = unet(x_t, t, text.expand(len(x_t), -1, -1))
    error = (predicted - eps).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


def noise(sd: StableDiffusion, seeds: Iterable[int]) -> Tensor:
    """Returns the noise that `sample.generate` starts from, one per seed, (B, 4, H, W)."""
    noises = [sample.starting_noise(sd.latent_shape, 1, seed) for seed in seeds]
    return torch.cat(noises).to(sd.device)


def sigma(abar_t: Tensor, abar_prev: Tensor) -> Tensor:
    """Returns how much noise a DDPM step adds (DDIM, eq. 16, with its eta 1):

    sigma_t^2 = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    """
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    return variance.sqrt()


@torch.no_grad()
def draw(
    sd: StableDiffusion, text: Tensor, x_t: Tensor,
    steps: int = 10, guidance: float = 5.0, skip: int = 0,
    amount: float = 0.0, rng: Generator | None = None,
) -> list[Image.Image]:
    """Returns B images for a prompt's features, (1, 77, 768), by DDIM from x_t.

    x_t: the noise, (B, 4, H, W).
    skip: leave out this many steps; x_t is then the latent for the next one.
    amount: after each step but the last, add this many sigma_t of noise, from rng. (The step
    itself stays DDIM's without noise, so x_t is noisier than its t says.)
    """
    text = text.expand(len(x_t), -1, -1)
    null = sd.encode([""]).expand_as(text)
    predict = ddim.guided_predictor(sd.unet, text, null=null, guidance=guidance)
    abar = ddim.alphas_cumprod(sd.device)
    times = torch.tensor([*ddim.timesteps(steps), 0], device=sd.device)[skip:]

    for t, t_prev in zip(times, times[1:]):
        x_t = ddim.step(x_t, predict(x_t, t), abar_t=abar[t], abar_prev=abar[t_prev])
        if amount and t_prev > 0:
            fresh = torch.randn(x_t.shape, generator=rng).to(x_t)
            x_t = x_t + amount * sigma(abar[t], abar[t_prev]) * fresh
    return sd.decode(x_t)


# ---- attacks that leave the weights as they are


def learned_words(
    sd: StableDiffusion, batches: Iterator[NoisedImages],
    iterations: int = 150, lr: float = 0.005,
) -> Tensor:
    """Textual inversion: returns the features, (1, 77, 768), of "a" and four words v.

    v = argmin of the denoising error on the images: Gal et al., "An Image is Worth One
    Word", https://arxiv.org/abs/2208.01618, eq. 2, with the weights w_t. v starts as
    "picture image photo figure".
    """
    length = sd.text_encoder.config.max_position_embeddings
    ids = sd.tokenizer(
        "a picture image photo figure", padding="max_length", max_length=length
    ).input_ids
    tokens = torch.tensor([ids], device=sd.device)  # (1, 77)
    words = tokens[0, 2:6]  # after the start and "a"

    table = sd.text_encoder.embeddings.token_embedding.weight.detach()  # one row per token
    v = table[words].float().requires_grad_()  # (4, 768)
    optimizer = torch.optim.Adam([v], lr)

    def features() -> Tensor:
        with_v = table.index_copy(0, words, v.to(table.dtype))
        weights = {"embeddings.token_embedding.weight": with_v}
        return functional_call(sd.text_encoder, weights, (tokens,))

    for _ in range(iterations):
        error = denoising_error(sd.unet, features(), next(batches))
        (gradient,) = torch.autograd.grad(erase.SCALE * error, v)
        v.grad = gradient / erase.SCALE
        optimizer.step()
    return features().detach()


def hard_prompt(
    prompt: str, tokens: list[str], score: Callable[[list[str]], list[float]],
    count: int = 2,
) -> str:
    """Returns the prompt preceded by up to `count` tokens that raise its score, found greedily.

    score: how well images of each prompt show the concept. UnlearnDiffAtk (Zhang et al.,
    ECCV 2024, https://arxiv.org/abs/2310.11868) lowers the error on given images instead,
    with gradients over a vocabulary of 49,408 tokens; a miniature's is small enough to
    try every one.
    """
    (best,) = score([prompt])
    for _ in range(count):
        candidates = [f"{token} {prompt}" for token in tokens]
        scores = score(candidates)
        if max(scores) <= best:
            break
        best = max(scores)
        prompt = candidates[scores.index(best)]
    return prompt


def vocabulary(sd: StableDiffusion) -> list[str]:
    """Returns the tokens that can be typed as a word of their own, of two letters or more."""
    words = []
    for token in sorted(sd.tokenizer.get_vocab()):
        word = token.removesuffix("</w>")  # the end of a word
        if word != token and len(word) > 1 and word.isalpha():
            words.append(word)
    return words


def with_noise(
    sd: StableDiffusion, text: Tensor, x_t: Tensor,
    shows: Callable[[list[Image.Image]], list[bool]], amounts: Iterable[float] = NOISES,
    steps: int = 10, guidance: float = 5.0,
) -> list[bool]:
    """Returns which starting noises lead to the concept with added noise.

    x_t: the starting noises, (B, 4, H, W); one does if any of the amounts of added noise
    leads to an image of the concept. shows: whether each of some images shows it.
    Lu et al., "When Are Concepts Erased From Diffusion Models?",
    https://arxiv.org/abs/2505.17013.
    """
    rng = Generator().manual_seed(1)
    left = [*range(len(x_t))]  # those that haven't led there yet
    for amount in amounts:
        if left:
            images = draw(
                sd, text, x_t[left],
                steps=steps, guidance=guidance, amount=amount, rng=rng,
            )
            left = [i for i, is_shown in zip(left, shows(images)) if not is_shown]
    return [i not in left for i in range(len(x_t))]


def head_start(
    sd: StableDiffusion, text: Tensor, images: list[Image.Image], noise: Tensor,
    skip: int, steps: int = 10, guidance: float = 5.0,
) -> list[Image.Image]:
    """Returns images that start after `skip` steps, from noised images of the concept.

    images: B of them; noise: (B, 4, H, W).
    """
    abar_t = ddim.alphas_cumprod()[ddim.timesteps(steps)[skip]]
    x_t = ddim.add_noise(sd.encode_images(images), noise, abar_t)
    return draw(sd, text, x_t, steps=steps, guidance=guidance, skip=skip)


# ---- an attack that trains the model


def relearned(
    sd: StableDiffusion, prompt: str, batches: Iterator[NoisedImages],
    stops: Iterable[int], lr: float = 1e-4,
) -> Iterator[StableDiffusion]:
    """Trains all weights on the images and the prompt, as models are trained.

    Yields the model after each of these numbers of steps, in ascending order.
    """
    text = sd.encode([prompt])
    theta = erase.trainable_copies(sd.unet, lambda name: True)
    unet = erase.with_theta(sd.unet, theta)
    optimizer = torch.optim.Adam(theta.values(), lr)

    done = 0
    for stop in stops:
        for _ in range(stop - done):
            x_t, t, eps = next(batches)
            predicted = unet(x_t, t, text.expand(len(x_t), -1, -1))
            loss = (predicted - eps).square().mean()
            optimizer.zero_grad()
            (erase.SCALE * loss).backward()
            for W in theta.values():
                W.grad /= erase.SCALE
            optimizer.step()
        done = stop
        yield sample.with_weights(sd, theta)
