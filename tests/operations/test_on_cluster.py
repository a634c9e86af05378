"""The commands of docs/operations.md for a cluster, run during the failures that they fix."""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from cluster.local import LocalCluster
from cluster.processes import send
from tests.operations.terminal import (
    SAMPLES,
    SHARDS,
    TOKEN,
    Terminal,
    assert_complete,
    blocks,
    commands,
    given,
    late,
    other_version,
)
from tests.ray_jobs.runs import wait_until


def ready(cluster: LocalCluster) -> None:
    """Wait until a cluster accepts jobs: its dashboard answers before its agent does."""
    client, begun = JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {TOKEN}"}), []

    def taken() -> bool:
        with contextlib.suppress(RuntimeError):
            begun.append(client.submit_job(entrypoint="true"))
        return bool(begun)

    wait_until(taken)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as cluster:
        ready(cluster)
        yield cluster


@pytest.fixture
def away(terminal: Terminal, cluster: LocalCluster, plain: list[str], tmp_path: Path) -> Terminal:
    """A terminal for jobs on the cluster; the third shard waits for a file `gate`."""
    terminal.names["SHARDS"] = late(plain, tmp_path)
    terminal.cluster = cluster
    return terminal


def sent(process: subprocess.Popen[str]) -> str:
    """Return the name of the job that `patternnet submit` sends or finds."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.match(r"patternnet-\S+: (submitted|already running)", line), line + process.stdout.read()
    return line.partition(":")[0]


def at_work(terminal: Terminal) -> bool:
    """Return whether a worker has started the shard that waits."""
    path = Path(str(terminal.names["RUN"])) / "progress.json"
    workers = json.loads(path.read_text()).get("workers", ()) if path.exists() else ()
    return any("pipe:" in str(worker["shard"]) for worker in workers)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.slow
def test_missing_token_is_reported_and_a_token_file_fixes_it(away: Terminal, undisturbed: Path) -> None:
    export, same = commands("The token is wrong or missing")
    away.env = {"RAY_AUTH_TOKEN": "f" * 64}
    status, output = away(same)
    assert status == 2
    assert "the cluster asks for a token" in output
    Path("ray-token").write_text(TOKEN)
    Path("gate").touch()
    status, output = away("unset RAY_AUTH_MODE RAY_AUTH_TOKEN", export, same)
    assert status == 0, output
    assert_complete(away, undisturbed)


@pytest.mark.slow
def test_suspended_and_killed_submissions_lose_nothing(away: Terminal, undisturbed: Path) -> None:
    (same,) = commands("The laptop slept")
    first = away.start(f"exec {same}")
    name = sent(first)
    wait_until(lambda: at_work(away))
    first.send_signal(signal.SIGSTOP)
    second = away.start(f"exec {same}")
    assert sent(second) == name
    second.kill()
    second.wait()
    Path("gate").touch()
    wait_until(Path("run/patterns.safetensors").exists)
    first.send_signal(signal.SIGCONT)
    status, output = ended(first)
    assert status == 0, output
    assert output.count(f"fit: {SHARDS * SAMPLES} samples") == 1
    assert_complete(away, undisturbed)


@pytest.mark.slow
def test_stuck_job_continues_after_its_hung_worker_is_killed(away: Terminal, undisturbed: Path) -> None:
    (looked, nodes), (end,) = blocks("A job stands still")
    (same,) = commands("The laptop slept")
    job = away.start(same)
    sent(job)
    wait_until(lambda: at_work(away))
    assert away.cluster is not None
    send(signal.SIGSTOP, [p.pid for p in away.cluster.workers() if "Worker.work" in p.title])
    Path("gate").touch()
    for line in (looked, nodes):
        status, output = away(line)
        assert status == 0, output
        if line == looked:
            (away.names["PID"],) = re.findall(r"/(\d+): .* at pipe:", output)
    assert away(end)[0] == 0
    status, output = ended(job)
    assert status == 0, output
    assert_complete(away, undisturbed)


@pytest.mark.slow
def test_a_stopped_job_commits_before_it_ends(away: Terminal, undisturbed: Path) -> None:
    (stop,), (same,) = blocks("A run must be stopped")
    job = away.start(same)
    away.names["JOB"] = sent(job)
    wait_until(lambda: at_work(away))
    stopping = away.start(stop)
    time.sleep(5)  # longer than Ray's default of three seconds
    Path("gate").touch()
    assert ended(stopping)[0] == 0
    status, output = ended(job)
    assert status == 3, output
    ledger = json.loads(Path("run/moments/ledger.json").read_text())
    assert sum(part["samples"] for part in ledger["parts"]) >= 3 * SAMPLES
    status, output = away(same)
    assert status == 0, output
    assert_complete(away, undisturbed)


@pytest.mark.slow
def test_lost_node_needs_no_command(away: Terminal, undisturbed: Path) -> None:
    (same,) = commands("The laptop slept")
    job = away.start(same)
    sent(job)
    wait_until(lambda: at_work(away))
    assert away.cluster is not None
    away.cluster.kill_node(max(away.cluster.nodes))
    added = away.cluster.add_node()
    Path("gate").touch()
    status, output = ended(job)
    assert status == 0, output
    assert added.number in away.cluster.nodes
    assert_complete(away, undisturbed)


@pytest.mark.slow
def test_nodes_with_other_versions_are_reported(away: Terminal) -> None:
    version, doctor = commands("Versions differ")
    assert away.cluster is not None
    other = away.cluster.add_node(env=other_version(Path.cwd() / "other"))
    status, output = away("cd /", version, doctor)  # Ray's workers import from their driver's folder first
    assert status == 2
    assert re.search(r"patternnet-ray 9\.9, but \S+ here", output), output
    away.cluster.kill_node(other.number)
    wait_until(lambda: away("cd /", doctor)[0] == 0)  # after Ray has given up the node


@pytest.mark.slow
def test_cluster_is_examined_and_a_trial_is_merged_with_the_rest(
    terminal: Terminal, cluster: LocalCluster, plain: list[str], undisturbed: Path
) -> None:
    terminal.names |= {"SOME": given(plain[:2]), "REST": given(plain[2:])}
    (doctor, _, trial, _), _, (more, merge) = blocks("The run's life")
    for line in (trial, more):
        assert terminal.here(line)[0] == 0
    for line in (doctor, merge):
        status, output = replace(terminal, cluster=cluster)(line)
        assert status == 0, output
    assert_complete(terminal, undisturbed, "MERGED")


@pytest.mark.slow
def test_another_cluster_resumes_after_the_head_was_lost(
    terminal: Terminal, plain: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    terminal.names["SHARDS"] = late(plain, tmp_path)
    looked, same = commands("The head was lost")
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as first:
        ready(first)
        terminal.cluster = first
        job = terminal.start(f"exec {same}")
        sent(job)
        wait_until(lambda: at_work(terminal))
        first.kill_node(0)
        wait_until(lambda: "stale" in terminal(looked)[1])  # a driver can outlive its head by a minute
    job.kill()
    job.wait()
    Path("gate").touch()
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as second:
        ready(second)
        terminal.cluster = second
        status, output = terminal(same)
        assert status == 0, output
    assert_complete(terminal, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Workers are lost again and again", "The out-of-memory killer"])
def test_job_whose_workers_were_killed_for_memory_continues_on_other_nodes(terminal: Terminal, title: str) -> None:
    (same,) = commands(title)
    # In float64, because two threads round differently from one.
    terminal.names["MODEL"] = f"{terminal.names['MODEL']} --precision float64"
    assert terminal.here("patternnet fit --model MODEL --shards SHARDS --out TRIAL")[0] == 0
    with LocalCluster(nodes=1, cpus=0, dashboard=True, token=TOKEN) as cluster:
        terminal.cluster = cluster
        # Every worker exceeds this limit, which applies to the memory usage of the whole machine.
        small = cluster.add_node(env={"RAY_memory_usage_threshold": "0.001"}, num_cpus=2)
        ready(cluster)
        status, output = terminal(same.replace(" --cpus-per-worker 2", ""))
        assert status != 0
        assert re.search("(?i)memory", output), output
        cluster.kill_node(small.number)
        cluster.add_node(num_cpus=2)
        status, output = terminal(same)
        assert status == 0, output
    assert_complete(terminal, Path(str(terminal.names["TRIAL"])))
