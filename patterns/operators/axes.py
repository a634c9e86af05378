"""Sums and products along one dimension of a tensor, the dimension that counts the neurons."""

import torch
from torch import Tensor


def reshape_along(axis: int, values: Tensor, like: Tensor) -> Tensor:
    """Reshape a vector so that it multiplies dimension `axis` of `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def sum_positions(values: Tensor, axis: int) -> Tensor:
    """Return the sum over all dimensions except `axis`, shape (K,)."""
    return values.sum(sample_dimensions(values, axis))


def sum_squares(values: Tensor, axis: int) -> Tensor:
    """Return the sum of squares over all dimensions except `axis`, shape (K,)."""
    # The norm down the columns takes three times as long as a sum of squares.
    if axis % values.dim() == values.dim() - 1:
        return values.square().sum(sample_dimensions(values, axis))
    return torch.linalg.vector_norm(values, dim=sample_dimensions(values, axis)).square()


def sample_dimensions(values: Tensor, axis: int) -> list[int]:
    """Return the dimensions that count samples: all except `axis`."""
    return [d for d in range(values.dim()) if d != axis % values.dim()]
