"""The ATen graph of a model, and functions that read its nodes."""

import re
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operations that pass values on unchanged, some of them or in another shape. A gate may follow behind them.
VALUE_PASSING = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze",
    "expand", "contiguous", "clone", "alias", "detach", "cat", "stack", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "getitem", "_to_copy", "to", "dropout", "roll", "flip",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "index_select",
}  # fmt: skip


@dataclass(frozen=True)
class AtenGraph:
    """A graph that the passes of the tracing rewrite.

    Attributes:
        fx: The torch.fx graph.
        attributes: Tensors and modules by the names under which nodes refer to them.
    """

    fx: Graph
    attributes: dict[str, Any]

    def copy(self) -> "AtenGraph":
        """Return a copy with a graph of its own and the same tensors."""
        return AtenGraph(copy_graph(self.fx), dict(self.attributes))

    def constant(self, node: Node, value: Tensor) -> Node:
        """Insert a node for a constant tensor before a node."""
        target = f"constants.{node.name}_{len(self.attributes)}"
        self.attributes[target] = value
        with self.fx.inserting_before(node):
            return self.fx.get_attr(target)

    def call(self, before: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
        """Insert a call before a node.

        Args:
            before: The node.
            target: The function to call.
            *args: Its arguments.
            like: The node whose place in the model's code the call takes over; by default `before`.
        """
        with self.fx.inserting_before(before):
            node = self.fx.call_function(target, args)
        values = [self._value(n) for n in node.all_input_nodes]
        mode = next(v.fake_mode for v in tree_leaves(values) if isinstance(v, FakeTensor))
        fakes = {
            n: mode.from_tensor(v, static_shapes=True) if isinstance(v, Tensor) and not isinstance(v, FakeTensor) else v
            for n, v in zip(node.all_input_nodes, values)
        }
        with torch.no_grad():
            value = target(*map_arg(args, lambda n: fakes[n]))
        node.meta = (like or before).meta | {"val": value}
        return node

    def replace(self, node: Node, replacement: Node) -> None:
        """Let the users of a node use another node, and erase the node."""
        node.replace_all_uses_with(replacement)
        self.fx.erase_node(node)

    def _value(self, node: Node) -> Any:
        return node.meta["val"] if "val" in node.meta else self.attributes[str(node.target)]


def get_constant(graph: AtenGraph, node: Node | None) -> Tensor | None:
    """Return the tensor of a constant node; None for all other nodes."""
    return graph.attributes[str(node.target)] if node is not None and node.op == "get_attr" else None


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an ATen call by name, including the defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    names = [a.name for a in schema]
    return {a.name: a.default_value for a in schema} | dict(zip(names, node.args)) | dict(node.kwargs)


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number per dimension. A single number holds for all dimensions, and () stays empty."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def is_activation(value: Any) -> bool:
    """Return whether an argument is a tensor that depends on the input."""
    return isinstance(value, Node) and value.op != "get_attr" and isinstance(value.meta.get("val"), Tensor)


def opname(node: Node) -> str:
    """Return `relu` for a call of `aten.relu.default`, and an empty string for nodes that are not calls."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].removesuffix("_")
    return getattr(node.target, "__name__", str(node.target))


def passes_values(node: Node) -> bool:
    """Return whether a call only passes values on: all or some of them, in any shape."""
    return opname(node) in VALUE_PASSING or node.target is torch.ops.aten.max.dim


def mark_channels(graph: AtenGraph) -> None:
    """Record in `meta["axis"]` which dimension of each value holds the channels.

    This is dimension 1 for the input and after convolutions and pooling, and the last dimension after linear layers.
    Permutations move it. A change of shape keeps it if a dimension of the same size and stride remains; otherwise the
    channels are in the last dimension if they were there before, and in dimension 1 if not. Values that do not depend
    on the input, such as a class token for each image, follow the others.
    """
    for node in graph.fx.nodes:
        node.meta["constant"] = node.op != "placeholder" and all(n.meta["constant"] for n in tensor_inputs(node))
        value = first_tensor(node)
        if value is not None:
            axis = find_channel_axis(node, value)
            node.meta["axis"] = axis if 1 <= axis < value.dim() else min(1, value.dim() - 1)


def tensor_inputs(node: Node) -> list[Node]:
    """Return the inputs of a node that are tensors, except for tensors of the model."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and first_tensor(n) is not None]


def find_channel_axis(node: Node, value: Tensor) -> int:
    """Return the channel dimension of a node's result, given the channel dimensions of its arguments."""
    operation, rank = opname(node), value.dim()
    inputs = [n for n in tensor_inputs(node) if not n.meta["constant"]]
    if not inputs or operation.startswith(("conv", "max_pool", "avg_pool", "adaptive_", "upsample_", "_upsample_")):
        return 1
    if operation in {"linear", "matmul", "bmm", "scaled_dot_product_attention"}:
        return rank - 1
    ranks = [first_tensor(n).dim() for n in inputs]  # type: ignore[union-attr]
    same = ranks.index(rank) if rank in ranks else 0
    axis, before = inputs[same].meta["axis"], first_tensor(inputs[same])
    assert before is not None
    if operation == "expand":
        return axis + rank - before.dim()
    if operation in {"select", "unbind"}:
        dim = arguments(node)["dim"] % before.dim()
        return axis - (dim < axis)
    if operation == "stack":
        return axis + (arguments(node)["dim"] % rank <= axis)
    moved = follow_axis(node, axis)
    if moved is not None:
        return moved
    if operation in RESHAPES or rank != before.dim():
        return rank - 1 if axis == before.dim() - 1 else 1
    return axis


def follow_axis(node: Node, axis: int) -> int | None:
    """Return the dimension of a node's result that a dimension of its input becomes.

    Returns:
        The dimension; None if the node changes more than the order or number of dimensions, or if it merges or splits
        this dimension.
    """
    operation, value = opname(node), first_tensor(node)
    if value is None or operation not in {"permute", "transpose", "t", *RESHAPES, *UNCHANGED}:
        return None
    rank = value.dim()
    if operation == "permute":
        order: Any = node.args[1]
        return [d % rank for d in order].index(axis)
    if operation in {"transpose", "t"}:
        dims: Any = node.args[1:3] if operation == "transpose" else (0, 1)
        one, other = (d % rank for d in dims)
        return {one: other, other: one}.get(axis, axis)
    if operation in RESHAPES:
        before = node.all_input_nodes[0].meta["val"].shape
        stride = prod(before[axis + 1 :])
        found = [d for d in range(1, rank) if (value.shape[d], prod(value.shape[d + 1 :])) == (before[axis], stride)]
        return found[0] if found else None
    return axis


UNCHANGED = {"contiguous", "clone", "alias", "dropout", "_to_copy", "to"}
RESHAPES = {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


def first_tensor(node: Node) -> Tensor | None:
    """Return the tensor that a node computes, or the first of several."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def source(node: Node) -> str:
    """Return the module and the line of the model's code that call a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = (stack[-1][0] if stack else "") or "the model"
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    if not own:
        return module
    file, line, code = own[-1]
    return f"{module} ({file.rpartition('/')[2]}:{line}: {code.strip()})"


def copy_graph(graph: Graph) -> Graph:
    """Return a copy of a torch.fx graph."""
    copy = Graph()
    output = copy.graph_copy(graph, {}, return_output_node=False)
    copy.output(output)
    return copy


def get_attribute(module: nn.Module, target: str) -> Any:
    """Return an attribute of a module by its dotted name."""
    return attrgetter(target)(module)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
