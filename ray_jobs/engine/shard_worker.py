"""The worker of a job over shards: a process with its own device, which loads the driver's model and reads shards."""

import ctypes
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import Generic, Protocol, TypeVar

import ray
import torch

from patterns import UserError
from patterns.compilation import CUDA_GRAPHS
from ray_jobs.config import AUTO, Resources
from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.data.decoders import make_decode
from ray_jobs.data.shard_reader import Batch, ReaderConfig, ShardReader, ShardTask
from ray_jobs.engine.ray_session import worker_gpus
from ray_jobs.io.prefetch import Prefetcher
from ray_jobs.io.process_pool import ProcessPool
from ray_jobs.io.refusals import BusyError
from ray_jobs.models.loading import AnyModel, TracedModel

MAX_DECODERS = 8  # processes; the thread that reads shards and makes batches cannot feed more
MAX_ENCODERS = 8  # threads, which hold Python's lock for a tenth of their time


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs.

    Attributes:
        host: Name of its machine.
        pid: Number of its process.
        device: Device of its model, as torch names it.
        gpus: Its CUDA_VISIBLE_DEVICES; empty if Ray set none.
        node: Ray's id of its node; empty without Ray.

    Example:
        >>> str(WorkerInfo("node-1", 42, "cuda", "3"))
        'worker on node-1, process 42, cuda, GPU 3'
    """

    host: str
    pid: int
    device: str
    gpus: str
    node: str = ""

    @property
    def name(self) -> str:
        """A short name: host/pid."""
        return f"{self.host}/{self.pid}"

    def __str__(self) -> str:
        gpus = f", GPU {self.gpus}" if self.gpus else ""
        return f"worker on {self.host}, process {self.pid}, {self.device}{gpus}"


@dataclass(frozen=True)
class WorkerResources:
    """The share of a machine that Ray gave a worker, and the intervals that the driver works with.

    Attributes:
        cpus: Number of CPUs.
        gpus: Number of GPUs; a fraction if workers share one.
        timing: The driver's intervals.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    timing: Timing = PRODUCTION

    def describe(self) -> WorkerInfo:
        """Return where this process runs."""
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return WorkerInfo(socket.gethostname(), os.getpid(), self.device, gpus, node)

    @property
    def device(self) -> str:
        """The device for the model: the GPU that Ray gave this process if torch finds it, else the CPU."""
        return "cuda" if self.gpus > 0 and torch.cuda.is_available() else "cpu"

    @property
    def decoders(self) -> int:
        """The number of processes that decode images; 0 on a CPU, because the model needs the cores."""
        return min(MAX_DECODERS, int(self.cpus)) if self.device == "cuda" and self.cpus >= 2 else 0

    @property
    def encoders(self) -> int:
        """The number of threads that encode pictures."""
        return max(1, min(MAX_ENCODERS, int(self.cpus)))

    def place(self, model: TracedModel) -> TracedModel:
        """Return a model on this worker's device, and prepare this process for its work."""
        torch.set_num_threads(1 if self.decoders else max(1, int(self.cpus)))
        # Read when the compiler is imported, for which a worker may have no reason. The default is all cores.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, int(self.cpus)))
        keep_freed_memory()
        return model.to(self.device)


@dataclass(frozen=True)
class ShardReport:
    """Progress of a worker with a shard; its last report is the result.

    Attributes:
        samples: Number of samples that were used.
        rejected: Number of samples that were rejected.
        batches: Number of batches.
        waited: Seconds that the worker waited for data.
    """

    samples: int
    rejected: int
    batches: int = 0
    waited: float = 0.0


def make_reader_config(model: AnyModel, batch_size: int, decoders: int = 0) -> ReaderConfig:
    """Return how a worker reads the samples of a shard for a model.

    Args:
        model: The model.
        batch_size: The number of samples of a batch.
        decoders: The number of processes that decode, which start with the first batch. 0: the reading thread decodes.

    Raises:
        UserError: If the model has a decoder that cannot be imported here.
    """
    decoder = model.config.decoder
    make_decode(decoder, model.preprocessing)
    pool = ProcessPool(decoders, ReaderConfig.__module__) if decoders else None
    return ReaderConfig(model.preprocessing, batch_size, model.dtype, decoder=decoder, pool=pool)


class BatchStream:
    """The batches of a shard. They are decoded in a thread while earlier batches are worked on.

    On a GPU, batches come in pinned memory, so that they are copied asynchronously.

    Args:
        reader: Reads the shard.
        device: The model's device.
        after: Event after which reading begins; by default it begins at once.
        report_interval: Seconds between two reports; each costs the driver time.

    Attributes:
        prefetcher: The thread that reads.
    """

    def __init__(
        self,
        reader: ShardReader,
        device: torch.device,
        after: Event | None = None,
        report_interval: float = PRODUCTION.report_interval,
    ) -> None:
        def pin(batch: Batch) -> Batch:
            return replace(batch, images=batch.images.pin_memory()) if device.type == "cuda" else batch

        self.reader, self.report_interval = reader, report_interval
        self.batches, self.waited, self.last_report = 0, 0.0, 0.0
        self.prefetcher = Prefetcher(map(pin, reader), after)

    def __iter__(self) -> Iterator[Batch]:
        before = self.last_report = time.monotonic()
        for batch in self.prefetcher:
            self.batches += 1
            self.waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def require_first(self) -> None:
        """Wait for the first batch.

        Raises:
            BusyError: If there is none, because the server of the shard refuses requests for now.
        """
        before = time.monotonic()
        error = self.prefetcher.peek()
        self.waited += time.monotonic() - before
        if isinstance(error, BusyError):
            error.begun = False
            raise error

    def close(self) -> None:
        """Stop reading."""
        self.prefetcher.close()

    def report_due(self) -> bool:
        """Return whether it is time for the next report, and if so, start the next interval."""
        now = time.monotonic()
        due = now - self.last_report > self.report_interval
        self.last_report = now if due else self.last_report
        return due

    def report(self, samples: int, rejected: int = 0) -> ShardReport:
        """Return a report.

        Args:
            samples: Number of samples that were used until now.
            rejected: Number of rejected samples in addition to those that the reader rejected.
        """
        return ShardReport(samples, len(self.reader.rejected) + rejected, self.batches, self.waited)


Task = TypeVar("Task", bound=ShardTask)


class ShardWorker(Generic[Task]):
    """A worker that streams one shard after another; it begins to decode a shard before the previous one is finished.

    Args:
        model: The driver's model.
        resources: Its share of the machine.

    Attributes:
        model: The model; `prepare` places it on this worker's device.
        reader_config: How shards are read; set by `prepare`.
        following: The task that is likely to come next, and its stream.
    """

    reader_config: ReaderConfig

    def __init__(self, model: TracedModel, resources: WorkerResources) -> None:
        self.model, self.resources = model, resources
        self.following: tuple[Task, BatchStream] | None = None

    def describe(self) -> WorkerInfo:
        """Return where this worker runs."""
        return self.resources.describe()

    def reader(self, task: Task) -> ShardReader:
        """Return the reader of a task's shard."""
        return ShardReader(task.shard, self.reader_config, task.max_samples, task.only, task.skip)

    def start_stream(self, reader: ShardReader, after: Event | None = None) -> BatchStream:
        """Return the stream of a reader, which begins now or after an event."""
        return BatchStream(reader, self.model.device, after, self.resources.timing.report_interval)

    def open_stream(self, task: Task, following: Task | None) -> BatchStream:
        """Return the batches of a task.

        Args:
            task: The task.
            following: The task that is likely to come next. Its batches are decoded as soon as those of `task` are.

        Raises:
            BusyError: If the server of the shard refuses requests for now. The worker's earlier work is kept.
        """
        begun = self.following
        if begun is None or begun[0] != task or begun[1].prefetcher.failed:  # a failed shard may be fixed by now
            self.close(wait=0)  # the thread may hang in a read
            begun = task, self.start_stream(self.reader(task))
        (_, stream), self.following = begun, None
        stream.require_first()
        if following is not None:
            self.following = following, self.start_stream(self.reader(following), stream.prefetcher.exhausted)
        return stream

    def close(self, wait: float | None = None) -> None:
        """Stop reading ahead.

        Args:
            wait: Longest wait for the reading thread in seconds; by default `Timing.reader_exit`.
        """
        if self.following is not None:
            self.following[1].prefetcher.close(self.resources.timing.reader_exit if wait is None else wait)
            self.following = None


class Compilable(Protocol):
    """What compiles its work on batches of one size, such as an observer or an explainer."""

    def compile(self, batch_size: int, mode: str) -> None:
        """Compile the work on batches of this size, or raise UserError."""


def compile_batches(work: Compilable, mode: str | None, batch_size: int, device: torch.device) -> None:
    """Compile the work on full batches.

    Args:
        work: The observer or explainer.
        mode: The mode of compilation; `auto`: CUDA graphs on a GPU if they can be recorded there; None: none.
        batch_size: The number of samples of a full batch.
        device: The device of the model.

    Raises:
        UserError: If the mode was chosen by the user, and the work cannot be compiled.
    """
    if mode == AUTO:
        if device.type == "cuda":
            with suppress(UserError, torch.OutOfMemoryError):
                work.compile(batch_size, CUDA_GRAPHS)
    elif mode is not None:
        work.compile(batch_size, mode)


def require_gpu_for_mode(mode: str | None, resources: Resources) -> None:
    """Raise UserError if a mode of compilation needs a GPU and no worker gets one.

    Whether workers get a GPU may be known only after `connect`.
    """
    if mode == CUDA_GRAPHS and worker_gpus(resources) == 0:
        what = f"{mode} need a GPU, and no worker gets one"
        raise UserError("", what, "Choose another mode, or leave out `compile`.", "compile")


def keep_freed_memory() -> None:
    """Let malloc keep freed memory, on Linux with glibc.

    Every batch allocates the same large tensors. By default, malloc returns each of them to the kernel and gets it back
    page by page, which costs a fit on a CPU one eighth of its time.
    """
    mmap_max, trim_threshold = -4, -1  # of glibc's malloc.h
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
