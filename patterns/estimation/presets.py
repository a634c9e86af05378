"""Presets: named choices of an estimator for each operator of a network."""

import glob
from collections.abc import Callable
from dataclasses import dataclass

from patterns.estimation.estimators import Choices
from patterns.operators.operator import Convolution, TransposedConvolution
from patterns.tracing.network import Network, find_ancestors, find_operator_calls


@dataclass(frozen=True)
class Preset:
    """A named choice of estimators.

    Attributes:
        description: What it chooses, in a sentence.
        choices: Returns the choices for a network, the first that applies to an operator counts.
    """

    description: str
    choices: Callable[[Network], list[str]]


def find_top(network: Network) -> list[str]:
    """Return the operators without a gate that come after the last convolution with a gate, in their order.

    After means that the convolution's output reaches them. A network without a gated convolution has only its
    operators without a gate that no gated operator reads.

    Args:
        network: The network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from patterns import trace
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> find_top(trace(model, torch.zeros(2, 3, 8, 8)))
        ['average_pool.0', '4']
    """
    calls = list(find_operator_calls(network.module))
    gated = [node for node, op in calls if op.gate is not None]
    convolutions = (Convolution, TransposedConvolution)
    last = next(
        (n for n, op in reversed(calls) if op.gate is not None and isinstance(op.operator_type, convolutions)), None
    )
    if last is None:
        below = set().union(*map(find_ancestors, gated))
        return list(dict.fromkeys(op.name for node, op in calls if op.gate is None and node not in below))
    return list(dict.fromkeys(op.name for node, op in calls if op.gate is None and last in find_ancestors(node)))


def class_specific(network: Network) -> list[str]:
    """Return the identity for the operators of `find_top`, and the gate's own mean for the others."""
    top = find_top(network)
    below = [] if set(top) == set(network.operators) else ["two-component-own-mean"]
    return [f"{glob.escape(name)}=identity" for name in top] + below


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "The paper's estimators: a₊ of S_a± for operators with a gate, S_a for the others.",
        lambda network: ["default"],
    ),
    "linear": Preset("S_a for every operator.", lambda network: ["linear"]),
    "own-mean": Preset(
        "cov₊[x, y] / var₊[y] over the open gate for operators with a gate, S_a for the others.",
        lambda network: ["two-component-own-mean"],
    ),
    "class-specific": Preset(
        "The image's own activations above the last gated convolution, so that maps differ between classes; own-mean "
        "below it.",
        class_specific,
    ),
}


def expand_presets(estimators: Choices, network: Network) -> list[str]:
    """Replace the names of presets among choices of estimators by what they choose for a network.

    Args:
        estimators: Choices of estimators, see `parse_estimators`, or names from `PRESETS`. `linear` is both.
        network: The network.

    Returns:
        Choices of estimators.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from patterns import trace
        >>> network = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
        >>> expand_presets("class-specific", network)
        ['2=identity', 'two-component-own-mean']
    """
    choices = estimators.split(",") if isinstance(estimators, str) else estimators
    return [c for choice in choices for c in (PRESETS[choice].choices(network) if choice in PRESETS else [choice])]
