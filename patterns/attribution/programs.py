"""An explainer as one graph: a program of `torch.export` that computes scores and maps without autograd.

The backward pass of a network with fixed weights is a graph like its forward pass. Both are captured as one graph of
ATen operations, in which the backward weights (w⊙a for PatternAttribution) are constants. A process that runs the
program needs torch, but neither this package nor the model's code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import UserError as ExportError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from patterns.attribution.explainer import Explainer
from patterns.attribution.methods import BACKWARD_PASSES, parse_method
from patterns.errors import UserError
from patterns.tracing.inputs import choose_targets

aten = torch.ops.aten
TRACED = 2  # samples in the batch that is traced; torch takes sizes 0 and 1 as constants


@torch.inference_mode(False)
def export_program(
    explainer: Explainer, methods: Sequence[str], targets: Callable[[Tensor], Tensor] | None = None
) -> ExportedProgram:
    """Return the program of an explainer, for batches of any size.

    Args:
        explainer: The explainer.
        methods: Its methods.
        targets: Function from the scores to targets as for `Explainer`, by default the predicted class. Its operations
            become a part of the graph.

    Returns:
        A program that maps a batch (N, *input_shape), in the network's dtype and on its device, to a tuple: the scores
        (N, *output_shape), and for each method the maps, in the shape of `Explanation.maps`.

    Raises:
        UserError: If a method is no backward pass of the network, or the graph holds for one batch size only.

    Example:
        >>> from torch import nn
        >>> from patterns import trace
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> explainer = Explainer(trace(model, torch.zeros(2, 4)), None, ["gradient"])
        >>> program = export_program(explainer, ["gradient"])
        >>> scores, maps = program.module()(torch.randn(5, 4))
        >>> scores.shape, maps.shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """
    for name in methods:
        if parse_method(name).backward is None:
            what = f"{name} is not a backward pass of the network"
            raise UserError("", what, f"Choose from {', '.join(BACKWARD_PASSES)}.", "methods")

    def explain(inputs: Tensor) -> tuple[Tensor, ...]:
        scores, _, _, maps = explainer.run(inputs, lambda scores: choose_targets(targets, scores))
        return scores, *(maps[name] for name in methods)

    example = explainer.network.like.new_zeros((TRACED, *explainer.network.input_shape))
    graph = capture_for_any_batch(explain, example)
    batch = {0: Dim("batch", min=1)}
    try:
        program = torch.export.export(graph, (example,), dynamic_shapes=(batch,), strict=False)
    except ExportError as error:
        what = "an operation of the network takes the batch size as a constant, so no graph holds for every batch size"
        raise UserError("", what, "Explain this network with `Explainer`.") from error
    program.example_inputs = None  # torch would pickle them into the file
    for node in program.graph.nodes:  # where a node comes from would take a third of the graph's bytes
        node.meta = {key: node.meta[key] for key in node.meta.keys() & {"val"}}
    return program


def capture_for_any_batch(function: Callable[[Tensor], Any], example: Tensor) -> GraphModule:
    """Return the operations of a function of a batch as a graph, in which the batch size is a symbol.

    Attention is captured as matrix products and a softmax, because fused attention is an operation of one device.
    """
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (example.dim() - 1)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)  # the weights are no fake tensors
    inputs = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    # Without Python's kernels, some operations, such as padding, take the batch size as a constant.
    with mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(inputs)
    for node in graph.graph.find_nodes(op="call_function", target=aten.alias.default):  # of `view_as` and `detach`
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
