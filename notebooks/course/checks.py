"""The exercises: the right answer to each, and likely mistakes.

    print(checks.add_noise(my_add_noise))     # "right", or what is wrong

cases.py has the inputs that a function is called with.
"""

import contextlib
import functools
import itertools
import math
from typing import Callable, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import ddim
import erase
from notebooks.course import cases
from notebooks.experiments import stats

NOT_ALLOWED = "this is the project's own function: write yours"


def not_allowed(*_, **__):
    raise RuntimeError(NOT_ALLOWED)


class Exercise(NamedTuple):
    """A function to be written. Its results are compared, as tensors, with the solution's."""

    number: str
    ask: Callable[[Callable, int], list[Tensor]]  # calls a function on inputs drawn from a seed
    solution: Callable
    mistakes: dict[str, Callable]  # what is wrong -> a function that does just this
    otherwise: tuple[str, ...]  # what to say if none does; one for each result, the last for more
    forbidden: tuple[str, ...] = ()  # the project's functions that would be the answer

    def __call__(self, answer: Callable, seed: int = 0) -> str:
        """Says "right" or what is wrong with a student's function, as grade.py does."""
        try:
            with contextlib.ExitStack() as taken_away:
                for function in self.forbidden:
                    taken_away.enter_context(mock.patch(function, not_allowed))
                results = self.ask(answer, seed)
        except (Exception, SystemExit) as error:  # a student's code can raise anything
            return cases.reason(error)
        return self.verdict(results, seed)

    def verdict(self, results: list[Tensor], seed: int) -> str:
        """Says the same of results that a student's function has returned before."""
        expected = results_of(self.ask, self.solution, seed)
        if len(results) != len(expected):
            return "wrong: its results can't be read"
        first = first_difference(results, expected)
        if first is None:
            return "right"
        if results[first].shape != expected[first].shape:
            return f"wrong: its result has the shape {[*results[first].shape]} instead of " \
                   f"{[*expected[first].shape]}"
        if not results[first].isfinite().all():
            return "wrong: not all of its numbers are finite"

        # A mistake has to explain the results up to the first wrong one.
        for what, mistake in self.mistakes.items():
            likely = results_of(self.ask, mistake, seed)
            if first_difference(results[: first + 1], likely) is None:
                return f"wrong: {what}"
        return f"wrong: {self.otherwise[min(first, len(self.otherwise) - 1)]}"


@functools.cache
def results_of(ask: Callable, function: Callable, seed: int) -> list[Tensor]:
    """Returns the results of a solution or a mistake; none where it raises."""
    try:
        return ask(function, seed)
    except (cases.Wrong, ArithmeticError, LookupError):
        return []


def first_difference(results: list[Tensor], expected: list[Tensor]) -> int | None:
    """Returns the index of the first result that differs in shape or values, None if none does."""
    for i, result in enumerate(results):
        if i == len(expected) or result.shape != expected[i].shape:
            return i
        if not torch.allclose(result.double(), expected[i].double(), atol=1e-5, rtol=1e-4):
            return i
    return None


# ---- 1.2: the forward process


add_noise = Exercise(
    "1.2",
    cases.ask_add_noise,
    solution=ddim.add_noise,
    mistakes={
        "abar is a share of the variance: take square roots":
            lambda x_0, noise, abar: abar * x_0 + (1 - abar) * noise,
        "abar is the image's share of the variance, not the noise's":
            lambda x_0, noise, abar: (1 - abar).sqrt() * x_0 + abar.sqrt() * noise,
        "scale the image down as the noise grows, or the variance grows":
            lambda x_0, noise, abar: x_0 + (1 - abar).sqrt() * noise,
        "the noise has a root, too":
            lambda x_0, noise, abar: abar.sqrt() * x_0 + (1 - abar) * noise,
        "the image has a root, too":
            lambda x_0, noise, abar: abar * x_0 + (1 - abar).sqrt() * noise,
        "the root is of 1 - abar: this is 1 minus the root":
            lambda x_0, noise, abar: abar.sqrt() * x_0 + (1 - abar.sqrt()) * noise,
        "the noise isn't scaled": lambda x_0, noise, abar: abar.sqrt() * x_0 + noise,
    },
    otherwise=("eq. 4 of DDIM gives other values",),
    forbidden=("ddim.add_noise", "ddim.step"),
)


# ---- 1.3: DDIM


def sampler(first: int = 1, upwards: bool = False, roots: tuple[bool, bool] = (True, True),
            end: int | None = 0, to_image: bool = False) -> Callable:
    """Returns DDIM, or DDIM with a mistake.

    first: the last step's time; roots: of the noise's share in x_t and in the next one; end: where
    the last step ends, None for t minus the stride; to_image: it ends at x_0.
    """

    def denoise(predict, x_t, steps):
        abar = ddim.alphas_cumprod()
        stride = ddim.TRAIN_STEPS // steps
        ks = range(steps) if upwards else reversed(range(steps))
        for k in ks:
            t = k * stride + first
            t_prev = t - stride if k or end is None else end

            eps = predict(x_t, t)
            share = (1 - abar[t]).sqrt() if roots[0] else 1 - abar[t]
            x_0 = (x_t - share * eps) / abar[t].sqrt()
            if k == 0 and to_image:
                return x_0
            share = (1 - abar[t_prev]).sqrt() if roots[1] else 1 - abar[t_prev]
            x_t = abar[t_prev].sqrt() * x_0 + share * eps
        return x_t

    return denoise


denoise = Exercise(
    "1.3",
    cases.ask_denoise,
    solution=sampler(),
    mistakes={
        "the times of Stable Diffusion's ten steps are 901, 801, ..., 1, not 900, 800, ..., 0":
            sampler(first=0),
        "the times go up, from the image to the noise: start at 901": sampler(upwards=True),
        "the times are right. Two bugs are left: one in x_0, and one in where the last step ends":
            sampler(roots=(False, True), end=None),
        "the times are right, but the share of the noise in x_t isn't 1 - abar: see eq. 4":
            sampler(roots=(False, True)),
        "the times and x_0 are right, but the share of the noise in the next x_t has a root, too":
            sampler(roots=(True, False)),
        "the last step's t_prev is negative, and abar then counts from its noisy end: go to 0":
            sampler(end=None),
        "the last step should end at abar[0], not at t = 1": sampler(end=1),
        "the last step should end at abar[0]; abar[-1] is the noisiest": sampler(end=-1),
        "the last step should end at abar[0], where a trace of noise is left, not at x_0":
            sampler(to_image=True),
    },
    otherwise=(
        "the times differ: ten steps are 901, 801, ..., 1, and each calls predict once",
        "the times are right, the values aren't: look at both lines of a step, and its last t_prev",
    ),
    forbidden=("ddim.denoise", "ddim.step", "ddim.predicted_x_0", "ddim.add_noise"),
)


# ---- 2.2: the loop


def x_t_at(predict: Callable, noise: Tensor, k: int, shift: int = 0) -> tuple[int, Tensor]:
    """Returns t and x_t after k of 50 steps, or after some more."""
    return next(itertools.islice(ddim.denoise(predict, noise, 50), k + shift, None))


def x_t_after_all(predict: Callable, noise: Tensor, k: int) -> tuple[int, Tensor]:
    """Returns 0 and the image of k steps."""
    return list(ddim.denoise(predict, noise, k))[-1]


def x_t_and_index(predict: Callable, noise: Tensor, k: int) -> tuple[int, Tensor]:
    """Returns k in the place of t."""
    return k, x_t_at(predict, noise, k)[1]


def noise_at_t(predict: Callable, noise: Tensor, k: int) -> tuple[int, Tensor]:
    """Returns the noise in the place of x_t."""
    return x_t_at(predict, noise, k)[0], noise


def mean_square(error: Tensor) -> Tensor:
    return error.square().mean()


def iteration(draw: Callable = x_t_at, drawn_by: str = "edited", guidance: float = 3.0,
              swapped: bool = False, grads: tuple[bool, bool] = (False, False),
              target: Callable = erase.esd_target, teacher: str = "frozen", asked: str = "c",
              loss_of: Callable = mean_square, clear: bool = True, sign: int = 1) -> Callable:
    """Returns one iteration of ESD, or one with a mistake.

    draw: returns t and x_t; drawn_by, guidance, swapped: which model draws it, how, with c and null
    swapped; target, teacher: what is learned, from which model; grads: whether x_t and target have
    gradients; asked: what the edited model is asked for; clear: the old gradients; sign: of the
    step, 0 for none.
    """

    def step(edited, frozen, optimizer, c, null, noise, k, eta=1.0):
        models = {"edited": edited, "frozen": frozen}
        texts = {"c": c, "null": null}
        ends = (null, c) if swapped else (c, null)
        predict = ddim.guided_predictor(models[drawn_by], *ends, guidance)
        with torch.set_grad_enabled(grads[0]):
            t, x_t = draw(predict, noise, k)
        with torch.set_grad_enabled(grads[1]):
            model = models[teacher]
            goal = target(model(x_t, t, null), model(x_t, t, c), eta)
        loss = loss_of(edited(x_t, t, texts[asked]) - goal)

        if clear:
            optimizer.zero_grad()
        (sign * loss).backward()
        if sign:
            optimizer.step()
        return loss.item()

    return step


ETA = "the target is eps_null - eta (eps_c - eps_null), and"
TARGETS = {  # what is wrong -> the target, of eps_null, eps_c and eta
    "this sign makes the concept stronger; it is guidance, Eq. 3":
        lambda null, c, eta: null + eta * (c - null),
    "the target starts from the prediction for the concept, as in the official code of 2025":
        lambda null, c, eta: c - eta * (c - null),
    f"{ETA} eta isn't used here": lambda null, c, eta: null - (c - null),
    f"{ETA} eta multiplies the difference, not eps_null":
        lambda null, c, eta: eta * null - (c - null),
    f"{ETA} eta multiplies all of the difference: mind the brackets":
        lambda null, c, eta: null - eta * c + null,
    f"{ETA} eta isn't squared": lambda null, c, eta: null - eta**2 * (c - null),
    f"{ETA} eta doesn't divide": lambda null, c, eta: null - (c - null) / eta,
    f"{ETA} this is eps_null alone": lambda null, c, eta: null,
    f"{ETA} this is eps_c alone, which the original predicts": lambda null, c, eta: c,
    f"{ETA} this starts from 0 instead of eps_null": lambda null, c, eta: -eta * (c - null),
    f"{ETA} eps_c and eps_null are swapped here": lambda null, c, eta: c - eta * (null - c),
}
LOSSES = {  # what is wrong -> the loss, of the difference
    "it sums the squares: take their mean": lambda error: error.square().sum(),
    "it sums over each sample: take the mean over all elements":
        lambda error: error.square().sum(dim=(1, 2, 3)).mean(),
    "this is the mean of absolute values: take the mean of squares":
        lambda error: error.abs().mean(),
    "this is the norm: take the mean of the squares": torch.linalg.vector_norm,
    "this is the root of the mean square: take the mean square":
        lambda error: error.square().mean().sqrt(),
    "the loss is half as large as the mean square": lambda error: error.square().mean() / 2,
}
WEIGHTS = "the loss is right, but the weights after it aren't:"
one_iteration = Exercise(
    "2.2",
    cases.ask_iteration,
    solution=iteration(),
    mistakes={
        "the frozen model draws x_t; the paper's edited model does": iteration(drawn_by="frozen"),
        "x_t is drawn without guidance: use guided_predictor with guidance 3":
            iteration(guidance=1.0),
        "x_t is drawn with the guidance of sampling, 7.5: it is 3 here": iteration(guidance=7.5),
        "x_t is drawn away from the concept: guided_predictor takes c first, then null":
            iteration(swapped=True),
        "x_t is one step too noisy: take k steps":
            iteration(draw=functools.partial(x_t_at, shift=-1)),
        "x_t is one step too clean: take k steps":
            iteration(draw=functools.partial(x_t_at, shift=1)),
        "x_t is what k steps of k make of the noise, an image: stop after k steps of 50":
            iteration(draw=x_t_after_all),
        "the models get the index k as the time: denoise yields (t, x_t)":
            iteration(draw=x_t_and_index),
        "x_t is still the noise: the edited model draws it, in k of 50 steps":
            iteration(draw=noise_at_t),
        **{what: iteration(target=target) for what, target in TARGETS.items()},
        "the target is from the edited model: ask the frozen one": iteration(teacher="edited"),
        "the edited model is asked with null: it should match the target for c":
            iteration(asked="null"),
        **{what: iteration(loss_of=loss) for what, loss in LOSSES.items()},
        f"{WEIGHTS} the drawing has a gradient: use torch.no_grad": iteration(grads=(True, False)),
        f"{WEIGHTS} the drawing has a gradient, and so has the target: use torch.no_grad":
            iteration(grads=(True, True)),
        f"{WEIGHTS} they don't move: call backward() and optimizer.step()": iteration(sign=0),
        f"{WEIGHTS} the step goes uphill": iteration(sign=-1),
        f"{WEIGHTS} the gradients of the iteration before are added: zero_grad":
            iteration(clear=False),
    },
    otherwise=(
        "the loss differs: which model predicts what, at which x_t and t?",
        f"{WEIGHTS} one zero_grad, backward and step, and no gradient through x_t and target",
        "the second iteration's loss differs, the first one's is right: is something kept?",
        f"{WEIGHTS} the first step is right, the second isn't: zero_grad?",
    ),
    forbidden=("erase.gradient_steps", "erase.erase", "erase.x_t_from_model", "erase.esd_loss"),
)


# ---- 2.3: which weights


method = Exercise(
    "2.3",
    cases.ask_method,
    solution=lambda name: "attn2.to_q." in name,
    mistakes={
        "it selects all of the cross-attention": lambda name: "attn2" in name,
        "it selects the queries of the self-attention": lambda name: "attn1.to_q." in name,
        "it selects the queries of the self-attention, too": lambda name: "to_q" in name,
        "it selects everything": lambda name: True,
        "it selects nothing: a part of the name is enough, and is a `return` missing?":
            lambda name: False,
        "it selects the keys: the queries are to_q": lambda name: "attn2.to_k." in name,
        "it selects the values: the queries are to_q": lambda name: "attn2.to_v." in name,
        "it selects keys and values: the queries are to_q":
            lambda name: "attn2.to_k." in name or "attn2.to_v." in name,
        "it selects the output layers: the queries are to_q": lambda name: "attn2.to_out." in name,
        "it selects all but the queries": lambda name: "attn2.to_q." not in name,
        "it selects the queries and all of the cross-attention: both conditions have to hold":
            lambda name: "attn2" in name or "to_q" in name,
    },
    otherwise=("the cross-attention is attn2, and its queries are to_q",),
)


# ---- 3.2: Wilson's interval


def normal_interval(hits: int, images: int) -> tuple[float, float]:
    """Returns the interval that takes a share for normally distributed."""
    p = hits / images
    half = 1.96 * (p * (1 - p) / images) ** 0.5
    return p - half, p + half


def wilson_by(order: int = 1, middle: bool = True, divide: bool = True, scale: float = 1,
              under_root: int = 4) -> Callable:
    """Returns Wilson's interval, or one with a mistake, in the terms of the exercise's formula."""

    def interval(hits, images, z=1.96):
        p = hits / images
        below = 1 + z**2 / images
        centre = (p + z**2 / (2 * images)) / below if middle else p
        half = z * math.sqrt(p * (1 - p) / images + z**2 / (under_root * images**2))
        half = half / below if divide else half
        return [scale * (centre - half), scale * (centre + half)][::order]

    return interval


interval = Exercise(
    "3.2",
    cases.ask_interval,
    solution=wilson_by(),
    mistakes={
        "this is the normal interval: 0 of 50 would be 0 to 0, and 50 images don't make it certain":
            normal_interval,
        "z is 1.96, not its square": lambda hits, images: stats.wilson(hits, images, z=1.96**2),
        "high comes before low": wilson_by(order=-1),
        "these are percentages: return shares between 0 and 1": wilson_by(scale=100),
        "the middle isn't the share: 50 of 50 would go above 1": wilson_by(middle=False),
        "the root is multiplied by z / (1 + z^2 / n), not by z alone": wilson_by(divide=False),
        "the second term under the root is z^2 / (4 n^2)": wilson_by(under_root=1),
    },
    otherwise=("for 0 of 50 Wilson's interval is 0.000 to 0.071, for 25 of 50 0.366 to 0.634",),
    forbidden=("notebooks.experiments.stats.wilson",),
)


# ---- 3.3: Safe Latent Diffusion


def at_most_1(mu: Tensor) -> Tensor:
    return mu.clamp(max=1)


def below(difference: Tensor, mu: Tensor, threshold: float) -> Tensor:
    return difference < threshold


def safe_direction_by(bound: Callable = at_most_1, size: Callable = torch.abs, scaled: bool = True,
                      where: Callable = below, base: str = "null", sign: int = 1,
                      compared: str = "s", mu_alone: bool = False) -> Callable:
    """Returns the equations, or the equations with a mistake.

    bound, size, scaled: of mu; where: it isn't 0; base: what eps_s is compared with; compared: what
    eps_c is compared with; mu_alone: it returns mu.
    """

    def direction(eps_null, eps_c, eps_s, scale, threshold):
        difference = eps_c - (eps_s if compared == "s" else eps_null)
        mu = bound((scale if scaled else 1) * size(difference))
        mu = mu.where(where(difference, mu, threshold), 0)
        return mu if mu_alone else sign * mu * (eps_s - (eps_null if base == "null" else eps_c))

    return direction


NOT_ZERO = {  # what is wrong -> where mu isn't 0, of eps_c - eps_s, mu and the threshold
    "mu must be 0 where eps_c - eps_s is at or above the threshold":
        lambda difference, mu, threshold: difference == difference,
    "mu is 0 where eps_c - eps_s is at or above the threshold, not below it":
        lambda difference, mu, threshold: difference >= threshold,
    "the threshold is for eps_c - eps_s, not for its absolute value":
        lambda difference, mu, threshold: difference.abs() < threshold,
    "the threshold is for eps_c - eps_s, not for eps_s - eps_c":
        lambda difference, mu, threshold: -difference < threshold,
    "mu is 0 where the absolute value is small, but should be where eps_c - eps_s is large":
        lambda difference, mu, threshold: difference.abs() >= threshold,
    "the threshold is for eps_c - eps_s, not for mu":
        lambda difference, mu, threshold: mu < threshold,
    "the threshold is lambda, not 0": lambda difference, mu, threshold: difference < 0,
}
safe_direction = Exercise(
    "3.3",
    cases.ask_safe_direction,
    solution=safe_direction_by(),
    mistakes={
        "mu must be at most 1": safe_direction_by(bound=lambda mu: mu),
        "this mu is at least 1, as in the paper's text; in its code it is at most 1":
            safe_direction_by(bound=lambda mu: mu.clamp(min=1)),
        **{what: safe_direction_by(where=where) for what, where in NOT_ZERO.items()},
        "mu is negative where eps_c - eps_s is: take the absolute value":
            safe_direction_by(size=torch.Tensor.clone),
        "mu is 0 where eps_c - eps_s is negative: take the absolute value, don't cut it off":
            safe_direction_by(size=torch.relu),
        "mu has eps_s - eps_c in the place of the absolute value":
            safe_direction_by(size=torch.neg),
        "the scale isn't used: mu is min(1, scale |eps_c - eps_s|)":
            safe_direction_by(scaled=False),
        "the scale is inside of min(1, ...), so that mu stays at most 1":
            lambda *given: given[3] * safe_direction_by(scaled=False)(*given),
        "mu compares eps_c with eps_s, not with eps_null": safe_direction_by(compared="null"),
        "what is subtracted starts from the empty prompt: eps_s - eps_null":
            safe_direction_by(base="c"),
        "the sign: eps_s - eps_null is subtracted, not eps_null - eps_s":
            safe_direction_by(sign=-1),
        "this is mu alone: return mu (eps_s - eps_null)": safe_direction_by(mu_alone=True),
    },
    otherwise=("the equations give other values",),
    forbidden=("notebooks.methods.safe_latent_diffusion.safe_direction",),
)


# ---- 3.4: McNemar's test


def mcnemar_by(sides: int = 2, pairs: bool = True, most: float = 1, smaller: Callable = min,
               last: int = 1, all_images: bool = False) -> Callable:
    """Returns the test, or the test with a mistake.

    sides, most: of p; pairs: it counts images on which the two differ; smaller: picks the count;
    last: 1 if it belongs to the sum; all_images: n is all of them.
    """

    def p_value(one, other):
        lost, won, _ = stats.mcnemar(one, other)
        if not pairs:
            lost = sum(one)
            won = sum(other)
        n = len(one) if all_images else lost + won
        total = sum(math.comb(n, i) for i in range(smaller(lost, won) + last))
        return min(most, sides * total / 2**n)

    return p_value


mcnemar = Exercise(
    "3.4",
    cases.ask_mcnemar,
    solution=mcnemar_by(),
    mistakes={
        "only the images count on which the two differ": mcnemar_by(pairs=False),
        "n is the number of images on which the two differ, not of all":
            mcnemar_by(all_images=True),
        "the test has two sides: double the sum": mcnemar_by(sides=1),
        "p can't be above 1: min(1, ...)": mcnemar_by(most=math.inf),
        "the sum goes to the smaller of the two counts": mcnemar_by(smaller=max),
        "the sum has k in it: range(k + 1)": mcnemar_by(last=0),
    },
    otherwise=("p = min(1, 2 sum C(n, i) / 2^n), i from 0 to the smaller of the two counts",),
    forbidden=("notebooks.experiments.stats.mcnemar",),
)


# ---- 4.2: a selective loss


def selective(size: Callable = torch.abs, flip: bool = False, elsewhere: str = "concept",
              masked: bool = False, total: bool = False, grad: bool = True, use_eta: bool = True,
              asked: str = "concept") -> Callable:
    """Returns the loss, or the loss with one of its parts changed."""

    def loss(unet, frozen, x_t, t, text, eta):
        with torch.no_grad():
            eps_null = frozen(x_t, t, text.null)
            eps_c = frozen(x_t, t, text.concept)
            matters = (size(eps_c - eps_null) > 0.1) != flip
            rest = eps_c if elsewhere == "concept" else eps_null
            esd = erase.esd_target(eps_null, eps_c, eta if use_eta else 1.0)
            target = torch.where(matters, esd, rest)
        with torch.set_grad_enabled(grad):
            error = (unet(x_t, t, getattr(text, asked)) - target).square()

        if masked:
            return torch.stack([e[where].mean() for e, where in zip(error, matters)])
        return error.sum(dim=(1, 2, 3)) if total else error.mean(dim=(1, 2, 3))

    return loss


selective_loss = Exercise(
    "4.2",
    cases.ask_selective_loss,
    solution=selective(),
    mistakes={
        "it applies Eq. 6 everywhere": erase.esd_loss,
        "a difference below -0.1 is large too: compare the absolute value":
            selective(size=lambda difference: difference),
        "it erases where the predictions barely differ": selective(flip=True),
        "elsewhere, the target is the original's prediction for the concept":
            selective(elsewhere="null"),
        "eta isn't used in Eq. 6's target": selective(use_eta=False),
        "the edited model is asked with null: ask it with the concept": selective(asked="null"),
        "it sums over the elements of a sample: take the mean": selective(total=True),
        "take the mean over all elements: where nothing is erased, the model should not change":
            selective(masked=True),
        "the loss has no gradient: call the edited model outside of no_grad": selective(grad=False),
    },
    otherwise=(
        "the values differ",
        "the values are right, the gradient isn't: only the edited model's prediction has one",
    ),
)


# ---- 5.2: a step of learning words


def min_snr(snr: Tensor) -> Tensor:
    return snr.clamp(max=5) / snr


def weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
    """Returns the mean of the squares, (B, 4, H, W), each sample with its weight, (B,)."""
    return (weight * error.square().mean(dim=(1, 2, 3))).mean()


def attack(weigh: Callable = min_snr, loss_of: Callable = weighted_mean, target: str = "noise",
           learns: str = "v", clear: bool = True, sign: int = 1) -> Callable:
    """Returns a step, or one with a mistake.

    weigh: w_t, of SNR_t; loss_of: the loss, of the difference and w_t; target: what the U-Net
    should predict; learns: "v" or "weights"; clear: the old gradients; sign: of the step, 0 for
    none.
    """

    def step(unet, encode, v, x_t, t, noise, abar_t, optimizer):
        if learns == "weights":
            optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
        weight = weigh(abar_t / (1 - abar_t))
        predicted = unet(x_t, t, encode(v).expand(len(x_t), -1, -1))
        loss = loss_of(predicted - (noise if target == "noise" else x_t), weight)

        if clear:
            optimizer.zero_grad()
        (sign * loss).backward()
        if sign:
            optimizer.step()
        return loss.item()

    return step


UNWEIGHTED = {  # what is wrong -> w_t, of SNR_t
    "w_t is missing": torch.ones_like,
    "w_t is min(SNR, 5) / SNR, not min(SNR, 5)": lambda snr: snr.clamp(max=5),
    "w_t has min(SNR, 5), not max(SNR, 5)": lambda snr: snr.clamp(min=5) / snr,
    "SNR is abar / (1 - abar), not (1 - abar) / abar": lambda snr: min_snr(1 / snr),
}
NOT_THE_MEAN = {  # what is wrong -> the loss, of the difference and w_t
    "it sums the squares: take their mean":
        lambda error, weight: (weight * error.square().sum(dim=(1, 2, 3))).sum(),
    "it sums over the elements of a sample: take the mean":
        lambda error, weight: (weight * error.square().sum(dim=(1, 2, 3))).mean(),
    "it sums over the batch: take the mean":
        lambda error, weight: (weight * error.square().mean(dim=(1, 2, 3))).sum(),
    "divide by the size of the batch, not by the sum of the weights":
        lambda error, weight: weighted_mean(error, weight) / weight.mean(),
    "w_t is multiplied with the square, not squared itself":
        lambda error, weight: weighted_mean(error, weight**2),
    "this is the mean of absolute values: take the mean of squares":
        lambda error, weight: (weight * error.abs().mean(dim=(1, 2, 3))).mean(),
    "the mean of w_t and the mean of the squares are taken apart: each sample has its own w_t":
        lambda error, weight: weight.mean() * error.square().mean(),
}
V = "the loss is right, but v after the step isn't:"
attack_step = Exercise(
    "5.2",
    cases.ask_attack_step,
    solution=attack(),
    mistakes={
        "the U-Net should predict the noise, not x_t": attack(target="x_t"),
        **{what: attack(weigh=weigh) for what, weigh in UNWEIGHTED.items()},
        **{what: attack(loss_of=loss) for what, loss in NOT_THE_MEAN.items()},
        "the loss is right, but the U-Net's weights move: the attack changes only v":
            attack(learns="weights"),
        f"{V} it doesn't move: encode(v) needs its gradient, then backward() and step()":
            attack(sign=0),
        f"{V} the step goes uphill": attack(sign=-1),
        f"{V} the gradients of the step before are added: zero_grad": attack(clear=False),
    },
    otherwise=(
        "the loss differs: the mean of w_t times the mean square of prediction minus noise",
        "the loss is right, but the U-Net's weights move: the attack changes only v",
        f"{V} one zero_grad, backward and step of the optimizer that you get",
        "the second step's loss differs, the first one's is right: is something kept?",
        "the first step is right, the second isn't: zero_grad?",
    ),
    forbidden=(
        "notebooks.methods.probes.denoising_error",
        "notebooks.methods.probes.learned_words",
    ),
)


# ---- 6.1: the variance of Eq. 4's density


def variance_by(inverse: Callable, exists: Callable) -> Callable:
    """Returns the variance, from its inverse and from when there is one."""

    def variance(S, C, eta):
        return 1 / inverse(S, C, eta) if exists(S, C, eta) else math.inf

    return variance


def of_eq_4(S: float, C: float, eta: float) -> float:
    """Returns the inverse of the variance of p^(1+eta) / r^eta."""
    return (1 + eta) / S - eta / C


def is_wide(S: float, C: float, eta: float) -> bool:
    return (1 + eta) * C > eta * S


def always(*_) -> bool:
    return True


def not_0(S: float, C: float, eta: float) -> float:
    return of_eq_4(S, C, eta) or 1e-9


eq_4_variance = Exercise(
    "6.1",
    cases.ask_eq_4_variance,
    solution=variance_by(of_eq_4, is_wide),
    mistakes={
        "this is what DDIM draws: for Eq. 4, add up the exponents of the Gaussians":
            lambda S, C, eta: S * (S / C) ** eta,
        "this is 1 divided by the variance": lambda S, C, eta:
            of_eq_4(S, C, eta) if is_wide(S, C, eta) else math.inf,
        "r is in the denominator: its exponent has the other sign":
            variance_by(lambda S, C, eta: (1 + eta) / S + eta / C, always),
        "this is p / r^eta: the exponent of p is 1 + eta":
            variance_by(lambda S, C, eta: 1 / S - eta / C, lambda S, C, eta: C > eta * S),
        "the variance is right where there is one; with a narrow concept it is negative, and then "
        "there is no distribution": variance_by(not_0, always),
        "the variance is right, but more often than that there is one: when is it positive?":
            variance_by(of_eq_4, lambda S, C, eta: C > eta * S),
    },
    otherwise=("for S = 1 and C = 0.6 it is 1 at eta = 0, and 3 at eta = 1: add up the exponents",),
)


# ---- 6.2: the loss that keeps the empty prompt


def keeping(kept: str = "null", at: str = "null", weigh: Callable = torch.mul,
            weigh_all: bool = False, total: bool = False, power: int = 2, use_eta: bool = True,
            grad: bool = True) -> Callable:
    """Returns the loss, or the loss with one of its parts changed.

    kept: the text whose prediction is to stay; at: where, a text or Eq. 6's target; weigh: the
    weight times the term; weigh_all: Eq. 6's part, too; grad: of the term.
    """

    def loss(unet, frozen, x_t, t, text, eta, weight):
        with torch.no_grad():
            eps_null = frozen(x_t, t, text.null)
            eps_c = frozen(x_t, t, text.concept)
            target = erase.esd_target(eps_null, eps_c, eta if use_eta else 1.0)
            stays = target if at == "target" else frozen(x_t, t, getattr(text, at))
        with torch.set_grad_enabled(grad):
            drift = (unet(x_t, t, getattr(text, kept)) - stays).abs() ** power
        error = (unet(x_t, t, text.concept) - target).square()

        loss = error + weigh(drift, weight)
        if weigh_all:
            loss = weight * loss
        return loss.sum(dim=(1, 2, 3)) if total else loss.mean(dim=(1, 2, 3))

    return loss


keeping_loss = Exercise(
    "6.2",
    cases.ask_keeping_loss,
    solution=keeping(),
    mistakes={
        "the term for the empty prompt is missing": keeping(weigh=lambda drift, weight: 0 * drift),
        "weight isn't used": keeping(weigh=lambda drift, weight: drift),
        "weight is of the new term alone": keeping(weigh_all=True),
        "it subtracts the new term": keeping(weigh=lambda drift, weight: -weight * drift),
        "the empty prompt's prediction should stay at the frozen model's, not go to Eq. 6's target":
            keeping(at="target"),
        "compare the empty prompt's prediction with the frozen model's for the empty prompt":
            keeping(at="concept"),
        "the new term asks the edited model with the concept: ask it with text.null":
            keeping(kept="concept"),
        "this keeps the concept's prediction: keep the empty prompt's":
            keeping(kept="concept", at="concept"),
        "this keeps the anchor's prediction: keep the empty prompt's, text.null":
            keeping(kept="anchor", at="anchor"),
        "the distance is squared": keeping(power=1),
        "eta isn't used in Eq. 6's target": keeping(use_eta=False),
        "it sums over the elements of a sample: take the mean": keeping(total=True),
        "the new term has no gradient: call the edited model outside of no_grad":
            keeping(grad=False),
    },
    otherwise=(
        "the values differ: Eq. 6's loss, plus weight times the mean square drift at text.null",
        "the values are right, the gradient isn't: both predictions of the edited model have one",
    ),
    forbidden=("notebooks.methods.keep_empty_prompt.loss",),
)


EXERCISES = {  # by the name of the student's function
    "my_add_noise": add_noise,
    "my_denoise": denoise,
    "my_iteration": one_iteration,
    "my_method": method,
    "my_interval": interval,
    "my_safe_direction": safe_direction,
    "my_mcnemar": mcnemar,
    "my_selective_loss": selective_loss,
    "my_attack_step": attack_step,
    "my_variance": eq_4_variance,
    "my_keeping_loss": keeping_loss,
}
