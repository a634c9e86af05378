"""One driver for each run: how another one is noticed, whatever the clocks of two machines say."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from patterns.io.atomic import write_json
from ray_jobs.runs import lease
from ray_jobs.runs.lease import Driver
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.status import status_lines


@pytest.mark.parametrize("skew", [-7200.0, -1.0, 0.0, 7200.0])
def test_a_driver_of_another_machine_is_judged_by_its_notes_and_not_by_its_clock(tmp_path: Path, skew: float) -> None:
    run, elsewhere = Run(tmp_path), replace(Driver.current(), host="another machine")
    note = {"driver": vars(elsewhere), "time": time.time() + skew, "job": "fit"}

    def write(**more: object) -> None:
        write_json(tmp_path / "progress.json", note | more)

    write()
    assert lease.working(run, patience=0.05, pause=0.01) is None
    heartbeat = threading.Timer(0.1, write, kwargs={"time": note["time"] + 5})  # type: ignore[operator]
    heartbeat.start()
    assert lease.working(run, patience=60, pause=0.01) == elsewhere
    heartbeat = threading.Timer(0.1, write, kwargs={"ended": True})
    heartbeat.start()
    assert lease.working(run, patience=60, pause=0.01) is None


def test_a_container_with_the_same_host_name_is_another_machine() -> None:
    other = replace(Driver.current(), space="another boot pid:[1]", begun="1")
    assert not other.has_ended()
    assert not other.is_local()


def test_status_waits_for_a_driver_whose_clock_differs(tmp_path: Path) -> None:
    elsewhere = replace(Driver.current(), host="another machine")
    section = {"status": "begun", "missing": {}, "written": "now"}
    write_json(tmp_path / "manifest.json", {"format": 1, "fit": section})
    note = {"driver": vars(elsewhere), "time": time.time() + 3600, "job": "fit"}
    write_json(tmp_path / "progress.json", note)
    assert "stale" in list(status_lines(Run(tmp_path), time.time(), patience=0.01))[-1]
    threading.Timer(0.1, write_json, (tmp_path / "progress.json", note | {"time": time.time() + 3605})).start()
    assert "stale" not in list(status_lines(Run(tmp_path), time.time(), patience=60))[-1]
