"""Explanations: one backward pass of the unchanged forward pass, with other weights or rectifiers on the way back.

A backward pass is a choice of weights for the operators (the gradient takes w, PatternNet the pattern a,
PatternAttribution w⊙a: Kindermans et al. 2018, §3.3) and of a rule for the rectifiers. Max pooling and
changes of shape keep their usual backward.

`gradient-x-input` is x ⊙ ∂z/∂x, so it starts from 1. In a rectifier network it equals LRP-z, which starts from
the target's value z: there an input x of a neuron z receives x w R/z, so R/z is handed back as a gradient is,
and a rectifier's output is z times its slope (Shrikumar et al. 2016, arXiv 1605.01713; Kindermans et al. 2016,
arXiv 1611.07270).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from patterns import scales
from patterns.errors import UserError
from patterns.graph import IN_PLACE, RECTIFIERS, Network
from patterns.operators import Operator
from patterns.scales import Step, Values

FUNCTIONAL = {in_place: functional for functional, in_place in IN_PLACE.items()}
Weights = Mapping[str, Tensor]
# From the gradient at a rectifier's output: what goes straight to its input, and what goes through its usual backward.
Rule = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def gated(gradient: Tensor) -> tuple[None, Tensor]:
    """The rectifier's own backward."""
    return None, gradient


def rectified(gradient: Tensor) -> tuple[Tensor, None]:
    """What is positive, whatever the rectifier's input was (Zeiler & Fergus 2014)."""
    return gradient.clamp(min=0), None


def gated_and_rectified(gradient: Tensor) -> tuple[None, Tensor]:
    """What is positive, through the rectifier's own backward (Springenberg et al. 2015)."""
    return None, gradient.clamp(min=0)


@dataclass(frozen=True)
class Backward:
    """A way back through the network; positively homogeneous in the gradient, so that scaling is exact.

    operator: the backward weight, from an operator's weight and pattern.
    starts_from_value: it starts from the target's value, else from 1.
    """

    operator: Callable[[Tensor, Tensor | None], Tensor | None]
    rectifier: Rule = gated
    needs_patterns: bool = False
    starts_from_value: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table. Methods of the same `backward` share one pass.

    times_input: the map is the pass's result times the input.
    attributes: the map says how much each input contributed; else it is a signal, an image of its own.
    """

    backward: Backward
    times_input: bool = False
    attributes: bool = False

    @property
    def needs_patterns(self) -> bool:
        return self.backward.needs_patterns


def weight(w: Tensor, a: Tensor | None) -> Tensor:
    """w, whatever the pattern."""
    return w


GRADIENT = Backward(weight)

METHODS: dict[str, Method] = {
    "gradient": Method(GRADIENT),
    "gradient-x-input": Method(GRADIENT, times_input=True, attributes=True),
    "deconvnet": Method(Backward(weight, rectified)),
    "guided-backprop": Method(Backward(weight, gated_and_rectified)),
    "patternnet": Method(Backward(lambda w, a: a, needs_patterns=True, starts_from_value=True)),
    # Σ map = the target's value, less what is lost at gates and borders: patterns/losses.py.
    "patternattribution": Method(
        Backward(lambda w, a: w * a, needs_patterns=True, starts_from_value=True),  # type: ignore[operator]
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
    `scales`: by method, as an earlier explainer of the same network and patterns has them; see `scales` below. Those
    of the other methods are calibrated, which takes some passes.
    Not to be used from several threads at once.
    """

    def __init__(
        self,
        network: Network,
        patterns: Weights | None,
        methods: Collection[str],
        scales: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if unknown := sorted(set(methods) - set(METHODS)):
            raise UserError("--methods", f"no method {unknown[0]!r}", f"Choose from {', '.join(METHODS)}.")
        if len(network.output_shape) != 1:
            what = f"the model gives outputs of shape {network.output_shape}, not a score for each class"
            raise UserError("model", what, "Explain a model whose output is (N, classes).")
        self._methods = {name: METHODS[name] for name in methods}
        passes = dict.fromkeys(method.backward for method in self._methods.values())
        self._weights = {backward: backward_weights(network, patterns or {}, backward) for backward in passes}
        self._exponents = dict.fromkeys(passes, 0)
        self._restored = dict.fromkeys(passes, 0)  # of a scaled pass whose result is in range itself
        self._current: Weights = {}
        self._rule: Rule = gated
        self._module = network.rewrite(lambda op: Explained(op, lambda: self._current[op.name]))
        if any(backward.rectifier is not gated for backward in passes):
            add_rules(self._module, lambda: self._rule)
        self._potentials = self._keep_in_range(network, scales or {})

    @property
    def scales(self) -> dict[str, list[int]]:
        """The potential φ (see `patterns.scales`) of each method's pass, by value of the graph from the output to the
        input; [] for a pass that needs none.

        It is calibrated on noise, and may differ between kinds of hardware by rounding. Explainers that share it give
        the same exponents.
        """
        return {name: self._potentials[method.backward] for name, method in self._methods.items()}

    def __call__(self, inputs: Tensor, targets: Tensor | None = None) -> Explanation:
        """Explain the score of each sample's target, by default its predicted class.

        inputs: (N, *input_shape), on the network's device and in its dtype; targets: int64 (N,).
        """
        inputs = inputs.detach().requires_grad_()
        scores = self._module(inputs)
        if targets is None:
            targets = scores.argmax(1)
        start = torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0)
        results = {}
        for number, (backward, weights) in enumerate(self._weights.items(), start=1):
            values = start * scores.detach() if backward.starts_from_value else start
            self._current, self._rule = weights, backward.rectifier
            further = number < len(self._weights)
            (carried,) = torch.autograd.grad(scores, inputs, values, retain_graph=further)
            restored = self._restored[backward]
            results[backward] = scales.power(carried, restored) if restored else carried
        maps, exponents = {}, {}
        for name, method in self._methods.items():
            result = results[method.backward]
            maps[name] = result * inputs.detach() if method.times_input else result
            exponents[name] = self._exponents[method.backward]
        return Explanation(maps, exponents, scores.detach(), targets)

    def _keep_in_range(self, network: Network, recorded: Mapping[str, Sequence[int]]) -> dict[Backward, list[int]]:
        """Scale the backward weights of the passes whose gradients would leave the dtype's range; gives each one's φ.

        Judged by the gradients of noise: only their order of magnitude matters. What was recorded is not judged again.
        """
        generator = torch.Generator().manual_seed(0)
        like = next(iter(network.operators.values())).weight
        safe = scales.safe(like.dtype)
        noise = torch.randn((2, *network.input_shape), generator=generator).to(like)
        classes = scales.values(self._module)
        potentials = {method.backward: list(recorded[n]) for n, method in self._methods.items() if n in recorded}
        for backward in self._weights.keys() - potentials.keys():
            unscaled = dict.fromkeys(classes.order, 0)
            if scales.in_range(self._largest(backward, classes, unscaled, noise), safe):
                potentials[backward] = []
        if len(potentials) == len(self._weights) and not any(potentials.values()):
            return potentials
        ones = scales.add_crossings(self._module, lambda name: self._current[name])
        classes = scales.values(self._module)
        for backward in self._weights:
            self._weights[backward] = {**self._weights[backward], **{name: one.to(like) for name, one in ones.items()}}
            if backward not in potentials:
                phi = scales.calibrate(classes, partial(self._largest, backward, classes, noise=noise))
                potentials[backward] = [phi[c] for c in classes.order]
            potential = potentials[backward] or [0] * len(classes.order)
            if len(potential) != len(classes.order):
                what = f"the scales are of a network of {len(potential)} values, this one has {len(classes.order)}"
                raise UserError("scales", what, "Use those of an explainer of this very model.")
            phi = dict(zip(classes.order, potential))
            self._weights[backward] = scales.scaled(self._weights[backward], classes, phi)
            result = phi[classes.source]
            (self._restored if abs(result) <= 2 * safe else self._exponents)[backward] = result
        return potentials

    def _largest(self, backward: Backward, classes: Values, phi: Mapping[int, int], noise: Tensor) -> dict[int, float]:
        """The largest |gradient| that each class of values carries, under a potential."""
        self._current, self._rule = scales.scaled(self._weights[backward], classes, phi), backward.rectifier
        largest = dict.fromkeys(classes.order, 0.0)

        def note(number: int, gradient: Tensor) -> None:
            value = float(gradient.abs().max())
            largest[number] = value if not value <= largest[number] else largest[number]

        def follow(part: Step, _: object, output: Tensor) -> None:
            number = classes.outputs[part.name]
            if output.requires_grad:  # what no input reaches, such as a class token alone, has no gradient
                output.register_hook(lambda gradient: note(number, gradient))

        parts = [part for part in self._module.modules() if isinstance(part, Step)]
        hooks = [part.register_forward_hook(follow) for part in parts]
        noise = noise.requires_grad_()
        scores = self._module(noise)
        for hook in hooks:
            hook.remove()
        start = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        (gradient,) = torch.autograd.grad(scores, noise, start)
        note(classes.source, gradient)
        return largest


def backward_weights(network: Network, patterns: Weights, backward: Backward) -> Weights:
    """The weights of a backward pass, by operator, on the operator's device."""
    weights = {}
    for name, operator in network.operators.items():
        pattern = patterns.get(name)
        if pattern is None and backward.needs_patterns:
            raise UserError(name, "the patterns hold none for this operator", "Fit them for this very model.")
        if pattern is not None:
            if pattern.shape != operator.weight.shape:
                found, expected = tuple(pattern.shape), tuple(operator.weight.shape)
                raise UserError(
                    name, f"the pattern has shape {found}, the weight {expected}", "Fit patterns for this very model."
                )
            pattern = pattern.to(operator.weight)
        weights[name] = backward.operator(operator.weight, pattern)
    return weights  # type: ignore[return-value]


class Explained(Step):
    """An operator whose input gradient uses another weight."""

    def __init__(self, operator: Operator, backward_weight: Callable[[], Tensor]) -> None:
        super().__init__(operator.name)
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


def add_rules(module: GraphModule, rule: Callable[[], Rule]) -> None:
    """Put a Ruled behind each rectifier."""
    rectifiers = [node for node in module.graph.nodes if rectifier(node)]
    for number, node in enumerate(rectifiers):
        node.target = rectifier(node)  # in place, its input would be no more
        name = f"rectifiers.{number}"
        module.add_submodule(name, Ruled(rule))
        with module.graph.inserting_after(node):
            ruled = module.graph.call_module(name, (node.args[0], node))
        node.replace_all_uses_with(ruled, delete_user_cb=lambda user, ruled=ruled: user is not ruled)
    module.recompile()


def rectifier(node: Node) -> Any:
    """The function of a rectifier's node, not in place; None for any other node."""
    target = FUNCTIONAL.get(node.target, node.target)
    return target if target in RECTIFIERS else None


class Ruled(nn.Module):
    """A rectifier's output y, whose gradient a rule shares out between its input x and y itself."""

    def __init__(self, rule: Callable[[], Rule]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _Ruled.apply(self.rule, x, y)


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Callable[[], Rule], x: Tensor, y: Tensor) -> Tensor:
        ctx.rule = rule
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.rule()(grads[0])
