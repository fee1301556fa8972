"""The cases of the exercises: inputs drawn from a seed, and how a function is called with them.

There are no answers here: checks.py compares what comes back. So the grader can call a student's
function in a copy of the project without answers.
"""

import functools
import inspect
from typing import Callable

import torch
from torch import Tensor

import erase
import unet

NOT_YET = "not yet: write it first"


class NotYet(Exception):
    """The function is still the stub."""


class Wrong(Exception):
    """What the function returns can't be compared; the message says why."""


# ---- calling a function, and what it returns


def call(answer: Callable, *arguments) -> object:
    """Returns the function's result. Raises NotYet for the stub's, Wrong for a generator."""
    try:
        result = answer(*arguments)
    except NotImplementedError as error:
        if error.args:  # some of PyTorch's have a message
            raise
        raise NotYet from error  # as nbgrader's stub

    if result is ...:
        raise NotYet
    if inspect.isgenerator(result):
        raise Wrong("it yields: return the result instead")
    return result


def described(value: object) -> str:
    """Returns what a function returned, in words: "a tuple", "None: is a return missing?"."""
    if value is None:
        return "None: is a `return` missing?"
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def tensor(value: object) -> Tensor:
    """Returns a tensor, an array or a number as a tensor in float64. Raises Wrong for another."""
    if value is None or isinstance(value, (str, bytes, list, tuple, dict, set)):
        raise Wrong(f"it returns {described(value)}" + ", not a tensor" * (value is not None))
    try:
        return torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"it returns {described(value)}, not a tensor") from error


def number(value: object) -> Tensor:
    """Returns a number as a tensor in float64, (). Raises Wrong for anything else."""
    value = tensor(value)
    if value.numel() != 1:
        raise Wrong(f"it returns a tensor of the shape {[*value.shape]}, not a number")
    return value.reshape(())


def reason(error: BaseException) -> str:
    """Returns what to say, in one line, of a call that raised."""
    if isinstance(error, NotYet):
        return NOT_YET
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    lines = str(error).splitlines() or [""]
    return f"wrong: it raises {type(error).__name__}: {lines[0]}".rstrip(": ")


def noise(seed: int, *shape: int) -> Tensor:
    """Returns standard normal numbers in float64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


# ---- the exercises


def ask_add_noise(answer: Callable, seed: int) -> list[Tensor]:
    """1.2. Returns x_t for a random image and noise."""
    x_0 = noise(seed, 1, 4, 3, 3)
    eps = noise(seed + 1, 1, 4, 3, 3)
    return [tensor(call(answer, x_0, eps, torch.tensor(0.36 + 0.01 * seed)))]


def ask_denoise(answer: Callable, seed: int) -> list[Tensor]:
    """1.3. Returns the times at which it calls the model, -1 for a missing one, and its result."""
    steps = 10 + seed
    times = []

    def predict(x_t, t):
        times.append(float(t))
        return 0.3 * x_t + t / 1000

    result = tensor(call(answer, predict, noise(seed, 1, 4, 2, 2), steps))
    padded = times + [-1] * steps
    return [torch.tensor(padded[:steps], dtype=torch.float64), result]


def ask_iteration(answer: Callable, seed: int) -> list[Tensor]:
    """2.2. Returns the loss of two iterations with a U-Net of two weights, the weights after each.

    The second shows whether the gradients of the first are still there.
    """
    weights = torch.tensor([0.9, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    eta = 1.5 + 0.25 * seed

    def frozen(x_t, t, c):
        return 0.8 * x_t + ((0.3 - t / 2000) * c.mean(dim=(1, 2)))[:, None, None, None]

    def edited(x_t, t, c):
        return weights[0] * x_t + weights[1] * (c.mean(dim=(1, 2)) - t / 900)[:, None, None, None]

    c = noise(seed + 1, 2, 77, 8) + 1
    null = noise(seed + 2, 2, 77, 8)
    results = []
    for i, k in enumerate((4, 9)):
        x = noise(10 * seed + i, 2, 4, 3, 3)
        loss = call(answer, edited, frozen, optimizer, c, null, x, k, eta)
        results += [number(loss), weights.detach().clone()]
    return results


@functools.cache
def unet_names() -> list[str]:
    """Returns the names of all parameters of the SD v1 U-Net."""
    with torch.device("meta"):
        return [name for name, _ in unet.UNet().named_parameters()]


def ask_method(answer: Callable, seed: int) -> list[Tensor]:
    """2.3. Returns whether it selects each name; None is no."""
    selected = []
    for name in unet_names():
        result = call(answer, name)
        try:
            selected.append(float(bool(result)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Wrong(f"it returns {described(result)}, neither true nor false") from error
    return [torch.tensor(selected, dtype=torch.float64)]


def ask_interval(answer: Callable, seed: int) -> list[Tensor]:
    """3.2. Returns low and high for some shares, to three digits."""
    cases = ((0, 50), (25, 50), (50, 50), (1, 3), (3 + seed, 20 + 3 * seed))
    intervals = []
    for hits, images in cases:
        ends = call(answer, hits, images)
        if isinstance(ends, (str, dict, set)) or not hasattr(ends, "__len__") or len(ends) != 2:
            raise Wrong(f"it returns {described(ends)}" + ", not (low, high)" * (ends is not None))
        intervals.append(torch.stack([number(end) for end in ends]))
    return [torch.stack(intervals).round(decimals=3)]


def ask_safe_direction(answer: Callable, seed: int) -> list[Tensor]:
    """3.3. Returns the direction for three random predictions."""
    predictions = [noise(10 * seed + i, 1, 4, 8, 8) for i in range(3)]
    scale = 2 + seed / 4
    return [tensor(call(answer, *predictions, scale, 0.1 + seed / 20))]


def ask_mcnemar(answer: Callable, seed: int) -> list[Tensor]:
    """3.4. Returns p for pairs of models, of ten to forty images."""
    values = []
    for i, images in enumerate((10, 20, 40, 40)):
        a, b = noise(10 * seed + i, 2, images)
        one = (a > -1).tolist()
        other = (b > 0).tolist()
        values.append(number(call(answer, one, other)))

    same = [True, True, False, False]
    values.append(number(call(answer, same, same)))
    return [torch.stack(values)]


def sample_means(c: Tensor) -> Tensor:
    """Returns each prompt's mean feature, (B, 1, 1, 1)."""
    return c.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def ask_selective_loss(answer: Callable, seed: int) -> list[Tensor]:
    """4.2. Returns each sample's loss, and its gradient with respect to a weight of the model."""
    features = [torch.full((2, 77, 8), value).double() for value in (3.0, 1.0, 2.0)]
    text = erase.Text(*features)
    x_t = noise(seed, 2, 4, 3, 3)
    t = torch.tensor([7, 500])

    def frozen(x_t, t, c):  # the prompt changes eps by .12, up or down, in two parts of x_t; by .08
        effect = torch.where(x_t > 0.5, 0.6, torch.where(x_t < -0.5, -0.6, 0.4))
        return 0.5 * x_t + 0.1 * sample_means(c) * effect

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def edited(x_t, t, c):
        return weight * frozen(x_t, t, c) + 0.01

    loss = call(answer, edited, frozen, x_t, t, text, 1.5 + seed)
    slope = torch.zeros((), dtype=torch.float64)
    if isinstance(loss, Tensor) and loss.requires_grad:
        slope, = torch.autograd.grad(loss.mean(), weight)
    return [tensor(loss), slope]


class TwoWeights(torch.nn.Module):
    """Predicts something that depends on x_t, t and c, with two weights."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.9, -0.4], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        if len(c) != len(x_t):
            raise ValueError(f"the U-Net gets {len(x_t)} x_t and {len(c)} c: expand c")
        told = c.tanh().sum(dim=(1, 2)) - t / 900
        return self.weights[0] * x_t + self.weights[1] * told[:, None, None, None]


def ask_attack_step(answer: Callable, seed: int) -> list[Tensor]:
    """5.2. Returns, for two steps, the loss, whether a weight of the U-Net has moved, and v.

    The second shows whether the gradients of the first are still there.
    """
    unet = TwoWeights()
    before = unet.weights.detach().clone()
    v = noise(seed, 4, 6).requires_grad_()
    optimizer = torch.optim.SGD([v], lr=0.05)
    others = noise(seed + 1, 73, 8) / 10  # the features of the other tokens
    text_encoder = noise(seed + 2, 6, 8) / 10

    def encode(v):
        return torch.cat([others[:2], v @ text_encoder, others[2:]])[None]  # (1, 77, 8)

    results = []
    for t in (torch.tensor([40, 500, 800]), torch.tensor([30, 300, 900])):
        x_t = noise(seed + int(t[0]), 3, 4, 3, 3)
        eps = noise(seed + int(t[1]), 3, 4, 3, 3)
        abar_t = (1 - t / 1000) ** 2  # signal-to-noise ratios on both sides of 5
        loss = call(answer, unet, encode, v, x_t, t, eps, abar_t, optimizer)
        moved = (unet.weights.detach() != before).any()
        results += [number(loss), moved.double(), v.detach().clone()]
    return results


def ask_eq_4_variance(answer: Callable, seed: int) -> list[Tensor]:
    """6.1. Returns, for some S, C and eta, if the variance is infinite, and its value if not."""
    given = ((1, 0.6, 0), (1, 0.9, 0.5), (1, 0.6, 1), (2, 2, 3), (1, 0.6, 3), (1, 0.5, 1))
    results = []
    for S, C, eta in (*given, (1 + seed / 9, 0.9, 2)):
        variance = number(call(answer, S, C, eta))
        infinite = variance == torch.inf
        results.append(torch.stack([infinite.double(), variance.where(~infinite, 0)]))
    return results


def ask_keeping_loss(answer: Callable, seed: int) -> list[Tensor]:
    """6.2. Returns each sample's loss, and its gradient with respect to two of the weights."""
    features = [torch.full((2, 77, 8), value).double() for value in (3.0, 1.0, 2.0)]
    text = erase.Text(*features)
    x_t = noise(seed, 2, 4, 3, 3)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64, requires_grad=True)

    def frozen(x_t, t, c):
        return 0.5 * x_t + 0.4 * sample_means(c) + t.view(-1, 1, 1, 1) / 1000

    def edited(x_t, t, c):
        return weights[0] * frozen(x_t, t, c) + weights[1] * sample_means(c)

    loss = call(answer, edited, frozen, x_t, torch.tensor([7, 500]), text, 2.0, 0.7)
    slope = torch.zeros(2, dtype=torch.float64)
    if isinstance(loss, Tensor) and loss.requires_grad:
        slope, = torch.autograd.grad(loss.mean(), weights)
    return [tensor(loss), slope]
