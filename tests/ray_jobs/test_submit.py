"""Jobs of a cluster that asks for a token, sent as users send them, over a line that may break."""

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

PROGRAM = [sys.executable, "-m", "ray_jobs"]
TOKEN = secrets.token_hex(32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as cluster:
        client = jobs_of(cluster)
        deadline = time.monotonic() + 60
        while True:  # the dashboard answers before there is an agent that takes jobs
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


def sent(cluster: LocalCluster) -> dict[str, str]:
    """The status of each job that `patternnet submit` sent."""
    jobs = jobs_of(cluster).list_jobs()
    return {j.submission_id: j.status.value for j in jobs if (j.submission_id or "").startswith("patternnet-")}


def submission(cluster: LocalCluster, *arguments: object, address: str = "", **env: str) -> subprocess.Popen[str]:
    command = [*PROGRAM, "submit", "--address", address or cluster.dashboard, *map(str, arguments)]
    env = {**os.environ, **cluster.environment, **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def late_fit(spec: str, shard: str, folder: Path) -> list[str]:
    """A fit that goes on as long as there is no file `gate` in a folder."""
    late = LATE.format(gate=folder / "gate", shard=shard)
    return ["fit", "--model", spec, "--shards", late, "--allow-pipes", "--out", str(folder / "run"), *OPTIONS]


def progress(run: Path) -> dict[str, Any]:
    """What a fit's driver last noted; empty before it has begun."""
    return json.loads((run / "progress.json").read_text()) if at_work(run) else {}


def at_work(run: Path) -> bool:
    """Whether a fit's driver has begun."""
    return (run / "progress.json").exists()


class Line:
    """A line to a server that can be cut: connections are passed on, or closed while it is."""

    def __init__(self, to: str) -> None:
        host, _, port = to.removeprefix("http://").partition(":")
        self.to, self.cut, self.open = (host, int(port)), False, set[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.taken = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            if self.cut:
                near.close()
                continue
            self.taken += 1
            far = socket.create_connection(self.to)
            self.open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pass_on, args=(source, sink), daemon=True).start()

    def pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # as happens when it is cut
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def break_(self) -> None:
        self.cut = True
        for end in self.open:
            with suppress(OSError):  # it has ended by itself
                end.shutdown(socket.SHUT_RDWR)


def test_a_cluster_with_a_token_gives_the_patterns_and_maps_of_this_process(
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

    status, out, err = ended(submission(cluster, "explain", "--patterns", there, *given))
    assert status == 0, out + err
    assert "explain: 16 samples, 0 rejected" in out
    for mine in sorted((here / "explanations").glob("*.tar")):
        assert mine.read_bytes() == (there / "explanations" / mine.name).read_bytes()


def test_the_programs_own_exit_status_and_reason_are_handed_on(
    cluster: LocalCluster, model_spec: str, tmp_path: Path
) -> None:
    none = f"{tmp_path}/none.tar"
    status, out, _ = ended(
        submission(cluster, "fit", "--model", model_spec, "--shards", none, "--out", tmp_path / "run")
    )
    assert status == 2
    assert f"patternnet: {none}: no such shard. Check --shards" in out
    assert "Traceback" not in out


NOT_SENT = {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is not `token` here, so this process sends none"
ANOTHER = {"RAY_AUTH_TOKEN": "f" * 64}, "this process has a different one"
NONE = {"RAY_AUTH_TOKEN": ""}, "this process has none"


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
def test_without_its_token_a_cluster_takes_no_job(
    cluster: LocalCluster, shards: list[str], tmp_path: Path, env: dict[str, str], how: str, way: str
) -> None:
    env = {"HOME": str(tmp_path), **env}
    command = ["fit", "--model", "torchvision:alexnet", "--shards", shards[0], "--out", str(tmp_path / "run")]
    before = sent(cluster)
    if way == "submitted":
        status, _, err = ended(submission(cluster, *command, **env))
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
    remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
    assert err == f"patternnet: --address {address}: the cluster asks for a token, but {how}. {remedy}\n"
    assert sent(cluster) == before
    assert not (tmp_path / "run" / "moments").exists()


@pytest.mark.slow
def test_a_broken_line_loses_nothing_of_the_log_and_a_job_goes_on_without_who_follows_it(
    cluster: LocalCluster, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    before, line = sent(cluster), Line(cluster.dashboard)
    command = late_fit(model_spec, shards[0], tmp_path)
    first = submission(cluster, "--patience", "5m", *command, address=line.address)
    wait_until(lambda: at_work(tmp_path / "run"))
    (name,) = sent(cluster).keys() - before.keys()
    second = submission(cluster, *command)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"{name}: already running")
    second.send_signal(signal.SIGINT)
    status, _, err = ended(second)
    assert status == 3
    assert f"{name} goes on without this command; the same command follows it again" in err
    assert sent(cluster)[name] == "RUNNING"

    wait_until(lambda: line.taken > 3)  # its log is being followed
    line.break_()
    assert first.stdout is not None
    said = []
    while "does not answer" not in (heard := first.stdout.readline()):
        said.append(heard)
    line.cut = False
    (tmp_path / "gate").touch()
    status, out, err = ended(first)
    assert status == 0, out + err
    log, own = "".join(said) + out, jobs_of(cluster).get_job_logs(name)
    assert log.count("fit: 4 samples of 1 shards, 0 rejected") == 1
    assert log.endswith(own)
    assert log.count(own) == 1


@pytest.mark.slow
def test_a_job_that_is_stopped_commits_first(
    cluster: LocalCluster, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    before = sent(cluster)
    command = [*late_fit(model_spec, shards[0], tmp_path), "--shards", shards[1], "--workers", "1"]
    follower = submission(cluster, *command)
    wait_until(lambda: at_work(tmp_path / "run"))
    (name,) = sent(cluster).keys() - before.keys()
    wait_until(lambda: any(w["shard"] for w in progress(tmp_path / "run").get("workers", ())))  # the late one
    jobs_of(cluster).stop_job(name)
    time.sleep(15)  # longer than Ray itself would wait
    (tmp_path / "gate").touch()
    status, out, err = ended(follower)
    assert status == 3
    assert "stopped with 1 of 2 shards left" in out
    assert f"patternnet: {name} was stopped; the same command goes on" in err

    status, out, err = ended(submission(cluster, *command))
    assert status == 0, out + err
    assert f"{name[:-2]}-2: sent" in out
    assert "fit: 8 samples of 2 shards, 0 rejected" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fit"], "Missing option '--model'"),
        (["fitt"], "No such command 'fitt'"),
        (["submit", "status", "run"], "submit: it cannot submit itself"),
        (["--working-dir", "none", "status", "run"], "--working-dir none: no such folder"),
        (["--env", "NOT_SET_ANYWHERE", "status", "run"], "names no variable that has a value here"),
        (["status", "run"], "--address http://127.0.0.1:1: no Ray cluster answers there"),
        (["--address", "127.0.0.1:8265", "status", "run"], "not a dashboard's address. Write http://HOST:8265"),
    ],
)
def test_what_cannot_be_sent_is_said_before_anything_is(
    complaint: Callable[..., str], arguments: list[str], reason: str
) -> None:
    assert reason in complaint("submit", "--address", "http://127.0.0.1:1", *arguments)


@pytest.mark.slow
def test_variables_and_the_working_folder_reach_the_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """A model file that is only in the folder sent, and fails with what it finds in a variable."""
    (tmp_path / "mine.py").write_text("import os\n\ndef model():\n    raise RuntimeError(os.environ['GREETING'])\n")
    sending = ["--working-dir", tmp_path, "--env", "GREETING=hello"]
    status, out, err = ended(submission(cluster, *sending, "plan", "--model", "mine.py:model"))
    assert status == 1, out + err
    assert "RuntimeError: hello" in out
    assert not err
