"""How the reduction of an atlas grows: CPU time and memory for simulated rows of 1,000 classes.

python -m benchmarks.atlas --samples 10000,100000

Each size runs in a process of its own, so that its largest memory is known. The rows have a pooled map of 14×14 cells,
the relevance of 64 channels and an embedding of 32 numbers. The samples of a class differ by noise.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ray_jobs.config import AtlasConfig, ModelConfig
from ray_jobs.engine.ray_tasks import LocalTasks
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.atlas.reduction import reduce_rows
from ray_jobs.jobs.atlas.rows import (
    RowShape,
    RowWriter,
    activation_column,
    make_table,
    mass_column,
    relevance_column,
    to_half,
    to_shares,
)

CLASSES, PER_SHARD, SIDE, CHANNELS = 1000, 1000, 14, 64
SHAPE = RowShape(SIDE, {"layer": CHANNELS}, 32)


def simulate(folder: Path, samples: int, classes: int = CLASSES) -> list[str]:
    """Write the rows of simulated shards, and return their files.

    Args:
        folder: The folder of the files.
        samples: The number of samples.
        classes: The number of classes.
    """
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand((classes, SIDE**2), generator=generator)
    files = []
    for first in range(0, samples, PER_SHARD):
        count = min(PER_SHARD, samples - first)
        chosen = torch.randint(classes, (count,), generator=generator)
        maps = centers[chosen] + 0.5 * torch.rand((count, SIDE**2), generator=generator)
        relevance = torch.randn((count, CHANNELS), generator=generator)
        shares, mass = to_shares(maps)
        channel_shares, channel_mass = to_shares(relevance)
        wrong = torch.rand(count, generator=generator) < 0.2
        labels = torch.where(wrong, torch.randint(classes, (count,), generator=generator), chosen).tolist()
        scalars = [
            {
                "shard": f"shard-{first}",
                "key": f"{k}",
                "position": k,
                "label": labels[k],
                "prediction": int(chosen[k]),
                "class": int(chosen[k]),
                "probability": 0.5,
                "score": float(relevance[k, 0]),
                "loss": 1.0,
            }
            for k in range(count)
        ]
        lists = {
            "map": shares,
            "map_mass": mass,
            relevance_column("layer"): channel_shares,
            mass_column("layer"): channel_mass,
            activation_column("layer"): to_half(relevance),
            "embedding": np.zeros((count, 32), np.float16),
        }
        path = folder / f"{first:09d}.parquet"
        writer = RowWriter(path, SHAPE)
        writer.write(make_table(SHAPE, scalars, lists))
        writer.close()
        files.append(str(path))
    return files


def measure(samples: int, classes: int = CLASSES) -> dict[str, float]:
    """Return the CPU time of the reduction, and the largest memory of this process before and after it, in MiB."""
    with TemporaryDirectory() as folder:
        files = simulate(Path(folder), samples, classes)
        config = AtlasConfig(model=ModelConfig(spec="none"), patterns="", shards=(), out=folder)
        before, begun = peak(), time.process_time()
        found = reduce_rows(files, SHAPE, config, locate(folder), LocalTasks())
        assert found["samples"] == samples
        return {"samples": samples, "seconds": time.process_time() - begun, "before": before, "peak": peak()}


def peak() -> float:
    """Return the largest memory of this process until now, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="10000,100000")
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    print("| samples | CPU seconds | µs per sample | largest memory (MiB) |\n| ---: | ---: | ---: | ---: |")
    for samples in map(int, arguments.samples.split(",")):
        command = [sys.executable, "-m", "benchmarks.atlas", "--one", str(samples)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rate = 1e6 * found["seconds"] / samples
        print(f"| {samples} | {found['seconds']:.1f} | {rate:.0f} | {found['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
