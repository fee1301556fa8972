"""Solutions of notebook 6, What Eq. 6 draws.

6.1. The logarithm of p^(1+eta) / r^eta is -(x^2 / 2) ((1+eta)/S - eta/C), up to a constant. So the
variance is 1 / ((1+eta)/S - eta/C) = S C / ((1+eta) C - eta S), if the denominator is positive:
C > S eta / (1+eta). Otherwise the density doesn't fall with |x|, its integral is infinite, and it
is no distribution. For eta = 1 the concept has to be wider than half of everything's variance, for
eta = 3 than three quarters, and for a large eta it may hardly be narrower at all.
Eq. 4's variance is the larger one, and where it has none, DDIM's is still finite: with u = S/C,
Eq. 4 has S / (1 - eta (u - 1)), and DDIM draws S u^eta. So the claim is u^-eta >= 1 - eta (u - 1):
a convex function lies above its tangent, here at u = 1.

6.3. Compare with the simplest rules, too: "all" or "none" of the objects come back. More than a
quarter of the images show the circle, the square, the ring and the moon. All slopes are above 0, so
"slope above 0" is the rule "all", and right for four of ten. kappa(10) above 1/2, nearer to the
prediction for the concept than to the empty prompt's, is right for six; so is "none". Erasure by
erasure, with all models and the styles, it does better than "none": see the table of rules on the
page of results. The law says which way the prediction moves with g, not how far it has to move
until the judge sees the object: for that you would need the original's shares at small guidance
scales, and what training moved that isn't along d. The slope is a mean over all times, while the
first steps decide what is drawn: look at the slope for each time (answers.get(...)["by time"])
before you choose another threshold. One that was chosen on these ten objects has to be tried on
others: the styles, which kappa(10) ranks as what is seen does.

Questions in the text.

On a line, how wide: 6.1's denominator (1+eta) C - eta S is 0 at eta = C / (S - C), which is 1.5
for S = 1 and C = 0.6. So eta 1 still has a density, and eta 3 has none.

In the plane: the next section says why. It is twice as far from the concept as the kind that is
farthest, and Eq. 4's weight grows exponentially with the square of that kind's distance.

Why erased images are still images: for a common word such as "church", probably the captions:
alt texts from the web are often wrong, and the network learns that floor from data. What it does
far from the concept's images matters at small t; at large t, x_t of all images overlap, so it has
seen them with every caption. To test it, look at |eps_c - eps_0| on x_t of other prompts, by t.

A network: the loss on its own x_t is far from 0, so train longer, with a smaller learning rate and
larger batches, and tune all weights at once. But there are no data on the arc: it is where Eq. 6
leads, not what we want. To draw what a model that never saw the concept draws, take the odds for
eta.

The guidance law: kappa = m_0 + 7.5 (1 - 2 - m_0) = -7.5 - 6.5 m_0 is 0 for m_0 = -7.5 / 6.5 =
-1.15, a bit more than half of m_c. For kappa = 1 it takes m_0 = -8.5 / 6.5 = -1.31.

Keep the empty prompt where it is: plain ESD-u with as many steps as the kept model, half as many
again. Measured with seed 0, its slope is +0.07, and 5 of 20 images show a circle at g 10. So it is
the term, even if more steps may help a little (9 of 20 without them).
"""

import math

import torch

import erase


def my_variance(S, C, eta):
    inverse = (1 + eta) * C - eta * S
    return S * C / inverse if inverse > 0 else math.inf


def my_keeping_loss(unet, frozen, x_t, t, text, eta=1.0, weight=1.0):
    with torch.no_grad():
        eps_null = frozen(x_t, t, text.null)
        target = erase.esd_target(eps_null, frozen(x_t, t, text.concept), eta)

    error = unet(x_t, t, text.concept) - target
    drift = unet(x_t, t, text.null) - eps_null
    return error.square().mean(dim=(1, 2, 3)) + weight * drift.square().mean(dim=(1, 2, 3))
