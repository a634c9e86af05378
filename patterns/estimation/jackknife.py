"""How sure patterns are at the present number of samples, from how much their parts differ.

A pattern's standard error is what it would vary by, were the same number of samples drawn again. It is taken
by leaving out one group of parts at a time. Parts are the sampling unit, whatever happens inside of them:
images of one shard may be alike (sorted by class, frames of one film), and the error is then larger, as it
should be. What it takes for granted is that the shards seen are a random draw from all of them, so shards must
be read in random order. It tells of the error against endlessly many such shards, and so overstates the error
against a fit of all N samples there are, by 1 / √(1 - n/N) after n of them.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.estimation.estimators import ESTIMATORS, Choices, Solution, solve
from patterns.moments.moments import Moments
from patterns.operators.operator import Operator

# Parts are left out in at most so many groups: each costs a solution of all neurons. A standard error from g
# groups has a relative one of its own of about 1 / √(2 (g - 1)), here 18 %.
GROUPS = 16
FEWEST_GROUPS = 4  # with fewer, nothing is known

Load = Callable[[], Moments]


@dataclass(frozen=True)
class StandardErrors:
    """Relative standard errors ‖se‖ / ‖a‖ of one row's patterns, where ‖se‖² = Σ var[â] over a neuron's inputs.

    neurons: of each neuron that has a pattern, float64, never empty. Dead, constant and degenerate neurons are
    left out: they have no pattern to be sure of.

    Two numbers stand for them. One norm over all neurons would be that of the few with the longest patterns, which
    are those that hardly ever open, and the least certain. The mean would have the same fault.
    """

    neurons: Tensor

    @property
    def median(self) -> float:
        """What half of the neurons stay below: how the operator is doing."""
        return float(self.neurons.quantile(0.5))

    @property
    def p90(self) -> float:
        """What nine in ten neurons stay below, which a tolerance is meant for: maps take all of them."""
        return float(self.neurons.quantile(0.9))


@dataclass(frozen=True)
class ConvergenceCheck:
    """What is known of an operator by now.

    solution: of all parts.
    errors: by row of ESTIMATORS that looks at data and gives a neuron a pattern; None where there are fewer than
    FEWEST_GROUPS parts to tell from.
    """

    solution: Solution
    errors: dict[str, StandardErrors | None]

    def changes(self, before: Solution) -> dict[str, float]:
        """By row of `errors`: the median of ‖a - a'‖ / ‖a‖ over neurons that have a pattern, a' being that before."""
        return {row: median_change(self.solution.patterns[row], before.patterns[row]) for row in self.errors}


def check_convergence(
    operator: Operator, parts: Sequence[Load], choices: Choices = "default", seed: int = 0
) -> ConvergenceCheck:
    """Patterns of all parts of an operator's moments, and their standard errors.

    parts: each loads its moments, and is called twice; parts without samples do not count, and more than GROUPS
    are brought together in groups of about equal size. Which, depends on the parts and not on their order.
    Held at a time are the sum of all parts, that of all but a group, and one part, and besides what `solve`
    takes, three sums of the patterns' size for each row.

    Raises what `solve` raises.
    """
    total: dict[str, Tensor] = {}
    sized = []
    for part in parts:
        sized.append(add(total, part(), 1))
    groups = group_partial_moments(sized)
    size = sum(part.n for part in sized)
    whole = solve(operator, Moments.from_tensors(total), choices, seed)
    learned = {row: a for row, a in whole.patterns.items() if ESTIMATORS[row].learns and a.any()}
    if len(groups) < FEWEST_GROUPS:
        return ConvergenceCheck(whole, dict.fromkeys(learned))
    spreads = {row: Jackknife(a) for row, a in learned.items()}
    for group in groups:
        others = {name: sums.clone() for name, sums in total.items()}
        left_out = sum(add(others, parts[i](), -1).n for i in group)
        patterns = solve(operator, Moments.from_tensors(others), choices, seed).patterns
        for row, spread in spreads.items():
            spread.leave_out(patterns[row], left_out / size)
    return ConvergenceCheck(
        whole, {row: StandardErrors(relative(spread.variance(), learned[row])) for row, spread in spreads.items()}
    )


@dataclass(frozen=True)
class PartialSize:
    """The samples of a part, and a name that its sums alone decide."""

    n: int
    name: str


def add(sums: dict[str, Tensor], part: Moments, sign: int) -> PartialSize:
    """Add a part to named sums, in place, or take it away."""
    for name, more in part.tensors().items():
        if name in sums:
            sums[name].add_(more, alpha=sign)
        else:
            sums[name] = more.clone()
    return PartialSize(int(part.total.n.max()), hashlib.sha256(part.total.y.numpy().tobytes()).hexdigest())


def group_partial_moments(parts: Sequence[PartialSize]) -> list[list[int]]:
    """Which parts to leave out together: at most GROUPS, of about equal size.

    The largest part first, each to the smallest group. Among equals the name decides, which has nothing to do with
    what a part says, so that groups are no more alike than chance makes them.
    """
    order = sorted((i for i, part in enumerate(parts) if part.n), key=lambda i: (-parts[i].n, parts[i].name))
    groups: list[list[int]] = [[] for _ in range(min(GROUPS, len(order)))]
    smallest = [(0, number) for number in range(len(groups))]
    for i in order:
        size, number = heapq.heappop(smallest)
        groups[number].append(i)
        heapq.heappush(smallest, (size + parts[i].n, number))
    return groups


class Jackknife:
    """The variance of a value, from its values without one of several groups of unequal size.

    The delete-m jackknife of Busing, Meijer & van der Leeden 1999 (Statistics and Computing 9:3-8). With θ of all n
    samples, θ₍ⱼ₎ without the mⱼ of group j, and hⱼ = n / mⱼ, for g groups:

        var = 1/g Σⱼ (θ̃ⱼ - Σᵢ θ̃ᵢ / hᵢ)² / (hⱼ - 1)    with    θ̃ⱼ = hⱼ θ - (hⱼ - 1) θ₍ⱼ₎

    For a mean, and groups of one size, that is the variance of the groups' means over g. Each term estimates the
    variance by itself, so one large group does not decide.
    """

    def __init__(self, value: Tensor) -> None:
        """value: θ, shape (K, …)."""
        self._value = value.flatten(1)
        self._sum = torch.zeros_like(self._value, dtype=torch.float64)
        self._bias = torch.zeros_like(self._sum)
        self._squares = self._sum.new_zeros(len(value))
        self._groups, self._odds = 0, 0.0

    def leave_out(self, value: Tensor, share: float) -> None:
        """Count a group: the value without it, of θ's shape, and its share of all samples, below 1."""
        odds = 1 / share - 1  # hⱼ - 1
        moved = value.flatten(1).double() - self._value
        self._sum += moved
        self._bias.add_(moved, alpha=1 - share)
        self._squares += odds * moved.square().sum(1)
        self._odds += 1 / odds
        self._groups += 1

    def variance(self) -> Tensor:
        """Summed over each of the K rows, float64, shape (K,)."""
        # θ̃ⱼ - Σᵢ θ̃ᵢ / hᵢ = bias - (hⱼ - 1)(θ₍ⱼ₎ - θ), the bias being Σᵢ (1 - 1/hᵢ)(θ₍ᵢ₎ - θ).
        crossed, biased = (self._bias * self._sum).sum(1), self._bias.square().sum(1)
        return ((self._squares - 2 * crossed + self._odds * biased) / self._groups).clamp(min=0)


def relative(variance: Tensor, pattern: Tensor) -> Tensor:
    """√variance / ‖a‖ of the neurons that have a pattern; variance (K,), pattern (K, …)."""
    size = pattern.flatten(1).double().norm(dim=1)
    return variance[size > 0].sqrt() / size[size > 0]


def median_change(pattern: Tensor, before: Tensor) -> float:
    """The median of ‖a - a'‖ / ‖a‖ over the neurons that have a pattern, both (K, …); 0 where none has."""
    moved = relative((pattern.double() - before.double()).flatten(1).square().sum(1), pattern)
    return float(moved.median()) if len(moved) else 0.0


def has_converged(errors: Collection[float | None], tolerance: float) -> bool:
    """Whether a fit may stop: the p90 of every row of every operator is known, and within the tolerance."""
    return bool(errors) and all(error is not None and error <= tolerance for error in errors)


def samples_needed(errors: Iterable[float | None], samples: int, tolerance: float) -> int | None:
    """How many samples in all until `converged`, given the p90 after so many, for they fall as 1/√n.

    At least the present number; None while an error is not known.
    """
    known = [error if error is not None else math.inf for error in errors]
    worst = max(known, default=math.inf)
    return None if math.isinf(worst) else math.ceil(samples * max(1.0, (worst / tolerance) ** 2))
