"""Split fused layers: leave the neurons that feed only constants out of a layer's operator.

A fused layer computes values for several purposes at once, such as queries, keys and values, which views then take out
of its output. Queries and keys lead only to attention weights, and the factor of a gated unit only to a factor.
Explanations take both as constants, so that these neurons need no moments and no patterns.

The neurons that lead to relevance stay in the operator. Each other part becomes a plain linear call with its own rows
of the weight. The same views on a tensor without memory tell by their strides which neurons a value holds. If a value
is not a view, or not a reordering of whole neurons, the layer stays as it is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from patterns.operators.copies import select_neurons
from patterns.operators.operator import Convolution, Linear, Operator
from patterns.tracing.aten_graph import RESHAPES, AtenGraph, opname
from patterns.tracing.scales import detached, factored, find_carriers

aten = torch.ops.aten

VIEWS = {
    "permute", "transpose", "t", "expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    *RESHAPES,
}  # fmt: skip
COPIES = {"contiguous", "clone", "alias", "dropout"}
IMAGES = 2  # the batch size of the tensor without memory


def split_fused_layers(graph: AtenGraph) -> None:
    """Split each linear layer and convolution of which some neurons feed only constants, in place."""
    carriers = find_carriers(graph.fx)
    calls: dict[str, list[Node]] = {}
    for node in graph.fx.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        operator = graph.attributes[name]
        if isinstance(operator.operator_type, Linear | Convolution) and operator.groups == 1:
            split_layer(graph, operator, [LayerOutput(node, operator) for node in nodes], carriers)
    graph.fx.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})


def split_layer(
    graph: AtenGraph, operator: Operator, outputs: Sequence["LayerOutput"], carriers: Collection[Node]
) -> None:
    """Split the calls of one layer; do nothing if all neurons lead to relevance, or the parts cannot be separated."""
    carrying = [(o, node) for o in outputs for node, user in o.ends if carries(node, user, carriers)]
    if any(node is output.call for output, node in carrying):  # as in most layers: all neurons
        return
    kept = sorted({row for output, node in carrying for row in output.rows(node)})
    plans = [output.divide(output.call, kept) for output in outputs]
    if len(kept) == operator.neurons or any(plan is None for plan in plans):
        return
    smaller = select_neurons(operator, kept)
    for output, plan in zip(outputs, plans):
        replace_call(graph, output.call, operator, smaller, plan or [])
    graph.attributes[str(outputs[0].call.target)] = smaller


def carries(node: Node, user: Node, carriers: Collection[Node]) -> bool:
    """Return whether relevance can pass from a user of a node to the node."""
    cut = user.target in (detached, aten.detach.default) or (user.target is factored and user.args[0] is not node)
    return user.op == "output" or (user in carriers and not cut)


@dataclass(frozen=True)
class Part:
    """A value that holds some neurons of a layer, and no others.

    Attributes:
        node: The node of the value.
        rows: These neurons.
        sizes: The shape that the output of these neurons alone is given.
        order: The order of the dimensions that then makes it the value.
    """

    node: Node
    rows: tuple[int, ...]
    sizes: list[int]
    order: list[int]


class LayerOutput:
    """The output of one call of a layer, and its views.

    Attributes:
        call: The call.
        ends: Pairs of a node and its user: the node is the output or a view of it, the user reads its values.
    """

    def __init__(self, call: Node, operator: Operator) -> None:
        shape = [to_number(size) for size in call.meta["val"].shape]
        axis = operator.operator_type.axis % len(shape)
        self.call, self.ends = call, list[tuple[Node, Node]]()
        self._outer, self._neurons, self._inner = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
        self._output = torch.empty(shape, device="meta")
        self._views: dict[Node, Any] = {}  # a view, or several; None: unknown
        self._follow(call, self._output)

    def _follow(self, node: Node, view: Any) -> None:
        self._views[node] = view
        for user in node.users:
            if is_view(user, node):
                self._follow(user, view if view is None or opname(user) in COPIES else self._apply(user, view))
            elif opname(user) != "sym_size":
                self.ends.append((node, user))

    def _apply(self, user: Node, view: Any) -> Any:
        """Return the view, or views, that a node returns for its first argument; None if it copies."""
        args: Any = map_arg(user.args[1:], lambda n: to_number(n.meta["val"]))
        value = user.target(view, *args)  # type: ignore[operator]
        views = value if isinstance(value, list | tuple) else [value]
        return value if all(v is self._output or v._base is self._output for v in views) else None

    def rows(self, node: Node) -> tuple[int, ...]:
        """Return the neurons of a value in the order of its elements.

        For several values or a copy, return the neurons of the original value.
        """
        while not isinstance(self._views[node], Tensor):
            node = node.args[0]  # type: ignore[assignment]
        view, position = self._views[node], self._neurons * self._inner
        index = torch.tensor([view.storage_offset()])
        for size, stride in sorted(zip(view.shape, view.stride()), key=lambda dim: -dim[1]):
            if stride % position:
                index = (index[:, None] + torch.arange(size) * stride).flatten()
        return tuple(torch.unique_consecutive(index // self._inner % self._neurons).tolist())

    def divide(self, node: Node, kept: Collection[int]) -> list[Part] | None:
        """Divide a value into parts whose neurons are all among some kept ones, or all among the others.

        Returns:
            The parts; None if a reader of the value needs neurons of both, or if a part is no reordering.
        """
        rows = set(self.rows(node))
        if isinstance(self._views[node], Tensor) and (rows <= set(kept) or rows.isdisjoint(kept)):
            part = self.arrange(node)
            return None if part is None else [part]
        parts: list[Part] = []
        for user in node.users:
            divided = self.divide(user, kept) if is_view(user, node) else None
            if divided is None:
                return None
            parts += divided
        return parts

    def arrange(self, node: Node) -> Part | None:
        """Return how a value follows from the output of its neurons alone; None if it is no reordering of it."""
        view, shape, rows = self._views[node], node.meta["val"].shape, self.rows(node)
        order = sorted(range(view.dim()), key=lambda d: -view.stride(d))
        sizes = [shape[d] if isinstance(shape[d], int) else -1 for d in order]
        position = self._neurons * self._inner
        dims = [(view.shape[d], view.stride(d)) for d in order if view.shape[d] > 1]
        outer = [dim for dim in dims if dim[1] % position == 0]
        inner = [dim for dim in dims if dim[1] < self._inner]
        across = [dim for dim in dims if dim not in outer and dim not in inner]
        offset = view.storage_offset()
        if (
            is_contiguous(outer, position, self._outer)
            and is_contiguous(inner, 1, self._inner)
            and all(stride < position and stride % self._inner == 0 for _, stride in across)
            and (offset < position and offset % self._inner == 0)
            and (list(rows) == sorted(set(rows)) and len(rows) == prod(size for size, _ in across))
            and sizes.count(-1) <= 1
        ):
            return Part(node, rows, sizes, [order.index(d) for d in range(view.dim())])
        return None


def is_view(node: Node, source: Node) -> bool:
    """Return whether a node only selects and reorders elements of another."""
    return opname(node) in VIEWS | COPIES and node.args[0] is source


def is_contiguous(dims: Sequence[tuple[int, int]], step: int, count: int) -> bool:
    """Return whether dimensions, pairs of size and stride in descending order, run over `count` steps one by one."""
    expected = step
    for size, stride in reversed(dims):
        if stride != expected:
            return False
        expected *= size
    return expected == step * count


def to_number(size: Any) -> int:
    """Return a size as a number, if the batch has IMAGES images."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, IMAGES)))
    return int(size)


def replace_call(graph: AtenGraph, call: Node, operator: Operator, smaller: Operator, parts: Sequence[Part]) -> None:
    """Replace the parts of a layer's output by outputs of the smaller operator, and of plain calls for other rows."""
    kept: Any = smaller.rows
    others = tuple(row for row in range(operator.neurons) if row not in set(kept))
    axis, value = operator.operator_type.axis, call.meta["val"]
    with graph.fx.inserting_before(call):
        replacement = graph.fx.call_module(str(call.target), call.args)
    replacement.meta = call.meta | {"val": value.narrow(axis, 0, len(kept)).contiguous()}
    plain = call_plainly(graph, call, select_neurons(operator, others))
    for part in parts:
        rows, found = (kept, replacement) if part.rows[0] in kept else (others, plain)
        if part.rows != rows:
            found = take_rows(graph, part.node, found, axis, [rows.index(row) for row in part.rows])
        if part.sizes != list(found.meta["val"].shape):
            found = graph.call(part.node, aten.reshape.default, found, part.sizes)
        if part.order != sorted(part.order):
            found = graph.call(part.node, aten.permute.default, found, part.order)
        graph.replace(part.node, found)


def take_rows(graph: AtenGraph, before: Node, value: Node, axis: int, rows: list[int]) -> Node:
    """Insert a selection of rows: a view if they follow each other."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return graph.call(before, aten.slice.Tensor, value, axis, rows[0], rows[-1] + 1)
    index = graph.constant(before, torch.tensor(rows, device=value.meta["val"].device))
    return graph.call(before, aten.index_select.default, value, axis, index)


def call_plainly(graph: AtenGraph, call: Node, operator: Operator) -> Node:
    """Insert an ATen call that computes an operator's output from the inputs of a call."""
    weight, kind = graph.constant(call, operator.weight), operator.operator_type
    bias = None if operator.bias is None else graph.constant(call, operator.bias)
    if isinstance(kind, Convolution):
        options = [*kind.stride], [*kind.padding], [*kind.dilation], False, [0], kind.groups
        return graph.call(call, aten.convolution.default, call.args[0], weight, bias, *options)
    return graph.call(call, aten.linear.default, call.args[0], weight, bias)
