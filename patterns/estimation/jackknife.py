"""Standard errors of patterns, by a jackknife over partial moments.

The standard error of a pattern is how much it would vary if the same number of samples were drawn again. It is
estimated by leaving out one group of partial moments at a time. Partial moments are the sampling unit: if the images
of a shard are alike (sorted by class, or frames of one film), the error is larger, as it should be. The estimate
assumes that the shards so far are a random sample of all shards, so shards must be read in random order. It is the
error against infinitely many such shards. After n of N samples, it overstates the error against a fit of all N by
1 / √(1 - n/N).
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.estimation.estimators import ESTIMATORS, Choices
from patterns.estimation.solution import Solution, solve
from patterns.moments.moments import Moments
from patterns.operators.operator import Operator

# Maximum number of groups to leave out; each costs a solution for all neurons. A standard error from g groups has
# itself a relative standard error of about 1 / √(2 (g - 1)), here 18 %.
GROUPS = 16
FEWEST_GROUPS = 4  # with fewer groups, errors are unknown

Load = Callable[[], Moments]


@dataclass(frozen=True)
class StandardErrors:
    """Relative standard errors of the patterns of one estimator: ‖se‖ / ‖a‖ with ‖se‖² = Σ var[â] over the inputs.

    Two percentiles summarize them. The norm over all neurons, or their mean, would be dominated by the few neurons
    with the longest patterns: those that hardly ever open, and whose errors are the largest.

    Attributes:
        neurons: The error of each neuron that has a pattern, float64, not empty. Dead, constant and degenerate neurons
            are left out.
    """

    neurons: Tensor

    @property
    def median(self) -> float:
        """The median over the neurons: the state of the operator."""
        return float(self.neurons.quantile(0.5))

    @property
    def p90(self) -> float:
        """The 90th percentile over the neurons, to compare with a tolerance: maps depend on all neurons."""
        return float(self.neurons.quantile(0.9))


@dataclass(frozen=True)
class ConvergenceCheck:
    """Patterns of an operator and their standard errors after some samples.

    Attributes:
        solution: The patterns from all partial moments.
        errors: By name from `ESTIMATORS`, for estimators that use data and give at least one neuron a pattern. None
            if there are fewer than FEWEST_GROUPS partial moments.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> moments = patterns.accumulate(network, [torch.rand(50, 3)])["linear.0"]
        >>> solution = solve(network.operators["linear.0"], moments)
        >>> ConvergenceCheck(solution, {"linear": None}).changes(solution)
        {'linear': 0.0}
    """

    solution: Solution
    errors: dict[str, StandardErrors | None]

    def changes(self, previous: Solution) -> dict[str, float]:
        """Return the median of ‖a - a'‖ / ‖a‖ over neurons that have a pattern, a' being the previous one, by name."""
        return {row: median_change(self.solution.patterns[row], previous.patterns[row]) for row in self.errors}


def check_convergence(
    operator: Operator, partial_moments: Sequence[Load], estimators: Choices = "default", seed: int = 0
) -> ConvergenceCheck:
    """Compute an operator's patterns from all of its partial moments, and their standard errors.

    Partial moments without samples are ignored. More than GROUPS are combined into groups of about equal size, which
    depend on the partial moments but not on their order. In memory at once are the sum of all partial moments, the
    sum without one group, one partial moment, the memory that `solve` needs, and three sums of the patterns' size for
    each estimator.

    Args:
        operator: The operator.
        partial_moments: Functions that load its moments over disjoint sets of samples; each is called twice.
        estimators: Choices of estimators as for `solve`.
        seed: Seed as for `solve`.

    Raises:
        UserError: If an estimator is unknown.
        ValueError: If the moments lack a sum that an estimator needs.

    Example:
        >>> import patterns
        >>> network, observe = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)), patterns.accumulate
        >>> partial = [observe(network, [torch.rand(50, 3)])["linear.0"] for _ in range(8)]
        >>> check = check_convergence(network.operators["linear.0"], [lambda m=m: m for m in partial])
        >>> 0 < check.errors["linear"].median < 1
        True
    """
    total: dict[str, Tensor] = {}
    sizes = [add_moments(total, load(), 1) for load in partial_moments]
    groups = group_partial_moments(sizes)
    samples = sum(size.n for size in sizes)
    whole = solve(operator, Moments.from_tensors(total), estimators, seed)
    learned = {row: a for row, a in whole.patterns.items() if ESTIMATORS[row].uses_data and a.any()}
    if len(groups) < FEWEST_GROUPS:
        return ConvergenceCheck(whole, dict.fromkeys(learned))
    jackknives = {row: Jackknife(a) for row, a in learned.items()}
    for group in groups:
        others = {name: sums.clone() for name, sums in total.items()}
        left_out = sum(add_moments(others, partial_moments[i](), -1).n for i in group)
        patterns = solve(operator, Moments.from_tensors(others), estimators, seed).patterns
        for row, jackknife in jackknives.items():
            jackknife.leave_out(patterns[row], left_out / samples)
    return ConvergenceCheck(
        whole, {row: StandardErrors(relative_norms(j.variance(), learned[row])) for row, j in jackknives.items()}
    )


@dataclass(frozen=True)
class PartialSize:
    """Number of samples of partial moments, and a name that depends on their sums only."""

    n: int
    name: str


def add_moments(total: dict[str, Tensor], moments: Moments, sign: int) -> PartialSize:
    """Add moments to named sums in place, or subtract them; return their size.

    Sums that some of the moments lack are dropped, unless `total` is empty.
    """
    found = moments.tensors()
    if not total:
        total |= {name: torch.zeros_like(sums) for name, sums in found.items()}
    for name in list(total):
        if name in found:
            total[name].add_(found[name], alpha=sign)
        else:
            del total[name]
    return PartialSize(int(moments.total.n.max()), hashlib.sha256(moments.total.y.numpy().tobytes()).hexdigest())


def group_partial_moments(sizes: Sequence[PartialSize]) -> list[list[int]]:
    """Return which partial moments to leave out together: at most GROUPS groups of about equal size.

    Each is put into the smallest group, the largest first. Equal sizes are ordered by name, which is independent of
    what the sums mean, so that groups are not more alike than by chance.
    """
    order = sorted((i for i, size in enumerate(sizes) if size.n), key=lambda i: (-sizes[i].n, sizes[i].name))
    groups: list[list[int]] = [[] for _ in range(min(GROUPS, len(order)))]
    smallest = [(0, number) for number in range(len(groups))]
    for i in order:
        size, number = heapq.heappop(smallest)
        groups[number].append(i)
        heapq.heappush(smallest, (size + sizes[i].n, number))
    return groups


class Jackknife:
    """Variance of a value, from its values without one of several groups of unequal size.

    This is the delete-m jackknife of Busing, Meijer & van der Leeden 1999 (Statistics and Computing 9:3-8). With θ of
    all n samples, θ₍ⱼ₎ without the mⱼ samples of group j, hⱼ = n / mⱼ, and g groups:

        var = 1/g Σⱼ (θ̃ⱼ - Σᵢ θ̃ᵢ / hᵢ)² / (hⱼ - 1)    with    θ̃ⱼ = hⱼ θ - (hⱼ - 1) θ₍ⱼ₎

    For a mean, and groups of equal size, it is the variance of the groups' means divided by g. Each term estimates
    the variance by itself, so that one large group does not dominate.
    """

    def __init__(self, value: Tensor) -> None:
        """Start with θ, shape (K, …)."""
        self._value = value.flatten(1)
        self._sum = torch.zeros_like(self._value, dtype=torch.float64)
        self._bias = torch.zeros_like(self._sum)
        self._squares = self._sum.new_zeros(len(value))
        self._groups, self._odds = 0, 0.0

    def leave_out(self, value: Tensor, share: float) -> None:
        """Add a group: `value` is θ₍ⱼ₎, of θ's shape, and `share` is mⱼ / n, below 1."""
        odds = 1 / share - 1  # hⱼ - 1
        moved = value.flatten(1).double() - self._value
        self._sum += moved
        self._bias.add_(moved, alpha=1 - share)
        self._squares += odds * moved.square().sum(1)
        self._odds += 1 / odds
        self._groups += 1

    def variance(self) -> Tensor:
        """Return the variance summed over each of the K rows, float64, shape (K,)."""
        # θ̃ⱼ - Σᵢ θ̃ᵢ / hᵢ = bias - (hⱼ - 1)(θ₍ⱼ₎ - θ) with the bias Σᵢ (1 - 1/hᵢ)(θ₍ᵢ₎ - θ).
        crossed, biased = (self._bias * self._sum).sum(1), self._bias.square().sum(1)
        return ((self._squares - 2 * crossed + self._odds * biased) / self._groups).clamp(min=0)


def relative_norms(squares: Tensor, pattern: Tensor) -> Tensor:
    """Return √squares / ‖a‖ for the neurons that have a pattern, given squares (K,) and patterns a (K, …)."""
    size = pattern.flatten(1).double().norm(dim=1)
    return squares[size > 0].sqrt() / size[size > 0]


def median_change(pattern: Tensor, previous: Tensor) -> float:
    """Return the median of ‖a - a'‖ / ‖a‖ over neurons that have a pattern, both (K, …); 0 if no neuron has one."""
    moved = relative_norms((pattern.double() - previous.double()).flatten(1).square().sum(1), pattern)
    return float(moved.median()) if len(moved) else 0.0


def has_converged(errors: Collection[float | None], tolerance: float) -> bool:
    """Return whether a fit may stop: whether there are errors, all of them known and within the tolerance.

    Args:
        errors: The 90th percentile of the relative standard errors of each operator and estimator; None: unknown.
        tolerance: The largest error to accept.

    Example:
        >>> has_converged([0.03, 0.05], 0.05), has_converged([0.03, None], 0.05)
        (True, False)
    """
    return bool(errors) and all(error is not None and error <= tolerance for error in errors)


def samples_needed(errors: Iterable[float | None], samples: int, tolerance: float) -> int | None:
    """Return the total number of samples at which `has_converged`, since errors fall as 1/√n.

    Args:
        errors: As for `has_converged`, after `samples` samples.
        samples: The present number of samples.
        tolerance: The largest error to accept.

    Returns:
        At least `samples`; None if an error is unknown, or if there is none.

    Example:
        >>> samples_needed([0.1, 0.02], 1000, 0.05)
        4000
    """
    known = [error if error is not None else math.inf for error in errors]
    worst = max(known, default=math.inf)
    return None if math.isinf(worst) else math.ceil(samples * max(1.0, (worst / tolerance) ** 2))
