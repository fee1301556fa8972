"""Solutions of notebook 1, From a prompt to an image.

1.1. alpha = 1 gives eps(c): the prompt without guidance. alpha = 0 gives eps(null): the empty
prompt. alpha = -1 gives eps(null) - [eps(c) - eps(null)]: away from the prompt, and the target of
Eq. 6 for eta = 1. With a negative prompt n: eps(n) + alpha [eps(c) - eps(n)]. The empty prompt no
longer matters, for any alpha. At alpha = 7.5 the weight of eps(n) is 1 - alpha = -6.5 and that of
eps(c) is 7.5: n repels the image nearly as strongly as c attracts it.

1.2. Up to t = 501 the guess is the same star. At 701 its points have melted, at 901 it is a round
red spot, and at 999 the background no longer matches: the guess comes from the prompt.

1.4. With four seeds of "a red star", the mean difference from the images of 200 steps is below 5
from 20, 10 and 50 steps on, for guidance 1, 7.5 and 15. With little guidance, the image is
undecided for longer, and a long step replaces what is still many images by their mean. With much
guidance the predictions change fast from one time to the next, and long steps overshoot: at 15 they
do so until 50 steps. Look at medians, too: now and then a seed changes to another style or
background between 20 and 100 steps, and such a seed dominates the mean.

Questions in the text.

From tokens to features. "a star", "a red star" and the paraphrase, which has the same features. The
scene has other features, so it needn't change.

The forward process. For the trace of an image that is there in training: the U-Net has learned to
read the mean colour and brightness from it, and noise alone says "medium". So very bright and very
dark images are hard to get (Lin et al., https://arxiv.org/abs/2305.08891).

Training. No. By eq. 4, x_0's error is the loss times (1 - abar) / abar: 0.001 at t = 1, 0.5 at 981.
Where nearly everything is noise, the noise is easy to predict and the image is guesswork.

From noise to an image. What is drawn seems to be decided in the first steps, at large t, and how in
the later ones. That is a guess from one trajectory; notebook 4 tries such a loss (eta from 2 to
-1), and it isn't that simple.

What the U-Net predicts. Most of the norm is noise, which both predictions share. x_0 divides by
sqrt(abar): a difference in eps counts sqrt((1 - abar) / abar) times, 5 at t = 801.

Guidance, after Figure 5. Of the world's captions of an image with stripes, many name the stripes;
"a red star" alone is more likely to be the caption of a plain image. So p(c | x) is lower with
stripes, and guidance takes its power of alpha - 1.

Guidance, after Figure 6. No: four of the six hearts become green and two blue; of 24 others 13 are
green and 7 blue. Away from blue is orange, but away from orange is mostly green.

The VAE. 64 * 64 * 3 and 8 * 8 * 4, 48 times fewer. The same for 512 * 512 * 3 and 64 * 64 * 4.

Attention. Not with that word's features alone: the end tokens carry the star, too. It has to change
the keys or values of all tokens that have seen the word, as ESD-x does.
"""

import ddim


def my_add_noise(x_0, noise, abar_t):
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise


def my_denoise(predict, x_t, steps):
    abar = ddim.alphas_cumprod()
    stride = 1000 // steps
    for k in reversed(range(steps)):
        t = k * stride + 1  # + 1 was missing
        t_prev = max(t - stride, 0)  # max was missing

        eps = predict(x_t, t)
        x_0 = (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()  # the first root was missing
        x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * eps
    return x_t
