"""A worker's streams: the shard that follows is read while the last batches of the one before are worked on, once."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patterns import Network
from ray_jobs.config import ModelConfig
from ray_jobs.data import shard_reader
from ray_jobs.data.samples import Sample
from ray_jobs.engine.shard_worker import ShardReport
from ray_jobs.jobs.moments_job import MomentsTask, MomentsWorker
from ray_jobs.models import loading
from ray_jobs.runs.moments_store import MomentsStore
from tests.conftest import make_shards
from tests.ray_jobs.runs import PREPROCESSING

LATENCY, STEP = 0.4, 0.2  # seconds until a shard's first byte, and for a batch


class Observed:
    """Notes the batches it sees, and takes its time."""

    def __init__(self, seen: list[Tensor], network: Network) -> None:
        self.network, self.seen = network, seen

    def reset(self) -> None: ...

    def flush(self) -> None: ...

    def update(self, images: Tensor, seeds: list[int]) -> Tensor:
        time.sleep(STEP)
        self.seen.append(images)
        return torch.zeros(len(images), 1)


@pytest.fixture
def seen() -> list[Tensor]:
    """The batches that were worked on."""
    return []


@pytest.fixture
def opened(seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The shards that were opened, each after a while as of an object store, and the batches worked on before."""
    names, read = list[tuple[str, int]](), shard_reader.read_raw_samples

    def slowly(shard: str) -> Iterator[Sample]:
        names.append((shard, len(seen)))
        time.sleep(LATENCY)
        yield from read(shard)

    monkeypatch.setattr(shard_reader, "read_raw_samples", slowly)
    return names


@pytest.fixture
def worker(model_spec: str, tmp_path: Path, seen: list[Tensor]) -> MomentsWorker:
    model = ModelConfig(spec=model_spec, **PREPROCESSING)
    made: Any = partial(Observed, seen)
    worker = MomentsWorker(model, MomentsStore(tmp_path), 2, made, loading.load(model).digests)
    worker.prepare()
    return worker


def work(worker: MomentsWorker, tasks: list[MomentsTask], promised: list[MomentsTask | None]) -> list[ShardReport]:
    return [list(worker.work(task, following))[-1] for task, following in zip(tasks, promised)]


def test_a_shard_that_was_told_to_follow_is_opened_before_the_one_before_is_done(
    worker: MomentsWorker, opened: list[tuple[str, int]], tmp_path: Path
) -> None:
    tasks = [MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 4, 8))]
    first, *_ = work(worker, tasks, [*tasks[1:], None])
    assert first.waited > LATENCY / 2
    assert [shard for shard, _ in opened] == [task.shard for task in tasks], "each is read once"
    # Four batches a shard: the next is opened before the last of them.
    assert all(before < 4 * n for n, (_, before) in enumerate(opened) if n)


def test_what_was_told_to_follow_and_did_not_changes_nothing(
    worker: MomentsWorker, seen: list[Tensor], opened: list[tuple[str, int]], tmp_path: Path
) -> None:
    tasks = [MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 3, 4))]
    again = replace(tasks[1], only=frozenset({"s001-2"}), round=1)  # the same shard, but not all of it
    told = work(worker, [*tasks, again], [tasks[2], again, tasks[1], None])
    assert [report.samples for report in told] == [4, 4, 4, 1]
    expected: list[Tensor] = []
    for task in (*tasks, again):
        expected += [batch.images for batch in worker.reader(task)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_shard_that_failed_ahead_and_was_mended_is_read_anew(worker: MomentsWorker, tmp_path: Path) -> None:
    first, second = (MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 2, 4)))
    whole = Path(second.shard).read_bytes()
    Path(second.shard).write_bytes(whole[:600])
    list(worker.work(first, second))
    assert worker.following is not None
    worker.following[1].prefetcher.exhausted.wait(60)
    Path(second.shard).write_bytes(whole)
    (*_, told) = worker.work(second, None)
    assert told.samples == 4


def test_a_worker_that_hangs_in_what_will_not_follow_goes_on(
    worker: MomentsWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, hung = (MomentsTask(shard, number=n) for n, shard in enumerate(make_shards(tmp_path, 3, 2)))
    read, begun = shard_reader.read_raw_samples, list[str]()

    def raw(shard: str) -> Iterator[Sample]:
        if shard == hung.shard:
            begun.append(shard)
            time.sleep(20)
        yield from read(shard)

    monkeypatch.setattr(shard_reader, "read_raw_samples", raw)
    list(worker.work(first, hung))
    while not begun:
        time.sleep(0.01)
    since = time.monotonic()
    (*_, told) = worker.work(second, None)
    assert told.samples == 2
    assert time.monotonic() - since < 10
