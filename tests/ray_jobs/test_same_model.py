"""Driver, workers and later commands have the same model, or report an error."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from tests.conftest import make_shards
from tests.ray_jobs.runs import PREPROCESSING

HERE = Resources(workers=0)
MODEL = """
import os
import random
import numpy as np
import torch
from torch import nn

CASE = os.environ.get("PATTERNNET_TEST_CASE", "")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        drawn = np.random.default_rng().random()
        if CASE == "buffer":
            self.register_buffer("scale", torch.tensor(drawn), persistent=False)
        elif CASE == "attribute":
            self.scale = torch.tensor(drawn)
        else:
            self.scale = drawn if CASE == "number" else 0.5

    def forward(self, x):
        return self.head(torch.relu(self.conv(x) * self.scale).mean((2, 3)))

class Ended(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)

class Binary(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1)
    def forward(self, x):
        return super().forward(x).squeeze()
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "random_model.py").write_text(MODEL)
    return str(tmp_path / "random_model.py")


@pytest.mark.full
@pytest.mark.parametrize("case", ["buffer", "attribute", "number"])
def test_later_command_reports_a_model_with_unseeded_random_numbers(
    case: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATTERNNET_TEST_CASE", case)
    shards, run = make_shards(tmp_path / "shards", 1, 2), str(tmp_path / "run")
    model = ModelConfig(spec=f"{spec}:Net", **PREPROCESSING)
    fit(FitConfig(model=model, shards=tuple(shards), out=run), HERE)
    with pytest.raises(UserError) as caught:
        explain(ExplainConfig(model=model, patterns=run, shards=tuple(shards), out=run), HERE)
    assert "random" in caught.value.remedy


@pytest.mark.full
def test_model_with_another_constant_than_when_fitted_is_an_error(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = make_shards(tmp_path / "shards", 1, 2), str(tmp_path / "run")
    model = ModelConfig(spec=f"{spec}:Net", **PREPROCESSING)
    fit(FitConfig(model=model, shards=tuple(shards), out=run), HERE)
    Path(spec).write_text(MODEL.replace("else 0.5", "else 0.75"))
    with pytest.raises(UserError) as caught:
        explain(ExplainConfig(model=model, patterns=run, shards=tuple(shards), out=run), HERE)
    assert "other numbers" in caught.value.what


@pytest.mark.full
def test_probabilities_are_an_error_unless_the_softmax_is_stripped(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, run = make_shards(tmp_path / "shards", 1, 4), str(tmp_path / "run")
    size = ("--image-size", "16", "--workers", "0")
    command = ["fit", "--model", f"{spec}:Ended", "--shards", shards[0], "--out", run, *size]
    assert exit_status(command) == 2
    assert "--strip-softmax" in capsys.readouterr().err
    assert exit_status([*command, "--strip-softmax"]) == 0
    assert exit_status(["explain", "--patterns", run, "--shards", shards[0], "--workers", "0"]) == 0
    plain = str(tmp_path / "plain")
    assert exit_status(["fit", "--model", f"{spec}:Net", *command[3:-6], "--out", plain, *size]) == 0
    assert exit_status(["explain", "--patterns", plain, "--shards", shards[0], "--workers", "0"]) == 0
    stripped, logits = (pq.read_table(Path(folder) / "explanations.parquet") for folder in (run, plain))
    assert stripped.equals(logits)


@pytest.mark.full
def test_model_with_one_output_is_explained_for_it(spec: str, tmp_path: Path) -> None:
    shards, run = make_shards(tmp_path / "shards", 1, 3), tmp_path / "run"
    model = ModelConfig(spec=f"{spec}:Binary", **PREPROCESSING)
    fit(FitConfig(model=model, shards=tuple(shards), out=str(run)), HERE)
    for target in ("predicted", "label"):
        out = tmp_path / target
        config = ExplainConfig(
            model=model, patterns=str(run), shards=tuple(shards), out=str(out), methods=("gradient",), target=target
        )
        explain(config, HERE)
        rows = pq.read_table(out / "explanations.parquet").to_pylist()
        assert [(row["prediction"], row["probability"], row["target"]) for row in rows] == [(None, None, 0)] * 3
        scores = np.array([row["score"] for row in rows])
        assert scores.std() > 0
    with pytest.raises(UserError) as caught:
        explain(
            ExplainConfig(
                model=model, patterns=str(run), shards=tuple(shards), out=str(tmp_path / "no"), target="second"
            ),
            HERE,
        )
    assert "one number" in caught.value.what


@pytest.mark.full
def test_score_of_a_single_output_is_the_models_output(spec: str, tmp_path: Path) -> None:
    from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
    from ray_jobs.models import loading

    shards, run = make_shards(tmp_path / "shards", 1, 3), tmp_path / "run"
    config = ModelConfig(spec=f"{spec}:Binary", **PREPROCESSING)
    fit(FitConfig(model=config, shards=tuple(shards), out=str(run)), HERE)
    explain(
        ExplainConfig(model=config, patterns=str(run), shards=tuple(shards), out=str(run), methods=("gradient",)), HERE
    )
    loaded = loading.load(config)
    (batch,) = ShardReader(shards[0], ReaderConfig(loaded.preprocessing, 8))
    with torch.no_grad():
        expected = loaded.model.eval()(batch.images)
    found = pq.read_table(run / "explanations.parquet")["score"].to_numpy()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
