"""Solutions of notebook 1, From a prompt to an image.

1.1. alpha = 1 gives eps(c): the prompt without guidance. alpha = 0 gives eps(null): the empty
prompt. alpha = -1 gives eps(null) - [eps(c) - eps(null)]: away from the prompt, and the target of
Eq. 6 for eta = 1. With a negative prompt n: eps(n) + alpha [eps(c) - eps(n)]. The empty prompt no
longer matters, for any alpha. At alpha = 7.5 the weight of eps(n) is 1 - alpha = -6.5 and that of
eps(c) is 7.5: n repels the image nearly as strongly as c attracts it.

1.3. The first steps fix the object and its position, the rest its colour and edges. Guidance makes
the predictions change faster from one time to the next, and large steps then overshoot. With 16
seeds of "a red star", the median distance to the image of 100 steps is 39 at 5 steps and 3 at 20
for guidance 1, and 56 and 3 for guidance 15. Look at the median, not only at the mean (10 and 15
at 20 steps): a few seeds change to another style or ground between 20 and 100 steps, and those few
images dominate the mean.
"""

import ddim


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
