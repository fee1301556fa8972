"""Solutions of notebook 5, Is it gone?

5.1. ESD-x and ESD-u change what the U-Net does with some texts' features. The features are a space
of 77 x D numbers, and the loss saw a few points of it. Textual inversion searches all of it for a
point at which the U-Net, whose other weights still know how a star looks, draws one. With censored
training there is no such knowledge: what comes back there was put together from what the model
knows of other things.
"""


def my_add_noise(x_0, noise, abar_t):
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise
