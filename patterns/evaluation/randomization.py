"""Networks with random weights: a map that does not change with the weights does not explain the network.

Adebayo et al. 2018 (arXiv 1810.03292) randomize the layers of a network one after another, from the output to the
input, and compare the maps with those of the trained network (`patterns.evaluation.similarity`).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from patterns.operators.copies import with_weights
from patterns.operators.operator import UNTRAINED_TYPES, Operator
from patterns.tracing.network import Network


def trained_operators(network: Network) -> list[str]:
    """Return the operators that can have trained weights: all except additions and average pooling.

    Args:
        network: The traced network.

    Returns:
        Their names from the input to the output, in the order in which the model first calls them.

    Example:
        >>> from patterns import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.AvgPool1d(2), torch.nn.Conv1d(3, 4, 2))
        >>> trained_operators(trace(model, torch.zeros(2, 2, 4)))
        ['0', '2']
    """
    return [name for name, op in network.operators.items() if not isinstance(op.operator_type, UNTRAINED_TYPES)]


def randomize(network: Network, names: Collection[str], generator: torch.Generator) -> Network:
    """Return the network with new random weights and biases for some operators, drawn in the order of the names.

    Each tensor is drawn from a normal distribution with its own mean and standard deviation, so that outputs keep their
    order of magnitude.

    Args:
        network: The traced network, which is not changed.
        names: Names of operators, such as `trained_operators(network)`.
        generator: The source of the random numbers, on the CPU. The draw does not depend on the network's device.

    Returns:
        A network that shares everything else with the given one.

    Raises:
        KeyError: If the network has no operator of a name.

    Example:
        >>> from patterns import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> network = trace(model, torch.zeros(2, 4))
        >>> other = randomize(network, ["2"], torch.Generator().manual_seed(0))
        >>> [bool((op.weight == other.operators[name].weight).all()) for name, op in network.operators.items()]
        [True, False]
    """
    operators = network.operators
    drawn = {
        name: with_weights(op, redraw(op.weight, generator), None if op.bias is None else redraw(op.bias, generator))
        for name, op in ((name, operators[name]) for name in names)
    }
    return replace_operators(network, drawn)


def cascade(network: Network, generator: torch.Generator) -> Iterator[tuple[str, Network]]:
    """Randomize the trained operators one after another, from the last to the first.

    Random weights can close all gates, so that the map of a later step is 0 or constant, and `spearman` returns NaN.

    Args:
        network: The traced network, which is not changed.
        generator: The source of the random numbers, on the CPU.

    Yields:
        The name of the operator that was randomized last, and the network with this and all later operators randomized.

    Example:
        >>> from patterns import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> network = trace(model, torch.zeros(2, 4))
        >>> [name for name, _ in cascade(network, torch.Generator().manual_seed(0))]
        ['2', '0']

    Source: Adebayo et al. 2018, §3.
    """
    for name in reversed(trained_operators(network)):
        network = randomize(network, [name], generator)
        yield name, network


def redraw(values: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers with the mean and the standard deviation of a tensor.

    Args:
        values: A tensor of any shape.
        generator: The source of the random numbers, on the CPU.

    Returns:
        A tensor of the same shape, dtype and device.

    Example:
        >>> redraw(torch.full((2, 2), 3.0), torch.Generator().manual_seed(0))
        tensor([[3., 3.],
                [3., 3.]])
    """
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    return values.mean() + values.std(correction=0) * noise


def replace_operators(network: Network, operators: Mapping[str, Operator]) -> Network:
    """Return the network with some of its operators replaced.

    Args:
        network: The traced network, which is not changed.
        operators: The new operators by name. Names that the network does not have are ignored.

    Returns:
        A network that shares everything else with the given one.

    Example:
        >>> from patterns import trace
        >>> network = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4))
        >>> ones = with_weights(network.operators["linear.0"], torch.ones(3, 4), None)
        >>> replace_operators(network, {"linear.0": ones}).module(torch.ones(1, 4))
        tensor([[4., 4., 4.]])
    """
    return replace(network, module=network.rewrite(lambda op: operators.get(op.name, op)))
