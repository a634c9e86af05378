"""How many positions of each image a fit needs, tried on a few images before it starts."""

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
    choices: Choices = "default",
    seed: int = 0,
) -> int | None:
    """The fewest of CANDIDATES positions that will do for a fit of so many images; None, for all, where none of them.

    They will do where nine in ten neurons of every operator are then expected to have patterns of a relative
    standard error within the tolerance: errors fall as 1/√images, from that of the pilot's. Operators that have no
    more positions than the fewest candidate are the same either way, and are not asked.

    batches: of the pilot, (N, *input_shape) on the network's device, each from another part of the data; at least
    FEWEST_GROUPS. Their moments of the operators asked are held at once.
    Raises ValueError for fewer batches, and what `solve` raises.
    """
    asked = [op for op in network.operators.values() if prod(op.output_shape) // op.neurons > CANDIDATES[0]]
    pilot = list(batches)
    if len(pilot) < FEWEST_GROUPS:
        raise ValueError(f"{len(pilot)} batches say nothing of errors; at least {FEWEST_GROUPS} do")
    for positions in CANDIDATES:
        observer = Observer(network, lambda op: required_sums(op, choices), [op.name for op in asked], positions, seed)
        parts: list[dict[str, Moments]] = []
        for batch in pilot:
            observer.update(batch)
            parts.append(observer.moments())
            observer.reset()
        looks = (
            check_convergence(op, [partial(part.__getitem__, op.name) for part in parts], choices, seed) for op in asked
        )
        errors = [None if error is None else error.p90 for seen in looks for error in seen.errors.values()]
        needed = samples_needed(errors, sum(map(len, pilot)), tolerance)
        if not errors or (needed is not None and needed <= images):
            return positions
    return None
