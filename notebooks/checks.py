"""The exercises: what each asks of a student's function, the right answer, and likely mistakes.

    print(checks.add_noise(my_add_noise))     # "right", or what is wrong
"""

import functools
import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import ddim
import erase
import unet
from notebooks.toy import tables

NOT_YET = "not yet: write it first"


class NotYet(Exception):
    """The function is still the stub."""


class Exercise(NamedTuple):
    """A function to be written. Its results are compared, as tensors, with the solution's."""

    number: str
    ask: Callable[[Callable, int], list]  # calls a function on inputs drawn from a seed
    solution: Callable
    mistakes: dict[str, Callable]  # what is wrong -> a function that does just this
    otherwise: str  # what to say of any other answer
    forbidden: tuple[str, ...] = ()  # the project's functions that would be the answer

    def __call__(self, answer: Callable, seed: int = 0) -> str:
        """Says "right" or what is wrong with a student's function."""
        try:
            results = self.ask(answer, seed)
        except NotYet:
            return NOT_YET
        except Exception as error:  # a student's code can raise anything
            return f"wrong: it raises {type(error).__name__}: {error}"

        return self.verdict(results, seed)

    def verdict(self, results: list, seed: int) -> str:
        """Says the same of results that a student's function has returned before."""
        expected = self.ask(self.solution, seed)
        if alike(results, expected):
            return "right"
        if shapes(results) != shapes(expected):
            return f"wrong: its results have the shapes {shapes(results)} instead of " \
                   f"{shapes(expected)}"

        # A mistake has to explain the results up to the first wrong one.
        end = 1
        while alike(results[:end], expected[:end]):
            end += 1
        for what, mistake in self.mistakes.items():
            if alike(results[:end], self.ask(mistake, seed)[:end]):
                return f"wrong: {what}"
        return f"wrong: {self.otherwise}"


def shapes(results: list) -> list[list[int]]:
    """Returns the shape of each result."""
    return [[*torch.as_tensor(result).shape] for result in results]


def alike(results: list, expected: list) -> bool:
    """Whether all tensors have the same shapes and values."""
    if shapes(results) != shapes(expected):
        return False

    for result, right in zip(results, expected):
        result = torch.as_tensor(result).double()
        right = torch.as_tensor(right).double()
        if not torch.allclose(result, right, atol=1e-5, rtol=1e-4):
            return False
    return True


def call(answer: Callable, *arguments) -> object:
    """Returns the function's result. Raises NotYet for the stub's."""
    result = answer(*arguments)
    if result is None or result is ...:
        raise NotYet
    return result


def noise(seed: int, *shape: int) -> Tensor:
    """Returns standard normal numbers in float64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


# ---- 1.2: DDIM


def ask_denoise(answer: Callable, seed: int) -> list:
    """Returns the times at which it calls the model, -1 for a missing one, and its result."""
    steps = 10 + seed
    times = []

    def predict(x_t, t):
        times.append(t)
        return 0.3 * x_t + t / 1000

    result = call(answer, predict, noise(seed, 1, 4, 2, 2), steps)
    padded = times + [-1] * steps
    return [torch.tensor(padded[:steps]), result]


def sampler(first: int = 1, root: bool = True, end: int = 0) -> Callable:
    """Returns DDIM, or DDIM with a mistake.

    first: the last step's time; root: of the noise's share; end: where the last step ends.
    """

    def denoise(predict, x_t, steps):
        abar = ddim.alphas_cumprod()
        stride = ddim.TRAIN_STEPS // steps
        for k in reversed(range(steps)):
            t = k * stride + first
            t_prev = t - stride if k else end

            eps = predict(x_t, t)
            share = (1 - abar[t]).sqrt() if root else 1 - abar[t]
            x_0 = (x_t - share * eps) / abar[t].sqrt()
            x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * eps
        return x_t

    return denoise


denoise = Exercise(
    "1.2",
    ask_denoise,
    solution=sampler(),
    mistakes={
        "the times of Stable Diffusion's ten steps are 901, 801, ..., 1, not 900, 800, ..., 0":
            sampler(first=0),
        "the times are right, but the share of the noise in x_t isn't 1 - abar: see eq. 4":
            sampler(root=False),
        "the last step should end at abar[0], not at t = 1": sampler(end=1),
        "the last step should end at abar[0]; abar[-1] is the noisiest": sampler(end=-1),
    },
    otherwise="the times or the values differ: look at each line of a step again",
    forbidden=("ddim.denoise", "ddim.step", "ddim.x_0"),
)


# ---- 2.2: the loop


def ask_iteration(answer: Callable, seed: int) -> list:
    """Returns the loss of one iteration with a U-Net of two weights, and the weights after it."""
    weights = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    weights.grad = torch.ones_like(weights)  # of an iteration before
    optimizer = torch.optim.SGD([weights], lr=0.1)

    def frozen(x_t, t, c):
        return 0.8 * x_t + (0.3 - t / 2000) * c.mean(dim=(1, 2))[:, None, None, None]

    def edited(x_t, t, c):
        return weights[0] * x_t + weights[1] * (c.mean(dim=(1, 2)) - t / 900)[:, None, None, None]

    c = noise(seed + 1, 2, 77, 8) + 1
    null = noise(seed + 2, 2, 77, 8)
    loss = call(answer, edited, frozen, optimizer, c, null, noise(seed, 2, 4, 3, 3), 4)
    return [torch.as_tensor(loss).detach(), weights.detach()]


def iteration(drawn_by: str = "edited", grad: bool = False, clear: bool = True, sign: int = 1,
              base: str = "null", steps: int = 0) -> Callable:
    """Returns one iteration of ESD, or one with a mistake.

    drawn_by: the model that draws x_t; grad: through the drawing, too; clear: the old gradients;
    sign, base: of the target; steps: how many are too many.
    """

    def step(edited, frozen, optimizer, c, null, x_t, k, eta=1.0):
        model = edited if drawn_by == "edited" else frozen
        predict = ddim.guided_predictor(model, c, null, 3.0)
        with torch.set_grad_enabled(grad):
            t, x_t = list(ddim.denoise(predict, x_t, 50))[k + steps]

        with torch.no_grad():
            eps_null = frozen(x_t, t, null)
            eps_c = frozen(x_t, t, c)
            start = eps_null if base == "null" else eps_c
            target = start - sign * eta * (eps_c - eps_null)
        loss = (edited(x_t, t, c) - target).square().mean()

        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


one_iteration = Exercise(
    "2.2",
    ask_iteration,
    solution=iteration(),
    mistakes={
        "the frozen model draws x_t; the paper's edited model does": iteration(drawn_by="frozen"),
        "the drawing has a gradient: use torch.no_grad": iteration(grad=True),
        "the gradients of the iteration before are added: zero_grad": iteration(clear=False),
        "this sign makes the concept stronger; it is guidance, Eq. 3": iteration(sign=-1),
        "the target starts from the prediction for the concept, as in the official code of 2025":
            iteration(base="c"),
        "x_t is one step too noisy: take k steps": iteration(steps=-1),
        "x_t is one step too clean: take k steps": iteration(steps=1),
    },
    otherwise="the loss differs: which model predicts what, at which x_t and t?",
    forbidden=("erase.gradient_steps", "erase.erase", "erase.x_t_from_model", "erase.esd_loss"),
)


# ---- 2.3: which weights


@functools.cache
def unet_names() -> list[str]:
    """Returns the names of all parameters of the SD v1 U-Net."""
    with torch.device("meta"):
        return [name for name, _ in unet.UNet().named_parameters()]


def ask_method(answer: Callable, seed: int) -> list:
    """Returns whether it selects each name."""
    return [torch.tensor([bool(call(answer, name)) for name in unet_names()])]


method = Exercise(
    "2.3",
    ask_method,
    solution=lambda name: "attn2.to_q." in name,
    mistakes={
        "it selects all of the cross-attention": lambda name: "attn2" in name,
        "it selects the queries of the self-attention": lambda name: "attn1.to_q." in name,
        "it selects the queries of the self-attention, too": lambda name: "to_q" in name,
        "it selects everything": lambda name: True,
    },
    otherwise="the cross-attention is attn2, and its queries are to_q",
)


# ---- 3.2: Wilson's interval


def ask_interval(answer: Callable, seed: int) -> list:
    """Returns low and high for some shares, to three digits."""
    cases = ((0, 50), (25, 50), (50, 50), (1, 3), (3 + seed, 20 + 3 * seed))
    intervals = []
    for hits, images in cases:
        low, high = call(answer, hits, images)
        intervals.append([float(low), float(high)])
    return [torch.tensor(intervals).round(decimals=3)]


def normal_interval(hits: int, images: int) -> tuple[float, float]:
    """Returns the interval that takes a share for normally distributed."""
    p = hits / images
    half = 1.96 * (p * (1 - p) / images) ** 0.5
    return p - half, p + half


interval = Exercise(
    "3.2",
    ask_interval,
    solution=tables.wilson,
    mistakes={
        "this is the normal interval: 0 of 50 would be 0 to 0, and 50 images don't make it certain":
            normal_interval,
        "z is 1.96, not its square": lambda hits, images: tables.wilson(hits, images, z=1.96**2),
    },
    otherwise="for 0 of 50 Wilson's interval is 0.000 to 0.071, for 25 of 50 0.366 to 0.634",
    forbidden=("notebooks.toy.tables.wilson",),
)


# ---- 3.3: Safe Latent Diffusion


def ask_safe_direction(answer: Callable, seed: int) -> list:
    """Returns the direction for three random predictions."""
    predictions = [noise(seed + i, 1, 4, 8, 8) for i in range(3)]
    return [call(answer, *predictions, 2.0, 0.1)]


def at_most_1(mu: Tensor) -> Tensor:
    return mu.clamp(max=1)


def safe_direction_by(bound: Callable = at_most_1, below: bool = True,
                      base: str = "null") -> Callable:
    """Returns the equations, or the equations with a mistake.

    bound: of mu; below: mu is 0 at the threshold and above; base: what eps_s is compared with.
    """

    def direction(eps_null, eps_c, eps_s, scale, threshold):
        mu = bound(scale * (eps_c - eps_s).abs())
        if below:
            mu = mu.where(eps_c - eps_s < threshold, 0)
        return mu * (eps_s - (eps_null if base == "null" else eps_c))

    return direction


safe_direction = Exercise(
    "3.3",
    ask_safe_direction,
    solution=safe_direction_by(),
    mistakes={
        "mu must be at most 1": safe_direction_by(bound=lambda mu: mu),
        "mu must be 0 where eps_c - eps_s is at or above the threshold":
            safe_direction_by(below=False),
        "this mu is at least 1, as in the paper's text; in its code it is at most 1":
            safe_direction_by(bound=lambda mu: mu.clamp(min=1)),
        "what is subtracted starts from the empty prompt: eps_s - eps_null":
            safe_direction_by(base="c"),
    },
    otherwise="the equations give other values",
    forbidden=("notebooks.methods.safe_latent_diffusion.safe_direction",),
)


# ---- 3.4: McNemar's test


def ask_mcnemar(answer: Callable, seed: int) -> list:
    """Returns p for pairs of models, of ten to forty images."""
    values = []
    for i, images in enumerate((10, 20, 40, 40)):
        a, b = noise(10 * seed + i, 2, images)
        one = "".join(str(int(x > -1)) for x in a)
        other = "".join(str(int(x > 0)) for x in b)
        values.append(float(call(answer, one, other)))

    values.append(float(call(answer, "1100", "1100")))  # no difference at all
    return [torch.tensor(values)]


def mcnemar_by(sides: int = 2, pairs: bool = True) -> Callable:
    """Returns the test, or the test with one side, or without regard to pairs."""

    def p_value(one, other):
        lost, won, _ = tables.mcnemar(one, other)
        if not pairs:
            lost = one.count("1")
            won = other.count("1")
        n = lost + won
        return min(1, sides * sum(math.comb(n, i) for i in range(min(lost, won) + 1)) / 2**n)

    return p_value


mcnemar = Exercise(
    "3.4",
    ask_mcnemar,
    solution=mcnemar_by(),
    mistakes={
        "only the images count on which the two differ": mcnemar_by(pairs=False),
        "the test has two sides: double the sum": mcnemar_by(sides=1),
    },
    otherwise="p = min(1, 2 sum C(n, i) / 2^n), i from 0 to the smaller of the two counts",
    forbidden=("notebooks.toy.tables.mcnemar",),
)


# ---- 4.2: a selective loss


def ask_selective_loss(answer: Callable, seed: int) -> list:
    """Returns the loss of each sample, and its gradient with respect to a weight of the model."""
    features = [torch.full((2, 77, 8), value).double() for value in (3.0, 1.0, 2.0)]
    text = erase.Text(*features)
    x_t = noise(seed, 2, 4, 3, 3)
    t = torch.tensor([7, 500])

    def frozen(x_t, t, c):  # the prompt has a large effect, up or down, in two parts of x_t
        effect = torch.where(x_t > 0.5, 1.0, torch.where(x_t < -0.5, -1.0, 0.2))
        return 0.5 * x_t + 0.1 * c.mean() * effect

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def edited(x_t, t, c):
        return weight * frozen(x_t, t, c) + 0.01

    loss = call(answer, edited, frozen, x_t, t, text, 2.0)
    slope = torch.zeros(())
    if loss.requires_grad:
        slope, = torch.autograd.grad(loss.mean(), weight)
    return [loss.detach(), slope]


def selective(size: Callable = torch.abs, flip: bool = False, elsewhere: str = "concept",
              masked: bool = False, total: bool = False, grad: bool = True) -> Callable:
    """Returns the loss, or the loss with one of its parts changed."""

    def loss(unet, frozen, x_t, t, text, eta):
        with torch.no_grad():
            eps_null = frozen(x_t, t, text.null)
            eps_c = frozen(x_t, t, text.concept)
            matters = (size(eps_c - eps_null) > 0.1) != flip
            rest = eps_c if elsewhere == "concept" else eps_null
            target = torch.where(matters, erase.esd_target(eps_null, eps_c, eta), rest)
        with torch.set_grad_enabled(grad):
            error = (unet(x_t, t, text.concept) - target).square()

        if masked:
            return torch.stack([e[where].mean() for e, where in zip(error, matters)])
        return error.sum(dim=(1, 2, 3)) if total else error.mean(dim=(1, 2, 3))

    return loss


selective_loss = Exercise(
    "4.2",
    ask_selective_loss,
    solution=selective(),
    mistakes={
        "it applies Eq. 6 everywhere": erase.esd_loss,
        "a difference of -0.2 is large too: compare the absolute value":
            selective(size=lambda difference: difference),
        "it erases where the predictions barely differ": selective(flip=True),
        "elsewhere, the target is the original's prediction for the concept":
            selective(elsewhere="null"),
        "it sums over the elements of a sample: take the mean": selective(total=True),
        "take the mean over all elements: where nothing is erased, the model should not change":
            selective(masked=True),
        "the loss has no gradient: call the edited model outside of no_grad": selective(grad=False),
    },
    otherwise="the values differ",
)


# ---- 5.2: the forward process


def ask_add_noise(answer: Callable, seed: int) -> list:
    """Returns x_t for a random image and noise."""
    x_0 = noise(seed, 1, 4, 3, 3)
    eps = noise(seed + 1, 1, 4, 3, 3)
    return [call(answer, x_0, eps, torch.tensor(0.36 + 0.01 * seed))]


add_noise = Exercise(
    "5.2",
    ask_add_noise,
    solution=ddim.add_noise,
    mistakes={
        "abar is a share of the variance: take square roots":
            lambda x_0, noise, abar: abar * x_0 + (1 - abar) * noise,
        "abar is the image's share of the variance, not the noise's":
            lambda x_0, noise, abar: (1 - abar).sqrt() * x_0 + abar.sqrt() * noise,
        "scale the image down as the noise grows, or the variance grows":
            lambda x_0, noise, abar: x_0 + (1 - abar).sqrt() * noise,
    },
    otherwise="eq. 4 of DDIM gives other values",
    forbidden=("ddim.add_noise",),
)


EXERCISES = {  # by the name of the student's function
    "my_denoise": denoise,
    "my_iteration": one_iteration,
    "my_method": method,
    "my_interval": interval,
    "my_safe_direction": safe_direction,
    "my_mcnemar": mcnemar,
    "my_selective_loss": selective_loss,
    "my_add_noise": add_noise,
}
