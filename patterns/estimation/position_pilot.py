"""Find how many positions of each image a fit needs, on a few images before it starts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor

from patterns.estimation.estimators import ESTIMATORS, Choices, required_sums, select_estimators
from patterns.estimation.jackknife import FEWEST_GROUPS, check_convergence
from patterns.estimation.observer import Observer
from patterns.moments.moments import Moments
from patterns.operators.copies import select_neurons
from patterns.operators.operator import Operator
from patterns.tracing.network import Network

CANDIDATES = (16, 64)
OPERATORS, NEURONS = 8, 32  # the number of operators that are tried, and of neurons of each


@dataclass(frozen=True)
class PositionChoice:
    """A number of positions, and the error to expect from it.

    Attributes:
        positions: The number of positions of each image; None: all.
        error: The expected 90th percentile over neurons of the relative standard error, of the operator where it is
            largest. With all positions, that of the largest number that was tried, which is an upper limit. 0 if the
            number makes no difference to any operator.
    """

    positions: int | None
    error: float


def choose_positions(
    network: Network,
    batches: Iterable[Tensor],
    images: int,
    tolerance: float,
    estimators: Choices = "default",
    seed: int = 0,
) -> PositionChoice:
    """Return the smallest number of positions from CANDIDATES whose expected error is within a tolerance.

    The error is that of up to NEURONS neurons of up to OPERATORS operators from all depths of the network. It is
    measured on the pilot batches, and falls as 1/√images. Operators that have no more positions than the smallest
    candidate are not considered, because the number makes no difference to them.

    Args:
        network: The network.
        batches: At least FEWEST_GROUPS batches (N, *input_shape) from different parts of the data, on the network's
            device.
        images: The number of images of the fit.
        tolerance: The largest error to accept.
        estimators: Choices of estimators as for `solve`.
        seed: Seed of the positions, and seed as for `solve`.

    Raises:
        UserError: If an estimator is unknown.
        ValueError: If there are fewer than FEWEST_GROUPS batches.

    Example:
        >>> import torch, patterns
        >>> network = patterns.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 8, 8))
        >>> batches = [torch.rand(8, 1, 8, 8) for _ in range(4)]
        >>> choose_positions(network, batches, images=10**9, tolerance=0.1).positions
        16
    """
    operators = [op for op in network.operators.values() if prod(op.output_shape) // op.neurons > CANDIDATES[0]]
    step = max(1, math.ceil(len(operators) / OPERATORS))
    parts = {op.name: select_part(op, estimators) for op in operators[::-step]}
    pilot = list(batches)
    if len(pilot) < FEWEST_GROUPS:
        raise ValueError(f"{len(pilot)} batches are too few to estimate errors; at least {FEWEST_GROUPS} are needed")
    shrink = math.sqrt(sum(map(len, pilot)) / images)
    error = 0.0
    for positions in CANDIDATES:
        found = measure_errors(network, parts, pilot, positions, estimators, seed)
        error = shrink * max(found, default=0.0)
        if error <= tolerance:
            return PositionChoice(positions, error)
    return PositionChoice(None, error)


def measure_errors(
    network: Network,
    parts: dict[str, Operator],
    batches: Iterable[Tensor],
    positions: int,
    estimators: Choices,
    seed: int,
) -> list[float]:
    """Return the 90th percentile of the standard errors of each operator and estimator; infinite if it is unknown."""
    observer = Observer(network, lambda op: required_sums(op, estimators), parts, positions, seed)
    partial_moments: list[dict[str, Moments]] = []
    for batch in batches:
        observer.update(batch)
        moments = observer.moments()
        partial_moments.append(
            {name: copy_moments(moments[name].select_neurons(slice(op.neurons))) for name, op in parts.items()}
        )
        observer.reset()
    errors = []
    for name, operator in parts.items():
        loads = [partial(moments.__getitem__, name) for moments in partial_moments]
        check = check_convergence(operator, loads, estimators, seed)
        errors += [math.inf if error is None else error.p90 for error in check.errors.values()]
    return errors


def select_part(operator: Operator, estimators: Choices) -> Operator:
    """Return an operator with the first NEURONS neurons; the operator itself if they cannot be solved for alone."""
    joint = any(ESTIMATORS[name].joint for name in select_estimators(operator, estimators))
    if joint or operator.groups not in (1, operator.neurons):
        return operator
    return select_neurons(operator, range(min(NEURONS, operator.neurons)))


def copy_moments(moments: Moments) -> Moments:
    """Return moments that do not keep the tensors in memory of which they are views."""
    return Moments.from_tensors({name: sums.clone() for name, sums in moments.tensors().items()})
