"""Linearize operations of transformers and gated networks, so that an explanation can propagate through them.

| operation | what carries relevance | what is detached |
| --- | --- | --- |
| layer, RMS, group and instance norm | the input | its standard deviation |
| attention | the values | the attention weights, and with them queries and keys |
| product or quotient of two activations | one factor | the other: the gate, see `find_gate`, or the divisor |

How a norm's factor 1/σ acts depends on the method: see `patterns.tracing.scales`. Operations that the user lists in
`pass_through` are linearized as in version 0.2, where a norm was one operation with all its statistics detached.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.axes import reshape_along
from patterns.tracing.aten_graph import VALUE_PASSING, AtenGraph, arguments, get_constant, is_activation, opname
from patterns.tracing.scales import detached, factored, standardized

aten = torch.ops.aten


def linearize_operations(graph: AtenGraph, pass_through: Collection[str]) -> None:
    """Linearize norms, attention, and products and quotients of activations. The graph is changed in place.

    Args:
        graph: The graph.
        pass_through: Names of ATen operations that are linearized as one operation with detached statistics.
    """
    for node in list(graph.fx.nodes):
        operation = opname(node)
        if node.target in DETACHED_NORMS:
            a = arguments(node)
            if not a.get("use_input_stats", True):  # otherwise the statistics are constants of the model
                continue
            if operation in pass_through:
                graph.replace(node, graph.call(node, DETACHED_NORMS[node.target], *a.values()))
            else:
                graph.replace(node, NORMS[node.target](graph, node, a))
        elif operation == "scaled_dot_product_attention":
            node.args = detach_arguments(graph, node, node.args, 0, 1)
        elif operation in PRODUCTS_OF_TWO | {"div"} and all(map(is_activation, node.args[:2])):
            detach_factor(graph, node)
        elif operation == "einsum" and len(factors := node.args[1]) == 2 and all(map(is_activation, factors)):
            node.args = node.args[0], detach_arguments(graph, node, factors, find_gate(*factors))


def rewrite_layer_norm(graph: AtenGraph, node: Node, a: dict[str, Any]) -> Node:
    """Rewrite a layer or RMS norm over the last dimensions as a scale by 1/σ, a product and a sum."""
    x: Node = a["input"]
    eps, center = a["eps"], opname(node) == "layer_norm"
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    y = graph.call(node, standardized, x, len(a["normalized_shape"]), 0, eps, center)
    return apply_affine(graph, node, y, a["weight"], a.get("bias"))


def rewrite_group_norm(graph: AtenGraph, node: Node, a: dict[str, Any]) -> Node:
    """Rewrite a group or instance norm as a scale by 1/σ, a product and a sum."""
    x: Node = a["input"]
    groups = a["num_groups"] if "num_groups" in a else x.meta["val"].shape[1]
    y = graph.call(node, standardized, x, 0, groups, a["eps"], True)

    def widen(parameter: Node | None) -> Node | None:
        value = get_constant(graph, parameter)
        if parameter is None or value is None:
            return parameter
        return graph.constant(node, value.reshape(-1, *[1] * (x.meta["val"].dim() - 2)))

    return apply_affine(graph, node, y, widen(a["weight"]), widen(a["bias"]))


def apply_affine(graph: AtenGraph, node: Node, y: Node, weight: Node | None, bias: Node | None) -> Node:
    """Multiply a value by a weight and add a bias, if there are any."""
    y = y if weight is None else graph.call(node, aten.mul.Tensor, y, weight)
    return y if bias is None else graph.call(node, aten.add.Tensor, y, bias)


NORMS: dict[Any, Callable[[AtenGraph, Node, dict[str, Any]], Node]] = {
    aten.layer_norm.default: rewrite_layer_norm,
    aten.rms_norm.default: rewrite_layer_norm,
    aten.group_norm.default: rewrite_group_norm,
    aten.instance_norm.default: rewrite_group_norm,
}


def detach_factor(graph: AtenGraph, node: Node) -> None:
    """Detach one factor of a product of two activations, or the divisor of a quotient, which becomes a product."""
    divides = opname(node) == "div"
    number = 1 if divides else find_gate(*node.args[:2])  # type: ignore[arg-type]
    x, factor = node.args[1 - number], node.args[number]
    elementwise = node.target in (aten.mul.Tensor, aten.div.Tensor)
    if elementwise and x.meta["val"].shape == node.meta["val"].shape:  # type: ignore[union-attr]
        as_norm = divides or opname(find_origin(factor)) in INVERSES  # type: ignore[arg-type]
        factor = graph.call(node, aten.reciprocal.default, factor) if divides else factor
        graph.replace(node, graph.call(node, factored, x, factor, as_norm))
    else:
        node.args = detach_arguments(graph, node, node.args, number)


def detach_arguments(graph: AtenGraph, node: Node, args: Sequence[Any], *numbers: int) -> tuple[Any, ...]:
    """Return the arguments of a call, with those at the given indices detached."""
    return tuple(graph.call(node, detached, a) if i in numbers else a for i, a in enumerate(args))


def find_gate(first: Node, second: Node) -> int:
    """Return which of two factors, 0 or 1, is the gate of the other."""
    origins = [find_origin(first), find_origin(second)]
    gates = [opname(node) in GATES for node in origins]
    if gates[0] != gates[1]:
        return gates.index(True)
    products = [opname(node) in PRODUCTS_OF_TWO and all(map(is_activation, node.args[:2])) for node in origins]
    if products[0] != products[1]:
        return products.index(False)
    return int(first.meta["val"].numel() >= second.meta["val"].numel())


def find_origin(node: Node) -> Node:
    """Return the node whose values reach this node with at most a change of shape."""
    while opname(node) in VALUE_PASSING and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


# The norms below are linear in x, because their statistics have no gradient. Their arguments are those of ATen.


def detached_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
) -> Tensor:
    """Layer norm with detached statistics."""
    y = standardize(x, list(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def detached_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
    """RMS norm with a detached mean square."""
    mean_square = x.detach().square().mean(list(range(-len(shape), 0)), keepdim=True)
    y = x * torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def detached_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
) -> Tensor:
    """Group norm with detached statistics."""
    y = standardize(x.unflatten(1, (groups, -1)).flatten(2), [-1], eps).view(x.shape)
    y = y if weight is None else y * reshape_along(1, weight, y)
    return y if bias is None else y + reshape_along(1, bias, y)


def detached_instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor | float | bool | None
) -> Tensor:
    """Instance norm with detached statistics."""
    *_, eps, cudnn = running
    return detached_group_norm(x, x.shape[1], weight, bias, float(eps), bool(cudnn))  # type: ignore[arg-type]


def standardize(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Subtract the detached mean over some dimensions, and divide by the detached standard deviation."""
    var, mean = torch.var_mean(x.detach(), dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps)


DETACHED_NORMS: dict[Any, Any] = {
    aten.layer_norm.default: detached_layer_norm,
    aten.rms_norm.default: detached_rms_norm,
    aten.group_norm.default: detached_group_norm,
    aten.instance_norm.default: detached_instance_norm,
}
INVERSES = {"rsqrt", "reciprocal"}
PRODUCTS_OF_TWO = {"mul", "matmul", "bmm"}
GATES = {"sigmoid", "hardsigmoid", "softmax", "_softmax", "tanh", "gelu", "silu", "hardswish", "softplus"}
