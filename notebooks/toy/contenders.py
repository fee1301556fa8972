"""The models that evaluate.py compares, how they are sampled, and how their erasures are made.

Settings are plain JSON, and evaluate.py stores them with each answer. Answers whose settings have
changed since are asked for again; a change in the code of a method or a probe isn't noticed.
"""

import functools
import json
import time
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import erase
import sample
from notebooks.methods import (adversarial_esd, concept_ablation, esd_in_contexts, rece,
                               safe_latent_diffusion, uce)
from notebooks.toy import judge as judging
from notebooks.toy import measure, world
from notebooks.toy.tables import FAMILY, STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

# notebooks/toy/flags as JSON; all other settings are the paper's.
GIVEN = measure.flags()
FLAGS = {key: GIVEN[key] for key in ("iterations", "steps", "batch")} | {"data": "every step"}
RATES = {"esd-x": GIVEN["lr"], "esd-u": measure.LR_ESD_U}
SAMPLING = {"steps": 10, "guidance": 5.0, "batch": 50}
SEED = 1000  # of a cell's first image; each image has its own, the same for all contenders
WITHOUT = ("star", "heart", "mosaic")  # each was left out of a training of its own
RETRAINED = {"censored": Path("runs/censored/model")} | {
    f"without_{concept}": Path(f"runs/without_{concept}/model") for concept in WITHOUT}


class Contender(NamedTuple):
    """A model and how it is sampled: a row of a table. Both settings are JSON."""

    name: str
    erase: dict = {}  # what `erased_weights` takes on top of FLAGS; empty: nothing is erased
    how: dict = {}  # what `Studio.draw` takes on top of SAMPLING
    retrained: str = ""  # the name of a model that was trained without the concept


def words_for(concept: str) -> str:
    """The prompt that names a concept: "star", "a picture in the style of dots"."""
    return f"a picture in the style of {concept}" if concept in STYLES else concept


def contexts_of(concept: str) -> dict[str, str]:
    """Prompts with a concept -> the same prompts without it.

    An object alone, in every second colour and in every second style: `evaluate.in_contexts` asks
    for the others. A style alone, and with every second object.
    """
    if concept in STYLES:
        return {words_for(concept): "a picture"} | {
            f"{with_article(name)} in the style of {concept}": with_article(name)
            for name in world.OBJECTS[::2]}
    return {concept: ""} | {
        with_article(f"{colour} {concept}"): with_article(f"{colour} picture")
        for colour in list(world.COLOURS)[::2]} | {
        with_article(f"{concept} in the style of {style}"): words_for(style)
        for style in STYLES[::2]}


def erasures(concept: str) -> dict[str, dict]:
    """A contender's name in the tables -> what `erased_weights` takes on top of FLAGS."""
    words = words_for(concept)
    esd_x, esd_u = ({"concepts": [words], "method": method} for method in ("esd-x", "esd-u"))
    keep = [words_for(other) for other in (*world.OBJECTS, *STYLES) if other != concept]
    instead, anchor = ("a picture",) * 2 if concept in STYLES else ("", "circle")
    return {
        "ESD-x": esd_x, "ESD-u": esd_u,
        "ESD-u, the paper's rule": esd_u | {"method": "esd-u of the paper"},
        "ESD-u, eta 3": esd_u | {"eta": 3}, "ESD-u, eta 10": esd_u | {"eta": 10},
        "by its name": esd_x,
        "by a paraphrase": esd_x | {"concepts": [world.PARAPHRASES.get(concept, (words,))[0]]},
        "x_t at every step of a way": esd_x | {"data": "every step"},
        "x_t by the edited model, as in the paper": esd_x | {"data": "own way"},
        "x_t by the frozen model": esd_x | {"data": "frozen"},
        "learning rate falls to 0": esd_x | {"variant": "falling"},
        "weights and Adam in bfloat16": esd_x | {"variant": "bfloat16"},
        "keys and values only": esd_x | {"method": "esd-x-strict"},
        "ESD-u, its code's parameters": esd_u,
        "ESD-x, in contexts": esd_x | {"concepts": contexts_of(concept), "data": "in contexts"},
        "ESD-u, in contexts": esd_u | {"concepts": contexts_of(concept), "data": "in contexts"},
        "ESD-u against learned prompts": esd_u | {"variant": "adversarial", "keep": keep},
        "concept ablation": {"concepts": {words: anchor}, "method": "esd-x-strict",
                             "data": "images of the anchor", "variant": "ablation"},
        "UCE": {"concepts": {words: instead}, "method": "uce", "keep": keep},
        "RECE": {"concepts": {words: instead}, "method": "rece", "keep": keep},
    } | {f"ESD-x, {count} erased": {"concepts": [title.lower() for title in FAMILY[:count]],
                                    "method": "esd-x", "data": "works"} for count in (1, 2, 3)}


def contender(name: str, concept: str) -> Contender:
    """Returns a contender by its name in the tables; it erases or avoids the concept."""
    words = words_for(concept)
    contenders = (
        Contender("original"), Contender("negative prompt", how={"negative": words}),
        *(Contender(f"SLD-{sld}", how={"safe": words, "sld": sld})
          for sld in safe_latent_diffusion.SETTINGS),
        *(Contender(erased_by, erase=made) for erased_by, made in erasures(concept).items()),
        Contender("censored training", retrained="censored"),
        Contender("never saw it", retrained=f"without_{concept}"))
    return {each.name: each for each in contenders}[name]


# ---- how erasures are made: what the names in their settings mean ----

CLOSED_FORMS = {"uce": uce.erase, "rece": rece.erase}
MORE_METHODS = {  # next to those of erase.py
    "esd-u of the paper": lambda name: "attn2" not in name,  # its code leaves out more
    "esd-x-strict": uce.keys_and_values,  # the code's name for it
}


def data_function(sd: StableDiffusion, name: str, concepts: list[str] | dict[str, str]) -> Callable:
    """Returns what `erase.erase` takes as its `data`."""
    if name == "images of the anchor":
        images = sample.generate(sd, [*concepts.values()], 40, **SAMPLING)
        return concept_ablation.data(sd, images)
    if name == "in contexts":
        return esd_in_contexts.data(sd, concepts)

    def frozen(unet, *rest):
        return erase.own_ways(sd.unet, *rest)

    def works(unet, texts, shape, steps, guidance, rng):
        images = {title.lower(): world.render_work(title) for title in world.WORKS}
        latents = sd.encode_images([images[concept] for concept in concepts])
        return erase.noised(latents, texts, shape, steps, rng)

    every_step = functools.partial(erase.own_ways, every_step=True)
    return {"own way": erase.own_ways, "every step": every_step, "frozen": frozen,
            "works": works}[name]


def round_to_bfloat16(optimizer: torch.optim.Optimizer) -> None:
    """Rounds weights and Adam's state to what bfloat16 would have kept of them."""
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(tensor.bfloat16())


def own_loop(sd: StableDiffusion, concept: str, variant: str, method: str | Callable,
             data: Callable, lr: float, iterations: int, steps: int, batch: int) -> dict:
    """`erase.erase` for one concept, with a loop that changes something between two steps.

    variant: "falling", the learning rate falls to 0, or "bfloat16", each step is rounded.
    """
    null, config = sd.encode([""] * batch), sd.unet.config
    c = sd.encode([concept]).expand_as(null)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    theta, rng = erase.select(sd.unet, method), torch.Generator().manual_seed(0)
    unet, optimizer = erase.edit(sd.unet, theta), torch.optim.Adam(theta.values(), lr)
    batches = data(unet, [erase.Text(c, null, c)], shape, steps, 3.0, rng)
    losses = erase.esd(unet, sd.unet, batches, optimizer)
    for done in range(iterations):
        if variant == "falling":
            optimizer.param_groups[0]["lr"] = lr * (1 - done / iterations)
        next(losses)
        if variant == "bfloat16":
            round_to_bfloat16(optimizer)
    return {name: tensor.detach() for name, tensor in theta.items()}


def erased_weights(sd: StableDiffusion, concepts: list[str] | dict[str, str], method: str,
                   data: str = "", variant: str = "", keep: tuple[str, ...] = (), **settings
                   ) -> dict[str, Tensor]:
    """Returns theta by name, as `erase.erase` does, from settings that are JSON."""
    if method in CLOSED_FORMS:
        return CLOSED_FORMS[method](sd, concepts, keep)
    settings |= {"method": MORE_METHODS.get(method, method),
                 "data": data_function(sd, data, concepts)}
    concepts = [*concepts] if data == "in contexts" else concepts
    if variant in ("falling", "bfloat16"):
        return own_loop(sd, *concepts, variant, **settings)
    if variant == "ablation":
        settings["loss_fn"] = concept_ablation.loss
    elif variant == "adversarial":
        settings["loss_fn"] = adversarial_esd.against(sd.encode(keep), steps=10)  # to save time
    return erase.erase(sd, concepts, **settings)


# ---- the miniature, its judge, and what all cells have in common ----

def fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart: a checksum of all weights."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


class Studio(NamedTuple):
    """Makes the contenders' models and draws with them."""

    sd: StableDiffusion
    judge: judging.Judge
    weights: dict[str, str]  # fingerprints: "unet", "judge", and of each retrained U-Net by name
    run: Path  # where erased weights are kept
    num: int  # images of each class
    iterations: int

    def settings(self, contender: Contender) -> dict:
        """The arguments of `erased_weights` for it."""
        if not contender.erase or contender.erase["method"] in CLOSED_FORMS:
            return contender.erase
        rate = RATES["esd-x" if contender.erase["method"].startswith("esd-x") else "esd-u"]
        slow = ("style of" in next(iter(contender.erase["concepts"]))
                or contender.erase.get("variant") == "ablation")
        iterations = self.iterations * (3 if slow else 1)
        return FLAGS | {"lr": rate, "iterations": iterations} | contender.erase

    def erased(self, contender: Contender) -> Path:
        """The file of its weights; an erasure is made when it is first asked for."""
        settings = self.settings(contender)
        text = json.dumps([self.weights["unet"], settings], sort_keys=True)
        file = self.run / f"{zlib.crc32(text.encode()):08x}.safetensors"
        if not file.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            theta = erased_weights(self.sd, **settings)
            erase.save(theta, file, settings | {"seconds": time.perf_counter() - began})
        return file

    def model(self, contender: Contender) -> StableDiffusion:
        if contender.erase:
            return sample.load_erased(self.sd, self.erased(contender))
        return self.retrained(contender.retrained) if contender.retrained else self.sd

    def retrained(self, name: str) -> StableDiffusion:
        """A model that was trained without a concept."""
        return sample.load(RETRAINED[name])

    def cost(self, contender: Contender) -> dict:
        """The seconds that an erasure took, and how many parameters it changes."""
        with safe_open(self.erased(contender), "pt") as file:
            seconds = json.loads(file.metadata()["settings"])["seconds"]
            return {"seconds": seconds,
                    "parameters": sum(file.get_tensor(name).numel() for name in file.keys())}

    def draw(self, sd: StableDiffusion, how: dict, prompts: list[str]) -> list[Image.Image]:
        """One image of each prompt, each from a seed of its own."""
        how = SAMPLING | how
        if "safe" in how:
            concept = sd.encode([how.pop("safe")])
            how["guided"] = safe_latent_diffusion.guided(concept, how.pop("sld"))
        return sample.generate(sd, prompts, seed=[SEED + i for i in range(len(prompts))], **how)


@functools.cache
def open_studio(model: Path, run: Path, num: int, iterations: int) -> Studio:
    """Cached: a process loads the models once."""
    sd, judge = sample.load(model), judging.load(model)
    weights = {"unet": fingerprint(sd.unet), "judge": fingerprint(judge)}
    for name, folder in RETRAINED.items():
        if (folder / "unet").exists():  # it is trained
            weights[name] = fingerprint(sample.load(folder).unet)
    return Studio(sd, judge, weights, run, num, iterations)
