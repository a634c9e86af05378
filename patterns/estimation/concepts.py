"""Directions of concepts: pattern-based concept activation vectors.

The direction of a concept t in the outputs h of an operator is cov[h, t] / var[t]: the pattern of t for the "neuron"
that predicts it, as S_a is that of a neuron for its output. For a concept that is present or absent it is the
difference of the two means of h. Unlike the weights of a linear classifier, it does not turn towards directions that
only suppress noise.

Source: Pahde et al. 2025, "Navigating Neural Space: Revisiting Concept Activation Vectors to Overcome Directional
Divergence" (ICLR 2025, arXiv 2202.03482), eq. 5; Haufe et al. 2014.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.estimation.jackknife import FEWEST_GROUPS, Jackknife
from patterns.moments.concepts import ConceptSums
from patterns.moments.moments import ROUNDING


@dataclass(frozen=True)
class ConceptDirections:
    """The directions of C concepts in the outputs of an operator with K neurons, float64.

    Attributes:
        directions: cov[h, t] / var[t], shape (C, K); 0 for a concept that is constant.
        errors: Their standard errors, shape (C, K); NaN if there are too few groups of images.
        n: Number of labeled images.
        mean: Mean of each concept, shape (C,).
        variance: Variance of each concept, shape (C,); exactly 0 if it is constant.

    Example:
        >>> one = torch.ones(1)
        >>> ConceptDirections(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]]), 20, one, one).relative_errors
        tensor([0.1000])
    """

    directions: Tensor
    errors: Tensor
    n: int
    mean: Tensor
    variance: Tensor

    @property
    def relative_errors(self) -> Tensor:
        """‖standard errors‖ / ‖direction‖ of each concept, shape (C,); NaN without a direction."""
        return self.errors.norm(dim=1) / self.directions.norm(dim=1)


def solve_concepts(sums: ConceptSums) -> ConceptDirections:
    """Return the directions of concepts and their standard errors, by a jackknife over the groups of images.

    Args:
        sums: The sums of one operator.

    Example:
        >>> from patterns.moments import zero_concept_sums
        >>> sums = zero_concept_sums(1, 2)
        >>> h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [6.0, 3.0]])
        >>> sums.add(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), h, torch.arange(4))
        >>> solve_concepts(sums).directions.tolist()
        [[2.0, 2.0]]
    """
    used = sums.n > 0
    whole = sums.select(used)
    directions, mean, variance = compute_directions(whole)
    errors = torch.full_like(directions, torch.nan)
    if int(used.sum()) >= FEWEST_GROUPS:
        jackknife = Jackknife(directions.reshape(-1, 1))
        for group in used.nonzero().flatten().tolist():
            others = used.clone()
            others[group] = False
            left_out, _, _ = compute_directions(sums.select(others))
            jackknife.leave_out(left_out.reshape(-1, 1), int(sums.n[group]) / int(whole.n))
        errors = jackknife.variance().sqrt().reshape(directions.shape)
    return ConceptDirections(directions, errors, int(whole.n), mean, variance)


def compute_directions(sums: ConceptSums) -> tuple[Tensor, Tensor, Tensor]:
    """Return cov[h, t] / var[t], shape (C, K), and mean and variance of t, (C,), from the sums of one group."""
    n = sums.n.clamp(min=1).double()
    mean = (sums.t / n)[0]
    square = (sums.tt / n)[0]
    variance = square - mean**2
    variance = torch.where(variance > ROUNDING * square, variance, 0.0)
    covariance = (sums.th / n)[0] - mean[:, None] * (sums.h / n)
    directions = covariance / torch.where(variance > 0, variance, 1.0)[:, None]
    return torch.where(variance[:, None] > 0, directions, 0.0), mean, variance
