"""The end of a model: a final softmax or sigmoid, and outputs of one number per sample."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from patterns.errors import UserError
from patterns.tracing.aten_graph import VALUE_PASSING, AtenGraph, opname, source

# Operations that turn logits into probabilities. Methods explain the logits: a probability depends on all classes.
PROBABILITIES = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "log_sigmoid", "log_sigmoid_forward"}


def find_ending(graph: AtenGraph) -> Node | None:
    """Return the softmax or sigmoid that computes the model's output from its logits; None for another output."""
    (output,) = graph.fx.find_nodes(op="output")
    node = output.args[0]
    while opname(node) in VALUE_PASSING and isinstance(node.args[0], Node):
        node = node.args[0]
    return node if opname(node) in PROBABILITIES else None


def strip_ending(graph: AtenGraph) -> bool:
    """Let the graph end at the model's logits. Return whether the model ended in a softmax or sigmoid."""
    node = find_ending(graph)
    if node is None:
        return False
    (logits,) = node.all_input_nodes
    graph.replace(node, logits)
    return True


def require_logits(graph: AtenGraph, name: str) -> None:
    """Raise UserError if the model ends in a softmax or sigmoid."""
    node = find_ending(graph)
    if node is not None:
        what = f"the model ends in {opname(node).strip('_')}, in {source(node)}, and methods explain its logits"
        remedy = "Remove the last operation from the model, or pass `strip_softmax=True`."
        raise UserError(name, what, remedy, "strip_softmax")


def add_class_dimension(graph: AtenGraph) -> None:
    """Let a model that returns one number per sample, (N,), return one class, (N, 1)."""
    (output,) = graph.fx.find_nodes(op="output")
    (scores,) = output.all_input_nodes
    if scores.meta["val"].dim() == 1:
        output.args = (graph.call(output, torch.ops.aten.unsqueeze.default, scores, 1, like=scores),)


def evaluate_graph(graph: AtenGraph, samples: Tensor) -> Tensor:
    """Return the output of the exported graph for samples."""
    copy = graph.copy()
    with torch.no_grad():
        return GraphModule(copy.attributes, copy.fx)(samples)
