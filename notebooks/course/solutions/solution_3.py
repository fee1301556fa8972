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

Questions in the text.

Objects. How far single objects are from the average, so whether an erasure of your own concept will
work: here circles resist with every seed, hearts with one, and triangles don't; in the paper church
does. Nor would you know whether an average over other objects would be the same.

How many images? From about 70 images on, as the bands of Figure 3 show. It is no proof that the
methods differ with other seeds: both curves are of one erasure of each object.

Styles. The text encoder. ESD-x changes how the cross-attention reads features of the text, so an
erasure carries over as far as the features of two prompts are alike. CLIP is causal: the style is
the last word, so its features and those of the end tokens depend on all words before it.

What prompts don't name. Prompts that always came with the same image, often many times: famous
paintings, for example. Section 5.4 erases some of them, one image at a time.

Prompts without the concept. An image is right only if the judge sees all that its caption names,
while FID compares sets of images and doesn't know their prompts. The prompts are also nearer to the
concept: all objects share one small network with the star, and few captions of COCO are close to
nudity.

Memorised images. It is easier here. The works of an artist share the artist's name in their
prompts; the works here share a style, and no word of their titles.

Strength. The smallest one that removes enough: with these intervals, nothing shows that 3 or 10
removes more of the scenes than 1. You have to know which prompts will be written, what it costs if
a concept gets through or another image is harmed, and the shares after more erasures.

Paraphrases. Its features aren't those of the star. In training the badge had images of its own, and
only 60 % of them showed a star; a paraphrase takes the name's place in the star's own captions.

Compare in pairs. Both, the circle's and the cross's: 0.05 / 8 is 0.00625. But p covers other images
of these erasures, and images of one erasure are alike (3.2, below). Of a fourth erasure it says
nothing. Look at the three: with the circle erased, ESD-u keeps 91, 83 and 79 % of the other
objects, ESD-x 94, 95 and 96 %, so a fourth is likely to agree. With the cross it is 97, 90 and 93
against 97, 97 and 98 %, and the first pair is even.

Choices. Not the two from this table alone: five comparisons that differ in nothing give one or more
like them in 1 - 0.95^5 = 23 % of cases. But another experiment repeated the frozen model's x_t, and
found more. Nobody has repeated the keys and values. More erasures. The
interval is over erasures, and three objects differ by more than the rows do, so more images of the
same three hardly shorten it. If only images counted, it would take about 500 of each row to tell 10
from 16 % (5 %, two-sided, with a power of 80 %).

3.2, the intervals. Yours takes all images for independent. Those of one erasure are more alike than
those of two: if circles resist, all of their images are likelier to show one. Ours measures how
much erasures differ, and takes Wilson's interval where that one is wider.
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
