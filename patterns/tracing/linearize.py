"""What the user lets pass, made linear: norms with their statistics held still, products with their gates."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.operator import reshape_along
from patterns.tracing.aten_graph import SEEN_THROUGH, AtenGraph, arguments, is_activation, opname

aten = torch.ops.aten


def linearize_operations(graph: AtenGraph, pass_through: Collection[str]) -> None:
    """Linearise what the user lets pass: norms with their statistics held still, products with their gate.

    Of a product of two activations the gate is the factor that comes from a sigmoid, softmax or another
    of GATES, else the one beside a product of activations (the queries of factorised attention), else the
    one that is broadcast, else the second; attention is held in its weights, so that its values alone have
    a gradient.
    """
    for node in list(graph.fx.nodes):
        operation = opname(node)
        if operation not in pass_through:
            continue
        if node.target in DETACHED_NORMS:
            a = arguments(node)
            if a.get("use_input_stats", True):  # else they are numbers of the model
                graph.replace(node, graph.call(node, DETACHED_NORMS[node.target], *a.values()))
        elif operation == "scaled_dot_product_attention":
            node.args = detach_arguments(graph, node, node.args, 0, 1)
        elif operation in PRODUCTS_OF_TWO and all(map(is_activation, node.args[:2])):
            node.args = detach_arguments(graph, node, node.args, find_gate(*node.args[:2]))
        elif operation == "einsum" and len(factors := node.args[1]) == 2 and all(map(is_activation, factors)):
            node.args = node.args[0], detach_arguments(graph, node, factors, find_gate(*factors))


def detach_arguments(graph: AtenGraph, node: Node, args: Sequence[Any], *numbers: int) -> tuple[Any, ...]:
    """A call's arguments, some of them without their gradient."""
    return tuple(graph.call(node, aten.detach.default, a) if i in numbers else a for i, a in enumerate(args))


def find_gate(first: Node, second: Node) -> int:
    """Which of two factors, 0 or 1, is the gate of the other."""
    origins = [find_origin(first), find_origin(second)]
    gates = [opname(node) in GATES for node in origins]
    if gates[0] != gates[1]:
        return gates.index(True)
    products = [opname(node) in PRODUCTS_OF_TWO and all(map(is_activation, node.args[:2])) for node in origins]
    if products[0] != products[1]:
        return products.index(False)
    return int(first.meta["val"].numel() >= second.meta["val"].numel())


def find_origin(node: Node) -> Node:
    """What gave a value that was since changed at most in shape."""
    while opname(node) in SEEN_THROUGH and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


# The norms, linear in x: the statistics that they take of x have no gradient. Their arguments are ATen's.


def detached_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
) -> Tensor:
    y = standardize(x, list(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def detached_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
    mean_square = x.detach().square().mean(list(range(-len(shape), 0)), keepdim=True)
    y = x * torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def detached_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
) -> Tensor:
    y = standardize(x.unflatten(1, (groups, -1)).flatten(2), [-1], eps).view(x.shape)
    y = y if weight is None else y * reshape_along(1, weight, y)
    return y if bias is None else y + reshape_along(1, bias, y)


def detached_instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor | float | bool | None
) -> Tensor:
    *_, eps, cudnn = running
    return detached_group_norm(x, x.shape[1], weight, bias, float(eps), bool(cudnn))  # type: ignore[arg-type]


def standardize(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """x less its mean over some dimensions and divided by its deviation, both held still."""
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
