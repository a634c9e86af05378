from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import CHOICES, ESTIMATORS, Moments, Network, Operator, UserError, accumulate, choose, solve, trace
from patterns.estimation.estimators import Problem, parse_estimators, required_sums, select_estimators
from patterns.moments.moments import RequiredSums
from tests.oracles import Neuron, covariance
from tests.patterns.cases import GATES, convolution, linear, normal

EVERYTHING = tuple(CHOICES)


def linear_operator(
    weight: Tensor, bias: Tensor | None, x: Tensor, *, gated: bool = True
) -> tuple[Operator, Moments, list[Neuron]]:
    """One layer over data x (S, D), and the samples of its neurons."""
    case = replace(linear(weight, x), bias=bias, gate=GATES["relu" if gated else "none"])
    return case.operator, case.moments(), case.neurons


def convolution_operator() -> tuple[Operator, Moments, list[Neuron]]:
    case = convolution(normal(6, 2, 3, 3), normal(5, 4, 7, 7, seed=3) + 0.4, (2, 2), (1, 1), (1, 1), 2)
    case = replace(case, bias=torch.linspace(-0.5, 0.5, 6).double(), gate=GATES["relu"])
    return case.operator, case.moments(), case.neurons


def double(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# The toy model of the paper: x = (1, 0) s + (1, 1) d, w = (1, -1), so y = s. Every s occurs with every d.
SIGNAL, DISTRACTOR = double((1, 0)), double((1, 1))
TOY = torch.cat([s * SIGNAL + d * DISTRACTOR for s, d in product((-2.0, -1.0, 0.5, 3.0), (-2.0, -0.5, 0.5, 2.0))])


def test_linear_pattern_of_the_toy_model_is_the_signal_direction() -> None:
    operator, moments, _ = linear_operator(double((1, -1)), None, TOY)
    torch.testing.assert_close(solve(operator, moments, ["linear"]).patterns["linear"], SIGNAL)


def test_filter_of_the_toy_model_is_the_weight_and_not_the_signal() -> None:
    operator, moments, _ = linear_operator(double((1, -1)), None, TOY)
    torch.testing.assert_close(solve(operator, moments, ["filter"]).patterns["filter"], double((0.5, -0.5)))


@pytest.mark.parametrize("bias", [None, -0.25, 1.25])
def test_two_component_is_linear_if_signal_and_distractor_are_independent(bias: float | None) -> None:
    b = None if bias is None else torch.tensor([bias], dtype=torch.float64)
    operator, moments, _ = linear_operator(double((1, -1)), b, TOY)
    found = solve(operator, moments, ["two-component"]).patterns
    assert list(found) == ["positive", "negative"]
    torch.testing.assert_close(found["positive"], SIGNAL)
    torch.testing.assert_close(found["negative"], SIGNAL)


def test_two_component_separates_two_regimes() -> None:
    # The signal is along (1, 0) if the gate is open, and along (0, -1) if it is closed.
    ys, ds = (-3.0, -1.0, 1.0, 3.0), (-1.0, 1.0)
    x = torch.cat([(double((y, 0)) if y > 0 else double((0, -y))) + d * DISTRACTOR for y, d in product(ys, ds)])
    operator, moments, _ = linear_operator(double((1, -1)), None, x)
    found = solve(operator, moments, ["two-component", "linear"]).patterns
    torch.testing.assert_close(found["positive"], double((1, 0)))
    torch.testing.assert_close(found["negative"], double((0, -1)))
    assert not torch.allclose(found["linear"], found["positive"], atol=1e-3)


def test_both_sides_of_the_gate_weighted_by_their_samples_sum_to_the_covariance() -> None:
    _, moments, truth = convolution_operator()
    assert moments.open is not None
    total = torch.zeros_like(moments.open.mean_xy())
    for side in (moments.open, moments.closed):
        share = side.n.double() / moments.total.n
        total += share[:, None] * (side.mean_xy() - side.mean_x() * moments.total.mean_y()[:, None])
    for row, neuron in zip(total.numpy(), truth):
        np.testing.assert_allclose(row, covariance(neuron), rtol=1e-9, atol=1e-9 * np.abs(row).max())


def test_the_bias_moves_the_gate_and_nothing_else() -> None:
    weight = double((1, -1))
    plain = linear_operator(weight, None, TOY)
    biased = linear_operator(weight, torch.tensor([50.0], dtype=torch.float64), TOY)
    found = [solve(op, m, ["linear"]).patterns["linear"] for op, m, _ in (plain, biased)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert plain[1].open is not None
    assert biased[1].open is not None
    assert plain[1].open.n.tolist() == [8]
    assert biased[1].open.n.tolist() == [16]


def test_an_operator_without_a_gate_uses_the_linear_pattern() -> None:
    operator, moments, _ = linear_operator(double((1, -1)), None, TOY, gated=False)
    for choice in ("default", "two-component", "linear"):
        solution = solve(operator, moments, [choice])
        assert list(solution.patterns) == ["linear"]
        torch.testing.assert_close(solution.patterns["linear"], SIGNAL)
        assert solution.n_positive.tolist() == [16]


def test_solution_reports_the_outputs_statistics() -> None:
    operator, moments, truth = convolution_operator()
    solution = solve(operator, moments)
    for k, neuron in enumerate(truth):
        assert solution.n[k] == len(neuron.y)
        assert solution.n_positive[k] == neuron.open.sum()
        assert solution.mean_y[k].item() == pytest.approx(neuron.y.numpy().mean(), rel=1e-10)
        assert solution.var_y[k].item() == pytest.approx(neuron.y.numpy().var(), rel=1e-10)


# Of this data's columns the first three are y, a distractor, and a constant.
DEGENERATE = double((-1, 1, 7), (-3, 2, 7), (-3.5, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_constant_and_degenerate_neurons_have_pattern_zero_and_a_flag(dtype: torch.dtype) -> None:
    weight = double((1, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0), (1, 0, 0)).to(dtype)
    bias = torch.tensor([-9.0, 3.25, 1.0, 1.0, 2.0], dtype=dtype)
    operator, moments, _ = linear_operator(weight, bias, DEGENERATE.to(dtype))
    solution = solve(operator, moments)
    # y - E[y] over the open samples of the second is orthogonal to y: E₊[y²] = E₊[y]E[y].
    assert solution.flags == ["dead", "degenerate", "constant", "constant", "ok"]
    assert (solution.patterns["positive"][:4] == 0).all()
    assert (solution.patterns["positive"][4] != 0).any()


def test_a_denominator_that_is_only_rounding_is_degenerate() -> None:
    scale = 0.37  # no sum is exact any more
    operator, moments, _ = linear_operator(double((1, 0, 0)), double((3.25 * scale,))[0], DEGENERATE * scale)
    solution = solve(operator, moments)
    assert solution.flags == ["degenerate"]
    assert (solution.patterns["positive"] == 0).all()


@pytest.mark.parametrize("choice", EVERYTHING)
def test_every_pattern_is_finite(choice: str) -> None:
    weight = double((1, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0), (1e-200, 0, 0), (1e150, 0, 0), (1, 0, 0))
    bias = torch.tensor([-9.0, 3.25, 1.0, 1.0, 0.0, 0.0, 90.0], dtype=torch.float64)
    operator, moments, _ = linear_operator(weight, bias, DEGENERATE)
    for pattern in solve(operator, moments, [choice]).patterns.values():
        assert pattern.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "positive", "negative"])
def test_fitted_patterns_of_dead_and_constant_neurons_are_zero(name: str) -> None:
    weight = double((1, 0, 0), (0, 0, 1), (0, 0, 0))
    operator, moments, _ = linear_operator(weight, torch.tensor([-9.0, 1.0, 1.0]).double(), DEGENERATE)
    solution = solve(operator, moments, ["linear", "two-component"])
    assert solution.flags == ["dead", "constant", "constant"]
    assert (solution.patterns[name] == 0).all()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neuron_whose_outputs_differ_by_rounding_only_is_constant(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(dtype)
    with torch.no_grad():
        model[0].bias.fill_(5.0)
    x = torch.full((4, 3, 9, 9), 0.3, dtype=dtype)
    network = trace(model, x[:1])
    moments = accumulate(network, x.split(1))["0"]
    solution = solve(network.operators["0"], moments, ["default", "linear"])
    assert solution.flags == ["constant"] * 8
    assert all((p == 0).all() for p in solution.patterns.values())


def test_a_run_without_samples_gives_dead_neurons() -> None:
    operator, moments, _ = linear_operator(double((1, -1)), None, TOY)
    empty = moments.__class__(moments.total - moments.total, moments.closed - moments.closed)
    solution = solve(operator, empty, ["two-component", "linear"])
    assert solution.flags == ["dead"]
    assert all((p == 0).all() for p in solution.patterns.values())


def random_patterns(operator: Operator, moments: Moments, seed: int = 0, name: str = "0") -> Tensor:
    operator.name = name
    return solve(operator, moments, "random", seed=seed).patterns["random"]


def test_random_patterns_depend_on_seed_and_operator_only() -> None:
    operator, moments, _ = convolution_operator()
    first = random_patterns(operator, moments, 5)
    assert first.shape == operator.weight.shape
    assert torch.equal(first, random_patterns(operator, moments + moments, 5))
    assert not torch.allclose(first, random_patterns(operator, moments, 6))
    assert not torch.allclose(first, random_patterns(operator, moments, 5, "1"))
    assert not torch.allclose(first[0], first[1])


def assert_uniform(values: Tensor) -> None:
    """Kolmogorov-Smirnov test at a level of 1e-4 that values are uniform on [0, 1]."""
    n = len(values)
    ordered, steps = values.sort().values, torch.arange(n + 1).double() / n
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
    assert distance < 2.23 * n**-0.5


@pytest.mark.full
def test_directions_of_random_patterns_are_uniform_and_independent() -> None:
    neurons = 10_000
    weight = double((1, 2, -2)).repeat(neurons, 1)
    operator, moments, _ = linear_operator(weight, None, normal(2, 3))
    a = random_patterns(operator, moments)
    torch.testing.assert_close((weight * a).sum(1), torch.ones(neurons).double(), rtol=0, atol=1e-9)
    # a = u / wᵀu for a direction u that is uniform on the sphere. Then |cos(w, u)| is uniform on [0, 1] (Archimedes'
    # hat-box theorem), and so is the angle around w, from any direction, in units of a full turn.
    cosine = 1 / (3 * a.norm(dim=1))
    assert_uniform(cosine)
    across, other = double((2, -2, -1))[0] / 3, double((2, 1, 2))[0] / 3  # with w, an orthogonal basis
    angle = torch.atan2(a @ other, a @ across) / (2 * torch.pi) % 1
    assert_uniform(angle)
    for one, two in ((cosine[1:], cosine[:-1]), (angle[1:], angle[:-1]), (cosine, angle)):
        assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 4 * neurons**-0.5


def network_of_three() -> Network:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return trace(model, torch.zeros(2, 3))


@pytest.mark.full
def test_estimators_are_selected_by_globs_of_operator_names() -> None:
    network = network_of_three()
    operators = network.operators
    rows = {name: select_estimators(op, "[02]=linear,2=two-component, filter") for name, op in operators.items()}
    assert rows == {"0": ["linear", "filter"], "2": ["linear", "positive", "negative", "filter"], "4": ["filter"]}
    assert {name: select_estimators(op, "2=linear") for name, op in operators.items()} == {
        "0": ["positive", "positive-own-mean"], "2": ["linear"], "4": ["linear"],
    }  # fmt: skip
    moments = accumulate(network, [torch.randn(20, 3, generator=torch.Generator().manual_seed(0))])
    solved = {name: list(solve(op, moments[name], "2=linear,4=filter").patterns) for name, op in operators.items()}
    assert solved == {"0": ["positive", "positive-own-mean"], "2": ["linear"], "4": ["filter"]}
    assert required_sums(operators["0"], "2=multivariate") == RequiredSums(total=False, open=True)
    assert required_sums(operators["2"], "2=multivariate") == RequiredSums(total=True, open=False)
    assert required_sums(operators["4"], "identity,random") == RequiredSums(total=False, open=False)


@pytest.mark.full
def test_a_glob_that_matches_no_operator_is_rejected() -> None:
    operators = network_of_three().operators
    assert parse_estimators("[02]=linear,4=filter", operators) == [("[02]", "linear"), ("4", "filter")]
    with pytest.raises(UserError) as caught:
        parse_estimators("fc*=linear", operators)
    assert (caught.value.where, caught.value.parameter) == ("", "estimators")
    assert "'fc*'" in caught.value.what
    assert all(name in caught.value.remedy for name in operators)
    with pytest.raises(UserError, match="'liner'") as caught:
        parse_estimators("0=liner", operators, "estimator")
    assert caught.value.parameter == "estimator"


def test_a_message_names_only_some_of_many_operators() -> None:
    with pytest.raises(UserError) as caught:
        parse_estimators("fc*=linear", [f"layer{number}" for number in range(100)])
    assert "layer4, and 95 more" in caught.value.remedy


@pytest.mark.full
def test_explanations_use_the_first_estimator_that_applies_to_an_operator() -> None:
    network = network_of_three()
    moments = accumulate(network, [torch.randn(20, 3, generator=torch.Generator().manual_seed(0))])
    solved = {name: solve(op, moments[name], "linear,two-component,filter") for name, op in network.operators.items()}
    patterns = {name: solution.patterns for name, solution in solved.items()}
    picked = choose(network, patterns, "2=filter,linear")
    assert torch.equal(picked["2"], patterns["2"]["filter"])
    assert torch.equal(picked["0"], patterns["0"]["linear"])
    assert set(choose(network, patterns, "identity").values()) == {None}
    with pytest.raises(UserError) as caught:
        choose(network, patterns, "linear,filter")
    assert (caught.value.where, caught.value.parameter) == ("", "estimator")
    assert "never used" in caught.value.what


def test_an_unknown_estimator_is_rejected_by_name() -> None:
    operator, moments, _ = linear_operator(double((1, -1)), None, TOY)
    with pytest.raises(UserError) as caught:
        solve(operator, moments, ["linear", "lineal"])
    assert caught.value.parameter == "estimators"
    assert "'lineal'" in caught.value.what
    assert all(name in caught.value.remedy for name in CHOICES)


def test_an_estimator_uses_only_the_sums_that_it_declares() -> None:
    operator, moments, _ = convolution_operator()
    assert moments.open is not None
    weight = operator.weight.flatten(1)
    for name, estimator in ESTIMATORS.items():
        total = moments.total if estimator.sums.total else moments.total.__class__(*without_x(moments.total))
        opened = moments.open if estimator.sums.open else moments.open.__class__(*without_x(moments.open))
        found = estimator.solve(Problem(operator, Moments(total, opened), weight))
        assert torch.equal(found, estimator.solve(Problem(operator, moments, weight))), name


def without_x(sums: object) -> tuple[Tensor, Tensor, Tensor]:
    return sums.n, sums.y, sums.yy  # type: ignore[attr-defined]


def test_choices_for_operators_without_a_gate_need_no_sums_over_a_gate() -> None:
    assert not any(ESTIMATORS[name].sums.open for _, rows in CHOICES.values() for name in rows)
