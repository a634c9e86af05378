"""Standard errors of patterns against their variation over new data, and against the textbook formulas."""

import math
import random
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patterns import Gate, Moments, Operator, solve
from patterns.estimation.jackknife import (
    FEWEST_GROUPS,
    GROUPS,
    Jackknife,
    PartialSize,
    check_convergence,
    group_partial_moments,
)
from tests.patterns.drawn import (
    CHOICES,
    MEAN,
    ROWS,
    D,
    K,
    build_operator,
    draw_samples,
    estimate_errors,
    layer,
    make_loaders,
    moments,
    normal,
    solve_partials,
    split_moments,
)

# --- standard errors ----------------------------------------------------------------------------------


SIZES = {
    "one per group": [120] * GROUPS,
    "several per group": [20] * 96,
    "small and large": [40] * 24 + [240, 240, 480],
    "few": [80, 160, 240, 480, 960],
}


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes", [pytest.param(SIZES[n], id=n, marks=() if n == "few" else pytest.mark.slow) for n in SIZES]
)
def test_the_standard_error_is_the_deviation_of_patterns_over_new_data(sizes: list[int]) -> None:
    draws = 400
    operator = layer(draws=draws)
    held = split_moments(operator, draw_samples(1920, draws=draws), sizes)
    found, patterns = estimate_errors(operator, held), solve_partials(operator, held)
    for row in ROWS:
        a = patterns[row].view(draws, K, D)
        estimated = (found[row].neurons.view(draws, K) * a.norm(dim=2)).square().mean(0).sqrt()
        # A standard deviation of 400 draws has an error of 4 %, and the errors of ratios have long tails.
        torch.testing.assert_close(estimated, a.var(0).sum(1).sqrt(), rtol=0.12, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=20), st.integers(0, 1000))
def test_for_a_mean_the_jackknife_is_the_textbook_formula(sizes: list[int], seed: int) -> None:
    x = normal(sum(sizes), 2, 3, seed=seed)
    jackknife = Jackknife(x.mean(0))
    for part in range(len(sizes)):
        others = torch.cat([piece for i, piece in enumerate(x.split(sizes)) if i != part])
        jackknife.leave_out(others.mean(0), sizes[part] / sum(sizes))
    means = np.array([piece.mean(0).numpy() for piece in x.split(sizes)])
    odds = np.array([sum(sizes) / size - 1 for size in sizes])[:, None, None]
    expected = ((means - x.mean(0).numpy()) ** 2 / odds).mean(0)
    np.testing.assert_allclose(jackknife.variance(), expected.sum(1), rtol=1e-9, atol=1e-15)
    if len(set(sizes)) == 1:
        np.testing.assert_allclose(expected, np.var(means, 0, ddof=1) / len(sizes), rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(5, 30), min_size=2, max_size=12), st.integers(0, 1000))
def test_for_a_ratio_the_jackknife_is_its_definition_by_pseudo_values(sizes: list[int], seed: int) -> None:
    x = normal(sum(sizes), 2, seed=seed) + 3
    n, g = sum(sizes), len(sizes)

    def ratio(x: Tensor) -> Tensor:
        return (x[:, 0].sum() / x[:, 1].sum()).reshape(1, 1)

    whole = ratio(x)
    left = [ratio(torch.cat([p for i, p in enumerate(x.split(sizes)) if i != j])) for j in range(g)]
    jackknife = Jackknife(whole)
    for value, size in zip(left, sizes):
        jackknife.leave_out(value, size / n)
    h = [n / size for size in sizes]
    pseudo = np.array([float(h[j] * whole - (h[j] - 1) * left[j]) for j in range(g)])
    center = float(g * whole) - sum((1 - sizes[j] / n) * float(left[j]) for j in range(g))
    expected = np.mean((pseudo - center) ** 2 / (np.array(h) - 1))
    assert float(jackknife.variance()) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.full
def test_it_agrees_with_a_bootstrap_of_the_partial_moments() -> None:
    times, count = 1000, 16
    operator, many = layer(), layer(draws=times)
    x = draw_samples(count * 300)
    drawn = torch.from_numpy(np.random.default_rng(0).integers(count, size=(count, times)))
    again = x.view(count, 300, D)[drawn]  # (parts, times, images, D)
    held = [moments(many, part.transpose(0, 1).reshape(300, times * D, 1)) for part in again]
    patterns, once = solve_partials(many, held), split_moments(operator, x, 300)
    found, whole = estimate_errors(operator, once), solve_partials(operator, once)
    for row in ROWS:
        # A bootstrap of g partial moments has the variance of their means over g, not over g - 1.
        varied = (patterns[row].view(times, K, D).var(0).sum(1) * count / (count - 1)).sqrt()
        torch.testing.assert_close(found[row].neurons, varied / whole[row].norm(dim=1), rtol=0.1, atol=0)


def test_copies_of_samples_within_partial_moments_do_not_change_the_error() -> None:
    operator, copies = layer(), 20
    once = draw_samples(320)
    apart, alike = once.split(20), [part.repeat(copies, 1, 1) for part in once.split(20)]
    expected = estimate_errors(operator, [moments(operator, x) for x in apart])
    found = estimate_errors(operator, [moments(operator, x) for x in alike])
    for row in ROWS:  # 20 times the samples, and nothing new in them
        torch.testing.assert_close(found[row].neurons, expected[row].neurons, rtol=1e-5, atol=0)


@pytest.mark.full
def test_the_error_falls_as_one_over_the_root_of_the_samples() -> None:
    operator = layer(draws=100)
    counts = [160 * 4**power for power in range(4)]
    found = [
        estimate_errors(operator, split_moments(operator, draw_samples(n, draws=100), n // GROUPS)) for n in counts
    ]
    for row in ROWS:
        slope, _ = np.polyfit(np.log(counts), np.log([error[row].median for error in found]), 1)
        assert slope == pytest.approx(-0.5, abs=0.1)


# --- the partial moments ---------------------------------------------------------------------------------


@pytest.mark.full
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=FEWEST_GROUPS, max_size=40), st.randoms(use_true_random=False))
def test_the_order_of_partial_moments_does_not_matter(sizes: list[int], shuffling: random.Random) -> None:
    operator = layer()
    held = split_moments(operator, draw_samples(sum(sizes)), sizes)
    shuffled = shuffling.sample(held, len(held))
    first, second = estimate_errors(operator, held), estimate_errors(operator, shuffled)
    assert first.keys() == second.keys()
    for row in first:
        torch.testing.assert_close(first[row].neurons, second[row].neurons, rtol=1e-6, atol=1e-9)


@given(st.lists(st.integers(0, 1000), max_size=60))
def test_groups_contain_all_partial_moments_once_and_are_about_equal(sizes: list[int]) -> None:
    groups = group_partial_moments([PartialSize(n, str(i)) for i, n in enumerate(sizes)])
    assert sorted(i for group in groups for i in group) == [i for i, n in enumerate(sizes) if n]
    assert len(groups) == min(GROUPS, sum(n > 0 for n in sizes))
    for group in groups:  # no group exceeds the smallest by more than its own last element
        total, last = sum(sizes[i] for i in group), sizes[group[-1]]
        assert total - last <= min(sum(sizes[i] for i in other) for other in groups)


@pytest.mark.parametrize("count", range(1, FEWEST_GROUPS))
def test_errors_are_unknown_with_too_few_partial_moments(count: int) -> None:
    operator = layer()
    held = [*split_moments(operator, draw_samples(40 * count), 40), *([moments(operator, draw_samples(0))] * 5)]
    found = check_convergence(operator, make_loaders(held), CHOICES)
    assert found.errors == dict.fromkeys(ROWS)
    assert found.solution.patterns.keys() == set(ROWS)


def test_the_solution_is_that_of_all_samples() -> None:
    operator = layer()
    x = draw_samples(300)
    found = check_convergence(operator, make_loaders(split_moments(operator, x, 7)), CHOICES).solution
    expected = solve(operator, moments(operator, x), CHOICES)
    assert found.flags == expected.flags
    for row in ROWS:
        torch.testing.assert_close(found.patterns[row], expected.patterns[row], rtol=1e-9, atol=1e-12)


def test_partial_moments_are_loaded_twice_and_one_at_a_time() -> None:
    operator = layer()
    held = split_moments(operator, draw_samples(800), 20)
    alive: weakref.WeakSet[Moments] = weakref.WeakSet()
    most, loaded = 0, [0] * len(held)

    def load(number: int) -> Moments:
        nonlocal most
        loaded[number] += 1
        part = replace(held[number])
        most = max(most, len(alive))  # while the next one is loaded
        alive.add(part)
        return part

    check_convergence(operator, [partial(load, number) for number in range(len(held))], CHOICES)
    assert loaded == [2] * len(held)
    assert most == 0


def test_partial_moments_are_left_unchanged() -> None:
    operator = layer()
    held = split_moments(operator, draw_samples(200), 20)
    before = [{name: t.clone() for name, t in part.tensors().items()} for part in held]
    check_convergence(operator, make_loaders(held), CHOICES)
    for part, tensors in zip(held, before):
        assert all(torch.equal(part.tensors()[name], t) for name, t in tensors.items())


# --- neurons without a pattern ---------------------------------------------------------------------------


def silent(flag: str) -> Operator:
    """Return neurons of which the first is dead or constant."""
    operator = layer()
    weight, bias = operator.weight.flatten(1).clone(), normal(K, seed=4)
    if flag == "dead":
        bias[0] = -1e6
    else:
        weight[0], bias[0] = 0, 1
    return build_operator(weight, bias, gate=operator.gate)


@pytest.mark.parametrize("flag", ["dead", "constant"])
def test_neurons_without_a_pattern_are_left_out(flag: str) -> None:
    operator = silent(flag)
    held = split_moments(operator, draw_samples(800), 50)
    assert check_convergence(operator, make_loaders(held)).solution.flags[0] == flag
    for error in estimate_errors(operator, held, ["linear", "two-component"]).values():
        assert len(error.neurons) == K - 1
        assert error.neurons.isfinite().all()
        assert (error.neurons > 0).all()


def test_an_operator_without_any_pattern_has_no_error() -> None:
    operator = layer()
    assert estimate_errors(operator, split_moments(operator, MEAN.expand(80, D)[..., None], 10)) == {}


def test_a_neuron_that_opened_in_one_of_the_partial_moments_has_an_error_of_one() -> None:
    x = draw_samples(800)
    w = torch.eye(D, dtype=torch.float64)[:1]
    x[:, 0] = -x[:, 0].abs()
    x[:50, 0] *= -1  # the first part
    operator = build_operator(w, torch.zeros(1, dtype=torch.float64), gate=Gate(0.0, math.inf))
    error = estimate_errors(operator, split_moments(operator, x, 50), ["two-component"])["positive"]
    assert error.neurons.tolist() == pytest.approx([1], abs=0.1)


def test_estimators_that_use_no_data_have_no_error() -> None:
    operator = layer()
    held = split_moments(operator, draw_samples(400), 20)
    assert estimate_errors(operator, held, ["filter", "random", "identity"]) == {}
    assert estimate_errors(operator, held, ["filter", "default"]).keys() == {"positive", "positive-own-mean"}


def test_an_operator_without_a_gate_has_errors_of_its_own_estimators() -> None:
    operator = layer(gated=False)
    assert estimate_errors(operator, split_moments(operator, draw_samples(400), 20), ["default"]).keys() == {"linear"}
