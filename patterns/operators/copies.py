"""Copies of operators with other weights, and of some of their neurons."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from patterns.operators.gates import SmoothGate
from patterns.operators.operator import Operator


def with_weights(operator: Operator, weight: Tensor, bias: Tensor | None) -> Operator:
    """Return a copy of the operator with another weight and bias.

    Args:
        operator: The operator, which is not changed.
        weight: Shape of the operator's weight.
        bias: Shape (K,), or None for no bias.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> from patterns import trace
        >>> operator = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4)).operators["linear.0"]
        >>> with_weights(operator, torch.ones(3, 4), None)(torch.ones(1, 4))
        tensor([[4., 4., 4.]])
    """
    shapes = operator.input_shapes, operator.output_shape
    other = Operator(operator.name, operator.operator_type, weight, bias, *shapes, operator.source, operator.gate)
    other.calls, other.mixed_gates, other.per_image = operator.calls, operator.mixed_gates, operator.per_image
    other.rows = operator.rows
    return other


def select_neurons(operator: Operator, neurons: Sequence[int]) -> Operator:
    """Return the operator of some neurons of another one, whose input they share.

    Args:
        operator: The operator, which is not changed. It has one group, or as many as neurons.
        neurons: The numbers of the neurons.

    Example:
        >>> import torch
        >>> from patterns import trace
        >>> operator = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4)).operators["linear.0"]
        >>> select_neurons(operator, [0, 2]).rows
        (0, 2)
    """
    chosen, gate = list(neurons), operator.gate
    bias = None if operator.bias is None else operator.bias[chosen]
    part = with_weights(operator, operator.weight[chosen], bias)
    part.rows = tuple(neurons if operator.rows is None else (operator.rows[number] for number in neurons))
    if isinstance(gate, SmoothGate) and gate.has_slopes:
        part.gate = replace(gate, parameters=tuple(gate.parameters[number] for number in neurons))
    return part
