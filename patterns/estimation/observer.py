"""A network that takes its operators' moments while it runs."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from patterns.compilation import Function, capture_graph, compile_graph, translate_errors, warm_up_runs
from patterns.errors import UserError
from patterns.moments.gram import PatchAccumulator, PatchMoments
from patterns.moments.moments import Accumulator, Moments, RequiredSums
from patterns.moments.position_sampling import PositionSampler
from patterns.moments.sampled import SampledAccumulator
from patterns.operators.operator import Inputs, Operator
from patterns.tracing.inputs import require_batch, select_images, validate_inputs
from patterns.tracing.network import Network

M_co = TypeVar("M_co", covariant=True)


class Fed(Protocol[M_co]):
    """What takes an operator's inputs and outputs, and makes moments of them."""

    def update(self, inputs: Inputs, z: Tensor) -> None: ...

    def reset(self) -> None: ...

    def flush(self) -> None: ...

    def tensors(self) -> Mapping[str, Tensor]: ...

    def moments(self) -> M_co: ...


class Observed(nn.Module):
    """An operator that also feeds its accumulator.

    laid_out: its weight as convolutions want it for what they are given, that none is brought there batch by batch.
    """

    def __init__(self, operator: Operator, accumulator: Fed[object], laid_out: Tensor | None) -> None:
        super().__init__()
        self.operator, self.accumulator, self.laid_out = operator, accumulator, laid_out

    def forward(self, *inputs: Tensor) -> Tensor:
        op = self.operator
        z = op(*inputs) if self.laid_out is None else op.operator_type.forward(inputs, self.laid_out, op.bias)
        self.accumulator.update(inputs, z)
        return z


class OperatorObserver(Generic[M_co]):
    """A network some of whose operators feed accumulators while it runs."""

    def __init__(
        self, network: Network, accumulators: Mapping[str, Fed[M_co]], draw: PositionSampler | None = None
    ) -> None:
        self._network, self._fed, self._draw, self._seen = network, accumulators, draw, 0
        self._like = network.like

        def observed(op: Operator) -> nn.Module:
            if op.name not in accumulators:
                return op
            return Observed(op, accumulators[op.name], None if draw is None else to_channels_last(op.weight))

        self._module = network.rewrite(observed)
        self._compiled: dict[torch.Size, Function] = {}

    def compile(self, batch_size: int, mode: str = "default") -> None:
        """Compile what is done with batches of this size; all others are taken as before. It forgets all sums.

        mode: one of `torch.compile`, which takes minutes, and gives the same sums but for rounding; or `cudagraphs`,
        which records what a GPU does with a batch as it is, in seconds. UserError where positions are drawn, where
        there is no such mode, and where the compiler fails.
        """
        if self._draw is not None:
            what = "sums of drawn positions are gathered over several batches, and cannot be compiled"
            raise UserError("--compile", what, "Take all positions, or do without.")
        batch = self._network.like.new_zeros((batch_size, *self._network.input_shape))
        try:
            with translate_errors(mode, batch), torch.no_grad():
                run = compile_graph(capture_graph(self._module, batch), mode, batch)
                for _ in warm_up_runs(mode):
                    run(batch)
                self._compiled[batch.shape] = run
        finally:
            self.reset()

    def update(self, batch: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Add a batch (N, *input_shape), on the network's device and in its dtype; gives the model's output.

        seeds: of each image, for what draws positions from it, so that the sums depend neither on the order of images
        nor on their batches; without any, images are numbered as they come.
        """
        batch = validate_inputs(require_batch(batch, self._network.input_shape), self._like)
        if self._draw is not None:
            numbers = range(self._seen, self._seen + len(batch)) if seeds is None else seeds
            self._draw.start_pass(torch.tensor(numbers, dtype=torch.int64).to(batch.device))
            batch = to_channels_last(batch)
        self._seen += len(batch)
        run = self._compiled.get(batch.shape)
        if run is not None:
            # As it was compiled for, else it compiles anew; and a CUDA graph will overwrite what it gave.
            return run(batch.detach().contiguous()).clone()
        with torch.inference_mode():
            return self._module(batch)

    def flush(self) -> None:
        """Sum what was gathered and waits for more, as at the end of a shard: so its sums depend on the shard alone."""
        for accumulator in self._fed.values():
            accumulator.flush()

    def reset(self) -> None:
        """Forget all sums."""
        for accumulator in self._fed.values():
            accumulator.reset()

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far as `{operator}/{sum}`: the very tensors that the next batch changes."""
        return {f"{name}/{field}": t for name, fed in self._fed.items() for field, t in fed.tensors().items()}

    def moments(self) -> dict[str, M_co]:
        """The sums so far by operator: copies on the CPU."""
        return {name: accumulator.moments() for name, accumulator in self._fed.items()}


class Observer(OperatorObserver[Moments]):
    """Accumulates the moments of a network's operators over batches.

    wanted: the sums to take of an operator.  operators: the names of those observed; None: all.
    positions: drawn from each image for each operator; None: all, as for an operator that has no more.
    seed: with each image's own, it says which.
    """

    def __init__(
        self,
        network: Network,
        wanted: Callable[[Operator], RequiredSums] = lambda _: RequiredSums(),
        operators: Collection[str] | None = None,
        positions: int | None = None,
        seed: int = 0,
    ) -> None:
        names = network.operators if operators is None else operators
        observed = {name: network.operators[name] for name in names}

        def sampled(op: Operator) -> bool:
            return positions is not None and op.per_image and prod(op.output_shape) // op.neurons > positions

        draw = (
            PositionSampler(positions, seed) if positions is not None and any(map(sampled, observed.values())) else None
        )

        def accumulator(op: Operator) -> Fed[Moments]:
            if draw is None or not sampled(op):
                return Accumulator(op, wanted(op))
            return SampledAccumulator(op, wanted(op), draw)

        super().__init__(network, {name: accumulator(op) for name, op in observed.items()}, draw)


class PatchObserver(OperatorObserver[PatchMoments]):
    """Accumulates the Gram moments of chosen operators over batches, from sampled positions of each image.

    operators: names in the network.  positions: drawn from each image, all where it has no more.
    seed: with each operator's name and each image's own, it says which.

    Raises KeyError for a name that is no operator of the network, UserError for an operator whose
    patches cannot be sampled and for no positions.
    """

    def __init__(self, network: Network, operators: Collection[str], positions: int, seed: int = 0) -> None:
        chosen, draw = {name: network.operators[name] for name in operators}, PositionSampler(positions, seed)
        for name, op in chosen.items():
            if not op.per_image:
                what = "its inputs are windows or tokens of several images, of whose positions none can be drawn"
                raise UserError(name, what, "Name other operators.")
        super().__init__(network, {name: PatchAccumulator(op, draw) for name, op in chosen.items()}, draw)


def to_channels_last(values: Tensor) -> Tensor:
    """A batch of images or a weight (N, C, H, W) on a CPU with each position's channels together: so they are
    gathered at once, and convolutions are faster as well, down to half the time. Others as they are.
    """
    images = values.dim() == 4 and values.device.type == "cpu"
    # Not `contiguous`, for which one channel has any layout.
    return torch.empty_like(values, memory_format=torch.channels_last).copy_(values) if images else values


def accumulate(network: Network, batches: Iterable[Any]) -> dict[str, Moments]:
    """Return all moments of every operator over some batches.

    Args:
        network: The traced model.
        batches: Tensors (N, *input_shape), or tuples that begin with one, as a DataLoader gives (images, labels).

    Raises:
        UserError: If there is no batch, or one does not fit the network.
    """
    return moments_over(Observer(network), batches)


def moments_over(observer: OperatorObserver[M_co], batches: Iterable[Any]) -> dict[str, M_co]:
    """Return what an observer takes of some batches. UserError if there is none."""
    count = 0
    for batch in batches:
        observer.update(select_images(batch))
        count += 1
    if not count:
        raise UserError("batches", "there is none", "Give at least one; a generator gives its batches only once.")
    return observer.moments()


def accumulate_patches(
    network: Network, batches: Iterable[Any], operators: Collection[str], positions: int = 16, seed: int = 0
) -> dict[str, PatchMoments]:
    """Return the moments of some operators with Σxxᵀ, for `quality`: see `PatchObserver` and `accumulate`."""
    return moments_over(PatchObserver(network, operators, positions, seed), batches)
