"""The weights that operators use in a backward pass, and the operators that use them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from patterns.attribution.gradient_scaling import ScaledModule
from patterns.attribution.methods import BackwardPass
from patterns.errors import UserError
from patterns.operators.operator import Operator
from patterns.tracing.network import Network

Weights = Mapping[str, Tensor]  # by operator name


def compute_backward_weights(network: Network, patterns: Weights, backward: BackwardPass) -> Weights:
    """Return the weights of a backward pass by operator name, on the operators' device.

    Raises:
        UserError: If a pattern is missing or does not have the shape of the operator's weight.
    """
    weights = {}
    for name, operator in network.operators.items():
        pattern = patterns.get(name)
        if pattern is None and backward.needs_patterns:
            raise UserError(name, "this operator has no pattern", "Fit patterns for this model.")
        if pattern is not None:
            if pattern.shape != operator.weight.shape:
                what = f"the pattern has shape {tuple(pattern.shape)}, the weight {tuple(operator.weight.shape)}"
                raise UserError(name, what, "Fit patterns for this model.")
            pattern = pattern.to(operator.weight)
        weights[name] = backward.operator(operator.weight, pattern)
    return weights  # type: ignore[return-value]


class OperatorWithBackwardWeight(ScaledModule):
    """An operator whose input gradient uses another weight than its forward pass."""

    def __init__(self, operator: Operator, backward_weight: Callable[[], Tensor]) -> None:
        super().__init__(operator.name)
        self.operator, self.backward_weight = operator, backward_weight

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the operator."""
        return _OperatorWithBackwardWeight.apply(self.operator, self.backward_weight, *inputs)


class _OperatorWithBackwardWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, backward_weight: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        ctx.operator_type, ctx.backward_weight = operator.operator_type, backward_weight
        ctx.input_shapes = tuple(tuple(x.shape) for x in inputs)
        return operator(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.operator_type.input_gradient(grads[0], ctx.backward_weight(), ctx.input_shapes)
