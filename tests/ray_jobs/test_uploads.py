"""The files of a shard are uploaded while the next one is explained; a shard is complete, absent, or written again."""

import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from ray_jobs.config import ExplainConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import Batch
from ray_jobs.io.object_store import Location, fetch, list_names, locate
from ray_jobs.jobs.explain.explain import ExplainWorker, explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models import loading
from ray_jobs.runs.map_files import ExplainedBatch, list_shard_files
from tests.conftest import make_shards
from tests.ray_jobs.dying import DEAD
from tests.ray_jobs.runs import PREPROCESSING, make_fit_config

ROOT = Path(__file__).parents[2]
HERE = Resources(workers=0)
SHARDS, SAMPLES, BATCH = 4, 5, 2
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("sources"), SHARDS, SAMPLES)


@pytest.fixture(scope="module")
def config(model_spec: str, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> ExplainConfig:
    """A job whose folder is on this machine."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    fit(make_fit_config(model_spec, sources, out), HERE)
    return make_config(model_spec, sources, str(out), str(out))


def make_config(model_spec: str, sources: list[str], patterns: str, out: str) -> ExplainConfig:
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    methods = ("gradient", "patternattribution")
    return ExplainConfig(
        model=model, patterns=patterns, shards=tuple(sources), out=out, batch_size=BATCH, methods=methods
    )


@pytest.fixture(scope="module")
def expected(config: ExplainConfig) -> dict[str, bytes]:
    """The files of the job whose folder is on this machine."""
    return read_files(explain(config, HERE).folder)


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a run in an object store, and a folder of its own for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield f"memory://{request.node.name}"
    assert list((tmp_path / "temporary").iterdir()) == []
    fsspec.filesystem("memory").rm(f"/{request.node.name}", recursive=True)


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the samples in the order in which they are explained."""
    keys, before = list[str](), ExplainWorker.explain

    def record(worker: ExplainWorker, batch: Batch) -> ExplainedBatch:
        keys.extend(batch.keys)
        return before(worker, batch)

    monkeypatch.setattr(ExplainWorker, "explain", record)
    return keys


def read_files(run: Location) -> dict[str, bytes]:
    """Return the tar and the keys of the table of each shard."""
    found = dict[str, bytes]()
    for name in list_names(run / "explanations"):
        with fetch(run / "explanations" / name) as file:
            table = name.endswith(".parquet")
            found[name] = json.dumps(pq.read_table(file).to_pylist()).encode() if table else file.read_bytes()
    return found


def move(config: ExplainConfig, out: str) -> ExplainConfig:
    return make_config(config.model.spec, list(config.shards), config.patterns, out)


def test_next_shard_is_explained_during_an_upload_and_no_other(
    config: ExplainConfig,
    expected: dict[str, bytes],
    bucket: str,
    explained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, uploads = Location.put, list[tuple[str, int]]()

    def put_slowly(target: Location, file: Path) -> None:
        number = int(target.name[6:9]) if target.name.startswith("train-") else SHARDS
        if target.name.endswith(".tar") and number + 1 < SHARDS:
            ahead = {f"s{number + 1:03d}-{i}" for i in range(SAMPLES)}
            for _ in range(int(TIMEOUT / 0.01)):
                if ahead <= set(explained):
                    break
                threading.Event().wait(0.01)
            else:
                raise AssertionError("the next shard was not explained during the upload")
            threading.Event().wait(0.1)  # in which a third shard would be begun
            assert max(explained)[:4] == f"s{number + 1:03d}"
        uploads.append((target.name, len(explained)))
        put(target, file)

    monkeypatch.setattr(Location, "put", put_slowly)
    run = explain(move(config, bucket), HERE)
    assert read_files(run.folder) == expected
    assert Counter(explained) == Counter({f"s{n:03d}-{i}": 1 for n in range(SHARDS) for i in range(SAMPLES)})
    names = [name for name, _ in uploads if name.startswith("train-")]
    kinds = (".tar", ".refused.parquet", ".parquet")  # the table of rows is the last file of a shard
    assert names == [f"train-{n:03d}{kind}" for n in range(SHARDS) for kind in kinds]


def test_failed_upload_is_the_failure_of_its_shard(
    config: ExplainConfig, expected: dict[str, bytes], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = Location.put, [2]

    def fail(target: Location, file: Path) -> None:
        if target.name == "train-001.tar" and failures[0]:
            failures[0] -= 1
            raise PermissionError(13, "Forbidden")
        put(target, file)

    monkeypatch.setattr(Location, "put", fail)
    shards = Resources(workers=0, retries=0, max_bad_shards=1)
    run = explain(move(config, bucket), shards)
    (reason,) = run.manifest()["explain"]["missing"].values()
    assert "Forbidden" in reason
    assert read_files(run.folder) == {name: data for name, data in expected.items() if "train-001" not in name}
    run = explain(move(config, bucket), Resources(workers=0, retries=1))
    assert failures == [0]
    assert read_files(run.folder) == expected


def test_shard_that_cannot_be_explained_ahead_is_read_again_at_its_turn(
    config: ExplainConfig, expected: dict[str, bytes], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, failures, put = ExplainWorker.explain, list[str](), Location.put
    failed = threading.Event()

    def fail_once(worker: ExplainWorker, batch: Batch) -> ExplainedBatch:
        if "s001-2" in batch.keys and not failures:
            failures.append("s001-2")
            failed.set()
            raise RuntimeError("the device is lost")
        return before(worker, batch)

    def put_slowly(target: Location, file: Path) -> None:
        if target.name == "train-000.tar":
            assert failed.wait(TIMEOUT)
        put(target, file)

    monkeypatch.setattr(ExplainWorker, "explain", fail_once)
    monkeypatch.setattr(Location, "put", put_slowly)
    run = explain(move(config, bucket), Resources(workers=0, retries=0))
    assert failures
    assert read_files(run.folder) == expected


def test_shard_that_was_explained_ahead_may_be_given_to_another_worker(
    config: ExplainConfig,
    expected: dict[str, bytes],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    explained: list[str],
) -> None:
    put = Location.put

    def put_slowly(target: Location, file: Path) -> None:
        if target.name.endswith(".tar"):
            following = "s001" if "000" in target.name else "s003"
            for _ in range(int(TIMEOUT / 0.01)):
                if any(key.startswith(following) for key in explained):
                    break
                threading.Event().wait(0.01)
        put(target, file)

    monkeypatch.setattr(Location, "put", put_slowly)
    moved = move(config, bucket)
    worker = ExplainWorker(moved, loading.load(moved.model).traced, {})
    worker.prepare()
    files = list_shard_files(bucket, moved.shards)
    first, second, third, last = (FilesTask(shard, files=files[shard]) for shard in moved.shards)
    reports = [list(worker.work(*tasks))[-1] for tasks in ((first, second), (third, last), (second, None))]
    assert [report.samples for report in reports] == [SAMPLES] * 3
    assert read_files(locate(bucket)) == {name: data for name, data in expected.items() if "train-003" not in name}
    list(worker.work(first, last))
    worker.close()


@pytest.mark.parametrize("step", [pytest.param(11, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.slow)])
def test_job_that_is_killed_at_an_upload_continues_to_the_same_files(
    config: ExplainConfig, expected: dict[str, bytes], tmp_path: Path, step: int
) -> None:
    arguments = {"model": config.model.spec, "shards": config.shards, "patterns": config.patterns, "step": step}
    command = [sys.executable, "-m", "tests.ray_jobs.dying_uploads", json.dumps(arguments | {"folder": str(tmp_path)})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    trials: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == len(range(0, 2 * 3 * SHARDS, step))
    for trial in trials:
        assert (trial["died"], trial["resumed"]) == (DEAD, 0), trial
        assert all(expected[name].hex() == data for name, data in trial["finished"].items()), trial["at"]
        assert {name: bytes.fromhex(data) for name, data in trial["after"].items()} == expected, trial["at"]
