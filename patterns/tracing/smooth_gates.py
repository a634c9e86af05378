"""Canonicalize smooth gates: rewrite every spelling of GELU, SiLU and the like as a call of `gated`.

A spelling is recognized by its values, not by its form: the function of one number that a chain of elementwise
operations computes is evaluated on a grid and compared with each known z·g(z). So `x * sigmoid(x)`,
`0.5 * x * (1 + erf(x / √2))` and `x * relu6(x + 3) / 6` are found however they are written.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from patterns.operators.gates import SmoothGate, gated
from patterns.tracing.aten_graph import AtenGraph, get_constant, is_activation, opname

aten = torch.ops.aten

# Operations that act on each element alone, if all their other arguments are numbers.
ACTIVATIONS = {
    "gelu", "silu", "hardswish", "mish", "elu", "celu", "selu", "leaky_relu", "hardsigmoid", "sigmoid", "tanh", "erf",
    "erfc", "softplus", "log_sigmoid", "special_ndtr", "special_expit", "relu", "relu6", "hardtanh", "threshold",
    "prelu", "_prelu_kernel", "clamp", "clamp_min", "clamp_max",
}  # fmt: skip
ARITHMETIC = {
    "add", "sub", "rsub", "mul", "div", "neg", "reciprocal", "pow", "square", "sqrt", "abs", "exp", "expm1", "log",
    "log1p", "where", "maximum", "minimum",
}  # fmt: skip
ENDINGS = ACTIVATIONS | ARITHMETIC
ELEMENTWISE = ENDINGS | {"clone", "alias", "contiguous", "_to_copy", "to", "gt", "ge", "lt", "le", "logical_not"}
MOST_STEPS = 24  # operations of a spelling at most
GRID = torch.cat([torch.linspace(-8, 8, 161, dtype=torch.float64), torch.tensor([-30.0, 1e-3, -1e-3, 30.0])])
TOLERANCE = 2e-4  # of a value, relative to 1 + |z|: models write constants with few digits


def canonicalize_smooth_gates(graph: AtenGraph, pass_through: Collection[str]) -> None:
    """Rewrite every spelling of a smooth gate in place, except for the operations named in `pass_through`."""
    for node in reversed(list(graph.fx.nodes)):
        if opname(node) not in ENDINGS or opname(node) in pass_through or not is_activation(node) or not node.users:
            continue
        found = match_slopes(graph, node) or match_gate(graph, node)
        if found is not None:
            source, gate = found
            parameters: tuple[Any, ...] = gate.parameters
            if gate.has_slopes:
                value = source.meta["val"]
                slopes = torch.tensor(gate.parameters, dtype=value.dtype, device=value.device)
                parameters = (graph.constant(node, slopes),)
            graph.replace(node, graph.call(node, gated, source, gate.name, *parameters))
    graph.fx.eliminate_dead_code()


def match_gate(graph: AtenGraph, node: Node) -> tuple[Node, SmoothGate] | None:
    """Return the input and the gate of the activation that ends in a node; None if it is not an activation."""
    for source, chain in list_chains(graph, node):
        if source.meta["val"].shape != node.meta["val"].shape or not chain:
            continue
        try:
            values = evaluate(graph, chain, source)
        except (RuntimeError, TypeError, ValueError):  # an operation that takes no float64, or another shape
            continue
        gate = recognize(values)
        if gate is not None:
            return source, gate
    return None


def list_chains(graph: AtenGraph, node: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Yield values on which a node depends through elementwise operations alone, farthest first, with these operations.

    The operations are in the order of the graph.
    """
    # The operations from which the node is computed, as long as they are elementwise.
    inside: set[Node] = set()
    frontier: set[Node] = set()
    todo = [node]
    while todo and len(inside) < MOST_STEPS:
        here = todo.pop()
        if here in inside:
            continue
        if here is not node and (opname(here) not in ELEMENTWISE or here.target is gated):
            frontier.add(here)
            continue
        inside.add(here)
        todo += [n for n in here.all_input_nodes if number(graph, n) is None]
    frontier |= set(todo) - inside
    # Every value that separates the node from the rest of the graph: all paths lead through it.
    candidates = [*frontier, *(n for n in inside if n is not node)]
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    for source in sorted(candidates, key=order.__getitem__):
        chain = separate(graph, node, source, inside)
        if chain is not None and is_activation(source):
            yield source, sorted(chain, key=order.__getitem__)


def separate(graph: AtenGraph, node: Node, source: Node, inside: set[Node]) -> set[Node] | None:
    """Return the operations between a source and a node; None if the node depends on something else."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        here = todo.pop()
        if here is source or here in found:
            continue
        if here not in inside:
            return None
        found.add(here)
        todo += [n for n in here.all_input_nodes if number(graph, n) is None]
    return found


def number(graph: AtenGraph, node: Node) -> Tensor | None:
    """Return a constant of one number; None for other nodes."""
    value = get_constant(graph, node)
    return value if value is not None and value.numel() == 1 and not value.is_complex() else None


def evaluate(graph: AtenGraph, chain: list[Node], source: Node) -> Tensor:
    """Return the values of a chain of operations on GRID, float64."""
    values: dict[Node, Any] = {source: GRID}

    def look_up(node: Node) -> Any:
        if node in values:
            return values[node]
        constant = number(graph, node)
        if constant is None:
            raise ValueError
        return constant.double().reshape(()) if constant.is_floating_point() else constant.reshape(())

    for node in chain:
        if opname(node) in {"_to_copy", "to"}:
            values[node] = look_up(node.args[0])  # type: ignore[arg-type]
            continue
        args: Any = torch.fx.node.map_arg(node.args, look_up)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, look_up)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result = values[chain[-1]]
    if not isinstance(result, Tensor) or result.shape != GRID.shape or not result.is_floating_point():
        raise ValueError
    return result.double()


def recognize(values: Tensor) -> SmoothGate | None:
    """Return the gate whose z·g(z) has these values on GRID; None if no gate has them."""
    at = {z: float(values[int((GRID - z).abs().argmin())]) for z in (1.0, -1.0, -8.0, 30.0)}
    candidates: list[Callable[[], SmoothGate]] = [
        lambda: SmoothGate("gelu"),
        lambda: SmoothGate("gelu-tanh"),
        lambda: SmoothGate("silu", (rounded(math.log(at[1.0] / (1 - at[1.0]))),)),
        lambda: SmoothGate("hardswish"),
        lambda: SmoothGate("mish"),
        lambda: SmoothGate("leaky-relu", (rounded(-at[-1.0]),)),
        lambda: read_elu(at[1.0], at[-8.0], at[-1.0]),
    ]
    best: tuple[float, SmoothGate] | None = None
    for candidate in candidates:
        try:
            gate = candidate()
        except (ValueError, ZeroDivisionError, OverflowError):
            continue
        error = float(((gate.activate(GRID) - values).abs() / (1 + GRID.abs())).max())
        if error < TOLERANCE and is_gate(gate) and (best is None or error < best[0]):
            best = error, gate
    return None if best is None else best[1]


def read_elu(at_one: float, at_minus_eight: float, at_minus_one: float) -> SmoothGate:
    """Return the ELU, SELU or CELU with these values at 1, -8 and -1. Raise ValueError if no activation has them.

    With u = e^-c for the input scale c, the values below 0 are -s·α·(1 - u) and -s·α·(1 - u⁸).
    """
    ratio = at_minus_eight / at_minus_one
    if not 1 < ratio < 8:
        raise ValueError
    low, high = 1e-12, 1 - 1e-12  # (1 - u⁸)/(1 - u) grows with u from 1 to 8
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle**8) / (1 - middle) < ratio else (low, middle)
    alpha = -at_minus_one / at_one / (1 - low)
    return SmoothGate("elu", (rounded(alpha), rounded(at_one), rounded(-math.log(low))))


def rounded(value: float) -> float:
    """Return a number without the last digits, in which the evaluation may differ between spellings."""
    return float(f"{value:.12g}")


def is_gate(gate: SmoothGate) -> bool:
    """Return whether a gate is neither a rectifier nor a multiple of the identity, and has no negative weights."""
    factors = gate.factor(GRID)
    between = (factors > 0) & (factors < gate.largest_factor)
    return bool((factors >= 0).all()) and bool(between.any()) and float(factors.max() - factors.min()) > TOLERANCE


def match_slopes(graph: AtenGraph, node: Node) -> tuple[Node, SmoothGate] | None:
    """Match a PReLU with constant slopes; None for all other nodes."""
    if opname(node) not in {"prelu", "_prelu_kernel"}:
        return None
    x: Any = node.args[0]
    values = get_constant(graph, node.args[1])  # type: ignore[arg-type]
    if values is None:
        return None
    slopes = tuple(values.flatten().tolist())
    return x, SmoothGate("leaky-relu", slopes[:1]) if len(set(slopes)) == 1 else SmoothGate("prelu", slopes)
