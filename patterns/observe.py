"""A network that takes its operators' moments while it runs."""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from patterns.graph import Network
from patterns.moments import Accumulator, Moments, Wanted
from patterns.operators import Inputs, Operator
from patterns.patches import PatchAccumulator, PatchMoments


class Fed(Protocol):
    """What takes an operator's inputs and its outputs."""

    def update(self, inputs: Inputs, z: Tensor) -> None: ...


class Observed(nn.Module):
    """An operator that also feeds its accumulator."""

    def __init__(self, operator: Operator, accumulator: Fed) -> None:
        super().__init__()
        self.operator, self.accumulator = operator, accumulator

    def forward(self, *inputs: Tensor) -> Tensor:
        z = self.operator(*inputs)
        self.accumulator.update(inputs, z)
        return z


class Observer:
    """Accumulates the moments of every operator of a network over batches."""

    def __init__(self, network: Network, wanted: Callable[[Operator], Wanted] = lambda _: Wanted()) -> None:
        self._accumulators = {name: Accumulator(op, wanted(op)) for name, op in network.operators.items()}
        self._module: GraphModule = network.rewrite(lambda op: Observed(op, self._accumulators[op.name]))

    @torch.inference_mode()
    def update(self, batch: Tensor) -> Tensor:
        """Add a batch (N, *input_shape), on the network's device and in its dtype; gives the model's output."""
        return self._module(batch)

    def reset(self) -> None:
        """Forget everything."""
        for accumulator in self._accumulators.values():
            accumulator.reset()

    def moments(self) -> dict[str, Moments]:
        """The moments so far by operator: copies on the CPU."""
        return {name: accumulator.moments() for name, accumulator in self._accumulators.items()}


class PatchObserver:
    """Accumulates the Gram moments of chosen operators over batches, from sampled positions of each image.

    operators: names in the network.  positions: drawn from each image, all where it has no more.
    seed: with each operator's name and the source of the images, it says which; see `begin`.

    Raises KeyError for a name that is no operator of the network, UserError for an operator whose
    patches cannot be sampled and for no positions.
    """

    def __init__(self, network: Network, operators: Collection[str], positions: int, seed: int = 0) -> None:
        self._accumulators = {
            name: PatchAccumulator(network.operators[name], positions, seed) for name in dict.fromkeys(operators)
        }
        accumulators = self._accumulators
        self._module: GraphModule = network.rewrite(
            lambda op: Observed(op, accumulators[op.name]) if op.name in accumulators else op
        )

    def begin(self, source: str) -> None:
        """Draw positions from here on as at the start of this source of images (a shard).

        So a shard's sums depend on the shard alone: not on who takes it, after what, or in what batches.
        """
        for accumulator in self._accumulators.values():
            accumulator.begin(source)

    @torch.inference_mode()
    def update(self, batch: Tensor) -> Tensor:
        """Add a batch (N, *input_shape), on the network's device and in its dtype; gives the model's output."""
        return self._module(batch)

    def reset(self) -> None:
        """Forget all sums; the draw of positions goes on."""
        for accumulator in self._accumulators.values():
            accumulator.reset()

    def moments(self) -> dict[str, PatchMoments]:
        """The sums so far by operator: copies on the CPU."""
        return {name: accumulator.moments() for name, accumulator in self._accumulators.items()}


def accumulate(network: Network, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """All moments of every operator over some batches, each (N, *input_shape)."""
    observer = Observer(network)
    for batch in batches:
        observer.update(batch)
    return observer.moments()
