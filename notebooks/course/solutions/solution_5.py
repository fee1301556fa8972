"""Solutions of notebook 5, Is it gone?

5.1. ESD-x and ESD-u change what the U-Net does with the features of some texts, and the loss only
saw those of one prompt. Textual inversion searches the space of all word embeddings for features
that make the U-Net draw a star, and the U-Net's other weights still know what a star looks like.
After censored training there is no such knowledge: the attack can only combine what the model
knows about other objects.

After the last table. Only the hard prompt: the others need the weights, or choose the noise. Its
search took thousands of images and a judge, but anyone can type its result.

5.3. Measured with seed 0, 20 images by name and by learned words, 54 of the other objects:

    ESD-x            by name 1, learned words 14 of 20, others right 53 of 54
      eta 3                  0                15                     52
      320 iterations         1                16                     52
    ESD-u                    2                 8                     53
      eta 3                  1                 5                     50
      320 iterations         0                11                     52

So more erasing doesn't help ESD-x against learned words, and twenty images can't say whether eta 3
helps ESD-u: 5 and 8 of 20 are 11 to 47 % and 22 to 61 %. A good answer gives these intervals, and
says that it is one seed of the erasure and of the attack. Why it needn't help: the loss still sees
the features of one prompt only (5.1).
"""


def my_add_noise(x_0, noise, abar_t):
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * noise
