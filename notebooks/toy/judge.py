"""The judge tells which object, colour and style an image shows: the ResNet-50 of this world.

Each of the three heads has one class more than the world has names, for "none of these": a broken
star isn't a star. The Frechet distance is taken on the features before the heads.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from notebooks.toy import world

HEADS = {"object": world.OBJECTS, "colour": tuple(world.COLOURS), "style": world.STYLES}


def labels_of(example: world.Example) -> list[int]:
    """The class of an example under each head; None is the last class, "none of these"."""
    values = (example.object, example.colour, example.style)
    return [len(names) if value is None else names.index(value)
            for value, names in zip(values, HEADS.values())]


class Judge(nn.Module):
    """A small convolutional network: (B, 3, 64, 64) in -1..1 -> scores (B, 11), (B, 7), (B, 7)."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        self.body = nn.Sequential(*(
            layer for a, b in zip(widths, widths[1:]) for layer in (
                nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b, eps=1e-5), nn.SiLU(),
                nn.Conv2d(b, b, 3, stride=2, padding=1), nn.GroupNorm(8, b, eps=1e-5), nn.SiLU())))
        self.neck = nn.Linear(96, 96)
        self.heads = nn.ModuleList(nn.Linear(96, len(names) + 1) for names in HEADS.values())

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) -> (B, 96)."""
        return F.silu(self.neck(self.body(images).amax(dim=(2, 3))))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.features(images)
        return [head(features) for head in self.heads]


def to_tensor(images: list[Image.Image]) -> Tensor:
    """B images -> (B, 3, 64, 64) in -1..1."""
    pixels = np.stack([np.array(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(folder: str | Path) -> Judge:
    """Loads the judge that was trained with the model in `folder`."""
    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / "judge" / "model.safetensors"))
    return judge.requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, images: list[Image.Image]) -> list[dict[str, str | None]]:
    """Returns what each image shows, {"object": "star", ...}; None is "none of these"."""
    scores = judge(to_tensor(images))
    classes = [s.argmax(dim=1).tolist() for s in scores]
    return [{head: (*names, None)[i] for i, (head, names) in zip(row, HEADS.items())}
            for row in zip(*classes)]
