"""Canonicalize the graph: rewrite equivalent operations into one form for the later passes.

This module rewrites squeezes, selections and sums. Rectifiers, average pools and products with constants have modules
of their own.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.operator import Addition
from patterns.tracing.aten_graph import AtenGraph, arguments, get_constant, is_activation, opname

aten = torch.ops.aten


def canonicalize_squeezes(graph: AtenGraph) -> None:
    """Name the dimensions that each squeeze removes, so that a batch of one sample keeps its batch dimension."""
    for node in list(graph.fx.nodes):
        if opname(node) == "squeeze":
            x: Any = node.args[0]
            shape = x.meta["val"].shape
            given = arguments(node).get("dim", range(len(shape)))
            dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)] if len(shape) else []
            dims = [d for d in dims if isinstance(shape[d], int) and shape[d] == 1]
            graph.replace(node, graph.call(node, aten.squeeze.dims, x, dims) if dims else x)


def canonicalize_selections(graph: AtenGraph) -> None:
    """Rewrite constant indices as index_select, amax as a maximum over one dimension, einsum of one factor as a sum."""
    for node in list(graph.fx.nodes):
        rewrite = SELECTIONS.get(node.target) if node.op == "call_function" else None
        replacement = rewrite(graph, node) if rewrite else None
        if replacement is not None:
            graph.replace(node, replacement)


def rewrite_index(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `x[:, [2, 1, 0]]`: one constant index, not of the batch dimension."""
    a = arguments(node)
    used = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
    if len(used) != 1 or used[0][0] == 0:
        return None
    ((dim, index),) = used
    value = get_constant(graph, index)
    if value is None or value.dim() != 1 or value.dtype == torch.bool:
        return None
    positive = value % a["self"].meta["val"].shape[dim]  # index_select takes no negative indices
    return graph.call(node, aten.index_select.default, a["self"], dim, graph.constant(node, positive))


def rewrite_amax(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite amax over any dimensions except the batch as the maximum over one dimension.

    The maximum over one dimension sends its gradient to one of several equal values.
    """
    a = arguments(node)
    x: Node = a["self"]
    shape = x.meta["val"].shape
    dims = sorted(d % len(shape) for d in a.get("dim") or range(len(shape)))
    if 0 in dims or any(not isinstance(shape[d], int) for d in dims):
        return None
    order = [d for d in range(len(shape)) if d not in dims] + dims
    if order != sorted(order):
        x = graph.call(node, aten.permute.default, x, order)
    if len(dims) > 1:
        x = graph.call(node, aten.flatten.using_ints, x, len(shape) - len(dims), -1)
    x = graph.call(node, aten.max.dim, x, -1)
    x = graph.call(node, getitem, x, 0)
    for d in dims if a["keepdim"] else ():
        x = graph.call(node, aten.unsqueeze.default, x, d)
    return x


def rewrite_einsum(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite einsum of one factor as a sum over the letters that the result lacks, and a permutation."""
    factors: Any = node.args[1]
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    if len(factors) != 1 or not arrow or len(set(left)) < len(left) or not (left + right).isalpha():
        return None
    (x,) = factors
    summed = [d for d, letter in enumerate(left) if letter not in right]
    if summed:
        x = graph.call(node, aten.sum.dim_IntList, x, summed)
    kept = [letter for letter in left if letter in right]
    order = [kept.index(letter) for letter in right]
    return x if order == sorted(order) else graph.call(node, aten.permute.default, x, order)


SELECTIONS: dict[Any, Callable[[AtenGraph, Node], Node | None]] = {
    aten.index.Tensor: rewrite_index,
    aten.amax.default: rewrite_amax,
    aten.einsum.default: rewrite_einsum,
}


def weighted_sum(coefficients: list[float], *inputs: Tensor) -> Tensor:
    """Return Σ coefficient · input over inputs of one shape."""
    return Addition(tuple(coefficients)).forward(inputs, inputs[0], None)


def canonicalize_sums(graph: AtenGraph) -> None:
    """Rewrite sums and differences of activations, in all spellings, as one call with all terms."""
    for node in list(graph.fx.nodes):
        if node.target in EXPANSIONS:
            EXPANSIONS[node.target](graph, node)
    for node in list(graph.fx.nodes):
        terms = list_terms(node)
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
                term = broadcast_term(graph, node, term, other)
            coefficients.append(factor)
            inputs.append(term)
        graph.replace(node, graph.call(node, weighted_sum, coefficients, *inputs))


def list_terms(node: Node) -> list[tuple[float, Node]]:
    """Return the terms of a sum with their coefficients; an empty list for all other nodes."""
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


def broadcast_term(graph: AtenGraph, node: Node, term: Node, other: Node) -> Node:
    """Expand a term to the shape of the sum; `other` is a term that has the sum's batch size."""
    shape = node.meta["val"].shape
    lacking = len(shape) - term.meta["val"].dim()
    if lacking:
        term = graph.call(node, aten.unflatten.int, term, 0, [1] * lacking + [-1])
    fixed = [-1 if s == t else s for s, t in zip(shape, term.meta["val"].shape)]
    if any(not isinstance(s, int) for s in fixed):
        fixed[0] = graph.call(node, aten.sym_size.int, other, 0)
    return graph.call(node, aten.expand.default, term, fixed)


def rewrite_difference(graph: AtenGraph, node: Node) -> None:
    """Rewrite constant - x as the constant added to -x."""
    a = arguments(node)
    constant, x = (a["self"], a["other"]) if node.target is aten.sub.Tensor else (a["other"], a["self"])
    if is_activation(x) and not is_activation(constant):
        turned = graph.call(node, aten.mul.Tensor, x, -a["alpha"])
        graph.replace(node, graph.call(node, aten.add.Tensor, turned, constant))


def rewrite_addcmul(graph: AtenGraph, node: Node) -> None:
    """Rewrite constant + x · constant as a product and a sum."""
    a = arguments(node)
    if a["value"] == 1 and [is_activation(a[k]) for k in ("self", "tensor1", "tensor2")].count(True) == 1:
        product = graph.call(node, aten.mul.Tensor, a["tensor1"], a["tensor2"])
        graph.replace(node, graph.call(node, aten.add.Tensor, a["self"], product))


def rewrite_lerp(graph: AtenGraph, node: Node) -> None:
    """Rewrite x + c · (y - x) with a constant c as the sum of (1 - c) · x and c · y."""
    a = arguments(node)
    c = a["weight"]
    rest: Any = None
    if isinstance(c, float | int):
        rest = 1 - c
    elif (value := get_constant(graph, c)) is not None:
        rest = graph.constant(node, 1 - value)
    if rest is not None and is_activation(a["self"]) and is_activation(a["end"]):
        products = [graph.call(node, aten.mul.Tensor, x, w) for x, w in ((a["self"], rest), (a["end"], c))]
        graph.replace(node, graph.call(node, aten.add.Tensor, *products))


EXPANSIONS: dict[Any, Callable[[AtenGraph, Node], None]] = {
    aten.sub.Tensor: rewrite_difference,
    aten.rsub.Scalar: rewrite_difference,
    aten.rsub.Tensor: rewrite_difference,
    aten.addcmul.default: rewrite_addcmul,
    aten.lerp.Scalar: rewrite_lerp,
    aten.lerp.Tensor: rewrite_lerp,
}
