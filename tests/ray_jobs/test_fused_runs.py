"""Runs of versions that took a fused projection of queries, keys and values for one operator."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from patterns import UserError
from patterns.tracing import network
from ray_jobs.config import ExplainConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit, merge, solve
from ray_jobs.jobs.quality import measure
from tests.ray_jobs.runs import PREPROCESSING, make_fit_config

pytestmark = pytest.mark.full

MODEL = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.qkv, self.out = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((x + nn.functional.scaled_dot_product_attention(q, k, v)).mean(1))
"""
HERE = Resources(workers=0)


@contextmanager
def earlier_version() -> Iterator[None]:
    """Trace as before: fused layers stay whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "split_fused_layers", lambda graph: None)
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fused") / "attention.py"
    path.write_text(MODEL)
    return f"{path}:Attention"


@pytest.fixture
def old(spec: str, shards: list[str], tmp_path: Path) -> str:
    """The folder of a fit by an earlier version."""
    with earlier_version():
        run = fit(make_fit_config(spec, shards[:3], tmp_path / "old"), HERE)
    assert load_file(run.folder / "patterns.safetensors")["qkv/linear"].shape == (24, 8)
    return str(run.folder)


def read_maps(spec: str, run: str, shards: list[str], out: Path) -> list[np.ndarray]:
    """Explain the samples of one shard by the patterns of a run, and return the maps."""
    model = ModelConfig(spec=spec, **PREPROCESSING)  # type: ignore[arg-type]
    methods = ("gradient", "patternnet:linear", "patternattribution:linear")
    explain(ExplainConfig(model=model, patterns=run, shards=(shards[3],), out=str(out), methods=methods), HERE)
    samples = read_shard(str(out / "explanations" / Path(shards[3]).name))
    return [np.load(io.BytesIO(sample.files[f"{name}.npy"])) for sample in samples for name in methods]


def test_new_fit_has_the_old_patterns_of_the_values(spec: str, old: str, shards: list[str], tmp_path: Path) -> None:
    run = fit(make_fit_config(spec, shards[:3], tmp_path / "new"), HERE)
    before, after = load_file(f"{old}/patterns.safetensors"), load_file(run.folder / "patterns.safetensors")
    for name, pattern in after.items():
        if name != "qkv/multivariate":  # it regresses on all neurons of the operator at once
            expected = before[name][16:] if name.startswith("qkv/") else before[name]
            torch.testing.assert_close(pattern, expected, rtol=1e-3, atol=1e-5, msg=name)
    (entry,) = (op for op in run.manifest()["operators"] if op["name"] == "qkv")
    assert (entry["weight"], entry["rows"]) == ([8, 8], [[16, 23]])


def test_old_patterns_explain_as_before_and_their_quality_is_as_before(
    spec: str, old: str, shards: list[str], tmp_path: Path
) -> None:
    quality = QualityConfig(
        model=ModelConfig(spec=spec, **PREPROCESSING),  # type: ignore[arg-type]
        patterns=old, shards=(shards[3],), evaluate=(shards[4],), out=str(tmp_path / "now"), operators=("qkv",),
    )  # fmt: skip
    with earlier_version():
        before = read_maps(spec, old, shards, tmp_path / "before")
        measure(replace(quality, out=str(tmp_path / "earlier")), HERE)
    for found, expected in zip(read_maps(spec, old, shards, tmp_path / "after"), before, strict=True):
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=2e-3, atol=1e-6)
    measure(quality, HERE)
    tables = (pq.read_table(tmp_path / name / "quality.parquet").to_pandas() for name in ("now", "earlier"))
    now, earlier = (table.set_index(["estimator", "neuron"])["rho"].unstack() for table in tables)
    np.testing.assert_allclose(now.to_numpy(), earlier.to_numpy()[:, 16:], rtol=1e-6)


def test_old_moments_give_further_patterns_and_merge_with_new_moments(
    spec: str, old: str, shards: list[str], tmp_path: Path
) -> None:
    solve(old, ["filter"], HERE)
    new = fit(make_fit_config(spec, shards[3:6], tmp_path / "new"), HERE)
    merged = merge([old, str(new.folder)], str(tmp_path / "merged"), HERE)
    whole = fit(make_fit_config(spec, shards[:6], tmp_path / "whole"), HERE)
    expected = load_file(whole.folder / "patterns.safetensors")
    for name, pattern in load_file(merged.folder / "patterns.safetensors").items():
        torch.testing.assert_close(pattern, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    found = load_file(f"{old}/patterns.safetensors")
    assert found["qkv/filter"].shape == found["qkv/linear"].shape == (8, 8)


def test_unfinished_old_fit_is_not_continued(spec: str, shards: list[str], tmp_path: Path) -> None:
    """Its partial moments could not be added to those of this version."""
    late = tmp_path / "late.tar"
    config = make_fit_config(spec, [shards[0], str(late)], tmp_path / "run")
    with earlier_version():
        fit(config, replace(HERE, max_bad_shards=1, retries=0))
    shutil.copy(shards[1], late)
    with pytest.raises(UserError, match="those of 24 neurons, and the model now has 8") as caught:
        fit(config, HERE)
    assert "part-" in caught.value.where
    with earlier_version():
        assert fit(config, HERE).manifest()["fit"]["samples"] == 12
