"""Find how many positions of each image a fit needs, on a few images before it starts."""

from collections.abc import Iterable
from functools import partial
from math import prod

from torch import Tensor

from patterns.estimation.estimators import Choices, required_sums
from patterns.estimation.jackknife import FEWEST_GROUPS, check_convergence, samples_needed
from patterns.estimation.observer import Observer
from patterns.moments.moments import Moments
from patterns.tracing.network import Network

CANDIDATES = (4, 16, 64)


def positions_needed(
    network: Network,
    batches: Iterable[Tensor],
    images: int,
    tolerance: float,
    estimators: Choices = "default",
    seed: int = 0,
) -> int | None:
    """Return the smallest number of positions from CANDIDATES with which a fit is expected to converge.

    A fit is expected to converge if the 90th percentile of the relative standard errors of every operator, which fall
    as 1/√images from those of the pilot, is within the tolerance. Operators that have no more positions than the
    smallest candidate are not considered, because the number makes no difference to them. The moments of all other
    operators over all pilot batches are in memory at once.

    Args:
        network: The network.
        batches: At least FEWEST_GROUPS batches (N, *input_shape) from different parts of the data, on the network's
            device.
        images: The number of images of the fit.
        tolerance: The largest error to accept.
        estimators: Choices of estimators as for `solve`.
        seed: Seed of the positions, and seed as for `solve`.

    Returns:
        The number of positions; None (all positions) if no candidate suffices.

    Raises:
        UserError: If an estimator is unknown.
        ValueError: If there are fewer than FEWEST_GROUPS batches.

    Example:
        >>> import torch, patterns
        >>> network = patterns.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 8, 8))
        >>> positions_needed(network, [torch.rand(8, 1, 8, 8) for _ in range(4)], images=10**9, tolerance=0.1)
        4
    """
    operators = [op for op in network.operators.values() if prod(op.output_shape) // op.neurons > CANDIDATES[0]]
    names = [op.name for op in operators]
    pilot = list(batches)
    if len(pilot) < FEWEST_GROUPS:
        raise ValueError(f"{len(pilot)} batches are too few to estimate errors; at least {FEWEST_GROUPS} are needed")
    for positions in CANDIDATES:
        observer = Observer(network, lambda op: required_sums(op, estimators), names, positions, seed)
        partial_moments: list[dict[str, Moments]] = []
        for batch in pilot:
            observer.update(batch)
            partial_moments.append(observer.moments())
            observer.reset()
        checks = (
            check_convergence(
                op, [partial(moments.__getitem__, op.name) for moments in partial_moments], estimators, seed
            )
            for op in operators
        )
        errors = [None if error is None else error.p90 for check in checks for error in check.errors.values()]
        needed = samples_needed(errors, sum(map(len, pilot)), tolerance)
        if not errors or (needed is not None and needed <= images):
            return positions
    return None
