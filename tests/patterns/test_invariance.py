"""What each estimator does not depend on, and what it does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from patterns import CHOICES, ESTIMATORS, solve
from tests.patterns.cases import GATES, Case, linear, normal

EVERYTHING = ",".join(CHOICES)
LEARNED = [name for name, estimator in ESTIMATORS.items() if estimator.learns]
SHIFT = 3.0


def case(scale: float = 1.0, shift: float = 0.0) -> Case:
    """Correlated inputs; a bias that keeps the outputs where a constant is added to the inputs."""
    weight, x = normal(3, 5) * scale, normal(200, 5, seed=1).exp() @ normal(5, 5, seed=2)
    bias = -weight.sum(1) * shift - (x @ weight.T).mean(0)
    return replace(linear(weight, x + shift), bias=bias, gate=GATES["relu"])


def patterns(of: Case) -> dict[str, Tensor]:
    return solve(of.operator, of.moments(), EVERYTHING).patterns


def directions(a: Tensor) -> Tensor:
    return a / a.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", sorted(set(LEARNED) - {"positive", "negative"}))
def test_a_constant_added_to_the_inputs_leaves_these_as_they_are(name: str) -> None:
    torch.testing.assert_close(patterns(case(shift=SHIFT))[name], patterns(case())[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_a_constant_added_to_the_inputs_turns_the_papers_two_component_patterns(name: str) -> None:
    before, after = patterns(case())[name], patterns(case(shift=SHIFT))[name]
    cosines = (directions(before) * directions(after)).sum(1)
    assert (cosines < 0.99).all()


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_the_papers_form_moves_by_the_shift_times_the_distance_of_the_means(name: str) -> None:
    of = case()
    neurons = of.neurons
    after = patterns(case(shift=SHIFT))[name]
    for a, neuron, w in zip(after, neurons, of.weight):
        side = neuron.open if name == "positive" else ~neuron.open
        x, y = neuron.x[side], neuron.y[side]
        numerator = (x * y[:, None]).mean(0) - x.mean(0) * neuron.y.mean()
        # With x + c and y + cΣw: E₊[(x + c)y'] - E₊[x + c]E[y'] is that of before, and c(E₊[y] - E[y]) more.
        moved = numerator + SHIFT * (y.mean() - neuron.y.mean())
        torch.testing.assert_close(a, moved / (w @ moved), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_weight_of_another_length_divides_the_pattern_by_it(name: str) -> None:
    torch.testing.assert_close(patterns(case(scale=-4.0 if name in {"linear", "filter"} else 4.0))[name],
                               patterns(case())[name] / (-4.0 if name in {"linear", "filter"} else 4.0),
                               rtol=1e-9, atol=1e-12)  # fmt: skip


def test_multivariate_patterns_follow_any_mixing_of_the_outputs() -> None:
    weight, x, mixing = normal(3, 5), normal(200, 5, seed=1), normal(3, 3, seed=4)

    def found(w: Tensor) -> Tensor:
        of = linear(w, x)
        return solve(of.operator, of.moments(), "multivariate").patterns["multivariate"]

    # Neurons are rows here: y' = M y has the patterns M⁻ᵀ A, but for the ridge.
    torch.testing.assert_close(found(mixing @ weight), torch.linalg.inv(mixing).T @ found(weight), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    of = case()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other = replace(of, inputs=(of.inputs[0][order],))
    torch.testing.assert_close(patterns(other)[name], patterns(of)[name], rtol=1e-9, atol=1e-12)
