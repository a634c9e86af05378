"""Solving for the patterns of one operator: run the estimators, and flag neurons."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.estimation.estimators import BLOCK_ELEMENTS, ESTIMATORS, Choices, Problem, select_estimators
from patterns.moments.moments import ROUNDING, Moments
from patterns.operators.operator import Operator

TOP_TOKENS = 0.001  # the share of tokens with the largest norms
# The largest share of Σ‖y‖² that they may hold. In networks without outlier tokens they held 0.1 to 0.6 %, and 1.6 % in
# one with random weights; with 2 % of tokens of ten times the usual norm 2.5 %, with 0.2 % of a hundred times 27 %.
LARGEST_SHARE = 0.02


@dataclass(frozen=True)
class Solution:
    """Patterns of one operator, with statistics of its neurons.

    Attributes:
        patterns: Patterns by name from `ESTIMATORS`, in the weight's shape and at least float32.
        flags: For each neuron the reason why it has no pattern from the data: `dead` (its gate never opened),
            `constant` (its output never varied), `degenerate` (the denominator of its pattern vanished) or `outliers`
            (see `has_outliers`). `ok` for all other neurons.
        n: Number of samples, int64, shape (K,).
        n_positive: Number of samples that open the gate (all samples without a gate), int64, shape (K,). For a smooth
            gate the sum of their weights, float64.
        mean_y: Mean of the outputs without bias, float64, shape (K,).
        var_y: Variance of the outputs, float64, shape (K,).
        top_share: The share of Σ‖y‖² that the 0.1 % of tokens with the largest norms hold, for an addition of tokens or
            of other positions; None if it is unknown.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> moments = patterns.accumulate(network, [torch.rand(50, 3)])
        >>> patterns.solve(network.operators["linear.0"], moments["linear.0"]).flags
        ['ok', 'ok']
    """

    patterns: dict[str, Tensor]
    flags: list[str]
    n: Tensor
    n_positive: Tensor
    mean_y: Tensor
    var_y: Tensor
    top_share: float | None = None

    @property
    def has_outliers(self) -> bool:
        """Whether a few tokens hold so much of Σ‖y‖² that patterns from data would describe only these tokens."""
        return exceeds(self.top_share)


def exceeds(top_share: float | None) -> bool:
    """Return whether the share of Σ‖y‖² that few tokens hold is known and too large."""
    return top_share is not None and top_share > LARGEST_SHARE


def solve(operator: Operator, moments: Moments, estimators: Choices = "default", seed: int = 0) -> Solution:
    """Compute the patterns of one operator from its moments.

    Args:
        operator: The operator; its weight has shape (K, ...), K neurons with D inputs each.
        moments: Its moments, float64, on the CPU.
        estimators: Comma-separated names from `CHOICES`, or `glob=name` pairs for the operators that match.
        seed: Seed of the `random` estimator.

    Returns:
        Patterns in the weight's shape (float32, or the weight's dtype if wider), with wᵀa = 1 for every informative
        neuron (except for `multivariate`), and 0 with a flag for the others. If few tokens hold most of an addition's
        Σ‖y‖² (see `Solution.has_outliers`), estimators that use data give its neurons the pattern of `filter`: equal
        parts for the terms of a sum.

    Raises:
        UserError: If an estimator is unknown.
        ValueError: If the moments lack a sum that an estimator needs.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> moments = patterns.accumulate(network, [torch.rand(50, 3)])
        >>> solve(network.operators["linear.0"], moments["linear.0"], "linear").patterns["linear"].shape
        torch.Size([2, 3])

    Source: Kindermans et al. 2018, eq. 4 and 7.
    """
    total, opened = moments.total, moments.open
    n_positive, var_y = total.n if opened is None else opened.n, total.var_y()
    alive = n_positive > ROUNDING * total.n
    informative = (alive & (var_y > 0))[:, None]
    dtype = torch.promote_types(operator.weight.dtype, torch.float32)
    top_share = None if moments.tokens is None else moments.tokens.top_share(TOP_TOKENS)
    has_outliers = exceeds(top_share)
    default, names = select_estimators(operator, "default")[0], select_estimators(operator, estimators)
    # The estimator whose patterns decide which neurons are degenerate.
    decisive = default if default in names else next(iter(names), None)
    patterns, vanished = {}, torch.zeros_like(var_y, dtype=torch.bool)
    for name in names:
        replaced = has_outliers and ESTIMATORS[name].uses_data
        estimator = ESTIMATORS["filter" if replaced else name]
        patterns[name] = torch.empty(operator.weight.shape, dtype=dtype)
        for neurons in [slice(None)] if estimator.joint else split_neurons(operator):
            weight = operator.weight[neurons].detach().cpu().double().flatten(1)
            pattern = estimator.solve(Problem(operator, moments.select_neurons(neurons), weight, seed))
            if estimator.uses_data:
                pattern = torch.where(informative[neurons], pattern, 0.0)
            if name == decisive:
                vanished[neurons] = (pattern == 0).all(1)
            patterns[name][neurons] = pattern.view_as(operator.weight[neurons])
    flags = ["outliers"] * operator.neurons if has_outliers else flag_neurons(alive, var_y, vanished)
    return Solution(patterns, flags, total.n, n_positive, total.mean_y(), var_y, top_share)


def split_neurons(operator: Operator) -> list[slice]:
    """Return blocks of neurons to solve for at once; a single block if groups of neurons have different inputs."""
    count = operator.neurons if operator.groups > 1 else max(1, BLOCK_ELEMENTS // operator.inputs_per_neuron)
    return [slice(start, start + count) for start in range(0, operator.neurons, count)]


def flag_neurons(alive: Tensor, var_y: Tensor, vanished: Tensor) -> list[str]:
    """Return why each neuron has pattern 0, or ok.

    Args:
        alive: Whether the gate ever opened.
        var_y: The variance of the outputs.
        vanished: Whether the neuron's decisive pattern is 0.
    """
    flags = ["ok"] * len(alive)
    for neuron in range(len(flags)):
        if not alive[neuron]:
            flags[neuron] = "dead"
        elif var_y[neuron] == 0:
            flags[neuron] = "constant"
        elif vanished[neuron]:
            flags[neuron] = "degenerate"
    return flags
