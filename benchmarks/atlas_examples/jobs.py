"""The atlases of the examples: data, network, patterns and the job, from start to end."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from webdataset import TarWriter

from benchmarks.paper.photographs import MATE, find_photographs
from patterns.io import write_atomically
from ray_jobs.config import AtlasConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.packing import crop_randomly
from ray_jobs.jobs.atlas.atlas import atlas
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.runs.run_folder import Run
from ray_jobs.studies.datasets import read_digits, write_digits
from ray_jobs.studies.demo import POSITIONS, prepare_weights
from ray_jobs.studies.demo import SPEC as EFFICIENTNET
from ray_jobs.studies.reproduce import make_epoch
from ray_jobs.studies.small_cnn import SPEC, train

TRAINED, FITTED = 30000, 4000  # digits that the network is trained on, and those of them for the patterns
CROPS, SIDE = 32, 256  # random crops of each photograph, and their height and width in pixels
PER_SHARD = 8  # photographs whose crops share a shard
FITTED_CROPS = 500
HERE = Resources(workers=0)


def describe_digits(data: Path, out: Path) -> Run:
    """Train a small network on MNIST, and return the atlas of the 10,000 test images.

    Args:
        data: The folder of MNIST's idx files.
        out: The folder to write to. A job that is finished there is not repeated.
    """
    images, labels = read_digits(data, "train", TRAINED)
    weights = out / "weights.safetensors"
    if not weights.exists():
        trained = train(partial(make_epoch, images, labels, torch.Generator().manual_seed(0)), seed=0)
        write_atomically(weights, partial(save_file, trained.state_dict()))
    fitted = write_digits(images[:FITTED], labels[:FITTED], out / "fit", "train")
    described = write_digits(*read_digits(data, "t10k"), out / "test", "t10k")
    model = ModelConfig(spec=SPEC, weights=str(weights), image_size=28, resize=28, mean=(0.5,), std=(0.5,))
    return describe(model, out, fitted, described, batch_size=100)


def describe_photographs(out: Path) -> Run:
    """Return the atlas of crops of photographs by EfficientNet-Lite0, whose clusters are those of channel relevance.

    Args:
        out: The folder to write to. A job that is finished there is not repeated.
    """
    # Not those of mate-backgrounds, because their license is the GPL.
    shards = write_crops([path for path in find_photographs() if path.parent != MATE], out / "crops")
    model = ModelConfig(spec=EFFICIENTNET, weights=str(prepare_weights(out / "weights.safetensors")))
    return describe(
        model, out, shards, shards, batch_size=20, max_samples=FITTED_CROPS, positions=POSITIONS, cluster_by="channels"
    )


def write_crops(photographs: Sequence[Path], out: Path) -> list[Path]:
    """Write shards of random crops. Keys are the name of the photograph and a number; there are no labels."""
    shards = []
    for number, first in enumerate(range(0, len(photographs), PER_SHARD)):

        def write(temporary: Path, chosen: Sequence[Path] = photographs[first : first + PER_SHARD]) -> None:
            with open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
                for path in chosen:
                    for crop in range(CROPS):
                        tar.write({"__key__": f"{path.stem}-{crop:02d}", "jpg": crop_randomly(path, SIDE, crop)})

        shards.append(out / f"crops-{number:03d}.tar")
        write_atomically(shards[-1], write)
    return shards


def describe(
    model: ModelConfig,
    out: Path,
    fitted: Sequence[Path],
    described: Sequence[Path],
    batch_size: int,
    max_samples: int | None = None,
    positions: int | None = None,
    cluster_by: str = "maps",
) -> Run:
    """Fit patterns on some shards, and return the atlas of others.

    Args:
        model: The model.
        out: The folder to write to.
        fitted: The shards for the patterns.
        described: The shards of the atlas.
        batch_size: The number of samples of a batch.
        max_samples: The number of samples for the patterns; None: all.
        positions: See `FitConfig.positions`; None: all positions.
        cluster_by: See `AtlasConfig.cluster_by`.
    """
    run = str(out / "run")
    fitting = FitConfig(
        model=model, shards=tuple(map(str, fitted)), out=run, batch_size=batch_size, max_samples=max_samples,
        positions=positions,
    )  # fmt: skip
    fit(fitting, HERE)
    config = AtlasConfig(
        model=model, patterns=run, shards=tuple(map(str, described)), out=str(out / "atlas"), batch_size=batch_size,
        cluster_by=cluster_by,
    )  # fmt: skip
    return atlas(config, HERE)


def count_photographs(keys: Sequence[str]) -> dict[str, int]:
    """Return the number of crops of each photograph, the most frequent first.

    Example:
        >>> count_photographs(["a-00", "b-00", "b-01"])
        {'b': 2, 'a': 1}
    """
    names, counts = np.unique([key.rpartition("-")[0] for key in keys], return_counts=True)
    order = np.lexsort((names, -counts))
    return {str(names[k]): int(counts[k]) for k in order}
