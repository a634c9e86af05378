"""Which calls of the exported graph are linear operations, and which operator each one is."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from patterns.draft import Draft, arguments, constant_of, opname, source, spread
from patterns.operators import KIND_NAMES, Addition, AveragePool, Convolution, Kind, Linear, Operator, Scale

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
            node.replace_all_uses_with(replacement)
            draft.graph.erase_node(node)


def pool_of_mean(draft: Draft, node: Node) -> Node | None:
    """A mean over all positions of (N, C, *positions) as pooling with one window."""
    a = arguments(node)
    x: Node = a["self"]
    shape = x.meta["val"].shape
    dims = sorted(d % len(shape) for d in a.get("dim") or range(len(shape)))
    if dims != list(range(2, len(shape))) or not 3 <= len(shape) <= 5:
        return None
    pooled = draft.call(node, AVERAGE_POOLS[len(dims) - 1], x, list(shape[2:]))
    pooled.meta["val"] = x.meta["val"].mean(dims, keepdim=True)
    return pooled if a["keepdim"] else draft.call(node, aten.squeeze.dims, pooled, dims)


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
    pooled = draft.call(node, AVERAGE_POOLS[len(kernel) - 1], x, kernel)
    pooled.meta["val"] = node.meta["val"]
    return pooled


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
    pooled.meta["val"] = node.meta["val"]
    if bool((factor == 1).all()):
        return pooled
    fixed = draft.constant(node, factor.to(value.dtype).to(value.device))
    return draft.call(node, fixed_product, pooled, fixed)


def fixed_product(x: Tensor, factor: Tensor) -> Tensor:
    """Each position times its own constant: linear, but no bank of neurons."""
    return x * factor


def lift_operators(draft: Draft) -> None:
    """Make each linear operation a call of an `Operator`; a parameter used twice is one operator."""
    made: dict[Any, str] = {}  # what shares parameters and options, to its operator's name
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
            elif name in draft.parts:
                name = f"{name}.{node.name}"
            made[identity] = name
            draft.parts[name] = Operator(name, lifted.kind, lifted.weight, lifted.bias, (), (), source(node))
        with draft.graph.inserting_before(node):
            call = draft.graph.call_module(made[identity], lifted.inputs)
        call.meta = dict(node.meta)
        if isinstance(call.meta["val"], tuple):  # batch norm also returns its statistics
            call.meta["val"] = call.meta["val"][0]
            for user in list(node.users):
                user.replace_all_uses_with(call)
                draft.graph.erase_node(user)
        node.replace_all_uses_with(call)
        draft.graph.erase_node(node)


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
            x.meta["val"] = None
    else:
        padding = spread(a["padding"], dims)
    return parametric(draft, node, a, Convolution(stride, padding, dilation, a["groups"]), x)


def lift_linear(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    if constant_of(draft, a["weight"]) is None:
        return None
    return parametric(draft, node, a, Linear(), a["input"])


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


def lift_addition(draft: Draft, node: Node) -> Lifted | None:
    a = arguments(node)
    terms = (a["self"], a["other"])
    if any(not isinstance(t, Node) or t.op == "get_attr" or not isinstance(t.meta["val"], Tensor) for t in terms):
        return None  # a constant term is a bias
    shape = node.meta["val"].shape
    if len(shape) < 2:
        return None
    inputs = []
    for term in terms:
        if term.meta["val"].shape != shape:  # broadcasting made visible, so that every input has the output's shape
            term = draft.call(node, aten.expand.default, term, [-1, *shape[1:]])
        inputs.append(term)
    coefficients = (1.0, float(a["alpha"]))
    weight = torch.tensor(coefficients, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
    return Lifted(Addition(coefficients), weight.repeat(shape[1], 1), None, tuple(inputs))


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


AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
LIFTS: dict[Any, Callable[[Draft, Node], Lifted | None]] = {
    aten.conv1d.default: lift_convolution,
    aten.conv2d.default: lift_convolution,
    aten.conv3d.default: lift_convolution,
    aten.conv1d.padding: lift_convolution,
    aten.conv2d.padding: lift_convolution,
    aten.conv3d.padding: lift_convolution,
    aten.linear.default: lift_linear,
    aten._native_batch_norm_legit_no_training.default: lift_batch_norm,
    aten.add.Tensor: lift_addition,
    **dict.fromkeys(AVERAGE_POOLS, lift_average_pool),
}


def operator_name(node: Node, parameter: str) -> str | None:
    """`features.0` for `features.0.weight`; the module that calls it for a computed weight; None for neither."""
    if parameter.startswith("constants."):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] or None if stack else None
    return re.sub(r"\.(weight|running_mean)$", "", parameter) if "." in parameter else None
