"""Solutions of notebook 2, Erasing a concept.

2.1. eps_c - g (eps_c - eps_0) = eps_0 + (eps_c - eps_0) - g (eps_c - eps_0)
     = eps_0 - (g - 1) (eps_c - eps_0), so eta = g - 1.
With eta = -1 the target is eps_c: the edited model should do what the original does. The loss of
the unedited model is 0, and so is its gradient: nothing is learned.

2.3. Tuning the queries alone leaves 72 % stars, the keys and values 0 %, the output layers 0 %
(50 images of 10 steps, with the notebook's settings; with a learning rate of 1e-3 the queries leave
14 %). Queries and keys decide how much of each word a pixel gets, values and output layers decide
what it gets. Changing what a pixel gets erases the star; changing only how much works slowly.
A word has values of its own, so the values do depend on the words. The output
layers don't know which word they serve: their input is a mixture of values, and they can only
treat some mixtures differently from others.

Questions in the text.

Eq. 4 in one dimension: a large eta draws images where the original model has none, so expect
images that look like nothing. What is close to the concept has a large P(c|x) itself, so it loses
most.

Negative guidance: at eps_null + 5 (target - eps_null) = eps_null - 5 eta d, five lengths of d to
the left for eta = 1. That is Eq. 3 with the scale -5 eta: guidance multiplies the strength.

What the target draws: it asks for images where the original model has none, as at -7 in Figure 1.
The network was never trained on such x_t, and its predictions there are averages.

Training: the first steps, which fix the outline, change least (the next section), and what comes
later fills this outline with the next best object. Arrows and crosses have corners, as stars have,
and a circle has none. That is a guess: erase the circle, and see what takes its place.

The loss over time: divide each loss by the original's loss at its t, so that all times count the
same, or give the times above 800 more weight still. Train at these times, too: with 8 steps the
first t is 876. Notebook 4 has a loss whose eta depends on t.

A style: captions often leave the style out, so "a heart" means a heart in any style, mosaic
included, and without one style its images become others. The keys and values that were tuned also
serve its words.

Prompts that don't name the concept: it has few images, so the U-Net can store them by prompt, and
doesn't need its general idea of a star to draw one. Training visits the x_t of "a star", which
aren't those of the stored images.
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
