"""Which calls of the exported graph are linear operations, and which operator each one is."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from patterns.draft import Draft, arguments, constant_of, is_activation, opname, source, spread
from patterns.operators import (
    KIND_NAMES,
    Addition,
    AveragePool,
    Convolution,
    Kind,
    Linear,
    Operator,
    Scale,
    TransposedConvolution,
    swapped,
)

aten = torch.ops.aten


def unify_pooling(draft: Draft) -> None:
    """Bring every average over positions to pooling with one window size and no border cases.

    Adaptive pooling with unequal windows gathers each window into equal ones first; borders that
    average fewer values (ceil mode, padding left out) become a constant factor behind the pooling.
    """
    for node in list(draft.graph.nodes):
        replacement = None
        if node.target in (aten.mean.dim, aten.mean.default) and node.op == "call_function":
            replacement = pool_of_mean(draft, node)
        elif opname(node) in {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}:
            replacement = pool_of_adaptive(draft, node)
        elif opname(node) in {"avg_pool1d", "avg_pool2d", "avg_pool3d"}:
            replacement = pool_of_ragged(draft, node)
        if replacement is not None:
            draft.replace(node, replacement)


def pool_of_mean(draft: Draft, node: Node) -> Node | None:
    """A mean over any dimensions but the batch as pooling with one window.

    The dimensions kept come first, with the channels before all (where they are averaged themselves,
    the first one kept counts as channels), and those averaged last.
    """
    a = arguments(node)
    x: Node = a["self"]
    shape = x.meta["val"].shape
    dims = sorted(d % len(shape) for d in a.get("dim") or range(len(shape)))
    kept = [d for d in range(1, len(shape)) if d not in dims]
    if 0 in dims or not kept or not dims or any(not isinstance(shape[d], int) for d in dims):
        return None
    channels = x.meta["axis"] if x.meta["axis"] in kept else kept[0]
    others = [d for d in kept if d != channels]
    order = [0, channels, *others, *dims]
    if order != sorted(order):
        x = draft.call(node, aten.permute.default, x, order)
    if others or len(dims) > 3:  # as many dimensions as pooling takes: (N, C, others, averaged)
        x = draft.call(node, aten.flatten.using_ints, x, 2 + len(others), -1)
        x = draft.call(node, aten.flatten.using_ints, x, 2, 1 + len(others)) if len(others) > 1 else x
        kernel = [1] * bool(others) + [prod(shape[d] for d in dims)]
    else:
        kernel = [shape[d] for d in dims]
    x = draft.call(node, AVERAGE_POOLS[len(kernel) - 1], x, kernel)
    x = draft.call(node, aten.squeeze.dims, x, list(range(2 + bool(others), 2 + len(kernel))))
    if len(others) > 1:
        x = draft.call(node, aten.unflatten.int, x, 2, [shape[d] for d in others])
    order = [0, *(1 + [channels, *others].index(d) for d in kept)]
    if order != sorted(order):
        x = draft.call(node, aten.permute.default, x, order)
    for d in dims if a["keepdim"] else ():
        x = draft.call(node, aten.unsqueeze.default, x, d)
    return x


def pool_of_adaptive(draft: Draft, node: Node) -> Node:
    """Adaptive pooling as pooling of equal windows."""
    x: Node = node.args[0]  # type: ignore[assignment]
    value = x.meta["val"]
    sizes, outputs = value.shape[2:], node.meta["val"].shape[2:]
    kernel = []
    for dim, (size, out) in enumerate(zip(sizes, outputs), start=2):
        windows = [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        window = lcm(*map(len, windows))
        if size % out:
            # Each window repeated to the common length: the same mean, now with one weight 1/k everywhere.
            taps = [t for w in windows for t in w for _ in range(window // len(w))]
            index = draft.constant(node, torch.tensor(taps, device=value.device))
            x = draft.call(node, aten.index_select.default, x, dim, index)
        kernel.append(window)
    if all(k == 1 for k in kernel):
        return x
    return draft.call(node, AVERAGE_POOLS[len(kernel) - 1], x, kernel)


def pool_of_ragged(draft: Draft, node: Node) -> Node | None:
    """Pooling whose border windows average fewer values, as padded pooling times a constant."""
    a = arguments(node)
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    dims = len(value.shape) - 2
    kernel, stride, padding = (spread(a[k], dims) for k in ("kernel_size", "stride", "padding"))
    stride = stride or kernel
    sizes, outputs = value.shape[2:], node.meta["val"].shape[2:]
    # Ceil mode lets the last window hang over the padded input by this much.
    over = [(o - 1) * s + k - n - 2 * p for n, o, k, s, p in zip(sizes, outputs, kernel, stride, padding)]
    if max(over) <= 0 and a["count_include_pad"] and a.get("divisor_override") is None:
        return None
    # F.pad counts from the last dimension; what is left over on the right is not read.
    pads = [n for o, p in reversed(list(zip(over, padding))) for n in (p, p + max(o, 0))]
    pool, plain = AVERAGE_POOLS[dims - 1], (kernel, stride)
    ones = torch.ones((1, 1, *sizes), dtype=torch.float64)
    factor = node.target(ones, *node.args[1:], **node.kwargs) / pool(F.pad(ones, pads), *plain)  # type: ignore[operator]
    padded = draft.call(node, aten.constant_pad_nd.default, node.args[0], pads)
    pooled = draft.call(node, pool, padded, *plain)
    if bool((factor == 1).all()):
        return pooled
    fixed = draft.constant(node, factor.to(value.dtype).to(value.device))
    return draft.call(node, fixed_product, pooled, fixed)


def part_sum_and_product(draft: Draft, node: Node) -> None:
    """constant + x · constant as a product and a sum."""
    a = arguments(node)
    if a["value"] == 1 and [is_activation(a[k]) for k in ("self", "tensor1", "tensor2")].count(True) == 1:
        product = draft.call(node, aten.mul.Tensor, a["tensor1"], a["tensor2"])
        draft.replace(node, draft.call(node, aten.add.Tensor, a["self"], product))


def fixed_product(x: Tensor, factor: Tensor) -> Tensor:
    """Each position times its own constant: linear, but no bank of neurons."""
    return x * factor


def weighted_sum(coefficients: list[float], *inputs: Tensor) -> Tensor:
    """Σ coefficient · input, over inputs of one shape."""
    return Addition(tuple(coefficients)).forward(inputs, inputs[0], None)


def unify_sums(draft: Draft) -> None:
    """Bring sums and differences of activations, in all spellings, to one call for as many terms as they have."""
    for node in list(draft.graph.nodes):
        if node.target in (aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor):
            turn_difference(draft, node)
        if node.target is aten.addcmul.default:
            part_sum_and_product(draft, node)
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or not all(map(is_activation, node.args[:2])):
            continue
        a, shape = arguments(node), node.meta["val"].shape
        coefficients, inputs = [], []
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        for term, factor in ((a["self"], 1.0), (a["other"], sign * float(a["alpha"]))):
            if term.target is weighted_sum and len(term.users) == 1 and term.meta["val"].shape == shape:
                coefficients += [factor * c for c in term.args[0]]
                inputs += term.args[1:]
                continue
            if term.meta["val"].shape != shape:  # broadcasting made visible: every input has the output's shape
                lacking = len(shape) - term.meta["val"].dim()
                if lacking:
                    term = draft.call(node, aten.unflatten.int, term, 0, [1] * lacking + [-1])
                fixed = [-1 if s == t else s for s, t in zip(shape, term.meta["val"].shape)]
                if any(not isinstance(s, int) for s in fixed):  # the batch itself: as large as the other term's
                    fixed[0] = draft.call(node, aten.sym_size.int, a["other" if term is a["self"] else "self"], 0)
                term = draft.call(node, aten.expand.default, term, fixed)
            coefficients.append(factor)
            inputs.append(term)
        draft.replace(node, draft.call(node, weighted_sum, coefficients, *inputs))


def turn_difference(draft: Draft, node: Node) -> None:
    """constant - x as the constant added to -x."""
    a = arguments(node)
    constant, x = (a["self"], a["other"]) if node.target is aten.sub.Tensor else (a["other"], a["self"])
    if not is_activation(x) or is_activation(constant):
        return
    turned = draft.call(node, aten.mul.Tensor, x, -a["alpha"])
    draft.replace(node, draft.call(node, aten.add.Tensor, turned, constant))


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
        identity = (lifted.kind, lifted.key) if lifted.key else node
        if identity not in made:
            name = lifted.name
            if name is None:
                kind = KIND_NAMES[type(lifted.kind)]
                name = f"{kind}.{orders[kind]}"
                orders[kind] += 1
            elif name in operators:
                name = f"{name}.{node.name}"
            made[identity] = name
            operators[name] = Operator(name, lifted.kind, lifted.weight, lifted.bias, (), (), source(node))
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

    kind: Kind
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


def parametric(draft: Draft, node: Node, a: dict[str, Any], kind: Kind, x: Node) -> Lifted:
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
    """A value times or divided by a constant; one that is no factor for each channel becomes a fixed product."""
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
    wide = [d - factor.dim() for d, size in enumerate(factor.shape) if size != 1]  # counted from the last
    axis = len(shape) + wide[0] if len(wide) == 1 else x.meta["axis"]
    if len(wide) > 1 or axis < 1 or value.shape != shape or not isinstance(shape[axis], int):
        fixed = draft.constant(node, factor.to(value.dtype))
        draft.replace(node, draft.call(node, fixed_product, x, fixed))
        return None
    weight = factor.to(value.dtype).reshape(-1, 1).expand(shape[axis], 1).clone()
    if name is None or name.startswith("constants."):
        return Lifted(Scale(axis), weight, None, (x,))
    return Lifted(Scale(axis), weight, None, (x,), operator_name(node, name), (name, opname(node)))


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
AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
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
