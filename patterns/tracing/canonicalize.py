"""Operations that are written in several ways, brought to one: what the rest of the tracing reads."""

from collections.abc import Callable
from math import lcm, prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from patterns.operators.operator import Addition
from patterns.tracing.aten_graph import Draft, arguments, constant_of, is_activation, opname, spread

aten = torch.ops.aten
AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


def squeeze_by_dimension(draft: Draft) -> None:
    """Name the dimensions that each squeeze takes away: a batch of one sample keeps its batch dimension."""
    for node in list(draft.graph.nodes):
        if opname(node) == "squeeze":
            x: Any = node.args[0]
            shape = x.meta["val"].shape
            given = arguments(node).get("dim", range(len(shape)))
            dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)] if len(shape) else []
            dims = [d for d in dims if isinstance(shape[d], int) and shape[d] == 1]
            draft.replace(node, draft.call(node, aten.squeeze.dims, x, dims) if dims else x)


def unify_selections(draft: Draft) -> None:
    """Rewrite indexing by constants as index_select, amax as max over one dimension, einsum of one factor as a sum."""
    for node in list(draft.graph.nodes):
        rewrite = SELECTIONS.get(node.target) if node.op == "call_function" else None
        replacement = rewrite(draft, node) if rewrite else None
        if replacement is not None:
            draft.replace(node, replacement)


def selection_of_index(draft: Draft, node: Node) -> Node | None:
    """x[:, [2, 1, 0]]: one constant index of a dimension that is not the batch."""
    a = arguments(node)
    used = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
    if len(used) != 1 or used[0][0] == 0:
        return None
    ((dim, index),) = used
    value = constant_of(draft, index)
    if value is None or value.dim() != 1 or value.dtype == torch.bool:
        return None
    positive = value % a["self"].meta["val"].shape[dim]  # index_select takes no negative ones
    return draft.call(node, aten.index_select.default, a["self"], dim, draft.constant(node, positive))


def maximum_of_dims(draft: Draft, node: Node) -> Node | None:
    """amax over any dimensions but the batch, as the maximum over one, whose gradient goes to one of equal values."""
    a = arguments(node)
    x: Node = a["self"]
    shape = x.meta["val"].shape
    dims = sorted(d % len(shape) for d in a.get("dim") or range(len(shape)))
    if 0 in dims or any(not isinstance(shape[d], int) for d in dims):
        return None
    order = [d for d in range(len(shape)) if d not in dims] + dims
    if order != sorted(order):
        x = draft.call(node, aten.permute.default, x, order)
    if len(dims) > 1:
        x = draft.call(node, aten.flatten.using_ints, x, len(shape) - len(dims), -1)
    x = draft.call(node, aten.max.dim, x, -1)
    x = draft.call(node, getitem, x, 0)
    for d in dims if a["keepdim"] else ():
        x = draft.call(node, aten.unsqueeze.default, x, d)
    return x


def sum_of_einsum(draft: Draft, node: Node) -> Node | None:
    """einsum of one factor whose letters differ: a sum over the letters that the result lacks, and a permutation."""
    factors: Any = node.args[1]
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    if len(factors) != 1 or not arrow or len(set(left)) < len(left) or not (left + right).isalpha():
        return None
    (x,) = factors
    summed = [d for d, letter in enumerate(left) if letter not in right]
    if summed:
        x = draft.call(node, aten.sum.dim_IntList, x, summed)
    kept = [letter for letter in left if letter in right]
    order = [kept.index(letter) for letter in right]
    return x if order == sorted(order) else draft.call(node, aten.permute.default, x, order)


SELECTIONS: dict[Any, Callable[[Draft, Node], Node | None]] = {
    aten.index.Tensor: selection_of_index,
    aten.amax.default: maximum_of_dims,
    aten.einsum.default: sum_of_einsum,
}


def unify_pooling(draft: Draft) -> None:
    """Bring every average over positions to pooling with one window size and no border cases.

    Adaptive pooling with unequal windows gathers each window into equal ones first; borders that
    average fewer values (ceil mode, padding left out) become a constant factor behind the pooling.
    """
    for node in list(draft.graph.nodes):
        replacement = None
        if node.target in (aten.mean.dim, aten.sum.dim_IntList):
            replacement = pool_of_mean(draft, node)
        elif opname(node) in {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}:
            replacement = pool_of_adaptive(draft, node)
        elif opname(node) in {"avg_pool1d", "avg_pool2d", "avg_pool3d"}:
            replacement = pool_of_ragged(draft, node)
        if replacement is not None:
            draft.replace(node, replacement)


def pool_of_mean(draft: Draft, node: Node) -> Node | None:
    """A mean over any dimensions but the batch as pooling with one window; a sum of k values as the mean of k · value.

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
    if opname(node) == "sum":  # before the pooling, which then has the gate that follows
        x = draft.call(node, aten.mul.Tensor, x, float(prod(shape[d] for d in dims)))
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
    """Pooling whose border windows average fewer values, as padded pooling times a constant.

    The constant goes back as it is: the weights of a border window are that much larger, so that what a pattern
    lacks over the border is shared out over the rest. A divisor of its own is a scale.
    """
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
    padded = draft.call(node, aten.constant_pad_nd.default, node.args[0], pads)
    if a.get("divisor_override") is not None:
        scaled = draft.call(node, aten.mul.Tensor, padded, prod(kernel) / a["divisor_override"])
        return draft.call(node, pool, scaled, *plain)
    ones = torch.ones((1, 1, *sizes), dtype=torch.float64)
    factor = node.target(ones, *node.args[1:], **node.kwargs) / pool(F.pad(ones, pads), *plain)  # type: ignore[operator]
    pooled = draft.call(node, pool, padded, *plain)
    if bool((factor == 1).all()):
        return pooled
    fixed = draft.constant(node, factor.to(value.dtype).to(value.device))
    return draft.call(node, fixed_product, pooled, fixed)


def fixed_product(x: Tensor, factor: Tensor) -> Tensor:
    """Each position times its own constant."""
    return x * factor


def weighted_sum(coefficients: list[float], *inputs: Tensor) -> Tensor:
    """Σ coefficient · input, over inputs of one shape."""
    return Addition(tuple(coefficients)).forward(inputs, inputs[0], None)


def unify_sums(draft: Draft) -> None:
    """Bring sums and differences of activations, in all spellings, to one call for as many terms as they have."""
    for node in list(draft.graph.nodes):
        if node.target in SPELT_OUT:
            SPELT_OUT[node.target](draft, node)
    for node in list(draft.graph.nodes):
        terms = terms_of(node)
        if not terms or not all(is_activation(term) for _, term in terms):
            continue
        shape = node.meta["val"].shape
        coefficients: list[float] = []
        inputs: list[Any] = []
        for factor, term in terms:
            if term.target is weighted_sum and len(term.users) == 1 and term.meta["val"].shape == shape:
                coefficients += [factor * c for c in term.args[0]]  # type: ignore[misc, union-attr, operator]
                inputs += term.args[1:]
                continue
            if term.meta["val"].shape != shape:
                other = next(t for _, t in terms if t is not term)
                term = broadcast(draft, node, term, other)
            coefficients.append(factor)
            inputs.append(term)
        draft.replace(node, draft.call(node, weighted_sum, coefficients, *inputs))


def terms_of(node: Node) -> list[tuple[float, Node]]:
    """The terms of a sum, each with its coefficient; none for any other node."""
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        a = arguments(node)
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        return [(1.0, a["self"]), (sign * float(a["alpha"]), a["other"])]
    if node.target in (aten.sum.dim_IntList, aten.mean.dim) and opname(arguments(node)["self"]) == "stack":
        a, stack = arguments(node), arguments(arguments(node)["self"])
        rank = a["self"].meta["val"].dim()
        if a["keepdim"] or [d % rank for d in a["dim"] or ()] != [stack["dim"] % rank]:
            return []
        factor = 1.0 if opname(node) == "sum" else 1 / len(stack["tensors"])
        return [(factor, term) for term in stack["tensors"]]
    return []


def broadcast(draft: Draft, node: Node, term: Node, other: Node) -> Node:
    """A term of a sum in the shape that the sum has; the other is one that has its batch."""
    shape = node.meta["val"].shape
    lacking = len(shape) - term.meta["val"].dim()
    if lacking:
        term = draft.call(node, aten.unflatten.int, term, 0, [1] * lacking + [-1])
    fixed = [-1 if s == t else s for s, t in zip(shape, term.meta["val"].shape)]
    if any(not isinstance(s, int) for s in fixed):
        fixed[0] = draft.call(node, aten.sym_size.int, other, 0)
    return draft.call(node, aten.expand.default, term, fixed)


def spell_difference(draft: Draft, node: Node) -> None:
    """constant - x as the constant added to -x."""
    a = arguments(node)
    constant, x = (a["self"], a["other"]) if node.target is aten.sub.Tensor else (a["other"], a["self"])
    if is_activation(x) and not is_activation(constant):
        turned = draft.call(node, aten.mul.Tensor, x, -a["alpha"])
        draft.replace(node, draft.call(node, aten.add.Tensor, turned, constant))


def spell_sum_and_product(draft: Draft, node: Node) -> None:
    """constant + x · constant as a product and a sum."""
    a = arguments(node)
    if a["value"] == 1 and [is_activation(a[k]) for k in ("self", "tensor1", "tensor2")].count(True) == 1:
        product = draft.call(node, aten.mul.Tensor, a["tensor1"], a["tensor2"])
        draft.replace(node, draft.call(node, aten.add.Tensor, a["self"], product))


def spell_interpolation(draft: Draft, node: Node) -> None:
    """x + c · (y - x) with a constant c as the sum of (1 - c) · x and c · y."""
    a = arguments(node)
    c = a["weight"]
    rest: Any = None
    if isinstance(c, float | int):
        rest = 1 - c
    elif (value := constant_of(draft, c)) is not None:
        rest = draft.constant(node, 1 - value)
    if rest is not None and is_activation(a["self"]) and is_activation(a["end"]):
        products = [draft.call(node, aten.mul.Tensor, x, w) for x, w in ((a["self"], rest), (a["end"], c))]
        draft.replace(node, draft.call(node, aten.add.Tensor, *products))


SPELT_OUT: dict[Any, Callable[[Draft, Node], None]] = {
    aten.sub.Tensor: spell_difference,
    aten.rsub.Scalar: spell_difference,
    aten.rsub.Tensor: spell_difference,
    aten.addcmul.default: spell_sum_and_product,
    aten.lerp.Scalar: spell_interpolation,
    aten.lerp.Tensor: spell_interpolation,
}


def unify_maps(draft: Draft) -> None:
    """Bring products with constants, on any side and over any dimensions, to convolutions over one position.

    Only x @ matrix, over the last dimension of x, is left: it is a linear layer.
    """
    made: dict[tuple[str, str], Node] = {}  # weights, by constant and order: what is used twice is one operator
    for node in list(draft.graph.nodes):
        product = product_of(draft, node)
        if product is None:
            continue
        x, constant, (own, fixed, result) = product
        matrix = draft.parts[str(constant.target)].detach()
        matrix = matrix.reshape(matrix.shape[matrix.dim() - len(fixed) :])
        sizes = dict(zip(own + fixed, (*x.meta["val"].shape, *matrix.shape)))
        groups = "".join(c for c in own if c in fixed and c in result)
        inputs = "".join(c for c in own if c in fixed and c not in result)
        others = "".join(c for c in own[1:] if c not in fixed)
        outputs = "".join(c for c in fixed if c not in own)
        g, i, o, rest = (prod(sizes[c] for c in letters) for letters in (groups, inputs, outputs, others))
        key = str(constant.target), f"{fixed}->{groups}{outputs}{inputs}"
        if key not in made:
            made[key] = draft.constant(node, torch.einsum(key[1], matrix).reshape(g * o, i, 1))
        x = draft.call(node, aten.permute.default, x, [own.index(c) for c in own[0] + groups + inputs + others])
        x = draft.call(node, aten.reshape.default, x, [-1, g * i, rest])
        x = draft.call(node, aten.conv1d.default, x, made[key], None, [1], [0], [1], g)
        x = draft.call(node, aten.reshape.default, x, [-1, *(sizes[c] for c in groups + outputs + others)])
        order = own[0] + groups + outputs + others
        draft.replace(node, draft.call(node, aten.permute.default, x, [order.index(c) for c in result]))


def product_of(draft: Draft, node: Node) -> tuple[Node, Node, tuple[str, str, str]] | None:
    """A value, a constant, and as in einsum the dimensions of both and of their product.

    None for any other node, and where the product is no bank of neurons for each sample: what mixes samples,
    sums one factor alone, or has nothing in common.
    """
    if node.target is aten.einsum.default:
        factors: Any = node.args[1]
        left, _, result = str(node.args[0]).replace(" ", "").partition("->")
        letters = left.split(",")
    elif node.target is aten.matmul.default:
        factors = node.args
        letters, result = letters_of_matmul(*(rank_of(draft, f) for f in factors))
    else:
        return None
    constants = [constant_of(draft, f) for f in factors]
    if [c is None for c in constants] not in ([True, False], [False, True]):
        return None
    at = constants.index(None)
    x, constant, own, fixed = factors[at], factors[1 - at], letters[at], letters[1 - at]
    shape, matrix = x.meta["val"].shape, draft.parts[str(constant.target)]
    if node.target is aten.matmul.default and at == 0 and matrix.dim() == 2:
        return None
    shared = set(own) & set(fixed)
    sizes, fixed_sizes = dict(zip(own, shape)), dict(zip(fixed[::-1], matrix.shape[::-1]))
    if (
        any(len(set(text)) < len(text) or not text.isalpha() for text in (own, fixed, result))
        or not shared
        or own[0] in shared
        or any(c not in result and c not in shared for c in own + fixed)
        or any(sizes[c] != fixed_sizes[c] for c in shared)
        or not all(isinstance(size, int) for size in shape[1:])
    ):
        return None
    return x, constant, (own, fixed, result)


def letters_of_matmul(first: int, second: int) -> tuple[list[str], str]:
    """A letter for each dimension of two factors of these ranks, and of their product."""
    batch = "abcdefgh"[: max(first, second, 2) - 2]
    of_first, of_second = (batch[len(batch) - max(rank - 2, 0) :] for rank in (first, second))
    rows, columns = "m" * (first > 1), "n" * (second > 1)
    return [f"{of_first}{rows}x", f"{of_second}x{columns}"], f"{batch}{rows}{columns}"


def rank_of(draft: Draft, node: Node) -> int:
    """How many dimensions a factor has, without those of one element that a constant has before its last two."""
    value = constant_of(draft, node)
    if value is None:
        return node.meta["val"].dim()
    leading = next((d for d, size in enumerate(value.shape[:-2]) if size != 1), max(value.dim() - 2, 0))
    return value.dim() - leading
