"""A worker reads the next shard while it works on the last batches of the current one, and reads each shard once."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patterns import Network
from ray_jobs.config import ModelConfig
from ray_jobs.config.timing import Timing
from ray_jobs.data import shard_reader
from ray_jobs.data.samples import Sample
from ray_jobs.engine.shard_worker import ShardReport, WorkerResources
from ray_jobs.jobs.moments_job import MomentsTask, MomentsWorker
from ray_jobs.models import loading
from ray_jobs.runs.moments_store import MomentsStore
from tests.conftest import make_shards
from tests.ray_jobs.runs import PREPROCESSING, wait_until

LATENCY = 0.05  # seconds until the first byte of a shard


class RecordingObserver:
    """Records the batches that it gets; the functions in `pauses` are called before each batch."""

    def __init__(self, seen: list[Tensor], pauses: list[Callable[[], None]], network: Network) -> None:
        self.network, self.seen, self.pauses = network, seen, pauses

    def reset(self) -> None: ...

    def flush(self) -> None: ...

    def update(self, images: Tensor, seeds: list[int], labels: Tensor | None = None) -> Tensor:
        for pause in self.pauses:
            pause()
        self.seen.append(images)
        return torch.zeros(len(images), 1)


@pytest.fixture
def seen() -> list[Tensor]:
    """The batches that were worked on."""
    return []


@pytest.fixture
def pauses() -> list[Callable[[], None]]:
    """Functions that a test has called before each batch."""
    return []


@pytest.fixture
def opened(seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The shards that were opened, each after a delay as of an object store, and the number of batches before."""
    names, read = list[tuple[str, int]](), shard_reader.read_raw_samples

    def slowly(sources: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
        for source in sources:
            names.append((source["url"], len(seen)))
            time.sleep(LATENCY)
            yield from read([source])

    monkeypatch.setattr(shard_reader, "read_raw_samples", slowly)
    return names


@pytest.fixture
def worker(model_spec: str, tmp_path: Path, seen: list[Tensor], pauses: list[Callable[[], None]]) -> MomentsWorker:
    model = ModelConfig(spec=model_spec, **PREPROCESSING)
    make_observer: Any = partial(RecordingObserver, seen, pauses)
    resources = WorkerResources(timing=Timing(reader_exit=3600.0))
    worker = MomentsWorker(loading.load(model).traced, MomentsStore(tmp_path), 2, make_observer, None, resources)
    worker.prepare()
    return worker


def work(worker: MomentsWorker, tasks: list[MomentsTask], promised: list[MomentsTask | None]) -> list[ShardReport]:
    """Let a worker do tasks, each with a promised next one, and return the results."""
    return [list(worker.work(task, following))[-1] for task, following in zip(tasks, promised)]


def test_promised_shard_is_opened_before_the_last_batch_of_the_current_one(
    worker: MomentsWorker,
    seen: list[Tensor],
    pauses: list[Callable[[], None]],
    opened: list[tuple[str, int]],
    tmp_path: Path,
) -> None:
    tasks = [MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 4, 8))]

    def wait_for_the_next_shard() -> None:
        number, batch = divmod(len(seen), 4)  # of four batches per shard
        if batch == 3 and number < 3:
            wait_until(lambda: len(opened) > number + 1)

    pauses.append(wait_for_the_next_shard)
    first, *_ = work(worker, tasks, [*tasks[1:], None])
    assert first.waited > LATENCY / 2
    assert [shard for shard, _ in opened] == [task.shard for task in tasks], "a shard was read twice"
    assert all(before < 4 * n for n, (_, before) in enumerate(opened) if n)


def test_promised_shard_that_does_not_follow_changes_nothing(
    worker: MomentsWorker, seen: list[Tensor], opened: list[tuple[str, int]], tmp_path: Path
) -> None:
    tasks = [MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 3, 4))]
    again = replace(tasks[1], only=frozenset({"s001-2"}), round=1)  # the same shard, but one sample of it
    reports = work(worker, [*tasks, again], [tasks[2], again, tasks[1], None])
    assert [report.samples for report in reports] == [4, 4, 4, 1]
    expected: list[Tensor] = []
    for task in (*tasks, again):
        expected += [batch.images for batch in worker.reader(task)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_shard_that_failed_while_it_was_read_ahead_and_is_fixed_now_is_read_again(
    worker: MomentsWorker, tmp_path: Path
) -> None:
    first, second = (MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 2, 4)))
    whole = Path(second.shard).read_bytes()
    Path(second.shard).write_bytes(whole[:600])
    list(worker.work(first, second))
    assert worker.following is not None
    worker.following[1].prefetcher.exhausted.wait(60)
    Path(second.shard).write_bytes(whole)
    (*_, report) = worker.work(second, None)
    assert report.samples == 4


def test_worker_continues_while_the_promised_shard_that_does_not_follow_hangs(
    worker: MomentsWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, hung = (MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 3, 2)))
    read, begun, released = shard_reader.read_raw_samples, threading.Event(), threading.Event()

    def read_raw_samples(sources: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
        for source in sources:
            if source["url"] == hung.shard:
                begun.set()
                released.wait()
            yield from read([source])

    monkeypatch.setattr(shard_reader, "read_raw_samples", read_raw_samples)
    list(worker.work(first, hung))
    assert begun.wait(60)
    try:
        (*_, report) = worker.work(second, None)
    finally:
        released.set()
    assert report.samples == 2
