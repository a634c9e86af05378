"""Fold constants of the graph, and batch norms into the operators before them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from patterns.operators.axes import reshape_along
from patterns.operators.copies import with_weights
from patterns.operators.operator import Convolution, Linear, Scale, TransposedConvolution
from patterns.tracing.aten_graph import AtenGraph, follow_axis, opname

FILLED = {"new_zeros", "new_ones", "new_full"}


def fold_constants(graph: AtenGraph) -> None:
    """Evaluate operations that do not depend on the input's values (standardized weights, position tables, masks)."""
    values: dict[Node, Any] = {}
    for node in list(graph.fx.nodes):
        if node.op == "get_attr":
            values[node] = graph.attributes[node.target]
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            with torch.no_grad():
                values[node] = node.target(
                    *resolve_arguments(node.args, values), **resolve_arguments(node.kwargs, values)
                )
        elif opname(node) in FILLED and len(node.all_input_nodes) == 1:  # reads only dtype and device of its input
            like = torch.empty(0, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            values[node] = node.target(like, *node.args[1:], **node.kwargs)
        if node.op == "call_function" and isinstance(values.get(node), Tensor):
            constant = graph.constant(node, values[node])
            constant.meta = dict(node.meta)
            values[constant] = values[node]
            node.replace_all_uses_with(constant)
    graph.fx.eliminate_dead_code()


def fold_scales(graph: AtenGraph) -> None:
    """Fold each batch norm into the convolution or linear operator before it, if nothing else reads that operator."""
    calls = Counter(node.target for node in graph.fx.nodes if node.op == "call_module")
    for node in list(graph.fx.nodes):
        if node.op != "call_module" or not isinstance(graph.attributes[str(node.target)].operator_type, Scale):
            continue
        scale = graph.attributes[str(node.target)]
        before, axis = find_preceding_operator(graph, node)
        if before is None or axis != scale.operator_type.axis % node.meta["val"].dim():
            continue
        linear = graph.attributes[str(before.target)]
        if (
            not isinstance(linear.operator_type, Convolution | TransposedConvolution | Linear)
            or calls[node.target] > 1
            or calls[before.target] > 1
        ):
            continue
        factor = scale.weight[:, 0].double()
        weight = linear.weight.double() * reshape_along(0, factor, linear.weight)
        bias = torch.zeros_like(factor) if linear.bias is None else linear.bias.double() * factor
        if scale.bias is not None:
            bias = bias + scale.bias.double()
        dtype = linear.weight.dtype
        graph.attributes[str(before.target)] = with_weights(linear, weight.to(dtype), bias.to(dtype))
        graph.replace(node, node.args[0])


def find_preceding_operator(graph: AtenGraph, node: Node) -> tuple[Node | None, int | None]:
    """Find the operator call whose output only this node reads, perhaps in another shape.

    Returns:
        The call, and the dimension in which its neurons arrive at the node. None for the call if another node reads the
        output; None for the dimension if the neurons are merged with other dimensions.
    """
    path: list[Node] = []
    before: Any = node.args[0]
    while before.op == "call_function" and len(find_readers(before)) == 1 and before.args:
        path.append(before)
        before = before.args[0]
        if not isinstance(before, Node):
            return None, None
    if before.op != "call_module" or len(find_readers(before)) > 1:
        return None, None
    axis = graph.attributes[str(before.target)].operator_type.axis % before.meta["val"].dim()
    for change in reversed(path):
        axis = None if axis is None else follow_axis(change, axis)
    return before, axis


def find_readers(node: Node) -> list[Node]:
    """Return the users of a value's elements, as opposed to users of its sizes."""
    return [user for user in node.users if opname(user) != "sym_size"]


def resolve_arguments(args: Any, values: dict[Node, Any]) -> Any:
    """Replace the nodes in arguments by their values."""
    return map_arg(args, lambda n: values[n])
