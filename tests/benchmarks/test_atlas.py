"""The benchmarks of an atlas: the memory of a large reduction, and the crops of the example."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.atlas_examples.jobs import CROPS, count_photographs, write_crops
from ray_jobs.data.shard_reader import read_shard

ROOT = Path(__file__).parents[2]
SAMPLES = 100_000


@pytest.mark.slow
def test_memory_of_a_large_reduction_is_below_a_gibibyte() -> None:
    command = [sys.executable, "-m", "benchmarks.atlas", "--one", str(SAMPLES)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] == SAMPLES
    assert found["peak"] - found["before"] < 1024  # MiB, beyond the libraries and the simulation


def test_crops_name_their_photograph(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"imagenet_0{number}_99.jpg" for number in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    (shard,) = write_crops(paths, tmp_path / "shards")
    keys = [sample.key for sample in read_shard(str(shard))]
    assert len(set(keys)) == 2 * CROPS
    assert count_photographs(keys) == {path.stem: CROPS for path in paths}
