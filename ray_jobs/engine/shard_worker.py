"""What every worker is: a process with its own device and the driver's very model."""

import ctypes
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event
from typing import Generic, TypeVar

import ray
import torch

from patterns import UserError
from patterns.compilation import RECORDED, mode_options
from ray_jobs.config import ModelConfig, Resources
from ray_jobs.data.shard_reader import Batch, ReaderConfig, ShardReader, ShardTask
from ray_jobs.engine.ray_session import worker_gpus
from ray_jobs.io.prefetch import Prefetcher
from ray_jobs.models import loading

TELL_EVERY = 3.0  # seconds between two words of how far a worker is with a shard
LEAVE = 10.0  # seconds for a thread that reads to end before its process does, which would abort
MOST_DECODERS = 4  # more wait for Python's lock: fifteen decoded no more than four (docs/data.md)


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs. gpus: its CUDA_VISIBLE_DEVICES; empty where Ray set none.  node: Ray's name of its node."""

    host: str
    pid: int
    device: str
    gpus: str
    node: str = ""

    @property
    def name(self) -> str:
        """Short, for lines that name many."""
        return f"{self.host}/{self.pid}"

    def __str__(self) -> str:
        gpus = f", GPU {self.gpus}" if self.gpus else ""
        return f"worker on {self.host}, process {self.pid}, {self.device}{gpus}"


@dataclass(frozen=True)
class WorkerResources:
    """What of the machine Ray gave a worker."""

    cpus: float = 1.0
    gpus: float = 0.0

    def describe(self) -> WorkerInfo:
        """Where this process runs."""
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return WorkerInfo(
            socket.gethostname(), os.getpid(), self.device(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), node
        )

    def device(self) -> str:
        """The GPU that Ray gave this process, or the CPU where it gave none or there is none in truth."""
        return "cuda" if self.gpus > 0 and torch.cuda.is_available() else "cpu"

    @property
    def decoders(self) -> int:
        """Threads that decode; on a CPU the model needs the cores itself."""
        return max(1, min(MOST_DECODERS, int(self.cpus))) if self.device() == "cuda" else 1

    def load(self, config: ModelConfig, expected: loading.ModelDigests) -> loading.Loaded:
        """Load the model on this worker's device. UserError if it is not the driver's, whose digests are expected."""
        torch.set_num_threads(1 if self.decoders > 1 else max(1, int(self.cpus)))
        torch._inductor.config.compile_threads = max(1, int(self.cpus))  # else as many as the machine has cores
        keep_freed_memory()
        loaded = loading.load(config, self.device())
        host = socket.gethostname()
        if loaded.digest != expected.weights:
            what = f"this worker loads a model with digest {loaded.digest}, and the driver one with {expected.weights}"
            remedy = "Make the same weights readable on every node, and seed all that the model's code draws at random."
            raise UserError(host, what, remedy)
        if expected.constants is not None and loaded.network.constants != expected.constants:
            what = "the model of this worker holds other numbers than the driver's, which are not in its state"
            remedy = "Seed what the model's code draws at random, or make it a buffer that is loaded with the weights."
            raise UserError(host, what, remedy)
        return loaded


@dataclass(frozen=True)
class ShardReport:
    """How far a worker is with a shard, at last with the whole: samples used and refused, batches, seconds waited."""

    samples: int
    refused: int
    batches: int = 0
    waited: float = 0.0


class BatchStream:
    """A shard's batches, which knows how many came, how long they were waited for, and when to tell of it.

    They are decoded while those before are worked on, in memory that a GPU copies from by itself.
    after: when to begin.
    """

    def __init__(self, reader: ShardReader, device: torch.device, after: Event | None = None) -> None:
        def pinned(batch: Batch) -> Batch:
            return replace(batch, images=batch.images.pin_memory()) if device.type == "cuda" else batch

        self.reader, self.count, self.waited, self.told = reader, 0, 0.0, 0.0
        self.ahead = Prefetcher(map(pinned, reader), after)

    def __iter__(self) -> Iterator[Batch]:
        before = self.told = time.monotonic()
        for batch in self.ahead:
            self.count += 1
            self.waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def close(self) -> None:
        """Decode no more."""
        self.ahead.close()

    def report_due(self) -> bool:
        """Whether it is time to tell how far the work is: now and then, since telling costs the driver a while."""
        now = time.monotonic()
        due = now - self.told > TELL_EVERY
        self.told = now if due else self.told
        return due

    def report(self, samples: int, refused: int = 0) -> ShardReport:
        """How far the work is, after so many samples; refused: further ones than its reader refused."""
        return ShardReport(samples, len(self.reader.refused) + refused, self.count, self.waited)


Task = TypeVar("Task", bound=ShardTask)


class ShardWorker(Generic[Task]):
    """Streams one shard after the other; the first batches of each are decoded before the last of the one before."""

    loaded: loading.Loaded
    reader_config: ReaderConfig

    def __init__(self, resources: WorkerResources) -> None:
        self.resources = resources
        self.following: tuple[Task, BatchStream] | None = None

    def describe(self) -> WorkerInfo:
        """Where this worker runs."""
        return self.resources.describe()

    def reader(self, task: Task) -> ShardReader:
        """Return the reader of a task's shard."""
        return ShardReader(task.shard, self.reader_config, task.max_samples, task.only)

    def open_stream(self, task: Task, following: Task | None) -> BatchStream:
        """A task's batches. Those of the one that is likely to follow are begun as soon as these are decoded."""
        begun = self.following
        if begun is None or begun[0] != task or begun[1].ahead.failed:  # what failed may be mended by now
            self.close(wait=0)  # it may hang in what it reads
            begun = task, BatchStream(self.reader(task), self.loaded.device)
        (_, now), self.following = begun, None
        if following is not None:
            self.following = following, BatchStream(self.reader(following), self.loaded.device, now.ahead.made)
        return now

    def close(self, wait: float = LEAVE) -> None:
        """Leave what was begun and will not follow; its thread may still read for so many seconds."""
        if self.following is not None:
            self.following[1].ahead.close(wait)
            self.following = None


def validate_compile_mode(mode: str | None, resources: Resources) -> None:
    """UserError for a mode of `--compile` that there is not, and for one of a GPU where no worker will have any.

    That may not be known before Ray is `connected`.
    """
    if mode is None:
        return
    mode_options(mode)
    if mode == RECORDED and worker_gpus(resources) == 0:
        raise UserError("--compile", f"{mode} are a GPU's, and no worker gets any", "Take another mode, or do without.")


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, on Linux with glibc.

    Every batch allocates the same large tensors. By default each goes back to the kernel and comes again
    page by page, which costs a CPU fit an eighth of its time.
    """
    mmap_max, trim_threshold = -4, -1  # of glibc's malloc.h
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
