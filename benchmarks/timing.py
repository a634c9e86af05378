"""Timing of variants as ratios within one run, and what they are timed on."""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50, vgg16
from webdataset import TarWriter

from benchmarks.machine import Cost, Machine, cost, peak, synchronise

THREADS = 2
SIZE = 224
JOB_SHARDS, JOB_IMAGES = 6, 12
JOB_BATCH = 4


def vgg16_features() -> nn.Module:
    """VGG-16's convolutions, and a score for each of its last channels."""
    torch.manual_seed(0)
    return nn.Sequential(vgg16().features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "VGG-16": vgg16_features,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-Lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}

Variant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table. share: of what the machine reaches.  memory: the peak, against that of `against`."""

    what: str
    against: str
    ratio: str
    wanted: str = ""
    share: str = ""
    memory: str = ""

    def __str__(self) -> str:
        return f"| {self.what} | {self.against} | {self.ratio} | {self.wanted} | {self.share} | {self.memory} |"


HEAD = """| what | against | ratio | wanted | of the roofline | peak memory |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Timed:
    """Seconds of a variant, round by round; what it needs, and the most memory it had, where that was measured."""

    name: str
    seconds: list[float]
    needed: Cost | None = None
    peak: int = 0

    def ratio(self, base: "Timed") -> str:
        """Median ratio to a base of the same rounds, and the middle half's spread."""
        return spread([a / b for a, b in zip(self.seconds, base.seconds)])

    def __add__(self, other: "Timed") -> "Timed":
        return Timed(f"{self.name} + {other.name}", [a + b for a, b in zip(self.seconds, other.seconds)])


def spread(ratios: list[float]) -> str:
    """The median of ratios, and the middle half's spread."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True)
class Bench:
    """Where and how often variants are timed, on which models, and the mode of what is compiled."""

    machine: Machine
    rounds: int
    batch: int
    names: Sequence[str]
    mode: str

    @property
    def device(self) -> str:
        return self.machine.device

    def models(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Models with random weights, and a batch for each."""
        for name in self.names:
            torch.manual_seed(0)
            images = torch.randn(self.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
            yield name, MODELS[name]().eval().requires_grad_(False).to(self.device), images.to(self.device)

    def timed(self, variants: dict[str, Variant], rounds: int | None = None, measured: bool = True) -> dict[str, Timed]:
        """Time each variant once a round, after one round that does not count.

        Every variant has its turn in each round, so that a slow moment of the machine meets them all.
        """
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range((rounds or self.rounds) + 1):
            for name, variant in variants.items():
                synchronise(self.device)
                begun = time.perf_counter()
                variant()
                synchronise(self.device)
                if number:
                    seconds[name].append(time.perf_counter() - begun)
        return {
            name: Timed(name, seconds[name], cost(variant), peak(variant, self.device))
            if measured
            else Timed(name, seconds[name])
            for name, variant in variants.items()
        }

    def row(self, what: str, timed: Timed, against: str, base: Timed, wanted: str = "") -> Row:
        """A variant against another of the same rounds."""
        share = memory = ""
        if timed.needed is not None:
            share = f"{self.machine.roofline(timed.needed, statistics.median(timed.seconds)):.0%}"
        if base.peak:
            memory = f"{timed.peak / base.peak:.2f}"
        return Row(what, against, timed.ratio(base), wanted, share, memory)


def infer(model: nn.Module, images: Tensor) -> Tensor:
    """A plain forward pass."""
    with torch.inference_mode():
        return model(images)


def photographs() -> list[Image.Image]:
    """Twenty photographs of 512×512 pixels, in foolbox's package."""
    folder = resources.files("foolbox") / "data"
    files = sorted((f for f in folder.iterdir() if f.name.startswith("imagenet_")), key=lambda f: f.name)
    return [Image.open(io.BytesIO(f.read_bytes())).convert("RGB") for f in files]


def write_photographs(path: Path, width: int, height: int, times: int = 3) -> str:
    """A shard of the photographs at some size, as JPEG."""
    tar = TarWriter(str(path), encoder=False)
    for number, image in enumerate(photographs()):
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=92)
        for again in range(times):
            tar.write({"__key__": f"{number}-{again}", "jpg": buffer.getvalue(), "cls": b"0"})
    tar.close()
    return str(path)


def write_shards(folder: Path, images: int = JOB_IMAGES) -> list[str]:
    """Shards of random smooth images."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(JOB_SHARDS):
        paths.append(f"{folder}/{number}.tar")
        tar = TarWriter(paths[-1], encoder=False)
        for key in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
            tar.write({"__key__": f"{number}-{key}", "jpg": buffer.getvalue()})
        tar.close()
    return paths
