"""Solutions of notebook 3, The paper in miniature.

3.1. If the share is p, none of n images shows the concept with probability (1 - p)^n. This is 0.05
for p = 1 - 0.05^(1/n), which is close to 3 / n because log 0.05 = -3.0. For n = 50 that is 6 %, and
for n = 500, the number of images per class in Table 2, 0.6 %. To claim "under 1 %", you need 300
images, none of which shows the concept.
"""

import math


def my_interval(hits, images, z=1.96):
    p = hits / images
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    return middle - half, middle + half


def my_safe_direction(eps_null, eps_c, eps_s, scale, threshold):
    mu = (scale * (eps_c - eps_s).abs()).clamp(max=1)
    mu = mu * (eps_c - eps_s < threshold)
    return mu * (eps_s - eps_null)


def my_mcnemar(one, other):
    only_one = sum(a > b for a, b in zip(one, other))
    only_other = sum(b > a for a, b in zip(one, other))
    n = only_one + only_other
    p = 2 * sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1)) / 2**n
    return min(1, p)
