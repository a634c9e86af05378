"""Timing of variants as ratios within one run, and the models and shards that they are timed on."""

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
from torchvision.models import convnext_tiny, mobilenet_v2, resnet50, vgg16, vit_b_16
from webdataset import TarWriter

from benchmarks.machine import Cost, Machine, measure_cost, peak, synchronize
from benchmarks.pages import Cell

THREADS = 2
SIZE = 224
JOB_SHARDS, JOB_IMAGES = 6, 12
JOB_BATCH = 4


def vgg16_features() -> nn.Module:
    """Return VGG-16's convolutions, with the mean of each of its last channels as the scores."""
    torch.manual_seed(0)
    return nn.Sequential(vgg16().features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "VGG-16": vgg16_features,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-Lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}

MODERN: dict[str, Callable[[], nn.Module]] = {"ViT-B/16": vit_b_16, "ConvNeXt-T": convnext_tiny}

Variant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        variant: The timed variant.
        base: The variant that it is compared with.
        ratio: Their ratio, as `median_and_quartiles`.
        target: The target for the ratio.
        roofline: The share of the roofline.
        memory: The ratio of their peak memory.
    """

    variant: str
    base: str
    ratio: Cell
    target: str = ""
    roofline: Cell = ""
    memory: Cell = ""


COLUMNS = {
    "what": "",
    "against": "",
    "ratio": "{:.2f} ({:.2f} to {:.2f})",
    "wanted": "",
    "of the roofline": "{:.0%}",
    "peak memory": "{:.2f}",
}


@dataclass(frozen=True)
class Timed:
    """The seconds of a variant in each round; its cost and peak memory if they were measured."""

    name: str
    seconds: list[float]
    needed: Cost | None = None
    peak: int = 0

    def ratio(self, base: "Timed") -> Cell:
        """Return the ratio to a base of the same rounds as `median_and_quartiles`."""
        return median_and_quartiles([a / b for a, b in zip(self.seconds, base.seconds)])

    def __add__(self, other: "Timed") -> "Timed":
        return Timed(f"{self.name} + {other.name}", [a + b for a, b in zip(self.seconds, other.seconds)])


def median_and_quartiles(ratios: list[float]) -> Cell:
    """Return the median and the quartiles of ratios."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [statistics.median(ratios), low, high]


@dataclass(frozen=True)
class Bench:
    """The machine, the number of rounds, the models, and the compilation mode of a benchmark."""

    machine: Machine
    rounds: int
    batch: int
    names: Sequence[str]
    mode: str

    @property
    def device(self) -> str:
        """The device: cpu or cuda."""
        return self.machine.device

    def models(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Yield the models with random weights, each with a batch of images."""
        for name in self.names:
            torch.manual_seed(0)
            images = torch.randn(self.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
            yield name, (MODELS | MODERN)[name]().eval().requires_grad_(False).to(self.device), images.to(self.device)

    def timed(self, variants: dict[str, Variant], rounds: int | None = None, measured: bool = True) -> dict[str, Timed]:
        """Time each variant once per round, after a warm-up round.

        Every round runs all variants, so that a slow moment of the machine affects them all.
        """
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range((rounds or self.rounds) + 1):
            for name, variant in variants.items():
                synchronize(self.device)
                begun = time.perf_counter()
                variant()
                synchronize(self.device)
                if number:
                    seconds[name].append(time.perf_counter() - begun)
        return {
            name: Timed(name, seconds[name], measure_cost(variant), peak(variant, self.device))
            if measured
            else Timed(name, seconds[name])
            for name, variant in variants.items()
        }

    def row(self, what: str, timed: Timed, against: str, base: Timed, target: str = "") -> Row:
        """Return the row of a variant compared with another one of the same rounds."""
        roofline: Cell = ""
        if timed.needed is not None:
            roofline = self.machine.roofline(timed.needed, statistics.median(timed.seconds))
        memory: Cell = timed.peak / base.peak if base.peak else ""
        return Row(what, against, timed.ratio(base), target, roofline, memory)


def infer(model: nn.Module, images: Tensor) -> Tensor:
    """Run a plain forward pass."""
    with torch.inference_mode():
        return model(images)


def photographs() -> list[Image.Image]:
    """Return the 20 photographs of 512×512 pixels in foolbox's package."""
    folder = resources.files("foolbox") / "data"
    files = sorted((f for f in folder.iterdir() if f.name.startswith("imagenet_")), key=lambda f: f.name)
    return [Image.open(io.BytesIO(f.read_bytes())).convert("RGB") for f in files]


def write_photographs(path: Path, width: int, height: int, times: int = 3) -> str:
    """Write a shard of the photographs as JPEGs of some size."""
    tar = TarWriter(str(path), encoder=False)
    for number, image in enumerate(photographs()):
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=92)
        for again in range(times):
            tar.write({"__key__": f"{number}-{again}", "jpg": buffer.getvalue(), "cls": b"0"})
    tar.close()
    return str(path)


def write_shards(folder: Path, images: int = JOB_IMAGES) -> list[str]:
    """Write shards of random smooth images."""
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
