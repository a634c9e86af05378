"""What a worker's memory must hold, known before any data is read."""

from collections.abc import Sequence

from patterns import Network, Operator, UserError
from patterns.estimation import required_sums
from patterns.moments import buffer_bytes, moments_bytes
from ray_jobs.jobs.reduction import grouped
from ray_jobs.units import format_bytes

# An operator's inputs and outputs, the output gradients, and what the layer before still holds.
COPIES = 3


def model_bytes(network: Network, batch_size: int) -> int:
    """Bytes of a worker's model and of what lives at once while a batch goes through it; beside Python and torch."""
    operators = network.operators.values()
    weights = sum(op.weight.nbytes for op in operators)
    sizes = [sum(map(elements, op.input_shapes)) + elements(op.output_shape) for op in operators]
    item = network.like.element_size()
    return weights + COPIES * batch_size * item * max(sizes) + buffer_bytes(item)


def elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def passes(network: Network, estimators: Sequence[str], memory: int | None, batch_size: int) -> list[list[Operator]]:
    """The operators whose moments are taken in each pass over the data: all at once, where memory allows.

    UserError where an operator's moments alone do not fit.
    """
    operators = list(network.operators.values())
    if memory is None:
        return [operators]
    room = memory - model_bytes(network, batch_size)
    sizes = [moments_bytes(op, required_sums(op, estimators)) for op in operators]
    for operator, size in zip(operators, sizes):
        if size > room:
            raise too_large(operator, estimators, size, memory, room)
    return grouped(operators, sizes, room)


def too_large(operator: Operator, estimators: Sequence[str], size: int, memory: int, room: int) -> UserError:
    what = (
        f"its moments take {format_bytes(size)}, and --memory {format_bytes(memory)} leaves {format_bytes(room)} "
        "beside the model and a batch"
    )
    remedy = f"Give --memory {format_bytes(memory - room + size)}"
    small = moments_bytes(operator, required_sums(operator, ["default"]))
    if small < size:
        remedy += f", or fewer sums: --estimators '{operator.name}=default,…' takes {format_bytes(small)} for it"
    return UserError(operator.name, what, f"{remedy}.")
