"""Concepts: directions of a fit, maps of a concept and sensitivity of classes, and the errors of their files."""

import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from patterns import UserError, trace
from patterns.io import TensorFile, load_moments
from patterns.moments import CONCEPTS, ConceptSums
from ray_jobs.cli.app import exit_status
from ray_jobs.config import FitConfig, Resources
from ray_jobs.data.concepts import load_concepts
from ray_jobs.data.image_decoding import decode
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.explain.target_files import load_target
from ray_jobs.jobs.explain.targets import parse_target
from ray_jobs.jobs.fit.fit import fit, merge
from ray_jobs.jobs.moments_job import MomentsJob
from ray_jobs.models.factories import load_custom_model
from ray_jobs.models.loading import load
from ray_jobs.runs.concept_table import find_direction
from ray_jobs.runs.moments_store import MomentsStore
from tests.patterns.networks import relative
from tests.ray_jobs.runs import OPTIONS, kill_first_worker, make_fit_config

HERE = Resources(workers=0)
USED = 6  # shards
LAYERS = ("0", "2.conv2", "6")  # without 2.conv1, which is folded with its batch norm


@pytest.fixture(scope="module")
def labels(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two concepts for the images of the shards, without those of the first sample of each shard."""
    rng = np.random.default_rng(4)
    keys = [f"s{shard:03d}-{number}" for shard in range(USED) for number in range(1, 6)] + ["of no image"]
    path = tmp_path_factory.mktemp("concepts") / "labels.parquet"
    columns = {"key": keys, "striped": rng.random(len(keys)) < 0.4, "size": rng.normal(size=len(keys))}
    pq.write_table(pa.table(columns), path)
    return path


def make_config(spec: str, shards: list[str], out: Path, labels: Path, **options: Any) -> FitConfig:
    return make_fit_config(spec, shards, out, concepts=str(labels), estimators=("two-component",), **options)


@pytest.fixture(scope="module")
def run(model_spec: str, shards: list[str], labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(make_config(model_spec, shards[:USED], folder, labels), HERE)
    return folder


def directions(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["operator"], row["concept"]): row for row in pq.read_table(run / "concepts.parquet").to_pylist()}


def read_sums(run: Path) -> dict[str, Tensor]:
    """Return the sums of concepts by operator and name, merged from the partial moments that count."""
    with ExitStack() as stack:
        paths = MomentsStore(run / "moments").list_files()
        files = [stack.enter_context(TensorFile(locate(path))) for path in paths]
        merged = {name: load_moments(files, f"{name}/{CONCEPTS}", ConceptSums) for name in LAYERS}
    return {f"{name} {field}": value for name, sums in merged.items() for field, value in sums.tensors().items()}


def assert_same_concepts(one: Path, other: Path) -> None:
    """Assert that two runs have the same sums of concepts, to 1e-12, and the same directions."""
    expected, found = read_sums(one), read_sums(other)
    for name, sums in expected.items():
        assert (found[name] - sums).double().norm() <= 1e-12 * sums.double().norm(), name
    a, b = directions(one), directions(other)
    assert a.keys() == b.keys()
    for name, row in a.items():
        assert row["n"] == b[name]["n"]
        for field in ("direction", "standard_error"):
            np.testing.assert_allclose(row[field], b[name][field], rtol=1e-9, atol=1e-14, err_msg=f"{name} {field}")


def read_images(spec: str, shards: list[str]) -> tuple[list[str], Tensor]:
    preprocessing = load(make_fit_config(spec, shards, "").model).preprocessing
    samples = [sample for shard in shards for sample in read_shard(shard)]
    return [s.key for s in samples], torch.stack([decode(s.files, preprocessing) for s in samples])


def record_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of layers, by hooks, with their gradients to come."""
    found: dict[str, Tensor] = {}

    def record(name: str, z: Tensor) -> None:
        z.retain_grad()
        found[name] = z

    for name, module in model.named_modules():
        if name in LAYERS:
            module.register_forward_hook(lambda _, __, z, name=name: record(name, z))
    model(images.requires_grad_())
    return found


def test_directions_are_differences_of_means_and_covariances(
    run: Path, model_spec: str, shards: list[str], labels: Path
) -> None:
    keys, images = read_images(model_spec, shards[:USED])
    table = pq.read_table(labels).to_pandas().set_index("key")
    labeled = [n for n, key in enumerate(keys) if key in table.index]
    t = table.loc[[keys[n] for n in labeled]]
    model = load_custom_model(model_spec).eval()
    found = directions(run)
    for name, z in record_outputs(model, images).items():
        h = z.detach().double()[labeled].flatten(2).mean(2).numpy() if z.dim() > 2 else z.detach().double()[labeled]
        h, striped, size = np.asarray(h), t["striped"].to_numpy(), t["size"].to_numpy()
        difference = h[striped].mean(0) - h[~striped].mean(0)
        np.testing.assert_allclose(found[name, "striped"]["direction"], difference, rtol=1e-4, atol=1e-6)
        covariance = (h - h.mean(0)).T @ (size - size.mean()) / len(size) / size.var()
        np.testing.assert_allclose(found[name, "size"]["direction"], covariance, rtol=1e-4, atol=1e-6)
        row = found[name, "size"]
        assert row["n"] == 5 * USED
        np.testing.assert_allclose((row["mean"], row["variance"]), (size.mean(), size.var()), rtol=1e-12)
        assert row["relative_error"] == pytest.approx(
            np.linalg.norm(row["standard_error"]) / np.linalg.norm(row["direction"])
        )


def test_samples_without_labels_are_counted_and_used_for_patterns(run: Path) -> None:
    from ray_jobs.runs.run_folder import Run

    section = Run(run).manifest()["fit"]
    assert section["samples"] == 6 * USED
    assert section["concepts"]["names"] == ["striped", "size"]
    assert (section["concepts"]["labeled"], section["concepts"]["unlabeled"]) == (5 * USED, USED)
    assert section["concepts"]["constant"] == []


@pytest.mark.full
def test_order_merges_and_resumption_change_no_digit(
    run: Path, model_spec: str, shards: list[str], labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = Resources(workers=0, max_loss=0)
    committed, original = [], MomentsJob.on_committed

    def stop_after_two(self: MomentsJob, items: list[str], result: Any) -> None:
        original(self, items, result)
        committed.append(items)
        if len(committed) == 2:
            raise KeyboardInterrupt

    config = make_config(model_spec, shards[:USED][::-1], tmp_path / "resumed", labels)
    with monkeypatch.context() as patch:
        patch.setattr(MomentsJob, "on_committed", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            fit(config, often)
    fit(config, often)
    assert_same_concepts(run, tmp_path / "resumed")


@pytest.mark.full
def test_a_killed_worker_changes_no_sum_and_merged_fits_equal_one(
    local_ray: None,
    run: Path,
    model_spec: str,
    shards: list[str],
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = Resources(workers=2, gpus_per_worker=0)
    with monkeypatch.context() as patch:
        worked = kill_first_worker(patch, after=3)
        fit(make_config(model_spec, shards[:USED], tmp_path / "killed", labels), two)
    assert len(worked) > USED, "no shard was processed again: the killed worker had nothing to lose"
    assert_same_concepts(run, tmp_path / "killed")
    halves = [shards[:2], shards[2:USED]]
    runs = [fit(make_config(model_spec, h, tmp_path / str(n), labels), HERE).folder for n, h in enumerate(halves)]
    merge([str(folder) for folder in runs], str(tmp_path / "merged"), two)
    assert_same_concepts(run, tmp_path / "merged")


@pytest.mark.full
def test_map_of_a_concept_explains_the_projection(
    run: Path, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    explain = ["explain", "--patterns", str(run), "--shards", shards[0], "--workers", "0", "--output", "npy"]
    common = [*explain, "--methods", "gradient,patternattribution", "--preset", "paper"]
    assert exit_status([*common, "--target", "2.conv2:concept:size", "--out", str(tmp_path / "a")]) == 0
    keys, images = read_images(model_spec, shards[:1])
    outputs = record_outputs(load_custom_model(model_spec).eval(), images)["2.conv2"]
    v = torch.tensor(directions(run)["2.conv2", "size"]["direction"], dtype=torch.float64)
    projection = outputs.flatten(2).mean(2).double() @ v / v.norm()
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "a" / "explanations.parquet").to_pylist()}
    assert [rows[key]["score"] for key in keys] == pytest.approx(projection.tolist(), rel=1e-4, abs=1e-5)
    # By default the direction is that of the operator before the last.
    assert load_target("concept:size", str(run), model_spec, None)["target"] == "average_pool.0:concept:size"
    assert exit_status([*common, "--target", "concept:striped", "--out", str(tmp_path / "b")]) == 0


def test_gradient_of_a_concept_target_is_that_of_the_projection(run: Path, model_spec: str) -> None:
    from patterns import Explainer

    model = load_custom_model(model_spec).eval()
    images = torch.randn(3, 3, 16, 16)
    network = trace(model, images[:2])
    given = load_target("2.conv2:concept:striped", str(run), model_spec, None)
    target = parse_target(given["target"], network, (), given["vector"])
    explainer = Explainer(target.end(network), None, ["gradient"])
    found = explainer(images, lambda scores: target.make_targets(scores, ())).maps["gradient"]
    v = torch.tensor(given["vector"]).float()
    outputs = record_outputs(model, inputs := images.clone())["2.conv2"]
    (expected,) = torch.autograd.grad((outputs.flatten(2).mean(2) @ v / v.norm()).sum(), inputs)
    assert relative(found, expected) < 1e-5


@pytest.mark.full
def test_sensitivity_is_the_directional_derivative_of_each_class(
    run: Path, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    command = ["concepts", "--patterns", str(run), "--shards", shards[6], "--shards", shards[7], "--workers", "0"]
    assert exit_status([*command, "--target", "label", "--out", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out" / "sensitivity.parquet").to_pylist()
    found = {(row["class"], row["operator"], row["concept"]): row for row in rows}
    _, images = read_images(model_spec, shards[6:8])
    classes = np.array([int(s.files["cls"]) for shard in shards[6:8] for s in read_shard(shard)])
    model = load_custom_model(model_spec).eval()
    outputs = record_outputs(model, images)
    scores = model(images)  # the hooks record again
    scores[range(len(images)), classes].sum().backward()
    for name, z in outputs.items():
        assert z.grad is not None
        gradients = z.grad.double().flatten(2).sum(2) if z.dim() > 2 else z.grad.double()
        for concept in ("striped", "size"):
            v = torch.tensor(directions(run)[name, concept]["direction"], dtype=torch.float64)
            expected = (gradients @ v).numpy()
            for number in np.unique(classes):
                chosen, row = expected[classes == number], found[number, name, concept]
                assert row["n"] == len(chosen)
                assert row["mean"] == pytest.approx(chosen.mean(), rel=1e-4, abs=1e-7)
                assert row["positive"] == pytest.approx((chosen > 0).mean())
                if len(chosen) > 1:
                    error = chosen.std(ddof=1) / len(chosen) ** 0.5
                    assert row["standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-7)


@pytest.mark.full
def test_page_runs(model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(Path(model_spec.rpartition(":")[0]).read_text())
    Path("shards").mkdir()
    for shard in shards[:2]:
        Path("shards", Path(shard).name).symlink_to(shard)
    keys = [f"s{shard:03d}-{number}" for shard in range(2) for number in range(6)]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {"keys": keys, "striped": [True, False] * 6, "sizes": list(range(12))})
    (commands,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    for line in commands.splitlines():
        assert exit_status([*shlex.split(line)[1:], "--workers", "0"]) == 0, line
    assert pq.read_metadata("run/sensitivity.parquet").num_rows > 0
    assert pq.read_metadata("run/explanations.parquet").num_rows == 12


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"name": ["a"], "x": [1]}, "the columns are name, x. Name one column `key`"),
        ({"key": ["a", "b"]}, "the columns are key."),
        ({"key": ["a", "b"], "x": ["1", "2"]}, "the column 'x' is of type string"),
        ({"key": ["a", "b"], "x": [True, True]}, "the concept 'x' is constant"),
        ({"key": ["a", "b"], "x": [1.0, None]}, "the concept 'x' has no finite value for 'b'"),
        ({"key": ["a", "a"], "x": [1, 2]}, "the key 'a' has several rows"),
        ({"key": [1, 2], "x": [1, 2]}, "the keys are of type int64"),
        ({"key": ["a", "b"], "shard": [1, 2], "x": [1, 2]}, "the shards are of type int64"),
        ({"key": ["a", "a"], "shard": ["s", "s"], "x": [1, 2]}, "the key 'a' has several rows for s"),
        ({"key": ["a", "a"], "shard": ["s", "t"], "x": [1, 2]}, "names no sample of these shards, but of s"),
    ],
)
def test_wrong_labels_are_one_line(
    columns: dict[str, list[Any]],
    words: str,
    tmp_path: Path,
    model_spec: str,
    shards: list[str],
    complaint: Callable[..., str],
) -> None:
    file = tmp_path / "labels.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(UserError) as error:
        load_concepts(str(file), shards)
    assert words in str(error.value)
    command = ["fit", "--model", model_spec, "--shards", shards[0], "--out", tmp_path / "run", *OPTIONS]
    if "constant" in words:
        assert f"--concepts {file}: {words}" in complaint(*command, "--concepts", file)


def test_large_integers_are_read_to_the_nearest_double(tmp_path: Path) -> None:
    values = [2**60 + 1, 2**53 + 1, -(2**63), 1]
    pq.write_table(pa.table({"key": list("abcd"), "x": values}), tmp_path / "labels.parquet")
    labels = load_concepts(str(tmp_path / "labels.parquet"), ())
    assert labels is not None
    assert labels.values[:, 0].tolist() == [float(value) for value in values]


def test_other_errors_are_one_line(
    run: Path, fitted: str, model_spec: str, shards: list[str], tmp_path: Path, complaint: Callable[..., str]
) -> None:
    pq.write_table(pa.table({"key": ["x", "y"], "c": [0, 1]}), tmp_path / "others.parquet")
    common = ["--workers", "0", "--shards", shards[0]]
    command = ["fit", "--model", model_spec, *common, "--out", tmp_path / "run", *OPTIONS]
    line = complaint(*command, "--concepts", tmp_path / "others.parquet")
    assert "none of the 6 samples has labels of concepts. The column `key` must hold the keys" in line
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert "not a Parquet file" in complaint(*command, "--concepts", tmp_path / "broken.parquet")
    explain = ["explain", "--patterns", run, *common, "--out", tmp_path / "explained"]
    assert "no concept 'spotted' with directions. Choose from striped, size." in complaint(
        *explain, "--target", "concept:spotted"
    )
    assert "no operator '7' with directions" in complaint(*explain, "--target", "7:concept:size")
    without = ["--patterns", fitted, *common, "--out", tmp_path / "without"]
    assert "this fit has no concepts. Fit with --concepts LABELS.parquet." in complaint("concepts", *without)
    assert "this fit has no concepts" in complaint("explain", *without, "--target", "concept:size")
    sensitivity = ["concepts", "--patterns", run, *common, "--out", tmp_path / "sensitivity"]
    assert "concepts need one class for each sample" in complaint(*sensitivity, "--target", "contrast")
    assert "sums of concepts cannot be compiled" in complaint(
        *command, "--concepts", tmp_path / "others.parquet", "--compile", "default"
    )


def test_changed_labels_and_other_concepts_are_errors(
    run: Path, fitted: str, model_spec: str, shards: list[str], labels: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "labels.parquet"
    pq.write_table(pq.read_table(labels).slice(1), changed)
    config = make_config(model_spec, shards[:1], tmp_path / "run", changed)
    fit(config, HERE)
    one = pq.read_table(labels).drop_columns(["size"])
    pq.write_table(one, tmp_path / "one.parquet")
    fit(make_config(model_spec, shards[1:2], tmp_path / "other", tmp_path / "one.parquet"), HERE)
    with pytest.raises(UserError, match=r"this fit has the concepts striped, and .* has striped, size"):
        merge([str(tmp_path / "run"), str(tmp_path / "other")], str(tmp_path / "merged"), HERE)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"status": "complete"', '"status": "begun"'))
    pq.write_table(pq.read_table(labels), changed)
    with pytest.raises(UserError, match="begun with other labels of concepts"):
        fit(config, HERE)


def test_concept_that_the_samples_do_not_vary_in_has_no_direction(
    model_spec: str, shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"s000-{n}" for n in range(6)]
    columns = {"key": [*keys, "elsewhere"], "rare": [0] * 6 + [1], "even": [0, 1, 0, 1, 0, 1, 0]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    fit(make_config(model_spec, shards[:1], tmp_path / "run", tmp_path / "labels.parquet"), HERE)
    assert "constant in these samples, so without a direction: rare" in capsys.readouterr().err
    with pytest.raises(UserError, match="the concept 'rare' has no direction in 6"):
        find_direction(str(tmp_path / "run"), "rare", "6")
