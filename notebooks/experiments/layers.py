"""Where the erasure sits (beyond the paper): which of the edited weights do the erasing?

The edited tensors of one group are put into the original (`only these`), and the original's back
into the edited model (`all but these`). Groups are kinds of layers, blocks of the U-Net, and
thirds of the sampling: there, one model makes three or four of the ten steps and the other one
the rest. What a group does is counted in points, with the same noises before and after:

- **erases alone**: how many points fewer of the original's images show the concept once this group
  is edited;
- **brings back**: how many points more of the edited model's images do once this group is as it
  was.

The first line of each model is all of its weights. Images are 20 by name and one for each wording
of the held-out scenes, so shares differ a little from other tables'. A group can matter for its
size alone, so the number of its weights is there. Does self-attention decide what prompts only
imply ([arXiv 2604.06052](https://arxiv.org/abs/2604.06052))? ESD-u can compare it with ResNet
blocks, but not with cross-attention, which ESD-x alone edits.

The second table is about the change itself, theta - theta*: how large it is, next to the
weights, and which share of its squared norm lies along its first 1, 4 and 16 singular directions.
(A matrix with 64 rows has at least 25 % along its first 16.)
"""

import functools
import statistics
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import ddim
import sample
from notebooks.experiments import core, figures, models, stats
from notebooks.experiments.core import Answers, Ask, Cell, Context, Model
from notebooks.experiments.stats import Interval, Share
from notebooks.toy import world
from notebooks.toy.world import with_article
from sample import StableDiffusion

MODELS = [models.esd_x(), models.esd_u()]
CONCEPTS = ("star", "heart")  # that scenes imply
SEEDS = core.SEEDS
FINDINGS = """\
- By name, both erasures need the middle of the U-Net. With the original mid block put back, 93 of
  96 points return after ESD-x, and 83 of 90 after ESD-u. Alone, ESD-x's mid block, a fifth of its
  weights, erases 48 (6 to 91): 85 of the star and 12 of the heart; ESD-u's 20, likewise uneven.
- Alone, no kind of layer in ESD-u erases more than 5 points of the name; but with the ResNet blocks
  as they were, 76 of 90 points come back, and with the feed-forward layers 47. The parts erase
  together.
- Of what scenes imply, the ResNet blocks, which have most of the weights, alone erase 40 of 61
  points. Self-attention erases 10 (1 to 19), and with it as it was 2 come back: ESD-u hardly needs
  it to erase what prompts imply. (Nor does it need the feed-forward layers, which are larger, for
  these prompts. And this can't tell what the original uses self-attention for.) Self-attention has
  few weights, but "other layers" (convolutions and norms outside of all these kinds) have hardly
  more and erase 18.
- Alone, thirds of the steps erase 1 to 10 points of the name. Only ESD-u's last third erases 25,
  most of it in two erasures of the heart. But one third drawn by the original is enough to bring
  back 25 to 80 points. In scenes, each third of ESD-u's erases 21 to 29 of 61 points alone.
- ESD-x changes its weights by 11 % of their norm, and 94 % of the change's square is along four
  directions of each matrix. ESD-u changes its own by 2 to 3 %, and about half of that is along four
  (of self-attention's, two thirds).
- Six erasures of each kind: two concepts, three seeds.
"""

BY_NAME = "by name"
IN_SCENES = "in scenes"
OUTSIDE = "outside of blocks"
ONLY = "only these"
ALL_BUT = "all but these"
EFFECTS = {ONLY: "erases alone", ALL_BUT: "brings back"}
KINDS = {  # of layers; the first that fits
    "cross-attention": ".attn2.",
    "self-attention": ".attn1.",
    "feed-forward": ".ff.",
    "ResNet blocks": ".resnets.",
    "other layers": "",
}
THIRDS = {  # of the sampling: from the first t to the last
    "first third of the steps": (999, 667),
    "second third": (666, 334),
    "last third": (333, 0),
}
POINTS = Interval(-100, 100)
DIRECTIONS = (1, 2, 4, 8, 16, 32, 64)  # up to which squares are added up
SHOWN = (1, 4, 16)


# ---- groups of tensors


def kind_of_layer(name: str) -> str:
    """Returns the kind of the layer that a tensor is in."""
    return next(kind for kind, part in KINDS.items() if part in name)


def block_of(name: str) -> str:
    """Returns the block that a tensor is in: "down 0", "mid", "up 1", or "outside of blocks"."""
    place, number, *_ = name.split(".")
    if place in ("down_blocks", "up_blocks"):
        return f"{place.removesuffix('_blocks')} {number}"
    return "mid" if place == "mid_block" else OUTSIDE


def groups_of(names: list[str]) -> dict[str, list[str]]:
    """Returns the edited tensors' names by group: kinds first, then blocks."""
    groups = {}
    for group_of in (kind_of_layer, block_of):
        for name in names:
            groups.setdefault(group_of(name), []).append(name)
    return groups


def at_times(
    unet: Callable, text: Tensor, null: Tensor, guidance: float,
    other: Callable, times: tuple[int, int],
) -> Callable:
    """Returns a predictor as `ddim.guided_predictor` does: `other` from the first t to the last."""
    first, last = times
    usual = ddim.guided_predictor(unet, text, null, guidance=guidance)
    special = ddim.guided_predictor(other, text, null, guidance=guidance)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        chosen = special if first >= int(t) >= last else usual
        return chosen(x_t, t)

    return predict


# ---- the change


class Change(NamedTuple):
    """What an erasure does to a matrix, or to several on average."""

    size: float  # |theta - theta*| / |theta*|
    along: tuple[float, ...]  # shares of its square in its first 1, 2, 4, ... directions


def change_of(before: Tensor, after: Tensor) -> Change:
    """Returns what changed from one matrix, (out, in, ...), to another."""
    difference = (after - before).flatten(start_dim=1).double()
    squares = torch.linalg.svdvals(difference).square()
    along = [(squares[:num].sum() / squares.sum()).item() for num in DIRECTIONS]
    return Change(size=(difference.norm() / before.double().norm()).item(), along=(*along,))


def mean_of(several: list[Change]) -> Change:
    """Returns the mean."""
    along = zip(*(each.along for each in several))
    return Change(
        size=statistics.fmean(each.size for each in several),
        along=tuple(map(statistics.fmean, along)),
    )


# ---- what is asked


def prompts_that_imply(concept: str) -> list[str]:
    """Returns the held-out prompts that imply an object."""
    prompts = []
    for scene, setting in world.HELD_OUT:
        if world.SCENES[scene].object == concept:
            prompts += [world.scene_prompt(scene, setting, each) for each in world.OPENINGS]
    return prompts


def seen_in(
    context: Context, sd: StableDiffusion, cell: Cell, **settings
) -> dict[str, str]:
    """Returns what the judge sees, a letter an image, by where the concept is asked for."""
    concept = cell.ask.about
    prompts = {
        BY_NAME: [with_article(concept)] * context.num(20),
        IN_SCENES: prompts_that_imply(concept)[: context.num(100)],
    }
    letters = {}
    for where, asked in prompts.items():
        seeds = core.image_seeds(cell.seed, len(asked))
        images = sample.generate(sd, asked, seed=seeds, **core.SAMPLING, **settings)
        letters[where] = core.to_letters(context.judge, images)["object"]
    return letters


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Change]:
    """Returns the mean change of the matrices of each kind of layer, if there are any."""
    of_kind = {}
    for name, tensor in before.items():
        if tensor.dim() > 1 and not torch.equal(tensor, after[name]):
            change = change_of(tensor, after[name])
            of_kind.setdefault(kind_of_layer(name), []).append(change)
    return {kind: mean_of(several) for kind, several in of_kind.items()}


def patch(context: Context, sd: StableDiffusion, cell: Cell) -> dict:
    """Returns what the judge sees with each group patched, and how the weights changed."""
    look = functools.partial(seen_in, context, cell=cell)
    original = {name: sample.unet_tensors(context.sd)[name] for name in sorted(sd.edited)}
    edited = {name: sample.unet_tensors(sd)[name] for name in original}

    only = {"none": look(context.sd)}
    all_but = {"none": look(sd)}
    groups = groups_of([*original])
    weights = {group: sum(original[n].numel() for n in groups[group]) for group in groups}
    if context.quick:
        groups = dict([*groups.items()][:1])
    for group, names in groups.items():
        only[group] = look(sample.with_weights(context.sd, {n: edited[n] for n in names}))
        all_but[group] = look(sample.with_weights(sd, {n: original[n] for n in names}))
    for third, times in THIRDS.items():
        into = functools.partial(at_times, other=sd.unet, times=times)
        back = functools.partial(at_times, other=context.sd.unet, times=times)
        only[third] = look(context.sd, predictor=into)
        all_but[third] = look(sd, predictor=back)
    change = {kind: each._asdict() for kind, each in changes(original, edited).items()}
    return {ONLY: only, ALL_BUT: all_but, "weights": weights, "change": change}


def patches(concept: str) -> Ask:
    """Returns what asks for all patches of a concept's erasure."""
    uses = (prompts_that_imply, at_times)
    return Ask(f"patches for {concept}", answer=patch, uses=uses, about=concept)


def cells(models, concepts, seeds) -> list[Cell]:
    found = []
    for concept in concepts:
        erased = core.as_tuple(concept)
        asks = [patches(each) for each in erased if prompts_that_imply(each)]
        about_one = [model for model in models if model.is_about_a_concept]
        found += core.grid(about_one, [erased], asks=asks, seeds=seeds)
    return found


# ---- the tables and the figure


def found_for(answers: Answers, model: Model) -> dict[tuple[str, int], dict]:
    """Returns a model's answers by concept and seed."""
    found = {}
    for concept in CONCEPTS:
        ask = patches(concept)
        for seed in answers.seeds(model, concept, ask):
            found[concept, seed] = answers.get(model, concept, ask, seed=seed)
    return found


def share_with(answer: dict, concept: str, how: str, group: str, where: str) -> Share:
    """Returns how often the concept is seen with a group patched; "none": as the model is."""
    seen = core.from_letters({"object": answer[how][group][where]}, "object")
    return Share(seen.count(concept), len(seen))


def effects(
    found: dict[tuple[str, int], dict], how: str, group: str, where: str
) -> list[float]:
    """Returns what a group does in each erasure, in percent points: see above.

    "none": what all weights together do, either way.
    """
    points = []
    for (concept, _), answer in found.items():
        if group not in answer[how]:
            continue
        original, edited = (
            share_with(answer, concept, each, group="none", where=where)
            for each in (ONLY, ALL_BUT)
        )
        patched = share_with(answer, concept, how, group=group, where=where)
        if group == "none":
            difference = original.hits - edited.hits
        elif how == ONLY:
            difference = original.hits - patched.hits
        else:
            difference = patched.hits - edited.hits
        points.append(100 * difference / patched.asked)
    return points


def groups_in(found: dict[tuple[str, int], dict]) -> list[str]:
    """Returns the groups that were patched, in a fixed order."""
    groups = {group for answer in found.values() for group in answer[ONLY]}
    blocks = sorted(groups - {"none", *KINDS, *THIRDS, OUTSIDE})
    return [group for group in ("none", *KINDS, *blocks, OUTSIDE, *THIRDS) if group in groups]


def size_of(answer: dict, group: str) -> int:
    """Returns how many weights a group has; 0 for a third of the sampling."""
    sizes = answer["weights"]
    return sum(sizes.get(kind, 0) for kind in KINDS) if group == "none" else sizes.get(group, 0)


def table_of_patches(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model and group."""
    rows = []
    for model in models:
        found = found_for(answers, model)
        for group in groups_in(found):
            cells = []
            for how in (ONLY, ALL_BUT):
                for where in (BY_NAME, IN_SCENES):
                    points = effects(found, how, group=group, where=where)
                    cells.append(stats.number(points, within=POINTS))
            size = size_of(next(iter(found.values())), group)
            shown = f"{size:,}" if size else ""
            rows.append([model.label, group.replace("none", "**all**"), shown, *cells])
    header = ["erased by", "group", "weights"]
    for effect in EFFECTS.values():
        header += [f"{effect}, {where}, points" for where in (BY_NAME, IN_SCENES)]
    return core.table(header, rows)


def table_of_changes(answers: Answers, models: list[Model]) -> str:
    """Returns a row for each model and kind: means over erasures, each over its matrices."""
    rows = []
    for model in models:
        by_kind = {}
        for answer in found_for(answers, model).values():
            for kind, change in answer["change"].items():
                by_kind.setdefault(kind, []).append(Change(**change))
        for kind in [kind for kind in KINDS if kind in by_kind]:
            changes = by_kind[kind]
            cells = [stats.number([100 * change.size for change in changes])]
            for num in SHOWN:
                shares = [100 * change.along[DIRECTIONS.index(num)] for change in changes]
                cells.append(stats.number(shares, digits=0, within=stats.PERCENT))
            rows.append([model.label, kind, *cells])
    header = ["erased by", "layers", "change, % of the weights' norm"]
    header += [f"along its first {num}, % of its squared norm" for num in SHOWN]
    return core.table(header, rows)


def table(answers: Answers, models: list[Model]) -> str:
    """Returns a table of patches, and one of the change itself."""
    return "\n\n".join(make(answers, models) for make in (table_of_patches, table_of_changes))


def figure(answers: Answers, models: list[Model]) -> figures.Figure:
    """Returns a panel for each effect and way to ask: a row for each model and group."""
    panels = {}
    for how, effect in EFFECTS.items():
        for where in (BY_NAME, IN_SCENES):
            panel = {}
            for model in models:
                found = found_for(answers, model)
                for group in groups_in(found):
                    points = effects(found, how, group=group, where=where)
                    row = f"{model.label}: {group.replace('none', 'all')}"
                    panel[row] = stats.student(points, POINTS)
            if panel:
                panels[f"{effect}, {where}, points"] = panel
    return figures.estimates(panels)
