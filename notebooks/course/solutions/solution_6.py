"""Solutions of notebook 6, What Eq. 6 draws.

6.1. The logarithm of p^(1+eta) / r^eta is -(x^2 / 2) ((1+eta)/S - eta/C), up to a constant. So the
variance is 1 / ((1+eta)/S - eta/C) = S C / ((1+eta) C - eta S), if the denominator is positive:
C > S eta / (1+eta). Otherwise the density doesn't fall with |x|, its integral is infinite, and it
is no distribution. For eta = 1 the concept has to be wider than half of everything's variance, for
eta = 3 than three quarters, and for a large eta it may hardly be narrower at all.
Eq. 4's variance is the larger one: with u = S/C, Eq. 4 has S / (1 - eta (u - 1)), DDIM draws
S u^eta, and u^eta (1 - eta (u - 1)) <= 1, since log u <= u - 1 and log(1 - z) <= -z.

6.3. Compare with the simplest rules, too: "all" or "none" of the objects come back. The law says
which way the prediction moves with g, not how far it has to move until the judge sees the object:
for that you would need the original's shares at small guidance scales, and what training moved that
isn't along d. The slope is a mean over all times, while the first steps decide what is drawn: look
at the slope for each time (answers.get(...)["by time"]) before you choose another threshold. One
that was chosen on these ten objects has to be tried on others: the styles.
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
