"""When a fit stops: its stopping rule against the truth, and the projection of the samples that it needs."""

import math

import numpy as np
import pytest
import torch

from patterns import Moments
from patterns.estimation.jackknife import (
    GROUPS,
    StandardErrors,
    check_convergence,
    has_converged,
    median_change,
    samples_needed,
)
from tests.patterns.drawn import (
    CHOICES,
    ROWS,
    distance,
    draw_samples,
    estimate_errors,
    layer,
    make_loaders,
    moments,
    solve_partials,
    split_moments,
    true_pattern,
)


@pytest.mark.full
def test_a_fit_that_stopped_is_within_the_tolerance_of_the_truth() -> None:
    draws, neurons, tolerance, choices = 60, 16, 0.08, ("linear", "two-component")
    operator, one = layer(neurons, draws), layer(neurons)
    held: list[Moments] = []
    ends: dict[str, dict[int, float]] = {"linear": {}, "positive": {}}
    while any(len(ended) < draws for ended in ends.values()):
        # Half as many samples again from check to check.
        size = max(20, sum(int(part.total.n[0]) for part in held) // 32)
        for part in range(GROUPS):
            held.append(moments(operator, draw_samples(size, len(held) + part, draws)))
        found, patterns = estimate_errors(operator, held, choices), solve_partials(operator, held, choices)
        for row, ended in ends.items():
            away = (
                distance(patterns[row], true_pattern(one, row).repeat(draws, 1)).view(draws, neurons).quantile(0.9, 1)
            )
            for draw, of_one in enumerate(found[row].neurons.view(draws, neurons)):
                if draw not in ended and has_converged([StandardErrors(of_one).p90], tolerance):
                    ended[draw] = float(away[draw]) / tolerance
    for ended in ends.values():
        # The errors of the neurons of an operator are correlated, so their 90th percentile varies between draws.
        assert np.quantile(list(ended.values()), 0.9) <= 2
        assert 0.7 <= np.median(list(ended.values())) <= 1.5


def test_patterns_of_many_samples_tend_to_the_truth_of_these_tests() -> None:
    operator = layer()
    found = solve_partials(operator, split_moments(operator, draw_samples(400_000), 400_000))
    for row in ("linear", "positive"):
        assert distance(found[row], true_pattern(operator, row)).max() < 0.02


@pytest.mark.parametrize(
    ("found", "expected"),
    [([0.01, 0.02], True), ([0.01, 0.03], False), ([0.01, None], False), ([None], False), ([], False)],
)
def test_a_fit_stops_when_every_error_is_known_and_within_the_tolerance(
    found: list[float | None], expected: bool
) -> None:
    assert has_converged(found, 0.02) is expected


def test_the_samples_needed_follow_from_the_root_law() -> None:
    assert samples_needed([0.01, 0.1], 500, 0.05) == 2000
    assert samples_needed([0.01], 500, 0.05) == 500
    assert samples_needed([0.01, None], 500, 0.05) is None
    assert samples_needed([], 500, 0.05) is None


@pytest.mark.full
def test_the_projection_agrees_with_further_samples() -> None:
    operator, n = layer(draws=100), 800
    x = draw_samples(16 * n, draws=100)
    now = estimate_errors(operator, split_moments(operator, x[:n], n // GROUPS))["positive"].p90
    later = estimate_errors(operator, split_moments(operator, x, n))["positive"].p90
    assert samples_needed([now], n, later) == pytest.approx(len(x), rel=0.2)


def test_the_change_is_the_median_over_neurons_that_have_a_pattern() -> None:
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [7.0, 7.0]])
    now = torch.tensor([[3.0, 4.5], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    moved = [0.5 / math.hypot(3, 4.5), 0.5, 0.0]
    assert median_change(now, before) == pytest.approx(sorted(moved)[1])
    assert median_change(torch.zeros(3, 2), before[:3]) == 0


def test_a_check_reports_the_changes_since_the_previous_check() -> None:
    operator = layer()
    held = split_moments(operator, draw_samples(800), 50)
    first, second = (
        check_convergence(operator, make_loaders(held[:8]), CHOICES),
        check_convergence(operator, make_loaders(held), CHOICES),
    )
    assert second.changes(second.solution) == dict.fromkeys(ROWS, 0.0)
    found, a, b = second.changes(first.solution), solve_partials(operator, held), solve_partials(operator, held[:8])
    for row in ROWS:
        assert found[row] == pytest.approx(float(distance(b[row], a[row]).median()))
