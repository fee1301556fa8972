"""The models that evaluate.py compares, how they are sampled, and how their erasures are made.

Settings are plain JSON, and evaluate.py stores them with each answer. Answers whose settings have
changed since are asked for again; a change in the code of a method or a probe isn't noticed.
"""

import functools
import json
import time
import zlib
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor, nn

import erase
import sample
from notebooks.methods import (
    adversarial_esd,
    concept_ablation,
    esd_in_contexts,
    rece,
    safe_latent_diffusion,
    uce,
)
from notebooks.toy import judge as judging
from notebooks.toy import measure, world
from notebooks.toy.tables import FAMILY, STYLES
from notebooks.toy.world import with_article
from sample import StableDiffusion

# notebooks/toy/flags as JSON; all other settings are the paper's.
GIVEN = measure.flags()
FLAGS = {
    "iterations": GIVEN["iterations"],
    "steps": GIVEN["data"].keywords["steps"],
    "batch": GIVEN["batch"],
    "data": "every step",
}
RATES = {"esd-x": GIVEN["lr"], "esd-u": measure.LR_ESD_U}
SAMPLING = {"steps": 10, "guidance": 5.0, "batch": 50}
SEED = 1000  # of a cell's first image; each image has its own, the same for all models
WITHOUT = ("star", "heart", "mosaic")  # each was left out of a training of its own
RETRAINED = {"censored": Path("runs/censored/model")}
RETRAINED |= {f"without_{concept}": Path(f"runs/without_{concept}/model") for concept in WITHOUT}


# ---- the models that are compared


class Model(NamedTuple):
    """A model and how it is sampled: a row of a table. Both settings are JSON."""

    name: str
    erase: dict = {}  # what `erased_weights` takes on top of FLAGS; empty: nothing is erased
    sampling: dict = {}  # what `Context.draw` takes on top of SAMPLING
    retrained: str = ""  # the name of a model that was trained without the concept


def prompt_for(concept: str) -> str:
    """The prompt that names a concept: "star", "a picture in the style of dots"."""
    return f"a picture in the style of {concept}" if concept in STYLES else concept


def contexts_of(concept: str) -> dict[str, str]:
    """Prompts with a concept -> the same prompts without it.

    An object alone, in every second colour and in every second style: `evaluate.in_contexts` asks
    for the others. A style alone, and with every second object.
    """
    if concept in STYLES:
        contexts = {prompt_for(concept): "a picture"}
        for name in world.OBJECTS[::2]:
            contexts[f"{with_article(name)} in the style of {concept}"] = with_article(name)
        return contexts

    contexts = {concept: ""}
    for colour in [*world.COLOURS][::2]:
        contexts[with_article(f"{colour} {concept}")] = with_article(f"{colour} picture")
    for style in STYLES[::2]:
        contexts[with_article(f"{concept} in the style of {style}")] = prompt_for(style)
    return contexts


def esd_erasures(concept: str) -> dict[str, dict]:
    """The name of an ESD in the tables -> what `erased_weights` takes on top of FLAGS."""
    prompt = prompt_for(concept)
    esd_x = {"concepts": [prompt], "method": "esd-x"}
    esd_u = {"concepts": [prompt], "method": "esd-u"}
    paraphrase = world.PARAPHRASES.get(concept, (prompt,))[0]
    in_contexts = {"concepts": contexts_of(concept), "data": "in contexts"}

    found = {
        "ESD-x": esd_x,
        "ESD-u": esd_u,
        "ESD-u, the paper's rule": esd_u | {"method": "esd-u of the paper"},
        "ESD-u, eta 3": esd_u | {"eta": 3},
        "ESD-u, eta 10": esd_u | {"eta": 10},
        "by its name": esd_x,
        "by a paraphrase": esd_x | {"concepts": [paraphrase]},
        "x_t at every step of a trajectory": esd_x | {"data": "every step"},
        "x_t by the edited model, as in the paper": esd_x | {"data": "edited"},
        "x_t by the frozen model": esd_x | {"data": "frozen"},
        "learning rate falls to 0": esd_x | {"variant": "falling"},
        "weights and Adam in bfloat16": esd_x | {"variant": "bfloat16"},
        "keys and values only": esd_x | {"method": "esd-x-strict"},
        "ESD-u, its code's parameters": esd_u,
        "ESD-x, in contexts": esd_x | in_contexts,
        "ESD-u, in contexts": esd_u | in_contexts,
    }
    for count in (1, 2, 3):
        titles = [title.lower() for title in FAMILY[:count]]
        found[f"ESD-x, {count} erased"] = esd_x | {"concepts": titles, "data": "works"}
    return found


def other_erasures(concept: str) -> dict[str, dict]:
    """The name of another method in the tables -> what `erased_weights` takes on top of FLAGS."""
    prompt = prompt_for(concept)
    others = [other for other in (*world.OBJECTS, *STYLES) if other != concept]
    keep = [prompt_for(other) for other in others]
    is_style = concept in STYLES
    guide = {prompt: "a picture" if is_style else ""}
    anchor = {prompt: "a picture" if is_style else "circle"}

    return {
        "ESD-u against learned prompts": {
            "concepts": [prompt], "method": "esd-u", "variant": "adversarial", "keep": keep
        },
        "concept ablation": {
            "concepts": anchor, "method": "esd-x-strict", "data": "images of the anchor",
            "variant": "ablation",
        },
        "UCE": {"concepts": guide, "method": "uce", "keep": keep},
        "RECE": {"concepts": guide, "method": "rece", "keep": keep},
    }


def model_named(name: str, concept: str) -> Model:
    """Returns a model by its name in the tables; it erases or avoids the concept."""
    prompt = prompt_for(concept)
    models = [
        Model("original"),
        Model("negative prompt", sampling={"negative": prompt}),
        Model("censored training", retrained="censored"),
        Model("never saw it", retrained=f"without_{concept}"),
    ]
    for setting in safe_latent_diffusion.SETTINGS:
        models.append(Model(f"SLD-{setting}", sampling={"safe": prompt, "sld": setting}))
    for erased_by, settings in (esd_erasures(concept) | other_erasures(concept)).items():
        models.append(Model(erased_by, erase=settings))
    return {each.name: each for each in models}[name]


# ---- how erasures are made: what the names in their settings mean


CLOSED_FORMS = {"uce": uce.erase, "rece": rece.erase}
MORE_METHODS = {  # next to those of erase.py
    "esd-u of the paper": lambda name: "attn2" not in name,  # its code leaves out more
    "esd-x-strict": uce.keys_and_values,  # the code's name for it
}


def x_t_from_frozen(
    unet: Callable, texts: list[erase.Text], shape: tuple[int, ...], rng: Generator,
    frozen: nn.Module, steps: int = 50,
) -> Iterator[erase.Batch]:
    """Yields what `erase.x_t_from_model` does, drawn by the original model in place of `unet`."""
    return erase.x_t_from_model(frozen, texts, shape, rng, steps=steps)


def data_function(
    sd: StableDiffusion, name: str, concepts: list[str] | dict[str, str], steps: int
) -> Callable:
    """Returns what `erase.erase` takes as its `data`."""
    if name == "images of the anchor":
        images = sample.generate(sd, [*concepts.values()], 40, **SAMPLING)
        return functools.partial(concept_ablation.data, latents=sd.encode_images(images))
    if name == "works":
        images = {title.lower(): world.render_work(title) for title in world.WORKS}
        latents = sd.encode_images([images[concept] for concept in concepts])
        return functools.partial(erase.x_t_from_images, latents=latents, steps=steps)
    if name == "in contexts":
        return functools.partial(esd_in_contexts.data, sd=sd, contexts=concepts, steps=steps)
    if name == "frozen":
        return functools.partial(x_t_from_frozen, frozen=sd.unet, steps=steps)
    every_step = {"edited": False, "every step": True}[name]
    return functools.partial(erase.x_t_from_model, steps=steps, every_step=every_step)


def round_to_bfloat16(optimizer: torch.optim.Optimizer) -> None:
    """Rounds weights and Adam's state to what bfloat16 would have kept of them."""
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(tensor.bfloat16())


class RoundedAdam(torch.optim.Adam):
    """Adam whose weights and state are rounded to bfloat16 after each step."""

    def step(self) -> None:
        super().step()
        round_to_bfloat16(self)


class FallingAdam(torch.optim.Adam):
    """Adam whose learning rate falls in a straight line, to 0 after `iterations` steps."""

    def __init__(self, theta, lr: float, iterations: int):
        super().__init__(theta, lr)
        self.first_lr = lr
        self.iterations = iterations
        self.done = 0

    def step(self) -> None:
        for group in self.param_groups:
            group["lr"] = self.first_lr * (1 - self.done / self.iterations)
        super().step()
        self.done += 1


def erased_weights(
    sd: StableDiffusion, concepts: list[str] | dict[str, str], method: str, data: str = "",
    variant: str = "", keep: tuple[str, ...] = (), steps: int = 50, **settings,
) -> dict[str, Tensor]:
    """Returns theta by name, as `erase.erase` does, from settings that are JSON.

    variant: "falling", the learning rate falls to 0; "bfloat16", each step is rounded to it;
    "ablation", the loss of concept ablation; "adversarial", ESD against learned prompts.
    """
    if method in CLOSED_FORMS:
        return CLOSED_FORMS[method](sd, concepts, keep=keep)

    settings["method"] = MORE_METHODS.get(method, method)
    settings["data"] = data_function(sd, data, concepts, steps=steps)
    if variant == "falling":
        settings["optimizer"] = functools.partial(FallingAdam, iterations=settings["iterations"])
    elif variant == "bfloat16":
        settings["optimizer"] = RoundedAdam
    elif variant == "ablation":
        settings["loss_fn"] = concept_ablation.loss
    elif variant == "adversarial":
        settings["loss_fn"] = functools.partial(adversarial_esd.loss, steps=10)  # to save time
        settings["data"] = functools.partial(
            adversarial_esd.data, sd=sd, keep=keep, steps=steps, every_step=True
        )

    if data == "in contexts":
        concepts = [*concepts]  # the prompts without their contexts
    return erase.erase(sd, concepts, **settings)


# ---- the miniature, its judge, and what all cells have in common


def fingerprint(network: nn.Module) -> str:
    """Returns a checksum of all weights, which tells models apart."""
    crc = 0
    for weight in network.parameters():
        crc = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


class Context(NamedTuple):
    """What all cells have in common; it loads the models and draws with them."""

    sd: StableDiffusion
    judge: judging.Judge
    weights: dict[str, str]  # fingerprints: "unet", "judge", and of each retrained U-Net by name
    run: Path  # where erased weights are kept
    num: int  # images of each class
    iterations: int

    def settings(self, model: Model) -> dict:
        """Returns the arguments of `erased_weights` for it."""
        if not model.erase or model.erase["method"] in CLOSED_FORMS:
            return model.erase

        rate = RATES["esd-x" if model.erase["method"].startswith("esd-x") else "esd-u"]
        erases_style = "style of" in next(iter(model.erase["concepts"]))
        is_slow = erases_style or model.erase.get("variant") == "ablation"
        iterations = self.iterations * (3 if is_slow else 1)
        return FLAGS | {"lr": rate, "iterations": iterations} | model.erase

    def erased(self, model: Model) -> Path:
        """Returns the file of its weights; an erasure is made when it is first asked for."""
        settings = self.settings(model)
        text = json.dumps([self.weights["unet"], settings], sort_keys=True)
        file = self.run / f"{zlib.crc32(text.encode()):08x}.safetensors"
        if not file.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            theta = erased_weights(self.sd, **settings)
            seconds = time.perf_counter() - began
            erase.save(theta, file, settings=settings | {"seconds": seconds}, sd=self.sd)
        return file

    def load(self, model: Model) -> StableDiffusion:
        """Returns a model with its weights."""
        if model.erase:
            return sample.load_erased(self.sd, self.erased(model))
        return self.retrained(model.retrained) if model.retrained else self.sd

    def retrained(self, name: str) -> StableDiffusion:
        """Loads a model that was trained without a concept."""
        return sample.load(RETRAINED[name])

    def cost(self, model: Model) -> dict:
        """Returns the seconds that an erasure took, and how many parameters it changes."""
        tensors, metadata = sample.read_tensors(self.erased(model))
        return {
            "seconds": json.loads(metadata["settings"])["seconds"],
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
        }

    def draw(self, sd: StableDiffusion, sampling: dict, prompts: list[str]) -> list[Image.Image]:
        """Returns one image of each prompt, each from a seed of its own."""
        settings = SAMPLING | sampling
        if "safe" in settings:
            settings["predictor"] = functools.partial(
                safe_latent_diffusion.SafePredictor,
                concept=sd.encode([settings.pop("safe")]),
                safety=safe_latent_diffusion.SETTINGS[settings.pop("sld")],
            )
        seeds = [SEED + i for i in range(len(prompts))]
        return sample.generate(sd, prompts, seed=seeds, **settings)


@functools.cache
def open_context(folder: Path, run: Path, num: int, iterations: int) -> Context:
    """Loads the models; cached, so a process loads them once."""
    sd = sample.load(folder)
    judge = judging.load(folder)
    weights = {"unet": fingerprint(sd.unet), "judge": fingerprint(judge)}
    for name, retrained in RETRAINED.items():
        if (retrained / "unet").exists():  # it is trained
            weights[name] = fingerprint(sample.load(retrained).unet)
    return Context(sd, judge, weights=weights, run=run, num=num, iterations=iterations)
