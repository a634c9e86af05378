"""A network that takes its operators' moments while it runs."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from patterns.graph import Network
from patterns.moments import Accumulator, Moments, Wanted
from patterns.operators import Operator


class Observed(nn.Module):
    """An operator that also feeds its accumulator."""

    def __init__(self, operator: Operator, accumulator: Accumulator) -> None:
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


def accumulate(network: Network, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """All moments of every operator over some batches, each (N, *input_shape)."""
    observer = Observer(network)
    for batch in batches:
        observer.update(batch)
    return observer.moments()
