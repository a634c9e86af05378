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
from torch.fx.node import map_arg

from patterns.errors import UserError
from patterns.operators.operator import Convolution, Gate, Linear, Operator, Scale, TransposedConvolution, along
from patterns.tracing.aten_graph import (
    SEEN_THROUGH,
    Draft,
    arguments,
    attribute,
    copy_graph,
    export,
    mark_channels,
    moved_axis,
    opname,
    source,
)
from patterns.tracing.canonicalize import (
    fixed_product,
    squeeze_by_dimension,
    unify_maps,
    unify_pooling,
    unify_selections,
    unify_sums,
    weighted_sum,
)
from patterns.tracing.digests import constants_digest
from patterns.tracing.forward_checks import agree, outputs_by_sample, refuse_random, samples_like
from patterns.tracing.inputs import expect_shape
from patterns.tracing.linearize import HELD_NORMS, hold_gates
from patterns.tracing.lower import lift_operators
from patterns.tracing.outputs import PROBABILITIES, end_in_classes, exported_output, refuse_ending, strip_ending
from patterns.tracing.rectifiers import IN_PLACE, RECTIFIERS, unify_rectifiers

aten = torch.ops.aten

# Fixed linear maps without a weight of their own: they pass with their usual backward.
FIXED_LINEAR = {
    "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad2d",
    "gather", "repeat", "im2col", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
}  # fmt: skip

REWRITTEN = {fixed_product, weighted_sum, *HELD_NORMS.values()}
SYMBOLIC = {"sym_size", "mul", "add", "sub", "floordiv", "mod"}  # arithmetic on the batch size
SUPPORTED = (
    "convolution, linear, batch norm in inference mode, sums, products with constants, average pooling, "
    "ReLU and its variants, max pooling, and changes of shape"
)


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
        return {operator.name: operator for _, operator in operator_calls(self.module)}

    @property
    def like(self) -> Tensor:
        """A weight, for the device and dtype of what the network takes."""
        return next(iter(self.operators.values())).weight

    def rewrite(self, replace: Callable[[Operator], nn.Module]) -> GraphModule:
        """The same graph with each operator replaced; everything else is shared."""
        parts: dict[str, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                parts[node.target] = attribute(self.module, node.target)
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
        last, found = [(node, op) for node, op in operator_calls(module) if op.name == operator][-1]
        (end,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(end):
            out = last
            if (gate := found.gate) is not None:
                limits = (None if math.isinf(bound) else bound for bound in (gate.low, gate.high))
                out = module.graph.call_function(aten.clamp.default, (out, *limits))
            if found.operator_type.axis != 1:
                out = module.graph.call_function(torch.movedim, (out, found.operator_type.axis, 1))
        end.args = (out,)
        wanted = {end, *ancestors(end)}
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
        samples = samples_like(example)
        output = outputs_by_sample(model, samples, name)
        draft = export(model, example, name)
        refuse_random(draft, name)
        constants = constants_digest(draft, model)
        if strip_softmax and strip_ending(draft):
            output = exported_output(draft, samples)
        network = network_of(draft, example, name, pass_through)
        require_same_output(network, samples, output, name)
    return replace(network, constants=constants)


def network_of(draft: Draft, example: Tensor, name: str, pass_through: Collection[str]) -> Network:
    """The network of an exported graph, which becomes its own."""
    squeeze_by_dimension(draft)
    end_in_classes(draft)
    fold_constants(draft)
    mark_channels(draft)
    hold_gates(draft, pass_through)
    unify_rectifiers(draft)
    unify_selections(draft)
    unify_sums(draft)
    unify_pooling(draft)
    unify_maps(draft)
    mark_channels(draft)
    lift_operators(draft)
    fold_scales(draft)
    if not PROBABILITIES & set(pass_through):
        refuse_ending(draft, name)
    refuse_unknown(draft, name, pass_through)
    input_shape = tuple(example.shape[1:])
    expect_shape(draft, input_shape)
    module = GraphModule(draft.parts, draft.graph, "Network")
    find_gates(module)
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


def fold_constants(draft: Draft) -> None:
    """Evaluate what does not depend on the input's values (standardised weights, position tables, masks)."""
    values: dict[Node, Any] = {}
    for node in list(draft.graph.nodes):
        if node.op == "get_attr":
            values[node] = draft.parts[node.target]
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            with torch.no_grad():
                values[node] = node.target(*resolve(node.args, values), **resolve(node.kwargs, values))
        elif opname(node) in FILLED and len(node.all_input_nodes) == 1:  # of an input, only its dtype and device
            like = torch.empty(0, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            values[node] = node.target(like, *node.args[1:], **node.kwargs)
        if node.op == "call_function" and isinstance(values.get(node), Tensor):
            constant = draft.constant(node, values[node])
            constant.meta = dict(node.meta)
            values[constant] = values[node]
            node.replace_all_uses_with(constant)
    draft.graph.eliminate_dead_code()


FILLED = {"new_zeros", "new_ones", "new_full"}


def fold_scales(draft: Draft) -> None:
    """Fold each batch norm into the convolution or linear operator before it, if that has no other use."""
    calls = Counter(node.target for node in draft.graph.nodes if node.op == "call_module")
    for node in list(draft.graph.nodes):
        if node.op != "call_module" or not isinstance(draft.parts[str(node.target)].operator_type, Scale):
            continue
        scale = draft.parts[str(node.target)]
        before, axis = operator_before(draft, node)
        if before is None or axis != scale.operator_type.axis % node.meta["val"].dim():
            continue
        linear = draft.parts[str(before.target)]
        if (
            not isinstance(linear.operator_type, Convolution | TransposedConvolution | Linear)
            or calls[node.target] > 1
            or calls[before.target] > 1
        ):
            continue
        factor = scale.weight[:, 0].double()
        weight = linear.weight.double() * along(0, factor, linear.weight)
        bias = torch.zeros_like(factor) if linear.bias is None else linear.bias.double() * factor
        if scale.bias is not None:
            bias = bias + scale.bias.double()
        dtype = linear.weight.dtype
        draft.parts[str(before.target)] = Operator(
            linear.name, linear.operator_type, weight.to(dtype), bias.to(dtype), (), (), linear.source
        )
        draft.replace(node, node.args[0])


def operator_before(draft: Draft, node: Node) -> tuple[Node | None, int | None]:
    """The operator's call that a node alone reads, perhaps in another shape, and where its neurons then lie."""
    path: list[Node] = []
    before: Any = node.args[0]
    while before.op == "call_function" and len(readers(before)) == 1 and before.args:
        path.append(before)
        before = before.args[0]
        if not isinstance(before, Node):
            return None, None
    if before.op != "call_module" or len(readers(before)) > 1:
        return None, None
    axis = draft.parts[str(before.target)].operator_type.axis % before.meta["val"].dim()
    for change in reversed(path):
        axis = None if axis is None else moved_axis(change, axis)
    return before, axis


def readers(node: Node) -> list[Node]:
    """The users of a value's elements, not of its sizes."""
    return [user for user in node.users if opname(user) != "sym_size"]


def refuse_unknown(draft: Draft, name: str, pass_through: Collection[str]) -> None:
    """Raise UserError for operations that the explanation pass would not know how to go back through."""
    unknown: dict[str, str] = {}
    valueless = of_shape_alone(draft)
    for node in draft.graph.nodes:
        if node.op != "call_function" or node.target in RECTIFIERS or node.target in REWRITTEN:
            continue
        operation = opname(node)
        if operation in SEEN_THROUGH or operation in FIXED_LINEAR or operation in pass_through:
            continue
        if node in valueless or is_shift(node) or node.target is aten.max.dim:
            continue
        unknown.setdefault(operation, source(node))
    if unknown:
        what = "; ".join(f"{operation} in {where}" for operation, where in list(unknown.items())[:3])
        more = f" (and {len(unknown) - 3} more kinds)" if len(unknown) > 3 else ""
        remedy = f"Pass --pass-through {','.join(unknown)} to use their gradient. Supported are {SUPPORTED}."
        raise UserError(name, f"no pattern is defined for {what}{more}", remedy)


def of_shape_alone(draft: Draft) -> set[Node]:
    """What is made of constants and of the batch size: no gradient goes through it."""
    found: set[Node] = set()
    for node in draft.graph.nodes:
        made = node.op == "call_function" and all(n in found for n in node.all_input_nodes)
        if made or node.op == "get_attr" or opname(node) in FILLED | {"sym_size"}:
            found.add(node)
    return found


def is_shift(node: Node) -> bool:
    """An added or subtracted constant: part of no neuron's weight, and its gradient is the identity."""
    if node.target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        first, *others = node.args
        return sum(isinstance(t, Node) and t.op != "get_attr" for t in (first, *others)) == 1 and (
            node.target in (aten.add.Tensor, aten.add.Scalar) or (isinstance(first, Node) and first.op != "get_attr")
        )
    return False


def find_gates(module: GraphModule) -> None:
    """Give each operator its gate: the one rectifier that all its calls feed, and nothing else."""
    gates: dict[str, set[Gate | None]] = {}
    calls = Counter(operator.name for _, operator in operator_calls(module))
    for node, operator in operator_calls(module):
        gates.setdefault(operator.name, set()).update(consumers(node))
    for _, operator in operator_calls(module):
        operator.calls = calls[operator.name]
        found = gates[operator.name]
        operator.gate = found.copy().pop() if len(found) == 1 else None
        operator.mixed_gates = len(found) > 1


def consumers(node: Node) -> Iterator[Gate | None]:
    """What each path from a node leads to: a rectifier's gate, or None for anything else."""
    for user in node.users:
        if user.op == "call_function" and user.target in RECTIFIERS:
            yield RECTIFIERS[user.target](arguments(user))
        elif user.op == "call_function" and (opname(user) in SEEN_THROUGH or user.target is aten.max.dim):
            yield from consumers(user)
        elif opname(user) not in SYMBOLIC:
            yield None


def rectify_in_place(module: GraphModule) -> None:
    """Let a rectifier take the memory of an operator's output that nobody else reads."""
    for node, _ in operator_calls(module):
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

    hooks = [operator.register_forward_hook(note) for _, operator in operator_calls(module)]
    with torch.no_grad():
        output = module(example[:1])
    for hook in hooks:
        hook.remove()
    return tuple(output.shape[1:])


def operator_calls(module: GraphModule) -> Iterator[tuple[Node, Operator]]:
    for node in module.graph.nodes:
        if node.op == "call_module":
            operator = module.get_submodule(str(node.target))
            assert isinstance(operator, Operator)
            yield node, operator


def ancestors(node: Node) -> set[Node]:
    """All that a node is computed from."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def resolve(args: Any, values: dict[Node, Any]) -> Any:
    return map_arg(args, lambda n: values[n])
