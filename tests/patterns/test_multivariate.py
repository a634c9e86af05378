"""The multivariate estimator recovers the mixing of the data and counts shared information once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patterns import Moments, solve
from patterns.estimation.estimators import RIDGE
from tests.patterns.cases import GATES, Case, convolution, linear, normal


def multivariate(case: Case, moments: Moments | None = None) -> Tensor:
    solution = solve(case.operator, moments or case.moments(), "multivariate")
    return solution.patterns["multivariate"].flatten(1)


def uncorrelated(samples: int, count: int, seed: int) -> Tensor:
    """Columns of mean 0 and variance 1, exactly uncorrelated with each other."""
    raw = normal(samples, count, seed=seed)
    return torch.linalg.qr(raw - raw.mean(0)).Q * samples**0.5


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 100))
def test_it_recovers_the_mixing_matrix_of_its_generative_model(k: int, m: int, more: int, seed: int) -> None:
    """x = A s + B ε with correlated s, and W any matrix with WA = 1 and WB = 0: then y = s, and the pattern is A."""
    d = k + m + more
    sources = uncorrelated(200, k + m, seed)
    s = sources[:, :k] @ (torch.eye(k).double() + 0.3)
    mixing, distractor = normal(d, k, seed=seed + 1), normal(d, m, seed=seed + 2)
    x = s @ mixing.T + sources[:, k:] @ distractor.T + 5.0
    weight = torch.linalg.pinv(torch.cat([mixing, distractor], 1))[:k]
    found = multivariate(linear(weight, x))
    # The ridge shrinks by its share of the smallest eigenvalue of the correlations.
    least = torch.linalg.eigvalsh(torch.atleast_2d(s.T.corrcoef()))[0]
    assert (found - mixing.T).norm() <= 2 * RIDGE / float(least) * mixing.norm() + 1e-9


def test_copies_of_a_neuron_share_its_pattern() -> None:
    weight, x = normal(1, 5), normal(60, 5, seed=1) + 2
    one, three = multivariate(linear(weight, x)), multivariate(linear(weight.repeat(3, 1), x))
    # The ridge shrinks one by 1 / (1 + ridge), and the sum of three by 3 / (3 + ridge).
    torch.testing.assert_close(three * (3 + RIDGE), one.repeat(3, 1) * (1 + RIDGE), rtol=1e-9, atol=0)


def test_information_in_two_neurons_is_counted_once_and_by_linear_twice() -> None:
    mixing = normal(3, 4, seed=1)
    x = uncorrelated(100, 3, seed=0) @ mixing
    weight = torch.linalg.pinv(mixing).T
    weight = torch.stack([weight[0], weight[0] + 0.1 * weight[1], weight[2]])  # the first two are nearly the same
    case = linear(weight, x)
    y = x @ weight.T
    linear_patterns = solve(case.operator, case.moments(), "linear").patterns["linear"]
    least = torch.linalg.eigvalsh(y.T.corrcoef())[0]
    assert (y @ multivariate(case) - x).norm() < RIDGE / float(least) * x.norm()
    assert (y @ linear_patterns - x).norm() > 0.5 * x.norm()


def test_dead_and_constant_neurons_have_no_pattern_and_change_no_other() -> None:
    weight, bias, x = normal(5, 6), torch.zeros(5).double(), normal(80, 6, seed=1)
    weight[1], bias[3] = 0.0, -1000.0
    alive = [0, 2, 4]

    def found(rows: list[int]) -> Tensor:
        return multivariate(replace(linear(weight[rows], x), bias=bias[rows], gate=GATES["relu"]))

    assert (found([0, 1, 2, 3, 4])[[1, 3]] == 0).all()
    torch.testing.assert_close(found([0, 1, 2, 3, 4])[alive], found(alive), rtol=1e-12, atol=0)


@pytest.mark.parametrize("neurons", [6, 9])
@pytest.mark.parametrize(("stride", "size"), [(1, 402), (2, 401), (3, 300)])
def test_information_about_an_input_in_several_positions_is_averaged(neurons: int, stride: int, size: int) -> None:
    """With at least as many independent neurons as inputs, the inputs follow from the outputs of a position.

    Their sum over positions, each weight's share divided by the number of positions that see its inputs, is then the
    input times a number that is 1 except at borders: exactly if each input is seen once, and nearly inside a large
    image.
    """
    weight = torch.linalg.qr(normal(neurons, 6, seed=3)).Q.view(neurons, 2, 3)
    case = convolution(weight, normal(4, 2, size) + 0.5, (stride,), (0,), (1,))
    a = multivariate(case).view_as(weight)

    def summed(grad: Tensor, pattern: Tensor) -> Tensor:
        return case.operator_type.input_gradient(grad, pattern, ((len(grad), pattern.shape[1], size),))[0]

    share = summed(torch.ones(1, 1, len(case.neurons[0].y) // 4).double(), 1 / case.seeing[:1, None, :3])
    inside = share[..., 3:-3]
    assert ((inside >= 1) & (inside <= 1 + 6 / size)).all()
    assert share.mean() <= 1
    if stride == 3:
        assert (share == 1).all()
    for x in (*case.inputs, torch.full((1, 2, size), 3.0).double()):  # the data of the fit, and a constant input
        error = summed(case.operator(x), a) - share * x
        assert error.norm() <= 2 * RIDGE * x.norm()


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_dependent_outputs_do_not_amplify_errors_of_float32(mean: float) -> None:
    """Four times as many outputs as inputs, as if a convolution widens a network."""
    weight, x = normal(64, 16), (normal(4000, 16, seed=1) + mean).relu()
    exact, found = (
        multivariate(linear(weight.to(dtype), x.to(dtype))).double() for dtype in (torch.float64, torch.float32)
    )
    assert (found - exact).norm() < 1e-4 * exact.norm()
