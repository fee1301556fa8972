"""The models that several experiments compare, and their settings on the miniature.

One protocol chose the learning rate of every method that has one (SPEED: the threshold): as
many gradient steps as ESD has with whole trajectories, 160, and of four rates the one with
the largest harmonic mean of erased and kept, on the star with seed 0, 20 images of it and
10 of each other object.

Exceptions: UCE and RECE have their files' defaults. ESD-x has half of these steps, 80, at each
of a trajectory's first times, and a rate that cost.py compares. ESD-u with the empty prompt
kept has two aims and 240 steps, concept ablation 480. Forget-Me-Not and SPM did nothing useful
as published, and were tried in a second form. For a style, all of these take three times as
many steps; a stranger's method doesn't, unless it is told to. Settings that aren't here are the
files' defaults.
"""

import functools
import json
from pathlib import Path

import erase
from notebooks.experiments import core
from notebooks.experiments.core import STYLES, Model, prompt_for
from notebooks.methods import (
    adversarial_esd,
    concept_ablation,
    esd,
    esd_in_contexts,
    esd_odds,
    forget_me_not,
    keep_empty_prompt,
    key_steps,
    rece,
    salun,
    speed,
    spm,
    uce,
)
from notebooks.toy import world
from notebooks.toy.world import with_article

FLAGS = Path(__file__).parents[1] / "toy" / "flags"


def flags() -> dict:
    """Returns notebooks/toy/flags as settings of `esd.erase`: all but the model.

    Its data are those of key_steps.py: half of a trajectory's steps.
    """
    settings = {}
    for flag in FLAGS.read_text().split():
        name, _, value = flag.removeprefix("--").partition("=")
        settings[name] = value
    del settings["model"], settings["data"]
    settings = {name: json.loads(value) for name, value in settings.items()}
    return settings | {"first": settings["steps"] // 2}


def arguments(settings: dict) -> dict:
    """Returns settings of `esd.erase` as arguments of `erase.erase`, for code of your own.

    What x_t takes is bound to data; the method is left to the caller.
    """
    given = {key: value for key, value in settings.items() if key != "method"}
    steps = given.pop("steps")
    first = given.pop("first")
    every_step = given.pop("every_step", False)
    if first is None:
        data = functools.partial(erase.x_t_from_model, steps=steps, every_step=every_step)
    else:
        data = functools.partial(key_steps.data, steps=steps, first=first)
    return given | {"data": data}


def contexts_of(concepts: tuple[str, ...]) -> dict[str, str]:
    """Returns prompts with each concept -> the same prompts without it.

    An object alone, in every second colour and in every second style: `core.contexts`
    asks for the others. A style alone, and with every second object.
    """
    contexts = {}
    for concept in concepts:
        contexts[prompt_for(concept)] = "a picture" if concept in STYLES else ""
        if concept in STYLES:
            for name in world.OBJECTS[::2]:
                contexts[f"{with_article(name)} in the style of {concept}"] = with_article(name)
            continue
        for colour in [*world.COLOURS][::2]:
            contexts[with_article(f"{colour} {concept}")] = with_article(f"{colour} picture")
        for style in STYLES[::2]:
            contexts[f"{with_article(concept)} in the style of {style}"] = prompt_for(style)
    return contexts


def to_another(concepts: tuple[str, ...]) -> dict[str, str]:
    """Returns {prompt: anchor}: for an object, another object, as concept ablation has it.

    With "a picture" for its anchor, it keeps half of the other objects only.
    """
    anchors = {}
    for concept in concepts:
        other = "square" if concept == "circle" else "circle"
        anchors[prompt_for(concept)] = other if concept in world.OBJECTS else "a picture"
    return anchors


ESD_X = flags()
# Every step of a whole trajectory: as many noises need twice the gradient steps. Without
# them, ESD-u leaves three times as much. It tunes more tensors, so smaller steps are enough.
WHOLE_X = ESD_X | {"first": None, "every_step": True, "iterations": 160, "lr": 4e-4}
ESD_U = WHOLE_X | {"method": "esd-u", "lr": 7e-5}


def esd_x(label: str = "ESD-x", **settings) -> Model:
    """Returns ESD-x with settings of its own."""
    return Model(label, esd.erase, ESD_X | settings)


def esd_u(label: str = "ESD-u", **settings) -> Model:
    """Returns ESD-u with settings of its own."""
    return Model(label, esd.erase, ESD_U | settings)


def kept(label: str = "ESD-u, empty prompt kept", **settings) -> Model:
    """Returns ESD-u that keeps the empty prompt: a step has two aims, so half as many again."""
    iterations = ESD_U["iterations"] * 3 // 2
    return Model(label, keep_empty_prompt.erase, ESD_U | {"iterations": iterations} | settings)


original = core.original
negative_prompt = Model("negative prompt", sampling={"avoid": "negative prompt"})
slds = [
    Model(f"SLD-{name}", sampling={"avoid": name}) for name in ("weak", "medium", "strong", "max")
]
sld_medium = slds[1]
sld_max = slds[3]

# trained, not erased: replicates.py trains them
censored = Model("censored training", folder="runs/censored/model")
never_saw = Model(
    "never saw it", folder="runs/never_saw/{concept}_{seed}/model", seeds=(0, 1)
)
again = Model("original, trained again", folder="runs/original_{seed}/model", seeds=(1, 2))

in_contexts_x = Model("ESD-x, in contexts", esd_in_contexts.erase, ESD_X, prompts=contexts_of)
in_contexts_u = Model("ESD-u, in contexts", esd_in_contexts.erase, ESD_U, prompts=contexts_of)
adversarial = Model(
    "ESD-u against learned prompts", adversarial_esd.erase, ESD_U | {"attack_steps": 10}
)
by_odds = Model("ESD-u, eta by the odds", esd_odds.erase, ESD_U)
ablation = Model(
    "concept ablation", concept_ablation.erase,
    {
        "lr": WHOLE_X["lr"], "batch": WHOLE_X["batch"], "iterations": 3 * WHOLE_X["iterations"],
        "images": 200, "image_steps": 10, "image_guidance": 5.0,
    },
    prompts=to_another,
)
uce_ = Model("UCE", uce.erase)
rece_ = Model("RECE", rece.erase)
speed_ = Model("SPEED", speed.erase, {"threshold": 10.0})
closed_forms = (uce_, rece_, speed_)  # the same weights with every seed


def depends_on_seed(model: Model) -> bool:
    """Whether a model's weights differ from seed to seed, and not its images alone."""
    return bool(model.method or model.folder) and model not in closed_forms


# As many gradient steps as ESD with whole trajectories
ESD_STEPS = {name: WHOLE_X[name] for name in ("iterations", "batch", "steps", "every_step")}
salun_ = Model("SalUn", salun.erase, ESD_STEPS | {"lr": 1.5e-4})
forget_me_not_ = Model(  # the published form, all weights and the end token, erases everything
    "Forget-Me-Not", forget_me_not.erase, ESD_STEPS | {"method": "esd-x", "end": False, "lr": 1e-4}
)
spm_ = Model(  # the published strength, 1000, leaves everything
    "SPM", spm.erase, ESD_STEPS | {"strength": 1.0, "lr": 6.4e-3}
)

compared = [  # that change weights: measured by methods.py, attacked by robust.py
    esd_x(),
    in_contexts_x,
    esd_u(),
    in_contexts_u,
    kept(),
    adversarial,
    ablation,
    uce_,
    rece_,
    speed_,
    salun_,
]
