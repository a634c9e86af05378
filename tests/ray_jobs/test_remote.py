"""Runs in an object store: fit, explain, merge, solve, status and resume with every folder at a URL."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, ModelConfig, Resources
from ray_jobs.io.object_store import fetch, list_names, locate, publish
from ray_jobs.jobs import moments_job
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit, merge, solve
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run
from tests.conftest import write_tar
from tests.ray_jobs.runs import PREPROCESSING, make_fit_config

pytestmark = pytest.mark.full

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
