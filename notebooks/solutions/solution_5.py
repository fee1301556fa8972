"""Solutions of notebook 5, Is it gone?

5.1. ESD-x and ESD-u change what the U-Net does with some texts' features; the loss saw those of one
prompt. Textual inversion searches the embeddings of all words that there could be for features
with which the U-Net, whose other weights still know how a star looks, draws one. With censored
training there is no such knowledge: what comes back there was put together from what the model
knows of other things.
"""


def my_add_noise(x_0, noise, abar_t):
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise
