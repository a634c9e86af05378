"""Powers of two that keep a backward pass inside the range of its dtype, at any depth.

Patterns' magnitudes multiply from layer to layer; a deep net's product passes float32's 1e38. Only the
direction of a signal means anything, but sums must stay right. So the scaling comes from a potential:
every value v of the graph has an integer φ(v), its gradient g is carried as g / 2^φ(v), and whatever
lies between two values multiplies by 2^(φ(out) - φ(in)) on the way back. Branches that meet in a value
then agree, and powers of two are exact: the result is the unscaled one times 2^-φ(input), to the bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

SAFE = 40  # binary digits that magnitudes may move without any scaling
FINITE = 100  # binary digits of a factor that is finite in every dtype
ROUNDS = 60  # each extends the known part of the graph by a dtype's whole range


class Step(nn.Module):
    """What multiplies by numbers of its own on the way back, so that its inputs and its output differ in scale."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Crossing(Step):
    """The identity on one input of a concatenation, whose parts may need scales of their own."""

    def __init__(self, name: str, factor: Callable[[], Tensor]) -> None:
        super().__init__(name)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return _Crossing.apply(x, self.factor)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Callable[[], Tensor]) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor(), None


def add_crossings(module: GraphModule, factor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Put a Crossing before each input of each concatenation; gives their factors, all 1."""
    names: list[str] = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.cat.default:
            continue
        parts = []
        for part in node.args[0]:
            name = f"crossings.{len(names)}"
            names.append(name)
            module.add_submodule(name, Crossing(name, lambda name=name: factor(name)))  # type: ignore[misc]
            with module.graph.inserting_before(node):
                parts.append(module.graph.call_module(name, (part,)))
        node.args = (parts, *node.args[1:])
    module.recompile()
    return {name: torch.ones(()) for name in names}


@dataclass(frozen=True)
class Values:
    """Which values of the graph share a φ.

    inputs, outputs: by operator or crossing, the classes of its inputs and of its output.
    order: the classes from the model's output, whose φ is 0, to its input.
    source: the class of the model's input.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, int]
    order: list[int]
    source: int


def values(module: GraphModule) -> Values:
    """The classes: operators and crossings (steps) lie between values, everything else keeps its input's.

    An operator that is called several times has one factor, so all its calls share their classes.
    """
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for node in module.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
        if is_size(node):
            continue
        if is_step(module, node):
            parent[root(node)] = root((node.target, "out"))
            for number, source in enumerate(inputs_of(node)):
                parent[root(source)] = root((node.target, number))
        else:
            for source in inputs:
                parent[root(source)] = root(node)
    numbers: dict[Any, int] = {}
    for node in reversed(module.graph.nodes):
        numbers.setdefault(root(node), len(numbers))
    calls = [node for node in module.graph.nodes if is_step(module, node)]
    (placeholder,) = module.graph.find_nodes(op="placeholder")
    return Values(
        {str(c.target): tuple(numbers[root(n)] for n in inputs_of(c)) for c in calls},
        {str(c.target): numbers[root(c)] for c in calls},
        sorted(numbers.values()),
        numbers[root(placeholder)],
    )


def is_step(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Step)


def is_size(node: Node) -> bool:
    """Whether a node is a number, such as the batch size, that no gradient goes through."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def inputs_of(call: Node) -> list[Node]:
    return [n for n in call.args if isinstance(n, Node)]


def scaled(weights: Mapping[str, Tensor], classes: Values, phi: Mapping[int, int]) -> dict[str, Tensor]:
    """Backward weights times 2^(φ(out) - φ(in)), for each input of an operator its own."""
    result = {}
    for name, weight in weights.items():
        if name not in classes.outputs:
            continue
        exponents = [phi[classes.outputs[name]] - phi[c] for c in classes.inputs[name]]
        if not any(exponents):
            result[name] = weight
        elif len(exponents) == 1:
            result[name] = power(weight, exponents[0])
        else:  # an addition: a column for each input
            columns = [power(w, e) for w, e in zip(weight.unbind(1), exponents)]
            result[name] = torch.stack(columns, 1)
    return result


def power(values: Tensor, exponent: int) -> Tensor:
    """values · 2^exponent, exact wherever the result is in range."""
    while exponent:  # in steps that are finite themselves, so that 0 stays 0
        step = max(-FINITE, min(exponent, FINITE))
        values, exponent = values * 2.0**step, exponent - step
    return values


def safe(dtype: torch.dtype) -> int:
    """Binary digits that magnitudes may move in a dtype without any scaling: a third of its range, at most SAFE."""
    return min(SAFE, math.frexp(torch.finfo(dtype).max)[1] // 3)


def in_range(largest: Mapping[int, float], digits: int) -> bool:
    """Whether the largest gradients by class, unscaled, lie so near 1 that no scaling is called for."""
    return all(m == 0 or (m < math.inf and abs(math.frexp(m)[1]) <= digits) for m in largest.values())


def calibrate(classes: Values, measure: Callable[[Mapping[int, int]], Mapping[int, float]]) -> dict[int, int]:
    """A potential under which every class's largest gradient is carried as about 1.

    measure: a backward pass under a potential; gives the largest |gradient| carried by each class
    (0, inf or nan where it left the range).
    """
    phi = dict.fromkeys(classes.order, 0)
    nearest: dict[int, int] = {}  # from a class to the last of those that its gradient comes from
    for name, inputs in classes.inputs.items():
        out = classes.outputs[name]
        for source in inputs:
            if out < source:
                nearest[source] = max(out, nearest.get(source, out))
    for _ in range(ROUNDS):
        largest, before = measure(phi), dict(phi)
        for c in classes.order[1:]:  # from the output on: what left the range takes the scale of where it comes from
            if 0 < largest.get(c, 0.0) < math.inf:
                phi[c] += math.frexp(largest[c])[1]
            elif c in nearest:
                phi[c] = phi[nearest[c]]
        if all(m < math.inf for m in largest.values()) and all(abs(phi[c] - before[c]) <= 1 for c in phi):
            break
    return phi
