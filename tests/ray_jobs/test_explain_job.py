"""The explain job: it writes what the library computes, in shards with the keys and order of the input."""

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from patterns import METHODS, Explainer, choose
from patterns.io.pattern_files import load
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.samples import derive_seed
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from ray_jobs.engine.shard_job import ShardJob
from ray_jobs.engine.shard_worker import WorkerInfo
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.explain.map_statistics import summarize_maps
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.conftest import jpeg, write_tar

RESOURCES = Resources(workers=2, gpus_per_worker=0)
HERE = Resources(workers=0)


@pytest.fixture(scope="module")
def model(model_spec: str) -> ModelConfig:
    return ModelConfig(spec=model_spec, image_size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def fitted(model: ModelConfig, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = str(tmp_path_factory.mktemp("fitted") / "run")
    return fit(FitConfig(model=model, shards=tuple(shards), out=out), HERE).folder


def test_explanations_have_the_order_of_their_shards_and_equal_the_librarys(
    local_ray: None, fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    methods, shards = (*METHODS, "patternattribution:linear"), shards[:4]
    config = ExplainConfig(
        model=model, patterns=str(fitted), shards=tuple(shards), out=str(tmp_path), batch_size=4, methods=methods
    )
    run = explain(config, RESOURCES)
    loaded = loading.load(model)
    patterns = load(fitted, loaded.digest)
    explainer = Explainer(
        loaded.network,
        choose(loaded.network, patterns),
        methods,
        estimators={"linear": choose(loaded.network, patterns, "linear")},
    )
    table = pq.read_table(run.folder / "explanations.parquet").to_pylist()
    assert len(table) == 24
    rows = {(r["shard"], r["key"]): r for r in table}
    for shard in shards:
        (batch,) = ShardReader(shard, ReaderConfig(loaded.preprocessing, batch_size=100))
        expected = explainer(batch.images, seeds=[derive_seed(f"0/{key}") for key in batch.keys])
        written = list(read_shard(str(tmp_path / "explanations" / Path(shard).name)))
        assert [s.key for s in written] == [s.key for s in read_shard(shard)]
        for i, sample in enumerate(written):
            written_row = json.loads(sample.files["json"])
            row = rows[shard, sample.key]
            assert written_row["target"] == written_row["prediction"] == int(expected.targets[i]) == row["target"]
            assert written_row["label"] == batch.labels[i] == row["label"]
            assert written_row["score"] == pytest.approx(float(expected.scores[i].max()), rel=1e-5)
            for method in methods:
                array = np.load(io.BytesIO(sample.files[f"{method}.npy"]))
                assert array.dtype == np.float16
                found = torch.from_numpy(array.astype(np.float32)) * 2.0 ** written_row["exponents"][method]
                true = expected.maps[method][i]
                assert (found - true).abs().max() <= 1e-3 * true.abs().max()
                assert Image.open(io.BytesIO(sample.files[f"{method}.png"])).size == (16, 16)
                (statistics,) = summarize_maps(method, true[None], [None])
                for name, value in statistics.items():
                    assert row[name] == (None if value is None else pytest.approx(value, rel=1e-4)), name


def test_only_missing_shards_are_explained_again_and_give_the_same_bytes(
    local_ray: None,
    fitted: Path,
    model: ModelConfig,
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ExplainConfig(model=model, patterns=str(fitted), shards=tuple(shards), out=str(tmp_path))
    pids: list[int] = []
    killed: list[int] = []
    started, counts = ShardJob.on_ready, ShardJob.on_committed

    def record_pid(self: ShardJob, worker: WorkerInfo) -> None:
        pids.append(worker.pid)
        started(self, worker)

    def kill_a_worker(self: ShardJob, items: list[str], result: object) -> None:
        counts(self, items, result)  # type: ignore[arg-type]
        if self.reporter.counts.shards >= 4 and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    monkeypatch.setattr(ShardJob, "on_ready", record_pid)
    monkeypatch.setattr(ShardJob, "on_committed", kill_a_worker)
    explain(config, RESOURCES)
    assert killed
    folder = tmp_path / "explanations"
    assert len(list(folder.glob("*.tar"))) == 12
    assert not [p for p in tmp_path.rglob("*") if "aside" in p.name]
    again = tmp_path / "again"
    explain(ExplainConfig(model=model, patterns=str(fitted), shards=tuple(shards), out=str(again)), HERE)
    for tar in folder.glob("*.tar"):
        assert tar.read_bytes() == (again / "explanations" / tar.name).read_bytes()


def test_labels_are_explained_and_samples_without_a_valid_label_are_rejected(
    fitted: Path, model: ModelConfig, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    samples: list[dict[str, object]] = [
        {"__key__": "a", "jpg": jpeg(rng), "cls": b"2"},
        {"__key__": "b", "jpg": jpeg(rng)},
        {"__key__": "c", "jpg": jpeg(rng), "cls": b"5"},
    ]
    shard = str(write_tar(tmp_path / "x.tar", samples))
    config = ExplainConfig(
        model=model, patterns=str(fitted), shards=(shard,), out=str(tmp_path / "out"), target="label"
    )
    run = explain(config, replace(HERE, max_bad_fraction=1.0))
    (row,) = pq.read_table(run.folder / "explanations.parquet").to_pylist()
    assert (row["key"], row["target"]) == ("a", 2)
    rejected = pq.read_table(run.folder / "quarantine.parquet").to_pylist()
    assert {r["key"]: r["reason"] for r in rejected} == {
        "b": "the label None is none of the model's 5 classes",
        "c": "the label 5 is none of the model's 5 classes",
    }


def test_shards_of_the_same_name_in_two_folders_have_files_of_their_own(
    fitted: Path, model: ModelConfig, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    paths = [
        str(write_tar(tmp_path / name / "0.tar", [{"__key__": name, "jpg": jpeg(rng)}])) for name in ("one", "two")
    ]
    run = explain(
        ExplainConfig(model=model, patterns=str(fitted), shards=tuple(paths), out=str(tmp_path / "out")), HERE
    )
    found = {p.parent.name: next(iter(read_shard(str(p)))).key for p in Path(run.folder).rglob("*.tar")}
    assert found == {"one": "one", "two": "two"}
