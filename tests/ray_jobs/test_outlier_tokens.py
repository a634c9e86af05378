"""Fits of models with outlier tokens: what the manifest, the log and the tables say."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from patterns.io import TensorFile
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, ModelConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit, merge, solve
from tests.ray_jobs.runs import OPTIONS, PREPROCESSING, make_fit_config

pytestmark = pytest.mark.full

MODEL = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self, huge):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.branch, self.out = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 8), nn.Linear(8, 5)
        self.factor = torch.ones(1, 65, 1)
        self.factor[:, 0] = huge
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.out((x + self.branch(x) * self.factor).mean(1))


def usual():
    return Tokens(1.0)


def massive():
    return Tokens(1e4)
"""
HERE = Resources(workers=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.py"
    path.write_text(MODEL)
    return path


def test_manifest_log_and_table_name_the_additions_with_outlier_tokens(
    file: Path, shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for shard in shards[:3] for word in ("--shards", shard)]
    for name in ("usual", "massive"):
        out = str(tmp_path / name)
        assert exit_status(["fit", "--model", f"{file}:{name}", *words, "--out", out, "--workers", "0", *OPTIONS]) == 0
        captured = capsys.readouterr()
        said = [line for line in (captured.out + captured.err).splitlines() if "of the tokens hold more than" in line]
        section = json.loads((tmp_path / name / "manifest.json").read_text())["fit"]
        share = section["top_token_shares"]["addition.0"]
        flags = set(
            pq.read_table(tmp_path / name / "neurons.parquet", filters=[("operator", "=", "addition.0")])[
                "flag"
            ].to_pylist()
        )
        if name == "usual":
            assert (said, section["outliers"], flags) == ([], [], {"ok"})
            assert 0.001 <= share < 0.02
        else:
            assert len(said) == 1
            assert f"addition.0 ({share:.1%})" in said[0]
            assert (section["outliers"], flags) == (["addition.0"], {"outliers"})
            found = load_file(tmp_path / name / "patterns.safetensors")
            assert torch.equal(found["addition.0/linear"], torch.full((8, 2), 0.5))


def test_explanations_solve_and_merge_say_that_filter_is_used(file: Path, shards: list[str], tmp_path: Path) -> None:
    spec = f"{file}:massive"
    runs = [fit(make_fit_config(spec, shards[i : i + 2], tmp_path / str(i)), HERE) for i in (0, 2)]
    model = ModelConfig(spec=spec, **PREPROCESSING)  # type: ignore[arg-type]
    methods = ("patternattribution:linear", "patternattribution:identity")
    config = ExplainConfig(
        model=model, patterns=str(runs[0].folder), shards=(shards[5],), out=str(tmp_path / "maps"), methods=methods
    )
    chosen = explain(config, HERE).manifest()["explain"]["estimators"]
    assert [chosen[method]["addition.0"] for method in methods] == ["filter", "identity"]
    assert chosen[methods[0]]["branch"] == "linear"
    merged = merge([str(run.folder) for run in runs], str(tmp_path / "merged"), HERE)
    section = merged.manifest()["fit"]
    assert section["outliers"] == ["addition.0"]
    solved = solve(str(merged.folder), ["filter"], HERE).manifest()["fit"]
    assert solved["top_token_shares"] == section["top_token_shares"]


def test_fit_that_an_earlier_version_began_has_no_shares(
    file: Path, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first partial moments have no norms, so the share of all tokens is unknown."""
    late = tmp_path / "late.tar"
    config = make_fit_config(f"{file}:massive", [shards[0], str(late)], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("patterns.moments.moments.zero_token_norms", lambda operator: None)
        fit(config, Resources(workers=0, max_bad_shards=1, retries=0))
    late.write_bytes(Path(shards[1]).read_bytes())
    run = fit(config, HERE)
    files = sorted((tmp_path / "run" / "moments").glob("part-*.safetensors"))
    specs = []
    for part in files:
        with TensorFile(part) as opened:
            specs.append("addition.0/tokens.n" in opened.specs)
    assert sorted(specs) == [False, True]
    section = run.manifest()["fit"]
    assert (section["samples"], section["top_token_shares"], section["outliers"]) == (12, {}, [])
