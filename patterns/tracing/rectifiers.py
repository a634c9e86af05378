"""Canonicalize rectifiers: rewrite every spelling of a rectifier into the ATen operation that later passes read.

| spelling | canonical form |
| --- | --- |
| `clip`, `clamp` with tensors | `clamp` |
| `maximum`, `minimum`, `fmax`, `fmin` of a value and one number | `clamp_min`, `clamp_max` |
| `where(x > t, x, v)`, `x * (x > t)`, `x.masked_fill(x <= t, v)`, `x[x <= t] = v` | `relu`, `threshold`, `clamp_…` |
| `where(x > 0, x, s * x)`, `rrelu` in evaluation | `leaky_relu` |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from patterns.operators.gates import Gate
from patterns.tracing.aten_graph import AtenGraph, arguments, get_constant, is_activation, opname

aten = torch.ops.aten


def parse_limit(value: float | None, unlimited: str) -> float:
    """Return a clamp's limit as a number; `unlimited` if the clamp has no limit."""
    return float(unlimited if value is None else value)


# Canonical rectifiers, and the gate of each: the interval in which it passes its input on.
RECTIFIERS: dict[Any, Callable[[dict[str, Any]], Gate]] = {
    aten.relu.default: lambda _: Gate(0.0, float("inf")),
    aten.relu6.default: lambda _: Gate(0.0, 6.0),
    aten.hardtanh.default: lambda a: Gate(float(a["min_val"]), float(a["max_val"])),
    aten.clamp.default: lambda a: Gate(parse_limit(a["min"], "-inf"), parse_limit(a["max"], "inf")),
    aten.clamp_min.default: lambda a: Gate(float(a["min"]), float("inf")),
    aten.clamp_max.default: lambda a: Gate(float("-inf"), float(a["max"])),
    aten.threshold.default: lambda a: Gate(float(a["threshold"]), float("inf")),
    # Leaky rectifiers count as open where their slope is 1.
    aten.leaky_relu.default: lambda _: Gate(0.0, float("inf")),
    aten.prelu.default: lambda _: Gate(0.0, float("inf")),
}

# Rectifiers whose gradient needs only their result may overwrite their input.
IN_PLACE: dict[Any, Any] = {aten.relu.default: aten.relu_.default, aten.hardtanh.default: aten.hardtanh_.default}

CLAMPS = {
    aten.maximum.default: aten.clamp_min.default,
    aten.minimum.default: aten.clamp_max.default,
    aten.fmax.default: aten.clamp_min.default,
    aten.fmin.default: aten.clamp_max.default,
    aten.max.other: aten.clamp_min.default,
    aten.min.other: aten.clamp_max.default,
}
FILLS = {"zeros_like": 0.0, "ones_like": 1.0}


def canonicalize_rectifiers(graph: AtenGraph) -> None:
    """Rewrite every spelling of a rectifier; see the table above."""
    for node in list(graph.fx.nodes):
        rewrite = REWRITES.get(opname(node))
        replacement = rewrite(graph, node) if rewrite else None
        if replacement is not None:
            graph.replace(node, replacement)
    graph.fx.eliminate_dead_code()


def rewrite_maximum(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite the maximum or minimum of a value and one number."""
    if node.target not in CLAMPS:
        return None
    x, bound = node.args
    if is_activation(bound) and find_number(graph, bound) is None:
        x, bound = bound, x
    limit = find_number(graph, bound)
    if limit is None or not is_activation(x) or x.meta["val"].shape != node.meta["val"].shape:  # type: ignore[union-attr]
        return None
    return graph.call(node, CLAMPS[node.target], x, limit)


def rewrite_clamp(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `clip`, and a clamp whose limits are tensors of one number."""
    if node.target is aten.clamp.default:
        return None
    a = arguments(node)
    limits = [None if a[key] is None else find_number(graph, a[key]) for key in ("min", "max")]
    if any(limit is None and a[key] is not None for key, limit in zip(("min", "max"), limits)):
        return None
    return graph.call(node, aten.clamp.default, a["self"], *limits)


def rewrite_rrelu(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `rrelu` in evaluation as a leaky rectifier with the mean of its slopes."""
    a = arguments(node)
    if a["training"]:
        return None
    return graph.call(node, aten.leaky_relu.default, a["self"], (a["lower"] + a["upper"]) / 2)


@dataclass(frozen=True)
class Condition:
    """A comparison of a value with a number: `x > threshold` if `above`, otherwise `x < threshold`.

    Attributes:
        x: The value.
        threshold: The number.
        above: Whether the condition holds above the number.
        strict: Whether the condition is false at the number itself.
    """

    x: Node
    threshold: float
    above: bool
    strict: bool


def match_condition(graph: AtenGraph, mask: Any) -> Condition | None:
    """Match a mask: a comparison of a value with one number, perhaps inverted or cast to another dtype."""
    turned = False
    while isinstance(mask, Node) and opname(mask) in COPIES | CASTS | INVERSIONS:
        turned ^= opname(mask) in INVERSIONS
        mask = mask.args[0]
    if not isinstance(mask, Node):
        return None
    operation = opname(mask)
    if operation == "heaviside":  # its value at 0 does not matter, because it is multiplied by x = 0
        x, _ = mask.args
        return Condition(skip_copies(x), 0.0, not turned, True)
    if operation not in COMPARISONS:
        return None
    x, bound = mask.args
    above, strict = COMPARISONS[operation]
    limit = find_number(graph, bound)
    if limit is None:
        x, bound, above = bound, x, not above
        limit = find_number(graph, bound)
    if limit is None or not is_activation(x):
        return None
    return Condition(skip_copies(x), limit, above ^ turned, strict ^ turned)


COMPARISONS = {"gt": (True, True), "ge": (True, False), "lt": (False, True), "le": (False, False)}
COPIES, CASTS = {"clone", "alias", "contiguous", "detach"}, {"_to_copy", "to"}
INVERSIONS = {"logical_not", "bitwise_not"}


def skip_copies(node: Any) -> Any:
    """Return the value of which a chain of copies is a copy."""
    while isinstance(node, Node) and opname(node) in COPIES:
        node = node.args[0]
    return node


def match_choice(graph: AtenGraph, node: Node, mask: Any, chosen: Any, other: Any) -> Node | None:
    """Return the rectifier that takes one value where a mask holds and another value elsewhere.

    Args:
        graph: The graph.
        node: The node to replace.
        mask: The mask.
        chosen: The value where the mask holds, a node or a number.
        other: The value elsewhere, a node or a number.

    Returns:
        The node of the rectifier; None if the choice is not a rectifier.
    """
    condition = match_condition(graph, mask)
    if condition is None:
        return None
    x, t = condition.x, condition.threshold
    upper, lower = (chosen, other) if condition.above else (other, chosen)
    strict = condition.strict == condition.above  # True if x == t takes the lower value
    if skip_copies(upper) is x:
        slope = find_slope(graph, lower, x)
        if slope is not None and 0 <= slope <= 1 and t == 0:
            return graph.call(node, aten.leaky_relu.default, x, slope)
        value = find_value(graph, lower)
        if value == t:
            return graph.call(node, aten.relu.default, x) if t == 0 else graph.call(node, aten.clamp_min.default, x, t)
        if value is not None and strict:
            return graph.call(node, aten.threshold.default, x, t, value)
    elif skip_copies(lower) is x and find_value(graph, upper) == t:
        return graph.call(node, aten.clamp_max.default, x, t)
    return None


def find_slope(graph: AtenGraph, node: Any, x: Node) -> float | None:
    """Return s if a node is s · x with one number s; None for all others."""
    if not isinstance(node, Node) or opname(node) not in {"neg", "mul", "div"}:
        return None
    if opname(node) == "neg":
        return -1.0 if skip_copies(node.args[0]) is x else None
    one, other = node.args
    if skip_copies(other) is x and opname(node) == "mul":
        one, other = other, one
    slope = find_value(graph, other) if skip_copies(one) is x else None
    return slope if slope is None or opname(node) == "mul" else 1 / slope


def find_value(graph: AtenGraph, value: Any) -> float | None:
    """Return the one number that an argument is, or that a node holds everywhere."""
    return find_number(graph, value) if isinstance(value, Node) else float(value)


def rewrite_where(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `where(mask, chosen, other)`."""
    return match_choice(graph, node, *node.args) if len(node.args) == 3 else None


def rewrite_masked_fill(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `x.masked_fill(mask, value)`."""
    x, mask, value = node.args
    return match_choice(graph, node, mask, value, x)


def rewrite_masked_assignment(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `x[mask] = value`."""
    a = arguments(node)
    if a["accumulate"] or len(a["indices"]) != 1 or find_value(graph, a["values"]) is None:
        return None
    return match_choice(graph, node, a["indices"][0], find_value(graph, a["values"]), a["self"])


def rewrite_masked_product(graph: AtenGraph, node: Node) -> Node | None:
    """Rewrite `x * mask`."""
    for x, mask in (node.args[:2], node.args[1::-1]):
        if is_activation(x) and isinstance(mask, Node):
            found = match_choice(graph, node, mask, x, 0.0)
            if found is not None:
                return found
    return None


REWRITES: dict[str, Callable[[AtenGraph, Node], Node | None]] = {
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin", "max", "min"), rewrite_maximum),
    "clip": rewrite_clamp,
    "clamp": rewrite_clamp,
    "rrelu": rewrite_rrelu,
    "where": rewrite_where,
    "masked_fill": rewrite_masked_fill,
    "index_put": rewrite_masked_assignment,
    "mul": rewrite_masked_product,
}


def find_number(graph: AtenGraph, node: Any) -> float | None:
    """Return the number that all elements of a tensor equal.

    Args:
        graph: The graph.
        node: A node whose value is the tensor, or a number, which is returned as it is.

    Returns:
        The number; None if it is not known, or if the elements differ.
    """
    if isinstance(node, int | float):
        return float(node)
    node = skip_copies(node)
    if opname(node) in FILLS:
        return FILLS[opname(node)]
    if opname(node) in {"full_like", "full"}:
        return find_value(graph, node.args[1])
    value = get_constant(graph, node) if isinstance(node, Node) else None
    if value is None or value.numel() == 0 or value.is_complex():
        return None
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) and math.isfinite(float(first)) else None
