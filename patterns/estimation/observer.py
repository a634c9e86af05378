"""Observers: networks that accumulate the moments of their operators while they run."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from patterns.compilation import Function, capture_graph, compile_graph, translate_errors, warm_up_runs
from patterns.errors import UserError
from patterns.moments.accumulator import Accumulator
from patterns.moments.concept_accumulator import ConceptAccumulator, LabeledImages
from patterns.moments.concepts import ConceptSums, has_concepts
from patterns.moments.gram import PatchAccumulator, PatchMoments
from patterns.moments.moments import Moments, RequiredSums
from patterns.moments.position_sampling import PositionSampler
from patterns.moments.sampled import SampledAccumulator
from patterns.operators.operator import Inputs, Operator
from patterns.tracing.inputs import require_batch, select_images, validate_inputs
from patterns.tracing.network import Network

M_co = TypeVar("M_co", covariant=True)


class OperatorAccumulator(Protocol[M_co]):
    """Accumulator of the moments of one operator over batches."""

    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch, given the operator's inputs and outputs."""

    def reset(self) -> None:
        """Set all sums to 0."""

    def flush(self) -> None:
        """Add buffered samples to the sums."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current sums by name, not copied."""
        ...

    def moments(self) -> M_co:
        """Return a copy of the current moments on the CPU."""
        ...


class ObservedOperator(nn.Module):
    """An operator that passes its inputs and outputs to an accumulator."""

    def __init__(self, operator: Operator, accumulator: OperatorAccumulator[object], weight: Tensor | None) -> None:
        """Wrap an operator. If `weight` is given, it is used instead of the operator's weight."""
        super().__init__()
        self.operator, self.accumulator, self.weight = operator, accumulator, weight

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the operator's outputs."""
        op = self.operator
        z = op(*inputs) if self.weight is None else op.operator_type.forward(inputs, self.weight, op.bias)
        self.accumulator.update(inputs, z)
        return z


class OperatorObserver(Generic[M_co]):
    """A network that accumulates moments of some of its operators: the base of `Observer` and `PatchObserver`.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> isinstance(patterns.Observer(network), OperatorObserver)
        True
    """

    def __init__(
        self,
        network: Network,
        accumulators: Mapping[str, OperatorAccumulator[M_co]],
        sampler: PositionSampler | None = None,
        images: LabeledImages | None = None,
    ) -> None:
        """Observe a network.

        Args:
            network: The network.
            accumulators: The accumulators by operator name.
            sampler: The position sampler that the accumulators share, if any samples positions.
            images: The labels of images that the accumulators share, if any takes sums of concepts.
        """
        self._network, self._accumulators, self._sampler, self._seen = network, accumulators, sampler, 0
        self._images = images
        self._like = network.like

        def observe(op: Operator) -> nn.Module:
            if op.name not in accumulators:
                return op
            # Positions are sampled from images in channels_last. Convolutions would convert the weight in each batch.
            return ObservedOperator(op, accumulators[op.name], None if sampler is None else to_channels_last(op.weight))

        self._module = network.rewrite(observe)
        self._compiled: dict[torch.Size, Function] = {}

    def compile(self, batch_size: int, mode: str = "default") -> None:
        """Compile the update for batches of one size; other batches are not affected. All sums are reset.

        Args:
            batch_size: The size of a batch.
            mode: A mode of `torch.compile`, which takes minutes and changes sums by rounding only, or `cudagraphs`,
                which records the update on a GPU in seconds.

        Raises:
            UserError: If positions are sampled or sums of concepts are taken, if the mode is unknown, or if the
                compiler fails.
        """
        if self._images is not None:
            what = "sums of concepts cannot be compiled, because not every image has labels"
            raise UserError("", what, "Observe without concepts, or do not compile.", "compile")
        if self._sampler is not None:
            what = "sums over sampled positions cannot be compiled, because samples of several batches are gathered"
            raise UserError("", what, "Pass `positions=None`, or do not compile.", "compile")
        batch = self._network.like.new_zeros((batch_size, *self._network.input_shape))
        try:
            with translate_errors(mode, batch), torch.no_grad():
                run = compile_graph(capture_graph(self._module, batch), mode, batch)
                for _ in warm_up_runs(mode):
                    run(batch)
                self._compiled[batch.shape] = run
        finally:
            self.reset()

    def update(self, batch: Tensor, seeds: Sequence[int] | None = None, concepts: Tensor | None = None) -> Tensor:
        """Add a batch.

        Args:
            batch: Samples (N, *input_shape), on the network's device and in its dtype.
            seeds: A seed for each sample, from which its sampled positions follow. With seeds, the sums depend neither
                on the order of the samples nor on their batches. By default, samples are numbered as they come.
            concepts: The values of concepts, shape (N, C), a row of NaN for a sample without labels. By default, no
                sample has labels.

        Returns:
            The network's output.

        Raises:
            UserError: If the batch does not fit the network.
        """
        batch = validate_inputs(require_batch(batch, self._network.input_shape), self._like)
        if self._sampler is not None or self._images is not None:
            given = range(self._seen, self._seen + len(batch)) if seeds is None else seeds
            numbers = torch.tensor(given, dtype=torch.int64).to(batch.device)
            if self._images is not None:
                none = torch.full((len(batch), 1), torch.nan)
                self._images.set((none if concepts is None else concepts).to(batch.device), numbers)
            if self._sampler is not None:
                self._sampler.start_pass(numbers)
                batch = to_channels_last(batch)
        self._seen += len(batch)
        run = self._compiled.get(batch.shape)
        if run is not None:
            # Another memory layout would be compiled anew. A CUDA graph overwrites its output in the next call.
            return run(batch.detach().contiguous()).clone()
        with torch.inference_mode():
            return self._module(batch)

    def flush(self) -> None:
        """Add buffered samples to the sums.

        Called at the end of each shard, it makes the rounding of a shard's sums independent of other shards.
        """
        for accumulator in self._accumulators.values():
            accumulator.flush()

    def reset(self) -> None:
        """Set all sums to 0."""
        for accumulator in self._accumulators.values():
            accumulator.reset()

    def tensors(self) -> dict[str, Tensor]:
        """Return the current sums as `{operator}/{sum}`. The next `update` changes these tensors in place."""
        return {
            f"{name}/{field}": tensor
            for name, accumulator in self._accumulators.items()
            for field, tensor in accumulator.tensors().items()
        }

    def moments(self) -> dict[str, M_co]:
        """Return the current moments by operator: copies on the CPU."""
        return {name: accumulator.moments() for name, accumulator in self._accumulators.items()}


class Observer(OperatorObserver[Moments]):
    """A network that accumulates the moments of its operators over batches.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> observer = Observer(network)
        >>> outputs = observer.update(torch.rand(5, 3))
        >>> observer.moments()["linear.0"].total.n.tolist()
        [5, 5]
    """

    def __init__(
        self,
        network: Network,
        required: Callable[[Operator], RequiredSums] = lambda _: RequiredSums(),
        operators: Collection[str] | None = None,
        positions: int | None = None,
        seed: int = 0,
        concepts: int = 0,
    ) -> None:
        """Observe a network.

        Args:
            network: The network.
            required: Returns the large sums to take for an operator; by default, all.
            operators: Names of the operators to observe; None: all.
            positions: How many positions of each image to sample for each operator; None: all. An operator that has
                no more positions uses all of them.
            seed: Seed of the sampled positions, in addition to the seeds of the images.
            concepts: The number of concepts whose sums are taken, of operators with `patterns.moments.has_concepts`.

        Raises:
            UserError: If `positions` is below 1.
            KeyError: If the network has no operator of one of these names.
        """
        names = network.operators if operators is None else operators
        observed = {name: network.operators[name] for name in names}

        def is_sampled(op: Operator) -> bool:
            return positions is not None and op.per_image and prod(op.output_shape) // op.neurons > positions

        sampler = None
        if positions is not None and any(map(is_sampled, observed.values())):
            sampler = PositionSampler(positions, seed)

        images = LabeledImages() if concepts else None

        def accumulator(op: Operator) -> OperatorAccumulator[Moments]:
            found: Accumulator | SampledAccumulator = Accumulator(op, required(op))
            if sampler is not None and is_sampled(op):
                found = SampledAccumulator(op, required(op), sampler)
            return found if images is None or not has_concepts(op) else ConceptAccumulator(op, found, images, concepts)

        super().__init__(network, {name: accumulator(op) for name, op in observed.items()}, sampler, images)

    def concepts(self) -> dict[str, ConceptSums]:
        """Return the current sums of concepts by operator: copies on the CPU."""
        found = self._accumulators.items()
        return {name: each.concepts() for name, each in found if isinstance(each, ConceptAccumulator)}


class PatchObserver(OperatorObserver[PatchMoments]):
    """A network that accumulates the patch moments of some operators over batches, from sampled positions.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 8, 8))
        >>> observer = PatchObserver(network, ["convolution.0"], positions=4)
        >>> outputs = observer.update(torch.rand(5, 1, 8, 8))
        >>> observer.moments()["convolution.0"].xx.shape
        torch.Size([1, 9, 9])
    """

    def __init__(self, network: Network, operators: Collection[str], positions: int, seed: int = 0) -> None:
        """Observe a network.

        Args:
            network: The network.
            operators: Names of the operators to observe.
            positions: How many positions of each image to sample; all, if an operator has no more.
            seed: Seed of the sampled positions, in addition to the seeds of the images.

        Raises:
            UserError: If the patches of an operator cannot be sampled, or if `positions` is below 1.
            KeyError: If the network has no operator of one of these names.
        """
        observed, sampler = {name: network.operators[name] for name in operators}, PositionSampler(positions, seed)
        for name, op in observed.items():
            if not op.per_image:
                what = "its inputs are windows or tokens of several images, so positions of an image cannot be sampled"
                raise UserError(name, what, "Leave it out of `operators`.", "operators")
        super().__init__(network, {name: PatchAccumulator(op, sampler) for name, op in observed.items()}, sampler)


def to_channels_last(values: Tensor) -> Tensor:
    """Copy images or a weight (N, C, H, W) on a CPU to the channels_last layout; return other tensors as they are.

    The channels of a position are then gathered at once, and convolutions take down to half the time.
    """
    images = values.dim() == 4 and values.device.type == "cpu"
    # Not `contiguous`, which takes a single channel for channels_last in any layout.
    return torch.empty_like(values, memory_format=torch.channels_last).copy_(values) if images else values


def accumulate(network: Network, batches: Iterable[Any]) -> dict[str, Moments]:
    """Return all moments of every operator over some batches.

    Args:
        network: The traced model.
        batches: Tensors (N, *input_shape), or tuples that begin with one, as a DataLoader gives (images, labels).

    Returns:
        The moments by operator name.

    Raises:
        UserError: If there is no batch, or if a batch does not fit the network.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> accumulate(network, [torch.rand(5, 3), torch.rand(4, 3)])["linear.0"].total.n.tolist()
        [9, 9]
    """
    return observe_batches(Observer(network), batches)


def observe_batches(observer: OperatorObserver[M_co], batches: Iterable[Any]) -> dict[str, M_co]:
    """Return the moments that an observer accumulates over some batches. Raise UserError if there is no batch."""
    count = 0
    for batch in batches:
        observer.update(select_images(batch))
        count += 1
    if not count:
        remedy = "Pass at least one batch; a generator yields its batches only once."
        raise UserError("", "there are no batches", remedy, "batches")
    return observer.moments()


def accumulate_patches(
    network: Network, batches: Iterable[Any], operators: Collection[str], positions: int = 16, seed: int = 0
) -> dict[str, PatchMoments]:
    """Return the moments with Σxxᵀ of some operators over some batches, for `patterns.quality`.

    Args:
        network: The traced model.
        batches: Batches as for `accumulate`.
        operators: Names of the operators.
        positions: How many positions of each image to sample; all, if an operator has no more.
        seed: Seed of the sampled positions.

    Returns:
        The patch moments by operator name.

    Raises:
        UserError: If there is no batch, if a batch does not fit the network, if the patches of an operator cannot be
            sampled, or if `positions` is below 1.
        KeyError: If the network has no operator of one of these names.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 8, 8))
        >>> found = accumulate_patches(network, [torch.rand(5, 1, 8, 8)], ["convolution.0"], positions=4)
        >>> found["convolution.0"].moments.total.n.tolist()
        [20, 20]
    """
    return observe_batches(PatchObserver(network, operators, positions, seed), batches)
