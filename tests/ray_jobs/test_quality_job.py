"""The quality job: ρ equals a regression over unfolded patches, whatever happens while the job runs."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.jobs.fit.fit import fit, solve
from ray_jobs.jobs.moments_job import MomentsJob
from ray_jobs.jobs.quality import measure
from ray_jobs.models import loading
from ray_jobs.runs.run_folder import Run
from tests.conftest import make_shards
from tests.oracles import Neuron, neurons, window_patches
from tests.ray_jobs.runs import kill_first_worker

RESOURCES = Resources(workers=2, gpus_per_worker=0)
HERE = Resources(workers=0)
EVERYWHERE = 10**6


@pytest.fixture(scope="module")
def model(model_spec: str) -> ModelConfig:
    return ModelConfig(
        spec=model_spec,
        weights="default",
        precision="float64",
        seed=0,
        image_size=16,
        resize=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], ...]:
    """The shards for the patterns, for v and for ρ."""
    folder = tmp_path_factory.mktemp("sets")
    return tuple(make_shards(folder / name, 3, 8, seed) for seed, name in enumerate("abc"))


@pytest.fixture(scope="module")
def fitted(model: ModelConfig, sets: tuple[list[str], ...], tmp_path_factory: object) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "run"  # type: ignore[attr-defined]
    return fit(
        FitConfig(
            model=model,
            shards=tuple(sets[0]),
            out=str(out),
            batch_size=4,
            estimators=("linear", "two-component", "filter"),
        ),
        HERE,
    ).folder


def quality_config(
    model: ModelConfig, fitted: Path, sets: tuple[list[str], ...], out: Path, **options: object
) -> QualityConfig:
    return QualityConfig(
        model=model,
        patterns=str(fitted),
        shards=tuple(sets[1]),
        evaluate=tuple(sets[2]),
        out=str(out),
        batch_size=4,
        **options,
    )  # type: ignore[arg-type]


def first_layer(model: ModelConfig, shards: list[str]) -> tuple[list[Neuron], nn.Conv2d]:
    """Return the neurons of the model's first convolution over whole shards, with their unfolded patches."""
    loaded = loading.load(model)
    layer = loaded.network.operators["0"]
    x = torch.cat(
        [batch.images for s in shards for batch in ShardReader(s, ReaderConfig(loaded.preprocessing, 8, loaded.dtype))]
    )
    patches = window_patches(x, (3, 3), (2, 2), (0, 0), (1, 1))
    return neurons(patches, layer.weight, layer.bias, (0.0, 6.0)), layer  # type: ignore[return-value]


def regressed(a: list[np.ndarray], b: Neuron, c: Neuron) -> float:
    """Return ρ by least squares on B and the correlation on C, sample by sample."""

    def distractor(neuron: Neuron) -> np.ndarray:
        x, y, gate = neuron.x.numpy(), neuron.y.numpy(), neuron.open.numpy()
        parts = [y] if len(a) == 1 else [y * gate, y * ~gate]
        return x - sum(np.outer(s, pattern) for s, pattern in zip(parts, a))

    d, y = distractor(b), b.y.numpy()
    v = np.linalg.lstsq(d - d.mean(0), y - y.mean(), rcond=1e-8)[0]
    return 1 - np.corrcoef(distractor(c) @ v, c.y.numpy())[0, 1]


@pytest.mark.full
def test_the_job_computes_what_a_regression_over_the_images_computes(
    fitted: Path, model: ModelConfig, sets: tuple[list[str], ...], tmp_path: Path
) -> None:
    run = measure(quality_config(model, fitted, sets, tmp_path, operators=("0",), positions=EVERYWHERE), HERE)
    table = pq.read_table(run.folder / "quality.parquet")
    found = {(r["estimator"], r["neuron"]): r["rho"] for r in table.to_pylist()}
    patterns = load_file(fitted / "patterns.safetensors")
    rows = {"linear": ["linear"], "filter": ["filter"], "two-component": ["positive", "negative"]}
    (on_b, _), (on_c, _) = first_layer(model, sets[1]), first_layer(model, sets[2])
    assert set(found) == {(name, k) for name in rows for k in range(6)}
    for name, sides in rows.items():
        for k, (b, c) in enumerate(zip(on_b, on_c)):
            a = [patterns[f"0/{side}"].double().flatten(1)[k].numpy() for side in sides]
            assert found[name, k] == pytest.approx(regressed(a, b, c), abs=1e-5), (name, k)
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items() if not k.startswith(b"ARROW")}
    assert metadata.pop("inverse").startswith("pseudo-inverse")
    assert metadata == {"cutoff": "1e-10", "positions": "1000000", "seed": "0", "regressed": "24", "evaluated": "24"}


@pytest.mark.slow
def test_workers_losses_and_resuming_change_no_digit(
    local_ray: None,
    fitted: Path,
    model: ModelConfig,
    sets: tuple[list[str], ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = quality_config(model, fitted, sets, tmp_path / "one", positions=3)
    whole = measure(config, HERE)
    worked = kill_first_worker(monkeypatch, after=2)
    other = measure(quality_config(model, fitted, sets, tmp_path / "two", positions=3), RESOURCES)
    assert len(worked) > 6, "no shard was done again: the killed worker had nothing to lose"
    again = measure(quality_config(model, fitted, sets, tmp_path / "two", positions=3), HERE)
    expected = pq.read_table(whole.folder / "quality.parquet")
    for run in (other, again):
        table = pq.read_table(run.folder / "quality.parquet")
        assert table.drop(["rho"]).equals(expected.drop(["rho"]))
        for one, two in zip(table["rho"].to_pylist(), expected["rho"].to_pylist()):
            assert one == (None if two is None else pytest.approx(two, abs=1e-7))


@pytest.mark.full
def test_estimators_solved_later_are_judged_without_data(
    model: ModelConfig, sets: tuple[list[str], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = fit(
        FitConfig(
            model=model,
            shards=tuple(sets[0]),
            out=str(tmp_path / "run"),
            batch_size=4,
            estimators=("linear", "multivariate"),
        ),
        HERE,
    )
    config = quality_config(model, a.folder, sets, a.folder)
    measure(config, HERE)
    solve(str(a.folder), ["random", "identity"], HERE)
    monkeypatch.setattr(MomentsJob, "on_done", lambda *_: pytest.fail("read data again"))
    measure(config, HERE)
    rows = pq.read_table(a.folder / "quality.parquet").to_pylist()
    assert {r["estimator"] for r in rows} == {"linear", "random", "identity"}
    assert {r["rho"] for r in rows if r["estimator"] == "identity"} == {None}
    assert all(0 <= r["rho"] <= 2 for r in rows if r["rho"] is not None)


@pytest.mark.full
def test_the_command_splits_the_shards_judges_and_draws(
    fitted: Path, sets: tuple[list[str], ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(sets[1][0]).parent
    options = ["--patterns", fitted, "--shards", f"{folder}/*.tar", "--out", tmp_path / "q", "--batch-size", 4]
    assert exit_status(["quality", *map(str, options), "--workers", "0", "--operators", "0,2.*"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["filter", "linear", "two-component"]
    section = Run(tmp_path / "q").require_job("quality", "")
    assert (section["samples"], section["regressed"], section["evaluated"]) == (24, 16, 8)
    with Image.open(tmp_path / "q" / "quality.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(10**6)) > 50  # type: ignore[arg-type]


def test_shards_of_the_fit_or_of_both_sets_are_rejected(
    fitted: Path, model: ModelConfig, sets: tuple[list[str], ...], tmp_path: Path
) -> None:
    a, b, c = sets
    for wrong in ((a, a, c), (a, b, b)):
        with pytest.raises(UserError, match="each needs shards of its own"):
            measure(quality_config(model, fitted, wrong, tmp_path / "out"), HERE)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_judged_is_rejected_before_data_are_read(
    fitted: Path, model: ModelConfig, sets: tuple[list[str], ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no operator matches 'conv\*'") as error:
        measure(quality_config(model, fitted, sets, tmp_path / "out", operators=("conv*",)), HERE)
    assert error.value.parameter == "operators"
    half = fit(
        FitConfig(
            model=model, shards=tuple(sets[0]), out=str(tmp_path / "half"), batch_size=4, estimators=("default",)
        ),
        HERE,
    )
    with pytest.raises(UserError, match="patterns of only one side of the gate"):
        measure(quality_config(model, half.folder, sets, tmp_path / "out", operators=("0",)), HERE)
    with pytest.raises(UserError, match="holds no finished fit"):
        measure(quality_config(model, tmp_path / "nowhere", sets, tmp_path / "out"), HERE)
    assert not (tmp_path / "out").exists()
