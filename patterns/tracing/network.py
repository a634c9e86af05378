"""Trace a model into a graph whose linear operations are `Operator` modules.

`trace` exports the model with `torch.export` and rewrites the graph in passes: it folds constants, brings equivalent
operations into one form, replaces linear operations by operators, folds batch norms into the operators before them, and
reads the gate of each operator from its consumers. The result computes what the model computes. It is an ordinary
`GraphModule`: print its code, move it to a device, cast it.
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
from patterns.operators.gates import AnyGate, SmoothGate, gated
from patterns.operators.operator import Operator
from patterns.tracing.aten_graph import (
    AtenGraph,
    arguments,
    copy_graph,
    follow_axis,
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
from patterns.tracing.exporting import export
from patterns.tracing.folding import fold_constants, fold_scales
from patterns.tracing.forward_checks import agree, compute_independent_outputs, draw_samples_like, require_deterministic
from patterns.tracing.fused_layers import split_fused_layers
from patterns.tracing.graph_records import NodeRecord, build_graph, move, record_graph
from patterns.tracing.images_first import put_images_first
from patterns.tracing.inputs import add_shape_check
from patterns.tracing.linearize import linearize_operations
from patterns.tracing.lower import lower_operations
from patterns.tracing.outputs import PROBABILITIES, add_class_dimension, evaluate_graph, require_logits, strip_ending
from patterns.tracing.rectifiers import IN_PLACE, RECTIFIERS, canonicalize_rectifiers
from patterns.tracing.scales import count_constants
from patterns.tracing.smooth_gates import canonicalize_smooth_gates
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
        constants: Digest of the numbers in the graph that are not parameters or buffers of the model.

    Example:
        >>> network = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(2, 4))
        >>> list(network.operators), network.operators["0"].gate
        (['0', '2'], Gate(low=0.0, high=inf))
        >>> network.until("0").module(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
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
        """A weight of the network: inputs must have its device and dtype."""
        return next(iter(self.operators.values())).weight

    def to(self, device: torch.device | str) -> "Network":
        """Return this network on a device; it is the network itself if it is there already.

        Args:
            device: The device.
        """
        device = torch.device(device)
        if self.like.device.type == device.type and device.index in (None, self.like.device.index):
            return self
        attributes, records = record_graph(self.module)
        moved = {name: move(value, device) for name, value in attributes.items()}
        return replace(self, module=build_graph(moved, records, device))

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.input_shape, self.output_shape, self.constants
        return restore_network, (*record_graph(self.module), *fields)

    @property
    def constant_factors(self) -> dict[str, int]:
        """The number of factors that depend on the sample and that explanations take as constants, by their kind.

        These are norms, divisors, smooth gates, factors of products, and attention weights. The method `gradient`
        differentiates them.
        """
        return count_constants(self.module)

    def rewrite(self, replace: Callable[[Operator], nn.Module]) -> GraphModule:
        """Return the graph with each operator replaced; everything else is shared.

        Args:
            replace: Maps each operator to its replacement, which is called with the operator's inputs.
        """
        attributes: dict[str, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                attributes[node.target] = get_attribute(self.module, node.target)
        for name, module in self.operators.items():
            attributes[name] = replace(module)
        return GraphModule(attributes, copy_graph(self.module.graph), type(self.module).__name__)

    def until(self, operator: str, after_gate: bool = True) -> "Network":
        """Return the network that ends at an operator and returns its output, (N, K, *positions).

        Args:
            operator: Name of the operator. If it is called several times, the network ends at the last call.
            after_gate: Whether the output is that after the gate.

        Raises:
            UserError: If the model has no operator of this name.
        """
        if operator not in self.operators:
            close = difflib.get_close_matches(operator, self.operators) or list(self.operators)[-3:]
            raise UserError(operator, "the model has no such operator", f"Choose from {', '.join(close)}, …")
        module = self.rewrite(lambda op: op)
        last, found = [(node, op) for node, op in find_operator_calls(module) if op.name == operator][-1]
        (end,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(end):
            out = last
            if found.operator_type.axis != 1:
                out = module.graph.call_function(torch.movedim, (out, found.operator_type.axis, 1))
            gate = found.gate if after_gate else None
            if isinstance(gate, SmoothGate):
                parameters: tuple[Any, ...] = gate.parameters
                if gate.has_slopes:
                    module.register_buffer("_slopes", torch.tensor(parameters).to(found.weight))
                    parameters = (module.graph.get_attr("_slopes"),)
                out = module.graph.call_function(gated, (out, gate.name, *parameters))
            elif gate is not None:
                limits = (None if math.isinf(bound) else bound for bound in (gate.low, gate.high))
                out = module.graph.call_function(aten.clamp.default, (out, *limits))
        end.args = (out,)
        wanted = {end, *find_ancestors(end)}
        for node in reversed(module.graph.nodes):
            if node not in wanted and node.op != "placeholder":
                module.graph.erase_node(node)
        module.recompile()
        shape = list(found.output_shape)
        shape.insert(0, shape.pop(found.sample_axis))
        return Network(module, self.input_shape, tuple(shape), self.constants)


def restore_network(attributes: dict[str, Any], records: tuple[NodeRecord, ...], *fields: Any) -> Network:
    """Return a network that was pickled."""
    return Network(build_graph(attributes, records), *fields)


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    name: str = "model",
    pass_through: Collection[str] = (),
    strip_softmax: bool = False,
) -> Network:
    """Trace a model: return its graph in evaluation mode, for inputs of the example's shape and any batch size.

    The model is put into evaluation mode. It runs a few times on random samples, and the graph must give the same
    outputs.

    Args:
        model: The model. A model that returns one number per sample, (N,), counts as a model with one class, (N, 1).
        example: Samples of the model's input, shape (N, …), on the model's device and in its dtype.
        name: What to call the model in messages.
        pass_through: Names of ATen operations (`sigmoid`, `tanh`, `softmax`, …) that explanations pass by their usual
            gradient instead of by a rule. Norms and products among them are linearized.
        strip_softmax: Whether to leave off a softmax, log-softmax or sigmoid that the model ends in.

    Returns:
        The network.

    Raises:
        UserError: If the model does not accept the example, does not return one tensor with a row for each sample,
            is random, lets a sample depend on the others of its batch, cannot be exported, or contains an operation
            that explanations have no rule for.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> network = trace(model, torch.zeros(1, 3, 8, 8))
        >>> list(network.operators)
        ['0', '4']
        >>> network.module(torch.zeros(7, 3, 8, 8)).shape
        torch.Size([7, 5])
    """
    model.eval()
    if any(value.is_inference() for value in (*model.parameters(), *model.buffers())):
        what = "the model was created in torch.inference_mode(), so its weights cannot be exported"
        raise UserError(name, what, "Create or load it outside of inference mode.")
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
    """Build a network from an exported graph, which is modified."""
    canonicalize_squeezes(graph)
    add_class_dimension(graph)
    fold_constants(graph)
    put_images_first(graph)
    mark_channels(graph)
    canonicalize_rectifiers(graph)
    canonicalize_smooth_gates(graph, pass_through)
    linearize_operations(graph, pass_through)
    canonicalize_selections(graph)
    canonicalize_sums(graph)
    canonicalize_average_pools(graph)
    canonicalize_products(graph)
    mark_channels(graph)
    lower_operations(graph)
    fold_scales(graph)
    split_fused_layers(graph)
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
    """Raise UserError if a network's outputs differ from its model's, in a batch or for a single sample."""
    expected = expected[:, None] if expected.dim() == 1 else expected
    for chosen in (slice(None), slice(2, None)):
        if not agree(network.module(samples[chosen]), expected[chosen]):
            what = "the outputs of the traced network differ from those of the model"
            remedy = "Remove code that depends on the batch size or on earlier calls from the model's forward."
            raise UserError(name, what, remedy)


def assign_gates(module: GraphModule) -> None:
    """Set the gate of each operator: the one activation that all consumers of all its calls apply."""
    gates: dict[str, set[AnyGate | None]] = {}
    calls = Counter(operator.name for _, operator in find_operator_calls(module))
    for node, operator in find_operator_calls(module):
        axis = operator.operator_type.axis % node.meta["val"].dim()
        gates.setdefault(operator.name, set()).update(find_consumer_gates(module, node, axis))
    for _, operator in find_operator_calls(module):
        operator.calls = calls[operator.name]
        found = gates[operator.name]
        operator.gate = found.copy().pop() if len(found) == 1 else None
        operator.mixed_gates = len(found) > 1


def find_consumer_gates(module: GraphModule, node: Node, axis: int | None) -> Iterator[AnyGate | None]:
    """Yield for each path from a node the gate of the activation that it leads to, or None for any other consumer.

    Args:
        module: The graph.
        node: The node.
        axis: The dimension of its value that counts the operator's neurons; None: unknown.
    """
    for user in node.users:
        if user.op == "call_function" and user.target in RECTIFIERS:
            yield RECTIFIERS[user.target](arguments(user))
        elif user.target is gated:
            yield read_gate(module, user, axis)
        elif passes_values(user):
            unchanged = axis is None or "max_pool" in opname(user)
            yield from find_consumer_gates(module, user, axis if unchanged else follow_axis(user, axis or 0))
        elif opname(user) not in SYMBOLIC:
            yield None


def read_gate(module: GraphModule, node: Node, axis: int | None) -> SmoothGate | None:
    """Return the gate of a call of `gated`; None if it has a slope for each channel, and these are not the neurons."""
    _, name, *parameters = node.args
    if not isinstance(parameters[0] if parameters else None, Node):
        return SmoothGate(str(name), tuple(map(float, parameters)))  # type: ignore[arg-type]
    slopes = get_attribute(module, str(parameters[0].target))  # type: ignore[union-attr]
    return SmoothGate(str(name), tuple(slopes.tolist())) if axis == 1 else None


def rectify_in_place(module: GraphModule) -> None:
    """Let a rectifier overwrite the output of an operator that nothing else reads."""
    for node, _ in find_operator_calls(module):
        user, *others = node.users
        if not others and user.target in IN_PLACE:
            user.target = IN_PLACE[user.target]
    module.recompile()


def record_shapes(module: GraphModule, example: Tensor) -> tuple[int, ...]:
    """Run the example once and record the shapes of each operator; return the shape of the output."""

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
    """Yield the nodes that call an operator, with the operator."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            operator = module.get_submodule(str(node.target))
            assert isinstance(operator, Operator)
            yield node, operator


def find_ancestors(node: Node) -> set[Node]:
    """Return all nodes from which a node is computed."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found
