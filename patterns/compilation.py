"""Functions of batches of one shape as graphs of their own: compiled by `torch.compile`, or recorded on a GPU.

`torch.compile` of a model has its forward pass and one gradient, and keeps between them what it sees fit. A forward
pass with several ways back, or with the sums of every operator, is therefore brought to one graph of ATen operations
first: there gradients, and what is added in place, are operations like any other.
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
CUDA_GRAPHS = "cudagraphs"  # the operations as they are, in one CUDA graph


def compiler_options(mode: str) -> dict[str, Any]:
    """The options of the compiler that a mode stands for, none for `cudagraphs`. UserError for what is no mode."""
    modes = {**torch._inductor.list_mode_options(), CUDA_GRAPHS: {}}
    if mode not in modes:
        raise UserError("--compile", f"no mode {mode!r}", f"There are {', '.join(modes)}.")
    return dict(modes[mode])


@contextmanager
def translate_errors(mode: str, like: Tensor) -> Iterator[None]:
    """UserError where torch's compilers give up, and before anything is traced where there is no such mode there.

    like: a tensor of the network.
    """
    from torch._dynamo.exc import TorchDynamoException  # imported here, as below, since it takes a second

    compiler_options(mode)
    if mode == CUDA_GRAPHS and not like.is_cuda:
        raise UserError(
            "--compile", f"{CUDA_GRAPHS} are a GPU's, and here is none", "Take another mode, or do without."
        )
    try:
        yield
    except TorchDynamoException as error:
        what = f"torch.compile gave up: {extract_cause(getattr(error, 'inner_exception', error))}"
        remedy = "Mend that (on a CPU it takes g++, on a GPU gcc or clang), or do without."
        raise UserError("--compile", what, remedy) from error


def extract_cause(error: BaseException) -> str:
    """The line that says most."""
    from torch._inductor.compile_worker.subproc_pool import SubprocException
    from torch._inductor.exc import CppCompileError

    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, CppCompileError):
        return next((line for line in more if "error:" in line), first)
    return more[-1] if more and isinstance(error, SubprocException) else first


def warm_up_runs(mode: str) -> range:
    """As many runs as it takes until a CUDA graph is recorded, where the mode has any."""
    return range(3 if compiler_options(mode).get("triton.cudagraphs") else 0)


def capture_graph(function: Function, *inputs: Tensor) -> GraphModule:
    """What a function does with tensors of these shapes, and with those that it holds; it is done once."""
    return make_fx(function)(*inputs)


def compile_graph(graph: GraphModule, mode: str, *inputs: Tensor, begins: bool = True) -> Function:
    """A graph compiled for inputs of these shapes, and run once. In inference mode it would be compiled anew.

    begins: whether a call begins a step; a CUDA graph overwrites what was given in the step before.
    """
    if mode == CUDA_GRAPHS:
        return CudaGraph(graph, *inputs)
    options = compiler_options(mode)
    if inputs[0].device.type == "cpu":
        options["layout_optimization"] = False  # channels last, an explanation takes longer than it does uncompiled
    made = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    begins = begins and bool(options.get("triton.cudagraphs"))

    @torch.no_grad()
    def run(*inputs: Tensor) -> Any:
        if begins:
            torch.compiler.cudagraph_mark_step_begin()
        return made(*inputs)

    run(*inputs)
    return run


class CudaGraph:
    """A graph's operations as one CUDA graph: a GPU need not wait until they are asked for, one by one.

    inputs: where it will read them, and where later ones are copied to. What it gives is overwritten by the next call.
    UserError for what a CUDA graph cannot hold.
    """

    def __init__(self, graph: GraphModule, *inputs: Tensor) -> None:
        self._graph, self._inputs = graph, inputs  # it holds what is read while the graph is replayed
        self._device = inputs[0].device
        with torch.cuda.device(self._device), torch.no_grad():
            self._recording, before, beside = (
                torch.cuda.CUDAGraph(),
                torch.cuda.current_stream(),
                torch.cuda.Stream(),
            )
            beside.wait_stream(before)
            try:
                with torch.cuda.stream(beside):  # what is only done once is not recorded
                    graph(*inputs)
                with torch.cuda.graph(self._recording, stream=beside, capture_error_mode="thread_local"):
                    self._given = graph(*inputs)
            except RuntimeError as error:
                told = list(list_contexts(error))
                if any(isinstance(e, torch.OutOfMemoryError) for e in told) or "captur" not in "".join(map(str, told)):
                    raise
                what = f"the model makes no CUDA graph: {extract_cause(told[-1])}"
                raise UserError("--compile", what, "Take another mode, or do without.") from error
            finally:
                torch.cuda.set_stream(before)
                before.wait_stream(beside)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        with torch.cuda.device(self._device):
            for place, values in zip(self._inputs, inputs):
                if values is not place:
                    place.copy_(values)
            self._recording.replay()
        return self._given


def list_contexts(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what was being handled when it came, and so on."""
    while error is not None:
        yield error
        error = error.__context__


class ForwardBackward:
    """A function of inputs and a start, which gives (scores, results) and whose start depends on the scores, compiled.

    inputs, start: of the only shapes that it will take. UserError where it cannot be compiled. Two of them do not go
    together: what one keeps between there and back is lost where the other begins.
    """

    def __init__(self, function: Function, mode: str, inputs: Tensor, start: Tensor) -> None:
        with translate_errors(mode, inputs):
            there, back = split_graph(capture_graph(function, inputs, start))
            self._there = compile_graph(there, mode, inputs)
            _, *kept = self._there(inputs)
            self._back = compile_graph(back, mode, *kept, start, begins=False)
            for _ in warm_up_runs(mode):
                list(self(inputs)[1]([start]))

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Callable[[Sequence[Tensor]], Iterator[list[Tensor]]]]:
        """The scores, and what gives the results for each of some starts."""
        scores, *kept = self._there(inputs.contiguous())  # of other strides, or requiring gradients, it compiles anew

        def back(starts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
            for start in starts:
                yield [result.clone() for result in self._back(*kept, start.detach().contiguous())]

        return scores.clone(), back


def split_graph(graph: GraphModule) -> tuple[GraphModule, GraphModule]:
    """A graph with the output (first, rest) as two: inputs but the last → (first, *kept), and (*kept, last) → rest."""
    nodes = list(graph.graph.nodes)
    *inputs, last = graph.graph.find_nodes(op="placeholder")
    ((first, rest),) = nodes[-1].args
    late = find_dependents(nodes, [last])
    early = find_dependents(nodes, inputs) - late
    kept = [node for node in nodes if node in early and not late.isdisjoint(node.users)]
    there = copy_nodes(graph, [n for n in nodes[:-1] if n not in late], [], (first, *kept))
    back = copy_nodes(graph, [n for n in nodes[:-1] if n not in early], kept, rest)
    return there, back


def find_dependents(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """The sources, and what is made of them."""
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def copy_nodes(source: GraphModule, nodes: Iterable[Node], given: Iterable[Node], output: Any) -> GraphModule:
    """Some nodes of a graph as one with an output of its own, which is given the values of others."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(map_arg(output, copies.__getitem__))
    graph.eliminate_dead_code()
    return GraphModule(source, graph)
