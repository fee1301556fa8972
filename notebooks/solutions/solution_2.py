"""Solutions of notebook 2, Erasing a concept.

2.1. eps_c - g (eps_c - eps_0) = eps_0 + (eps_c - eps_0) - g (eps_c - eps_0)
     = eps_0 - (g - 1) (eps_c - eps_0), so eta = g - 1.
With eta = -1 the target is eps_c: the edited model shall do what the original does. The loss of the
unedited model is 0, and so is its gradient: nothing is learned.

2.3. Queries alone leave 100 % stars and the output layers 0 % (twenty pictures after 100
iterations with the notebook's flags), keys and values 98 % (fifty after 120, the table `which`).
The output layer doesn't know which word it serves: it gets a mixture of values and can only treat
some mixtures differently. So ESD-x is tied to the words through what the words put into that
mixture, not through a word's own keys and values; prompts whose mixtures are alike (circle and
cross) suffer together.
"""


def my_target(eps_null, eps_c, eta):
    return eps_null - eta * (eps_c - eps_null)


def my_method(name):
    return "attn2.to_q." in name
