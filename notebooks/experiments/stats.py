"""Shares, intervals and tests. A share is of one erasure; a table's cell is of several.

    stats.text([Share(1, 20), Share(0, 20), Share(4, 20)])    # "8.3 (0 to 34)"
"""

import itertools
import math
import statistics
from collections import Counter
from typing import NamedTuple

import numpy as np

# Student's t for 95 %, two-sided, with 1, 2, ... 30 degrees of freedom
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)


# the same for 95 %, one-sided
T_95_ONE_SIDED = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
    1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725,
    1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
)


class Share(NamedTuple):
    """How many of an erasure's images show what was looked for."""

    hits: int
    asked: int


class Interval(NamedTuple):
    low: float
    high: float


ANYTHING = Interval(-math.inf, math.inf)
PERCENT = Interval(0, 100)


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


# ---- intervals


def wilson(hits: int, asked: int, z: float = 1.96) -> Interval:
    """Returns a share's 95 % interval: Wilson, "Probable Inference", JASA 1927."""
    p = hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def student(values: list[float], within: Interval = ANYTHING) -> Estimate:
    """Returns the mean of several values and its 95 % interval by Student's t.

    within: all that is possible. A single value's interval is infinite.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)

    freedom = len(values) - 1
    t = T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.4 / freedom
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, max(mean - half, within.low), min(mean + half, within.high))


def half_width(groups: list[list[float]]) -> float:
    """Returns t s: s is the standard deviation within groups, t Student's for 95 %, one-sided.

    Infinite, if no group has two values.
    """
    freedom = sum(len(group) - 1 for group in groups if group)
    if not freedom:
        return math.inf
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    few = freedom <= len(T_95_ONE_SIDED)
    t = T_95_ONE_SIDED[freedom - 1] if few else 1.645 + 1.5 / freedom
    return t * math.sqrt(squares / freedom)


def below(values: list[float]) -> float:
    """Returns what one more value is below in 95 % of cases: mean + t s sqrt(1 + 1/n).

    Infinite for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return math.inf
    return statistics.fmean(values) + half_width([values]) * math.sqrt(1 + 1 / n)


def estimate(shares: list[Share]) -> Estimate:
    """Returns the mean share of several erasures, in percent, and its 95 % interval.

    The interval is over erasures, by Student's t: another seed changes more than other
    images do. Where an end of the interval over images, Wilson's, is farther out (all
    erasures have 0, by luck), it is taken. A single erasure has Wilson's alone. Of nothing
    asked: nan.
    """
    shares = [share for share in shares if share.asked]
    if not shares:
        return Estimate(math.nan, math.nan, math.nan)
    hits = sum(share.hits for share in shares)
    asked = sum(share.asked for share in shares)
    images = wilson(hits, asked)
    mean = statistics.fmean(share.hits / share.asked for share in shares)
    if len(shares) == 1:
        return Estimate(100 * mean, 100 * images.low, 100 * images.high)

    _, low, high = student([share.hits / share.asked for share in shares])
    return Estimate(
        mean=100 * mean,
        low=100 * max(0.0, min(low, images.low)),
        high=100 * min(1.0, max(high, images.high)),
    )


def difference(one: list[Share], other: list[Share]) -> Estimate:
    """Returns the mean of one less that of the other, in percent points, and its 95 % interval.

    Both intervals count: the distances from mean to end are squared and added. Zou and Donner,
    "Construction of confidence limits about effect measures", Statistics in Medicine 2008.
    """
    a = estimate(one)
    b = estimate(other)
    mean = a.mean - b.mean
    return Estimate(
        mean,
        low=mean - math.hypot(a.mean - a.low, b.high - b.mean),
        high=mean + math.hypot(a.high - a.mean, b.mean - b.low),
    )


def show(value: Estimate) -> str:
    """Returns an estimate in percent: "4.4 (0 to 14)"; nothing for nan."""
    if math.isnan(value.mean):
        return ""
    low = min(round(value.low), math.floor(value.mean))  # 99.9 isn't in "100 to 100"
    high = max(round(value.high), math.ceil(value.mean))
    return f"{value.mean:.1f} ({low} to {high})"


def text(shares: list[Share]) -> str:
    """Returns percent with the interval: "4.4 (0 to 14)"; nothing if nothing was asked."""
    return show(estimate(shares))


def number(
    values: list[float], digits: int = 1, sign: str = "", within: Interval = ANYTHING
) -> str:
    """Returns the mean of several erasures with its interval: "24.0 (21.8 to 26.2)".

    A single value has none, and neither have values that agree by luck. sign: "+" writes it for
    positive numbers, too. within: all that is possible, such as 0 to 100.
    """
    if not values:
        return ""
    texts = [f"{value:{sign}z.{digits}f}" for value in student(values, within)]  # z: no "-0.0"
    return texts[0] if len({*values}) < 2 else "{} ({} to {})".format(*texts)


# ---- comparisons


class Pairs(NamedTuple):
    """How the images of two models compare, prompt by prompt."""

    only_one: int  # images that only the first gets right
    only_other: int
    p: float  # of a split at least as uneven, if neither is better


def mcnemar(one: list[bool], other: list[bool]) -> Pairs:
    """Compares two models image by image: McNemar's exact test, two-sided, 1947.

    Images on which they agree say nothing about which is better.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    n = only_one + only_other
    fewer = min(only_one, only_other)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return Pairs(only_one, only_other, p=min(1.0, 2 * tail))


def total_variation(seen: Counter, reference: Counter) -> float:
    """Returns 1/2 sum |p_i - q_i| over what two sets of images show, 0 (the same) to 1."""
    p = {name: count / sum(seen.values()) for name, count in seen.items()}
    q = {name: count / sum(reference.values()) for name, count in reference.items()}
    return sum(abs(p.get(name, 0) - q.get(name, 0)) for name in {*p, *q}) / 2


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Frechet distance of Gaussians fitted to features (N, D) and (M, D):

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, eq. 6.
    """
    c_a = np.cov(a.T)
    c_b = np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root


def kendall(one: list[float], other: list[float]) -> float:
    """Returns Kendall's tau-b of two scores of the same things, -1 to 1: do ranks agree?

    Pairs in the same order less pairs in the opposite one, over sqrt(pairs untied in one x
    pairs untied in the other). Kendall, "The treatment of ties", Biometrika 1945. nan if all
    are tied.
    """
    agreement = 0
    untied = [0, 0]
    for (a, b), (c, d) in itertools.combinations(zip(one, other, strict=True), 2):
        signs = (a > c) - (a < c), (b > d) - (b < d)
        agreement += signs[0] * signs[1]
        untied[0] += signs[0] != 0
        untied[1] += signs[1] != 0
    return agreement / math.sqrt(untied[0] * untied[1]) if all(untied) else math.nan
