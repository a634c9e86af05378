"""The pool: each item counts once, or is given up by name, whatever happens to its workers.

Scheduling is tested with workers in this process, most of it in virtual time; what becomes of processes, on Ray.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from ray_jobs.config.timing import Timing
from ray_jobs.engine import worker_pool
from ray_jobs.engine.signals import stop_signals
from ray_jobs.engine.worker_backends import Backend, LocalBackend, RayBackend
from ray_jobs.engine.worker_pool import Outcome, PoolError
from tests.ray_jobs.failing import Actor, BadItemError
from tests.ray_jobs.pool_jobs import PLAIN, WORKER, Clock, Recorder, attempts_at, in_process, on_ray, run
from tests.ray_jobs.runs import wait_until


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Virtual time for a pool whose workers run in this process."""
    virtual = Clock()
    monkeypatch.setattr(worker_pool, "time", virtual)
    return virtual


@pytest.fixture(params=["in process", pytest.param("on Ray", marks=pytest.mark.ray)])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Workers of each kind."""
    if request.param == "in process":
        return in_process(tmp_path)
    request.getfixturevalue("local_ray")
    return on_ray(tmp_path)


# --- items that fail ----------------------------------------------------------------------------------


def fails_once_and_is_done_later(backend: Backend, folder: Path, trouble: str, max_loss: float | None) -> None:
    job = Recorder(max_loss)
    assert run(job, [*PLAIN[:6], trouble, *PLAIN[6:]], backend) == Outcome([], {})
    assert job.committed == Counter([*PLAIN, trouble])
    assert sorted(job.done) == sorted([*PLAIN, trouble])
    assert attempts_at(trouble, folder) == 2


@pytest.mark.parametrize("max_loss", [None, 0.05, 300])
def test_bad_item_is_done_later_and_nothing_counts_twice(tmp_path: Path, max_loss: float | None) -> None:
    fails_once_and_is_done_later(in_process(tmp_path), tmp_path, "bad-once", max_loss)


@pytest.mark.parametrize(
    ("trouble", "max_loss"),
    [
        pytest.param(f"{kind}-once", loss, marks=() if kind == "kill" or loss != 300 else pytest.mark.slow)
        for kind in ("bad", "bug", "kill", "stop")
        for loss in (None, 0.05, 300)
    ],
)
def test_item_that_fails_once_on_ray_is_done_later_and_nothing_counts_twice(
    local_ray: None, tmp_path: Path, trouble: str, max_loss: float | None
) -> None:
    fails_once_and_is_done_later(on_ray(tmp_path), tmp_path, trouble, max_loss)


def test_bad_item_is_given_up_by_name_and_delays_no_other(backend: Backend, tmp_path: Path) -> None:
    job = Recorder(attempts=2)
    outcome = run(job, ["bad-always", *PLAIN], backend)
    assert list(outcome.failed) == ["bad-always"]
    assert outcome.undone == []
    assert job.committed == Counter(PLAIN)
    assert attempts_at("bad-always", tmp_path) == 2
    assert job.errors == ["bad-always"] * 2


@pytest.mark.parametrize("trouble", ["bug-always", "kill-always", pytest.param("stop-always", marks=pytest.mark.slow)])
def test_item_that_breaks_its_worker_is_given_up_by_name_and_delays_no_other(
    local_ray: None, tmp_path: Path, trouble: str
) -> None:
    job = Recorder(attempts=2, stall=0.8)
    outcome = run(job, [trouble, *PLAIN], on_ray(tmp_path))
    assert list(outcome.failed) == [trouble]
    assert outcome.undone == []
    assert job.committed == Counter(PLAIN)
    uncertain = trouble in ("kill-always", "stop-always")  # the first time, the promised item may have been the cause
    assert attempts_at(trouble, tmp_path) == 2 + uncertain


def test_item_that_kills_the_worker_that_reads_it_ahead_is_given_up_and_not_the_item_before(
    local_ray: None, tmp_path: Path
) -> None:
    job = Recorder(max_loss=60.0, attempts=1)
    outcome = run(job, [*PLAIN[:4], "poison-always", *PLAIN[4:]], on_ray(tmp_path))
    assert list(outcome.failed) == ["poison-always"]
    assert job.committed == Counter(PLAIN)


def test_bug_in_process_keeps_its_traceback_and_closes_the_worker(tmp_path: Path) -> None:
    worker = Actor(tmp_path)
    with pytest.raises(RuntimeError, match="the device is lost") as caught:
        run(Recorder(workers=1), [*PLAIN[:2], "bug-always"], LocalBackend(lambda: worker))
    assert caught.traceback[-1].name == "work"
    assert worker.closed


class Faulty:
    """A worker in this process that fails or is lost as often as its items say."""

    def __init__(self, left: dict[str, list[str]]) -> None:
        self.left, self.held = left, list[str]()

    def describe(self) -> WORKER:
        return os.getpid(), id(self)

    def prepare(self) -> None: ...

    def work(self, item: str, following: str | None) -> Iterator[int]:
        yield 1
        if self.left[item]:
            fault = self.left[item].pop()
            if fault == "bad":
                self.held = []
                raise BadItemError(item)
            raise RayActorError
        self.held.append(item)
        yield 2

    def commit(self) -> list[str]:
        held, self.held = self.held, []
        return held

    def close(self) -> None:
        self.held = []


@pytest.mark.full
@settings(max_examples=200)
@given(
    faults=st.lists(st.lists(st.sampled_from(["bad", "lost"]), max_size=4), min_size=1, max_size=8),
    workers=st.integers(1, 3),
    attempts=st.integers(1, 4),
    max_loss=st.sampled_from([None, 0.0, 3.0, 100.0]),
    stop_after=st.none() | st.integers(0, 60),
)
def test_every_item_is_committed_once_or_given_up_or_left(
    faults: list[list[str]], workers: int, attempts: int, max_loss: float | None, stop_after: int | None
) -> None:
    clock, ticks = Clock(), 0
    left = {f"item-{n}": list(each) for n, each in enumerate(faults)}
    job = Recorder(max_loss, attempts, workers=workers)

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        clock.sleep(0.4)

    def stop() -> bool:
        return stop_after is not None and ticks >= stop_after

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker_pool, "time", clock)
        outcome = run(job, list(left), LocalBackend(lambda: Faulty(left)), tick, stop, Timing())
    assert sorted([*job.committed.elements(), *outcome.failed, *outcome.undone]) == sorted(left)
    assert sorted(job.done) == sorted(job.committed)
    for item, each in zip(left, faults):
        # A lost worker may be due to the promised item, so only some losses count as attempts.
        if item in outcome.failed:
            assert job.attempted.count(item) >= attempts
        elif item in job.committed:
            assert job.errors.count(item) == len(each)
            assert each.count("bad") < attempts
    if stop_after is None:
        assert not outcome.undone


# --- back-off and stops -------------------------------------------------------------------------------


def test_back_off_doubles_and_other_items_are_done_meanwhile(tmp_path: Path, clock: Clock) -> None:
    begun: list[float] = []

    class Timed(Recorder):
        def on_assigned(self, item: str, worker: WORKER) -> None:
            super().on_assigned(item, worker)
            if item == "bad-always":
                begun.append(clock.now)

    job = Timed(attempts=4, workers=1)
    items = ["bad-always", *(f"some-{i}" for i in range(4))]
    outcome = run(job, items, in_process(tmp_path, clock, unit=0.1), timing=Timing(back_off=10.0))
    assert list(outcome.failed) == ["bad-always"]
    assert job.attempted == [items[0], *items[1:], *items[:1] * 3]
    assert [later - earlier for earlier, later in pairwise(begun)] == pytest.approx([20.0, 40.0, 80.0])


def test_stop_signal_ends_a_back_off_of_hours_and_commits_the_other_items(backend: Backend) -> None:
    job = Recorder(max_loss=3600.0, stall=3600.0, workers=1)
    sent: list[int] = []

    def tick() -> None:
        if "bad-once" in job.errors and len(job.done) == 3 and not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with stop_signals() as stop:
        outcome = run(job, ["bad-once", *PLAIN[:3]], backend, tick, stop, Timing(poll=0.01, back_off=3600.0))
    assert sent, "the pool ended before the signal"
    assert outcome == Outcome(["bad-once"], {})
    assert job.committed == Counter(PLAIN[:3])


def test_stop_in_process_waits_for_the_current_item_and_commits_it(tmp_path: Path, clock: Clock) -> None:
    job = Recorder(max_loss=3600.0, workers=1)
    items = [f"slow-{i}" for i in range(4)]
    outcome = run(job, items, in_process(tmp_path, clock), stop=lambda: len(job.attempted) == 2, timing=Timing())
    assert outcome == Outcome(items[2:], {})
    assert job.committed == Counter(items[:2])


def test_stop_before_the_first_item_prepares_no_worker(tmp_path: Path) -> None:
    job = Recorder()
    assert run(job, PLAIN, in_process(tmp_path), stop=lambda: True) == Outcome(PLAIN, {})
    assert not job.ready


def test_second_signal_interrupts_the_current_item_and_closes_the_worker(tmp_path: Path) -> None:
    worker, job = Actor(tmp_path), Recorder(workers=1)

    def tick() -> None:
        if "slow-1" in job.attempted:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        run(job, [*PLAIN[:1], "slow-1"], LocalBackend(lambda: worker), tick, stop)
    assert worker.closed
    assert "slow-1" not in job.done


# --- which item comes next ----------------------------------------------------------------------------


def promises_are_kept(backend: Backend, folder: Path, workers: int) -> None:
    items = [f"some-{i}" for i in range(12)]
    assert run(Recorder(workers=workers), items, backend) == Outcome([], {})
    assignments: dict[str, list[tuple[str, str]]] = {}
    for line in (folder / "assignments").read_text().splitlines():
        worker, item, following = line.split()
        assignments.setdefault(worker, []).append((item, following))
    for pairs in assignments.values():
        kept = [following == item for (_, following), (item, _) in pairwise(pairs)]
        assert all(kept[:-1]), "only at the end may a worker that has nothing else to do take a promised item"
    promised = [following for pairs in assignments.values() for _, following in pairs if following != "None"]
    assert len(set(promised)) == len(promised) >= len(items) - workers - 1


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_gets_the_item_that_it_was_promised(tmp_path: Path, workers: int) -> None:
    promises_are_kept(in_process(tmp_path), tmp_path, workers)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_worker_on_ray_gets_the_item_that_it_was_promised(local_ray: None, tmp_path: Path, workers: int) -> None:
    promises_are_kept(on_ray(tmp_path), tmp_path, workers)


def test_one_worker_does_the_same_in_this_process_and_on_ray(local_ray: None, tmp_path: Path) -> None:
    orders = []
    for name, backend in (("local", in_process), ("ray", on_ray)):
        (folder := tmp_path / name).mkdir()
        job = Recorder(max_loss=60.0, workers=1)
        run(job, PLAIN, backend(folder))
        lines = (folder / "assignments").read_text().splitlines()
        orders.append(([line.split()[1:] for line in lines], job.done, job.commits, job.committed))
    assert orders[0] == orders[1]
    assert orders[0][1] == PLAIN


# --- workers that come, go, and hang ------------------------------------------------------------------


def test_pool_grows_and_shrinks_with_the_wanted_workers(backend: Backend, tmp_path: Path) -> None:
    job = Recorder(workers=1)
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if len(job.ready) == 1 and ticks > 10:
            job.workers = 3
        if len(job.ready) == 3 and not job.leaving:
            job.leaving = {job.ready[0]}
            job.workers = 2
            (tmp_path / "grown").touch()

    items = ["long-0", *(f"slow-{i}" for i in range(5))]  # the first item lasts until there are workers for the others
    assert run(job, items, backend, tick) == Outcome([], {})
    assert len(job.ready) == 3, "the worker that left was replaced although no more was wanted, or none was added"
    assert job.committed == Counter(items)
    if isinstance(backend, RayBackend):
        wait_until(lambda: not Path(f"/proc/{job.ready[0][0]}").exists())  # the process may take a moment to end


def test_slow_item_that_reports_is_not_stalled(local_ray: None, tmp_path: Path) -> None:
    assert run(Recorder(stall=1.0), ["slow-1", *PLAIN[:3]], on_ray(tmp_path)) == Outcome([], {})
    assert attempts_at("slow-1", tmp_path) == 1


def test_worker_in_this_process_never_stalls_however_long_a_report_takes(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "commit-takes").write_text("3600")
    job = Recorder(stall=1.0, max_loss=0.0, workers=1)
    job.item_timeout = float("inf")
    backend = in_process(tmp_path, clock, unit=3600.0)
    assert run(job, ["slow-1", *PLAIN[:3]], backend, timing=Timing()) == Outcome([], {})
    assert len(job.ready) == 1


def test_item_that_takes_too_long_is_given_up_although_its_worker_reports(tmp_path: Path, clock: Clock) -> None:
    job = Recorder(attempts=1, stall=500.0)
    job.item_timeout = 100.0
    outcome = run(job, ["slow-1", *PLAIN], in_process(tmp_path, clock, unit=6.0), timing=Timing())
    assert list(outcome.failed) == ["slow-1"]
    assert "not done after 100 s" in str(outcome.failed["slow-1"])
    assert job.committed == Counter(PLAIN)


def test_item_that_takes_too_long_on_ray_is_given_up_and_its_process_ends(local_ray: None, tmp_path: Path) -> None:
    job = Recorder(attempts=1, stall=5.0)
    job.item_timeout = 1.0
    outcome = run(job, ["slow-1", *PLAIN], on_ray(tmp_path))
    assert list(outcome.failed) == ["slow-1"]
    assert job.committed == Counter(PLAIN)


def test_worker_that_hangs_while_it_starts_is_replaced(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "stop-at-start").touch()
    job = Recorder(stall=1.0, workers=1)
    assert run(job, PLAIN, on_ray(tmp_path)) == Outcome([], {})
    assert job.committed == Counter(PLAIN)


# --- commits ------------------------------------------------------------------------------------------


def test_commits_are_rarer_the_longer_they_take_and_never_later_than_the_allowed_loss(clock: Clock) -> None:
    commits = {}
    timing = Timing(commit_ratio=2, first_commit=0)
    for name, seconds, max_loss in (("cheap", 0, 600.0), ("expensive", 30, 600.0), ("bounded", 30, 15.0)):
        with TemporaryDirectory() as folder:
            (Path(folder) / "commit-takes").write_text(str(seconds))
            job = Recorder(max_loss, stall=60.0, workers=1)
            backend = in_process(Path(folder), clock, unit=1.0)
            assert run(job, [f"some-{i}" for i in range(24)], backend, timing=timing) == Outcome([], {})
            commits[name] = job.commits
    # Items take 3 s. After the first commit: after each item; after 60 s and at the end; after 18 s each.
    assert commits == {"cheap": 24, "expensive": 3, "bounded": 5}


def test_bad_commit_ends_the_job_with_its_error_and_counts_nothing(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "bad-commit").touch()
    job = Recorder(max_loss=0.0)
    with pytest.raises(BadItemError, match="the disk is full"):
        run(job, PLAIN, backend)
    assert not job.committed


def test_commits_that_always_stall_end_the_job_although_each_new_worker_starts(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "commit-takes").write_text("600")
    job = Recorder(max_loss=0.0, stall=1.0, workers=1)
    with pytest.raises(PoolError, match=r"workers cannot commit; the last time: no progress for 1 s"):
        run(job, PLAIN, on_ray(tmp_path))
    assert not job.committed


def test_workers_that_never_start_end_the_job_with_the_cause(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    with pytest.raises(PoolError, match=r"(?s)workers cannot be started.*no such device"):
        run(Recorder(), PLAIN, on_ray(tmp_path))


def test_bad_start_ends_the_job_with_its_error(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "bad-start").touch()
    job = Recorder()
    with pytest.raises(BadItemError, match="no such model"):
        run(job, PLAIN, backend)
    assert not job.attempted
