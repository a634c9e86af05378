"""Timing of variants as ratios within one run, and what they are timed on."""

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import vgg16
from webdataset import TarWriter

THREADS = 2
BATCH = 4
SIZE = 224
JOB_SHARDS, JOB_IMAGES = 6, 12


def vgg16_features() -> nn.Module:
    """VGG-16's convolutions, and a score for each of its last channels."""
    torch.manual_seed(0)
    return nn.Sequential(vgg16().features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@dataclass(frozen=True)
class Timed:
    """Seconds of a variant, round by round."""

    name: str
    seconds: list[float]

    def ratio(self, base: "Timed") -> str:
        """Median ratio to a base of the same rounds, and the middle half's spread."""
        ratios = sorted(a / b for a, b in zip(self.seconds, base.seconds))
        low, _, high = statistics.quantiles(ratios, n=4)
        return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"

    def __add__(self, other: "Timed") -> "Timed":
        return Timed(f"{self.name} + {other.name}", [a + b for a, b in zip(self.seconds, other.seconds)])


def timed(rounds: int, variants: dict[str, Callable[[], object]]) -> dict[str, Timed]:
    """Time each variant once a round, after one round that does not count."""
    found = {name: Timed(name, []) for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            begun = time.perf_counter()
            variant()
            if number:
                found[name].seconds.append(time.perf_counter() - begun)
    return found


def write_shards(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(JOB_SHARDS):
        paths.append(f"{folder}/{number}.tar")
        tar = TarWriter(paths[-1], encoder=False)
        for key in range(JOB_IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
            tar.write({"__key__": f"{number}-{key}", "jpg": buffer.getvalue()})
        tar.close()
    return paths
