"""The operations that an explanation can propagate through."""

from collections.abc import Collection

import torch
from torch.fx import Node

from patterns.errors import UserError
from patterns.tracing.aten_graph import AtenGraph, is_activation, opname, passes_values, source
from patterns.tracing.average_pools import fixed_product
from patterns.tracing.canonicalize import weighted_sum
from patterns.tracing.folding import FILLED
from patterns.tracing.linearize import DETACHED_NORMS
from patterns.tracing.rectifiers import RECTIFIERS
from patterns.tracing.scales import SCALES, detached, find_carriers

aten = torch.ops.aten

# Linear operations without weights. They keep their usual gradient.
FIXED_LINEAR = {
    "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad2d",
    "gather", "repeat", "repeat_interleave", "im2col", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
}  # fmt: skip


REWRITTEN = {fixed_product, weighted_sum, *SCALES, *DETACHED_NORMS.values()}
# Linear in the factor that is not detached.
PRODUCTS = {"mul", "div", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}


SUPPORTED = (
    "convolution, linear, batch norm in inference mode, sums, average and max pooling, ReLU, GELU, SiLU and similar "
    "activations, norms, attention, products, upsampling, and changes of shape"
)


def require_supported(graph: AtenGraph, name: str, pass_through: Collection[str]) -> None:
    """Raise UserError if the graph has operations without a rule for the backward pass of explanations."""
    unknown: dict[str, str] = {}
    valueless, carriers = find_input_independent(graph), find_carriers(graph.fx)
    for node in graph.fx.nodes:
        if node.op != "call_function" or node.target in RECTIFIERS or node.target in REWRITTEN:
            continue
        operation = opname(node)
        if passes_values(node) or operation in FIXED_LINEAR or operation in pass_through:
            continue
        if node not in carriers or node in valueless or is_shift(node):
            continue
        if operation in PRODUCTS and count_factors(node) == 1:
            continue
        unknown.setdefault(operation, source(node))
    if unknown:
        what = "; ".join(f"{operation} in {where}" for operation, where in list(unknown.items())[:3])
        more = f" (and {len(unknown) - 3} more operations)" if len(unknown) > 3 else ""
        remedy = f"Pass `pass_through={','.join(unknown)}` to use their gradient. Supported are {SUPPORTED}."
        raise UserError(name, f"no pattern is defined for {what}{more}", remedy, "pass_through")


def count_factors(node: Node) -> int:
    """Return how many arguments of a product are activations with a gradient."""
    factors = node.args[1] if opname(node) == "einsum" else node.args[:3]
    return sum(is_activation(n) and n.target is not detached for n in factors)  # type: ignore[union-attr]


def find_input_independent(graph: AtenGraph) -> set[Node]:
    """Return the nodes that depend only on constants and on the batch size; no gradient passes through them."""
    found: set[Node] = set()
    for node in graph.fx.nodes:
        made = node.op == "call_function" and all(n in found for n in node.all_input_nodes)
        if made or node.op == "get_attr" or opname(node) in FILLED | {"sym_size"}:
            found.add(node)
    return found


def is_shift(node: Node) -> bool:
    """Return whether a node adds or subtracts a constant: it belongs to no neuron's weight, and its gradient is 1."""
    if node.target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        first, *others = node.args
        return sum(isinstance(t, Node) and t.op != "get_attr" for t in (first, *others)) == 1 and (
            node.target in (aten.add.Tensor, aten.add.Scalar) or (isinstance(first, Node) and first.op != "get_attr")
        )
    return False
