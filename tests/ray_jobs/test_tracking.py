"""Experiment trackers: what they get, and that a job neither waits for them nor fails because of them."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import Resources
from ray_jobs.config.timing import Timing
from ray_jobs.engine import trackers, tracking
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.engine.trackers import flatten_options, require_tracker
from ray_jobs.engine.tracking import MAX_POINTS, Tracker, describe_place, mirror
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.runs.run_folder import Run
from tests.ray_jobs.runs import OPTIONS, make_fit_config, read_command, wait_until

FAST = Timing(track_interval=0.01, display_interval=0.0, report_interval=0.0)


class Recorder:
    """A client that records, and may be down or hang."""

    made: list["Recorder"]

    def __init__(self, *arguments: str) -> None:
        self.arguments, self.calls = arguments, list[tuple[Any, ...]]()
        self.made.append(self)

    def log_options(self, options: Mapping[str, str]) -> None:
        self.calls.append(("options", dict(options)))

    def log_metrics(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        self.calls.append(("metrics", dict(metrics), step))

    def attach(self, file: Path) -> None:
        self.calls.append(("file", file.name, file.read_text()))

    def finish(self, state: str) -> None:
        self.calls.append(("finish", state))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """The tracker `mlflow` as a recorder."""
    kind = type("Bound", (Recorder,), {"made": []})
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", kind)
    monkeypatch.setitem(sys.modules, "mlflow", sys)
    return kind


def resources(track: str | None = "mlflow:http://h", **options: Any) -> Resources:
    return Resources(workers=0, track=track, timing=FAST, **options)


@pytest.mark.full
def test_fit_is_mirrored_with_options_progress_figures_and_report(
    recorder: type[Recorder], model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FILE_WAIT", 300.0)
    monkeypatch.setattr(tracking, "LAST_WAIT", 300.0)
    command = ["fit", "--model", model_spec, *OPTIONS, *[w for s in shards[:2] for w in ("--shards", s)]]
    assert exit_status([*command, "--out", str(tmp_path / "run"), "--workers", "0", "--track", "mlflow:http://h"]) == 0
    job, report = recorder.made
    section = Run(tmp_path / "run").manifest()["fit"]
    assert job.arguments == report.arguments == ("http://h", "run/fit", section["tracking"])
    kinds = [call[0] for call in job.calls]
    assert kinds[0] == "options"
    assert kinds[-1] == "finish"
    options = job.calls[0][1]
    assert (options["batch_size"], options["shards"]) == ("32", f"2 from {shards[0]}")
    final = job.calls[-2][1]
    assert final["final samples"] == section["samples"] == 12
    assert final["final missing shards"] == 0
    assert {"samples", "shards", "samples per second", "rejected"} <= set(job.calls[-3][1])
    assert job.calls[-3][2] == 2
    (page,) = (call for call in report.calls if call[0] == "file")
    assert page[1] == "report.html"
    assert "<html" in page[2]


@pytest.mark.full
def test_concepts_are_mirrored_with_their_report(
    recorder: type[Recorder], model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FILE_WAIT", 300.0)
    monkeypatch.setattr(tracking, "LAST_WAIT", 300.0)
    labels = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"key": [f"s000-{n}" for n in range(6)], "even": [0, 1] * 3}), labels)
    config = make_fit_config(model_spec, shards[:1], tmp_path / "run", concepts=str(labels))
    fit(config, resources(None))
    command = ["concepts", "--patterns", config.out, "--shards", shards[0], "--workers", "0"]
    assert exit_status([*command, "--track", "mlflow:http://h"]) == 0
    job, report = recorder.made
    tracked = Run(config.out).manifest()["concepts"]["tracking"]
    assert job.arguments == report.arguments == ("http://h", "run/concepts", tracked)
    assert job.calls[-2][1]["final samples"] == 6
    assert [call[1] for call in report.calls if call[0] == "file"] == ["report.html"]


@pytest.mark.parametrize(
    ("error", "state"),
    [(StoppedShortError("stop"), "stopped"), (KeyboardInterrupt(), "stopped"), (OSError(), "failed")],
)
def test_end_of_a_job_is_the_end_of_its_mirror(recorder: type[Recorder], error: BaseException, state: str) -> None:
    section = {"options": {}, "tracking": "k"}
    with pytest.raises(type(error)), mirror(resources(), Run("/runs/a"), "fit", section, dict):
        raise error
    assert recorder.made[0].calls[-1] == ("finish", state)


def finish(number: int) -> tracking.Call:
    return lambda client: client.finish(str(number))


def test_tracker_that_is_down_is_one_line_and_gets_what_waited(capfd: pytest.CaptureFixture[str]) -> None:
    up, made, lines, tries = threading.Event(), list[Recorder](), list[str](), list[int]()
    kind = type("Bound", (Recorder,), {"made": made})

    def connect() -> Recorder:
        tries.append(1)
        if not up.is_set():
            raise ConnectionError("refused\nby the server")
        return kind()

    numbers = count()
    tracker = Tracker(connect, "mlflow at h", lines.append, 0.001, lambda: finish(next(numbers)))
    wait_until(lambda: len(tries) > 3)
    up.set()
    wait_until(lambda: made)
    tracker.close(300)
    assert lines == ["tracking: mlflow at h does not work (refused by the server); the job goes on without it"]
    sent = [int(call[1]) for call in made[0].calls]
    assert sent == list(range(sent[0], sent[-1] + 1))
    assert len(sent) > 3


def test_points_that_wait_are_bounded_and_the_oldest_are_dropped() -> None:
    held = threading.Event()
    tracker = Tracker(lambda: held.wait() and Recorder(), "h", lambda _: None, 1000.0)  # type: ignore[arg-type,return-value]
    for number in range(3 * MAX_POINTS):
        tracker.send(finish(number))
    assert len(tracker.waiting) == MAX_POINTS
    held.set()


@pytest.mark.full
def test_job_does_not_wait_for_a_tracker_that_hangs(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    model_spec: str, shards: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    held = threading.Event()
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", lambda *_: held.wait())
    monkeypatch.setattr(tracking, "LAST_WAIT", 0.2)
    run = fit(make_fit_config(model_spec, shards[:1], tmp_path / "run"), resources("mlflow:http://me:secret@h:1/x"))
    assert run.manifest()["fit"]["status"] == "complete"
    err = capfd.readouterr().err
    assert "mlflow at http://h:1/x did not take the last figures within 0.2 s" in err
    assert "secret" not in err
    held.set()


@pytest.mark.full
def test_resumed_job_continues_its_mirror_and_untracked_jobs_need_no_package(
    recorder: type[Recorder], model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_fit_config(model_spec, shards[:1], tmp_path / "run")
    bad = replace(config, shards=(str(tmp_path / "none.tar"),), out=str(tmp_path / "bad"))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            fit(bad, resources(retries=0))
        assert caught.value.where == bad.shards[0]
    assert len({client.arguments for client in recorder.made}) == 1
    monkeypatch.setitem(sys.modules, "mlflow", None)
    fit(config, resources(None))
    with pytest.raises(UserError, match=r"patternnet-ray\[mlflow\]"):
        fit(replace(config, out=str(tmp_path / "other")), resources())


def test_options_are_texts_that_trackers_accept() -> None:
    options = {"shards": ["/a.tar"] * 3, "model": {"spec": "x" * 900}, "evaluate": [], "seed": 0, "keys": None}
    found = dict(flatten_options(options))
    assert found == {
        "shards": "3 from /a.tar", "model.spec": "x" * 500, "evaluate": "[]", "seed": "0", "keys": "None"
    }  # fmt: skip
    assert describe_place("wandb") == "wandb"


@pytest.mark.parametrize("text", ["mlfow", "mlflow:", "wandb:x", ""])
def test_unknown_tracker_is_one_line(text: str, complaint: Callable[..., str]) -> None:
    assert "is no tracker" in complaint("fit", "--model", "m", "--shards", "s", "--out", "o", "--track", text)


def test_wandb_without_a_key_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", sys)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        require_tracker("wandb")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    require_tracker("wandb")


# --- real trackers ------------------------------------------------------------------------------------

PATH = {"PYTHONPATH": os.pathsep.join(sys.path)}  # mlflow may be in a folder of its own


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server on this machine."""
    pytest.importorskip("mlflow", reason="needs mlflow-skinny: pip install mlflow-skinny")
    for name in ("sqlalchemy", "alembic", "graphene"):
        pytest.importorskip(name, reason=f"the server of MLflow needs {name}, which mlflow-skinny does not install")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *stores], env=os.environ | PATH, stdout=log, stderr=log, cwd=tmp_path, process_group=0
        )
    try:
        for _ in range(3000):
            assert process.poll() is None, (tmp_path / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_mlflow_server_gets_a_fit_and_its_report(
    server: tuple[str, subprocess.Popen[bytes]], model_spec: str, shards: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import mlflow

    monkeypatch.setattr(tracking, "FILE_WAIT", 300.0)
    monkeypatch.setattr(tracking, "LAST_WAIT", 300.0)
    for shard in shards[:2]:
        (tmp_path / "data" / Path(shard).name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / Path(shard).name).write_bytes(Path(shard).read_bytes())
    monkeypatch.chdir(tmp_path)
    ours = {"torchvision:resnet50": model_spec, "mlflow:sqlite:///mlflow.db": f"mlflow:{server[0]}"}
    command = [*(ours.get(word, word) for word in read_command("jobs.md", "## Tracking")), *OPTIONS, "--workers", "0"]
    for _ in range(2):  # the second time nothing is left to do
        assert exit_status(command) == 0
    client = mlflow.MlflowClient(server[0])
    experiment = client.get_experiment_by_name("patternnet")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tracked/fit", "FINISHED")
    assert run.data.params["batch_size"] == "32"
    assert run.data.metrics["final samples"] == 12
    assert [point.value for point in client.get_metric_history(run.info.run_id, "samples")][-1] == 12
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.full
def test_moved_run_continues_its_mirror_in_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    for name in ("sqlalchemy", "alembic"):
        pytest.importorskip(name, reason=f"MLflow's store needs {name}, which mlflow-skinny does not install")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for out in ("/here/run", "/there/run"):
        client = trackers.MlflowClient(uri, "run/fit", "key")
        client.log_options({"out": out, "seed": "0"})
        client.log_metrics({"samples": 1.0}, 1, time.time())
    (run,) = client.client.search_runs([client.client.get_experiment_by_name("patternnet").experiment_id])
    assert run.data.params == {"out": "/here/run", "seed": "0"}
    assert (run.data.tags["out"], "seed" in run.data.tags) == ("/there/run", False)


@pytest.mark.slow
def test_fit_goes_on_if_the_mlflow_server_dies(
    server: tuple[str, subprocess.Popen[bytes]], model_spec: str, shards: list[str], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import mlflow

    address, process = server
    client = mlflow.MlflowClient(address)

    def kill_after_first_point() -> None:
        def has_points() -> bool:
            found = client.get_experiment_by_name("patternnet")
            runs = client.search_runs([found.experiment_id]) if found else []
            return bool(runs and "samples" in runs[0].data.metrics)

        wait_until(has_points)
        os.killpg(process.pid, 9)
        (tmp_path / "dead").touch()

    killer = threading.Thread(target=kill_after_first_point)
    killer.start()
    late = f"pipe:for i in $(seq 3000); do [ -e {tmp_path}/dead ] && break; sleep 0.1; done; sleep 1; cat {shards[1]}"
    config = make_fit_config(model_spec, [shards[0], late], tmp_path / "run")
    section = fit(config, resources(f"mlflow:{address}")).manifest()["fit"]
    killer.join()
    assert (section["status"], section["samples"]) == ("complete", 12)
    err = capfd.readouterr().err
    assert err.count("the job goes on without it") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_take_a_fit(
    name: str, model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path / "trackio")):
        monkeypatch.setenv(variable, str(value))
    pytest.importorskip(name, reason=f"needs {name}: pip install {name}")  # which reads some of them
    monkeypatch.setattr(tracking, "FILE_WAIT", 300.0)
    monkeypatch.setattr(tracking, "LAST_WAIT", 300.0)
    command = ["fit", "--model", model_spec, *OPTIONS, "--shards", shards[0], "--out", str(tmp_path / "run")]
    assert exit_status([*command, "--workers", "0", "--track", name]) == 0
    assert "tracking:" not in capfd.readouterr().err
    assert [file for file in tmp_path.rglob("*") if file.suffix in (".wandb", ".db")]
