"""The judge tells which object, colour and style an image shows, as the paper's ResNet-50 does.

Each of the three heads has one class more than the world has names, for "none of these": a broken
star isn't a star. The Frechet distance is taken on the features before the heads.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sample
from notebooks.toy import world

HEADS = {"object": world.OBJECTS, "colour": tuple(world.COLOURS), "style": world.STYLES}


def labels_of(example: world.Example) -> list[int]:
    """Returns the class of an example under each head; None is the last, "none of these"."""
    labels = []
    for head, names in HEADS.items():
        value = getattr(example, head)
        labels.append(len(names) if value is None else names.index(value))
    return labels


class Judge(nn.Module):
    """A small convolutional network: (B, 3, 64, 64) in -1..1 -> scores (B, 11), (B, 7), (B, 7)."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [
                nn.Conv2d(c_in, c_out, 3, padding=1),
                nn.GroupNorm(8, c_out, eps=1e-5),
                nn.SiLU(),
                nn.Conv2d(c_out, c_out, 3, stride=2, padding=1),
                nn.GroupNorm(8, c_out, eps=1e-5),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
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
    """Loads the judge that was trained with the model in `folder`. Raises UsageError."""
    file = Path(folder) / "judge" / "model.safetensors"
    tensors, _ = sample.read_tensors(file)
    judge = Judge()
    try:
        judge.load_state_dict(tensors)
    except RuntimeError as error:
        raise sample.UsageError(f"{file} doesn't fit the judge: {error}") from error
    return judge.requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, images: list[Image.Image]) -> list[dict[str, str | None]]:
    """Returns what each image shows, {"object": "star", ...}; None is "none of these"."""
    scores = judge(to_tensor(images))
    classes = [of_head.argmax(dim=1).tolist() for of_head in scores]

    looks = []
    for of_image in zip(*classes):
        look = {}
        for i, (head, names) in zip(of_image, HEADS.items()):
            look[head] = (*names, None)[i]
        looks.append(look)
    return looks


@torch.no_grad()
def features(judge: Judge, images: list[Image.Image]) -> np.ndarray:
    """Returns the judge's features of images, (N, 96), in float64, for Frechet distances."""
    return judge.features(to_tensor(images)).double().numpy()
