"""The weights that operators use in a backward pass, and the operators that use them.

The identity estimator, S(x) = x, has no fixed pattern: a neuron with the output z has the pattern x / z for the input
x. PatternAttribution with it is the LRP-ε rule: each input receives x w R / z, with z kept away from 0 by `EPSILON`
(Bach et al. 2015, eq. 58, with the stabilizer of zennit's `Epsilon`). PatternNet does the same at such an operator: its
own signal, x R / z, would be the whole input whatever the target, and nothing below could depend on the class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from patterns.attribution.channels import ChannelRecorder
from patterns.attribution.gradient_scaling import ScaledModule
from patterns.attribution.methods import BackwardPass
from patterns.errors import UserError
from patterns.io.pattern_files import select_pattern
from patterns.operators.operator import Operator
from patterns.tracing.network import Network

Weights = Mapping[str, Tensor]  # by operator name
Patterns = Mapping[str, Tensor | None]  # by operator name; None: the identity estimator
EPSILON = 1e-6  # added to the size of an output that a relevance is divided by


def compute_backward_weights(network: Network, patterns: Patterns, backward: BackwardPass) -> Weights:
    """Return the weights of a backward pass by operator name, on the operators' device.

    That of an operator with the identity estimator is w; the rest, x / z, depends on the input.

    Raises:
        UserError: If a pattern is missing or does not have the shape of the operator's weight.
    """
    weights: dict[str, Any] = {}
    for name, operator in network.operators.items():
        if name not in patterns and backward.needs_patterns:
            raise UserError(name, "this operator has no pattern", "Fit patterns for this model.")
        pattern = patterns.get(name)
        if name in patterns and pattern is None:
            weights[name] = operator.weight
            continue
        if pattern is not None:
            pattern = select_pattern(operator, pattern).to(operator.weight)
        weights[name] = backward.operator(operator.weight, pattern)
    return weights


def find_identities(patterns: Patterns, backward: BackwardPass) -> frozenset[str]:
    """Return the names of the operators that have the identity estimator in a backward pass."""
    return frozenset(name for name, pattern in patterns.items() if pattern is None and backward.needs_patterns)


class OperatorWithBackwardWeight(ScaledModule):
    """An operator whose input gradient uses another weight than its forward pass.

    Args:
        operator: The operator.
        backward_weight: Returns the weight.
        is_identity: Returns whether the weight is that of the identity estimator. None: it never is.
        recorder: Records the channels of the operator. None: they are not recorded.
    """

    def __init__(
        self,
        operator: Operator,
        backward_weight: Callable[[], Tensor],
        is_identity: Callable[[], bool] | None = None,
        recorder: ChannelRecorder | None = None,
    ) -> None:
        super().__init__(operator.name)
        self.operator, self.backward_weight = operator, backward_weight
        self.is_identity, self.recorder = is_identity, recorder

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the operator."""
        options = self.backward_weight, self.is_identity, self.recorder
        return _OperatorWithBackwardWeight.apply(self.operator, *options, *inputs)


class _OperatorWithBackwardWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        backward_weight: Callable[[], Tensor],
        is_identity: Callable[[], bool] | None,
        recorder: ChannelRecorder | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.operator_type, ctx.backward_weight = operator.operator_type, backward_weight
        ctx.is_identity, ctx.input_shapes = is_identity, tuple(tuple(x.shape) for x in inputs)
        output = operator(*inputs)
        if is_identity is not None:  # a rectifier may overwrite the output
            overwritten = operator.gate is not None or operator.mixed_gates
            ctx.save_for_backward(output.clone() if overwritten else output, *inputs)
        ctx.recorder, ctx.output = recorder, None
        if recorder is not None:
            recorder.record_forward(inputs, output)
            # A rectifier may overwrite it. Where it does, its gradient is 0, and so is the product with the gradient.
            ctx.output = output.detach() if recorder.keeps_output else None
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient,) = grads
        if ctx.recorder is not None:
            ctx.recorder.record_backward(gradient, ctx.output)
        identity = ctx.is_identity is not None and ctx.is_identity()
        if identity:
            output, *inputs = ctx.saved_tensors
            gradient = gradient / stabilize(output)
        found = ctx.operator_type.input_gradient(gradient, ctx.backward_weight(), ctx.input_shapes)
        if identity:
            found = tuple(x * g for x, g in zip(inputs, found))
        return None, None, None, None, *found


def stabilize(output: Tensor) -> Tensor:
    """Return an output moved away from 0 by `EPSILON`; 0 counts as positive."""
    return torch.where(output < 0, output - EPSILON, output + EPSILON)
