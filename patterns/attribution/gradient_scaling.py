"""Powers of two that keep a backward pass within the range of its dtype, at any depth.

The magnitudes of patterns multiply from layer to layer, and the product over a deep network exceeds float32's 1e38.
Only the direction of a signal is meaningful, but sums must stay right. So the scaling comes from a potential: every
value v of the graph has an integer φ(v), its gradient g is computed as g / 2^φ(v), and every module between two values
multiplies it by 2^(φ(out) - φ(in)) in the backward pass. Branches that meet in a value then agree. Multiplying by a
power of two is exact, so the result is bit for bit the unscaled result times 2^-φ(input).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

SAFE_DIGITS = 40  # binary digits by which magnitudes may change without any scaling
FINITE_DIGITS = 100  # binary digits of a factor that is finite in every dtype
MAX_ROUNDS = 60  # each round of the calibration extends the known part of the graph by the dtype's whole range


class ScaledModule(nn.Module):
    """A module that multiplies its backward pass by its own factors, so its inputs and output can differ in φ."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class BranchScale(ScaledModule):
    """The identity on one input of a concatenation, so that each branch can have its own φ."""

    def __init__(self, name: str, factor: Callable[[], Tensor]) -> None:
        super().__init__(name)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return _BranchScale.apply(x, self.factor)


class _BranchScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Callable[[], Tensor]) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor(), None


def insert_branch_scales(module: GraphModule, factor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Insert a `BranchScale` before each input of each concatenation; return their factors by name, all 1."""
    names: list[str] = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.cat.default:
            continue
        branches = []
        for branch in node.args[0]:
            name = f"branch_scales.{len(names)}"
            names.append(name)
            module.add_submodule(name, BranchScale(name, lambda name=name: factor(name)))  # type: ignore[misc]
            with module.graph.inserting_before(node):
                branches.append(module.graph.call_module(name, (branch,)))
        node.args = (branches, *node.args[1:])
    module.recompile()
    return {name: torch.ones(()) for name in names}


@dataclass(frozen=True)
class ValueClasses:
    """The classes of values that share a φ, numbered from the model's output, whose φ is 0.

    Attributes:
        inputs: The classes of the inputs of each scaled module, by its name.
        outputs: The class of the output of each scaled module, by its name.
        order: All classes, from the output to the input.
        source: The class of the model's input.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, int]
    order: list[int]
    source: int


def find_value_classes(module: GraphModule) -> ValueClasses:
    """Return the classes of values: a scaled module separates two classes, any other node has the class of its inputs.

    A module that is called several times has one factor, so all its calls share their classes.
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
        if is_scaled_module(module, node):
            parent[root(node)] = root((node.target, "out"))
            for number, source in enumerate(input_nodes(node)):
                parent[root(source)] = root((node.target, number))
        else:
            for source in inputs:
                parent[root(source)] = root(node)
    numbers: dict[Any, int] = {}
    for node in reversed(module.graph.nodes):
        numbers.setdefault(root(node), len(numbers))
    calls = [node for node in module.graph.nodes if is_scaled_module(module, node)]
    (placeholder,) = module.graph.find_nodes(op="placeholder")
    return ValueClasses(
        {str(c.target): tuple(numbers[root(n)] for n in input_nodes(c)) for c in calls},
        {str(c.target): numbers[root(c)] for c in calls},
        sorted(numbers.values()),
        numbers[root(placeholder)],
    )


def is_scaled_module(module: GraphModule, node: Node) -> bool:
    """Return whether a node calls a `ScaledModule`."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ScaledModule)


def is_size(node: Node) -> bool:
    """Return whether a node is a number, such as the batch size, which has no gradient."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def input_nodes(call: Node) -> list[Node]:
    """Return the nodes among the arguments of a call."""
    return [n for n in call.args if isinstance(n, Node)]


def scale_weights(weights: Mapping[str, Tensor], classes: ValueClasses, phi: Mapping[int, int]) -> dict[str, Tensor]:
    """Multiply backward weights by 2^(φ(out) - φ(in)), where φ(in) is the potential of each input of an operator."""
    result = {}
    for name, weight in weights.items():
        if name not in classes.outputs:
            continue
        exponents = [phi[classes.outputs[name]] - phi[c] for c in classes.inputs[name]]
        if not any(exponents):
            result[name] = weight
        elif len(exponents) == 1:
            result[name] = times_power_of_two(weight, exponents[0])
        else:  # an addition has one column per input
            columns = [times_power_of_two(w, e) for w, e in zip(weight.unbind(1), exponents)]
            result[name] = torch.stack(columns, 1)
    return result


def times_power_of_two(values: Tensor, exponent: int) -> Tensor:
    """Return values · 2^exponent, which is exact if the result is in range."""
    while exponent:  # in factors that are finite themselves, so that 0 stays 0
        step = max(-FINITE_DIGITS, min(exponent, FINITE_DIGITS))
        values, exponent = values * 2.0**step, exponent - step
    return values


def safe_digits(dtype: torch.dtype) -> int:
    """Return the binary digits by which magnitudes may change unscaled: a third of the range, at most SAFE_DIGITS."""
    return min(SAFE_DIGITS, math.frexp(torch.finfo(dtype).max)[1] // 3)


def is_in_range(largest: Mapping[int, float], digits: int) -> bool:
    """Return whether the largest unscaled gradients of all classes are within 2^±digits, so no scaling is needed."""
    return all(m == 0 or (m < math.inf and abs(math.frexp(m)[1]) <= digits) for m in largest.values())


def measure_gradients(module: GraphModule, classes: ValueClasses, inputs: Tensor) -> dict[int, float]:
    """Return the largest |gradient| of each class of values in the backward pass from the predicted classes.

    Args:
        module: The graph, with the weights of the backward pass.
        classes: Its classes of values.
        inputs: A batch of inputs.
    """
    largest = dict.fromkeys(classes.order, 0.0)

    def record(number: int, gradient: Tensor | None) -> None:
        if gradient is None:  # of a value that leads only to constants
            return
        value = float(gradient.abs().max())
        largest[number] = value if not value <= largest[number] else largest[number]

    def watch(scaled: ScaledModule, _: object, output: Tensor) -> None:
        number = classes.outputs[scaled.name]
        if output.requires_grad:  # a value that no input reaches, such as a class token, has no gradient
            output.register_hook(lambda gradient: record(number, gradient))

    scaled_modules = [each for each in module.modules() if isinstance(each, ScaledModule)]
    hooks = [each.register_forward_hook(watch) for each in scaled_modules]
    inputs = inputs.requires_grad_()
    scores = module(inputs)
    for hook in hooks:
        hook.remove()
    output_gradient = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
    (gradient,) = torch.autograd.grad(scores, inputs, output_gradient)
    record(classes.source, gradient)
    return largest


def calibrate(classes: ValueClasses, measure: Callable[[Mapping[int, int]], Mapping[int, float]]) -> dict[int, int]:
    """Find a potential that makes the largest scaled gradient of every class about 1.

    Args:
        classes: The classes of values.
        measure: Function that runs a backward pass with a potential and returns the largest scaled |gradient| of each
            class: 0, inf or nan if it left the range.

    Returns:
        φ by class.
    """
    phi = dict.fromkeys(classes.order, 0)
    nearest: dict[int, int] = {}  # from a class to the last of the classes that its gradient comes from
    for name, inputs in classes.inputs.items():
        out = classes.outputs[name]
        for source in inputs:
            if out < source:
                nearest[source] = max(out, nearest.get(source, out))
    for _ in range(MAX_ROUNDS):
        largest, before = measure(phi), dict(phi)
        for c in classes.order[1:]:  # from the output on, so that a class out of range takes the new φ of its source
            if 0 < largest.get(c, 0.0) < math.inf:
                phi[c] += math.frexp(largest[c])[1]
            elif c in nearest:
                phi[c] = phi[nearest[c]]
        if all(m < math.inf for m in largest.values()) and all(abs(phi[c] - before[c]) <= 1 for c in phi):
            break
    return phi
