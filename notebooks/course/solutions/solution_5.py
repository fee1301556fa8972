"""Solutions of notebook 5, Is it gone?

5.1. ESD-x and ESD-u change what the U-Net does with the features of some texts, and the loss only
saw those of one prompt. Textual inversion searches the space of all word embeddings for features
that make the U-Net draw a star, and the U-Net's other weights still know what a star looks like.
After censored training there is no such knowledge: the attack can only combine what the model
knows about other objects.

5.3. Measured with seed 0, 20 images by name and by learned words, 54 of the other objects. On the
machine of the notebook's outputs ESD-x left 0 and 13 of 20: other rounding is enough for that.

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

Questions in the text.

Attack 1. No: the gradients need the weights, and the learned embeddings aren't tokens, so nobody
can type them. Anyone with a copy of the weights can run it. A hard prompt that was found on a copy
can be typed.

Attack 2. From where on even the model that never saw a star keeps it: at 0.8 it does in most
images, at 0.5 in next to none. So at 0.5 nearly all stars are the model's own doing, and at 0.8
most would be there anyway.

Attack 3. A model may learn any simple shape fast: it knows colours, backgrounds and edges, and all
its weights are trained. The lowest curve says how fast: 10 % after twenty steps. What the erased
models learn faster than that, they may still have known; but it is one model with twenty images,
and a second one that never saw a star differs (in the stored results, 0 and 15 %). Between ESD-x
and ESD-u the difference may lie in what was moved: training changes all weights, and ESD-u's,
spread over the U-Net, are undone by a small step in each, while ESD-x's few matrices have to come
back a longer way. To find out, train only the weights that were edited, or compare the two at equal
distance from the original.

Results. Only after training: 40 % is 22 to 61 %, 85 % is 64 to 95 %. The others overlap: 0 to 16
and 3 to 30 % by name, 43 to 82 and 22 to 61 % with learned words, 22 to 61 and 53 to 89 % after the
head start. Overlap doesn't mean equality: both models start from the same noises, so McNemar's test
(notebook 3) sees more.

Six attacks, many methods. Guidance and the hard prompt: the others need the weights, or choose the
noise. The search for a hard prompt took thousands of images and a judge, but anyone can type its
result.

Who decides what is gone? Judge the reasons, not the opinion.
- Whose style: copyright generally protects works, not styles, so a request is about a name, income
  or consent. Nobody can speak for a style that many share.
- What goes with it: those who need the concept notice, one by one, if at all. A published list of
  what was erased, and of what that cost, would give them something to object to.
- Why publish attacks: the usual answer is to tell the provider first, and to publish after a fixed
  time. Weights that were downloaded can't be fixed, so for open models publication is also the only
  warning that their users get.
- Is it gone in law: ESD suppresses, since learned words bring the concept back without any change
  to the weights. For a service, a regulator tries prompts and guidance; for open weights, learned
  words and training, too.
"""


def my_attack_step(unet, encode, v, x_t, t, noise, abar_t, optimizer):
    snr = abar_t / (1 - abar_t)
    weight = snr.clamp(max=5) / snr  # (B,)

    text = encode(v).expand(len(x_t), -1, -1)
    error = (unet(x_t, t, text) - noise).square().mean(dim=(1, 2, 3))  # (B,)
    loss = (weight * error).mean()

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
