"""Fits of a network with smooth gates: merged, compiled and stopped early, against sums over the images' patches."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from patterns import SmoothGate
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.jobs.fit.fit import fit, merge
from ray_jobs.models import loading
from tests.oracles import window_patches
from tests.patterns.networks import relative
from tests.ray_jobs.runs import PREPROCESSING, assert_same_patterns

pytestmark = pytest.mark.full

HERE = Resources(workers=0, max_loss=0.0)  # partial moments of each shard
MODEL = """
import torch
from torch import nn


def gates():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.PReLU(4, 0.125), nn.Flatten(), nn.Linear(100, 5)
    )
"""
ROWS = "positive", "positive-own-mean"
NEGATIVE = "negative", "negative-own-mean"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("gates") / "gates.py"
    path.write_text(MODEL)
    return ModelConfig(spec=f"{path}:gates", precision="float64", **PREPROCESSING)  # type: ignore[arg-type]


def run(model: ModelConfig, shards: list[str], out: Path, **options: object) -> Path:
    estimators = "two-component", "two-component-own-mean"
    config = FitConfig(model=model, shards=tuple(shards), out=str(out), batch_size=4, estimators=estimators, **options)  # type: ignore[arg-type]
    return Path(fit(config, HERE).folder)


def assert_weighted(folder: Path, model: ModelConfig, shards: list[str]) -> None:
    """Compare n_positive and the patterns of both gated operators with sums over the patches of all images."""
    loaded = loading.load(model)
    reader = ReaderConfig(loaded.preprocessing, 100, torch.float64)
    x = torch.cat([torch.as_tensor(batch.images) for shard in shards for batch in ShardReader(shard, reader)])
    found, table = load_file(folder / "patterns.safetensors"), pq.read_table(folder / "neurons.parquet").to_pylist()
    first, second = loaded.network.operators["0"], loaded.network.operators["2"]
    assert first.gate == SmoothGate("silu", (1.0,))
    for operator, stride, function in ((first, 2, F.silu), (second, 1, lambda z: F.leaky_relu(z, 0.125))):
        assert operator.bias is not None
        w = operator.weight.detach().double().flatten(1)
        (patches,) = window_patches(x, (3, 3), (stride, stride), (0, 0), (1, 1))
        y = patches @ w.T
        z = y + operator.bias.double()
        g = function(z) / z
        counts = torch.tensor([row["n_positive"] for row in table if row["operator"] == operator.name], dtype=g.dtype)
        torch.testing.assert_close(counts, g.sum(0), rtol=1e-9, atol=0)
        for k in range(len(w)):
            for row, pattern in weigh(patches, y[:, k], w[k], g[:, k]).items():
                assert relative(found[f"{operator.name}/{row}"][k].flatten(), pattern) < 1e-8
        x = function(F.conv2d(x, operator.weight.double(), operator.bias.double(), stride))


def weigh(x: Tensor, y: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Return the patterns of one neuron for the side where its gate is open."""
    share = (g / g.sum())[:, None]
    direction = (share * x * (y - y.mean())[:, None]).sum(0)
    dx, dy = x - (share * x).sum(0), (y - share[:, 0] @ y)[:, None]
    return {
        "positive": direction / (w @ direction),
        "positive-own-mean": (share * dx * dy).sum(0) / (share * dy * dy).sum(),
    }


def test_merged_fits_have_the_weighted_patterns_of_all_images(
    model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    halves = [run(model, part, tmp_path / name) for name, part in (("a", shards[:1]), ("b", shards[1:3]))]
    merged = Path(merge([str(half) for half in halves], str(tmp_path / "all"), HERE).folder)
    assert_weighted(merged, model, shards[:3])
    assert_same_patterns(merged, run(model, shards[:3], tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_compiled_fit_has_the_weighted_patterns(model: ModelConfig, shards: list[str], tmp_path: Path) -> None:
    assert_weighted(run(model, shards[:2], tmp_path / "run", compile="default"), model, shards[:2])


def test_errors_of_both_sides_of_gates_decide_whether_a_fit_has_converged(
    model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    folder = run(model, shards, tmp_path / "run", until_converged=100.0)
    rows = pq.read_table(folder / "convergence.parquet").to_pylist()
    last = [row for row in rows if row["samples"] == rows[-1]["samples"]]
    assert {row["estimator"] for row in last if row["operator"] in ("0", "2")} == {*ROWS, *NEGATIVE}
    assert all(0 < row["p90"] <= 100 for row in last)
    converged = json.loads((folder / "manifest.json").read_text())["fit"]["converged"]
    assert converged["error"] == max(row["p90"] for row in last)
