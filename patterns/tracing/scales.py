"""Scales: gates, norms and products whose factor depends on the sample, and how a backward pass treats the factor.

A value x times a factor r that is taken as a constant is a neuron with one input, whose pattern is 1/r. So PatternNet
divides by r, PatternAttribution passes relevance on unchanged, and gradient × input multiplies by r. The factor of a
norm, 1/σ, is such a scale for all methods. The factor g of a gate tells how far it is open, so PatternNet and
PatternAttribution multiply by it; except where relevance comes from the identity estimator, which has given each value
its share already. The factor of a product can be taken for either; see docs/smooth.md.

The gradient of the model itself also differentiates the factors.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from patterns.operators.gates import gated

ScaleRule = Literal["multiply", "pass", "divide"]


@dataclass(frozen=True)
class ScaleRules:
    """Rules of a backward pass for factors that depend on the sample.

    Attributes:
        norms: At the factor 1/σ of norms, and at the factor 1/y of quotients x/y.
        products: At the factor of other products of two activations.
        differentiates: Whether gates, norms, attention weights and factors of products are differentiated, as in the
            model itself. The rules above then have no effect.
    """

    norms: ScaleRule = "multiply"
    products: ScaleRule = "multiply"
    differentiates: bool = False


CONSTANT_FACTORS = ScaleRules()  # the rules of a traced network by itself


def apply_rule(rule: ScaleRule, grad: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient at a value that is multiplied by a factor."""
    if rule == "pass":
        return grad
    return grad * factor if rule == "multiply" else grad / factor


def detached(x: Tensor, detach: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
    """Return a value without its gradient.

    Args:
        x: The value.
        detach: Returns the value without its gradient, or with it if a backward pass differentiates.

    Example:
        >>> detached(torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    return detach(x)


def factored(
    x: Tensor, factor: Tensor, as_norm: bool = False, rules: Callable[[], ScaleRules] = lambda: CONSTANT_FACTORS
) -> Tensor:
    """Return the product of a value and a factor that is taken as a constant.

    Args:
        x: The value.
        factor: The factor; its shape broadcasts to that of the value.
        as_norm: Whether the factor is the inverse of a number, such as 1/σ, and so acts as that of a norm.
        rules: Returns how the backward pass treats the factor.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> factored(x, torch.tensor([2.0, 3.0])).sum().backward()
        >>> x.grad
        tensor([2., 3.])
    """
    return _Factored.apply(x, factor, as_norm, rules)


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, as_norm: bool, rules: Callable[[], ScaleRules]) -> Tensor:
        ctx.as_norm, ctx.rules = as_norm, rules
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, factor = ctx.saved_tensors
        rules: ScaleRules = ctx.rules()
        if not rules.differentiates:
            rule = rules.norms if ctx.as_norm else rules.products
            return apply_rule(rule, grads[0], factor), None, None, None
        return grads[0] * factor, (grads[0] * x).sum_to_size(factor.shape), None, None


def standardized(
    x: Tensor,
    dims: int,
    groups: int,
    eps: float,
    center: bool,
    rules: Callable[[], ScaleRules] = lambda: CONSTANT_FACTORS,
) -> Tensor:
    """Return (x - mean) / √(variance + eps), or without a center x / √(mean of x² + eps).

    Args:
        x: Shape (N, …).
        dims: The number of last dimensions that the statistics are taken over, if there are no groups.
        groups: The number of groups of channels, dimension 1, that have statistics of their own; 0: see `dims`.
        eps: The number that is added to the variance.
        center: Whether the mean is subtracted.
        rules: Returns how the backward pass treats the factor.

    Example:
        >>> standardized(torch.tensor([[1.0, 3.0]]), 1, 0, 0.0, True)
        tensor([[-1.,  1.]])
    """
    flat = x.unflatten(1, (groups, -1)).flatten(2) if groups else x.flatten(-dims)
    return _Standardized.apply(flat, eps, center, rules).view(x.shape)


class _Standardized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, center: bool, rules: Callable[[], ScaleRules]) -> Tensor:
        if center:
            y, _, factor = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        else:
            factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            y = x * factor
        ctx.center, ctx.rules = center, rules
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, factor = ctx.saved_tensors
        (grad,), rules = grads, ctx.rules()
        if rules.differentiates:
            grad = grad - y * (grad * y).mean(-1, keepdim=True)
        if (rules.differentiates or rules.norms == "multiply") and ctx.center:
            grad = grad - grad.mean(-1, keepdim=True)
        return apply_rule("multiply" if rules.differentiates else rules.norms, grad, factor), None, None, None


SCALES: tuple[Any, ...] = (gated, detached, factored, standardized)


def count_constants(module: GraphModule) -> dict[str, int]:
    """Return how many of a graph's values explanations take as constants, by the kind of value."""
    found: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.target is standardized:
            found["norms"] += 1
        elif node.target is factored and node.args[2:] == (True,):
            found["divisors"] += 1
        elif node.target is gated:
            found["smooth gates"] += 1
        elif node.target is factored:
            found["factors of products"] += 1
        elif node.target is detached:  # fused attention detaches queries and keys
            fused = any("scaled_dot_product" in str(user.target) for user in node.users)
            found["attention weights and other factors"] += 0 if fused and is_second(node) else 1
    return dict(found)


def is_second(node: Node) -> bool:
    """Return whether a node is the second argument of one of its users."""
    return any(node in user.args[1:2] for user in node.users)


def find_carriers(graph: Graph) -> set[Node]:
    """Return the nodes whose values have a gradient: those from which a path leads to the output that nothing cuts."""
    (output,) = graph.find_nodes(op="output")
    found: set[Node] = set()
    todo = list(output.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            if node.target is factored:
                todo += node.all_input_nodes[:1]
            elif node.target not in (detached, torch.ops.aten.detach.default):
                todo += node.all_input_nodes
    return found


def has_scales(module: GraphModule) -> bool:
    """Return whether a graph has norms, smooth gates or detached factors."""
    return any(node.target in SCALES for node in module.graph.nodes)
