"""Solutions of notebook 4, Your own loss.

4.1. The empty prompt: the target is then eps_null, which is Eq. 6 with eta = 0. To draw an average
over the other objects, the target is the mean of the original's predictions for their prompts,
each weighted by how likely it is given x_t. The prediction for the empty prompt comes close to
that.

4.3. There is no single answer. Things to look for: an anchor close to the concept needs the
smallest change, hence few iterations and little harm, but a judge may still see the concept in its
images. A distant anchor changes more of what the two prompts share. A style as anchor changes the
style and may leave the object. Finally, the anchor's own images should not change: if they do, the
concept has leaked into them.
"""

import torch

import erase


def my_selective_loss(unet, frozen, x_t, t, text, eta):
    with torch.no_grad():
        eps_null, eps_c = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)
        matters = (eps_c - eps_null).abs() > 0.1
        target = torch.where(matters, erase.esd_target(eps_null, eps_c, eta), eps_c)
    return (unet(x_t, t, text.concept) - target).square().mean(dim=(1, 2, 3))
