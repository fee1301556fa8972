"""Commands run in the test's own process, and images as numbers."""

from pathlib import Path
from typing import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[2]


def run(main: Callable, *arguments) -> None:
    """Runs a command's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, arguments)])
        main()


def refusal(capsys, main: Callable, *arguments) -> str:
    """Runs a command that must end with exit status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(main, *arguments)
    assert stopped.value.code == 2

    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert len(line) <= 520
    return line


def pixels(images: list[Image.Image]) -> Tensor:
    """Returns images of one size as integers, (B, width * height * channels)."""
    return torch.stack([torch.tensor(list(image.tobytes())) for image in images])


def difference(images: list[Image.Image], others: list[Image.Image]) -> int:
    """Returns the largest difference of two pixels, 0 to 255; a batch's rounding makes it 1."""
    return (pixels(images) - pixels(others)).abs().max().item()
