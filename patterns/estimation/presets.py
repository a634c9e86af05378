"""Presets: named choices of an estimator for each operator of a network."""

import glob
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from patterns.errors import UserError
from patterns.estimation.estimators import CHOICES, Choices, parse_estimators, select_choices, split_choices
from patterns.operators.operator import Convolution, TransposedConvolution
from patterns.tracing.network import Network, find_ancestors, find_operator_calls


@dataclass(frozen=True)
class Preset:
    """A named choice of estimators.

    Attributes:
        description: What it chooses, in a sentence.
        choices: Returns the choices for a network; the first that applies to an operator counts.

    Example:
        >>> preset = Preset("Linear estimators everywhere.", lambda network: ["linear"])
        >>> preset.description
        'Linear estimators everywhere.'
    """

    description: str
    choices: Callable[[Network], list[str]]


def find_top(network: Network) -> list[str]:
    """Return the operators that come after the last convolution with a gate, in their order.

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
    return list(dict.fromkeys(op.name for node, op in calls if last in find_ancestors(node)))


def class_specific(network: Network) -> list[str]:
    """Return the identity for the operators of `find_top`, and the gate's own mean for the others."""
    top = find_top(network)
    below = [] if set(top) == set(network.operators) else ["two-component-own-mean"]
    return [f"{glob.escape(name)}=identity" for name in top] + below


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "The paper's estimators: a₊ of S_a± for operators with a gate, S_a for the others.",
        lambda network: ["two-component"],
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


# The preset of explanations that name none, and the one for runs of version 0.2, which lack the patterns of the first.
DEFAULT, BEFORE = "class-specific", "paper"


def expand_presets(estimators: Choices, network: Network) -> list[str]:
    """Replace each preset among choices of estimators by the estimators that it chooses for a network.

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
    choices = split_choices(estimators)
    return [c for choice in choices for c in (PRESETS[choice].choices(network) if choice in PRESETS else [choice])]


def resolve_estimators(
    network: Network, estimators: Choices, solved: Mapping[str, Collection[str]] | None = None
) -> dict[str, str]:
    """Return the estimator of each operator in an explanation.

    Args:
        network: The network.
        estimators: Choices of estimators, or names of presets. The first that applies to an operator counts; operators
            to which none applies have the default preset.
        solved: For each operator the names of the patterns that a run has. If it lacks those of the default preset, as
            runs of version 0.2 do, the preset `paper` takes its place.

    Returns:
        A name from `CHOICES` for each operator's name.

    Raises:
        UserError: If there is no such estimator, or a choice applies to no operator.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from patterns import trace
        >>> network = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
        >>> resolve_estimators(network, "0=linear,class-specific")
        {'0': 'linear', '2': 'identity'}
    """
    own = split_choices(estimators)
    given = [c for c in own if c not in PRESETS and c != "default"]
    found = parse_estimators(given, network.operators, "estimator")
    preset = DEFAULT if solved is None or has_rows(network, DEFAULT, solved) else BEFORE
    choices = expand_presets([preset if c == "default" else c for c in [*own, "default"]], network)
    selected = {name: select_choices(name, choices)[0] for name in network.operators}
    if unused := [name for _, name in found if name not in selected.values()]:
        what = f"{unused[0]!r} is never used, because an earlier estimator applies to all of its operators"
        raise UserError("", what, "Put OPERATORS=ESTIMATOR before an estimator for all operators.", "estimator")
    return selected


def has_rows(network: Network, preset: str, solved: Mapping[str, Collection[str]]) -> bool:
    """Return whether a run has the patterns of a preset."""
    choices = PRESETS[preset].choices(network)
    return all(
        set(CHOICES[select_choices(name, choices)[0]][op.gate is None][:1]) <= set(solved.get(name, ()))
        for name, op in network.operators.items()
    )
