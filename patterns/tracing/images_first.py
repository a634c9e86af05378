"""Move images to the first dimension of the inputs of linear layers.

An operator's positions can be sampled only if the first dimension of its input counts images. Attention often moves
tokens before images (torch's MultiheadAttention), or flattens images and tokens or windows into one dimension (Swin). A
linear layer acts on the last dimension alone, so the others can be reordered before it and restored after it. This
changes no value, and costs nothing if the layer's input is a view.
"""

from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from patterns.tracing.aten_graph import UNCHANGED, AtenGraph, opname

aten = torch.ops.aten
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", *UNCHANGED}


def put_images_first(graph: AtenGraph) -> None:
    """Reorder in place the inputs of linear layers whose first dimension does not count images."""
    (images, *_) = graph.fx.find_nodes(op="placeholder")
    batch = images.meta["val"].shape[0]
    for node in list(graph.fx.nodes):
        if node.target is aten.linear.default and is_misplaced(node.args[0], batch):
            reorder(graph, node, batch)


def is_misplaced(x: object, batch: object) -> bool:
    """Return whether a linear layer's input has more than one position and does not begin with images."""
    value = x.meta.get("val") if isinstance(x, Node) else None
    return isinstance(value, Tensor) and value.dim() > 1 and not counts(value.shape[0], batch)


def counts(size: object, batch: object) -> bool:
    """Return whether a dimension's size is the number of images."""
    return isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt) and size.node.expr == batch.node.expr


def reorder(graph: AtenGraph, node: Node, batch: object) -> None:
    """Give one linear layer an input (images, positions, inputs). Do nothing if its dimensions are not understood."""
    x, *parameters = node.args
    assert isinstance(x, Node)
    shape, width = list(x.meta["val"].shape), x.meta["val"].shape[-1]
    source = x
    while source.op == "call_function" and opname(source) in VIEWS and not find_images(source, batch):
        source = source.all_input_nodes[0]
    places = find_images(source, batch)
    sizes = list(source.meta["val"].shape)
    if len(places) != 1 or places[0] == len(sizes) - 1:
        return
    (place,) = places
    inner = find_inner(sizes, width)
    if inner is None or place >= inner:
        return
    order = [place, *(d for d in range(len(sizes)) if d != place)]
    restored = [order.index(d) for d in range(inner)]
    positions = [sizes[d] for d in order[1:inner]]
    if not all(isinstance(size, int) for size in (*positions, width)):
        return
    first = source if place == 0 else graph.call(node, aten.permute.default, source, order)
    first = graph.call(node, aten.reshape.default, first, [-1, prod(positions), width])
    outputs = graph.call(node, aten.linear.default, first, *parameters)
    neurons = outputs.meta["val"].shape[-1]
    outputs = graph.call(node, aten.reshape.default, outputs, [-1, *positions, neurons])
    if place:
        outputs = graph.call(node, aten.permute.default, outputs, [*restored, inner])
    final = [size if isinstance(size, int) else -1 for size in shape[:-1]]
    graph.replace(node, graph.call(node, aten.reshape.default, outputs, [*final, neurons]))


def find_images(node: Node, batch: object) -> list[int]:
    """Return the dimensions of a node's value that count images."""
    value = node.meta.get("val")
    return [d for d, size in enumerate(value.shape) if counts(size, batch)] if isinstance(value, Tensor) else []


def find_inner(sizes: list[object], width: int) -> int | None:
    """Return the first of the last dimensions that together are a layer's inputs; None if no dimensions are."""
    for inner in range(len(sizes) - 1, 0, -1):
        if all(isinstance(size, int) for size in sizes[inner:]) and prod(sizes[inner:]) == width:  # type: ignore[arg-type]
            return inner
    return None
