"""Lower linear operations of the graph to calls of `Operator` modules."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.operator import (
    TYPE_NAMES,
    Addition,
    AveragePool,
    Convolution,
    Linear,
    Operator,
    OperatorType,
    Scale,
    TransposedConvolution,
    swap_channels,
)
from patterns.tracing.aten_graph import AtenGraph, arguments, get_constant, is_activation, opname, per_dimension, source
from patterns.tracing.average_pools import AVERAGE_POOLS
from patterns.tracing.canonicalize import weighted_sum
from patterns.tracing.scales import find_carriers

aten = torch.ops.aten


def lower_operations(graph: AtenGraph) -> None:
    """Replace each linear operation by a call of an `Operator`; a parameter that is used twice gives one operator."""
    names: dict[Any, str] = {}  # operator names by type, options and parameters
    operators: dict[str, Operator] = {}
    orders: Counter[str] = Counter()
    carriers = find_carriers(graph.fx)
    for node in list(graph.fx.nodes):
        lower = LOWERINGS.get(node.target) if node in carriers and node.op == "call_function" else None
        operation = lower(graph, node) if lower else None
        if operation is None:
            continue
        identity = (operation.operator_type, operation.key) if operation.key else node
        if identity not in names:
            name = operation.name
            if name is None:
                kind = TYPE_NAMES[type(operation.operator_type)]
                name = f"{kind}.{orders[kind]}"
                orders[kind] += 1
            elif name in operators:
                name = f"{name}.{node.name}"
            names[identity] = name
            operators[name] = Operator(
                name, operation.operator_type, operation.weight, operation.bias, (), (), source(node)
            )
        with graph.fx.inserting_before(node):
            call = graph.fx.call_module(names[identity], operation.inputs)
        call.meta = dict(node.meta)
        if isinstance(call.meta["val"], tuple):  # batch norm also returns its statistics
            call.meta["val"] = call.meta["val"][0]
            for user in list(node.users):
                graph.replace(user, call)
        graph.replace(node, call)
    rename_constants(graph)
    graph.attributes.update(operators)


def rename_constants(graph: AtenGraph) -> None:
    """Rename the remaining constants, so that no constant lies inside an operator of the same name."""
    graph.fx.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})
    for node in graph.fx.find_nodes(op="get_attr"):
        target = f"constants.{node.name}"
        graph.attributes[target] = graph.attributes[str(node.target)]
        node.target = target


@dataclass(frozen=True)
class LinearOperation:
    """A linear operation that was read from a node.

    Attributes:
        operator_type: The type of the operation.
        weight: The weight, K first.
        bias: The bias, shape (K,).
        inputs: The nodes of the inputs.
        name: Name of the operator; None names it by its type and order.
        key: Names of the parameters. Operations of one type with the same key are one operator; an empty key is unique.
    """

    operator_type: OperatorType
    weight: Tensor
    bias: Tensor | None
    inputs: tuple[Node, ...]
    name: str | None = None
    key: tuple[str, ...] = ()


def lower_convolution(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return the operation of a convolution; None if its weight or bias is not constant."""
    a = arguments(node)
    weight = get_constant(graph, a["weight"])
    if weight is None or (a["bias"] is not None and get_constant(graph, a["bias"]) is None):
        return None
    dims = weight.dim() - 2
    stride, dilation = per_dimension(a["stride"], dims), per_dimension(a["dilation"], dims)
    x = a["input"]
    if a["padding"] == "valid":
        padding = (0,) * dims
    elif a["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # an even kernel needs one more on the right
            x = graph.call(node, aten.constant_pad_nd.default, x, [n for t in reversed(total) for n in (0, t % 2)])
    else:
        padding = per_dimension(a["padding"], dims)
    return parametric_operation(graph, node, a, Convolution(stride, padding, dilation, a["groups"]), x)


def lower_transposed_convolution(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return the operation of a transposed convolution; None if its weight or bias is not constant."""
    a = arguments(node)
    weight = get_constant(graph, a["weight"])
    if weight is None or (a["bias"] is not None and get_constant(graph, a["bias"]) is None):
        return None
    stride, padding, extra, dilation = (
        per_dimension(a[k], weight.dim() - 2) for k in ("stride", "padding", "output_padding", "dilation")
    )
    kind = TransposedConvolution(stride, padding, extra, dilation, a["groups"])
    return replace(parametric_operation(graph, node, a, kind, a["input"]), weight=swap_channels(weight, a["groups"]))


def lower_linear(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return the operation of a linear layer; None if its weight is not constant."""
    a = arguments(node)
    if get_constant(graph, a["weight"]) is None:
        return None
    return parametric_operation(graph, node, a, Linear(), a["input"])


def lower_matmul(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return the operation of a product with a constant matrix, whose columns are the neurons, or None."""
    x, matrix = node.args
    weight = get_constant(graph, matrix)  # type: ignore[arg-type]
    if weight is None or weight.dim() != 2:
        return None
    name = str(matrix.target)  # type: ignore[union-attr]
    return LinearOperation(Linear(), weight.T, None, (x,), derive_name(node, name), (name, opname(node)))  # type: ignore[arg-type]


def parametric_operation(
    graph: AtenGraph, node: Node, a: dict[str, Any], kind: OperatorType, x: Node
) -> LinearOperation:
    """Return the operation of a node whose weight and bias are parameters."""
    names = tuple(n.target for n in (a["weight"], a["bias"]) if n is not None)
    bias = None if a["bias"] is None else graph.attributes[a["bias"].target]
    return LinearOperation(kind, graph.attributes[names[0]], bias, (x,), derive_name(node, names[0]), names)


def lower_batch_norm(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return a batch norm in inference mode as a scale with a bias; None if its statistics are not constant."""
    a = arguments(node)
    mean, var = get_constant(graph, a["running_mean"]), get_constant(graph, a["running_var"])
    if mean is None or var is None:
        return None
    scale = (var + a["eps"]).rsqrt()
    if a["weight"] is not None:
        scale = scale * graph.attributes[a["weight"].target]
    bias = -mean * scale
    if a["bias"] is not None:
        bias = bias + graph.attributes[a["bias"].target]
    names = tuple(a[k].target for k in ("weight", "bias", "running_mean", "running_var") if a[k] is not None)
    return LinearOperation(Scale(), scale[:, None], bias, (a["input"],), derive_name(node, names[0]), names)


def lower_product(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return a product or quotient with a constant as neurons with one input, one for each number of the constant."""
    a = arguments(node)
    x, constant = a["self"], a.get("other", -1.0)
    if not is_activation(x) and opname(node) == "mul":
        x, constant = constant, x
    if not is_activation(x) or is_activation(constant):
        return None
    name = str(constant.target) if isinstance(constant, Node) else None
    factor = constant if name is None else graph.attributes.get(name)
    if isinstance(factor, Node):  # the factor is a size
        return None
    value, shape = x.meta["val"], node.meta["val"].shape
    factor = torch.as_tensor(factor, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
    if opname(node) == "div":
        factor = 1 / factor
    wide = [len(shape) - factor.dim() + d for d, size in enumerate(factor.shape) if size != 1] or [x.meta["axis"]]
    first, last = wide[0], wide[-1]
    if len(shape) != value.dim() or first < 1 or any(not isinstance(s, int) for s in shape[first : last + 1]):
        return None
    if value.shape != shape:
        x = graph.call(node, aten.expand.default, x, [-1 if s == t else s for s, t in zip(shape, value.shape)])
    if first < last:
        x = flatten_input(graph, node, x, first, last)
    once = tuple(slice(None) if first <= d <= last else 0 for d in range(len(shape)))
    weight = factor.expand([s if isinstance(s, int) else 1 for s in shape])[once].reshape(-1, 1).to(value.dtype)
    if name is None or name.startswith("constants."):
        return LinearOperation(Scale(first), weight, None, (x,))
    return LinearOperation(Scale(first), weight, None, (x,), derive_name(node, name), (name, opname(node)))


def flatten_input(graph: AtenGraph, node: Node, x: Node, first: int, last: int) -> Node:
    """Merge dimensions of a node's input, and restore the shape for the node's users.

    Args:
        graph: The graph, which is changed in place.
        node: The node.
        x: Its input.
        first: The first dimension to merge.
        last: The last dimension to merge.

    Returns:
        The node of the merged input.
    """
    flat = graph.call(node, aten.flatten.using_ints, x, first, last)
    with graph.fx.inserting_after(node):
        restored = graph.fx.call_function(aten.unflatten.int, (node, first, node.meta["val"].shape[first : last + 1]))
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    restored.meta, node.meta = node.meta, node.meta | {"val": flat.meta["val"]}
    return flat


def lower_addition(graph: AtenGraph, node: Node) -> LinearOperation | None:
    """Return the operation of a weighted sum; None if its channels are not in a dimension of fixed size."""
    coefficients, *inputs = node.args
    value, axis = node.meta["val"], node.meta["axis"]
    if axis < 1 or not isinstance(value.shape[axis], int):
        return None
    weight = torch.tensor(coefficients, dtype=value.dtype, device=value.device)
    kind = Addition(tuple(coefficients), axis)  # type: ignore[arg-type]
    return LinearOperation(kind, weight.repeat(value.shape[axis], 1), None, tuple(inputs))  # type: ignore[arg-type]


def lower_average_pool(graph: AtenGraph, node: Node) -> LinearOperation:
    """Return the operation of an average pool."""
    a = arguments(node)
    value = node.meta["val"]
    dims = len(value.shape) - 2
    kernel, stride, padding = (per_dimension(a[k], dims) for k in ("kernel_size", "stride", "padding"))
    weight = torch.ones((value.shape[1], 1, *kernel), dtype=value.dtype, device=value.device)
    return LinearOperation(
        AveragePool(kernel, stride or kernel, padding),
        weight / weight[0].numel(),
        None,
        (node.args[0],),  # type: ignore[arg-type]
    )


PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
LOWERINGS: dict[Any, Callable[[AtenGraph, Node], LinearOperation | None]] = {
    aten.conv1d.default: lower_convolution,
    aten.conv2d.default: lower_convolution,
    aten.conv3d.default: lower_convolution,
    aten.conv1d.padding: lower_convolution,
    aten.conv2d.padding: lower_convolution,
    aten.conv3d.padding: lower_convolution,
    aten.linear.default: lower_linear,
    aten.matmul.default: lower_matmul,
    aten.mm.default: lower_matmul,
    aten._native_batch_norm_legit_no_training.default: lower_batch_norm,
    aten.conv_transpose1d.default: lower_transposed_convolution,
    aten.conv_transpose2d.input: lower_transposed_convolution,
    aten.conv_transpose3d.input: lower_transposed_convolution,
    **dict.fromkeys(PRODUCTS, lower_product),
    weighted_sum: lower_addition,
    **dict.fromkeys(AVERAGE_POOLS, lower_average_pool),
}


def derive_name(node: Node, parameter: str) -> str | None:
    """Derive an operator's name from its parameter.

    Returns:
        `features.0` for `features.0.weight`; for a computed weight, the module that calls it; None for all others.
    """
    if parameter.startswith("constants."):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] or None if stack else None
    return re.sub(r"\.(weight|running_mean)$", "", parameter) if "." in parameter else None
