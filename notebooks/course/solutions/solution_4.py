"""Solutions of notebook 4, Your own loss.

4.1. The empty prompt: the target is then eps_null, which is Eq. 6 with eta = 0. To draw one of the
other objects, each equally often, the target is the mean of the original's predictions for their
prompts, each weighted by how likely its object is given x_t. "a picture" and the empty prompt come
close, but they include stars, scenes and works.

After the table of methods. They were told to keep names, and scenes don't contain them: nothing
holds the keys and values of a scene's words in place. With scenes among the prompts to keep, those
of the heart would have to be left out, or the heart stays; each prompt to keep leaves less freedom
to erase.

4.2. With the notebook's settings (ESD-u, eta 10, seed 0), neither loss leaves a star in 20 images.
The selective one keeps 87 % of 90 images of the other objects right, Eq. 6 81 %, and 100 instead of
88 % of 32 styles. In pairs, 11 images of the objects are better and 6 worse: p = 0.33, too little
to claim a gain. A second seed and the styles in pairs are the next step. In neon, 2 and 1 of 10
stars are left.

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
        eps_null = frozen(x_t, t, text.null)
        eps_c = frozen(x_t, t, text.concept)
        matters = (eps_c - eps_null).abs() > 0.1
        target = torch.where(matters, erase.esd_target(eps_null, eps_c, eta), eps_c)

    return (unet(x_t, t, text.concept) - target).square().mean(dim=(1, 2, 3))
