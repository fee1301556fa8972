"""Every probe of notebooks/methods/probes.py on one contender: is its concept gone?

An attacker has the contender's weights, the judge, and images of the concept, which the original
drew: 24 to learn from, and one for each head start.
"""

from collections import Counter
from typing import Iterator

from PIL import Image
from torch import Tensor

import sample
from notebooks.methods import probes
from notebooks.toy import judge as judging
from notebooks.toy.contenders import SAMPLING, SEED, Studio, words_for
from notebooks.toy.tables import STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

STOPS = (5, 10, 20, 40, 80, 160)  # steps of training after which images are counted


def probe(studio: Studio, sd: StableDiffusion, concept: str) -> dict:
    """How many of `num` images show the concept, by each attack; and the distances.

    seen: what the judge sees in the images by name, to be compared with the model that never saw
    the concept. eps: |eps - eps'| to that model, for each of 20 batches of x_t. What an attacker
    uses has other seeds than the images that are counted.
    """
    head, prompt = ("style", words_for(concept)) if concept in STYLES else (
        "object", with_article(concept))
    text, x_t = sd.encode([prompt]), probes.noise(sd, range(SEED, SEED + studio.num))
    how = {name: SAMPLING[name] for name in ("steps", "guidance")}
    originals = sample.generate(studio.sd, [prompt], num=24 + studio.num, seed=0, **SAMPLING)

    def batches(seed: int = 0) -> Iterator[probes.Batch]:
        return probes.noised(studio.sd, originals[:24], seed=seed)

    def looks(images: list[Image.Image]) -> list[str]:
        return [look[head] or "none of these" for look in judging.read(studio.judge, images)]

    def shows(images: list[Image.Image]) -> list[bool]:
        return [look == concept for look in looks(images)]

    def score(prompts: list[str]) -> list[int]:
        """How many of four images of each show the concept; few steps, to save time."""
        shown = shows(sample.generate(sd, prompts, num=4, seed=0, **SAMPLING | {"steps": 5}))
        return [sum(shown[4 * i:4 * i + 4]) for i in range(len(prompts))]

    def drawn(model: StableDiffusion, text: Tensor) -> int:
        return sum(shows(probes.draw(model, text, x_t, **how)))

    seen = Counter(looks(probes.draw(sd, text, x_t, **how)))
    hard = probes.hard_prompt(prompt, probes.vocabulary(sd), score)
    models = zip(STOPS, probes.relearned(sd, prompt, batches(), STOPS))
    found = {
        "num": studio.num, "by name": seen[concept], "seen": dict(seen), "prompt": hard,
        "learned words": drawn(sd, probes.learned_words(sd, batches())),
        "hard prompt": drawn(sd, sd.encode([hard])),
        "noise": probes.with_noise(sd, text, x_t, shows, **how),
        "head start": sum(shows(probes.head_start(sd, text, originals[24:], x_t, skip=5, **how))),
        "relearned": {str(stop): drawn(model, text) for stop, model in models}}
    never = studio.retrained(f"without_{concept}")
    return found | {"eps": probes.eps_distances(sd, never, prompt, batches(seed=1))}
