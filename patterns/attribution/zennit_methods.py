"""Methods of others, computed by zennit (Anders et al. 2021, arXiv 2106.13200) on a traced network.

zennit's rules work on torch's layers. Here each call of an operator becomes a layer of its own, which is treated as
the layer that its kind stands for; so the rules reach every network that can be traced, functional calls,
additions and folded batch norms included.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from zennit.attribution import Attributor, Gradient, IntegratedGradients, SmoothGrad
from zennit.composites import EpsilonPlusFlat, LayerMapComposite
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon

from patterns.attribution.baselines import Map, Settings, Start, generators, noise
from patterns.attribution.rectifier_rules import add_rules, passed
from patterns.operators.operator import (
    AveragePool,
    Convolution,
    Linear,
    Operator,
    OperatorType,
    Scale,
    TransposedConvolution,
)
from patterns.tracing.network import Network, operator_calls


class Layer(nn.Module):
    """One call of an operator. stacked: its inputs come as one tensor, along the last dimension."""

    def __init__(self, operator: Operator, stacked: bool) -> None:
        super().__init__()
        self.kind, self.stacked = operator.kind, stacked
        self.weight = nn.Parameter(operator.weight, requires_grad=False)
        self.bias = None if operator.bias is None else nn.Parameter(operator.bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.forward(x.unbind(-1) if self.stacked else (x,), self.weight, self.bias)


class Stack(nn.Module):
    """An operator of several inputs as a layer of one, which is all that zennit's rules know."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.layer = Layer(operator, stacked=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(torch.stack(torch.broadcast_tensors(*inputs), -1))


def stand_in(kind: OperatorType) -> nn.Module:
    """The layer of torch or zennit as which zennit's composites treat a kind."""
    match kind:
        case Convolution():
            return nn.Conv2d(1, 1, 1)
        case TransposedConvolution():
            return nn.ConvTranspose2d(1, 1, 1)
        case Linear():
            return nn.Linear(1, 1)
        case AveragePool():
            return nn.AvgPool2d(1)
        case Scale():
            return nn.BatchNorm2d(1)
        case _:
            return Sum()


def layered(network: Network) -> GraphModule:
    """The network in layers, with rectifiers that pass on all relevance."""
    module = network.rewrite(lambda op: op)
    for number, (node, operator) in enumerate(list(operator_calls(module))):
        node.target = f"layers.{number}"  # zennit's hooks remember one call of a layer
        several = len(operator.input_shapes) > 1
        module.add_submodule(node.target, Stack(operator) if several else Layer(operator, stacked=False))
    module.recompile()
    add_rules(module, lambda: passed)
    return module


class ByKind(Composite):  # type: ignore[misc] # zennit has no types
    """A composite of zennit's for the layers of `layered`."""

    def __init__(self, composite: Composite) -> None:
        def rule(context: dict[Any, Any], name: str, module: nn.Module) -> Any:
            return composite.module_map(context, name, stand_in(module.kind)) if isinstance(module, Layer) else None

        super().__init__(module_map=rule)


def lrp_z(network: Network, settings: Settings) -> Map:
    """Every operator gives its inputs their shares of its output z; the bias's is lost (Bach et al. 2015, eq. 56)."""
    return relevance(network, LayerMapComposite([(nn.Module, Epsilon(settings["epsilon"]))]))


def lrp_epsilon_plus_flat(network: Network, settings: Settings) -> Map:
    """zennit's composite: ε rule in linear layers, z⁺ in convolutions, the first one flat (Montavon et al. 2019)."""
    return relevance(network, EpsilonPlusFlat(settings["epsilon"]))


def relevance(network: Network, composite: Composite) -> Map:
    """Layer-wise relevance propagation of the target's value by a composite of zennit's."""
    attributor = Gradient(layered(network), ByKind(composite))
    return lambda inputs, start, _: attributed(attributor, inputs, lambda scores: start(scores) * scores)


def smoothgrad(network: Network, settings: Settings) -> Map:
    """The mean gradient of noisy copies, the last without noise (Smilkov et al. 2017); noise by share of the range."""
    attributor = SmoothGrad(network.module, noise_level=settings["noise"], n_iter=int(settings["samples"]))

    def average(inputs: Tensor, start: Start, seeds: list[int]) -> Tensor:
        with SeededNoise(seeds):
            return attributed(attributor, inputs, start)

    return average


def integrated_gradients(network: Network, settings: Settings) -> Map:
    """x ⊙ the mean gradient along the way from 0 to x (Sundararajan et al. 2017), at the ends of equal steps."""
    attributor = IntegratedGradients(network.module, n_iter=int(settings["steps"]))
    return lambda inputs, start, _: attributed(attributor, inputs, start)


def attributed(attributor: Attributor, inputs: Tensor, start: Start) -> Tensor:
    _, found = attributor(inputs.detach().clone(), start)
    return found.detach()


class SeededNoise(TorchFunctionMode):
    """Within it, `torch.randn_like` draws for each sample of a batch from the sample's own seed, batches or not."""

    def __init__(self, seeds: Iterable[int]) -> None:
        super().__init__()
        self.generators = generators(seeds)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return noise(self.generators, args[0]) if func is torch.randn_like else func(*args, **(kwargs or {}))
