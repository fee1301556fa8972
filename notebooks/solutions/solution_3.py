"""Solutions of notebook 3, The paper in miniature.

3.1. If the share is p, none of n pictures shows the concept with probability (1 - p)^n. That is
0.05 where p = 1 - 0.05^(1/n), nearly 3 / n, since log 0.05 = -3.0: 6 % for n = 50, and 0.6 % for n
= 500, Table 2's number of pictures. To claim "under 1 %" takes 300 pictures without one.
"""

import math


def my_interval(hits, asked, z=1.96):
    p = hits / asked
    middle = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    return middle - half, middle + half


def my_safe_direction(eps_null, eps_c, eps_s, scale, threshold):
    mu = (scale * (eps_c - eps_s).abs()).clamp(max=1)
    mu = mu * (eps_c - eps_s < threshold)
    return mu * (eps_s - eps_null)
