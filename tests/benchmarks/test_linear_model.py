"""The linear model against closed forms and numpy, and its patterns against the directions in the data."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.linear.__main__ import SOURCES
from benchmarks.linear.model import (
    PAPER,
    LinearModel,
    angle_between,
    fit_patterns,
    make_layer,
    make_network,
    train_layer,
)
from benchmarks.linear.studies import measure_gated
from benchmarks.pages import DOCS, included, source_code
from patterns import METHODS, Explainer, Moments, Sums, solve


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def models(draw: st.DrawFn, *, signals: int = 4, independent: bool = True) -> LinearModel:
    """Draw models with random directions; if `independent`, at most as many directions as inputs."""
    k, m = draw(st.integers(1, signals)), draw(st.integers(1, 4))
    low, high = (k + m, 10) if independent else (1, k + m - 1)
    d, seed = draw(st.integers(low, high)), draw(st.integers(0, 10**6))
    directions = normal(seed, d, k + m)
    return LinearModel(directions[:, :k], directions[:, k:], draw(st.sampled_from([0.0, 2.0])), 1.5)


def counts(model: LinearModel) -> tuple[int, int]:
    """Return the numbers of signals and distractors."""
    return model.signal.shape[1], model.distractor.shape[1]


def decorrelated(values: Tensor, others: Tensor) -> Tensor:
    """Return the residual of a regression on the other values, which is exactly uncorrelated with them."""
    others = torch.cat([others, torch.ones(len(others), 1).to(others)], 1)
    return values - others @ torch.linalg.lstsq(others, values).solution


def factorial(model: LinearModel, ys: tuple[float, ...], noises: tuple[float, ...]) -> Tensor:
    """Return every combination of y and ε: a population in which they are exactly independent."""
    y, noise = torch.tensor(list(product(ys, noises)), dtype=torch.float64).split(1, 1)
    return model.observe(y, noise)


@settings(deadline=None)
@given(models())
def test_weight_recovers_the_signal_and_cancels_the_distractor(model: LinearModel) -> None:
    k, m = counts(model)
    assert np.allclose(model.weight() @ model.signal, np.eye(k), atol=1e-7)
    assert np.allclose(model.weight() @ model.distractor, np.zeros((k, m)), atol=1e-7)


@pytest.mark.full
@settings(deadline=None)
@given(models())
def test_weight_is_the_shortest_that_does_so(model: LinearModel) -> None:
    both, target = np.hstack([model.signal, model.distractor]), np.eye(model.signal.shape[1], sum(counts(model)))
    shortest = np.linalg.lstsq(both.T, target.T, rcond=None)[0].T
    assert np.allclose(model.weight(), shortest, rtol=1e-7, atol=1e-7)


@settings(deadline=None)
@given(models(independent=False))
def test_weight_is_least_squares_if_there_are_too_many_directions(model: LinearModel) -> None:
    a, b = model.signal.numpy(), model.distractor.numpy() * model.deviation
    covariance = a @ a.T / 3 + b @ b.T  # y is uniform in [-1, 1]: its variance is 1/3
    found = model.weight().numpy()
    assert np.allclose(found @ covariance, a.T / 3, rtol=1e-9, atol=1e-9)  # the normal equations


def test_weight_and_pattern_of_the_papers_example_are_those_of_the_paper() -> None:
    torch.testing.assert_close(PAPER.weight(), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    x = factorial(PAPER, (-1.0, -0.5, 0.5, 1.0), (-2.0, 0.0, 2.0))
    torch.testing.assert_close(
        fit_patterns(make_network(make_layer(PAPER.weight())), x, ["linear"])["linear"], PAPER.signal.T
    )


def test_samples_have_the_stated_distributions() -> None:
    model = LinearModel(PAPER.signal, PAPER.distractor, mean=0.7, deviation=2.0)
    x, y = model.sample(200_000, torch.Generator().manual_seed(0))
    noise = (x - y @ model.signal.T) @ torch.linalg.pinv(model.distractor).T
    torch.testing.assert_close(model.observe(y, noise), x)
    assert -1 <= y.min() < -0.999
    assert 0.999 < y.max() <= 1
    assert float(y.square().mean()) == pytest.approx(1 / 3, abs=0.004)
    assert float(noise.mean()) == pytest.approx(0.7, abs=0.025)
    assert float(noise.std()) == pytest.approx(2.0, abs=0.02)
    assert float(np.corrcoef(y[:, 0], noise[:, 0])[0, 1]) == pytest.approx(0, abs=0.012)


def test_seed_determines_the_samples() -> None:
    first, second, other = (PAPER.sample(5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 100))
def test_training_is_least_squares_with_a_bias(model: LinearModel, seed: int) -> None:
    x, y = model.sample(50, torch.Generator().manual_seed(seed))
    y = y + normal(seed, *y.shape) + 3
    truth = np.linalg.lstsq(np.hstack([x - x.mean(0), np.ones((50, 1))]), y.numpy(), rcond=None)[0].T
    linear = train_layer(x, y)
    assert np.allclose(linear.weight.detach(), truth[:, :-1], rtol=1e-8, atol=1e-8)
    assert np.allclose(linear(x).detach(), (x - x.mean(0)) @ truth[:, :-1].T + truth[:, -1], rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 100))
def test_training_without_noise_finds_the_exact_weight(model: LinearModel, seed: int) -> None:
    x, y = model.sample(50, torch.Generator().manual_seed(seed))
    assert torch.allclose(train_layer(x, y).weight, model.weight(), rtol=1e-7, atol=1e-7)


@pytest.mark.full
def test_rotating_the_distractor_rotates_the_weight_and_not_the_pattern() -> None:
    samples = 20_000
    for angle in (10.0, 60.0, 90.0, 160.0):
        model = PAPER.rotated(angle - 45)
        across = math.radians(angle - 90)
        expected = torch.tensor([[math.cos(across), math.sin(across)]], dtype=torch.float64) / math.cos(across)
        torch.testing.assert_close(model.weight(), expected)
        x, y = model.sample(samples, torch.Generator().manual_seed(int(angle)))
        linear = train_layer(x, y)
        torch.testing.assert_close(linear.weight.detach(), expected)
        found = fit_patterns(make_network(linear), x, ["linear", "multivariate", "filter"])
        for name in ("linear", "multivariate"):  # |a_d|·std[ε]/std[y]/√n, four times
            assert float((found[name] - model.signal.T).norm()) < 4 * math.sqrt(2 * 3 / samples)
        assert angle_between(found["filter"], model.signal) == pytest.approx(abs(angle - 90), abs=1e-6)


def test_data_with_three_inputs_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="only data with 2 inputs"):
        LinearModel(normal(0, 3, 1), normal(1, 3, 1)).rotated(10)


@pytest.mark.full
@settings(max_examples=6, deadline=None)
@given(models(signals=1), st.integers(0, 100))
def test_signal_uncorrelated_with_the_distractor_is_found_exactly(model: LinearModel, seed: int) -> None:
    y = normal(seed, 40, 1)
    x = model.observe(y, decorrelated(3 + normal(seed + 1, 40, model.distractor.shape[1]), y))
    found = fit_patterns(make_network(make_layer(model.weight())), x, ["linear"])["linear"]
    assert torch.allclose(found, model.signal.T, rtol=1e-9, atol=1e-9)


@pytest.mark.full
@settings(max_examples=6, deadline=None)
@given(models(), st.integers(0, 100))
def test_linear_pattern_of_the_population_is_the_signal(model: LinearModel, seed: int) -> None:
    k = model.signal.shape[1]
    variance = 0.1 + torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cov_xy = (model.signal * variance).T  # cov[x, y] = A_s Σ_y, as y and ε are independent; no mean
    population = Sums(torch.ones(k, dtype=torch.int64), torch.zeros(k), variance, torch.zeros(1, len(cov_xy.T)), cov_xy)
    operator = make_network(make_layer(model.weight())).operators["0"]
    found = solve(operator, Moments(population), ["linear"]).patterns["linear"]
    assert torch.allclose(found, model.signal.T, rtol=1e-6, atol=1e-6)


@pytest.mark.full
@settings(max_examples=6, deadline=None)
@given(models(), st.integers(0, 100))
def test_multivariate_separates_correlated_signals(model: LinearModel, seed: int) -> None:
    k, m = counts(model)
    y = normal(seed, 60, k) @ (torch.eye(k) + 0.3 * torch.ones(k, k)).double()
    x = model.observe(y, decorrelated(normal(seed + 1, 60, m), y))
    found = fit_patterns(make_network(make_layer(model.weight())), x, ["multivariate", "linear"])
    assert torch.allclose(found["multivariate"], model.signal.T, rtol=1e-3, atol=1e-4)  # its ridge is 1e-6
    cov_y = np.cov(y.T.numpy(), bias=True).reshape(k, k)
    mixed = (model.signal.numpy() @ cov_y / np.diag(cov_y)).T  # cov[x, y] / var[y], one neuron at a time
    assert np.allclose(found["linear"], mixed, rtol=1e-8, atol=1e-8)


@pytest.mark.full
def test_both_components_of_a_relu_neuron_are_the_linear_pattern() -> None:
    x = factorial(PAPER, (-1.0, -0.25, 0.5, 0.75), (-2.0, -1.0, 3.0))
    found = fit_patterns(make_network(make_layer(PAPER.weight()), nn.ReLU()), x, ["two-component", "linear"])
    assert set(found) == {"positive", "negative", "linear"}
    for pattern in found.values():
        torch.testing.assert_close(pattern, PAPER.signal.T)


@pytest.mark.full
def test_distractors_mean_changes_only_the_published_components() -> None:
    mean, ys = 2.0, (-1.0, -0.5, 0.5, 1.0)
    x = factorial(PAPER, ys, (mean - 1, mean + 1))
    found = fit_patterns(
        make_network(make_layer(PAPER.weight()), nn.ReLU()), x, ["two-component", "two-component-own-mean", "linear"]
    )
    share = 0.75 / 0.625  # E₊[y] / E₊[y²], as E[y] = 0
    torch.testing.assert_close(found["positive"], (PAPER.signal + share * mean * PAPER.distractor).T)
    torch.testing.assert_close(found["negative"], (PAPER.signal - share * mean * PAPER.distractor).T)
    for name in ("linear", "positive-own-mean", "negative-own-mean"):
        torch.testing.assert_close(found[name], PAPER.signal.T)


@pytest.mark.full
def test_every_method_equals_its_closed_form_for_a_linear_neuron() -> None:
    w, a, x = normal(0, 1, 7), normal(1, 1, 7), normal(2, 5, 7)
    y = x @ w.T
    expected = {
        "gradient": w.expand(5, 7),
        "deconvnet": w.expand(5, 7),
        "guided-backprop": w.expand(5, 7),
        "gradient-x-input": w * x,
        "patternnet": a * y,
        "patternattribution": w * a * y,
    }
    maps = Explainer(make_network(make_layer(w)), {"0": a}, [name for name in expected if name in METHODS])(x).maps
    for name, found in maps.items():
        torch.testing.assert_close(found, expected[name], msg=name)


@pytest.mark.parametrize("turn", [0.0, 1e-7, 30.0, 90.0, 150.0, 180.0])
def test_angle_between_lines_is_accurate_near_zero(turn: float) -> None:
    a = torch.tensor([math.cos(math.radians(turn)), math.sin(math.radians(turn))], dtype=torch.float64)
    assert angle_between(3 * a, torch.tensor([2.0, 0.0]).double()) == pytest.approx(min(turn, 180 - turn), abs=1e-12)


@pytest.mark.parametrize("function", SOURCES, ids=lambda function: function.__name__)
def test_page_shows_the_source_that_runs(function: type) -> None:
    page = included((DOCS / "linear.md").read_text())
    assert page[f"source:{function.__name__}"] == source_code(function), (
        "run `python -m benchmarks.linear --write docs`"
    )


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU()], ids=["relu", "gelu", "silu"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_patterns_behind_every_gate_have_the_direction_of_the_signal(activation: nn.Module, mean: float) -> None:
    angles = measure_gated(activation, mean, 100_000)
    assert angles["weight"] == pytest.approx(45, abs=0.1)
    for estimator in ("linear", "positive-own-mean", "negative-own-mean"):
        assert math.cos(math.radians(angles[estimator])) >= 0.999
    published = 0.0 if mean == 0 else 15.0  # E[y] over both sides adds a part of the mean
    for estimator in ("positive", "negative"):
        assert angles[estimator] >= published
        assert mean > 0 or math.cos(math.radians(angles[estimator])) >= 0.999
