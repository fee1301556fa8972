"""Solutions of notebook 1, A prompt's way to a picture.

1.1. alpha = 1 gives eps(c): the prompt without guidance. alpha = 0 gives eps(null): the empty
prompt. alpha = -1 gives eps(null) - [eps(c) - eps(null)]: away from the prompt, which is Eq. 6's
target for eta = 1. With a negative prompt n: eps(n) + alpha [eps(c) - eps(n)]. The empty prompt
then plays no part for any alpha. For alpha = 7.5 the weight of eps(n) is 1 - alpha = -6.5: it is
pushed away from nearly as strongly as c is drawn to.

1.3. The first steps decide what is drawn and where, the rest its colour and edges: at guidance 1
few steps suffice, since a prediction changes little along the way; at 15 it changes much, and large
steps overshoot.
"""

import ddim


def my_denoise(predict, x_t, steps):
    abar = ddim.alphas_cumprod()
    stride = 1000 // steps
    for k in reversed(range(steps)):
        t, t_prev = k * stride + 1, max((k - 1) * stride + 1, 0)  # was without + 1, and without max
        eps = predict(x_t, t)
        x_0 = (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()  # was without the first root
        x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * eps
    return x_t
