"""Canonicalize average pools: rewrite them as pooling with one window size and without special cases at the borders."""

from math import lcm, prod

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from patterns.tracing.aten_graph import AtenGraph, arguments, opname, per_dimension

aten = torch.ops.aten
AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


def canonicalize_average_pools(graph: AtenGraph) -> None:
    """Rewrite every average over positions as pooling with windows of one size.

    Adaptive pooling with unequal windows first gathers each window into windows of equal size. If borders average fewer
    values (ceil mode, padding not counted), a constant factor follows the pooling.
    """
    for node in list(graph.fx.nodes):
        replacement = None
        if node.target in (aten.mean.dim, aten.sum.dim_IntList):
            replacement = rewrite_mean(graph, node)
        elif opname(node) in {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}:
            replacement = rewrite_adaptive_pool(graph, node)
        elif opname(node) in {"avg_pool1d", "avg_pool2d", "avg_pool3d"}:
            replacement = rewrite_average_pool(graph, node)
        if replacement is not None:
            graph.replace(node, replacement)


def rewrite_mean(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite a mean over any dimensions except the batch as pooling with one window.

    A sum of k values becomes the mean of k · value. The remaining dimensions come first, and the averaged dimensions
    last. The channels come before all others. If the channels are averaged themselves, the first remaining dimension
    takes their role.
    """
    a = arguments(node)
    x: Node = a["self"]
    shape = x.meta["val"].shape
    dims = sorted(d % len(shape) for d in a.get("dim") or range(len(shape)))
    kept = [d for d in range(1, len(shape)) if d not in dims]
    if 0 in dims or not kept or not dims or any(not isinstance(shape[d], int) for d in dims):
        return None
    channels = x.meta["axis"] if x.meta["axis"] in kept else kept[0]
    if opname(node) == "sum":  # the factor comes before the pooling, so that the pooling keeps the gate that follows
        x = graph.call(node, aten.mul.Tensor, x, float(prod(shape[d] for d in dims)))
    others = [d for d in kept if d != channels]
    order = [0, channels, *others, *dims]
    if order != sorted(order):
        x = graph.call(node, aten.permute.default, x, order)
    if others or len(dims) > 3:  # pooling takes the dimensions (N, C, others, averaged)
        x = graph.call(node, aten.flatten.using_ints, x, 2 + len(others), -1)
        x = graph.call(node, aten.flatten.using_ints, x, 2, 1 + len(others)) if len(others) > 1 else x
        kernel = [1] * bool(others) + [prod(shape[d] for d in dims)]
    else:
        kernel = [shape[d] for d in dims]
    x = graph.call(node, AVERAGE_POOLS[len(kernel) - 1], x, kernel)
    x = graph.call(node, aten.squeeze.dims, x, list(range(2 + bool(others), 2 + len(kernel))))
    if len(others) > 1:
        x = graph.call(node, aten.unflatten.int, x, 2, [shape[d] for d in others])
    order = [0, *(1 + [channels, *others].index(d) for d in kept)]
    if order != sorted(order):
        x = graph.call(node, aten.permute.default, x, order)
    for d in dims if a["keepdim"] else ():
        x = graph.call(node, aten.unsqueeze.default, x, d)
    return x


def rewrite_adaptive_pool(graph: AtenGraph, node: Node) -> Node:
    """Rewrite adaptive pooling as pooling with windows of one size."""
    x: Node = node.args[0]  # type: ignore[assignment]
    value = x.meta["val"]
    sizes, outputs = value.shape[2:], node.meta["val"].shape[2:]
    kernel = []
    for dim, (size, out) in enumerate(zip(sizes, outputs), start=2):
        windows = [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        window = lcm(*map(len, windows))
        if size % out:
            # Each window is repeated to the common length: the mean stays the same, and all weights are 1/k.
            taps = [t for w in windows for t in w for _ in range(window // len(w))]
            index = graph.constant(node, torch.tensor(taps, device=value.device))
            x = graph.call(node, aten.index_select.default, x, dim, index)
        kernel.append(window)
    if all(k == 1 for k in kernel):
        return x
    return graph.call(node, AVERAGE_POOLS[len(kernel) - 1], x, kernel)


def rewrite_average_pool(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite pooling whose border windows average fewer values as padded pooling times a constant.

    The constant keeps its usual gradient: the weights of a border window are larger by this factor, so the share of the
    pattern beyond the border is distributed over the rest of the window. A divisor override becomes a scale.
    """
    a = arguments(node)
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    dims = len(value.shape) - 2
    kernel, stride, padding = (per_dimension(a[k], dims) for k in ("kernel_size", "stride", "padding"))
    stride = stride or kernel
    sizes, outputs = value.shape[2:], node.meta["val"].shape[2:]
    # Ceil mode lets the last window hang over the padded input by this much.
    over = [(o - 1) * s + k - n - 2 * p for n, o, k, s, p in zip(sizes, outputs, kernel, stride, padding)]
    if max(over) <= 0 and a["count_include_pad"] and a.get("divisor_override") is None:
        return None
    # F.pad counts from the last dimension. Windows do not read values that are left over on the right.
    pads = [n for o, p in reversed(list(zip(over, padding))) for n in (p, p + max(o, 0))]
    pool, plain = AVERAGE_POOLS[dims - 1], (kernel, stride)
    padded = graph.call(node, aten.constant_pad_nd.default, node.args[0], pads)
    if a.get("divisor_override") is not None:
        scaled = graph.call(node, aten.mul.Tensor, padded, prod(kernel) / a["divisor_override"])
        return graph.call(node, pool, scaled, *plain)
    ones = torch.ones((1, 1, *sizes), dtype=torch.float64)
    factor = node.target(ones, *node.args[1:], **node.kwargs) / pool(F.pad(ones, pads), *plain)  # type: ignore[operator]
    pooled = graph.call(node, pool, padded, *plain)
    if bool((factor == 1).all()):
        return pooled
    fixed = graph.constant(node, factor.to(value.dtype).to(value.device))
    return graph.call(node, fixed_product, pooled, fixed)


def fixed_product(x: Tensor, factor: Tensor) -> Tensor:
    """Return each position times its own constant."""
    return x * factor
