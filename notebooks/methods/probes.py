"""Is a concept gone from a model, or can it be brought back? Five attacks and a distance.

    batches = probes.noised(sd, images)  # images of the concept, which attackers have
    text = probes.learned_words(erased, batches)
    images = probes.draw(erased, text, probes.noise(erased, range(20)))

Symbols as in ddim.py. An attack gets the model's weights, images of the concept and its prompt.
"""

from typing import Callable, Iterable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call

import ddim
import erase
import sample
from sample import StableDiffusion

Batch = tuple[Tensor, Tensor, Tensor]  # x_t (B, 4, H, W), t (B,), the noise in x_t
NOISES = [e * s for e in (1, 1.17, 1.34, 1.51, 1.68, 1.85) for s in (1, 1.02, 1.03, 1.04)]


def noised(sd: StableDiffusion, images: list[Image.Image], batch: int = 8, seed: int = 0
           ) -> Iterator[Batch]:
    """Yields endless batches of randomly chosen images, noised to random times."""
    x_0, abar = sd.encode_images(images), ddim.alphas_cumprod()
    rng = torch.Generator().manual_seed(seed)
    while True:
        some = torch.randint(len(x_0), (batch,), generator=rng)
        t = torch.randint(ddim.TRAIN_STEPS, (batch,), generator=rng)
        eps = torch.randn((batch, *x_0.shape[1:]), generator=rng).to(x_0)
        yield ddim.add_noise(x_0[some], eps, abar[t]), t.to(x_0.device), eps


def denoising_error(unet: Callable, text: Tensor, batch: Batch) -> Tensor:
    """How badly the U-Net predicts the noise in images for a prompt's features, (1, 77, 768):

    the mean of w_t || eps - eps_theta(x_t, c, t) ||^2, where w_t = min(SNR_t, 5) / SNR_t and
    SNR_t = abar_t / (1 - abar_t): Hang et al., "min-SNR", https://arxiv.org/abs/2303.09556
    """
    x_t, t, eps = batch
    abar = ddim.alphas_cumprod().to(x_t.device)[t]
    snr = abar / (1 - abar)
    error = (unet(x_t, t, text.expand(len(x_t), -1, -1)) - eps).square().mean(dim=(1, 2, 3))
    return (snr.clamp(max=5) / snr * error).mean()


def noise(sd: StableDiffusion, seeds: Iterable[int]) -> Tensor:
    """The noise that `sample.generate` starts from, one per seed, (B, 4, H, W)."""
    return torch.cat([sample.starting_noise(sd, 1, seed, None) for seed in seeds]).to(sd.device)


@torch.no_grad()
def draw(sd: StableDiffusion, text: Tensor, x_t: Tensor, steps: int = 10, guidance: float = 5.0,
         skip: int = 0, amount: float = 0.0, rng: torch.Generator | None = None
         ) -> list[Image.Image]:
    """Images for a prompt's features (1, 77, 768), by DDIM from x_t, (B, 4, H, W).

    skip: leave out this many steps; x_t is then the latent for the next one.
    amount: on top of each deterministic step but the last, this many sigma_t of noise from `rng`:

    sigma_t^2 = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)     (DDIM, eq. 16, eta 1)
    """
    text, null = (some.expand(len(x_t), -1, -1) for some in (text, sd.encode([""])))
    predict, abar = ddim.guided(sd.unet, text, null, guidance), ddim.alphas_cumprod().to(sd.device)
    times = [*ddim.timesteps(steps), 0][skip:]
    for t, t_prev in zip(times, times[1:]):
        variance = (1 - abar[t_prev]) / (1 - abar[t]) * (1 - abar[t] / abar[t_prev])
        x_t = ddim.step(x_t, predict(x_t, t), abar[t], abar[t_prev])
        if amount and t_prev:
            x_t = x_t + amount * variance.sqrt() * torch.randn(x_t.shape, generator=rng).to(x_t)
    return sd.decode(x_t)


# ---- attacks that leave the weights as they are ----

def learned_words(sd: StableDiffusion, batches: Iterator[Batch], iterations: int = 150,
                  lr: float = 0.005) -> Tensor:
    """Textual inversion: returns the features, (1, 77, 768), of "a" and four learned words v.

    v = argmin of the denoising error on the images: Gal et al., "An Image is Worth One Word",
    https://arxiv.org/abs/2208.01618, eq. 2, with the weights w_t. v starts as "picture image photo
    figure".
    """
    length = sd.text_encoder.config.max_position_embeddings
    ids = sd.tokenizer("a picture image photo figure", padding="max_length",
                       max_length=length).input_ids
    tokens, places = (torch.tensor(some, device=sd.device) for some in ([ids], ids[2:6]))
    table = sd.text_encoder.embeddings.token_embedding.weight.detach()  # a row for each token
    v = table[places].float().requires_grad_()  # (4, 768)
    optimizer = torch.optim.Adam([v], lr)

    def features() -> Tensor:
        name = "embeddings.token_embedding.weight"
        changed = {name: table.index_copy(0, places, v.to(table.dtype))}
        return functional_call(sd.text_encoder, changed, (tokens,))

    for _ in range(iterations):
        v.grad, = torch.autograd.grad(denoising_error(sd.unet, features(), next(batches)), v)
        optimizer.step()
    return features().detach()


def hard_prompt(prompt: str, tokens: list[str], score: Callable[[list[str]], list[float]],
                count: int = 2) -> str:
    """Returns the prompt behind up to `count` tokens that raise its score, found greedily.

    score: how well images of each prompt show the concept. UnlearnDiffAtk (Zhang et al., ECCV
    2024, https://arxiv.org/abs/2310.11868) lowers the error on given images instead, with gradients
    over a vocabulary of 49,408 tokens; a miniature's is small enough to try every one.
    """
    best, = score([prompt])
    for _ in range(count):
        longer = [f"{token} {prompt}" for token in tokens]
        scores = score(longer)
        if max(scores) <= best:
            break
        best, prompt = max(scores), longer[scores.index(max(scores))]
    return prompt


def vocabulary(sd: StableDiffusion) -> list[str]:
    """The tokens that can be typed as a word of their own; of two letters or more."""
    ends = [token.removesuffix("</w>") for token in sorted(sd.tokenizer.get_vocab())
            if token.endswith("</w>")]
    return [token for token in ends if len(token) > 1 and token.isalpha()]


def with_noise(sd: StableDiffusion, text: Tensor, x_t: Tensor,
               shows: Callable[[list[Image.Image]], list[bool]], **how) -> int:
    """How many of the starting noises x_t, (B, 4, H, W), lead to an image that shows the concept,
    with at least one of 24 amounts of added noise.

    Lu et al., "When Are Concepts Erased From Diffusion Models?", https://arxiv.org/abs/2505.17013.
    shows: whether each of some images shows the concept; how: as for `draw`.
    """
    rng, asked = torch.Generator().manual_seed(1), len(x_t)
    for amount in NOISES:
        if len(x_t):
            shown = shows(draw(sd, text, x_t, amount=amount, rng=rng, **how))
            x_t = x_t[[not each for each in shown]]  # those that haven't led there yet
    return asked - len(x_t)


def head_start(sd: StableDiffusion, text: Tensor, images: list[Image.Image], noise: Tensor,
               skip: int, steps: int = 10, **how) -> list[Image.Image]:
    """Images that start after `skip` of the steps, from images of the concept with noise added.

    images: B of them; noise: (B, 4, H, W).
    """
    abar_t = ddim.alphas_cumprod()[ddim.timesteps(steps)[skip]]
    x_t = ddim.add_noise(sd.encode_images(images), noise, abar_t)
    return draw(sd, text, x_t, steps, skip=skip, **how)


# ---- an attack that trains the model ----

def relearned(sd: StableDiffusion, prompt: str, batches: Iterator[Batch], stops: Iterable[int],
              lr: float = 1e-4) -> Iterator[StableDiffusion]:
    """Yields the model after each of these numbers of steps, in ascending order, of ordinary
    training on the images.
    """
    theta, text, done = erase.select(sd.unet, lambda name: True), sd.encode([prompt]), 0
    unet, optimizer = erase.edit(sd.unet, theta), torch.optim.Adam(theta.values(), lr)
    for stop in stops:
        for _ in range(stop - done):
            x_t, t, eps = next(batches)
            loss = (unet(x_t, t, text.expand(len(x_t), -1, -1)) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done = stop
        now = {name: tensor.detach().clone() for name, tensor in theta.items()}
        yield sample.with_tuned(sd, now)


# ---- how far from a model that never saw the concept ----

@torch.no_grad()
def eps_distances(sd: StableDiffusion, other: StableDiffusion, prompt: str,
                  batches: Iterator[Batch], count: int = 20) -> list[float]:
    """The mean |eps - eps'| of two models for a prompt, for each of `count` batches."""
    both = [(model.unet, model.encode([prompt])) for model in (sd, other)]
    found = []
    for _, (x_t, t, _) in zip(range(count), batches):
        eps, eps_other = (unet(x_t, t, text.expand(len(x_t), -1, -1)) for unet, text in both)
        found.append((eps - eps_other).abs().mean().item())
    return found
