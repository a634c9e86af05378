"""Conservation of relevance by PatternAttribution, and the steps that lose relevance.

In the backward pass, a neuron with relevance R gives w_i a_i R to its i-th input. Because wᵀa = 1, these add up to R,
which includes the share of the bias. So the sum of the map equals the target's value, except for the losses

- at gates: relevance for a gate that is closed (the value is 0, or 6) ends there, and a smooth gate with the factor g
  loses the share 1 - g;
- at borders: the share Σ w_i a_i over the padding in a neuron's receptive field; in transposed convolutions with a
  stride also the share over the zeros between the inputs;
- in neurons without wᵀa = 1, such as those with pattern 0 (dead, constant or degenerate), and those with the identity
  estimator, x / z: they lose the share of the bias, and ε / (|z| + ε) by the stabilizer ε.

Max pooling, reshaping, concatenation and values with several readers lose nothing; nor do norms, factors of products
and attention, whose weights sum to 1. Shares are signed because relevance is: a closed gate that loses negative
relevance raises the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from patterns.attribution.backward_weights import (
    OperatorWithBackwardWeight,
    Patterns,
    compute_backward_weights,
    find_identities,
)
from patterns.attribution.methods import ATTRIBUTION
from patterns.attribution.rectifier_rules import rectifier_function
from patterns.attribution.scale_rules import SwitchedGate, insert_scale_rules
from patterns.operators.axes import reshape_along
from patterns.operators.operator import Operator
from patterns.tracing.aten_graph import opname
from patterns.tracing.network import Network
from patterns.tracing.scales import SCALES, detached

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Loss:
    """The relevance that one step of the network receives from above and passes on, as shares of the target's value.

    Attributes:
        name: The operator, or the node of the traced graph.
        cause: `gate`, `border`, `neuron`, or `other` for a step that is neither an operator nor a gate nor padding.
        received: The share that the step receives.
        given: The share that it passes on.

    Example:
        >>> from patterns import Loss
        >>> Loss("relu", "gate", received=1.0, given=0.75).lost
        0.25
    """

    name: str
    cause: str
    received: float
    given: float

    @property
    def lost(self) -> float:
        """The share that is lost."""
        return self.received - self.given


def conservation(network: Network, patterns: Patterns, inputs: Tensor, targets: Tensor) -> list[Loss]:
    """Measure where PatternAttribution loses relevance.

    Args:
        network: The traced network.
        patterns: Patterns by operator name.
        inputs: Shape (N, *input_shape).
        targets: Classes, int64, shape (N,).

    Returns:
        The losses from the output to the input, means over the samples. An operator has two: that of its neurons, then
        that of its borders. The share that reaches the input is 1 - Σ lost. The backward pass runs in the network's
        dtype without scaling.

    Raises:
        UserError: If a pattern is missing or has the wrong shape.

    Example:
        >>> import torch
        >>> from patterns import accumulate, choose, conservation, solve, trace
        >>> model, data = torch.nn.Linear(4, 2), torch.randn(64, 4)
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]).patterns for name, op in network.operators.items()}
        >>> chosen, targets = choose(network, solutions, "linear"), torch.tensor([0, 1, 0, 1, 0])
        >>> losses = conservation(network, chosen, data[:5], targets)
        >>> [loss.cause for loss in losses], all(abs(loss.lost) < 1e-5 for loss in losses)
        (['neuron', 'border'], True)
    """
    operators = network.operators
    weights = compute_backward_weights(network, patterns, ATTRIBUTION)
    identities = find_identities(patterns, ATTRIBUTION)

    def make_operator(operator: Operator) -> OperatorWithBackwardWeight:
        is_identity = (lambda: True) if operator.name in identities else None
        return OperatorWithBackwardWeight(operator, lambda: weights[operator.name], is_identity)

    module = network.rewrite(make_operator)
    # What is detached gets no gradient at all, so that only relevance is summed.
    scales = [function for function in SCALES if function is not detached]
    insert_scale_rules(module, lambda: ATTRIBUTION.scales, lambda: identities, scales)
    losses: list[Loss] = []

    def total(gradients: Gradients) -> float:
        return sum(float(g.double().sum()) for g in gradients if g is not None) / len(inputs)

    def record(node: Node, given: Gradients, received: Gradients) -> None:
        operator = operators.get(str(node.target)) if node.op == "call_module" else None
        if operator is None:
            losses.append(Loss(node.name, find_cause(module, node), total(received), total(given)))
            return
        relevance = received[0]
        assert relevance is not None
        if operator.name in identities:  # nothing is lost at borders, where x is 0
            by_neurons = total(given)
        else:
            shares = weights[operator.name].flatten(1).sum(1)
            by_neurons = total((relevance * reshape_along(operator.operator_type.axis, shares, relevance),))
        losses.append(Loss(operator.name, "neuron", total(received), by_neurons))
        losses.append(Loss(operator.name, "border", by_neurons, total(given)))

    inputs = inputs.detach().requires_grad_()
    scores = GradientRecorder(module, record).run(inputs)
    torch.autograd.grad(scores, inputs, torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0))
    return losses


def find_cause(module: GraphModule, node: Node) -> str:
    """Return why a step that is no operator can lose relevance."""
    if node.op == "call_module":  # a scale that follows rules
        return "gate" if isinstance(module.get_submodule(str(node.target)), SwitchedGate) else "other"
    return "gate" if rectifier_function(node) else "border" if "pad" in opname(node) else "other"


class GradientRecorder(Interpreter):
    """Runs a graph and reports, in the backward pass, the gradients that each node passes on and receives."""

    def __init__(self, module: GraphModule, record: Callable[[Node, Gradients, Gradients], None]) -> None:
        super().__init__(module)
        self.record = record
        self.hooked: set[Any] = set()  # several nodes can have one autograd function, for example those of a split

    def run_node(self, n: Node) -> Any:
        """Run a node and hook its autograd function."""
        result = super().run_node(n)
        function = result.grad_fn if isinstance(result, Tensor) else None
        if function is not None and function not in self.hooked:
            self.hooked.add(function)
            function.register_hook(partial(self.record, n))
        return result
