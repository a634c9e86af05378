"""Sums over images from which the direction of a concept in the outputs of an operator follows.

A concept is a number t for each image. h is the mean over the spatial positions of the operator's output z (before
its gate), one number for each neuron, so an image counts once, whatever its size. Sums are kept for GROUPS groups of
images, so that a jackknife can leave one group out. The group of an image follows from its seed, and so from its key:
it does not depend on which worker reads the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from patterns.operators.operator import Operator

GROUPS = 16
PREFIX = "concepts"  # the sums of an operator are stored as `{operator}/concepts/{sum}`


@dataclass(frozen=True)
class ConceptSums:
    """Sums over the labeled images of each of G groups, for C concepts and K neurons; float64 except for the count.

    Attributes:
        n: Number of labeled images, int64, shape (G,).
        t: Sum of the concepts' values, shape (G, C).
        tt: Sum of their squares, shape (G, C).
        h: Sum of the neurons' mean outputs, shape (G, K).
        th: Sum of the products, shape (G, C, K).

    Example:
        >>> sums = zero_concept_sums(2, 3)
        >>> sums.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([5]))
        >>> sums.th[5].tolist()
        [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    """

    n: Tensor
    t: Tensor
    tt: Tensor
    h: Tensor
    th: Tensor

    def __add__(self, other: "ConceptSums") -> "ConceptSums":
        return ConceptSums(*(a + b for a, b in zip(self.tensors().values(), other.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "ConceptSums":
        """Return the sums with these tensors; the inverse of `tensors`."""
        return ConceptSums(**named)

    def add(self, t: Tensor, h: Tensor, groups: Tensor) -> None:
        """Add images in place.

        Args:
            t: The values of the concepts, shape (N, C).
            h: The outputs, shape (N, K).
            groups: The group of each image, int64 (N,).
        """
        t, h = t.double(), h.double()
        member = torch.nn.functional.one_hot(groups, len(self.n))
        self.n.add_(member.sum(0))
        member = member.double()
        self.t.add_(member.T @ t)
        self.tt.add_(member.T @ t.square())
        self.h.add_(member.T @ h)
        self.th.add_(torch.einsum("ng,nc,nk->gck", member, t, h))

    def select(self, groups: Tensor) -> "ConceptSums":
        """Return the sums over all images of some groups, with G = 1.

        Args:
            groups: Whether each group counts, bool (G,).
        """
        return ConceptSums(*(sums[groups].sum(0, keepdim=True) for sums in self.tensors().values()))


def zero_concept_sums(concepts: int, neurons: int, device: torch.device | str = "cpu") -> ConceptSums:
    """Return the sums over no images, for GROUPS groups.

    Args:
        concepts: The number of concepts, C.
        neurons: The number of neurons, K.
        device: The device of the sums.

    Example:
        >>> zero_concept_sums(2, 3).th.shape
        torch.Size([16, 2, 3])
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((GROUPS, *shape), dtype=torch.float64, device=device)

    n = torch.zeros(GROUPS, dtype=torch.int64, device=device)
    return ConceptSums(n, zeros(concepts), zeros(concepts), zeros(neurons), zeros(concepts, neurons))


def has_concepts(operator: Operator) -> bool:
    """Return whether concepts have directions in an operator's outputs.

    The model must call the operator once, and the first dimension of its output must count images.

    Args:
        operator: The operator.
    """
    return operator.per_image and operator.calls == 1


def mean_output(operator: Operator, z: Tensor) -> Tensor:
    """Return the mean over positions of an operator's output, at least float32, shape (N, K).

    Args:
        operator: The operator.
        z: Its output, shape (N, …).
    """
    z = z.movedim(operator.operator_type.axis, 1).to(torch.promote_types(z.dtype, torch.float32))
    return z.flatten(2).mean(2) if z.dim() > 2 else z
