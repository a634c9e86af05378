"""The memory that a worker of a fit needs, computed before any data are read."""

from collections.abc import Sequence
from math import prod

from patterns import Network, Operator, UserError
from patterns.estimation import required_sums
from patterns.moments import buffer_bytes, moments_bytes
from ray_jobs.jobs.reduction import group_by_size
from ray_jobs.units import format_bytes

# Live at once: an operator's inputs and outputs, the output gradients, and what the layer before still holds.
COPIES = 3


def model_bytes(network: Network, batch_size: int) -> int:
    """Return the bytes of a worker's model and of a batch that goes through it, without Python and torch.

    Args:
        network: The model.
        batch_size: The number of samples of a batch.
    """
    operators = network.operators.values()
    weights = sum(op.weight.nbytes for op in operators)
    sizes = [sum(map(prod, op.input_shapes)) + prod(op.output_shape) for op in operators]
    item = network.like.element_size()
    return weights + COPIES * batch_size * item * max(sizes) + buffer_bytes(item)


def plan_passes(
    network: Network, estimators: Sequence[str], memory: int | None, batch_size: int
) -> list[list[Operator]]:
    """Return the operators whose moments are taken in each pass over the data: all in one pass if memory allows.

    Args:
        network: The model.
        estimators: The estimators whose sums are taken.
        memory: The bytes that a worker may use; None: no limit.
        batch_size: The number of samples of a batch.

    Raises:
        UserError: If the moments of a single operator do not fit.
    """
    operators = list(network.operators.values())
    if memory is None:
        return [operators]
    room = memory - model_bytes(network, batch_size)
    sizes = [moments_bytes(op, required_sums(op, estimators)) for op in operators]
    for operator, size in zip(operators, sizes):
        if size > room:
            raise too_large_error(operator, estimators, size, memory, room)
    return group_by_size(operators, sizes, room)


def too_large_error(operator: Operator, estimators: Sequence[str], size: int, memory: int, room: int) -> UserError:
    """Return the error for an operator whose moments, of `size` bytes, exceed the `room` that memory leaves."""
    what = (
        f"the moments of operator {operator.name} take {format_bytes(size)}, but a `memory` of {format_bytes(memory)} "
        f"leaves {format_bytes(max(room, 0))} after the model and a batch"
    )
    remedy = f"Pass a `memory` of {format_bytes(memory - room + size)}"
    small = moments_bytes(operator, required_sums(operator, ["default"]))
    if small < size:
        remedy += f", or take fewer sums: `estimators` '{operator.name}=default,…' takes {format_bytes(small)} for it"
    return UserError("", what, f"{remedy}.", "memory")
