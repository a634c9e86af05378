"""Data drawn from a known distribution in several parts, and the patterns in the limit of infinitely many samples."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from patterns import Gate, Moments, Operator, solve
from patterns.estimation.jackknife import (
    StandardErrors,
    check_convergence,
)
from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import RequiredSums
from patterns.operators.operator import Convolution

D, K = 6, 5
ROWS = ("linear", "positive", "negative", "multivariate")
CHOICES = ("linear", "two-component", "multivariate")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Inputs are normal with covariance MIXING MIXINGᵀ and a mean other than 0.
MIXING, MEAN = normal(D, D, seed=1), normal(D, seed=2)


def layer(neurons: int = K, draws: int = 1, *, gated: bool = True) -> Operator:
    """Neurons that are open for half of the samples on average.

    `draws` repeats the neurons, each time over inputs of their own: independent experiments in one operator.
    """
    weight = normal(neurons, D, seed=3)
    bias = normal(neurons, seed=4) - weight @ MEAN
    return build_operator(weight.repeat(draws, 1), bias.repeat(draws), draws, Gate(0.0, math.inf) if gated else None)


def build_operator(weight: Tensor, bias: Tensor, groups: int = 1, gate: Gate | None = None) -> Operator:
    """An operator with these weights (K, D), each group of neurons over D inputs of its own."""
    convolution = Convolution((1,), (0,), (1,), groups)
    return Operator("it", convolution, weight[..., None], bias, ((groups * D, 1),), (len(weight), 1), "", gate)


def draw_samples(n: int, seed: int = 0, draws: int = 1) -> Tensor:
    """Draw samples (n, draws × D, 1)."""
    return (normal(n, draws, D, seed=1000 + seed) @ MIXING.T + MEAN).view(n, draws * D, 1)


def moments(operator: Operator, x: Tensor) -> Moments:
    accumulator = Accumulator(operator, RequiredSums())
    accumulator.update((x,), operator(x))
    return accumulator.moments()


def split_moments(operator: Operator, x: Tensor, sizes: Sequence[int] | int) -> list[Moments]:
    return [moments(operator, part) for part in x.split(sizes)]


def make_loaders(partials: Sequence[Moments]) -> list[Callable[[], Moments]]:
    return [partial(copy, part) for part in partials]


def solve_partials(
    operator: Operator, partials: Sequence[Moments], choices: Sequence[str] = CHOICES
) -> dict[str, Tensor]:
    """Return the patterns of the sum of some partial moments, each (K, D)."""
    return {row: a.flatten(1) for row, a in solve(operator, reduce(add, partials), choices).patterns.items()}


def estimate_errors(
    operator: Operator, partials: Sequence[Moments], choices: Sequence[str] = CHOICES
) -> dict[str, StandardErrors]:
    found = check_convergence(operator, make_loaders(partials), choices).errors
    assert None not in found.values()
    return {row: error for row, error in found.items() if error is not None}


def true_pattern(operator: Operator, row: str) -> Tensor:
    """Return the pattern in the limit of infinitely many samples, from the moments of a truncated normal y; (K, D)."""
    w = operator.weight.flatten(1)
    cov = w @ MIXING @ MIXING.T
    var = (cov * w).sum(1, keepdim=True)
    if row == "linear":
        return cov / var
    assert operator.bias is not None
    sd, center = var.sqrt(), operator.bias[:, None] + (w @ MEAN)[:, None]
    at = -center / sd  # the gate's limit, in standard deviations of y
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    is_open = 0.5 * torch.erfc(at / math.sqrt(2))
    first, second = sd * density / is_open, var * (1 + at * density / is_open)  # of y - E[y], over the open gate
    direction = MEAN * first + cov / var * second
    return direction / (direction * w).sum(1, keepdim=True)


def distance(found: Tensor, true: Tensor) -> Tensor:
    """Return ‖a - a'‖ / ‖a'‖, (K,)."""
    return (found - true).norm(dim=1) / true.norm(dim=1)
