"""Solutions of notebook 4, Your own loss.

4.1. For the empty prompt as anchor: the target is then eps_null, Eq. 6 with eta = 0. For "what any
other prompt of the kind would have drawn", the target is the mean of the original's predictions
over those prompts, each weighted by how likely it is for this x_t; that is nearly what the empty
prompt's prediction is.

4.3. There is no single answer. What to look for: a near anchor needs the smallest change, so fewer
iterations and the least harm, but a judge may still see the concept in it; a far one changes more
of what the words share; a style as anchor changes the style and may leave the object. And an
anchor that is itself asked for should come out as before: if it doesn't, the concept's pictures
have leaked into it.
"""

import torch

import erase


def my_selective_loss(unet, frozen, x_t, t, text, eta):
    with torch.no_grad():
        eps_null, eps_c = frozen(x_t, t, text.null), frozen(x_t, t, text.concept)
        matters = (eps_c - eps_null).abs() > 0.1
        target = torch.where(matters, erase.esd_target(eps_null, eps_c, eta), eps_c)
    return (unet(x_t, t, text.concept) - target).square().mean(dim=(1, 2, 3))
