"""A model as a graph whose linear operations are `Operator` modules.

`trace` exports the model with `torch.export` and rewrites the graph step by step: constants are
evaluated, average pooling is brought to one form, linear operations become operators, batch norm is
folded into the operator before it, gates are read off the users. The result computes what the model
computes, and is an ordinary `GraphModule`: print its code, move it, cast it.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from patterns.errors import UserError
from patterns.operators.operator import Gate, Operator
from patterns.tracing.aten_graph import (
    AtenGraph,
    arguments,
    copy_graph,
    export,
    get_attribute,
    mark_channels,
    opname,
    passes_values,
)
from patterns.tracing.average_pools import canonicalize_average_pools
from patterns.tracing.canonicalize import (
    canonicalize_selections,
    canonicalize_squeezes,
    canonicalize_sums,
)
from patterns.tracing.constant_products import canonicalize_products
from patterns.tracing.digests import constants_digest
from patterns.tracing.folding import fold_constants, fold_scales
from patterns.tracing.forward_checks import agree, compute_independent_outputs, draw_samples_like, require_deterministic
from patterns.tracing.inputs import add_shape_check
from patterns.tracing.linearize import linearize_operations
from patterns.tracing.lower import lower_operations
from patterns.tracing.outputs import PROBABILITIES, add_class_dimension, evaluate_graph, require_logits, strip_ending
from patterns.tracing.rectifiers import IN_PLACE, RECTIFIERS, canonicalize_rectifiers
from patterns.tracing.supported_operations import require_supported

aten = torch.ops.aten


SYMBOLIC = {"sym_size", "mul", "add", "sub", "floordiv", "mod"}  # arithmetic on the batch size


@dataclass(frozen=True)
class Network:
    """A traced model.

    Attributes:
        module: Maps a batch (N, *input_shape) to the model's output (N, *output_shape).
        input_shape: Shape of a sample.
        output_shape: Shape of a sample's output.
        constants: Digest of the numbers that the graph holds in addition to the model's parameters and buffers.
    """

    module: GraphModule
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    constants: str = ""

    @property
    def operators(self) -> dict[str, Operator]:
        """The operators by name, in the order in which the model first calls them."""
        return {operator.name: operator for _, operator in find_operator_calls(self.module)}

    @property
    def like(self) -> Tensor:
        """A weight, for the device and dtype of what the network takes."""
        return next(iter(self.operators.values())).weight

    def rewrite(self, replace: Callable[[Operator], nn.Module]) -> GraphModule:
        """The same graph with each operator replaced; everything else is shared."""
        parts: dict[str, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                parts[node.target] = get_attribute(self.module, node.target)
        for name, module in self.operators.items():
            parts[name] = replace(module)
        return GraphModule(parts, copy_graph(self.module.graph), type(self.module).__name__)

    def until(self, operator: str) -> "Network":
        """The network that ends at an operator, with what comes out behind its gate: (N, K, *positions).

        At its last call, where it is called several times. UserError for a name that is no operator's.
        """
        if operator not in self.operators:
            close = difflib.get_close_matches(operator, self.operators) or list(self.operators)[-3:]
            raise UserError(operator, "the model has no such operator", f"It has {', '.join(close)}, …")
        module = self.rewrite(lambda op: op)
        last, found = [(node, op) for node, op in find_operator_calls(module) if op.name == operator][-1]
        (end,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(end):
            out = last
            if (gate := found.gate) is not None:
                limits = (None if math.isinf(bound) else bound for bound in (gate.low, gate.high))
                out = module.graph.call_function(aten.clamp.default, (out, *limits))
            if found.operator_type.axis != 1:
                out = module.graph.call_function(torch.movedim, (out, found.operator_type.axis, 1))
        end.args = (out,)
        wanted = {end, *find_ancestors(end)}
        for node in reversed(module.graph.nodes):
            if node not in wanted and node.op != "placeholder":
                module.graph.erase_node(node)
        module.recompile()
        shape = list(found.output_shape)
        shape.insert(
            0, shape.pop(found.operator_type.axis - 1 if found.operator_type.axis > 0 else found.operator_type.axis)
        )
        return Network(module, self.input_shape, tuple(shape), self.constants)


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    name: str = "model",
    pass_through: Collection[str] = (),
    strip_softmax: bool = False,
) -> Network:
    """Return a model's graph in evaluation mode, for inputs of the example's shape and any batch size.

    The model is put in evaluation mode. It runs a few times on random samples, and its graph must give the same.

    Args:
        model: The model. One that gives one number for each sample, (N,), counts as one of one class, (N, 1).
        example: Shape (N, …), on the model's device, in its dtype.
        name: What to call the model in messages.
        pass_through: Names of further operations whose usual gradient the caller accepts.
        strip_softmax: Leave off a softmax, log-softmax or sigmoid that the model ends in.

    Raises:
        UserError: If the model does not take the example, does not return one tensor with a row for each sample, is
            random, lets a sample depend on the others of its batch, cannot be exported, or holds an operation that is
            neither linear nor a known rectifier, pooling or shape change.
    """
    model.eval()
    if any(value.is_inference() for value in (*model.parameters(), *model.buffers())):
        what = "the model was made in torch.inference_mode(), and its weights cannot be exported"
        raise UserError(name, what, "Make or load it outside of inference mode.")
    with torch.inference_mode(False), torch.no_grad():
        samples = draw_samples_like(example)
        output = compute_independent_outputs(model, samples, name)
        graph = export(model, example, name)
        require_deterministic(graph, name)
        constants = constants_digest(graph, model)
        if strip_softmax and strip_ending(graph):
            output = evaluate_graph(graph, samples)
        network = build_network(graph, example, name, pass_through)
        require_same_output(network, samples, output, name)
    return replace(network, constants=constants)


def build_network(graph: AtenGraph, example: Tensor, name: str, pass_through: Collection[str]) -> Network:
    """The network of an exported graph, which becomes its own."""
    canonicalize_squeezes(graph)
    add_class_dimension(graph)
    fold_constants(graph)
    mark_channels(graph)
    linearize_operations(graph, pass_through)
    canonicalize_rectifiers(graph)
    canonicalize_selections(graph)
    canonicalize_sums(graph)
    canonicalize_average_pools(graph)
    canonicalize_products(graph)
    mark_channels(graph)
    lower_operations(graph)
    fold_scales(graph)
    if not PROBABILITIES & set(pass_through):
        require_logits(graph, name)
    require_supported(graph, name, pass_through)
    input_shape = tuple(example.shape[1:])
    add_shape_check(graph, input_shape)
    module = GraphModule(graph.attributes, graph.fx, "Network")
    assign_gates(module)
    rectify_in_place(module)
    output_shape = record_shapes(module, example)
    return Network(module.requires_grad_(False), input_shape, output_shape)


def require_same_output(network: Network, samples: Tensor, expected: Tensor, name: str) -> None:
    """Raise UserError if a network gives other outputs than its model, for all samples or for one alone."""
    expected = expected[:, None] if expected.dim() == 1 else expected
    for chosen in (slice(None), slice(2, None)):
        if not agree(network.module(samples[chosen]), expected[chosen]):
            what = "the traced network gives other outputs than the model"
            raise UserError(name, what, "Write its forward without what depends on the batch size or on earlier calls.")


def assign_gates(module: GraphModule) -> None:
    """Give each operator its gate: the one rectifier that all its calls feed, and nothing else."""
    gates: dict[str, set[Gate | None]] = {}
    calls = Counter(operator.name for _, operator in find_operator_calls(module))
    for node, operator in find_operator_calls(module):
        gates.setdefault(operator.name, set()).update(find_consumer_gates(node))
    for _, operator in find_operator_calls(module):
        operator.calls = calls[operator.name]
        found = gates[operator.name]
        operator.gate = found.copy().pop() if len(found) == 1 else None
        operator.mixed_gates = len(found) > 1


def find_consumer_gates(node: Node) -> Iterator[Gate | None]:
    """What each path from a node leads to: a rectifier's gate, or None for anything else."""
    for user in node.users:
        if user.op == "call_function" and user.target in RECTIFIERS:
            yield RECTIFIERS[user.target](arguments(user))
        elif passes_values(user):
            yield from find_consumer_gates(user)
        elif opname(user) not in SYMBOLIC:
            yield None


def rectify_in_place(module: GraphModule) -> None:
    """Let a rectifier take the memory of an operator's output that nobody else reads."""
    for node, _ in find_operator_calls(module):
        user, *others = node.users
        if not others and user.target in IN_PLACE:
            user.target = IN_PLACE[user.target]
    module.recompile()


def record_shapes(module: GraphModule, example: Tensor) -> tuple[int, ...]:
    """Run the example once to note each operator's shapes; gives the output's."""

    def note(operator: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(operator, Operator)
        operator.input_shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        operator.output_shape = tuple(output.shape[1:])
        operator.per_image = operator.per_image and all(len(values) == 1 for values in (*inputs, output))

    hooks = [operator.register_forward_hook(note) for _, operator in find_operator_calls(module)]
    with torch.no_grad():
        output = module(example[:1])
    for hook in hooks:
        hook.remove()
    return tuple(output.shape[1:])


def find_operator_calls(module: GraphModule) -> Iterator[tuple[Node, Operator]]:
    for node in module.graph.nodes:
        if node.op == "call_module":
            operator = module.get_submodule(str(node.target))
            assert isinstance(operator, Operator)
            yield node, operator


def find_ancestors(node: Node) -> set[Node]:
    """All that a node is computed from."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found
