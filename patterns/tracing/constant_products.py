"""Canonicalize products with constants: rewrite them as convolutions over one position."""

from math import prod
from typing import Any

import torch
from torch.fx import Node

from patterns.tracing.aten_graph import AtenGraph, get_constant

aten = torch.ops.aten


def canonicalize_products(graph: AtenGraph) -> None:
    """Rewrite matmul and einsum with a constant, on any side and over any dimensions, as 1×1 convolutions.

    Only x @ matrix over the last dimension of x stays, because it is a linear layer.
    """
    weights: dict[tuple[str, str], Node] = {}  # by constant and order: a constant that is used twice is one operator
    for node in list(graph.fx.nodes):
        product = match_product(graph, node)
        if product is None:
            continue
        x, constant, (own, fixed, result) = product
        matrix = graph.attributes[str(constant.target)].detach()
        matrix = matrix.reshape(matrix.shape[matrix.dim() - len(fixed) :])
        sizes = dict(zip(own + fixed, (*x.meta["val"].shape, *matrix.shape)))
        groups = "".join(c for c in own if c in fixed and c in result)
        inputs = "".join(c for c in own if c in fixed and c not in result)
        others = "".join(c for c in own[1:] if c not in fixed)
        outputs = "".join(c for c in fixed if c not in own)
        g, i, o, rest = (prod(sizes[c] for c in letters) for letters in (groups, inputs, outputs, others))
        key = str(constant.target), f"{fixed}->{groups}{outputs}{inputs}"
        if key not in weights:
            weights[key] = graph.constant(node, torch.einsum(key[1], matrix).reshape(g * o, i, 1))
        x = graph.call(node, aten.permute.default, x, [own.index(c) for c in own[0] + groups + inputs + others])
        x = graph.call(node, aten.reshape.default, x, [-1, g * i, rest])
        x = graph.call(node, aten.conv1d.default, x, weights[key], None, [1], [0], [1], g)
        x = graph.call(node, aten.reshape.default, x, [-1, *(sizes[c] for c in groups + outputs + others)])
        order = own[0] + groups + outputs + others
        graph.replace(node, graph.call(node, aten.permute.default, x, [order.index(c) for c in result]))


def match_product(graph: AtenGraph, node: Node) -> tuple[Node, Node, tuple[str, str, str]] | None:
    """Match a product of a value with a constant.

    Returns:
        The value, the constant, and the letters of the dimensions of both and of their product, as in einsum. None for
        all other nodes, and if the product is not a bank of neurons for each sample: if it mixes samples, sums one
        factor alone, or has no common dimension.
    """
    if node.target is aten.einsum.default:
        factors: Any = node.args[1]
        left, _, result = str(node.args[0]).replace(" ", "").partition("->")
        letters = left.split(",")
    elif node.target is aten.matmul.default:
        factors = node.args
        letters, result = matmul_letters(*(factor_rank(graph, f) for f in factors))
    else:
        return None
    constants = [get_constant(graph, f) for f in factors]
    if [c is None for c in constants] not in ([True, False], [False, True]):
        return None
    at = constants.index(None)
    x, constant, own, fixed = factors[at], factors[1 - at], letters[at], letters[1 - at]
    shape, matrix = x.meta["val"].shape, graph.attributes[str(constant.target)]
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


def matmul_letters(first: int, second: int) -> tuple[list[str], str]:
    """Return a letter for each dimension of two factors of these ranks, and of their product."""
    batch = "abcdefgh"[: max(first, second, 2) - 2]
    of_first, of_second = (batch[len(batch) - max(rank - 2, 0) :] for rank in (first, second))
    rows, columns = "m" * (first > 1), "n" * (second > 1)
    return [f"{of_first}{rows}x", f"{of_second}x{columns}"], f"{batch}{rows}{columns}"


def factor_rank(graph: AtenGraph, node: Node) -> int:
    """Return the number of dimensions of a factor.

    A constant's leading dimensions of size 1 do not count, except for its last two dimensions.
    """
    value = get_constant(graph, node)
    if value is None:
        return node.meta["val"].dim()
    leading = next((d for d, size in enumerate(value.shape[:-2]) if size != 1), max(value.dim() - 2, 0))
    return value.dim() - leading
