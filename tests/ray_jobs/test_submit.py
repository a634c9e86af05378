"""Jobs on a cluster that asks for a token, submitted as users submit them, over a connection that may break."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from cluster.local import ROOT, LocalCluster
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from tests.conftest import make_shards
from tests.ray_jobs.runs import LATE, OPTIONS, assert_same_patterns, make_fit_config, wait_until

pytestmark = pytest.mark.full

PROGRAM = [sys.executable, "-m", "ray_jobs"]
TOKEN = secrets.token_hex(32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as cluster:
        client = jobs_of(cluster)
        deadline = time.monotonic() + 60
        while True:  # the dashboard answers before an agent accepts jobs
            try:
                client.submit_job(entrypoint="true")
            except RuntimeError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            else:
                break
        yield cluster


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [str(path) for path in make_shards(tmp_path / "shards", 4, 4)]


def jobs_of(cluster: LocalCluster) -> JobSubmissionClient:
    return JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {TOKEN}"})


def submitted(cluster: LocalCluster) -> dict[str, str]:
    """Return the status of each job that `patternnet submit` submitted, by name."""
    jobs = jobs_of(cluster).list_jobs()
    return {j.submission_id: j.status.value for j in jobs if (j.submission_id or "").startswith("patternnet-")}


def submission(cluster: LocalCluster, *arguments: object, address: str = "", **env: str) -> subprocess.Popen[str]:
    command = [*PROGRAM, "submit", "--address", address or cluster.dashboard, *map(str, arguments)]
    env = {**os.environ, **cluster.environment, **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process. Return its exit status, output and errors."""
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def late_fit(spec: str, shard: str, folder: Path) -> list[str]:
    """Return a fit that runs until there is a file `gate` in a folder."""
    late = LATE.format(gate=folder / "gate", shard=shard)
    return ["fit", "--model", spec, "--shards", late, "--allow-pipes", "--out", str(folder / "run"), *OPTIONS]


def read_progress(run: Path) -> dict[str, Any]:
    """Return the last heartbeat of a fit's driver; empty before the first."""
    return json.loads((run / "progress.json").read_text()) if has_begun(run) else {}


def has_begun(run: Path) -> bool:
    """Return whether a fit's driver has written a heartbeat."""
    return (run / "progress.json").exists()


class Proxy:
    """A proxy of a server that can be cut: it forwards connections, or closes them while it is cut."""

    def __init__(self, to: str) -> None:
        host, _, port = to.removeprefix("http://").partition(":")
        self.to, self.cut, self.open = (host, int(port)), False, set[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.accepted = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            if self.cut:
                near.close()
                continue
            self.accepted += 1
            far = socket.create_connection(self.to)
            self.open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pass_on, args=(source, sink), daemon=True).start()

    def pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # raised if the proxy is cut
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def break_connections(self) -> None:
        self.cut = True
        for end in self.open:
            with suppress(OSError):  # it has been closed already
                end.shutdown(socket.SHUT_RDWR)


def test_cluster_with_a_token_computes_the_patterns_and_maps_of_this_process(
    cluster: LocalCluster, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    config = make_fit_config(model_spec, shards, here)
    fit(config, Resources(workers=0))
    methods = ExplainConfig(model=config.model, patterns=str(here), shards=tuple(shards), out=str(here))
    explain(methods, Resources(workers=0))

    given = ["--shards", f"{tmp_path}/shards/train-{{000..003}}.tar", "--batch-size", "4", "--workers", "2"]
    excludes = json.dumps({"excludes": [".venv", "demo-run", "docs", "tests", ".git"]})
    rays = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.dashboard]
    rays += ["--working-dir", str(ROOT), "--runtime-env-json", excludes, "--", *PROGRAM]
    fitted = subprocess.run(
        [*rays, "fit", "--model", model_spec, *given, "--out", str(there), *OPTIONS],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    assert "fit: 16 samples of 4 shards, 0 rejected" in fitted.stdout
    assert_same_patterns(here, there)

    status, out, err = finish(submission(cluster, "explain", "--patterns", there, *given))
    assert status == 0, out + err
    assert "explain: 16 samples, 0 rejected" in out
    for mine in sorted((here / "explanations").glob("*.tar")):
        assert mine.read_bytes() == (there / "explanations" / mine.name).read_bytes()


def test_exit_status_and_reason_of_the_program_are_passed_on(
    cluster: LocalCluster, model_spec: str, tmp_path: Path
) -> None:
    none = f"{tmp_path}/none.tar"
    status, out, _ = finish(
        submission(cluster, "fit", "--model", model_spec, "--shards", none, "--out", tmp_path / "run")
    )
    assert status == 2
    assert f"patternnet: {none}: " in out
    assert "Traceback" not in out


NOT_SENT = {"RAY_AUTH_MODE": "disabled"}, "sends none"
ANOTHER = {"RAY_AUTH_TOKEN": "f" * 64}, "a different one"
NONE = {"RAY_AUTH_TOKEN": ""}, "has none"


@pytest.mark.parametrize(
    ("way", "env", "how"),
    [
        ("submitted", *NONE),
        ("attached", *NOT_SENT),
        pytest.param("submitted", *ANOTHER, marks=pytest.mark.slow),
        pytest.param("attached", *NONE, marks=pytest.mark.slow),
        pytest.param("submitted", *NOT_SENT, marks=pytest.mark.slow),
        pytest.param("attached", *ANOTHER, marks=pytest.mark.slow),
    ],
)
def test_cluster_accepts_no_job_without_its_token(
    cluster: LocalCluster, shards: list[str], tmp_path: Path, env: dict[str, str], how: str, way: str
) -> None:
    env = {"HOME": str(tmp_path), **env}
    command = ["fit", "--model", "torchvision:alexnet", "--shards", shards[0], "--out", str(tmp_path / "run")]
    before = submitted(cluster)
    if way == "submitted":
        status, _, err = finish(submission(cluster, *command, **env))
        address = cluster.dashboard
    else:
        done = subprocess.run(
            [*PROGRAM, *command, "--weights", "random"],
            env={**os.environ, **cluster.environment, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        status, err, address = done.returncode, done.stderr, cluster.address
    assert status == 2, err
    assert err.startswith("patternnet: --address ")
    assert err.count("\n") == 1
    for named in (address, how, "RAY_AUTH_TOKEN_PATH"):
        assert named in err
    assert submitted(cluster) == before
    assert not (tmp_path / "run" / "moments").exists()


@pytest.mark.slow
def test_broken_connection_loses_no_log_and_a_job_outlives_its_followers(
    cluster: LocalCluster, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    before, proxy = submitted(cluster), Proxy(cluster.dashboard)
    command = late_fit(model_spec, shards[0], tmp_path)
    first = submission(cluster, "--patience", "5m", *command, address=proxy.address)
    wait_until(lambda: has_begun(tmp_path / "run"))
    (name,) = submitted(cluster).keys() - before.keys()
    second = submission(cluster, *command)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"{name}: already running")
    second.send_signal(signal.SIGINT)
    status, _, err = finish(second)
    assert status == 3
    assert f"patternnet: {name} continues without this command" in err
    assert submitted(cluster)[name] == "RUNNING"

    wait_until(lambda: proxy.accepted > 3)  # the log is being followed
    proxy.break_connections()
    assert first.stdout is not None
    lines = []
    while "no answer from the cluster" not in (line := first.stdout.readline()):
        assert line, "the command ended"
        lines.append(line)
    proxy.cut = False
    (tmp_path / "gate").touch()
    status, out, err = finish(first)
    assert status == 0, out + err
    log, own = "".join(lines) + out, jobs_of(cluster).get_job_logs(name)
    assert log.count("fit: 4 samples of 1 shards, 0 rejected") == 1
    assert log.endswith(own)
    assert log.count(own) == 1


@pytest.mark.slow
def test_stopped_job_commits_first(cluster: LocalCluster, model_spec: str, shards: list[str], tmp_path: Path) -> None:
    before = submitted(cluster)
    command = [*late_fit(model_spec, shards[0], tmp_path), "--shards", shards[1], "--workers", "1"]
    follower = submission(cluster, *command)
    wait_until(lambda: has_begun(tmp_path / "run"))
    (name,) = submitted(cluster).keys() - before.keys()
    wait_until(lambda: any(w["shard"] for w in read_progress(tmp_path / "run").get("workers", ())))  # the late shard
    jobs_of(cluster).stop_job(name)
    time.sleep(15)  # longer than Ray itself would wait
    (tmp_path / "gate").touch()
    status, out, err = finish(follower)
    assert status == 3
    assert "stopped with 1 of 2 shards left" in out
    assert f"patternnet: {name} was stopped" in err

    status, out, err = finish(submission(cluster, *command))
    assert status == 0, out + err
    assert f"{name[:-2]}-2: submitted" in out
    assert "fit: 8 samples of 2 shards, 0 rejected" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit"], "'--model'"),
        (["fitt"], "'fitt'"),
        (["submit", "status", "run"], "cannot submit itself"),
        (["--working-dir", "none", "status", "run"], "--working-dir none"),
        (["--env", "NOT_SET_ANYWHERE", "status", "run"], "NOT_SET_ANYWHERE"),
        (["status", "run"], "--address http://127.0.0.1:1"),
        (["--address", "127.0.0.1:8265", "status", "run"], "http://HOST:8265"),
    ],
)
def test_command_that_cannot_be_submitted_is_reported_first(
    complaint: Callable[..., str], arguments: list[str], named: str
) -> None:
    assert named in complaint("submit", "--address", "http://127.0.0.1:1", *arguments)


@pytest.mark.slow
def test_variables_and_working_folder_reach_the_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """The model file is only in the submitted folder, and fails with the value of a variable."""
    (tmp_path / "mine.py").write_text("import os\n\ndef model():\n    raise RuntimeError(os.environ['GREETING'])\n")
    sending = ["--working-dir", tmp_path, "--env", "GREETING=hello"]
    status, out, err = finish(submission(cluster, *sending, "plan", "--model", "mine.py:model"))
    assert status == 2, out + err
    assert "RuntimeError: hello" in out
    assert not err
