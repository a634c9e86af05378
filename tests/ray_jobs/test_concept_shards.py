"""Labels of concepts by shard: keys are unique within a shard only."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterns import UserError
from ray_jobs.config import FitConfig, Resources
from ray_jobs.jobs.fit.fit import fit, merge
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import make_fit_config

HERE = Resources(workers=0)
VALUES = np.random.default_rng(3).normal(size=(2, 6))


@pytest.fixture
def twins(tmp_path: Path) -> list[str]:
    """Two shards of different images with the same keys, 0 to 5."""
    rng = np.random.default_rng(2)
    names = [tmp_path / f"{number}.tar" for number in range(2)]
    return [str(write_tar(name, [{"__key__": str(n), "jpg": jpeg(rng)} for n in range(6)])) for name in names]


def fit_concepts(spec: str, shards: list[str], out: Path, columns: dict[str, list]) -> FitConfig:
    labels = out.with_suffix(".parquet")
    pq.write_table(pa.table(columns), labels)
    config = make_fit_config(spec, shards, out, concepts=str(labels), estimators=("linear",))
    fit(config, HERE)
    return config


def read_sums(out: Path) -> dict[str, dict]:
    rows = pq.read_table(out / "concepts.parquet").to_pylist()
    return {row["operator"]: row for row in rows}


def test_rows_with_a_shard_label_the_samples_of_this_shard(model_spec: str, twins: list[str], tmp_path: Path) -> None:
    keys = [str(number) for number in range(6)]
    both = {"shard": [shard for shard in twins for _ in keys], "key": 2 * keys, "x": VALUES.ravel().tolist()}
    fit_concepts(model_spec, twins, tmp_path / "both", both)
    # The same images and labels, each shard with labels of its own.
    one = [
        fit_concepts(model_spec, [twins[n]], tmp_path / str(n), {"key": keys, "x": VALUES[n].tolist()}) for n in (0, 1)
    ]
    merge([config.out for config in one], str(tmp_path / "merged"), HERE)
    expected, found = read_sums(tmp_path / "merged"), read_sums(tmp_path / "both")
    for name, row in expected.items():
        assert found[name]["n"] == row["n"] == 12
        assert found[name]["mean"] == pytest.approx(VALUES.mean(), rel=1e-12)
        np.testing.assert_allclose(found[name]["direction"], row["direction"], rtol=1e-9, atol=1e-14)
    half = {name: values[:6] for name, values in both.items()}
    fit_concepts(model_spec, twins, tmp_path / "half", half)
    assert {row["n"] for row in read_sums(tmp_path / "half").values()} == {6}


def test_row_without_a_shard_that_labels_several_samples_is_an_error(
    model_spec: str, twins: list[str], tmp_path: Path
) -> None:
    columns = {"key": ["elsewhere", "another", "4"], "x": [0, 2, 1]}
    with pytest.raises(UserError) as error:
        fit_concepts(model_spec, twins, tmp_path / "run", columns)
    assert "row 3 of the concepts labels 2 samples" in error.value.what
    assert "column `shard`" in error.value.remedy
    with pytest.raises(UserError, match="row 3 of the concepts"):  # also if no shard is left
        fit_concepts(model_spec, twins, tmp_path / "run", columns)
    configs = [fit_concepts(model_spec, [twins[n]], tmp_path / str(n), columns) for n in (0, 1)]
    with pytest.raises(UserError, match="row 3 of the concepts labels 2 samples"):
        merge([config.out for config in configs], str(tmp_path / "merged"), HERE)
