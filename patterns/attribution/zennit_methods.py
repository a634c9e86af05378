"""Methods of other papers, computed by zennit (Anders et al. 2021, arXiv 2106.13200) on a traced network.

zennit's rules apply to torch's layers. Here each call of an operator becomes a layer of its own, and zennit treats it
like the torch layer of the same operator type. So the rules reach every network that can be traced, with functional
calls, additions and folded batch norms.
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

from patterns.attribution.baselines import MapFunction, OutputGradient, Settings, draw_noise, make_generators
from patterns.attribution.rectifier_rules import insert_rules, pass_all
from patterns.attribution.scale_rules import insert_scale_rules
from patterns.operators.operator import (
    Addition,
    AveragePool,
    Convolution,
    Linear,
    Operator,
    OperatorType,
    Scale,
    TransposedConvolution,
)
from patterns.tracing.network import Network, find_operator_calls
from patterns.tracing.scales import ScaleRules


class Layer(nn.Module):
    """One call of an operator. If `stacked`, its inputs come as one tensor, stacked along the last dimension."""

    def __init__(self, operator: Operator, stacked: bool) -> None:
        super().__init__()
        self.operator_type, self.stacked = operator.operator_type, stacked
        self.weight = nn.Parameter(operator.weight, requires_grad=False)
        self.bias = None if operator.bias is None else nn.Parameter(operator.bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return self.operator_type.forward(x.unbind(-1) if self.stacked else (x,), self.weight, self.bias)


class Stack(nn.Module):
    """An operator with several inputs as a layer with one, because zennit's rules handle one input."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.layer = Layer(operator, stacked=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Stack the inputs and apply the layer."""
        return self.layer(torch.stack(torch.broadcast_tensors(*inputs), -1))


def equivalent_layer(operator_type: OperatorType) -> nn.Module:
    """Return the layer of torch or zennit that zennit's composites treat like this operator type.

    Raises:
        NotImplementedError: If the operator type has no such layer.
    """
    match operator_type:
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
        case Addition():
            return Sum()
    raise NotImplementedError(f"zennit's methods have no layer for the operator type {type(operator_type).__name__}")


def convert_to_layers(network: Network) -> GraphModule:
    """Return the network with a `Layer` for each call of an operator and rectifiers that pass all relevance."""
    module = network.rewrite(lambda op: op)
    for number, (node, operator) in enumerate(list(find_operator_calls(module))):
        node.target = f"layers.{number}"  # one layer per call, because zennit's hooks store one call of a layer
        several = len(operator.input_shapes) > 1
        module.add_submodule(node.target, Stack(operator) if several else Layer(operator, stacked=False))
    module.recompile()
    insert_rules(module, lambda: pass_all)
    insert_scale_rules(module, lambda: ScaleRules("pass", "pass"))
    return module


def make_differentiable(network: Network) -> GraphModule:
    """Return the network with the gradient of the model itself, also of norms, gates and attention weights."""
    module = network.rewrite(lambda op: op)
    insert_scale_rules(module, lambda: ScaleRules(differentiates=True))
    return module


class OperatorComposite(Composite):  # type: ignore[misc] # zennit has no types
    """One of zennit's composites, applied to the layers of `convert_to_layers`."""

    def __init__(self, composite: Composite) -> None:
        def rule(context: dict[Any, Any], name: str, module: nn.Module) -> Any:
            if not isinstance(module, Layer):
                return None
            return composite.module_map(context, name, equivalent_layer(module.operator_type))

        super().__init__(module_map=rule)


def lrp_z(network: Network, settings: Settings) -> MapFunction:
    """Return the function of LRP-z: each input of an operator gets its share of z, and the bias's share is lost.

    Source: Bach et al. 2015, eq. 56.
    """
    return propagate_relevance(network, LayerMapComposite([(nn.Module, Epsilon(settings["epsilon"]))]))


def lrp_epsilon_plus_flat(network: Network, settings: Settings) -> MapFunction:
    """Return the function of LRP with the ε rule in linear layers, z⁺ in convolutions, and flat in the first layer.

    Source: Montavon et al. 2019.
    """
    return propagate_relevance(network, EpsilonPlusFlat(settings["epsilon"]))


def propagate_relevance(network: Network, composite: Composite) -> MapFunction:
    """Return the function that propagates the target's value layer by layer.

    Args:
        network: The traced network.
        composite: One of zennit's composites, which chooses the rule of each layer.

    Returns:
        A function that returns the relevance of the inputs, in their shape.
    """
    attributor = Gradient(convert_to_layers(network), OperatorComposite(composite))
    return lambda inputs, output_gradient, _: run(attributor, inputs, lambda z: output_gradient(z) * z)


def smoothgrad(network: Network, settings: Settings) -> MapFunction:
    """Return the function that computes the mean gradient of noisy copies of a sample.

    Args:
        network: The traced network.
        settings: `samples`, the number of copies, of which the last has no noise, and `noise`, the standard deviation
            of the noise as a share of the range of the sample's values.

    Source: Smilkov et al. 2017.
    """
    attributor = SmoothGrad(
        make_differentiable(network), noise_level=settings["noise"], n_iter=int(settings["samples"])
    )

    def average(inputs: Tensor, output_gradient: OutputGradient, seeds: list[int]) -> Tensor:
        with SeededNoise(seeds):
            return run(attributor, inputs, output_gradient)

    return average


def integrated_gradients(network: Network, settings: Settings) -> MapFunction:
    """Return the function that computes the mean gradient on the line from 0 to x, times x.

    Args:
        network: The traced network.
        settings: `steps`, the number of equal steps. The gradient is taken at the end of each.

    Source: Sundararajan et al. 2017.
    """
    attributor = IntegratedGradients(make_differentiable(network), n_iter=int(settings["steps"]))
    return lambda inputs, output_gradient, _: run(attributor, inputs, output_gradient)


def run(attributor: Attributor, inputs: Tensor, output_gradient: OutputGradient) -> Tensor:
    """Return the maps that an attributor computes."""
    _, maps = attributor(inputs.detach().clone(), output_gradient)
    return maps.detach()


class SeededNoise(TorchFunctionMode):
    """Context in which `torch.randn_like` draws each sample of a batch from the sample's own seed."""

    def __init__(self, seeds: Iterable[int]) -> None:
        super().__init__()
        self.generators = make_generators(seeds)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return draw_noise(self.generators, args[0]) if func is torch.randn_like else func(*args, **(kwargs or {}))
