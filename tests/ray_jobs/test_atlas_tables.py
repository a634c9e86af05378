"""The tables of an atlas of planted rows, against numpy and full sorts over all rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import t

from ray_jobs.config import AtlasConfig, ModelConfig
from ray_jobs.engine.ray_tasks import LocalTasks
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.atlas import class_statistics
from ray_jobs.jobs.atlas.reduction import describe_borders, reduce_rows
from ray_jobs.jobs.atlas.rows import (
    RowShape,
    RowWriter,
    activation_column,
    make_table,
    mass_column,
    relevance_column,
    to_half,
    to_shares,
)
from ray_jobs.jobs.atlas.suspicion import compute_p_values

SIDE, CHANNELS, TOP, SEED = 7, 4, 5, 3
SHAPE = RowShape(SIDE, {"layer": CHANNELS}, 6)
GROUPS = {0: (100, 50), 1: (60,), 2: (30,)}  # samples of each group, by class
FILES = 3


@dataclass(frozen=True)
class Planted:
    """Planted rows in the order of the dataset.

    Attributes:
        files: The files of the rows.
        keys: The keys.
        classes: The explained classes.
        groups: The planted group of each sample in its class.
        labels: The labels; None for a sample without a label.
        predictions: The predictions.
        maps: The maps as they are stored, float64 (N, cells).
        relevance: The relevance of channels as it is stored, float64 (N, channels).
    """

    files: list[str]
    keys: list[str]
    classes: np.ndarray
    groups: np.ndarray
    labels: list[int | None]
    predictions: list[int]
    maps: np.ndarray
    relevance: np.ndarray


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Rows of three classes in random order, of which class 0 has two groups and some equal maps."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(SEED)
    kinds = [(c, g) for c, sizes in GROUPS.items() for g, size in enumerate(sizes) for _ in range(size)]
    order = rng.permutation(len(kinds))
    classes, groups = np.array(kinds)[order].T
    centers = rng.random((3, 2, SIDE**2))
    centers[0, 1, :5] += 4
    maps = centers[classes, groups] + 0.3 * rng.random((len(kinds), SIDE**2)) - 0.2
    first = np.flatnonzero((classes == 0) & (groups == 1))
    maps[first[:4]] = maps[first[0]]  # equal distances, so that the number decides
    labels = [None if k % 20 == 0 else int(rng.integers(3)) for k in range(len(kinds))]
    predictions = rng.integers(2, size=len(kinds)).tolist()
    shares, mass = to_shares(torch.tensor(maps))
    relevance, relevance_mass = to_shares(torch.tensor(rng.standard_normal((len(kinds), CHANNELS))))
    activation = to_half(torch.tensor(rng.random((len(kinds), CHANNELS))))
    keys, files = [f"k{number}" for number in range(len(kinds))], []
    for number, part in enumerate(np.array_split(np.arange(len(kinds)), FILES)):
        scalars: list[dict[str, Any]] = [
            {"shard": f"shard-{number}", "key": keys[k], "position": n, "label": labels[k], "class": int(classes[k])}
            | {"prediction": predictions[k], "probability": 0.5, "score": 1.0, "loss": None}
            for n, k in enumerate(part)
        ]
        lists = {"map": shares[part], "map_mass": mass[part], relevance_column("layer"): relevance[part]}
        lists |= {mass_column("layer"): relevance_mass[part], activation_column("layer"): activation[part]}
        files.append(str(folder / f"{number}.parquet"))
        writer = RowWriter(Path(files[-1]), SHAPE)
        writer.write(make_table(SHAPE, scalars, lists | {"embedding": np.zeros((len(part), 6), np.float16)}))
        writer.close()
    stored = shares.astype(np.float64), relevance.astype(np.float64)
    return Planted(files, keys, classes, groups, labels, predictions, *stored)


def reduce(planted: Planted, folder: Path) -> dict[str, Any]:
    """Write the tables of the planted rows, and return the entries of the manifest."""
    config = AtlasConfig(model=ModelConfig(spec="none"), patterns="", shards=(), out=str(folder), top=TOP, seed=SEED)
    return reduce_rows(planted.files, SHAPE, config, locate(folder), LocalTasks())


@pytest.fixture(scope="module")
def found(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the tables, and the entries of the manifest."""
    folder = tmp_path_factory.mktemp("tables")
    return folder, reduce(planted, folder)


def read(folder: Path, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return pq.read_table(folder / f"{table}.parquet").to_pylist()


def rank(planted: Planted, inside: np.ndarray, distances: np.ndarray, sign: int, count: int = TOP) -> list[str]:
    """Return the keys of the nearest (sign 1) or farthest (sign -1) samples by a full sort; the first of equal ones."""
    values = sign * distances.astype(np.float32)
    return [planted.keys[k] for k in sorted(np.flatnonzero(inside), key=lambda k: (values[k], k))[:count]]


def assert_prototypes(planted: Planted, folder: Path, clustered: np.ndarray) -> None:
    """Assert that the prototypes of each cluster are the samples nearest to the mean of its clustered samples."""
    samples = sorted(read(folder, "samples"), key=lambda row: row["number"])
    assert [row["key"] for row in samples] == planted.keys
    cluster_of = np.array([row["cluster"] for row in samples])
    rows = read(folder, "clusters")
    assert sorted((row["class"], row["cluster"]) for row in rows) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    for row in rows:
        inside = (planted.classes == row["class"]) & (cluster_of == row["cluster"])
        np.testing.assert_array_equal(inside, (planted.classes == row["class"]) & (planted.groups == row["cluster"]))
        distances = np.linalg.norm(planted.maps - planted.maps[inside & clustered].mean(0), axis=1)
        assert [each["key"] for each in row["prototypes"]] == rank(planted, inside, distances, 1)
        values = [float(distances[planted.keys.index(each["key"])]) for each in row["prototypes"]]
        assert [each["value"] for each in row["prototypes"]] == pytest.approx(values, rel=1e-5)


def test_prototypes_are_the_samples_nearest_to_the_center_of_their_cluster(
    planted: Planted, found: tuple[Path, dict[str, Any]]
) -> None:
    assert_prototypes(planted, found[0], np.ones(len(planted.keys), bool))


def test_discriminants_assign_the_samples_of_a_class_that_is_too_large_to_cluster(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 80
    monkeypatch.setattr(class_statistics, "MAX_CLUSTERED", limit)
    monkeypatch.setattr(class_statistics, "MAX_READ", 10)  # several reads of a class
    reduce(planted, tmp_path)
    clustered = np.ones(len(planted.keys), bool)
    members = np.flatnonzero(planted.classes == 0)
    clustered[members[np.random.default_rng([SEED, 0]).permutation(len(members))[limit:]]] = False
    assert_prototypes(planted, tmp_path, clustered)


def test_typical_samples_and_anomalies_are_those_of_a_full_sort(
    planted: Planted, found: tuple[Path, dict[str, Any]]
) -> None:
    expected = []
    for row in read(found[0], "classes"):
        inside = planted.classes == row["class"]
        distances = np.linalg.norm(planted.maps - planted.maps[inside].mean(0), axis=1)
        assert [each["key"] for each in row["typical"]] == rank(planted, inside, distances, 1)
        assert [each["key"] for each in row["untypical"]] == rank(planted, inside, distances, -1)
        usual = np.sqrt(np.mean(distances[inside] ** 2))
        for key in rank(planted, inside, distances, -1, count=3):
            expected.append((float(distances[planted.keys.index(key)] / usual), row["class"], key))
    anomalies = read(found[0], "anomalies")
    clusters = [row for row in read(found[0], "clusters") if row["suspicion"] > 0]
    assert [row["kind"] for row in anomalies] == ["cluster"] * len(clusters) + ["sample"] * len(expected)
    assert [row["suspicion"] for row in clusters] == sorted((row["suspicion"] for row in clusters), reverse=True)
    assert len(clusters) == 2
    for row, cluster in zip(anomalies, clusters):
        names = "class", "cluster", "samples", "p"
        assert [row[name] for name in names] == [cluster[name] for name in names]
        assert (row["value"], row["shard"], row["key"]) == (cluster["suspicion"], None, None)
        assert row["reason"].startswith(f"{cluster['samples'] / 150:.1%} of the class")
    for row, (value, number, key) in zip(anomalies[len(clusters) :], sorted(expected, reverse=True), strict=True):
        assert (row["class"], row["key"], row["samples"], row["cluster"], row["p"]) == (number, key, 1, None, None)
        assert row["shard"] == f"shard-{planted.keys.index(key) // (len(planted.keys) // FILES)}"
        assert row["value"] == pytest.approx(value, rel=1e-5)
        assert row["reason"].startswith(f"{value:.1f} times as far")


def test_pairs_of_label_and_prediction_have_the_moments_of_their_rows(
    planted: Planted, found: tuple[Path, dict[str, Any]]
) -> None:
    kinds = list(zip(planted.classes.tolist(), planted.labels, planted.predictions))
    rows = read(found[0], "confusions")
    assert {(row["class"], row["label"], row["prediction"]) for row in rows} == set(kinds)
    assert len(rows) == len(set(kinds))
    for row in rows:
        inside = [k for k, kind in enumerate(kinds) if kind == (row["class"], row["label"], row["prediction"])]
        assert row["samples"] == len(inside)
        for name, values in (("map", planted.maps), ("relevance/layer", planted.relevance)):
            for moment, compute in (("mean", np.mean), ("variance", np.var)):
                if len(inside) == 1:
                    assert row[f"{moment}_{name}"] is None
                else:
                    expected = compute(values[inside], axis=0)
                    np.testing.assert_allclose(row[f"{moment}_{name}"], expected, rtol=1e-5, atol=1e-9)


def test_manifest_has_the_mean_map_and_its_borders(planted: Planted, found: tuple[Path, dict[str, Any]]) -> None:
    entries = found[1]
    np.testing.assert_allclose(entries["mean_map"], planted.maps.mean(0), rtol=1e-9)
    for name in ("border", "corners"):
        assert entries[name] == measure_region(planted.maps.mean(0), SIDE, name)


@pytest.mark.parametrize("side", [2, 6, 14, 15])
def test_borders_and_corners_are_those_of_a_loop_over_cells(side: int) -> None:
    mean_map = np.random.default_rng(side).standard_normal(side**2)
    for name, region in describe_borders(mean_map, side).items():
        assert region == measure_region(mean_map, side, name)


def measure_region(mean_map: np.ndarray, side: int, name: str) -> object:
    """Return the share of the relevance in a region and that of a uniform map, by a loop over cells."""
    near = max(1, side // 7)  # of a corner: both distances to the edges are smaller
    total = inside = cells = 0.0
    for row in range(side):
        for column in range(side):
            to_edge = min(row, side - 1 - row), min(column, side - 1 - column)
            value = abs(mean_map[row * side + column])
            total += value
            if (min(to_edge) == 0) if name == "border" else (max(to_edge) < near):
                inside, cells = inside + value, cells + 1
    return pytest.approx({"share": inside / total, "uniform": cells / side**2}, rel=1e-6)


def test_bytes_of_a_sample_are_those_of_its_row(planted: Planted) -> None:
    size = 0
    for field in pq.read_schema(planted.files[0]):
        if field.name not in ("shard", "key"):
            length = getattr(field.type, "list_size", 1)
            size += length * np.dtype(getattr(field.type, "value_type", field.type).to_pandas_dtype()).itemsize
    assert sum(SHAPE.bytes_per_sample.values()) == size


@pytest.mark.parametrize(
    "suspicions",
    [[1.0, 1.3, 0.7, 2.0, 0.9, 60.0], [5.0, 5.0, 5.0, 5.0, 5.0, 6.0], [1e-6, 2.0, 3.0, 50.0, 50.0, 0.1, 4.0]],
)
def test_p_values_are_those_of_holm_for_standardized_logarithms(suspicions: list[float]) -> None:
    logs = [float(np.log(max(value, 1e-3))) for value in suspicions]
    median = middle(logs)
    spread = max(1.4826 * middle([abs(value - median) for value in logs]), 0.1)
    single = [float(t.sf((value - median) / spread, len(logs) - 1)) for value in logs]
    order, expected, largest = sorted(range(len(logs)), key=lambda k: single[k]), [0.0] * len(logs), 0.0
    for rank_, k in enumerate(order):
        largest = max(largest, (len(logs) - rank_) * single[k])
        expected[k] = min(largest, 1.0)
    np.testing.assert_allclose(compute_p_values(np.array(suspicions)), expected, rtol=1e-12)


def test_p_value_is_small_for_the_planted_cluster_only() -> None:
    ordinary = np.exp(np.random.default_rng(0).normal(size=40))
    found = compute_p_values(np.append(ordinary, 300.0))
    assert found[-1] < 0.001
    assert found[:-1].min() > 0.5
    assert compute_p_values(np.array([1.0, 1.0, 1.0, 1e6])).tolist() == [1.0] * 4  # too few clusters


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
