"""Relevance and activation of the channels of chosen operators, recorded during the passes that make the maps.

The relevance of an operator's output channel is a sum over its spatial positions:

- PatternAttribution: Σ r, where r is the backward signal that arrives at the operator's output, before the gate's
  input, which is what the operator distributes to its inputs. The scaling of the pass (`gradient_scaling`) is undone.
- gradient-x-input: Σ z·∂/∂z, the output times the gradient with respect to it.
- gradient: Σ ∂/∂z, which is no relevance: how the score changes if all positions of the channel do.

The first two are conserved where the method conserves relevance: Σ over channels is then the same for every operator
through which all paths from the input lead. The other methods have no relevance at hidden units: signals (PatternNet)
are no shares of the score, and zennit's passes do not run through the traced network.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.attribution.gradient_scaling import times_power_of_two
from patterns.attribution.methods import BackwardPass, Method
from patterns.errors import UserError
from patterns.operators.gates import Gate, SmoothGate
from patterns.operators.operator import Operator
from patterns.tracing.network import Network


@dataclass(frozen=True)
class Channels:
    """Relevance and activation of the channels of some operators. K is the number of an operator's channels.

    Attributes:
        relevance: By method and operator, shape (N, K), or (N, T, K) for T targets per sample.
        activation: By operator, the largest activation after the gate over the positions, shape (N, K).
        embedding: The input of the operator that is called last, which is the class layer of a classifier, shape
            (N, D): its mean over positions if it has any.

    Example:
        >>> from patterns import Explainer, trace
        >>> network = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4))
        >>> explainer = Explainer(network, {}, ["gradient-x-input"], channels=network.operators)
        >>> explainer(torch.ones(2, 4)).channels.embedding.shape
        torch.Size([2, 4])
    """

    relevance: dict[str, dict[str, Tensor]]
    activation: dict[str, Tensor]
    embedding: Tensor


class ChannelRecorder:
    """Recorder of the channels of one operator while the passes run through it.

    Args:
        operator: The operator.
        keeps_output: Whether some pass multiplies by the output.

    Attributes:
        times_output: Whether the current backward pass multiplies by the output.
        activation: See `Channels`; None before the forward pass.
        embedding: The operator's input, or its mean over positions if it has any; None before the forward pass.
        relevance: See `Channels`; None if no backward pass has reached the operator.
    """

    def __init__(self, operator: Operator, keeps_output: bool = False) -> None:
        self.operator, self.keeps_output, self.times_output = operator, keeps_output, False
        self.begin()

    def begin(self) -> None:
        """Discard what was recorded in the last forward pass."""
        self.activation: Tensor | None = None
        self.embedding: Tensor | None = None
        self.relevance: Tensor | None = None

    def record_forward(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Record a call of the operator. If it is called several times, the largest activation is kept."""
        axis, gate = self.operator.operator_type.axis, self.operator.gate
        values = gate.activate(output) if isinstance(gate, SmoothGate) else output
        largest = values.movedim(axis, 1).flatten(2).amax(2) if values.dim() > 2 else values.clone()
        if isinstance(gate, Gate):  # it is monotone, so the largest output gives the largest activation
            largest = largest.clamp(gate.low, gate.high)
        self.activation = largest if self.activation is None else torch.maximum(self.activation, largest)
        x = inputs[0].detach()
        self.embedding = x.flatten(1, -2).mean(1) if axis == -1 and x.dim() > 2 else x
        if axis != -1 and x.dim() > 2:
            self.embedding = x.movedim(axis, 1).flatten(2).mean(2)

    def record_backward(self, gradient: Tensor, output: Tensor | None) -> None:
        """Record the gradient at the output of a call. The relevance is summed over several calls."""
        values = gradient * output if self.times_output and output is not None else gradient
        if values.dim() > 2:
            values = values.movedim(self.operator.operator_type.axis, 1).flatten(2).sum(2)
        self.relevance = values if self.relevance is None else self.relevance + values


class Capture:
    """The recorders of an explainer, and what they record as a flat list of tensors, which can be compiled.

    Args:
        network: The network.
        operators: The names of the operators whose channels are recorded. If it is empty, nothing is.
        methods: The methods of the explainer by name.

    Raises:
        UserError: If there is no such operator, or a method has no relevance at hidden units.
    """

    def __init__(self, network: Network, operators: Collection[str], methods: Mapping[str, Method]) -> None:
        self.operators = tuple(dict.fromkeys(operators))
        known = network.operators
        if unknown := [name for name in self.operators if name not in known]:
            what, remedy = f"the network has no operator {unknown[0]!r}", f"Choose from {', '.join(known)}."
            raise UserError("", what, remedy, "channels")
        for name, method in methods.items():
            is_recorded = method.backward is not None and (method.is_attribution or name == "gradient")
            if self.operators and not is_recorded:
                remedy = "Use patternattribution, gradient-x-input or gradient, or leave out `channels`."
                raise UserError("", f"{name} has no relevance at hidden units", remedy, "channels")
        self._last = list(known)[-1]
        self._times_output = {m.backward: m.times_input for m in methods.values() if m.backward is not None}
        keeps = any(self._times_output.values())
        recorded = dict.fromkeys((*self.operators, self._last)) if self.operators else ()
        self.recorders = {name: ChannelRecorder(known[name], keeps) for name in recorded}

    def begin_forward(self) -> None:
        """Discard what was recorded in the last passes."""
        for recorder in self.recorders.values():
            recorder.begin()

    def begin_backward(self, backward: BackwardPass) -> None:
        """Prepare a backward pass."""
        for recorder in self.recorders.values():
            recorder.relevance, recorder.times_output = None, self._times_output[backward]

    def read_backward(self) -> list[Tensor]:
        """Return the relevance of each operator in the last backward pass, zeros where it did not arrive."""
        recorders = [self.recorders[name] for name in self.operators]
        return [torch.zeros_like(_found(r.activation)) if r.relevance is None else r.relevance for r in recorders]

    def read_forward(self) -> list[Tensor]:
        """Return the activation of each operator and the embedding."""
        if not self.operators:
            return []
        activations = [_found(self.recorders[name].activation) for name in self.operators]
        return [*activations, _found(self.recorders[self._last].embedding)]

    def collect(
        self,
        methods: Mapping[str, Method],
        results: Sequence[Sequence[Tensor]],
        several: bool,
        exponents: Mapping[BackwardPass, Mapping[str, int]],
    ) -> Channels | None:
        """Return the channels of an explanation; None if none were recorded.

        Args:
            methods: The methods of the explainer by name.
            results: For each target, `read_backward` of each pass, one after the other, and `read_forward`.
            several: Whether each sample has several targets.
            exponents: By pass and operator, the exponent of two by which the gradient at its output is scaled.
        """
        if not self.operators:
            return None
        count, passes = len(self.operators), list(self._times_output)
        relevance: dict[str, dict[str, Tensor]] = {}
        for method, row in methods.items():
            assert row.backward is not None
            first, found = passes.index(row.backward) * count, {}
            for number, operator in enumerate(self.operators):
                of_targets = [result[first + number] for result in results]
                values = torch.stack(of_targets, 1) if several else of_targets[0]
                if exponent := exponents[row.backward].get(operator, 0):
                    values = times_power_of_two(values.double(), exponent)
                found[operator] = values
            relevance[method] = found
        *activations, embedding = results[0][len(passes) * count :]
        return Channels(relevance, dict(zip(self.operators, activations)), embedding)


def _found(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def list_last_of_resolutions(network: Network) -> tuple[str, ...]:
    """Return the last operator of each resolution, in the order of the network, without the last of all.

    Two operators have the same resolution if their outputs have the same spatial shape. The last operator of all gives
    the scores.

    Args:
        network: The network.

    Example:
        >>> from torch import nn
        >>> from patterns import trace
        >>> layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 2)
        >>> list_last_of_resolutions(trace(nn.Sequential(*layers), torch.zeros(1, 1, 8, 8)))
        ('0', '3')
    """
    found: dict[tuple[int, ...], str] = {}
    names = list(network.operators)
    for name in names[:-1]:
        operator = network.operators[name]
        shape = list(operator.output_shape)
        del shape[operator.sample_axis]
        found[tuple(shape)] = name
    return tuple(sorted(found.values(), key=names.index))
