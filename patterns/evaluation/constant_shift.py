"""Invariance to a constant that is added to all inputs (Kindermans et al. 2017, arXiv 1711.00867).

The bias of a network's first operator can absorb the constant: the network with this bias computes the same function of
the shifted inputs. A map that changes nevertheless depends on the origin of the input space.
"""

import torch
from torch import Tensor
from torch.fx import Node

from patterns.errors import UserError
from patterns.evaluation.randomization import replace_operators
from patterns.operators.copies import with_weights
from patterns.operators.operator import UNTRAINED_TYPES, Operator
from patterns.tracing.aten_graph import VALUE_PASSING, opname
from patterns.tracing.inputs import require_batch
from patterns.tracing.network import SYMBOLIC, Network

# The maximum of shifted values is not a shifted maximum if the shift differs between the values.
MOVING = {name for name in VALUE_PASSING if "max" not in name}
TOLERANCE = 1e-9  # of the response to a shift at different positions, which is computed in float64
REMEDY = "Choose a model whose first operation is a linear layer, a batch norm, or a convolution without padding."


def absorb_shift(network: Network, shift: Tensor) -> Network:
    """Return the network that gives for x + shift the output for x: the bias of its first operator absorbs the shift.

    The outputs are equal up to rounding in the network's dtype.

    Args:
        network: The traced network, which is not changed.
        shift: Shape input_shape, or a shape that broadcasts to it, such as (C, 1, 1) for a constant per channel.

    Returns:
        A network that shares everything but the first operator with the given one.

    Raises:
        UserError: If no bias can absorb the shift: for example that of a convolution with padding, because the padding
            is not shifted, or if the input is read by several operations. See `find_shift_obstacle`.

    Example:
        >>> from patterns import trace
        >>> network = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4))
        >>> x, shift = torch.ones(1, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> torch.allclose(absorb_shift(network, shift).module(x + shift), network.module(x), atol=1e-6)
        True
    """
    operator = find_first_operator(network)
    shift = shift.to(network.like).expand(network.input_shape)
    moved, origin = (read_operator_input(network, operator, x) for x in (shift, torch.zeros_like(shift)))
    x, weight = (moved - origin).double(), operator.weight.double()
    response, bound = (operator.operator_type.forward((a,), b, None) for a, b in ((x, weight), (x.abs(), weight.abs())))
    per_neuron = response.movedim(operator.operator_type.axis, 0).flatten(1)
    absorbed = per_neuron[:, 0]
    if float((per_neuron - absorbed[:, None]).abs().max()) > TOLERANCE * float(bound.max()):
        what = "the shift changes the outputs by a different amount at each position, which no bias can absorb"
        raise UserError(operator.name, what, f"Use a constant for each channel. {REMEDY}")
    bias = -absorbed if operator.bias is None else operator.bias.double() - absorbed
    return replace_operators(
        network, {operator.name: with_weights(operator, operator.weight, bias.to(operator.weight))}
    )


def find_shift_obstacle(network: Network) -> str | None:
    """Return why no bias of the network can absorb a constant shift of each channel, or None if a bias can.

    Args:
        network: The traced network. The first dimension of its input counts the channels.

    Returns:
        The reason as a part of a sentence, with the operator at fault; None if `absorb_shift` works for all constants.

    Example:
        >>> from patterns import trace
        >>> obstacles = []
        >>> for padding in (0, 1):
        ...     model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=padding), torch.nn.ReLU())
        ...     obstacles.append(find_shift_obstacle(trace(model, torch.zeros(2, 3, 8, 8))))
        >>> obstacles[0]
        >>> obstacles[1]
        '0: the shift changes the outputs by a different amount at each position, which no bias can absorb'
    """
    channels, *positions = network.input_shape
    try:
        # All channels have different constants, so that those of two channels do not cancel by chance.
        absorb_shift(network, torch.linspace(1, 2, channels).view(-1, *[1] * len(positions)))
    except UserError as error:
        return ": ".join(filter(None, (error.where, error.what)))
    return None


def shift_sensitivity(maps: Tensor, shifted_maps: Tensor) -> Tensor:
    """Return the relative change ‖m′ − m‖ / ‖m‖ of each map by a shift of its input.

    Both maps must have the same exponent (`Explanation.exponents`): give the explainer of the shifted network the
    `scales` of the other one.

    Args:
        maps: Maps m of the network for x, shape (N, …), any floating-point dtype.
        shifted_maps: Maps m′ of `absorb_shift(network, shift)` for x + shift, in the same shape.

    Returns:
        float64, shape (N,): 0 for an invariant map; NaN if m is 0.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> shift_sensitivity(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]]))
        tensor([0., 2.], dtype=torch.float64)
    """
    if maps.shape != shifted_maps.shape:
        raise ValueError(f"maps of shape {tuple(maps.shape)} and shifted maps of shape {tuple(shifted_maps.shape)}")
    before, after = (m.flatten(1).double() for m in (maps, shifted_maps))
    largest = before.abs().amax(1, keepdim=True)  # otherwise the squares of tiny values would be 0
    before, after = before / largest, after / largest
    return (after - before).norm(dim=1) / before.norm(dim=1)


def find_first_operator(network: Network) -> Operator:
    """Return the only operator that reads the network's input, unchanged or reshaped.

    Raises:
        UserError: If another operation also reads the input, or the operator has no bias of its own.
    """
    readers = find_input_readers(network)
    names = [str(node.target) if node.op == "call_module" else opname(node) for node in readers]
    if len(readers) != 1:
        raise UserError("", f"{len(readers)} operations read the input: {', '.join(names)}", REMEDY)
    if readers[0].op != "call_module":
        raise UserError("", f"the input is read by {names[0]}, which has no bias", REMEDY)
    operator = network.operators[names[0]]
    if isinstance(operator.operator_type, UNTRAINED_TYPES):
        raise UserError(operator.name, "additions and average pooling have no bias", REMEDY)
    if operator.calls > 1:
        what = f"the operator is called {operator.calls} times, and a new bias would change all calls"
        raise UserError(operator.name, what, REMEDY)
    return operator


def find_input_readers(network: Network) -> list[Node]:
    """Return the nodes of the graph that read the input, unchanged or after operations that only move values."""
    (source,) = network.module.graph.find_nodes(op="placeholder")
    readers, todo = dict[Node, None](), [source]
    while todo:
        for user in todo.pop().users:
            if user.target is require_batch or (user.op == "call_function" and opname(user) in MOVING):
                todo.append(user)
            elif user.op == "call_module" or opname(user) not in SYMBOLIC:
                readers[user] = None
    return list(readers)


def read_operator_input(network: Network, operator: Operator, x: Tensor) -> Tensor:
    """Return the input of an operator with one input if the network runs on one sample (*input_shape)."""
    found: list[Tensor] = []
    hook = operator.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        with torch.no_grad():
            network.until(operator.name).module(x[None])
    finally:
        hook.remove()
    return found[0]
