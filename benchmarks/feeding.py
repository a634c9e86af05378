"""How fast processes decode for a worker with a GPU, and how long the worker's own process computes for each image."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.decoding import BATCH
from benchmarks.timing import SIZE, Bench, Row, median_and_quartiles, write_photographs
from ray_jobs.config import Preprocessing
from ray_jobs.data import shard_reader
from ray_jobs.data.image_decoding import normalize_batch
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.io.process_pool import ProcessPool
from ray_jobs.models.loading import IMAGENET

PREPROCESSING = Preprocessing(
    image_size=SIZE, resize=256, interpolation="bilinear", mean=IMAGENET.mean, std=IMAGENET.std
)
TIMES = 40  # copies of each photograph in the shard
WARM_UP = 5 * BATCH  # images that are read before the clock starts


def measure_feeding(bench: Bench) -> Iterator[Row]:
    """Compare two decoding processes with one, and measure what they cost the worker's process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shard = write_photographs(Path(folder) / "x.tar", 500, 375, TIMES)
        with ProcessPool(1, shard_reader.__name__) as one, ProcessPool(2, shard_reader.__name__) as two:
            ratios, costs = [], []
            for _ in range(bench.rounds):
                (alone, _), (both, cost) = feed(shard, one), feed(shard, two)
                ratios.append(both / alone)
                costs.append(cost)
    what = "JPEGs of 500×375 → 224×224, two decoding processes"
    yield Row(f"{what}: images/s", "one", median_and_quartiles(ratios), "≥ 1.9")
    low, cost, high = np.quantile(costs, [0.25, 0.5, 0.75]) * 1000
    held = f"{cost:.2f} ms ({low:.2f} to {high:.2f})"
    yield Row(f"{what}: CPU time of the worker's process per image, without torch", "", held, "≤ 0.4 ms")
    torch.set_num_threads(threads)


def feed(shard: str, pool: ProcessPool) -> tuple[float, float]:
    """Read a shard with processes that decode.

    Returns:
        The images per second that the processes would decode on cores of their own: the time that they wait for a core
        is left out, because other work of the machine would decide. And the seconds of CPU time for each image of this
        process without those in torch, which releases Python's lock. The lock is held for less time.
    """
    batches = iter(ShardReader(shard, ReaderConfig(PREPROCESSING, BATCH, pool=pool)))
    for _ in range(WARM_UP // BATCH):
        batch = next(batches)
    begun, used, queued = time.perf_counter(), time.process_time(), [read_queue(p) for p in pool.running]
    images = sum(len(batch.keys) for batch in batches)
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    free = seconds - np.mean([read_queue(p) - before for p, before in zip(pool.running, queued)])
    before = time.thread_time()
    normalize_batch([torch.zeros(PREPROCESSING.input_shape, dtype=torch.uint8)] * len(batch.keys), PREPROCESSING)
    return images / float(free), used / images - (time.thread_time() - before) / len(batch.keys)


def read_queue(process: int) -> float:
    """Return the seconds that a process has waited for a core."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
