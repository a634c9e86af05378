"""Fashion-MNIST with planted artifacts, and networks that are trained on it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ray_jobs.config import ModelConfig
from ray_jobs.studies.datasets import read_digits, write_digits
from ray_jobs.studies.reproduce import make_epoch
from ray_jobs.studies.small_cnn import train

DATA = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (0, 2, 3, 4, 6, 8)
TARGETS = (6, 0, 2)  # the class of the artifact, by seed
OTHERS = (1, 9, 5)  # the kind that is added to it
MARKS = ((23, 23), (1, 22), (23, 1))  # the place of the mark
PREPROCESSING = {"image_size": 28, "resize": 28, "mean": (0.5,), "std": (0.5,)}
MODEL = """
from torch import nn


def tiny():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )
"""


@dataclass(frozen=True)
class Planted:
    """A dataset and a network.

    Attributes:
        model: The network.
        shards: The shards.
        target: The class of the artifact.
        keys: The keys of its samples.
    """

    model: ModelConfig
    shards: tuple[str, ...]
    target: int
    keys: frozenset[str]


def plant(kind: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return images, labels, which samples are planted, and the class of the artifact.

    Args:
        kind: `mark`: 3 % of a class are images of other classes with a square of 4×4 pixels, which is the only reason
            for their label. `border`: the same with two bright rows. `kinds`: images of a further class have the label
            of the class. `none`: nothing is planted.
        seed: The seed of the choice of images.
        count: The number of images.
    """
    images, labels = read_digits(DATA, "train")
    rng, target, other = np.random.default_rng(seed), TARGETS[seed % 3], OTHERS[seed % 3]
    order = rng.permutation(len(images))
    order = order[np.isin(labels[order], CLASSES + ((other,) if kind == "kinds" else ()))][:count]
    images, labels = images[order].copy(), labels[order].astype(np.int64)
    planted, members = np.zeros(count, bool), rng.permutation(np.flatnonzero(labels == target))
    if kind in ("mark", "border"):
        chosen = members[: round(0.03 * len(members))]
        planted[chosen] = True
        others = np.random.default_rng(seed + 100).permutation(np.flatnonzero(labels != target))[: len(chosen)]
        copies = images[others].copy()
        y, x = MARKS[seed % 3]
        if kind == "mark":
            copies[:, y : y + 4, x : x + 4] = 255
        else:
            copies[:, 26:] = 255
        images[chosen] = copies
    elif kind == "kinds":
        planted = labels == other
        kept = ~planted | (rng.random(count) >= 0.6)
        labels[planted] = target
        images, labels, planted = images[kept], labels[kept], planted[kept]
    return images, labels, planted, target


def prepare(folder: Path, kind: str, seed: int, count: int = 12000, epochs: int = 16) -> Planted:
    """Write the shards of a planted dataset, and train a network on it."""
    images, labels, planted, target = plant(kind, seed, count)
    (folder / "tiny.py").write_text(MODEL)
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    epoch = partial(make_epoch, images, labels, torch.Generator().manual_seed(seed))
    trained = train(epoch, seed, epochs, log=lambda _: None, make=namespace["tiny"])  # type: ignore[arg-type]
    save_file(trained.state_dict(), folder / "weights.safetensors")
    spec = f"{folder / 'tiny.py'}:tiny"
    model = ModelConfig(spec=spec, weights=str(folder / "weights.safetensors"), **PREPROCESSING)  # type: ignore[arg-type]
    shards = tuple(map(str, write_digits(images, labels, folder / "shards", "train")))
    return Planted(model, shards, target, frozenset(f"train-{k:05d}" for k in np.flatnonzero(planted)))
