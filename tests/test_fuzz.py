"""Damaged files, disks that take nothing, and killed commands.

    python -m pytest tests/test_fuzz.py -m "robustness or fuzz" --fuzz-seed 1

A damaged file loads, or is refused in one line. What a killed command leaves can be read, and the
same command again ends in the same bits.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import erase
import sample
from notebooks.tools import convert, table
from sample import UsageError
from support import formats

pytestmark = pytest.mark.robustness

# ---- damage


def cut(data, rng):
    return data[: rng.integers(len(data))]


def flip(data, rng):
    """Changes a few bits."""
    changed = bytearray(data)
    for i in rng.integers(len(data), size=rng.integers(1, 9)):
        changed[i] ^= 1 << rng.integers(8)
    return bytes(changed)


def zero(data, rng):
    start = rng.integers(len(data))
    end = min(len(data), start + rng.integers(1, 1 + len(data) // 2))
    return data[:start] + bytes(end - start) + data[end:]


def extend(data, rng):
    return data + rng.bytes(rng.integers(1, 1000))


def swap(data, rng):
    a, b = sorted(rng.integers(len(data), size=2))
    return data[b:] + data[a:b] + data[:a]


DAMAGES = (cut, flip, zero, extend, swap)
VALUES = (  # of a config's entry
    None, True, -1, 0, 1, 3, 10**9, 10**30, 1e308, float("nan"), "x", "", [], [1], [1] * 99,
    {}, {"a": 1}, "8", 0.5,
)


def damaged(data, rng):
    """Half of all damage is near the start, where a format keeps its names and sizes."""
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    if rng.random() < 0.5 or len(data) < 3000:
        return damage(data, rng)
    rest = b"" if damage is cut else data[3000:]
    return damage(data[:3000], rng) + rest


def with_another_entry(data, rng):
    """Returns a config in which one entry is missing or has an odd value."""
    config = json.loads(data)
    key = [*config][rng.integers(len(config))]
    value = VALUES[rng.integers(len(VALUES))]
    if rng.random() < 0.2:
        del config[key]
    else:
        config[key] = value
    return json.dumps(config).encode()


# ---- damaged files


@pytest.fixture(scope="module")
def targets(folder, sd, tmp_path_factory):
    """One folder with all that is damaged: a model folder, single files, erased weights."""
    root = tmp_path_factory.mktemp("undamaged")
    shutil.copytree(folder, root / "model")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
    (root / "model" / "scheduler").mkdir()
    (root / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))

    shutil.copytree(folder / "tokenizer", root / "tokenizer")
    weights = formats.compvis_weights(sd)
    with pytest.MonkeyPatch.context() as patch:
        formats.write_ckpt(weights, root / "zip.ckpt", patch)
        formats.write_ckpt(weights, root / "old.ckpt", patch, zipped=False)
    save_file(weights, root / "single.safetensors")

    theta = {name: tensor for name, tensor in sd.unet.state_dict().items() if "attn2" in name}
    erase.save(theta, root / "erased.safetensors", settings={}, sd=sd)
    torch.save(theta, root / "erased.pt")
    return root


def use(name: Path, work: Path, out: Path, sd: sample.StableDiffusion) -> None:
    """Loads or converts what the file `name` in the folder `work` belongs to."""
    configs = {part: getattr(sd, part).config for part in sample.PARTS}
    if name.parts[0] == "model":
        sample.load(work / "model")
    elif name.suffix == ".pt":
        convert.convert_erased(work / name, out / "erased.safetensors", configs["unet"])
        sample.load_erased(sd, out / "erased.safetensors")
    elif name.stem == "erased":
        sample.load_erased(sd, work / name)
    else:
        single = "zip.ckpt" if name.parts[0] == "tokenizer" else name
        convert.convert_model(work / single, out / "converted", configs=configs)
        sample.load(out / "converted")


@pytest.fixture
def seed(request):
    return request.config.getoption("--fuzz-seed")


def damage_one_file(seed: int, case: int, targets: Path, work: Path) -> Path:
    """Copies all files to `work`, one of them damaged; returns that one's name."""
    rng = np.random.default_rng([seed, case])
    names = [file.relative_to(targets) for file in sorted(targets.rglob("*.*")) if file.is_file()]
    change = damaged
    if rng.random() < 0.25:
        change = with_another_entry
        names = [name for name in names if name.name.endswith("config.json")]
    name = names[rng.integers(len(names))]

    shutil.copytree(targets, work, copy_function=os.link)  # links: only one file is changed
    (work / name).unlink()
    (work / name).write_bytes(change((targets / name).read_bytes(), rng))
    return name


FIFTIES = [pytest.param(range(i, i + 50), marks=pytest.mark.fuzz) for i in range(50, 2050, 50)]


@pytest.mark.parametrize("cases", [range(15), *FIFTIES], ids=lambda cases: f"from {cases.start}")
def test_a_damaged_file_loads_or_is_refused_in_one_line(cases, seed, targets, sd, tmp_path):
    for case in cases:
        work = tmp_path / f"{case}"
        out = tmp_path / f"{case}-out"
        out.mkdir()
        name = damage_one_file(seed, case, targets, work)
        before = {*work.rglob("*")}
        began = time.process_time()
        try:
            use(name, work, out, sd)
        except UsageError as error:
            assert "\n" not in str(error), (case, name, error)
            assert not [*out.iterdir()], (case, name)
        except Exception:
            pytest.fail(f"case {case}, {name}:\n{traceback.format_exc()}")

        assert time.process_time() - began < 20, (case, name)
        assert {*work.rglob("*")} == before, (case, name)
        shutil.rmtree(work)
        shutil.rmtree(out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kB


# ---- disks


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk."""
    at = tmp_path / "disk"
    at.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", at]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a disk")
        return at

    yield mount
    subprocess.run(["umount", "--lazy", at], capture_output=True)  # torch may hold a file open


@pytest.mark.robustness
@pytest.mark.parametrize("command", [erase.main, sample.main, table.main])
@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_takes_nothing(command, full, folder, disk, tmp_path, monkeypatch, capsys):
    """A full one, and one that is read-only, as a folder without write permission is."""
    at = disk("size=16k")
    (at / "old.png").write_bytes(b"old")
    if not full:
        subprocess.run(["mount", "-o", "remount,ro", at], check=True)

    rows = tmp_path / "t.csv"
    rows.write_text("prompt,evaluation_seed\n" + "a star,1\n" * 2)
    arguments = {
        sample.main: ["a star", "--num", 4, "--out", at / "old.png"],
        erase.main: ["star", "--iterations", 4, "--out", at / "new.safetensors"],
        table.main: [rows, "--num", 4, "--out", at / "images"],
    }[command]
    model = ["--model", str(folder), "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments), *model])
    with pytest.raises(SystemExit) as stopped:
        command()

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert (at / "old.png").read_bytes() == b"old"
    assert not [file for file in at.rglob("*") if file.suffix in (".part", ".safetensors")]


# ---- killed commands


class Command(NamedTuple):
    main: Callable
    arguments: list
    out: Path  # the folder that it writes to
    result: str = ""  # a file that exists when the command is through; "": it goes on by itself


def erase_command(folder, out):
    words = ["star", "--model", folder, "--iterations", 12, "--steps", 2, "--lr", 1e-3]
    words += ["--out", out / "star.safetensors"]
    return Command(erase.main, words, out, result="star.safetensors")


def table_command(folder, out):
    rows = out.parent / "t.csv"
    rows.write_text("prompt,evaluation_seed\n" + "a star,1\na heart,2\n" * 3)
    words = [rows, "--model", folder, "--steps", 2, "--num", 2, "--batch", 2, "--out", out]
    return Command(table.main, words, out)


def in_a_child(command, log, *flags, signum=None, after=0.0):
    """Runs a command in a forked process, which gets a signal after some seconds; its status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["command", *map(str, [*command.arguments, *flags])]
            command.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except KeyboardInterrupt:  # before the command takes care of it
            status = 130
        finally:
            os._exit(status)

    if signum:
        time.sleep(after)
        os.kill(pid, signum)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder):
    """Reads every file to its end, but one that was being written: pixels and tensors, by name."""
    found = {}
    for file in folder.iterdir():
        if file.suffix == ".png":
            found[file.name] = Image.open(file).tobytes()
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
            found[file.name] = {name: tensor.tolist() for name, tensor in tensors.items()}
        elif file.suffix == ".checkpoint":
            found[file.name] = torch.load(file, weights_only=True)["done"]
        else:
            assert file.suffix == ".part", file
    return found


def go_on(command, log, case):
    """Does what is left to do after a command was killed."""
    checkpoint = [*command.out.glob("*.checkpoint")]
    finished = command.result and (command.out / command.result).exists()
    if checkpoint:
        assert in_a_child(command, log, "--resume") == 0, (case, log.read_text())
    elif finished:
        assert in_a_child(command, log) == 2, (case, log.read_text())  # it exists
    else:
        assert in_a_child(command, log) == 0, (case, log.read_text())


FIVES = [pytest.param(range(i, i + 5), marks=pytest.mark.fuzz) for i in range(5, 105, 5)]


@pytest.mark.parametrize("make", [erase_command, table_command])
@pytest.mark.parametrize(
    "cases",
    [pytest.param(range(2), marks=pytest.mark.robustness), *FIVES],
    ids=lambda cases: f"from {cases.start}",
)
def test_a_killed_command_goes_on(cases, seed, make, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(erase, "SAVE_EVERY", 2)
    out = tmp_path / "out"
    out.mkdir()
    command = make(folder, out)
    log = tmp_path / "log"
    began = time.monotonic()
    assert in_a_child(command, log) == 0, log.read_text()
    takes = time.monotonic() - began
    expected = contents(out)

    for case in cases:
        shutil.rmtree(out)
        out.mkdir()
        rng = np.random.default_rng([seed, case])
        signum = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[case % 3]
        status = in_a_child(command, log, signum=signum, after=rng.uniform(0, takes))
        # 2: in a library's own code, an interrupt may come out as that library's error
        assert status in (0, 2, 130, -signum), (case, log.read_text())
        contents(out)  # can be read
        assert not [*out.glob("*.part")] or signum == signal.SIGKILL, case

        go_on(command, log, case)
        assert contents(out) == expected, case


@pytest.mark.robustness
def test_a_run_that_is_killed_half_way_is_resumed_to_the_same_bits(folder, tmp_path, monkeypatch):
    """Here the signal comes when a checkpoint has been written, whatever the machine's speed."""
    monkeypatch.setattr(erase, "SAVE_EVERY", 2)
    out = tmp_path / "out"
    out.mkdir()
    command = erase_command(folder, out)
    log = tmp_path / "log"
    assert in_a_child(command, log) == 0, log.read_text()
    expected = contents(out)
    shutil.rmtree(out)
    out.mkdir()

    save_checkpoint = erase.save_checkpoint

    def killed(path, settings, done, *state):
        save_checkpoint(path, settings, done, *state)
        if done == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(erase, "save_checkpoint", killed)
        assert in_a_child(command, log) == -signal.SIGKILL, log.read_text()
    assert contents(out) == {"star.checkpoint": 6}

    assert in_a_child(command, log, "--resume") == 0, log.read_text()
    assert contents(out) == expected
