"""A run made by version 0.2.0 is still read: every command works on it, and computes what version 0.2.0 computed.

`tests/fixtures/run-0.2.0` was made by version 0.2.0 with fit, quality, explain and degrade. Its absolute paths were
replaced by PLACEHOLDER, and its pictures were removed.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from patterns import Explainer
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ModelConfig
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.engine.ray_tasks import LocalTasks
from ray_jobs.jobs import job_session
from ray_jobs.models import loading
from tests.patterns.networks import relative
from tests.ray_jobs.runs import OPTIONS, PREPROCESSING

pytestmark = pytest.mark.full

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-0.2.0"
PLACEHOLDER = "/run-0.2.0-fixture"
METHODS = "gradient,patternnet,patternattribution"
Command = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, whose paths are those of the copy."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURE, folder)
    for path in (folder / "run").rglob("*.json"):
        path.write_text(path.read_text().replace(PLACEHOLDER, str(folder)))
    for path in (folder / "run").rglob("*.parquet"):
        table = pq.read_table(path)
        if "shard" in table.schema.names:
            index = table.schema.get_field_index("shard")
            shards = pc.replace_substring(table["shard"], PLACEHOLDER, str(folder))
            pq.write_table(table.set_column(index, table.schema.field(index), shards), path)
    return folder / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command, and return what it prints."""

    def run_command(*arguments: object) -> str:
        assert exit_status([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run_command


def explained_shards(run: Path) -> list[str]:
    return [word for number in (2, 3) for word in ("--shards", str(run.parent / f"train-00{number}.tar"))]


def read_section(run: Path, job: str) -> dict[str, object]:
    section: dict[str, object] = json.loads((run / "manifest.json").read_text())[job]
    return section


def test_the_fixture_was_made_by_version_0_2_0_and_names_no_machine() -> None:
    manifest = json.loads((FIXTURE / "run" / "manifest.json").read_text())
    assert manifest["versions"]["patternnet-ray"] == "0.2.0"
    paths = {*manifest["fit"]["options"]["shards"], manifest["explain"]["options"]["patterns"]}
    assert all(path.startswith(PLACEHOLDER) for path in paths)


def test_patterns_solved_from_old_moments_are_the_old_patterns(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_session, "connect", lambda _: nullcontext(LocalTasks()))  # solve would start a Ray
    before = load_file(run / "patterns.safetensors")
    command("solve", run, "--estimators", "filter")
    after = load_file(run / "patterns.safetensors")
    new = "/filter", "/positive-own-mean"  # a preset needs the second
    assert set(after) - set(before) == {name for name in after if name.endswith(new)} != set()
    for name, pattern in before.items():
        # With 12 samples Cov[y] is nearly singular, and its inverse is rounded differently than in version 0.2.0.
        assert relative(after[name], pattern) < (1e-4 if name.endswith("/multivariate") else 1e-6), name
    assert read_section(run, "fit")["solved"] == ["linear", "two-component", "multivariate", "filter"]


def test_a_finished_old_fit_is_left_as_it_is(run: Path, command: Command) -> None:
    before = (run / "patterns.safetensors").read_bytes()
    fitted = [word for number in (0, 1) for word in ("--shards", str(run.parent / f"train-00{number}.tar"))]
    model = f"{run.parent}/small_model.py:small"
    printed = command("fit", "--model", model, *fitted, "--out", run, "--workers", 0, "--batch-size", 4, *OPTIONS)
    assert "12 samples" in printed
    assert (run / "patterns.safetensors").read_bytes() == before


def test_the_quality_of_old_moments_is_the_old_quality(run: Path, command: Command) -> None:
    before = pq.read_table(run / "quality.parquet")
    regressed, evaluated = explained_shards(run)[1::2]
    command(
        *("quality", "--patterns", run, "--shards", regressed, "--evaluate", evaluated),
        *("--workers", 0, "--batch-size", 4),
    )
    after = pq.read_table(run / "quality.parquet")
    assert after.drop_columns("rho").equals(before.drop_columns("rho"))
    np.testing.assert_allclose(after["rho"].to_numpy(), before["rho"].to_numpy(), rtol=1e-9)


def test_explanations_by_old_patterns_are_the_old_explanations(run: Path, command: Command, tmp_path: Path) -> None:
    words = ("explain", "--patterns", run, *explained_shards(run), "--workers", 0, "--batch-size", 4)
    words = (*words, "--methods", METHODS, "--output", "npy,png")
    before = (run / "explanations.parquet").read_bytes()
    command(*words)
    assert (run / "explanations.parquet").read_bytes() == before, "the old job was finished"
    command(*words, "--out", tmp_path / "new")
    same_rows(tmp_path / "new" / "explanations.parquet", run / "explanations.parquet", ())
    for name in ("train-002.tar", "train-003.tar"):
        folders = tmp_path / "new", run
        for new, old in zip(*(read_shard(str(folder / "explanations" / name)) for folder in folders), strict=True):
            assert (new.key, new.files.keys()) == (old.key, old.files.keys())
            for method in METHODS.split(","):
                maps = [np.load(io.BytesIO(sample.files[f"{method}.npy"])).astype(np.float64) for sample in (new, old)]
                assert np.linalg.norm(maps[0] - maps[1]) <= 1e-3 * np.linalg.norm(maps[1])


def test_degradation_by_old_patterns_is_the_old_degradation(run: Path, command: Command, tmp_path: Path) -> None:
    words = ("degrade", "--patterns", run, *explained_shards(run), "--workers", 0, "--batch-size", 4)
    words = (*words, "--methods", "gradient,patternattribution", "--patch-size", 4, "--steps", 4)
    before = (run / "degradation.parquet").read_bytes()
    assert "patternattribution" in command(*words)
    assert (run / "degradation.parquet").read_bytes() == before, "the old job was finished"
    command(*words, "--out", tmp_path / "new")
    same_rows(tmp_path / "new" / "degradation.parquet", run / "degradation.parquet", ("curve",))


def same_rows(new: Path, old: Path, lists: tuple[str, ...]) -> None:
    """Compare two tables; numbers of another machine differ by rounding."""
    one, other = pq.read_table(new), pq.read_table(old)
    assert one.schema.equals(other.schema)
    for name in one.schema.names:
        if name in lists:
            np.testing.assert_allclose(np.stack(one[name].to_numpy()), np.stack(other[name].to_numpy()), atol=1e-5)
        elif pa.types.is_floating(one.schema.field(name).type):
            np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), rtol=1e-3, atol=1e-5)
        else:
            assert one[name].equals(other[name]), name


def test_status_and_report_read_an_old_run(run: Path, command: Command) -> None:
    printed = command("status", run)
    assert all(job in printed for job in ("fit", "quality", "explain", "degrade"))
    command("report", run)
    page = (run / "report.html").read_text()
    assert "patternattribution" in page
    assert "2.conv1" in page


def test_an_explainer_loads_an_old_run(run: Path) -> None:
    model = loading.load(ModelConfig(spec=f"{run.parent}/small_model.py:small", **PREPROCESSING)).model  # type: ignore[arg-type]
    explainer = Explainer.load(run, model, ["patternattribution"])
    assert explainer.network.input_shape == (3, 16, 16)
