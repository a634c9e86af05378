"""The multivariate estimator recovers what made the data, and counts nothing twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patterns import Moments, solve
from patterns.estimators import RIDGE
from tests.patterns.cases import Case, convolution, linear, normal


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
    torch.testing.assert_close(three, (one / 3).repeat(3, 1), rtol=1e-5, atol=0)


def test_what_two_neurons_both_carry_is_counted_once_where_linear_counts_it_twice() -> None:
    s = uncorrelated(100, 3, seed=0)
    x = s @ normal(3, 4, seed=1)
    weight = torch.linalg.pinv(normal(3, 4, seed=1)).T
    weight = torch.stack([weight[0], weight[0] + 0.1 * weight[1], weight[2]])  # the first two nearly say the same
    case = linear(weight, x)
    y = x @ weight.T
    linear_patterns = solve(case.operator, case.moments(), "linear").patterns["linear"]
    assert (y @ multivariate(case) - x).norm() < 1e-3 * x.norm()
    assert (y @ linear_patterns - x).norm() > 0.5 * x.norm()


def test_dead_and_constant_neurons_have_none_and_disturb_no_other() -> None:
    weight, x = normal(4, 6), normal(80, 6, seed=1)
    weight[1] = 0.0
    found = multivariate(linear(weight, x))
    assert (found[1] == 0).all()
    torch.testing.assert_close(found[[0, 2, 3]], multivariate(linear(weight[[0, 2, 3]], x)), rtol=1e-9, atol=1e-12)


def test_what_several_positions_tell_of_an_input_is_averaged() -> None:
    """A pattern for each position alone gives back the input; so does their sum, divided by how many see it."""
    x = normal(30, 2, 9, 9) + 0.5
    for stride in (1, 2):
        weight = normal(18, 2, 3, 3, seed=3)  # as many neurons as inputs: A y = x but for the mean and the ridge
        case = convolution(weight, x, (stride, stride), (0, 0), (1, 1))
        a = multivariate(case).view_as(weight)
        y = case.operator(*case.inputs)
        y = y - y.mean((0, 2, 3), keepdim=True)
        back = case.kind.input_gradient(y, a, (tuple(x.shape),))[0]
        inner = slice(2, 7)  # inputs that as many positions see as any
        centred = x - x.mean((0, 2, 3), keepdim=True)
        error = (back - centred)[:, :, inner, inner].norm() / centred[:, :, inner, inner].norm()
        assert error < 0.35, stride  # the border's mean counts, and of each tap the mean
