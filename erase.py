"""ESD: erases a concept from Stable Diffusion by fine-tuning its U-Net, without an image.

    python erase.py "Van Gogh" --out van-gogh.safetensors

Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2303.07345. Equations and symbols are the paper's: c the concept,
null the empty prompt, x_t the latent at time t, eps the noise in it, eta the strength.

    frozen    eps_theta*, the original U-Net: sd.unet
    unet      eps_theta, the edited one
    theta     the tuned weights, a dict {name: tensor}
"""

import argparse
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import zlib
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from tqdm import tqdm

import ddim
import sample
from sample import StableDiffusion, UsageError

METHODS: dict[str, Callable[[str], bool]] = {  # which weights are tuned (section 4.1)
    # cross-attention only: it is where the words of a prompt come in
    "esd-x": lambda name: "attn2" in name,
    # all but cross-attention, time embedding and output layers, as in the paper's code
    "esd-u": lambda name: "attn2" not in name
    and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out.")),
}
SCALE = 2.0**12  # of the loss in backward(): fewer float16 gradients round to 0
SAVE_EVERY = 50  # iterations between two checkpoints


class Text(NamedTuple):
    """The text features of one concept, (B, 77, 768) each."""

    concept: Tensor  # c
    null: Tensor
    anchor: Tensor  # what x_t is drawn for: by default c. Some losses make c become it
    index: int = 0  # of the concept, where several are erased


class Batch(NamedTuple):
    """What one gradient step is computed on."""

    x_t: Tensor  # (B, 4, H, W)
    t: Tensor  # (B,)
    text: Text


# ---- the loss (section 4, Eq. 6)


def esd_target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """Eq. 6: eps_theta*(x_t, t) - eta * [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)]."""
    return eps_null - eta * (eps_c - eps_null)


def esd_loss(unet: Callable, frozen: Callable, x_t: Tensor, t: Tensor, text: Text,
             eta: float = 1.0) -> Tensor:
    """Eq. 6 as a loss, (B,): the mean square of eps_theta(x_t, c, t) - target over each sample.
    unet and frozen take (x_t, t, c), c one of the features in text; x_t is (B, 4, H, W), t is (B,).
    """
    with torch.no_grad():
        target = esd_target(frozen(x_t, t, text.null), frozen(x_t, t, text.concept), eta)
    eps = unet(x_t, t, text.concept)
    return (eps - target).square().mean(dim=(1, 2, 3))


# ---- where x_t comes from


@torch.no_grad()  # inside the generator only: the caller computes with gradients
def x_t_from_model(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    steps: int = 50, guidance: float = 3.0, every_step: bool = False,
    denoise: Callable = ddim.denoise,
) -> Iterator[Batch]:
    """Yields x_t that unet, in the paper eps_theta, denoised to a random t (section 4).

    Each trajectory is for one random concept; all x_t in a batch share it and t, one of `steps`.
    steps, guidance: the defaults are the code's, as the paper gives none. every_step: yields
    every x_t of a trajectory, not just one. Cheaper, but each step has a newer theta.
    """
    while True:
        text = texts[torch.randint(len(texts), (1,), generator=rng).item()]
        last = steps - 1
        if not every_step:
            last = torch.randint(steps, (1,), generator=rng).item()
        noise = torch.randn(shape, generator=rng).to(text.null.device)

        predict = ddim.guided_predictor(unet, text.anchor, text.null, guidance)
        # the rest of the trajectory isn't needed, and so never computed
        trajectory = itertools.islice(denoise(predict, noise, steps, rng), last + 1)
        for i, (t, x_t) in enumerate(trajectory):
            if every_step or i == last:
                yield Batch(x_t, torch.full(shape[:1], t, device=x_t.device), text)


def x_t_from_images(
    unet: Callable, texts: list[Text], shape: tuple[int, ...], rng: Generator,
    latents: Tensor, steps: int = 50,
) -> Iterator[Batch]:
    """Yields x_t that are memorised images, noised to a random t (section 5.4).

    latents: an image for each of the texts, (len(texts), 4, H, W). unet isn't used. All x_t
    in a batch share the image and t, a random one of the sampler's `steps` times.
    """
    abar = ddim.alphas_cumprod()
    while True:
        i = torch.randint(len(texts), (1,), generator=rng).item()
        t = ddim.timesteps(steps)[torch.randint(steps, (1,), generator=rng).item()]
        noise = torch.randn(shape, generator=rng).to(latents.device)

        x_t = ddim.add_noise(latents[i].expand(shape), noise, abar[t])
        yield Batch(x_t, torch.full(shape[:1], t, device=x_t.device), texts[i])


# ---- theta, and the model with it


def trainable_copies(
    unet: nn.Module, method: str | Callable[[str], bool]
) -> dict[str, Tensor]:
    """Returns theta: float32 copies, by name, of what a method or a predicate tunes."""
    is_tuned = METHODS[method] if isinstance(method, str) else method
    theta = {}
    for name, parameter in unet.named_parameters():
        name = name.removeprefix("_orig_mod.")  # of a compiled U-Net
        if is_tuned(name):
            # in bfloat16, most of Adam's steps of 1e-5 would round to nothing
            copied = parameter.detach().to(torch.float32, copy=True)
            theta[name] = copied.requires_grad_()
    return theta


def with_theta(frozen: nn.Module, theta: dict[str, Tensor] | Callable) -> Callable:
    """Returns unet(x_t, t, c): `frozen`, called with the newest theta, cast to its dtype.

    theta: a dict, or a function that returns one, such as theta* + up @ down for a LoRA.
    Both models are one module: a hook or an adapter on it acts on theta* too, and the loss
    still looks right. To change one of them, put it on a copy.deepcopy of the module.
    """
    dtype = next(frozen.parameters()).dtype
    prefix = "_orig_mod." if hasattr(frozen, "_orig_mod") else ""  # of a compiled U-Net
    names = {name for name, _ in frozen.named_parameters()}

    def unet(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        newest = theta() if callable(theta) else theta
        weights = {prefix + name: tensor.to(dtype) for name, tensor in newest.items()}
        if unknown := weights.keys() - names:
            raise UsageError(f"the U-Net has no weights named {', '.join(unknown)}")
        return torch.func.functional_call(frozen, weights, (x_t, t, c))

    return unet


# ---- the training loop


def gradient_steps(
    unet: Callable, frozen: Callable, data: Iterator[Batch], optimizer: torch.optim.Optimizer,
    loss_fn: Callable = esd_loss, eta: float = 1.0,
) -> Iterator[float]:
    """Takes a gradient step on each batch of data, and yields its loss, as a number."""
    for x_t, t, text in data:
        x_t = x_t.detach()  # no gradient reaches what drew it
        losses = loss_fn(unet, frozen, x_t, t, text, eta)  # (B,)
        if losses.shape != (len(x_t),) or not losses.requires_grad:
            raise UsageError(f"the loss isn't ({len(x_t)},) with a gradient: {losses}")
        loss = losses.mean()
        if not loss.isfinite():
            raise UsageError(f"the loss at t = {t.tolist()} isn't finite: lower lr or eta")

        optimizer.zero_grad()
        (SCALE * loss).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= SCALE
        optimizer.step()
        torch.clear_autocast_cache()  # of a caller's autocast: it has the old theta
        yield loss.item()


# ---- what `erase` is given


def check_concepts(concepts: list[str]) -> None:
    """Raises UsageError if there are none, or an empty one, or duplicates."""
    if not all(concept.strip() for concept in concepts) or not concepts:
        raise UsageError(f"name at least one concept, and none that is blank: {concepts}")
    for concept in concepts:
        if concepts.count(concept) > 1:
            raise UsageError(f"{concept!r} is given twice")


def texts_for(sd: StableDiffusion, concepts: list | dict | Tensor, batch: int) -> list[Text]:
    """Returns a Text of `batch` rows for each concept. Raises UsageError.

    concepts: prompts; {prompt: anchor}, x_t being drawn for the anchor; or features,
    (C, 77, 768).
    """
    if isinstance(concepts, Tensor):
        features = anchors = concepts
    else:
        prompts = [concepts] if isinstance(concepts, str) else [*concepts]
        check_concepts(prompts)
        features = anchors = sd.encode(prompts)  # (C, 77, 768)
        if isinstance(concepts, dict):
            anchors = sd.encode([*concepts.values()])

    null = sd.encode([""] * batch)  # (B, 77, 768)
    if features.shape[1:] != null.shape[1:]:
        raise UsageError(f"concepts have the shape {tuple(features.shape)}, not (C, 77, 768)")
    texts = []
    for i, (c, anchor) in enumerate(zip(features, anchors)):
        texts.append(Text(c.expand_as(null), null, anchor.expand_as(null), index=i))
    return texts


# ---- a run that can be resumed


def setting_to_text(value: object) -> str:
    """Returns a setting as text, to compare two runs by; for a function, its source.

    What a function refers to (a closure's variables, other functions) isn't in it, nor
    are a module's weights.
    """
    if isinstance(value, functools.partial):
        bound = {name: setting_to_text(each) for name, each in value.keywords.items()}
        return f"{setting_to_text(value.func)} with {value.args} and {bound}"
    if isinstance(value, StableDiffusion):
        return f"a model with the numbers {sample.fingerprint(value)}"
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().float().numpy()
        return f"a tensor {numbers.shape} with the checksum {zlib.crc32(numbers.tobytes())}"
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # defined in a REPL, or not a function
        return str(value)


def save_checkpoint(path: Path, settings: dict[str, str], done: int, theta: dict[str, Tensor],
                    optimizer: torch.optim.Optimizer, rng: Generator) -> None:
    """Writes the state of a run after `done` iterations."""
    state = {
        "settings": settings,
        "done": done,
        "theta": theta,
        "optimizer": optimizer.state_dict(),
        "rng": rng.get_state(),
    }
    try:
        sample.write_whole(path, lambda part: torch.save(state, part))
    except RuntimeError as error:  # what torch raises if the disk is full
        raise OSError(f"{path} can't be written: {error}") from error


def load_checkpoint(path: Path, settings: dict[str, str], theta: dict[str, Tensor],
                    optimizer: torch.optim.Optimizer, rng: Generator) -> int:
    """Puts the state of a run in place and returns how many iterations were done.

    Safetensors can't hold an optimizer's state, which is a nest of dicts. So this is
    torch.load, which with weights_only runs no code. Raises UsageError if a setting
    differs.
    """
    try:
        state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} is damaged, delete it: {error}") from error
    for name, value in settings.items():
        saved = state["settings"].get(name, "")
        if saved != value:
            values = f": {saved}, not {value}" if len(saved + value) < 200 else ""
            raise UsageError(f"{path} belongs to a run with a different {name}{values}")

    for name, tensor in theta.items():
        tensor.data.copy_(state["theta"][name])
    optimizer.load_state_dict(state["optimizer"])
    rng.set_state(state["rng"])
    return state["done"]


# ---- all of it together


def erase(
    sd: StableDiffusion, concepts: list[str] | dict[str, str] | Tensor,
    method: str | Callable[[str], bool] = "esd-x", eta: float = 1.0, lr: float = 1e-5,
    iterations: int = 1000, batch: int = 1, seed: int = 0,
    loss_fn: Callable = esd_loss, data: Callable = x_t_from_model,
    optimizer: Callable = torch.optim.Adam, frozen: Callable | None = None,
    on_step: Callable | None = None, checkpoint: Path | None = None,
) -> dict[str, Tensor]:
    """Runs ESD and returns theta; `sd` isn't changed.

    The defaults are the paper's values, or its code's where the paper gives none. theta, its
    gradients and Adam's state are float32; the U-Net computes in sd's dtype, by default half
    precision on a GPU, where the paper's code of 2023 has float32.

    concepts: as `texts_for` takes them.
    data: called with (unet, texts, shape, rng); its other arguments are bound with
    partial.
    optimizer: called with (name, tensor) pairs and lr, as torch's are.
    frozen: the U-Net that the target is computed from; by default, sd's.
    on_step: called with (iteration, loss, theta) after each; stops the run by returning
    True.
    checkpoint: a file to which the run is saved every 50 iterations; with it, a bar shows
    the progress. If it exists, the run resumes from it: exactly, unless `data` remembers
    something between batches. With every_step, for example, a new trajectory begins.
    Raises UsageError for invalid arguments, or if the checkpoint has different ones.
    """
    if iterations < 0 or batch < 1 or not 0 <= lr < math.inf:
        raise UsageError(f"invalid: iterations {iterations}, batch {batch} or lr {lr}")
    if isinstance(method, str) and method not in METHODS:
        raise UsageError(f"method is {method!r}, choose {' or '.join(METHODS)}")
    texts = texts_for(sd, concepts, batch)
    theta = trainable_copies(sd.unet, method)
    if not theta:
        raise UsageError(f"{method} selects no weight")

    unet = with_theta(sd.unet, theta)
    rng = Generator().manual_seed(seed)
    stepper = optimizer(theta.items(), lr)  # pairs, so that an optimizer may go by name
    settings = dict(
        concepts=concepts, method=method, eta=eta, lr=lr, iterations=iterations,
        batch=batch, seed=seed, loss=loss_fn, data=data, optimizer=optimizer,
        frozen=frozen, dtype=sd.dtype, model=sample.fingerprint(sd),
    )
    settings = {name: setting_to_text(value) for name, value in settings.items()}
    done = 0
    if checkpoint and checkpoint.exists():
        done = load_checkpoint(checkpoint, settings, theta, stepper, rng)

    batches = data(unet, texts, (batch, *sd.latent_shape), rng)
    target_unet = sd.unet if frozen is None else frozen
    losses = gradient_steps(unet, target_unet, batches, stepper, loss_fn, eta)
    todo = range(done + 1, iterations + 1)
    bar = tqdm(todo, f"from {done}", delay=1, disable=checkpoint is None)
    for iteration in bar:
        loss = next(losses, None)
        if loss is None:
            raise UsageError(f"data ended after {iteration - 1} of {iterations} iterations")
        bar.set_postfix(loss=loss, refresh=False)
        if checkpoint and (iteration % SAVE_EVERY == 0 or iteration == iterations):
            save_checkpoint(checkpoint, settings, iteration, theta, stepper, rng)
        if on_step and on_step(iteration, loss, theta):
            break
    if not all(tensor.isfinite().all() for tensor in theta.values()):
        raise UsageError("theta isn't finite: lower lr or eta, or use float32")
    return {name: tensor.detach() for name, tensor in theta.items()}


# ---- the file, and the command line


def to_float16(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns theta as it is saved. Raises UsageError if float16 can't hold it."""
    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in theta.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError("float16 can't hold theta, so nothing was saved: lower --lr or --eta")
    return tensors


def save(
    theta: dict[str, Tensor], path: Path, settings: dict, sd: StableDiffusion
) -> None:
    """Writes theta, tuned on sd, as float16 safetensors under the published names.

    Its metadata are the settings and, as `base`, a fingerprint of the model that it
    belongs to. If sd itself was edited before, the file has those weights, too, so that
    it gives both edits on the original.
    """
    before = sample.unet_tensors(sd)
    edited_before = {name: before[name] for name in sd.edited - theta.keys()}
    tensors = to_float16(edited_before | theta)

    base = sample.fingerprint(sd, without=tensors.keys())
    metadata = {"settings": json.dumps(settings | {"base": base}, default=str)}
    content = safetensors.torch.save(tensors, metadata)
    sample.write_whole(path, lambda part: part.write_bytes(content))


def find_function(flag: str, target: str) -> Callable:
    """Returns what MODULE:FUNCTION names. Errors inside the module keep their traceback."""
    module_name, _, name = target.partition(":")
    if not module_name.replace(".", "_").isidentifier():
        raise UsageError(f"{flag} {target}: write MODULE:FUNCTION, such as erase:esd_loss")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module imports
        raise UsageError(f"{flag} {target}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UsageError(f"{flag} {target}: {module_name} has no function {name!r}")
    return getattr(module, name)


def bind(function: Callable, options: dict) -> Callable:
    """Returns the function with those options bound that are among its parameters."""
    parameters = inspect.signature(function).parameters
    taken = {name: value for name, value in options.items() if name in parameters}
    return functools.partial(function, **taken) if taken else function


def data_from_flags(args: argparse.Namespace, sd: StableDiffusion) -> Callable:
    """Returns the `data` that the flags ask for.

    Raises UsageError for a flag that this function would ignore.
    """
    options = {
        "steps": args.steps,
        "guidance": args.guidance,
        "every_step": args.every_step,
        "sd": sd,
    }
    function = x_t_from_model
    if args.image:
        options["latents"] = sd.encode_images([Image.open(file) for file in args.image])
        function = x_t_from_images
    if args.data:
        function = find_function("--data", args.data)

    defaults = inspect.signature(x_t_from_model).parameters
    taken = inspect.signature(function).parameters
    given = ["latents"] if args.image else []
    for name in ("steps", "guidance", "every_step"):
        if options[name] != defaults[name].default:
            given.append(name)
    for name in given:
        if name not in taken:
            flag = "--image" if name == "latents" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} changes nothing with {args.data or '--image'}: leave it out")
    return bind(function, options)


def check_flags(args: argparse.Namespace, checkpoint: Path) -> None:
    """Raises UsageError for invalid flags, before a model is loaded."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("erase.py runs as one process: start it without torchrun")
    sample.check_steps_and_seeds(args.steps, [args.seed])
    check_concepts(args.concepts)
    if args.image and args.anchor is not None and args.loss == "erase:esd_loss":
        raise UsageError("--anchor changes nothing with --image: leave it out")
    if args.image and len(args.image) != len(args.concepts):
        raise UsageError(f"{len(args.image)} images for {len(args.concepts)} concepts")
    if args.resume and not checkpoint.exists():
        raise UsageError(f"{checkpoint} doesn't exist: leave out --resume")
    if checkpoint.exists() and not args.resume:
        raise UsageError(f"{checkpoint} is from an unfinished run: add --resume, or delete it")
    sample.check_out(args.out, ".safetensors", new=not args.resume)
    sample.check_out(args.out.with_suffix(".png"), ".png", new=not args.resume)


def draw_before_and_after(
    sd: StableDiffusion, theta: dict[str, Tensor], prompts: list[str], seed: int
) -> Image.Image:
    """Returns a sheet, two rows for each prompt; theta is rounded as it is saved."""
    models = {"before": sd, "after": sample.with_weights(sd, to_float16(theta))}
    rows = []
    for prompt in prompts:
        for when, model in models.items():
            images = sample.generate(
                model, [prompt], num=4, seed=seed, steps=25, progress=True  # half: a quick look
            )
            rows.append((f"{prompt}, {when}", images))
    return sample.contact_sheet(rows)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    checkpoint = args.out.with_suffix(".checkpoint")
    check_flags(args, checkpoint)
    # printed as lists, so that a forgotten quote is visible
    print(f"erasing {args.concepts}, then drawing {args.concepts + args.show}")
    loss_fn = find_function("--loss", args.loss)
    sd = sample.load(args.model, args.device, args.dtype)
    for file in args.erased:
        sd = sample.load_erased(sd, file)
    loss_fn = bind(loss_fn, {"sd": sd})
    data = data_from_flags(args, sd)

    concepts = args.concepts
    if args.anchor is not None:
        concepts = dict.fromkeys(concepts, args.anchor)
    theta = erase(
        sd, concepts, method=args.method, eta=args.eta, lr=args.lr,
        iterations=args.iterations, batch=args.batch, seed=args.seed,
        loss_fn=loss_fn, data=data, checkpoint=checkpoint,
    )

    save(theta, args.out, vars(args), sd)
    sheet = draw_before_and_after(sd, theta, args.concepts + args.show, args.seed)
    sample.save_png(sheet, args.out.with_suffix(".png"), vars(args))
    checkpoint.unlink(missing_ok=True)
    count = sum(tensor.numel() for tensor in theta.values())
    print(f"{count:,} parameters tuned: {args.out}, {args.out.with_suffix('.png')}")


def main() -> None:
    """Reads the command line."""
    parser = sample.shared_parser("Erases concepts (ESD).", "concepts", "what to erase, a prompt")
    add = parser.add_argument

    add("--method", default="esd-x", choices=METHODS, help="which weights to tune")
    add("--eta", type=float, default=1.0, help="strength, Eq. 6")
    add("--lr", type=float, default=1e-5, help="Adam's learning rate")
    add("--iterations", type=int, default=1000, help="gradient steps")
    add("--batch", type=int, default=1, help="latents in a gradient step")

    add("--loss", default="erase:esd_loss", metavar="MODULE:FUNCTION",
        help="a loss of your own; gets sd, if it takes that")
    add("--data", metavar="MODULE:FUNCTION",
        help="x_t of your own; gets sd and the values of --steps, --guidance, --every-step and "
             "--image, as far as it takes steps, guidance, every_step and latents")
    add("--every-step", action="store_true", help="learn at every step of a trajectory")
    add("--guidance", type=float, default=3.0, help="guidance scale for x_t")
    add("--anchor", metavar="PROMPT", help="what x_t is drawn for, if not for the concept")
    add("--image", type=Path, nargs="+", metavar="FILE", help="one image per concept, for x_t")

    add("--show", nargs="+", default=[], metavar="PROMPT", help="more prompts to draw")
    add("--resume", action="store_true", help="go on from the checkpoint next to --out")
    add("--out", type=Path, default=Path("erased.safetensors"),
        help="the weights; a sheet of images, before and after, goes next to them")
    sample.fail_in_one_line(run, parser)


if __name__ == "__main__":
    main()
