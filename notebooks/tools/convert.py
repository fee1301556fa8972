"""Converts other published formats into the one that sample.py reads.

    python -m notebooks.tools.convert sd-v1-4.ckpt --out sd-v1-4
    python -m notebooks.tools.convert old-esd.pt --erased --out old-esd.safetensors

Reads single files in CompVis's format and folders or hub repositories in diffusers' layout, pickled
or not, and writes a folder in diffusers' layout with safetensors; with --erased, it reads every
published form of erased weights and writes one safetensors file. Tensors keep their values and
dtypes. Pickles are read by torch's restricted unpickler, which runs nothing in them.
"""

import argparse
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

if not __package__:  # then Python wouldn't find our files
    print("error: run it as python -m notebooks.tools.convert", file=sys.stderr)
    sys.exit(2)

import clip_text
import sample
import unet
import vae
from notebooks.tools import compvis, export
from sample import UsageError

CLIP = "openai/clip-vit-large-patch14"  # Stable Diffusion v1's tokenizer, on the hub
DIFFUSERS_PICKLES = ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"]
PICKLES = {  # in a folder, the most precise first
    "unet": DIFFUSERS_PICKLES,
    "vae": DIFFUSERS_PICKLES,
    "text_encoder": ["pytorch_model.bin", "pytorch_model.fp16.bin"],
}
SD_V1 = {
    "unet": unet.UNetConfig(),
    "vae": vae.VAEConfig(),
    "text_encoder": clip_text.TextConfig(),
}


PART_NAMES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}
OTHER_KINDS = {  # prefixes of their text encoders in single files
    "cond_stage_model.model.": "Stable Diffusion 2",
    "conditioner.embedders.": "SDXL",
}


def about_it(error: Exception, source: str | Path) -> str:
    """Returns what an error says in one line, with "it" in place of a source at its start."""
    text = sample.one_line(error)
    name = f"{source} "
    return f"it {text.removeprefix(name)}" if text.startswith(name) else text


@contextmanager
def refusal_in_one_line(source: str | Path) -> Iterator[None]:
    """Turns every error into a UsageError: damaged files can raise anything."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"can't convert {source}: {about_it(error, source)}") from error


# ---- one file of tensors


class Inert:
    """Replaces what torch's unpickler doesn't know; it does nothing and keeps nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


INERT = [  # found in published checkpoints
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "numpy.core.multiarray.scalar"),
    (Inert, "numpy._core.multiarray.scalar"),
    (Inert, "numpy.dtype"),
]

# keys of the dict that holds the tensors, and DataParallel's and torch.compile's part of a name
WRAPPERS = ("state_dict", "model_state_dict", "model")
WRAPPING_MODULES = {"module", "_orig_mod"}


def unpickle(file: Path) -> dict:
    """Returns a pickle's content, memory-mapped if it is a zip. Only what torch allows is run."""
    with open(file, "rb") as opened:
        is_zip = opened.read(2) == b"PK"
    with torch.serialization.safe_globals(INERT):
        return torch.load(file, "cpu", weights_only=True, mmap=is_zip)


def unwrap(content: dict) -> dict:
    """Returns the innermost dict under WRAPPERS."""
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return unwrap(content[key])
    return content


def flatten(content: dict) -> dict[str, Tensor]:
    """Returns the tensors of {name: tensor} and of {module: {name: tensor}}, as MODULE.NAME."""
    tensors = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, Tensor):
                    tensors[f"{name}.{key}"] = inner
    return tensors


def without_wrapping_modules(name: str) -> str:
    """Returns a tensor's name as it was before its model was wrapped."""
    return ".".join(word for word in name.split(".") if word not in WRAPPING_MODULES)


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file or a pickle, and the former's metadata.

    Raises UsageError for damaged files, for pickles that would run something, and for metadata of
    another kind of model.
    """
    if not file.is_file():
        raise UsageError(f"{file} isn't a file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
        if head == b"version h":
            raise UsageError("it is a git-lfs pointer, run `git lfs pull`")

        metadata = {}
        if head[8:] == b"{":  # safetensors: a length, then JSON
            tensors, metadata = sample.read_tensors(file)
        else:
            tensors = flatten(unwrap(unpickle(file)))
        if "modelspec.prediction_type" in metadata:
            sample.check_schedule(
                {"prediction_type": metadata["modelspec.prediction_type"]}
            )
    except Exception as error:  # a damaged file can raise anything
        refused = re.search(r"GLOBAL \S+", str(error))  # by the restricted unpickler
        reason = about_it(error, file)
        if refused:
            reason = f"{refused[0]}, look for a .safetensors of it"
        raise UsageError(
            f"{file} can't be used; nothing in it ran: {reason}"
        ) from error

    unwrapped = {without_wrapping_modules(name): tensors[name] for name in tensors}
    return unwrapped, metadata


# ---- the parts of a model


def renamed(part: str, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Returns a part's tensors under our names, prefixed with the part's."""
    tensors = compvis.to_ours(part, tensors, config)
    rename = sample.PARTS[part].rename
    if rename:
        tensors = rename(tensors)
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns those tensors whose names have a prefix, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors[name] for name in names}


def folder_configs(folder: Path) -> dict[str, Any]:
    """Returns the config of each part. Raises UsageError for another kind, or a part missing."""
    sample.check_kind(folder)
    files = [f"{part}/config.json" for part in sample.PARTS]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UsageError(f"it has no {', no '.join(missing)}; look for the whole model")
    return sample.read_configs(folder)


def read_folder(folder: Path, configs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a folder in diffusers' layout, as unet.NAME and so on."""
    tensors = {}
    for part, described in sample.PARTS.items():
        files = [folder / part / file for file in (*described.files, *PICKLES[part])]
        found = [file for file in files if file.is_file()]
        if not found:
            raise UsageError(f"{part}/{files[0].name} is missing, in every form")
        weights, _ = read_file(found[0])
        tensors |= renamed(part, weights, configs[part])
    return tensors


def check_yaml(file: Path) -> None:
    """Raises UsageError where the .yaml of the same name says that the model predicts v."""
    yaml = file.with_suffix(".yaml")
    text = yaml.read_text() if yaml.is_file() else ""
    for parameterization in re.findall(r"parameterization\W+(\w+)", text):
        prediction = "epsilon" if parameterization == "eps" else parameterization
        sample.check_schedule({"prediction_type": prediction})


def with_average(
    tensors: dict[str, Tensor], config: unet.UNetConfig
) -> dict[str, Tensor]:
    """Returns a file's tensors, the averaged U-Net in place of the last one.

    The average's names have no dots. Raises UsageError if one is missing.
    """
    averaged = {}
    for theirs in compvis.theirs_to_ours("unet", config):
        flat = "model_ema.diffusion_model" + theirs.replace(".", "")
        if flat not in tensors:
            raise UsageError(f"--ema needs {flat}, which is missing")
        averaged[flat] = compvis.PREFIXES["unet"] + theirs

    others = {name: tensors[name] for name in tensors if name not in averaged}
    return others | {averaged[flat]: tensors[flat] for flat in averaged}


def parts_held(tensors: dict[str, Tensor], configs: dict[str, Any]) -> list[str]:
    """Returns the parts of which a file in CompVis's format holds tensors."""
    held = []
    for part, prefix in compvis.PREFIXES.items():
        names = compvis.theirs_to_ours(part, configs[part])
        if {*names, *names.values()} & with_prefix(tensors, prefix).keys():
            held.append(part)
    return held


def check_held(
    tensors: dict[str, Tensor], configs: dict[str, Any], has_vae: bool
) -> None:
    """Raises UsageError where a file holds no whole model; it says what is missing.

    has_vae: whether another file has the VAE.
    """
    for prefix, kind in OTHER_KINDS.items():
        if with_prefix(tensors, prefix):
            raise UsageError(f"this is {kind}, not Stable Diffusion v1")

    held = parts_held(tensors, configs)
    needed = [part for part in PART_NAMES if part != "vae" or not has_vae]
    missing = [f"no {PART_NAMES[part]}" for part in needed if part not in held]
    if not missing:
        return

    names = compvis.theirs_to_ours("unet", configs["unet"])
    is_unet = of_unet(tensors).keys() & {*names, *names.values()}
    if is_unet and held in ([], ["unet"]):
        raise UsageError(
            f"it holds {len(tensors)} tensors of a U-Net, and nothing else of a model; "
            "if they are erased weights, add --erased and end --out in .safetensors"
        )

    content = " and ".join(f"a {PART_NAMES[part]}" for part in held)
    content = content or f"{len(tensors)} tensors: {', '.join([*tensors][:3])}"
    way_out = "add --vae FILE" if missing == ["no VAE"] else "look for the whole checkpoint"
    raise UsageError(f"it holds {content}, but {', '.join(missing)}; {way_out}")


def read_single(
    file: Path, configs: dict[str, Any], ema: bool, has_vae: bool
) -> dict[str, Tensor]:
    """Returns the tensors of a file in CompVis's format: unet.NAME and so on, and leftovers.

    has_vae: whether another file has the VAE, so that this one needs none.
    """
    check_yaml(file)
    tensors, _ = read_file(file)
    if ema:
        tensors = with_average(tensors, configs["unet"])
    check_held(tensors, configs, has_vae)

    prefixes = tuple(compvis.PREFIXES.values())
    others = [name for name in tensors if not name.startswith(prefixes)]
    dotted = [name for name in others if "." in name]  # a schedule's aren't
    found = {name: tensors[name] for name in dotted}
    for part, prefix in compvis.PREFIXES.items():
        found |= renamed(part, with_prefix(tensors, prefix), configs[part])
    return found


def read_vae(file: Path, config: vae.VAEConfig) -> dict[str, Tensor]:
    """Returns the tensors of a VAE, as vae.NAME, alone in a file or in a whole checkpoint."""
    tensors, _ = read_file(file)
    return renamed(
        "vae", with_prefix(tensors, compvis.PREFIXES["vae"]) or tensors, config
    )


# ---- a whole model


def download(name: str) -> Path:
    """Returns a hub repository's folder in the hub's cache; pickles only where it has no other.

    The configs come first and are checked, as in sample.download.
    """
    folder = sample.download(name)
    for precision in (0, 1):  # float32, then float16 for the parts that lack it
        missing = []
        for part, described in sample.PARTS.items():
            files = [*described.files, *PICKLES[part]]
            if not any((folder / part / file).exists() for file in files):
                missing.append(f"{part}/{PICKLES[part][precision]}")
        if missing:
            snapshot_download(name, allow_patterns=missing)
    return folder


def find_on_hub(name: str) -> Path:
    """Returns a hub repository's folder. Raises UsageError for what is neither there nor here."""
    try:
        return download(name)
    except Exception as error:
        reason = sample.one_line(error)
        raise UsageError(f"no such file or folder here; on the hub: {reason}") from error


def find_tokenizer(path: Path) -> str:
    """Returns the tokenizer of a model's folder or next to a single file, or else CLIP's."""
    near = path if path.is_dir() else path.parent
    if (near / "tokenizer").exists():
        return str(near / "tokenizer")
    if path.is_file() and (near / "vocab.json").exists():
        return str(near)
    return CLIP


def read_model(
    source: str | Path,
    ema: bool = False,
    vae_file: Path | None = None,
    tokenizer: str | None = None,
    configs: dict[str, Any] = SD_V1,
) -> sample.StableDiffusion:
    """Returns the model of a file, a folder or a hub repository, its tensors as they are there.

    ema: of a single file with two U-Nets, the averaged one. vae_file: another VAE.
    tokenizer: another one, a folder or a hub name. configs: of a single file, by part.
    Raises UsageError, and other errors for damaged files.
    """
    path = Path(source) if Path(source).exists() else find_on_hub(str(source))
    if path.is_dir():
        if ema or configs is not SD_V1:
            raise UsageError(
                "a folder has one U-Net, and its sizes: no --ema, no --model"
            )
        configs = folder_configs(path)
        tensors = read_folder(path, configs)
    else:
        tensors = read_single(path, configs, ema, has_vae=vae_file is not None)

    if vae_file:
        tensors = {
            name: tensors[name] for name in tensors if not name.startswith("vae.")
        }
        tensors |= read_vae(vae_file, configs["vae"])
    with torch.device("meta"):  # takes no memory
        parts = {name: part.model(configs[name]) for name, part in sample.PARTS.items()}
    described = f"it, with {vae_file}," if vae_file else "it"
    leftover = sample.assign_tensors(nn.ModuleDict(parts), tensors, described)

    tokenizer = tokenizer or find_tokenizer(path)
    try:
        sd = sample.StableDiffusion(**parts, tokenizer=sample.load_tokenizer(tokenizer))
        sample.check_parts(sd)
    except UsageError as error:  # no tokenizer, another model's, or parts of two models
        raise UsageError(f"{error}; choose another --tokenizer than {tokenizer}") from error
    sample.print_left_out(source, leftover)
    return sd


def convert_model(source: str | Path, out: Path, **options: Any) -> None:
    """Writes a folder that sample.load reads; the options are read_model's. Raises UsageError."""
    with refusal_in_one_line(source):
        sd = read_model(source, **options)
    export.write_folder(sd, out)


# ---- erased weights


def of_unet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the U-Net's tensors without the prefixes under which they are published."""
    alone = with_prefix(tensors, compvis.PREFIXES["unet"])
    if alone:  # a whole checkpoint
        return alone

    bare = {}
    for name, tensor in tensors.items():
        bare[name.removeprefix("unet.").removeprefix("diffusion_model.")] = tensor
    return bare


def check_unet(tensors: dict[str, Tensor], config: unet.UNetConfig) -> None:
    """Raises UsageError unless all tensors, and one at least, are of a U-Net of this size."""
    with torch.device("meta"):
        whole = unet.UNet(config)
    expected = whole.state_dict()
    unknown = [name for name in tensors if name not in expected]
    if unknown or not tensors:
        raise UsageError(
            f"it has {len(tensors)} tensors, {len(unknown)} not the U-Net's: {unknown[:3]}"
        )
    sample.assign_tensors(whole, expected | tensors, "it")


def convert_erased(
    source: Path, out: Path, config: unet.UNetConfig = SD_V1["unet"]
) -> None:
    """Writes erased weights as a file that sample.load_erased reads; metadata are kept.

    config: the sizes of the U-Net that they are of. Raises UsageError.
    """
    with refusal_in_one_line(source):
        tensors, metadata = read_file(source)
        weights = compvis.to_ours("unet", of_unet(tensors), config)
        check_unet(weights, config)
    export.write_tensors(out, weights, metadata)


# ---- the command line


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.out.exists():
        raise UsageError(f"{args.out} exists; delete it or choose another --out")
    if args.erased and (args.ema or args.vae or args.tokenizer):
        raise UsageError(
            "--ema, --vae and --tokenizer are for whole models, not for --erased"
        )

    configs = SD_V1
    if args.model:
        if not args.model.is_dir():
            raise UsageError(f"--model {args.model} isn't a folder")
        with refusal_in_one_line(args.source):
            configs = sample.read_configs(args.model)
    if args.erased:
        sample.check_out(args.out, ".safetensors")
        convert_erased(Path(args.source), args.out, configs["unet"])
    else:
        if args.out.suffix == ".safetensors":
            raise UsageError(f"{args.out} would be a folder, with a whole model: add --erased?")
        convert_model(
            args.source,
            args.out,
            ema=args.ema,
            vae_file=args.vae,
            tokenizer=args.tokenizer,
            configs=configs,
        )
    print(args.out)


def main() -> None:
    """Reads the command line."""
    flags = argparse.ArgumentParser(
        description="Converts weights into the form that is read here."
    )
    add = flags.add_argument
    add("source", help="a file, a folder, or a hub name")
    add("--erased", action="store_true", help="the source is erased weights, not a model")
    add("--ema", action="store_true", help="of a file with two U-Nets, take the averaged one")
    add("--vae", type=Path, metavar="FILE", help="a VAE to take in place of the source's")
    add("--tokenizer", help=f"a folder or a hub name; if not given, the source's, or {CLIP}")
    add("--model", type=Path, metavar="FOLDER", help="a model of the same sizes, if not SD v1's")
    add("--out", type=Path, required=True, help="a new folder; with --erased, a .safetensors file")
    sample.fail_in_one_line(run, flags)


if __name__ == "__main__":
    main()
