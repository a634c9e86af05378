"""The invariances of each estimator, and the changes of those that are not invariant."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from patterns import CHOICES, ESTIMATORS, solve
from patterns.estimation.estimators import RIDGE
from tests.patterns.cases import GATES, Case, linear, normal

EVERYTHING = ",".join(CHOICES)
CENTERED = sorted({name for name, estimator in ESTIMATORS.items() if estimator.uses_data} - {"positive", "negative"})
SHIFT = 3 * normal(5, seed=3)


def case(weight: Tensor | None = None, shift: Tensor | float = 0.0) -> Case:
    """Correlated inputs, and a bias that keeps the outputs if a constant is added to the inputs."""
    weight, x = normal(3, 5) if weight is None else weight, normal(200, 5, seed=1).exp() @ normal(5, 5, seed=2)
    bias = -(weight * shift).sum(1) - (x @ weight.T).mean(0)
    return replace(linear(weight, x + shift), bias=bias, gate=GATES["relu"])


def patterns(of: Case) -> dict[str, Tensor]:
    return solve(of.operator, of.moments(), EVERYTHING).patterns


def assert_close(found: Tensor, expected: Tensor, reach: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=reach * float(expected.abs().max()))


@pytest.mark.parametrize("name", CENTERED)
def test_centered_estimators_are_invariant_to_a_constant_added_to_the_inputs(name: str) -> None:
    assert_close(patterns(case(shift=SHIFT))[name], patterns(case())[name], 1e-12)


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_a_constant_added_to_the_inputs_changes_the_papers_form_in_proportion(
    name: str,
) -> None:
    of = case()
    before, after = patterns(of)[name], patterns(case(shift=SHIFT))[name]
    for old, new, neuron, w in zip(before, after, of.neurons, of.weight):
        side = neuron.open if name == "positive" else ~neuron.open
        x, y = neuron.x[side], neuron.y[side]
        numerator = (x * y[:, None]).mean(0) - x.mean(0) * neuron.y.mean()
        assert_close(old, numerator / (w @ numerator), 1e-12)
        moved = numerator + SHIFT * (y.mean() - neuron.y.mean())
        assert_close(new, moved / (w @ moved), 1e-12)
        assert torch.cosine_similarity(old, new, dim=0) < 0.99


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("length", [4.0, 1e-3])
def test_scaling_a_weight_divides_the_pattern_by_the_factor(name: str, length: float) -> None:
    assert_close(patterns(case(normal(3, 5) * length))[name], patterns(case())[name] / length, 1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_negating_a_weight_negates_its_pattern_and_swaps_the_sides_of_the_gate(name: str) -> None:
    side = {"positive": "negative", "negative": "positive"}
    other = "-".join(side.get(part, part) for part in name.split("-", 1))
    assert_close(patterns(case(-normal(3, 5)))[name], -patterns(case())[other], 1e-12)


def test_multivariate_patterns_follow_any_mixing_of_the_outputs_up_to_the_ridge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, mixing = normal(3, 5), normal(3, 3, seed=4)
    plain, mixed = case(weight), case(mixing @ weight)

    def assert_mixed(reach: float) -> None:
        # Neurons are rows here: y' = M y has the patterns M⁻ᵀ A.
        expected = torch.linalg.inv(mixing).T @ patterns(plain)["multivariate"]
        assert_close(patterns(mixed)["multivariate"], expected, reach)

    # The error is the ridge relative to the smallest eigenvalue of the correlations of the outputs.
    least = [torch.linalg.eigvalsh(torch.stack([n.y for n in of.neurons]).corrcoef())[0] for of in (plain, mixed)]
    assert_mixed(RIDGE * float(1 / least[0] + 1 / least[1]))
    monkeypatch.setattr("patterns.estimation.estimators.RIDGE", 0.0)
    assert_mixed(1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    of = case()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert_close(patterns(replace(of, inputs=(of.inputs[0][order],)))[name], patterns(of)[name], 1e-12)
