"""Explanations: one backward pass of the unchanged forward pass, with patterns in the weights' place.

Every method here is a choice of backward weights: the gradient takes w, PatternNet the pattern a,
PatternAttribution w⊙a (Kindermans et al. 2018, §3.3). Rectifiers and max pooling keep their usual backward.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patterns.errors import UserError
from patterns.graph import Network
from patterns.operators import Operator

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    backward_weight: from an operator's weight and pattern.
    starts_from_value: the backward pass starts from the target's value, else from 1.
    attributes: the result says how much each input contributed; else it is a signal, an image of its own.
    """

    backward_weight: Callable[[Tensor, Tensor | None], Tensor | None]
    needs_patterns: bool
    starts_from_value: bool
    attributes: bool


METHODS: dict[str, Method] = {
    "gradient": Method(lambda w, a: w, needs_patterns=False, starts_from_value=False, attributes=False),
    "patternnet": Method(lambda w, a: a, needs_patterns=True, starts_from_value=True, attributes=False),
    "patternattribution": Method(
        lambda w, a: w * a,  # type: ignore[operator]
        needs_patterns=True,
        starts_from_value=True,
        attributes=True,
    ),
}


@dataclass(frozen=True)
class Explanation:
    """maps: by method, shape of the input. scores: the model's output (N, classes). targets: int64 (N,)."""

    maps: dict[str, Tensor]
    scores: Tensor
    targets: Tensor


class Explainer:
    """Explains a network's scores by several methods that share one forward pass.

    `patterns`: by operator name, in the weight's shape; needed by the methods that use them.
    Not to be used from several threads at once.
    """

    def __init__(self, network: Network, patterns: Weights | None, methods: Collection[str]) -> None:
        if unknown := sorted(set(methods) - set(METHODS)):
            raise UserError("--methods", f"no method {unknown[0]!r}", f"Choose from {', '.join(METHODS)}.")
        if len(network.output_shape) != 1:
            what = f"the model gives outputs of shape {network.output_shape}, not a score for each class"
            raise UserError("model", what, "Explain a model whose output is (N, classes).")
        self._methods = {name: METHODS[name] for name in methods}
        self._weights = {name: backward_weights(network, patterns or {}, METHODS[name]) for name in methods}
        self._current: Weights = {}
        self._module = network.rewrite(lambda op: Explained(op, lambda: self._current[op.name]))

    def __call__(self, inputs: Tensor, targets: Tensor | None = None) -> Explanation:
        """Explain the score of each sample's target, by default its predicted class.

        inputs: (N, *input_shape), on the network's device and in its dtype; targets: int64 (N,).
        """
        inputs = inputs.detach().requires_grad_()
        scores = self._module(inputs)
        if targets is None:
            targets = scores.argmax(1)
        start = torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0)
        maps = {}
        for number, (name, method) in enumerate(self._methods.items(), start=1):
            values = start * scores.detach() if method.starts_from_value else start
            self._current = self._weights[name]
            further = number < len(self._methods)
            (maps[name],) = torch.autograd.grad(scores, inputs, values, retain_graph=further)
        return Explanation(maps, scores.detach(), targets)


def backward_weights(network: Network, patterns: Weights, method: Method) -> Weights:
    """The weights of a method's backward pass, by operator, on the operator's device."""
    weights = {}
    for name, operator in network.operators.items():
        pattern = patterns.get(name)
        if pattern is None and method.needs_patterns:
            raise UserError(name, "the patterns hold none for this operator", "Fit them for this very model.")
        if pattern is not None:
            if pattern.shape != operator.weight.shape:
                found, expected = tuple(pattern.shape), tuple(operator.weight.shape)
                raise UserError(
                    name, f"the pattern has shape {found}, the weight {expected}", "Fit patterns for this very model."
                )
            pattern = pattern.to(operator.weight)
        weights[name] = method.backward_weight(operator.weight, pattern)
    return weights  # type: ignore[return-value]


class Explained(nn.Module):
    """An operator whose input gradient uses another weight."""

    def __init__(self, operator: Operator, backward_weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.operator, self.backward_weight = operator, backward_weight

    def forward(self, *inputs: Tensor) -> Tensor:
        return _Explained.apply(self.operator, self.backward_weight, *inputs)


class _Explained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, backward_weight: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        ctx.kind, ctx.backward_weight = operator.kind, backward_weight
        ctx.input_shapes = tuple(tuple(x.shape) for x in inputs)
        return operator(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.kind.input_gradient(grads[0], ctx.backward_weight(), ctx.input_shapes)
