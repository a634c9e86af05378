"""Which calls of the exported graph are linear operations, and which operator each one is."""

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
    swapped,
)
from patterns.tracing.aten_graph import Draft, arguments, constant_of, is_activation, opname, source, spread
from patterns.tracing.canonicalize import AVERAGE_POOLS, weighted_sum

aten = torch.ops.aten


def lift_operators(draft: Draft) -> None:
    """Make each linear operation a call of an `Operator`; a parameter used twice is one operator."""
    made: dict[Any, str] = {}  # what shares parameters and options, to its operator's name
    operators: dict[str, Operator] = {}
    orders: Counter[str] = Counter()
    for node in list(draft.graph.nodes):
        lift = LIFTS.get(node.target) if node.op == "call_function" else None
        lifted = lift(draft, node) if lift else None
        if lifted is None:
            continue
        identity = (lifted.operator_type, lifted.key) if lifted.key else node
        if identity not in made:
            name = lifted.name
            if name is None:
                kind = TYPE_NAMES[type(lifted.operator_type)]
                name = f"{kind}.{orders[kind]}"
                orders[kind] += 1
            elif name in operators:
                name = f"{name}.{node.name}"
            made[identity] = name
            operators[name] = Operator(name, lifted.operator_type, lifted.weight, lifted.bias, (), (), source(node))
        with draft.graph.inserting_before(node):
            call = draft.graph.call_module(made[identity], lifted.inputs)
        call.meta = dict(node.meta)
        if isinstance(call.meta["val"], tuple):  # batch norm also returns its statistics
            call.meta["val"] = call.meta["val"][0]
            for user in list(node.users):
                draft.replace(user, call)
        draft.replace(node, call)
    set_constants_apart(draft)
    draft.parts.update(operators)


def set_constants_apart(draft: Draft) -> None:
    """Name the constants left in the graph so that none lies inside an operator of its name."""
    draft.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})
    for node in draft.graph.find_nodes(op="get_attr"):
        target = f"constants.{node.name}"
        draft.parts[target] = draft.parts[str(node.target)]
        node.target = target


@dataclass(frozen=True)
class Lifted:
    """A linear operation read off a node. `key` tells apart what shares parameters from what does not."""

    operator_type: OperatorType
    weight: Tensor
    bias: Tensor | None
    inputs: tuple[Node, ...]
    name: str | None = None
    key: tuple[str, ...] = ()


def lift_convolution(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    weight = constant_of(draft, a["weight"])
    if weight is None or (a["bias"] is not None and constant_of(draft, a["bias"]) is None):
        return None
    dims = weight.dim() - 2
    stride, dilation = spread(a["stride"], dims), spread(a["dilation"], dims)
    x = a["input"]
    if a["padding"] == "valid":
        padding = (0,) * dims
    elif a["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # an even kernel pads one more on the right
            x = draft.call(node, aten.constant_pad_nd.default, x, [n for t in reversed(total) for n in (0, t % 2)])
    else:
        padding = spread(a["padding"], dims)
    return parametric(draft, node, a, Convolution(stride, padding, dilation, a["groups"]), x)


def lift_transposed(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    weight = constant_of(draft, a["weight"])
    if weight is None or (a["bias"] is not None and constant_of(draft, a["bias"]) is None):
        return None
    stride, padding, extra, dilation = (
        spread(a[k], weight.dim() - 2) for k in ("stride", "padding", "output_padding", "dilation")
    )
    kind = TransposedConvolution(stride, padding, extra, dilation, a["groups"])
    return replace(parametric(draft, node, a, kind, a["input"]), weight=swapped(weight, a["groups"]))


def lift_linear(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    if constant_of(draft, a["weight"]) is None:
        return None
    return parametric(draft, node, a, Linear(), a["input"])


def lift_matmul(draft: Draft, node: Node) -> Lifted | None:
    """A value times a constant matrix, whose columns are the neurons."""
    x, matrix = node.args
    weight = constant_of(draft, matrix)  # type: ignore[arg-type]
    if weight is None or weight.dim() != 2:
        return None
    name = str(matrix.target)  # type: ignore[union-attr]
    return Lifted(Linear(), weight.T, None, (x,), operator_name(node, name), (name, opname(node)))  # type: ignore[arg-type]


def parametric(draft: Draft, node: Node, a: dict[str, Any], kind: OperatorType, x: Node) -> Lifted:
    names = tuple(n.target for n in (a["weight"], a["bias"]) if n is not None)
    bias = None if a["bias"] is None else draft.parts[a["bias"].target]
    return Lifted(kind, draft.parts[names[0]], bias, (x,), operator_name(node, names[0]), names)


def lift_batch_norm(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    mean, var = constant_of(draft, a["running_mean"]), constant_of(draft, a["running_var"])
    if mean is None or var is None:
        return None
    scale = (var + a["eps"]).rsqrt()
    if a["weight"] is not None:
        scale = scale * draft.parts[a["weight"].target]
    bias = -mean * scale
    if a["bias"] is not None:
        bias = bias + draft.parts[a["bias"].target]
    names = tuple(a[k].target for k in ("weight", "bias", "running_mean", "running_var") if a[k] is not None)
    return Lifted(Scale(), scale[:, None], bias, (a["input"],), operator_name(node, names[0]), names)


def lift_product(draft: Draft, node: Node) -> Lifted | None:
    """A value times or divided by a constant: a neuron of one input for each number of the constant."""
    a = arguments(node)
    x, constant = a["self"], a.get("other", -1.0)
    if not is_activation(x) and opname(node) == "mul":
        x, constant = constant, x
    if not is_activation(x) or is_activation(constant):
        return None
    name = str(constant.target) if isinstance(constant, Node) else None
    factor = constant if name is None else draft.parts.get(name)
    if isinstance(factor, Node):  # a size
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
        x = draft.call(node, aten.expand.default, x, [-1 if s == t else s for s, t in zip(shape, value.shape)])
    if first < last:
        x = flattened(draft, node, x, first, last)
    once = tuple(slice(None) if first <= d <= last else 0 for d in range(len(shape)))
    weight = factor.expand([s if isinstance(s, int) else 1 for s in shape])[once].reshape(-1, 1).to(value.dtype)
    if name is None or name.startswith("constants."):
        return Lifted(Scale(first), weight, None, (x,))
    return Lifted(Scale(first), weight, None, (x,), operator_name(node, name), (name, opname(node)))


def flattened(draft: Draft, node: Node, x: Node, first: int, last: int) -> Node:
    """A node's input with some dimensions as one; the node's users get the shape back that they know."""
    flat = draft.call(node, aten.flatten.using_ints, x, first, last)
    with draft.graph.inserting_after(node):
        restored = draft.graph.call_function(
            aten.unflatten.int, (node, first, node.meta["val"].shape[first : last + 1])
        )
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    restored.meta, node.meta = node.meta, node.meta | {"val": flat.meta["val"]}
    return flat


def lift_addition(draft: Draft, node: Node) -> Lifted | None:
    coefficients, *inputs = node.args
    value, axis = node.meta["val"], node.meta["axis"]
    if axis < 1 or not isinstance(value.shape[axis], int):
        return None
    weight = torch.tensor(coefficients, dtype=value.dtype, device=value.device)
    kind = Addition(tuple(coefficients), axis)  # type: ignore[arg-type]
    return Lifted(kind, weight.repeat(value.shape[axis], 1), None, tuple(inputs))  # type: ignore[arg-type]


def lift_average_pool(draft: Draft, node: Node) -> Lifted:
    a = arguments(node)
    value = node.meta["val"]
    dims = len(value.shape) - 2
    kernel, stride, padding = (spread(a[k], dims) for k in ("kernel_size", "stride", "padding"))
    weight = torch.ones((value.shape[1], 1, *kernel), dtype=value.dtype, device=value.device)
    return Lifted(
        AveragePool(kernel, stride or kernel, padding),
        weight / weight[0].numel(),
        None,
        (node.args[0],),  # type: ignore[arg-type]
    )


PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
LIFTS: dict[Any, Callable[[Draft, Node], Lifted | None]] = {
    aten.conv1d.default: lift_convolution,
    aten.conv2d.default: lift_convolution,
    aten.conv3d.default: lift_convolution,
    aten.conv1d.padding: lift_convolution,
    aten.conv2d.padding: lift_convolution,
    aten.conv3d.padding: lift_convolution,
    aten.linear.default: lift_linear,
    aten.matmul.default: lift_matmul,
    aten.mm.default: lift_matmul,
    aten._native_batch_norm_legit_no_training.default: lift_batch_norm,
    aten.conv_transpose1d.default: lift_transposed,
    aten.conv_transpose2d.input: lift_transposed,
    aten.conv_transpose3d.input: lift_transposed,
    **dict.fromkeys(PRODUCTS, lift_product),
    weighted_sum: lift_addition,
    **dict.fromkeys(AVERAGE_POOLS, lift_average_pool),
}


def operator_name(node: Node, parameter: str) -> str | None:
    """`features.0` for `features.0.weight`; the module that calls it for a computed weight; None for neither."""
    if parameter.startswith("constants."):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] or None if stack else None
    return re.sub(r"\.(weight|running_mean)$", "", parameter) if "." in parameter else None
