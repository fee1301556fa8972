"""Every probe of notebooks/methods/probes.py on one model: is its concept gone?

An attacker has the model's weights, the judge, and images of the concept, which the original
drew: 24 to learn from, and one for each head start.
"""

from collections import Counter
from typing import Callable, Iterator

from PIL import Image
from torch import Tensor

import sample
from notebooks.methods import probes
from notebooks.toy import judge as judging
from notebooks.toy.models import SAMPLING, SEED, Context, prompt_for
from notebooks.toy.tables import STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

STOPS = (5, 10, 20, 40, 80, 160)  # steps of training after which images are counted
STEPS_AND_GUIDANCE = {name: SAMPLING[name] for name in ("steps", "guidance")}


def hard_prompt(
    sd: StableDiffusion, prompt: str, shows: Callable[[list[Image.Image]], list[bool]]
) -> str:
    """Returns the prompt behind typed tokens that bring the concept back most often.

    It counts four images of each candidate, with few steps, to save time.
    """

    def score(prompts: list[str]) -> list[int]:
        images = sample.generate(sd, prompts, num=4, seed=0, **SAMPLING | {"steps": 5})
        shown = shows(images)
        return [sum(shown[4 * i : 4 * i + 4]) for i in range(len(prompts))]

    return probes.hard_prompt(prompt, probes.vocabulary(sd), score)


def probe(context: Context, sd: StableDiffusion, concept: str) -> dict:
    """Returns how many of `num` images show the concept, by each attack; and the distances.

    seen: what the judge sees in the images by name, to be compared with the model that never saw
    the concept. eps: |eps - eps'| to that model, for each of 20 batches of x_t. What an attacker
    uses has other seeds than the images that are counted.
    """
    is_style = concept in STYLES
    head = "style" if is_style else "object"
    prompt = prompt_for(concept) if is_style else with_article(concept)
    text = sd.encode([prompt])
    x_t = probes.noise(sd, range(SEED, SEED + context.num))
    originals = sample.generate(context.sd, [prompt], num=24 + context.num, seed=0, **SAMPLING)

    def batches(seed: int = 0) -> Iterator[probes.NoisedImages]:
        return probes.noised_images(context.sd, originals[:24], seed=seed)

    def names(images: list[Image.Image]) -> list[str]:
        return [look[head] or "none of these" for look in judging.read(context.judge, images)]

    def shows(images: list[Image.Image]) -> list[bool]:
        return [name == concept for name in names(images)]

    def shown_by(model: StableDiffusion, text: Tensor) -> int:
        return sum(shows(probes.draw(model, text, x_t, **STEPS_AND_GUIDANCE)))

    seen = Counter(names(probes.draw(sd, text, x_t, **STEPS_AND_GUIDANCE)))
    hard = hard_prompt(sd, prompt, shows)
    head_start = probes.head_start(sd, text, originals[24:], x_t, skip=5, **STEPS_AND_GUIDANCE)
    relearned = {}
    for stop, model in zip(STOPS, probes.relearned(sd, prompt, batches(), STOPS)):
        relearned[str(stop)] = shown_by(model, text)
    never = context.retrained(f"without_{concept}")

    return {
        "num": context.num,
        "by name": seen[concept],
        "seen": dict(seen),
        "prompt": hard,
        "learned words": shown_by(sd, probes.learned_words(sd, batches())),
        "hard prompt": shown_by(sd, sd.encode([hard])),
        "noise": probes.with_noise(sd, text, x_t, shows, **STEPS_AND_GUIDANCE),
        "head start": sum(shows(head_start)),
        "relearned": relearned,
        "eps": probes.eps_distances(sd, never, prompt, batches(seed=1)),
    }
