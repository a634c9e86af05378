"""The end of a model: a last softmax or sigmoid, and outputs of one number for each sample."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from patterns.errors import UserError
from patterns.tracing.aten_graph import SEEN_THROUGH, AtenGraph, opname, source

# Operations that turn logits into probabilities. Methods explain the logits: a probability depends on all classes.
PROBABILITIES = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "log_sigmoid", "log_sigmoid_forward"}


def find_ending(graph: AtenGraph) -> Node | None:
    """Return the operation that turns a model's logits into its output; None if the output is not made so."""
    (output,) = graph.fx.find_nodes(op="output")
    node = output.args[0]
    while opname(node) in SEEN_THROUGH and isinstance(node.args[0], Node):
        node = node.args[0]
    return node if opname(node) in PROBABILITIES else None


def strip_ending(graph: AtenGraph) -> bool:
    """Let a model end at its logits; returns whether it ended in a softmax or sigmoid."""
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
        raise UserError(name, what, "Leave the last operation off in the model, or pass --strip-softmax.")


def add_class_dimension(graph: AtenGraph) -> None:
    """Let a model that gives one number for each sample, (N,), give (N, 1): one class."""
    (output,) = graph.fx.find_nodes(op="output")
    (scores,) = output.all_input_nodes
    if scores.meta["val"].dim() == 1:
        output.args = (graph.call(output, torch.ops.aten.unsqueeze.default, scores, 1, like=scores),)


def evaluate_graph(graph: AtenGraph, samples: Tensor) -> Tensor:
    """Return what the exported graph gives for some samples."""
    copy = graph.copy()
    with torch.no_grad():
        return GraphModule(copy.attributes, copy.fx)(samples)
