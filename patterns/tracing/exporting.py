"""The export of a model: from an nn.Module to a functional ATen graph with a free batch size."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.fx import Graph, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.graph import CodeGen

from patterns.errors import UserError
from patterns.tracing.aten_graph import (
    VALUE_PASSING,
    AtenGraph,
    arguments,
    copy_graph,
    first_line,
    get_attribute,
    opname,
)

aten = torch.ops.aten


def export(model: nn.Module, example: Tensor, name: str) -> AtenGraph:
    """Export one call of a model as a functional ATen graph with a free batch size.

    Args:
        model: The model, in evaluation mode.
        example: Samples, shape (N, …).
        name: What to call the model in messages.

    Raises:
        UserError: If the model cannot be exported, or only for some batch sizes.
    """
    example = example[:1].repeat(2, *[1] * (example.dim() - 1))  # torch.export would make a batch of 1 a constant
    try:
        batch = {0: torch.export.Dim.DYNAMIC}
        # If it fails, torch.export prints the graph, which does not help the user.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), readable_constants():
            program = torch.export.export(model, (example,), dynamic_shapes=(batch,), strict=False)
            require_any_batch(program, name)
            use_functional_forms(program.graph)
            if not is_functional(program.graph):
                program = program.run_decompositions({})
            module: Any = program.module(check_guards=False)
    except UserError:
        raise
    except Exception as error:  # torch.export raises errors of many types
        if "specialized it to be a constant" in str(error):
            raise UserError(
                name,
                f"the model takes batches of {len(example)} only, because its forward uses the batch size as a number",
                "Use x.shape[0] instead of len(x) and int(x.shape[0]), and no loop over the samples.",
            ) from error
        raise UserError(
            name,
            f"the model cannot be exported as a graph{describe_model_line(error)} ({first_line(error).rstrip('.')})",
            "Remove control flow that depends on the data or on the batch size from the model's forward.",
        ) from error
    graph = copy_graph(module.graph)
    graph.set_codegen(CodeGen())  # a plain forward(x) -> tensor instead of torch.export's pytrees
    (output_node,) = graph.find_nodes(op="output")
    output_node.args = (output_node.args[0][0],)
    attributes: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            attributes[str(node.target)] = get_attribute(module, str(node.target))
        elif node.target in (aten.view.default, aten._unsafe_view.default):  # later passes may change the layout
            node.target = aten.reshape.default
        elif node.target is aten.batch_norm.default:
            use_one_batch_norm(graph, node)
        elif node.op == "call_module" or opname(node) in CHECKS:  # torch.export's guards on shapes and dtypes
            graph.erase_node(node)
    return AtenGraph(graph, attributes)


# Operations that return a tensor of their own, never a view of an input.
FRESH = {
    "conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm", "mm", "batch_norm", "layer_norm", "group_norm",
    "add", "sub", "mul", "div", "relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu",
    "elu",
}  # fmt: skip
IN_PLACE = {
    "relu_", "relu6_", "hardtanh_", "silu_", "hardswish_", "hardsigmoid_", "leaky_relu_", "elu_", "dropout_", "add_",
    "sub_", "mul_", "div_",
}  # fmt: skip
TRANSPOSES = {"mT", "swapaxes", "swapdims"}
# Composite operations that torch.export decomposes and later passes do not know; those that return views are found by
# their schemas.
DECOMPOSED = {"alpha_dropout", "feature_dropout", "feature_alpha_dropout", "conj_physical", "cartesian_prod"}


def use_functional_forms(graph: Graph) -> None:
    """Replace other names of `transpose`, and in-place operations on tensors that nothing else uses, in place.

    torch.export would do this for all in-place operations, but takes many times as long for each: it analyzes which
    tensors share memory. The result is the same, because nobody sees the overwritten tensor.
    """
    for node in graph.nodes:
        name = full_name(node)
        if name in TRANSPOSES:
            node.target, node.args = aten.transpose.int, (node.args[0], *(node.args[1:] or (-2, -1)))
        if name not in IN_PLACE:
            continue
        source, *others = node.all_input_nodes
        overload = node.target._overloadname
        functional = getattr(getattr(aten, name[:-1]), overload, None)
        same = all(source.meta["val"].dtype == other.meta["val"].dtype for other in others if is_tensor(other))
        fresh = opname(source) in FRESH and not full_name(source).endswith("_")  # which would return its own input
        if fresh and same and functional is not None and node.args[0] is source and len(source.users) == 1:
            node.target = functional


def full_name(node: Node) -> str:
    """Return the name of a node's ATen operation, with the `_` of in-place operations; "" for other nodes."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def is_tensor(node: Node) -> bool:
    """Return whether the value of a node is a tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_functional(graph: Graph) -> bool:
    """Return whether later passes can read an exported graph without changes.

    Otherwise `run_decompositions` removes in-place operations, random operations and views that they do not know. It
    takes several times as long as the export.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema, name = node.target._schema, opname(node)
        training = arguments(node).get("training" if name == "batch_norm" else "train", False)
        is_view = any(argument.alias_info is not None for argument in schema.arguments)
        if schema.is_mutable or (is_view and name not in VALUE_PASSING) or name in DECOMPOSED or training:
            return False
    return True


def use_one_batch_norm(graph: Graph, node: Node) -> None:
    """Replace a batch norm in evaluation by the form that a decomposed graph has, in place."""
    a = arguments(node)
    values = a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["momentum"], a["eps"]
    with graph.inserting_before(node):
        norm = graph.call_function(aten._native_batch_norm_legit_no_training.default, values)
        first = graph.call_function(getitem, (norm, 0))
    norm.meta = node.meta | {"val": (node.meta["val"], None, None)}
    first.meta = dict(node.meta)
    node.replace_all_uses_with(first)
    graph.erase_node(node)


# Calls with which torch.export checks shapes and dtypes while the graph runs.
CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
READABLE_NUMBERS = 4096


@contextmanager
def readable_constants() -> Iterator[None]:
    """Let torch.export read constant tensors of up to 4096 numbers instead of 1.

    Forward passes may then branch on constants, for example torchvision's `normalize` on `(std == 0).any()`.
    """
    limited = [module for module in (proxy_tensor, fake_tensor) if hasattr(module, "CONSTANT_NUMEL_LIMIT")]
    before = [module.CONSTANT_NUMEL_LIMIT for module in limited]
    for module in limited:
        setattr(module, "CONSTANT_NUMEL_LIMIT", READABLE_NUMBERS)  # noqa: B010 - the modules do not export it
    try:
        yield
    finally:
        for module, limit in zip(limited, before):
            setattr(module, "CONSTANT_NUMEL_LIMIT", limit)  # noqa: B010


def require_any_batch(program: torch.export.ExportedProgram, name: str) -> None:
    """Raise UserError if an exported program holds only for some batch sizes above 1."""
    for bounds in program.range_constraints.values():
        if bounds.lower > 2 or (not bounds.upper.is_infinite and bounds.upper < 2**31):
            sizes = f"{bounds.lower} to {bounds.upper}"
            what = f"the forward pass depends on the batch size: the exported graph is for batches of {sizes}"
            raise UserError(name, what, "Remove code that depends on the batch size from the model's forward.")


def describe_model_line(error: Exception) -> str:
    """Return the line of the model's code that raised an error; empty if the error arose elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    return f" because of {own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}: {own[-1].line}" if own else ""
