"""Solutions of notebook 2, Erasing a concept.

2.1. eps_c - g (eps_c - eps_0) = eps_0 + (eps_c - eps_0) - g (eps_c - eps_0)
     = eps_0 - (g - 1) (eps_c - eps_0), so eta = g - 1.
With eta = -1 the target is eps_c: the edited model shall do what the original does. The loss of the
unedited model is 0, and so is its gradient: nothing is learned.

2.3. Queries alone leave 98 % stars, keys and values 6 %, the output layers 0 % (fifty pictures
after 125 iterations with the notebook's flags). Queries and keys decide how much of each word a
pixel gets, values and output layers what that is: change what comes and the star goes, change only
who looks where and it stays. A word has values of its own, so to this part "tied to the words"
applies literally. The output layers don't know which word they serve: they get a mixture of values
and can only treat some mixtures differently, whichever words they come from.
"""


def my_target(eps_null, eps_c, eta):
    return eps_null - eta * (eps_c - eps_null)


def my_method(name):
    return "attn2.to_q." in name
