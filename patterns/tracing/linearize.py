"""Linearize the operations listed in `pass_through`: norms with detached statistics, products with a detached gate."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.axes import reshape_along
from patterns.tracing.aten_graph import VALUE_PASSING, AtenGraph, arguments, is_activation, opname

aten = torch.ops.aten


def linearize_operations(graph: AtenGraph, pass_through: Collection[str]) -> None:
    """Linearize the operations in `pass_through` in place.

    The statistics of norms are detached. In a product of two activations, one factor, the gate, is detached. In
    attention, the weights are detached, so that only the values have a gradient.

    The gate is the factor that comes from a sigmoid, a softmax or another function of GATES. If both factors do, or
    neither, the gate is the factor that is not itself a product of activations (the queries of factorized attention).
    If this does not decide either, the gate is the smaller factor, which is broadcast, or else the second factor.
    """
    for node in list(graph.fx.nodes):
        operation = opname(node)
        if operation not in pass_through:
            continue
        if node.target in DETACHED_NORMS:
            a = arguments(node)
            if a.get("use_input_stats", True):  # otherwise the statistics are constants of the model
                graph.replace(node, graph.call(node, DETACHED_NORMS[node.target], *a.values()))
        elif operation == "scaled_dot_product_attention":
            node.args = detach_arguments(graph, node, node.args, 0, 1)
        elif operation in PRODUCTS_OF_TWO and all(map(is_activation, node.args[:2])):
            node.args = detach_arguments(graph, node, node.args, find_gate(*node.args[:2]))
        elif operation == "einsum" and len(factors := node.args[1]) == 2 and all(map(is_activation, factors)):
            node.args = node.args[0], detach_arguments(graph, node, factors, find_gate(*factors))


def detach_arguments(graph: AtenGraph, node: Node, args: Sequence[Any], *numbers: int) -> tuple[Any, ...]:
    """Return the arguments of a call, with those at the given indices detached."""
    return tuple(graph.call(node, aten.detach.default, a) if i in numbers else a for i, a in enumerate(args))


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
PRODUCTS_OF_TWO = {"mul", "matmul", "bmm"}
GATES = {"sigmoid", "hardsigmoid", "softmax", "_softmax", "tanh", "gelu", "silu", "hardswish", "softplus"}
