"""Runs in an object store: fit, explain, merge, solve, status and resume with every folder at a URL."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from werkzeug.serving import make_server

from cluster.local import ROOT, LocalCluster
from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, ModelConfig, Resources
from ray_jobs.config.timing import Timing
from ray_jobs.io.object_store import fetch, list_names, locate, publish
from ray_jobs.jobs import moments_job
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit, merge, solve
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run
from tests.conftest import write_tar
from tests.ray_jobs.runs import OPTIONS, PREPROCESSING, assert_same_patterns, make_fit_config

pytestmark = pytest.mark.full

REFUSALS = 8  # more than the five attempts of s3fs
HERE = Resources(workers=0, max_loss=0.0, retries=0)
# Set in the environment, as for the processes of a cluster.
STORE = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Yield the URL of a bucket on a real S3 server of this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= STORE | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()
    os.environ.clear()
    os.environ.update(before)
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def uploaded(bucket: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Upload five shards, one with a bad sample, and return their URLs."""
    local = write_tar(tmp_path_factory.mktemp("bad") / "bad.tar", [{"__key__": "cut", "jpg": b"\xff\xd8\xff"}])
    for path in (*shards[:4], str(local)):
        fsspec.filesystem("s3").put_file(path, f"bucket/shards/{Path(path).name}")
    return [f"{bucket}/shards/{Path(path).name}" for path in (*shards[:4], str(local))]


def load_patterns(run: Run) -> dict[str, object]:
    return load_tensors((run.folder / "patterns.safetensors").read_bytes())


def test_run_in_an_object_store_equals_the_run_on_disk(
    model_spec: str, bucket: str, uploaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_job, "MAX_FILES", 3)
    monkeypatch.setattr(moments_job, "MERGED_AT_ONCE", 3)
    disk = fit(make_fit_config(model_spec, uploaded, str(tmp_path / "run")), HERE)
    store = fit(make_fit_config(model_spec, uploaded, f"{bucket}/run"), HERE)
    expected = load_file(tmp_path / "run" / "patterns.safetensors")
    found = load_patterns(store)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)  # type: ignore[attr-defined]
    for name in ("samples", "refused", "shards", "status"):
        assert store.manifest()["fit"][name] == disk.manifest()["fit"][name]
    parts = list_names(store.moments, "part-")
    entries = MomentsStore(store.moments).read_ledger().entries
    assert sum(name.endswith(".safetensors") for name in parts) == len(entries) < 5
    with fetch(store.folder / "quarantine.parquet") as file:
        assert pq.read_table(file)["key"].to_pylist() == ["cut"]

    solve(str(store.folder), ["filter"], HERE)
    assert "0/filter" in load_patterns(store)
    config = ExplainConfig(
        model=ModelConfig(spec=model_spec, **PREPROCESSING),
        patterns="",
        shards=tuple(uploaded[:3]),
        out="",
        batch_size=4,
    )  # type: ignore[arg-type]
    outs = [
        explain(replace(config, patterns=str(run.folder), out=str(run.folder)), HERE).folder / "explanations"
        for run in (disk, store)
    ]
    assert list_names(outs[0]) == list_names(outs[1])
    for name in list_names(outs[0]):
        if name.endswith(".tar"):
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_fits_in_an_object_store_resume_and_merge(
    model_spec: str, bucket: str, uploaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_fit_config(model_spec, uploaded[:3], f"{bucket}/a")
    commit, commits = moments_job.MomentsWorker.commit, []

    def third_fails(self: moments_job.MomentsWorker) -> object:
        commits.append(self.shards)
        if len(commits) == 3:
            raise RuntimeError("the process is lost")
        return commit(self)

    with monkeypatch.context() as patched:
        patched.setattr(moments_job.MomentsWorker, "commit", third_fails)
        with pytest.raises(RuntimeError, match="is lost"):
            fit(config, HERE)
    assert MomentsStore(f"{bucket}/a/moments").read_ledger().counted_shards() == {0, 1}
    done = fit(config, HERE)
    assert done.manifest()["fit"]["samples"] == 18
    fit(make_fit_config(model_spec, uploaded[3:], f"{bucket}/b"), HERE)
    both = merge([f"{bucket}/a", f"{bucket}/b"], f"{bucket}/both", HERE)
    assert (both.manifest()["fit"]["samples"], both.manifest()["fit"]["refused"]) == (24, 1)


@pytest.fixture
def refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Refuse the first requests for shards, as S3 does under load, and yield the times of these requests."""
    times: list[float] = []
    store = DomainDispatcherApplication(create_backend_app)
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not environ["PATH_INFO"].startswith("/bucket/shards/") or len(times) == REFUSALS:
            return store(environ, start_response)
        times.append(time.monotonic())
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    server = make_server("127.0.0.1", 0, answer, threaded=True)  # moto's buckets are those of this process
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # otherwise botocore itself repeats the first requests
    fsspec.filesystem("s3").clear_instance_cache()
    yield times
    server.shutdown()
    thread.join()
    fsspec.filesystem("s3").clear_instance_cache()


def test_busy_store_is_asked_again_after_a_pause(
    model_spec: str, uploaded: list[str], shards: list[str], refused: list[float], tmp_path: Path
) -> None:
    patient = replace(HERE, timing=Timing(back_off=0.2))
    run = fit(make_fit_config(model_spec, uploaded[:1], tmp_path / "run", positions=None), patient)
    assert len(refused) == REFUSALS
    fit(make_fit_config(model_spec, shards[:1], tmp_path / "disk", positions=None), HERE)
    assert run.manifest()["fit"]["samples"] == 6
    assert_same_patterns(tmp_path / "disk", tmp_path / "run")


@pytest.mark.ray
def test_pilot_of_a_cluster_leaves_nothing_in_the_store(bucket: str, model_spec: str, uploaded: list[str]) -> None:
    command = ["plan", "--model", model_spec, *OPTIONS, "--batch-size", "4", "--workers", "2"]
    command += ["--out", f"{bucket}/plan", *(word for shard in uploaded[:4] for word in ("--shards", shard))]
    with LocalCluster(nodes=2, cpus=1) as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "ray_jobs", *command],
            env={**os.environ, **cluster.environment}, capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit of about 24 samples in 4 shards with 2 workers:" in done.stdout
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    assert store.find("bucket/plan") == []


def test_status_reads_a_run_in_an_object_store(
    model_spec: str, bucket: str, uploaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_fit_config(model_spec, uploaded[:1], f"{bucket}/seen"), HERE)
    assert exit_status(["status", f"{bucket}/seen"]) == 0
    assert capsys.readouterr().out.startswith("fit: complete, 6 samples")


def test_store_that_cannot_be_written_is_an_error(model_spec: str, uploaded: list[str]) -> None:
    with pytest.raises(UserError, match="cannot be written") as caught:
        fit(make_fit_config(model_spec, uploaded[:1], "s3://no-such-bucket/run"), HERE)
    assert caught.value.where.startswith("s3://no-such-bucket/run/")


@pytest.mark.parametrize("where", ["memory://published", "file"])
def test_files_are_published(where: str, tmp_path: Path) -> None:
    folder = locate(tmp_path if where == "file" else where)
    with publish(folder) as out:
        (out / "a.txt").write_text("whole")
        (out / "sub").mkdir()
        (out / "sub" / "b.txt").write_text("too")
    assert (folder / "a.txt").read_text() == "whole"
    assert (folder / "sub" / "b.txt").read_text() == "too"
    assert "a.txt" in list_names(folder)
    assert folder.exists()


def test_incomplete_files_of_a_failed_writer_are_not_published() -> None:
    folder = locate("memory://half")

    def write() -> None:
        with publish(folder) as out:
            (out / "c.txt").write_text("half")
            raise RuntimeError("while writing")

    with pytest.raises(RuntimeError, match="while writing"):
        write()
    assert list_names(folder) == []
