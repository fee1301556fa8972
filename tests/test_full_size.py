"""Every format at full size: each gives the same model, with the reference's outputs.

    python -m pytest tests -m full_size      # 10 GB of disk, 12 GB of memory, a few minutes
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from notebooks.tools import convert, export
from support import formats, hub, parity, small

pytestmark = pytest.mark.full_size
DIGEST = """
import sys, sample, test_full_size
print(test_full_size.digest(sample.load(sys.argv[1])))
"""


def digest(sd: sample.StableDiffusion) -> str:
    """A hash of every name and every bit of the three models."""
    sha = hashlib.sha256()
    for part, weights in formats.part_weights(sd).items():
        for name in sorted(weights):
            sha.update(f"{part} {name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
            sha.update(weights[name].contiguous().numpy())
    return sha.hexdigest()


def tokenizer(folder):
    """Writes a tokenizer with as many tokens as CLIP's; each is a letter or nothing."""
    folder.mkdir(parents=True)
    letters = [chr(97 + i) + end for end in ("", "</w>") for i in range(26)]
    words = letters + [f"<{i}>" for i in range(49408 - len(letters) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes diffusers' layout, float32: 4.3 GB."""
    root = tmp_path_factory.mktemp("full") / "folder"
    tokenizer(root / "tokenizer")
    for part, (config, model) in parity.CLASSES.items():
        with torch.device("meta"):
            shapes = model(config())
        (root / part).mkdir()
        (root / part / "config.json").write_text(json.dumps(small.PUBLISHED[part]))
        save_file(small.full_size_weights(shapes), root / part / sample.PARTS[part].files[0])
    yield root
    shutil.rmtree(root.parent)


@pytest.fixture(scope="module")
def sd(folder):
    return sample.load(folder)


@pytest.fixture(scope="module")
def expected(sd):
    return digest(sd)


@pytest.fixture
def scratch(folder):
    """A folder on the same disk, removed after each test: the files are large."""
    path = folder.parent / "scratch"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def converted(folder, scratch):
    """Converts a source and removes it; returns the folder that was written."""

    def run(source, **options):
        if source.is_file():
            options["tokenizer"] = str(folder / "tokenizer")
        convert.convert_model(source, scratch / "converted", **options)
        remove = shutil.rmtree if source.is_dir() else os.remove
        remove(source)
        return scratch / "converted"

    return run


def test_a_folder_gives_the_files_tensors(folder, sd):
    for part, weights in formats.part_weights(sd).items():
        stored = load_file(folder / part / sample.PARTS[part].files[0])
        assert all(torch.equal(stored[name], weights[name]) for name in weights)


@torch.no_grad()
def test_outputs_equal_the_reference(sd):
    """In float32, another order of a sum changes 1e-6 of it; a wrong setting 1e-3."""
    answers = load_file(small.REFERENCE / "full_size.safetensors")
    for part in parity.CLASSES:
        for name, function in parity.functions(part, getattr(sd, part)).items():
            found = function(*small.FULL_SIZE_INPUTS[name])
            off = (found - answers[name]).abs().max() / answers[name].abs().max()
            assert off < 1e-4, (name, off)


def test_a_folder_of_2022_with_pickles(folder, expected, scratch, converted):
    copy = formats.write_folder(folder, scratch / "old", ".bin", torch.float32, old=True)
    assert digest(sample.load(converted(copy))) == expected


def test_a_folder_in_half_precision(folder, sd, scratch):
    copy = formats.write_folder(folder, scratch / "half", ".fp16.safetensors", torch.float16, True)
    half = formats.part_weights(sample.load(copy, dtype="float16"))
    for part, weights in formats.part_weights(sd).items():
        for name, tensor in weights.items():
            assert torch.equal(tensor.half(), half[part][name]), name


def test_a_single_safetensors_file(sd, expected, scratch, converted):
    save_file(formats.compvis_weights(sd), scratch / "v1.safetensors")
    assert digest(sample.load(converted(scratch / "v1.safetensors"))) == expected


@pytest.mark.parametrize("ema", [False, True])
def test_a_ckpt(ema, sd, expected, scratch, converted, monkeypatch):
    tensors = formats.compvis_weights(sd, ema)
    assert len(tensors) == (1831 if ema else 1145) - 9  # of 12 schedule buffers, 3 are written
    formats.write_ckpt(tensors, scratch / "v1.ckpt", monkeypatch)
    assert digest(sample.load(converted(scratch / "v1.ckpt", ema=ema))) == expected


def test_the_hub(folder, expected, scratch):
    (scratch / "hub" / "someone").mkdir(parents=True)
    (scratch / "hub" / "someone" / "v1").symlink_to(folder)
    with hub.serving(scratch / "hub") as server:
        environment = server.environment(scratch / "home")
        environment["PYTHONPATH"] = f"{hub.ROOT}:{hub.ROOT / 'tests'}"
        printed = subprocess.run(
            [sys.executable, "-c", DIGEST, "someone/v1"],
            cwd=scratch,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    assert printed.stdout.strip() == expected


def test_a_written_folder(sd, expected, scratch):
    export.write_folder(sd, scratch / "saved")
    assert digest(sample.load(scratch / "saved")) == expected
