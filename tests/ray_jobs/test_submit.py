"""A real cluster: jobs submitted with `ray job submit`, as a user would."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.conftest import make_shards

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a cluster started on loopback."""
    temp = tmp_path_factory.mktemp("cluster")
    port, ui, agent = free_port(), free_port(), free_port()  # another Ray's agent may hold the usual one
    command = [*RAY, "start", "--head", "--block", "--num-cpus", "2", "--node-ip-address", "127.0.0.2"]
    command += ["--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(ui)]
    command += ["--dashboard-agent-listen-port", str(agent)]
    command += ["--temp-dir", f"/tmp/ray-{os.getpid()}-{port}", "--disable-usage-stats"]
    with (temp / "log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ui}"
    try:
        wait_for_agent(address, head)
        yield address
    finally:
        head.terminate()
        head.wait(30)


def wait_for_agent(address: str, head: subprocess.Popen[bytes]) -> None:
    """Until the cluster takes jobs; its dashboard answers before there is an agent that does."""
    deadline = time.monotonic() + 120
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
            return
        except Exception:
            if time.monotonic() > deadline or head.poll() is not None:
                raise
            time.sleep(0.5)


def submit(dashboard: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", "submit", "--address", dashboard, "--working-dir", str(ROOT)]
    command += ["--runtime-env-json", json.dumps({"excludes": [".venv", "demo-run", "docs", "tests", ".git"]})]
    command += ["--", sys.executable, "-m", "ray_jobs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_fit_and_explain_run_as_submitted_jobs(dashboard: str, model_spec: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", 4, 4)
    prepared = ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    shards = ["--shards", f"{tmp_path}/shards/train-{{000..003}}.tar"]
    out = tmp_path / "run"
    fitted = submit(dashboard, "fit", "--model", model_spec, *shards, "--out", str(out), "--workers", "2", *prepared)
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    assert "fit: 16 samples of 4 shards, 0 refused" in fitted.stdout
    explained = submit(dashboard, "explain", "--patterns", str(out), *shards, "--workers", "2")
    assert explained.returncode == 0, explained.stdout + explained.stderr
    assert len(list((out / "explanations").glob("*.tar"))) == 4
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["fit"]["status"] == manifest["explain"]["status"] == "complete"
    statuses = [j.status for j in JobSubmissionClient(dashboard).list_jobs() if j.submission_id]
    assert sorted(statuses)[-2:] == ["SUCCEEDED", "SUCCEEDED"]


def test_a_job_with_bad_input_fails_with_its_reason_and_status(dashboard: str, model_spec: str, tmp_path: Path) -> None:
    before = {j.submission_id for j in JobSubmissionClient(dashboard).list_jobs()}
    none = str(tmp_path / "none.tar")
    submit(dashboard, "fit", "--model", model_spec, "--shards", none, "--out", str(tmp_path / "run"))
    client = JobSubmissionClient(dashboard)
    (job,) = [j for j in client.list_jobs() if j.submission_id not in before]
    assert job.status == "FAILED"
    assert job.driver_exit_code == 2
    log = client.get_job_logs(str(job.submission_id))
    assert f"patternnet: {none}: no such shard. Check --shards" in log
    assert "Traceback" not in log
