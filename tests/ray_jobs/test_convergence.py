"""The convergence curve of a fit: its table of checks, and its figure."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from patterns import Network, accumulate, trace
from patterns.estimation.jackknife import ConvergenceCheck, check_convergence, has_converged
from ray_jobs.figures.convergence_curves import (
    SCHEMA,
    append_rows,
    check_rows,
    draw_convergence,
    last_check,
)
from ray_jobs.units import format_quantity


def network() -> Network:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double(), torch.zeros(2, 6).double())


def looks(network: Network, parts: int) -> dict[str, ConvergenceCheck]:
    held = [accumulate(network, [x]) for x in torch.randn(64, 20, 6, dtype=torch.float64)[:parts]]
    return {
        name: check_convergence(operator, [partial(part.__getitem__, name) for part in held])
        for name, operator in network.operators.items()
    }


@pytest.mark.full
def test_the_table_has_a_row_for_each_operator_and_check(tmp_path: Path) -> None:
    traced, path = network(), tmp_path / "convergence.parquet"
    first, second, third = looks(traced, 2), looks(traced, 8), looks(traced, 32)
    append_rows(path, [check_rows(40, name, found, None) for name, found in first.items()])
    append_rows(path, [check_rows(160, name, found, first[name].solution) for name, found in second.items()])
    table = append_rows(path, [check_rows(640, name, found, second[name].solution) for name, found in third.items()])
    assert pa.parquet.read_table(path).equals(table)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [(r["samples"], r["operator"], r["estimator"]) for r in rows] == [
        (samples, *row)
        for samples in (40, 160, 640)
        for row in (("0", "positive"), ("0", "positive-own-mean"), ("2", "linear"))
    ]
    assert [r["p90"] for r in rows[:3]] == [None] * 3  # too few groups of samples
    assert [r["change"] for r in rows[:3]] == [None] * 3  # no earlier check
    error = third["0"].errors["positive"]
    assert error is not None
    assert (rows[6]["median"], rows[6]["p90"]) == (error.median, error.p90)
    assert rows[6]["change"] == third["0"].changes(second["0"].solution)["positive"] > 0


@pytest.mark.full
def test_a_repeated_check_replaces_the_earlier_rows(tmp_path: Path) -> None:
    traced, path = network(), tmp_path / "convergence.parquet"
    found = looks(traced, 8)["0"]
    append_rows(path, [check_rows(80, "0", found, None)])
    append_rows(path, [check_rows(160, "0", found, None)])
    assert append_rows(path, [check_rows(160, "0", found, None)])["samples"].to_pylist() == [80, 80, 160, 160]


def test_the_last_check_decides(tmp_path: Path) -> None:
    rows = [
        {"samples": n, "operator": op, "estimator": "linear", "median": p90 / 2, "p90": p90, "change": None}
        for n, op, p90 in [(100, "a", 0.2), (100, "b", 0.3), (400, "a", 0.1), (400, "b", 0.15)]
    ]
    last = last_check(pa.Table.from_pylist(rows, SCHEMA))["p90"].to_pylist()
    assert last == [0.1, 0.15]
    assert has_converged(last, 0.15)
    assert not has_converged(last, 0.14)


def curve(looks: int, operators: int, known: bool = True) -> pa.Table:
    rows = [
        {"samples": n, "operator": f"{k}", "estimator": estimator, "median": None, "p90": p if known else None}
        for n in (100 * 2**check for check in range(looks))
        for k in range(operators)
        for estimator in ("linear", "positive")
        for p in [(1 + k) / math.sqrt(n)]
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("looks", [1, 5])
@pytest.mark.parametrize("operators", [1, 20])
@pytest.mark.parametrize("tolerance", [None, 0.01, 5.0])
def test_every_curve_can_be_drawn(tmp_path: Path, looks: int, operators: int, tolerance: float | None) -> None:
    path = tmp_path / "convergence.png"
    draw_convergence(path, curve(looks, operators), tolerance)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)
    assert (red.sum(1).max() > pixels.shape[1] / 2) == (tolerance is not None)  # a line from side to side
    assert (pixels.sum(2) < 60).sum() > 500


@pytest.mark.parametrize("table", [SCHEMA.empty_table(), curve(2, 2, known=False)])
def test_a_curve_without_known_errors_is_drawn(tmp_path: Path, table: pa.Table) -> None:
    draw_convergence(tmp_path / "convergence.png", table, 0.1)
    assert (tmp_path / "convergence.png").exists()


@pytest.mark.parametrize(
    ("value", "text"), [(0.003, "0.003"), (1, "1"), (500, "500"), (20_000, "20k"), (1_281_167, "1.28117M")]
)
def test_numbers_on_axes_are_abbreviated(value: float, text: str) -> None:
    assert format_quantity(value) == text
