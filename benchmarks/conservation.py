"""What PatternAttribution keeps of the target's value, and where it loses it: `python -m benchmarks.conservation`.

EfficientNet-Lite0 with its ImageNet weights (extra `demo`), VGG-11's convolutions and ResNet-18 as
initialised, with patterns of random crops of foolbox's photographs; the photographs are explained.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import vgg11

from patterns import accumulate, choose, solve
from patterns.evaluation.conservation import Loss, conservation
from ray_jobs.config import ModelConfig
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import ShardReader
from ray_jobs.models import loading
from ray_jobs.models.loading import Loaded
from ray_jobs.studies.demo import SPEC, prepare_photographs, prepare_weights

CROPS = 4  # of each photograph
CHOICES = "linear", "default"
CAUSES = "gate", "border", "neuron", "other"
ROUNDING = 1e-6
HERE = "benchmarks.conservation"


def vgg11_convolutions() -> nn.Module:
    """VGG-11's convolutions as initialised, and one linear layer over their mean."""
    return nn.Sequential(vgg11().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def main() -> None:
    """Print a table row for each model and choice of patterns, and the largest losses of each."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        photographs = prepare_photographs(here / "photographs")
        crops, whole = pack(photographs, here / "fit", crops=CROPS), pack(photographs, here / "whole")
        names = {
            "EfficientNet-Lite0, trained": ModelConfig(
                spec=SPEC, weights=str(prepare_weights(here / "weights.safetensors"))
            ),
            "ResNet-18, random": ModelConfig(spec="torchvision:resnet18", weights="random"),
            "VGG-11, random": ModelConfig(spec=f"{HERE}:vgg11_convolutions", image_size=224, resize=256),
        }
        print("| model | patterns | reaches the input | lost at gates | at borders | in neurons | elsewhere |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, config in names.items():
            loaded = loading.load(config)
            moments = accumulate(loaded.network, images(crops, loaded, 20))
            for choice in CHOICES:
                solved = {n: solve(op, moments[n], [choice]).patterns for n, op in loaded.network.operators.items()}
                patterns = choose(loaded.network, solved, choice)
                found = []
                for image in images(whole, loaded, 1):
                    target = loaded.network.module(image).argmax(1)
                    found.append(conservation(loaded.network, patterns, image, target))
                print(f"| {name} | {choice} | {' | '.join(cells(found))} |", flush=True)
                print_largest(found)


def images(shards: Sequence[Path], loaded: Loaded, batch_size: int) -> Iterator[Tensor]:
    for shard in shards:
        for batch in ShardReader(str(shard), loaded.preprocessing, batch_size, loaded.dtype):
            yield batch.images


def cells(found: Sequence[Sequence[Loss]]) -> Iterator[str]:
    """Shares of the target's value, median over photographs and the middle half's spread."""
    yield spread([1 - sum(loss.lost for loss in losses) for losses in found])
    for cause in CAUSES:
        yield spread([sum(loss.lost for loss in losses if loss.cause == cause) for losses in found])


def spread(shares: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(shares, n=4)
    if max(abs(low), abs(high)) < ROUNDING:
        return f"< {ROUNDING:g}"
    return f"{statistics.median(shares):.3g} ({low:.3g} to {high:.3g})"


def print_largest(found: Sequence[Sequence[Loss]], count: int = 6) -> None:
    """The parts whose loss is largest by its median over photographs."""
    medians = {
        (row[0].cause, row[0].name): (
            statistics.median(loss.received for loss in row),
            statistics.median(loss.lost for loss in row),
        )
        for row in zip(*found)
    }
    for (cause, name), (received, lost) in sorted(medians.items(), key=lambda item: -abs(item[1][1]))[:count]:
        print(f"    {cause} {name}: receives {received:.3f}, loses {lost:.3f}")


if __name__ == "__main__":
    main()
