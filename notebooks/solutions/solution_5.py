"""Solutions of notebook 5, Is it gone?

5.1. ESD-x and ESD-u change what the U-Net does with the features of some texts, and the loss only
saw those of one prompt. Textual inversion searches the space of all word embeddings for features
that make the U-Net draw a star, and the U-Net's other weights still know what a star looks like.
After censored training there is no such knowledge: the attack can only combine what the model
knows about other objects.

After the last table. Only the hard prompt: the others need the weights, or choose the noise. Its
search took thousands of images and a judge, but anyone can type its result.
"""


def my_add_noise(x_0, noise, abar_t):
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise
