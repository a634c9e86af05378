"""Jobs with faults at random times, on a real cluster of several nodes, have the same results as undisturbed jobs.

The id of a trial holds its seed: `pytest -m '' 'tests/ray_jobs/test_chaos.py::NAME[seed-17]'` repeats it.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Set
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.local import LocalCluster
from ray_jobs.cli.app import exit_status
from ray_jobs.runs.atlas_files import TABLES
from tests.conftest import make_shards
from tests.ray_jobs.chaos import NODES, SlowStorage, Trial, schedule
from tests.ray_jobs.runs import OPTIONS, assert_same_patterns

SHARDS, SAMPLES = 24, 3
# A starting worker does not report, and its start takes seconds if two cores start several workers.
FAULTS = ["--stall-timeout", "15", "--retries", "20", "--batch-size", "2", "--gpus-per-worker", "0"]
SECONDS_PER_SHARD = 0.3  # 24 shards take two workers longer than three faults of a schedule


JOB_OPTIONS = {
    "explain": [],
    "atlas": ["--pooled", "7", "--top", "3"],
    "evaluate": ["--measures", "degradation,class", "--patch-size", "8", "--steps", "2"],
}


def seeds(first: int, count: int, quick: Set[int] = frozenset()) -> list[object]:
    """Return the seeds of trials; all but the quick ones belong to the soak."""
    return [
        pytest.param(seed, marks=() if seed in quick else pytest.mark.slow, id=f"seed-{seed}")
        for seed in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=NODES, cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Shards as `--shards` takes them, on a server that delays each."""
    folder = tmp_path_factory.mktemp("storage")
    make_shards(folder, SHARDS, SAMPLES)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowStorage, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/train-{{000..{SHARDS - 1:03d}}}.tar"
        server.shutdown()


def fit_command(model_spec: str, storage: str, out: Path) -> list[str]:
    options = ["--model", model_spec, "--shards", storage, "--out", str(out), "--max-loss", "0.5"]
    return ["fit", *options, *OPTIONS, *FAULTS]


def command_of(job: str, patterns: Path, storage: str, out: Path) -> list[str]:
    """Return a command that uses patterns: explain, atlas or evaluate."""
    return [job, "--patterns", str(patterns), "--shards", storage, "--out", str(out), *FAULTS, *JOB_OPTIONS[job]]


def undisturbed(command: list[str], folder: Path) -> Path:
    """Run a command without faults, with one worker in this process, and return the run's folder."""
    assert exit_status([*command, "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def fitted(model_spec: str, storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "run"
    return undisturbed(fit_command(model_spec, storage, out), out)


@pytest.fixture(scope="module")
def explained(fitted: Path, storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explained") / "run"
    return undisturbed(command_of("explain", fitted, storage, out), out)


@pytest.fixture(scope="module")
def described(fitted: Path, storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("described") / "run"
    return undisturbed(command_of("atlas", fitted, storage, out), out)


@pytest.fixture(scope="module")
def evaluated(fitted: Path, storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return undisturbed(command_of("evaluate", fitted, storage, out), out)


@pytest.fixture
def slowly() -> Iterator[None]:
    SlowStorage.delay = SECONDS_PER_SHARD
    yield
    SlowStorage.delay = 0.0


def survive(trial: Trial) -> None:
    """Run a trial. It must end, each driver with the right exit status; faults must strike; no process may be left."""
    trial.run()
    print(trial.report())  # shown if the test fails
    assert trial.statuses[-1] == 0, "the job never ended"
    for life, status in enumerate(trial.statuses):
        kinds = {struck.fault.kind for struck in trial.struck if struck.life == life}
        stopped, killed = kinds & {"driver-TERM", "driver-INT"}, kinds & {"driver-KILL"}
        expected = {0} | ({3} if stopped else set()) | ({-signal.SIGKILL} if killed else set())
        assert status in expected, f"life {life} ended with {status} after {kinds or 'no fault'}"
    assert any(struck.midway for struck in trial.struck), "no fault struck during the work on shards"
    assert 2 * len(trial.struck) >= len(trial.faults), "most faults found no victim"
    assert trial.list_leaked_processes() == []


def file_names(folder: Path) -> set[str]:
    """Return the paths of a run's files, with a star for the random part of a name."""
    return {re.sub(r"[0-9a-f]{32}", "*", str(p.relative_to(folder))) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("seed", seeds(0, 55, quick={45}))
@pytest.mark.usefixtures("slowly")
def test_fit_with_faults_has_the_patterns_of_an_undisturbed_fit(
    cluster: LocalCluster, model_spec: str, storage: str, fitted: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    survive(Trial(cluster, fit_command(model_spec, storage, out), out, tmp_path, schedule(seed)))
    counted = json.loads((out / "manifest.json").read_text())["fit"]
    section = {name: counted[name] for name in ("status", "shards", "samples", "refused", "missing")}
    samples = SHARDS * SAMPLES
    assert section == {"status": "complete", "shards": SHARDS, "samples": samples, "refused": 0, "missing": {}}
    columns = ["operator", "neuron", "n", "n_positive"]
    ours, theirs = (pq.read_table(folder / "neurons.parquet", columns=columns) for folder in (out, fitted))
    assert ours.equals(theirs)
    assert_same_patterns(out, fitted)
    assert file_names(out) == file_names(fitted)
    assert uncounted_files(out / "moments") == []


def uncounted_files(moments: Path) -> list[str]:
    """Return the files of partial moments that no other file of the folder names, so that they do not count."""
    parts = set(moments.glob("*.safetensors"))
    ledger = b"".join(p.read_bytes() for p in moments.iterdir() if p.is_file() and p not in parts)
    return [p.name for p in parts if p.name.encode() not in ledger]


@pytest.mark.parametrize("seed", seeds(1000, 12))
@pytest.mark.usefixtures("slowly")
def test_explanations_with_faults_have_the_same_bytes(
    cluster: LocalCluster, storage: str, fitted: Path, explained: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    survive(Trial(cluster, command_of("explain", fitted, storage, out), out, tmp_path, schedule(seed)))
    assert file_names(out) == file_names(explained)
    tars = sorted(explained.rglob("*.tar"))
    assert len(tars) == SHARDS
    for tar in tars:
        assert (out / tar.relative_to(explained)).read_bytes() == tar.read_bytes(), tar.name
    ours, theirs = (pq.read_table(folder / "explanations.parquet") for folder in (out, explained))
    assert ours.num_rows == SHARDS * SAMPLES
    assert ours.equals(theirs)


@pytest.mark.parametrize("seed", seeds(2000, 8))
@pytest.mark.usefixtures("slowly")
def test_atlas_with_faults_has_the_same_bytes(
    cluster: LocalCluster, storage: str, fitted: Path, described: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    survive(Trial(cluster, command_of("atlas", fitted, storage, out), out, tmp_path, schedule(seed)))
    assert file_names(out) == file_names(described)
    rows = sorted(path.relative_to(described) for path in (described / "atlas").rglob("*[0-9].parquet"))
    assert len(rows) == SHARDS
    for name in (*rows, *TABLES):
        assert (out / name).read_bytes() == (described / name).read_bytes(), name


@pytest.mark.parametrize("seed", seeds(3000, 8))
@pytest.mark.usefixtures("slowly")
def test_evaluation_with_faults_has_the_same_bytes(
    cluster: LocalCluster, storage: str, fitted: Path, evaluated: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    survive(Trial(cluster, command_of("evaluate", fitted, storage, out), out, tmp_path, schedule(seed)))
    assert file_names(out) == file_names(evaluated)
    assert pq.read_table(out / "evaluation.parquet", columns=["shard", "key"]).group_by(["shard", "key"]).aggregate(
        []
    ).num_rows == SHARDS * SAMPLES  # fmt: skip
    for name in ("evaluation.parquet", "evaluation-summary.parquet"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes(), name
