"""Damaged files and killed commands. The long run: python -m pytest tests -m fuzz

A damaged file loads, or is refused in one line. What a killed command leaves is whole, and the
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

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import erase
import sample
from notebooks.tools import table
from support import formats


def some(first, stop, step):
    """Numbers of cases: the first few of them for every test run, the rest for the long one."""
    return [first, *(pytest.param(i, marks=pytest.mark.fuzz) for i in range(step, stop, step))]


# Damaged files

def cut(data, rng):
    return data[:rng.integers(len(data))]


def flip(data, rng):
    data, at = bytearray(data), rng.integers(len(data), size=rng.integers(1, 9))
    for i in at:
        data[i] ^= 1 << rng.integers(8)
    return bytes(data)


def zero(data, rng):
    start, count = rng.integers(len(data)), rng.integers(1, 1 + len(data) // 2)
    return data[:start] + bytes(len(data[start:start + count])) + data[start + count:]


def extend(data, rng):
    return data + rng.bytes(rng.integers(1, 1000))


def swap(data, rng):
    a, b = sorted(rng.integers(len(data), size=2))
    return data[b:] + data[a:b] + data[:a]


DAMAGES = (cut, flip, zero, extend, swap)
VALUES = (None, True, -1, 0, 1, 3, 10**9, 10**30, 1e308, float("nan"), "x", "", [], [1], [1] * 99,
          {}, {"a": 1}, "8", 0.5)


def near_start(data, rng):
    """Half of all damage is where a format keeps its names and sizes."""
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    if rng.random() < 0.5 or len(data) < 3000:
        return damage(data, rng)
    return damage(data[:3000], rng) + (b"" if damage is cut else data[3000:])


def edit_config(file, rng):
    config = json.loads(file.read_text())
    key = [*config][rng.integers(len(config))]
    if rng.random() < 0.2:
        del config[key]
    else:
        config[key] = VALUES[rng.integers(len(VALUES))]
    file.unlink()
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def targets(folder, sd, tmp_path_factory):
    """One folder with all that is damaged: a model folder, single files, erased weights."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, root / "model")
    (root / "model" / "scheduler").mkdir()
    (root / "model" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}))
    shutil.copytree(folder / "tokenizer", root / "tokenizer")
    weights = formats.compvis_weights(sd)
    with pytest.MonkeyPatch.context() as patch:
        formats.write_ckpt(weights, root / "zip.ckpt", patch)
        formats.write_ckpt(weights, root / "old.ckpt", patch, zipped=False)
    save_file(weights, root / "single.safetensors")
    theta = {name: tensor for name, tensor in sd.unet.state_dict().items() if "attn2" in name}
    save_file(theta, root / "erased.safetensors", {"settings": "{}"})
    torch.save(theta, root / "erased.pt")
    return root


@pytest.mark.parametrize("first", some(0, 2050, 50))
def test_a_damaged_file_loads_or_is_refused_in_one_line(first, targets, sd, tmp_path, monkeypatch):
    formats.read_as_small(targets / "model", monkeypatch)
    files = [file.relative_to(targets) for file in sorted(targets.rglob("*.*")) if file.is_file()]
    configs = [file for file in files if file.name.endswith("config.json")]
    for case in range(first, first + (50 if first else 15)):
        rng, work = np.random.default_rng(case), tmp_path / str(case)
        shutil.copytree(targets, work, copy_function=os.link)  # links: only one file is changed
        edited = rng.random() < 0.25
        among = configs if edited else files
        name = among[rng.integers(len(among))]
        file, data = work / name, (targets / name).read_bytes()
        if edited:
            edit_config(file, rng)
        else:
            file.unlink()
            file.write_bytes(near_start(data, rng))
        before, began = {*work.rglob("*")}, time.monotonic()
        try:
            if name.stem == "erased":
                sample.load_erased(sd, file)
            else:
                inside = name.parts[0] in ("model", "tokenizer")
                sample.load(work / ("model" if name.parts[0] == "model" else
                                    "zip.ckpt" if inside else name))
        except ValueError as error:
            assert "\n" not in str(error), (case, name, error)
        except Exception:
            pytest.fail(f"case {case}, {name}:\n{traceback.format_exc()}")
        assert time.monotonic() - began < 20 and {*work.rglob("*")} == before, (case, name)
        shutil.rmtree(work)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kB


# Disks

@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk with an old file on it, full or read-only."""
    at = tmp_path / "disk"
    at.mkdir()

    def mount(*options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", at],
                          capture_output=True).returncode:
            pytest.skip("only root can mount a disk")
        return at

    yield mount
    subprocess.run(["umount", "--lazy", at], capture_output=True)  # torch may hold a file open


@pytest.mark.parametrize("command", [erase.main, *(
    pytest.param(main, marks=pytest.mark.fuzz) for main in (sample.main, table.main))])
@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_takes_nothing(command, full, folder, disk, tmp_path, monkeypatch, capsys):
    """A full one, and one that is read-only, as a folder without write permission is."""
    at = disk("size=16k")
    (at / "old.png").write_bytes(b"old")
    if not full:
        subprocess.run(["mount", "-o", "remount,ro", at], check=True)
    (tmp_path / "t.csv").write_text("prompt,evaluation_seed\n" + "a star,1\n" * 2)
    arguments = {sample.main: ["a star", "--num", 4, "--out", at / "old.png"],
                 erase.main: ["star", "--iterations", 4, "--out", at / "new.safetensors"],
                 table.main: [tmp_path / "t.csv", "--num", 4, "--out", at / "images"]}[command]
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments), "--model", str(folder),
                                     "--steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        command()
    error = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert stopped.value.code == 2 and error[-1].startswith("error: "), error
    assert (at / "old.png").read_bytes() == b"old"
    assert not [file for file in at.rglob("*") if file.suffix in (".part", ".safetensors")]


# Killed commands

def in_a_child(main, arguments, log, signum=None, after=0.0):
    """Runs a command in a forked process, which gets a signal after some seconds; its status."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["command", *map(str, arguments)]
            main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    if signum:
        time.sleep(after)
        os.kill(pid, signum)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def whole(folder):
    """Every file but one that was being written can be read to its end."""
    for file in folder.iterdir():
        if file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".checkpoint":
            torch.load(file, weights_only=True)
        else:
            assert file.suffix == ".part"


def erase_command(folder, out):
    return erase.main, ["star", "--model", folder, "--iterations", 12, "--steps", 2, "--lr", 1e-3,
                        "--out", out / "star.safetensors"]


def table_command(folder, out):
    (out.parent / "t.csv").write_text("prompt,evaluation_seed\n" + "a star,1\na heart,2\n" * 3)
    return table.main, [out.parent / "t.csv", "--model", folder, "--steps", 2, "--num", 2,
                        "--batch", 2, "--out", out]


@pytest.mark.parametrize("command", [pytest.param(erase_command, marks=pytest.mark.fuzz),
                                     table_command])
@pytest.mark.parametrize("first", some(0, 105, 5))
def test_a_killed_command_goes_on(first, command, folder, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    main, arguments = command(folder, out)
    began = time.monotonic()
    assert in_a_child(main, arguments, log) == 0, log.read_text()
    takes, expected = time.monotonic() - began, contents(out)
    for case in range(first, first + (5 if first else 1)):
        shutil.rmtree(out)
        out.mkdir()
        rng = np.random.default_rng(case)
        signum = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[case % 3]
        status = in_a_child(main, arguments, log, signum, rng.uniform(0, takes))
        # 2: in a library's own code, an interrupt may come out as that library's error
        assert status in (0, 2, 130, -signum), (case, log.read_text())
        whole(out)
        assert not [*out.glob("*.part")] or signum == signal.SIGKILL, case
        done = (out / "star.safetensors").exists()  # then only its checkpoint can be left
        again = in_a_child(main, arguments, log)
        assert again == (2 if done else 0), (case, log.read_text())
        assert contents(out) == expected, case
