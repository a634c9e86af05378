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
    before, after = (list(range(axis % values.dim())), list(range(axis % values.dim() + 1, values.dim())))
    # The norm down the columns takes three times as long as a sum of squares.
    if not after:
        return values.square().sum(before)
    # On CPUs, a norm over neighboring elements takes a fifth of the time of one over all dimensions of the samples, and
    # has a fiftieth of its error in float32, which adds squares to one sum.
    squares = torch.linalg.vector_norm(values, dim=after).square()
    return squares.sum(before) if before else squares


def sample_dimensions(values: Tensor, axis: int) -> list[int]:
    """Return the dimensions that count samples: all except `axis`."""
    return [d for d in range(values.dim()) if d != axis % values.dim()]
