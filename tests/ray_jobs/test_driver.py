"""The lease of a run: another driver is noticed, whatever the clocks of two machines say."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from patterns import UserError
from patterns.io import write_json
from ray_jobs.config.timing import Timing
from ray_jobs.runs.lease import Driver, Heartbeat, TakenOverError, find_driver, hold_lease
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.status import status_lines
from tests.ray_jobs.runs import wait_until

BRIEF = Timing(heartbeat_interval=0.005, stale_after=0.05, watch_interval=0.005)
PATIENT = replace(BRIEF, stale_after=3600.0)


@contextmanager
def later(path: Path, value: dict[str, object]) -> Iterator[None]:
    """Write a JSON file from another thread a moment later."""
    timer = threading.Timer(0.02, write_json, (path, value))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize("skew", [-7200.0, -1.0, 0.0, 7200.0])
def test_driver_of_another_machine_is_judged_by_its_heartbeat_and_not_by_its_clock(tmp_path: Path, skew: float) -> None:
    run, path, elsewhere = Run(tmp_path), tmp_path / "progress.json", replace(Driver.current(), host="another machine")
    seconds = time.time() + skew
    note = {"driver": vars(elsewhere), "time": seconds, "job": "fit"}
    write_json(path, note)
    assert find_driver(run, BRIEF) is None
    with later(path, note | {"time": seconds + 5}):
        assert find_driver(run, PATIENT) == elsewhere
    with later(path, note | {"ended": True}):
        assert find_driver(run, PATIENT) is None


def test_container_with_the_same_host_name_is_another_machine() -> None:
    other = replace(Driver.current(), space="another boot pid:[1]", begun="1")
    assert not other.has_ended()
    assert not other.is_local()


def test_second_driver_is_rejected_while_the_first_one_works(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with hold_lease(run, "fit"):
        with pytest.raises(UserError, match="works on this run") as caught, hold_lease(run, "fit"):
            pass
        assert caught.value.where == str(tmp_path)
    with hold_lease(run, "fit"):
        pass


def test_heartbeat_writes_the_progress_regularly(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with hold_lease(run, "fit", BRIEF) as heartbeat:
        heartbeat.progress = {"job": "fit", "shards": 3}
        wait_until(lambda: run.progress().get("shards") == 3)
        first = run.progress()["time"]
        wait_until(lambda: run.progress()["time"] > first)


def test_driver_that_was_taken_over_writes_no_heartbeat(tmp_path: Path) -> None:
    run, heartbeat = Run(tmp_path), Heartbeat(Run(tmp_path), Driver.current(), "fit", BRIEF)
    heartbeat.write()
    other = {"driver": vars(replace(Driver.current(), host="another machine")), "job": "fit"}
    write_json(tmp_path / "progress.json", other)
    heartbeat.thread.start()
    time.sleep(10 * BRIEF.heartbeat_interval)
    heartbeat.stopped.set()
    heartbeat.thread.join()
    assert run.progress() == other
    with pytest.raises(TakenOverError) as caught:
        heartbeat.require_lease()
    assert caught.value.where == str(tmp_path)


def test_driver_that_was_taken_over_does_not_say_that_the_run_has_ended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with hold_lease(run, "fit"):
        other = {"driver": vars(replace(Driver.current(), host="another machine")), "job": "fit"}
        write_json(tmp_path / "progress.json", other)
    assert run.progress() == other


def test_ended_driver_says_so_in_its_last_heartbeat(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with hold_lease(run, "fit"):
        assert not run.progress().get("ended")
    assert run.progress()["ended"] is True


def test_status_waits_for_a_driver_whose_clock_differs(tmp_path: Path) -> None:
    elsewhere = replace(Driver.current(), host="another machine")
    section = {"status": "begun", "missing": {}, "written": "now"}
    write_json(tmp_path / "manifest.json", {"format": 1, "fit": section})
    note = {"driver": vars(elsewhere), "time": time.time() + 3600, "job": "fit"}
    write_json(tmp_path / "progress.json", note)
    assert "stale" in list(status_lines(Run(tmp_path), time.time(), 0.01, BRIEF))[-1]
    with later(tmp_path / "progress.json", note | {"time": time.time() + 3605}):
        assert "stale" not in list(status_lines(Run(tmp_path), time.time(), 3600.0, BRIEF))[-1]
