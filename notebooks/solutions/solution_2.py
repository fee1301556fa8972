"""Solutions of notebook 2, Erasing a concept.

2.1. eps_c - g (eps_c - eps_0) = eps_0 + (eps_c - eps_0) - g (eps_c - eps_0)
     = eps_0 - (g - 1) (eps_c - eps_0), so eta = g - 1.
With eta = -1 the target is eps_c: the edited model shall do what the original does. The loss of the
unedited model is 0, and so is its gradient: nothing is learned.

2.3. Queries come from the picture, keys and values from the words. The keys and values of "star"
can be changed without touching any other word's; a query decides how a pixel looks at all words
alike, so whatever it does to the star it does to the others, and the target holds it back at each
x_t where the other words (the start and the end token among them) are needed.
"""


def my_target(eps_null, eps_c, eta):
    return eps_null - eta * (eps_c - eps_null)


def my_method(name):
    return "attn2.to_q." in name
