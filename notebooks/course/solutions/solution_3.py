"""Solutions of notebook 3, The paper in miniature.

3.1. If the share is p, none of n images shows the concept with probability (1 - p)^n. This is 0.05
for p = 1 - 0.05^(1/n), which is close to 3 / n because log 0.05 = -3.0. For n = 50 that is 6 %, and
for n = 500, the number of images per class in Table 2, 0.6 %. To claim "under 1 %", you need 300
images, none of which shows the concept.

3.3, the study. mu asks whether eps(c) and eps(s) differ, not whether the prompt has to do with the
concept. With the settings "medium" the scale is 1000, so a difference of 0.001 gives mu = 1: it is
1 in 50 to 67 % of the elements for "a heart", with s "star", and 0 in nearly all others (8 images,
10 steps, guidance 5, seed 0). So half of eps(s) - eps(null) is subtracted from the prompt's own
direction. This is large where the image doesn't show a star: from t = 501 on it is twice to four
times as long as eps(c) - eps(null), and guidance multiplies it. The result: 53 of 54 images of the
other objects are right without SLD, 49 with "weak", 46 with "medium", 44 with "strong" (six images
of each object, seeds from 1000). Good answers count images in pairs, change one setting at a time
(the threshold, then the scale), and look at mu itself.
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
