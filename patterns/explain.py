"""Explanations: one backward pass of the unchanged forward pass, with patterns in the weights' place.

Every method here is a choice of backward weights: the gradient takes w, PatternNet the pattern a,
PatternAttribution w⊙a (Kindermans et al. 2018, §3.3). Rectifiers and max pooling keep their usual backward.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patterns import scales
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
    """maps: by method, shape of the input; the explanation is map · 2^exponents[method].

    exponents: 0 unless the explanation's magnitude is beyond the range of its dtype.
    scores: the model's output (N, classes).  targets: int64 (N,).
    """

    maps: dict[str, Tensor]
    exponents: dict[str, int]
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
        self._exponents = dict.fromkeys(methods, 0)
        self._restored = dict.fromkeys(methods, 0)  # of a scaled pass whose result is in range itself
        self._current: Weights = {}
        self._module = network.rewrite(lambda op: Explained(op, lambda: self._current[op.name]))
        self._keep_in_range(network)

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
            (carried,) = torch.autograd.grad(scores, inputs, values, retain_graph=further)
            maps[name] = scales.power(carried, self._restored[name]) if self._restored[name] else carried
        return Explanation(maps, dict(self._exponents), scores.detach(), targets)

    def _keep_in_range(self, network: Network) -> None:
        """Scale the backward weights of the methods whose gradients would leave the dtype's range.

        Judged by the gradients of noise: only their order of magnitude matters.
        """
        generator = torch.Generator().manual_seed(0)
        like = next(iter(network.operators.values())).weight
        noise = torch.randn((2, *network.input_shape), generator=generator).to(like)
        classes = scales.values(self._module)
        unscaled = dict.fromkeys(classes.order, 0)
        beyond = [
            m for m in self._methods if not scales.in_range(self._largest(self._weights[m], classes, unscaled, noise))
        ]
        if not beyond:
            return
        ones = scales.add_crossings(self._module, lambda name: self._current[name])
        classes = scales.values(self._module)
        for method in self._methods:
            weights = {**self._weights[method], **{name: one.to(like) for name, one in ones.items()}}
            phi = dict.fromkeys(classes.order, 0)
            if method in beyond:
                phi = scales.calibrate(
                    classes,
                    lambda phi, weights=weights: self._largest(weights, classes, phi, noise),  # type: ignore[misc]
                )
            self._weights[method] = scales.scaled(weights, classes, phi)
            result = phi[classes.source]
            (self._restored if abs(result) <= 2 * scales.SAFE else self._exponents)[method] = result

    def _largest(
        self, weights: Weights, classes: scales.Values, phi: Mapping[int, int], noise: Tensor
    ) -> dict[int, float]:
        """The largest |gradient| that each class of values carries, under a potential."""
        self._current = scales.scaled(weights, classes, phi)
        largest = dict.fromkeys(classes.order, 0.0)

        def note(number: int, gradient: Tensor) -> None:
            value = float(gradient.abs().max())
            largest[number] = value if not value <= largest[number] else largest[number]

        def follow(part: nn.Module, _: object, output: Tensor) -> None:
            number = classes.outputs[part.name]  # type: ignore[index]
            if output.requires_grad:  # what no input reaches, such as a class token alone, has no gradient
                output.register_hook(lambda gradient: note(number, gradient))

        parts = [part for part in self._module.modules() if isinstance(part, Explained | scales.Crossing)]
        hooks = [part.register_forward_hook(follow) for part in parts]
        noise = noise.requires_grad_()
        scores = self._module(noise)
        for hook in hooks:
            hook.remove()
        start = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        (gradient,) = torch.autograd.grad(scores, noise, start)
        note(classes.source, gradient)
        return largest


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
        self.name, self.operator, self.backward_weight = operator.name, operator, backward_weight

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
