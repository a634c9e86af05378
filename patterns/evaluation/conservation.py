"""Where PatternAttribution keeps relevance, and where it loses it.

On the way back, a neuron of relevance R gives w_i a_i R to its i-th input, and wᵀa = 1: all of R, that
of its bias too. So the sum over the input equals the target's value, except for what is lost

- at gates, which give nothing back where they are closed: what reaches a value that is 0, or 6, from above;
- at borders, where a neuron's window leaves the image: the share Σ w_i a_i over its padding; and in transposed
  convolutions of a stride, whose windows lie on zeros between their inputs: the share over these;
- in neurons whose pattern is 0 (dead, constant or degenerate) or otherwise not wᵀa = 1.

Max pooling, changes of shape, concatenations and values with several readers pass on all that they get.
Shares are signed, as relevance is: a closed gate that loses negative relevance raises the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from patterns.attribution.explainer import Explained, Weights, backward_weights
from patterns.attribution.methods import ATTRIBUTION
from patterns.attribution.rectifier_rules import rectifier
from patterns.operators.operator import along
from patterns.tracing.aten_graph import opname
from patterns.tracing.network import Network

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Loss:
    """What relevance a part of the network gets from above and gives on, as shares of the target's value.

    cause: `gate`, `border`, `neuron`, or `other` for a part that is none of the project's operators.
    """

    name: str
    cause: str
    received: float
    given: float

    @property
    def lost(self) -> float:
        return self.received - self.given


def conservation(network: Network, patterns: Weights, inputs: Tensor, targets: Tensor) -> list[Loss]:
    """The losses of PatternAttribution, from the output to the input; 1 - Σ lost is what reaches the input.

    Each is a mean over samples, in the network's dtype and without scaling. An operator has two rows:
    its neurons', then its borders'.  inputs: (N, *input_shape); targets: int64 (N,).
    """
    operators = network.operators
    weights = backward_weights(network, patterns, ATTRIBUTION)
    module = network.rewrite(lambda op: Explained(op, lambda: weights[op.name]))
    losses: list[Loss] = []

    def total(gradients: Gradients) -> float:
        return sum(float(g.double().sum()) for g in gradients if g is not None) / len(inputs)

    def note(node: Node, given: Gradients, received: Gradients) -> None:
        if node.op != "call_module":
            cause = "gate" if rectifier(node) else "border" if "pad" in opname(node) else "other"
            losses.append(Loss(node.name, cause, total(received), total(given)))
            return
        operator, relevance = operators[str(node.target)], received[0]
        assert relevance is not None
        shares = weights[operator.name].flatten(1).sum(1)
        answered = total((relevance * along(operator.kind.axis, shares, relevance),))
        losses.append(Loss(operator.name, "neuron", total(received), answered))
        losses.append(Loss(operator.name, "border", answered, total(given)))

    inputs = inputs.detach().requires_grad_()
    scores = Followed(module, note).run(inputs)
    torch.autograd.grad(scores, inputs, torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0))
    return losses


class Followed(Interpreter):
    """Runs a graph, and tells of each node on the way back what it gave its inputs, and what it had received."""

    def __init__(self, module: GraphModule, note: Callable[[Node, Gradients, Gradients], None]) -> None:
        super().__init__(module)
        self.note = note
        self.followed: set[Any] = set()  # several nodes may be one to autograd: the parts of a split

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        step = result.grad_fn if isinstance(result, Tensor) else None
        if step is not None and step not in self.followed:
            self.followed.add(step)
            step.register_hook(partial(self.note, n))
        return result
