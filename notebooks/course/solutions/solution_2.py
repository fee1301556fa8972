"""Solutions of notebook 2, Erasing a concept.

2.1. eps_c - g (eps_c - eps_0) = eps_0 + (eps_c - eps_0) - g (eps_c - eps_0)
     = eps_0 - (g - 1) (eps_c - eps_0), so eta = g - 1.
With eta = -1 the target is eps_c: the edited model should do what the original does. The loss of
the unedited model is 0, and so is its gradient: nothing is learned.

2.3. Tuning the queries alone leaves 72 % stars, the keys and values 0 %, the output layers 0 %
(50 images of 10 steps, with the notebook's settings; with a learning rate of 1e-3 the queries leave
14 %). Queries and keys decide how much of each word a pixel gets, values and output layers decide
what it gets. Changing what a pixel gets erases the star; changing only how much works slowly.
A word has values of its own, so "tied to the words" is literally true of the values. The output
layers don't know which word they serve: their input is a mixture of values, and they can only
treat some mixtures differently from others.
"""

import torch

import ddim
import erase


def my_iteration(edited, frozen, optimizer, c, null, noise, k, eta=1.0):
    with torch.no_grad():
        predict = ddim.guided_predictor(edited, c, null, guidance=3.0)
        trajectory = list(ddim.denoise(predict, noise, steps=50))
        t, x_t = trajectory[k]
        target = erase.esd_target(frozen(x_t, t, null), frozen(x_t, t, c), eta)

    loss = (edited(x_t, t, c) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def my_method(name):
    return "attn2.to_q." in name
