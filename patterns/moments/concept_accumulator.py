"""Accumulation of the moments of one operator and of the sums of its concepts over batches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from patterns.moments.accumulator import Accumulator
from patterns.moments.concepts import PREFIX, ConceptSums, mean_output, zero_concept_sums
from patterns.moments.moments import Moments
from patterns.moments.sampled import SampledAccumulator
from patterns.operators.operator import Inputs, Operator


class LabeledImages:
    """The labels of the images of the current batch, which the accumulators of all operators read.

    Attributes:
        labeled: Numbers of the images that have labels, int64 (M,).
        values: Their values of the concepts, float64 (M, C).
        groups: Their groups, int64 (M,).
    """

    labeled: Tensor
    values: Tensor
    groups: Tensor

    def set(self, values: Tensor, seeds: Tensor) -> None:
        """Begin a batch.

        Args:
            values: The values of the concepts, float64 (N, C); a row of NaN for an image without labels.
            seeds: The seeds of the images, int64 (N,).
        """
        self.labeled = (~values.isnan().any(1)).nonzero().flatten()
        self.values, self.groups = values[self.labeled], seeds[self.labeled]


class ConceptAccumulator:
    """Accumulator of an operator's moments and of the sums of its concepts.

    Args:
        operator: The operator.
        moments: The accumulator of its moments.
        images: The labels of the current batch.
        concepts: The number of concepts.
    """

    def __init__(
        self, operator: Operator, moments: Accumulator | SampledAccumulator, images: LabeledImages, concepts: int
    ) -> None:
        self._operator, self._moments, self._images = operator, moments, images
        self._sums = zero_concept_sums(concepts, operator.neurons, operator.weight.device)

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch, given the operator's inputs and outputs."""
        self._moments.update(inputs, z)
        images = self._images
        h = mean_output(self._operator, z)
        self._sums.add(images.values, h[images.labeled], images.groups % len(self._sums.n))

    @torch.inference_mode()  # sums made in inference mode cannot be changed outside of it
    def reset(self) -> None:
        """Set all sums to 0."""
        self._moments.reset()
        for total in self._sums.tensors().values():
            total.zero_()

    def flush(self) -> None:
        """Add buffered samples to the sums."""
        self._moments.flush()

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current sums by name, not copied. Sums of concepts have names `concepts/{sum}`."""
        concepts = {f"{PREFIX}/{name}": sums for name, sums in self._sums.tensors().items()}
        return {**self._moments.tensors(), **concepts}

    def moments(self) -> Moments:
        """Return a copy of the current moments on the CPU, without the sums of concepts."""
        return self._moments.moments()

    def concepts(self) -> ConceptSums:
        """Return a copy of the current sums of concepts on the CPU."""
        return ConceptSums.from_tensors({k: v.to("cpu", copy=True) for k, v in self._sums.tensors().items()})
