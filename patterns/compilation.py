"""Compile functions of batches of one fixed shape, with `torch.compile` or as a recorded CUDA graph.

`torch.compile` of a model compiles its forward pass and one gradient, and decides which values to keep between them.
A forward pass with several backward passes, or with the sums of every operator, does not fit that scheme. It is
therefore captured first as one graph of ATen operations, in which gradients and in-place updates are operations like
all others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from patterns.errors import UserError

Function = Callable[..., Any]
CUDA_GRAPHS = "cudagraphs"  # the mode that records the uncompiled operations in one CUDA graph


def compiler_options(mode: str) -> dict[str, Any]:
    """Return the options of torch's compiler for a mode; `cudagraphs` has no options.

    Raises:
        UserError: If the mode is unknown.
    """
    modes = {**torch._inductor.list_mode_options(), CUDA_GRAPHS: {}}
    if mode not in modes:
        raise UserError("", f"no mode {mode!r}", f"Choose from {', '.join(modes)}.", "compile")
    return dict(modes[mode])


@contextmanager
def translate_errors(mode: str, like: Tensor) -> Iterator[None]:
    """Run the body, and turn a failure of torch's compiler into a UserError.

    Args:
        mode: A mode of `torch.compile`, or `cudagraphs`. It is validated before the body runs.
        like: A tensor of the network, for its device.

    Raises:
        UserError: If the mode is unknown or needs a GPU that the network is not on, or if the compiler fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # this import and those below take a second

    compiler_options(mode)
    if mode == CUDA_GRAPHS and not like.is_cuda:
        what = f"{CUDA_GRAPHS} needs a GPU, and the network is on the {like.device.type}"
        raise UserError("", what, "Choose another mode, or do not compile.", "compile")
    try:
        yield
    except TorchDynamoException as error:
        what = f"torch.compile failed: {extract_cause(getattr(error, 'inner_exception', error))}"
        remedy = "Install a C++ compiler (g++ for a CPU, gcc or clang for a GPU), or do not compile."
        raise UserError("", what, remedy, "compile") from error


def extract_cause(error: BaseException) -> str:
    """Return the line of a compiler's error that names the cause."""
    from torch._inductor.compile_worker.subproc_pool import SubprocException
    from torch._inductor.exc import CppCompileError

    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, CppCompileError):
        return next((line for line in more if "error:" in line), first)
    return more[-1] if more and isinstance(error, SubprocException) else first


def warm_up_runs(mode: str) -> range:
    """Return a range over the runs that a mode needs until torch has recorded its CUDA graph, if it records one."""
    return range(3 if compiler_options(mode).get("triton.cudagraphs") else 0)


def capture_graph(function: Function, *inputs: Tensor) -> GraphModule:
    """Run a function once, and return its operations as a graph for inputs of these shapes."""
    return make_fx(function)(*inputs)


def compile_graph(graph: GraphModule, mode: str, *inputs: Tensor, new_step: bool = True) -> Function:
    """Compile a graph for inputs of fixed shapes, and run it once.

    Args:
        graph: The graph.
        mode: A mode of `torch.compile`, or `cudagraphs`.
        *inputs: Inputs of the shapes, dtypes and device of all later calls.
        new_step: Whether each call begins a step. A CUDA graph overwrites the outputs of the step before.

    Returns:
        The compiled function. Do not call it in inference mode, because torch would compile it anew.
    """
    if mode == CUDA_GRAPHS:
        return CudaGraph(graph, *inputs)
    options = compiler_options(mode)
    if inputs[0].device.type == "cpu":
        options["layout_optimization"] = False  # with channels last, an explanation is slower than uncompiled
    function = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    new_step = new_step and bool(options.get("triton.cudagraphs"))

    @torch.no_grad()
    def run(*inputs: Tensor) -> Any:
        if new_step:
            torch.compiler.cudagraph_mark_step_begin()
        return function(*inputs)

    run(*inputs)
    return run


class CudaGraph:
    """The operations of a graph, recorded as one CUDA graph: the GPU does not wait for Python between them.

    A call copies its inputs into the recorded ones. It overwrites the outputs of the call before.
    """

    def __init__(self, graph: GraphModule, *inputs: Tensor) -> None:
        """Record a graph.

        Args:
            graph: The graph.
            *inputs: The tensors that the recording reads at every replay.

        Raises:
            UserError: If a CUDA graph cannot hold the operations.
        """
        self._graph, self._inputs = graph, inputs  # the graph holds tensors that every replay reads
        self._device = inputs[0].device
        with torch.cuda.device(self._device), torch.no_grad():
            self._recording = torch.cuda.CUDAGraph()
            stream, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
            side_stream.wait_stream(stream)
            try:
                with torch.cuda.stream(side_stream):  # initialization happens in this run and is not recorded
                    graph(*inputs)
                with torch.cuda.graph(self._recording, stream=side_stream, capture_error_mode="thread_local"):
                    self._outputs = graph(*inputs)
            except RuntimeError as error:
                errors = list(list_contexts(error))
                if any(isinstance(e, torch.OutOfMemoryError) for e in errors):
                    raise
                if "captur" not in "".join(map(str, errors)):
                    raise
                what = f"the model cannot be recorded as a CUDA graph: {extract_cause(errors[-1])}"
                raise UserError("", what, "Choose another mode, or do not compile.", "compile") from error
            finally:
                torch.cuda.set_stream(stream)
                stream.wait_stream(side_stream)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """Replay the recording on these inputs; return its outputs, which the next call overwrites."""
        with torch.cuda.device(self._device):
            for recorded, values in zip(self._inputs, inputs):
                if values is not recorded:
                    recorded.copy_(values)
            self._recording.replay()
        return self._outputs


def list_contexts(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error that was handled when it was raised, and so on."""
    while error is not None:
        yield error
        error = error.__context__


class ForwardBackward:
    """A compiled function (inputs, output gradient) → (scores, results), run as a forward and a backward pass.

    The output gradient may depend on the scores. A second instance that runs between the two passes of the first
    overwrites the values that the first keeps between them.
    """

    def __init__(self, function: Function, mode: str, inputs: Tensor, output_gradient: Tensor) -> None:
        """Compile a function.

        Args:
            function: Maps inputs and an output gradient to scores and a list of results.
            mode: A mode of `torch.compile`, or `cudagraphs`.
            inputs: Inputs of the shape that all calls have.
            output_gradient: An output gradient of the shape that all calls have.

        Raises:
            UserError: If the function cannot be compiled.
        """
        with translate_errors(mode, inputs):
            forward, backward = split_graph(capture_graph(function, inputs, output_gradient))
            self._forward = compile_graph(forward, mode, inputs)
            _, *kept = self._forward(inputs)
            self._backward = compile_graph(backward, mode, *kept, output_gradient, new_step=False)
            for _ in warm_up_runs(mode):
                list(self(inputs)[1]([output_gradient]))

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Callable[[Sequence[Tensor]], Iterator[list[Tensor]]]]:
        """Return the scores, and a function that yields the results for each of several output gradients."""
        # Torch would compile anew for inputs that have other strides or require gradients.
        scores, *kept = self._forward(inputs.contiguous())

        def backward(output_gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
            for gradient in output_gradients:
                yield [result.clone() for result in self._backward(*kept, gradient.detach().contiguous())]

        return scores.clone(), backward


def split_graph(graph: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Split a graph (*inputs, last) → (first, rest) into *inputs → (first, *kept) and (*kept, last) → rest."""
    nodes = list(graph.graph.nodes)
    *inputs, last = graph.graph.find_nodes(op="placeholder")
    ((first, rest),) = nodes[-1].args
    late = find_dependents(nodes, [last])
    early = find_dependents(nodes, inputs) - late
    ready = early & set(rest)  # results that do not depend on the last input
    kept = [node for node in nodes if node in early and (node in ready or not late.isdisjoint(node.users))]
    forward = copy_nodes(graph, [n for n in nodes[:-1] if n not in late], [], (first, *kept))
    backward = copy_nodes(graph, [n for n in nodes[:-1] if n not in early], kept, rest)
    return forward, backward


def find_dependents(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """Return the sources, and all nodes that are computed from them."""
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def copy_nodes(source: GraphModule, nodes: Iterable[Node], inputs: Iterable[Node], output: Any) -> GraphModule:
    """Copy some nodes of a graph to a graph of their own.

    Args:
        source: The graph.
        nodes: The nodes to copy, in their order.
        inputs: Nodes whose values become the inputs of the copy.
        output: The output of the copy, made of nodes of the source.
    """
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(map_arg(output, copies.__getitem__))
    graph.eliminate_dead_code()
    return GraphModule(source, graph)
