"""The pool with real actors that fail in every way: each item counts once, or is given up by name."""

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_jobs.engine import worker_pool
from ray_jobs.engine.worker_pool import Outcome, PoolError
from tests.ray_jobs.failing import Actor, BadItemError
from tests.ray_jobs.runs import until


class Recorded:
    """A job that counts what it is told."""

    bad_input: type[Exception] = BadItemError

    def __init__(self, folder: Path, commit_after: float | None = 0.05, attempts: int = 3, stall: float = 1.5) -> None:
        self.folder, self.max_loss, self.attempts, self.stall_timeout = folder, commit_after, attempts, stall
        self.item_timeout, self.commits = 60.0, 0
        self.counted: Counter[str] = Counter()
        self.pids: list[int] = []
        self.leavers: set[int] = set()
        self.size = 2

    def wanted_workers(self) -> int:
        return self.size

    def spawn(self) -> Any:
        return ray.remote(Actor).options(num_cpus=0).remote(self.folder)

    def make_task(self, item: str) -> str:
        return item

    def on_ready(self, told: int) -> None:
        self.pids.append(told)

    def on_removed(self, told: int, error: Exception | None) -> None: ...

    def on_failed(self, item: str, error: Exception) -> None: ...

    def must_leave(self, told: int) -> bool:
        return told in self.leavers

    def on_assigned(self, item: str, by: int) -> None: ...

    def on_progress(self, item: str, told: int) -> None: ...

    def on_done(self, item: str, told: int) -> None:
        assert told == 2, "the last that a generator tells is its result"

    def on_lost(self, items: list[str]) -> None: ...

    def on_committed(self, items: list[str], told: Any) -> None:
        if self.max_loss is not None:
            assert sorted(items) == sorted(told), "the pool and the worker disagree on what counts"
        self.commits += 1
        self.counted.update(items)


def run(job: Recorded, items: list[str], tick: Callable[[], None] = lambda: None) -> Outcome:
    return worker_pool.run(items, job, lambda: False, tick)


PLAIN = [f"plain-{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("trouble", "commit_after"),
    [
        pytest.param(f"{kind}-once", after, marks=() if kind == "kill" or after != 300 else pytest.mark.slow)
        for kind in ("bad", "bug", "kill", "stop")
        for after in (None, 0.05, 300)
    ],
)
def test_an_item_that_fails_once_is_done_later_and_nothing_counts_twice(
    local_ray: None, tmp_path: Path, trouble: str, commit_after: float | None
) -> None:
    job = Recorded(tmp_path, commit_after)
    assert run(job, [*PLAIN[:6], trouble, *PLAIN[6:]]) == Outcome([], {})
    assert job.counted == Counter([*PLAIN, trouble])
    assert len(list(tmp_path.glob(f"{trouble}@*"))) == 2


@pytest.mark.parametrize(
    "trouble", ["bad-always", "bug-always", "kill-always", pytest.param("stop-always", marks=pytest.mark.slow)]
)
def test_an_item_that_always_fails_is_given_up_by_name_and_holds_up_no_other(
    local_ray: None, tmp_path: Path, trouble: str
) -> None:
    job = Recorded(tmp_path, attempts=2, stall=0.8)
    outcome = run(job, [trouble, *PLAIN])
    assert list(outcome.failed) == [trouble]
    assert outcome.undone == []
    assert job.counted == Counter(PLAIN)
    unsure = trouble in ("kill-always", "stop-always")  # the first time, it may have been what was to follow
    assert len(list(tmp_path.glob(f"{trouble}@*"))) == 2 + unsure


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_worker_has_next_what_it_was_told_would_follow(local_ray: None, tmp_path: Path, workers: int) -> None:
    job = Recorded(tmp_path)
    job.size = workers
    items = [f"some-{i}" for i in range(12)]
    assert run(job, items) == Outcome([], {})
    told: dict[str, list[tuple[str, str]]] = {}
    for line in (tmp_path / "told").read_text().splitlines():
        pid, item, following = line.split()
        told.setdefault(pid, []).append((item, following))
    for pairs in told.values():
        kept = [following == item for (_, following), (item, _) in pairwise(pairs)]
        assert all(kept[:-1]), "another had nothing else to do before the end"
    following = [following for pairs in told.values() for _, following in pairs if following != "None"]
    assert len(set(following)) == len(following) >= len(items) - workers - 1


def test_what_kills_a_worker_that_reads_it_ahead_is_given_up_and_not_what_it_worked_on(
    local_ray: None, tmp_path: Path
) -> None:
    job = Recorded(tmp_path, commit_after=60.0, attempts=1)
    outcome = run(job, [*PLAIN[:4], "poison-always", *PLAIN[4:]])
    assert list(outcome.failed) == ["poison-always"]
    assert job.counted == Counter(PLAIN)


def test_a_slow_item_that_goes_on_telling_is_not_stalled(local_ray: None, tmp_path: Path) -> None:
    job = Recorded(tmp_path, stall=1.0)
    assert run(job, ["slow-1", *PLAIN[:3]]) == Outcome([], {})
    assert len(list(tmp_path.glob("slow-1@*"))) == 1


def test_the_pool_grows_and_shrinks_with_its_places(local_ray: None, tmp_path: Path) -> None:
    job = Recorded(tmp_path)
    job.size = 1
    begun = time.monotonic()

    def tick() -> None:
        if len(job.pids) == 1 and time.monotonic() - begun > 1:
            job.size = 3
        if len(job.pids) == 3 and not job.leavers:
            job.leavers = {job.pids[0]}
            job.size = 2
            (tmp_path / "grown").touch()

    items = ["long-0", *(f"slow-{i}" for i in range(5))]  # the first lasts until there are others for the rest
    assert run(job, items, tick) == Outcome([], {})
    assert len(job.pids) == 3, "one that left was replaced though there was no place, or none was added"
    assert job.counted == Counter(items)
    until(lambda: not Path(f"/proc/{job.pids[0]}").exists())  # it may take a moment to end


def test_a_worker_that_hangs_while_it_starts_is_replaced(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "stop-at-start").touch()
    job = Recorded(tmp_path, stall=1.0)
    job.size = 1
    assert run(job, PLAIN) == Outcome([], {})
    assert job.counted == Counter(PLAIN)


def test_an_item_that_takes_for_ever_is_given_up_though_its_worker_goes_on_telling(
    local_ray: None, tmp_path: Path
) -> None:
    job = Recorded(tmp_path, attempts=1, stall=5.0)
    job.item_timeout = 1.0
    outcome = run(job, ["slow-1", *PLAIN])
    assert list(outcome.failed) == ["slow-1"]
    assert "not done after 1 s" in str(outcome.failed["slow-1"])
    assert job.counted == Counter(PLAIN)


def test_commits_come_as_seldom_as_they_are_dear_and_never_later_than_may_be_lost(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "COMMIT_SHARE", 2)
    commits = {}
    for name, dear, most in (("cheap", 0.0, 60.0), ("dear", 3.0, 60.0), ("bounded", 3.0, 1.5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "commit-takes").write_text(str(dear))
        job = Recorded(folder, commit_after=most, stall=60.0)
        job.size = 1
        worker = worker_pool.Worker
        monkeypatch.setattr(worker_pool, "Worker", lambda actor, worker=worker: worker(actor, commit_cost=0.0))
        assert run(job, [f"some-{i}" for i in range(8)]) == Outcome([], {})
        monkeypatch.setattr(worker_pool, "Worker", worker)
        commits[name] = job.commits
    assert commits["dear"] < commits["bounded"] < commits["cheap"]


def test_commits_that_always_fail_end_the_job_though_each_new_worker_starts(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "commit-takes").write_text("60")
    job = Recorded(tmp_path, commit_after=0.0, stall=1.0)
    job.size = 1
    with pytest.raises(PoolError, match=r"workers cannot commit; the last time: no progress for 1 s"):
        run(job, PLAIN)
    assert not job.counted


def test_workers_that_never_start_end_the_job_with_the_cause(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    with pytest.raises(PoolError, match=r"(?s)workers cannot be started.*no such device"):
        run(Recorded(tmp_path), PLAIN)
