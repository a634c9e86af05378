"""Graphs as plain records, so that a traced network can be sent to another process.

`GraphModule` itself is pickled as source code and traced again when it is read, and torch's operations cannot be
pickled at all.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from patterns.tracing.aten_graph import get_attribute


@dataclass(frozen=True)
class OperationName:
    """The name of one of torch's operations: aten.relu.default."""

    namespace: str
    name: str
    overload: str

    def resolve(self) -> OpOverload:
        """Return the operation."""
        return getattr(getattr(getattr(torch.ops, self.namespace), self.name), self.overload)


@dataclass(frozen=True)
class NodeName:
    """The name of a node among the arguments of another node."""

    name: str


@dataclass(frozen=True)
class NodeRecord:
    """A node of a graph.

    Attributes:
        op: What the node does: placeholder, get_attr, call_function, call_module or output.
        name: Its name.
        target: What it calls or reads.
        args: Its arguments, with `NodeName` for nodes.
        kwargs: Its keyword arguments, in the same form.
        is_number: Whether its value is a number, such as the batch size, and no tensor.
    """

    op: str
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_number: bool


def record_graph(module: GraphModule) -> tuple[dict[str, Any], tuple[NodeRecord, ...]]:
    """Return the modules and tensors that a graph uses, by name, and the records of its nodes."""
    attributes, records = {}, []
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attributes[str(node.target)] = get_attribute(module, str(node.target))
        target = node.target
        if isinstance(target, OpOverload):
            target = OperationName(target.namespace, target._opname, target._overloadname)
        args, kwargs = (replace_nodes(values, lambda n: NodeName(n.name)) for values in (node.args, node.kwargs))
        is_number = isinstance(node.meta.get("val"), int | torch.SymInt)
        records.append(NodeRecord(node.op, node.name, target, args, kwargs, is_number))
    return attributes, tuple(records)


def replace_nodes(values: Any, function: Any) -> Any:
    """Return nested arguments with each node replaced."""
    return map_aggregate(values, lambda value: function(value) if isinstance(value, Node) else value)


def build_graph(
    attributes: Mapping[str, Any], records: tuple[NodeRecord, ...], device: torch.device | None = None
) -> GraphModule:
    """Return the graph of some records.

    Args:
        attributes: The modules and tensors that it uses, by name.
        records: Its nodes.
        device: The device on which its operations create tensors; None: as recorded.
    """
    graph, nodes = Graph(), dict[str, Node]()

    def restore(value: Any) -> Any:
        if isinstance(value, NodeName):
            return nodes[value.name]
        return device if device is not None and isinstance(value, torch.device) else value

    for record in records:
        target = record.target.resolve() if isinstance(record.target, OperationName) else record.target
        args: Any = map_aggregate(record.args, restore)
        kwargs: Any = map_aggregate(record.kwargs, restore)
        node = graph.create_node(record.op, target, args, kwargs, record.name)
        if record.is_number:
            node.meta["val"] = 0  # any number
        nodes[record.name] = node
    return GraphModule(dict(attributes), graph, "Network")


def move(value: nn.Module | Tensor, device: torch.device) -> nn.Module | Tensor:
    """Return a copy of a module or tensor on another device."""
    return copy.deepcopy(value).to(device)
