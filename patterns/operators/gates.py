"""Gates: the activation after an operator, written as f(z) = z·g(z), and the weight that g gives to each sample.

A rectifier's g is 0 or 1: the gate is closed or open. The g of GELU, SiLU and the like changes gradually. Estimators
for one side of a gate weight each sample by g, or by 1 - g for the other side, where g is divided by its largest value
if that exceeds 1, and counts as 0 if it is negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.operators.axes import reshape_along

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A rectifier as a function of the output z of the operator before it: open for low < z < high.

    Attributes:
        low: Lower limit, -inf if there is none.
        high: Upper limit, inf if there is none.

    Example:
        >>> Gate(0.0, float("inf")).open(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([False, False,  True])
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} < z < {self.high:g}"

    @property
    def is_smooth(self) -> bool:
        """Whether weights can lie between 0 and 1; for a rectifier they cannot."""
        return False

    def open(self, z: Tensor) -> Tensor:
        """Return for each output z whether the gate is open, as bool."""
        mask = z > self.low
        return mask if self.high == float("inf") else mask.logical_and_(z < self.high)

    def weight_function(self, axis: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the function from outputs to their weights: whether the gate is open, as bool.

        Args:
            axis: The dimension of the outputs that counts the neurons; not used, because all have the same limits.
            device: Their device; not used.
        """
        return self.open

    def mask(self, values: Tensor, z: Tensor, out: Tensor) -> Tensor:
        """Return the values where the gate is open for z, and 0 elsewhere.

        This runs the rectifier's own gradient, because products with boolean masks are slow on CPUs.

        Args:
            values: Values that broadcast to the shape of z.
            z: Outputs of the operator.
            out: The tensor that receives the result.
        """
        return aten.hardtanh_backward.grad_input(values.expand_as(z), z, self.low, self.high, grad_input=out)


@dataclass(frozen=True)
class SmoothGate:
    """An activation f(z) = z·g(z) whose g is not only 0 or 1.

    Attributes:
        name: A name from `FACTORS`.
        parameters: The parameters of its g; for `prelu` the slope of each neuron.

    Example:
        >>> SmoothGate("silu", (1.0,)).factor(torch.tensor([0.0, 100.0]))
        tensor([0.5000, 1.0000])
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.has_slopes:
            return f"{self.name} {min(self.parameters):g} to {max(self.parameters):g}"
        return " ".join([self.name, *(f"{value:g}" for value in self.parameters if value != 1)])

    @property
    def is_smooth(self) -> bool:
        """Whether weights can lie between 0 and 1."""
        return True

    @property
    def has_slopes(self) -> bool:
        """Whether the parameters are one slope for each neuron."""
        return self.name == "prelu"

    @property
    def largest_factor(self) -> float:
        """The supremum of g, at least 1."""
        bound = LARGEST.get(self.name)
        return 1.0 if bound is None else bound(*self.parameters)

    def factor(self, z: Tensor) -> Tensor:
        """Return g(z), in the dtype of z; slopes belong to dimension 1 of z."""
        return FACTORS[self.name](z, *self._arguments(z))

    def weight_function(self, axis: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the function from outputs to their weights, g divided by the largest g of the neuron, in [0, 1].

        Args:
            axis: The dimension of the outputs that counts the neurons.
            device: Their device. The function creates no tensors from numbers, as CUDA graphs require.
        """
        if self.has_slopes:
            slopes = torch.tensor(self.parameters, dtype=torch.float64, device=device)
            opened = 1 / slopes.clamp(min=1)
            closed = slopes.clamp(min=0) * opened

            def choose(z: Tensor) -> Tensor:
                high, low = (reshape_along(axis, weights.to(z.dtype), z) for weights in (opened, closed))
                return torch.where(z > 0, high, low)

            return choose

        def weigh(z: Tensor) -> Tensor:
            factor = self.factor(z)
            factor = factor if self.largest_factor == 1 else factor / self.largest_factor
            return factor.clamp(min=0) if self.name == "leaky-relu" and self.parameters[0] < 0 else factor

        return weigh

    def activate(self, z: Tensor) -> Tensor:
        """Return f(z) = z·g(z); slopes belong to dimension 1 of z."""
        return activate(z, self.name, *self._arguments(z))

    def _arguments(self, z: Tensor) -> tuple[float | Tensor, ...]:
        """Return the arguments of `activate` after the name."""
        return (torch.tensor(self.parameters).to(z),) if self.has_slopes else self.parameters


AnyGate = Gate | SmoothGate


def gated(
    z: Tensor, name: str, *parameters: float | Tensor, detach: Callable[[Tensor], Tensor] = Tensor.detach
) -> Tensor:
    """Return z·g(z), with the usual gradient of z and without the gradient of g.

    Args:
        z: The activation's input.
        name: A name from `FACTORS`.
        *parameters: The parameters of g; for `prelu` the slopes of the channels, shape (C,), dimension 1 of z.
        detach: Returns z for g, by default without its gradient.

    Example:
        >>> z = torch.zeros(1, requires_grad=True)
        >>> gated(z, "silu", 1.0).backward()
        >>> z.grad
        tensor([0.5000])

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), eq. 9, the identity rule.
    """
    if not (z.requires_grad and torch.is_grad_enabled()):
        return activate(z, name, *parameters)
    return z * FACTORS[name](detach(z), *parameters)


def activate(z: Tensor, name: str, *parameters: float | Tensor) -> Tensor:
    """Return z·g(z) by torch's own function if it has one, which is faster than the product."""
    own = ACTIVATIONS.get(name)
    return z * FACTORS[name](z, *parameters) if own is None else own(z, *parameters)


def gelu_factor(z: Tensor) -> Tensor:
    """Return Φ(z) (Hendrycks & Gimpel 2016)."""
    if z.requires_grad and torch.is_grad_enabled():
        return torch.special.ndtr(z)
    return divide_by_input(torch.nn.functional.gelu(z), z)


def gelu_tanh_factor(z: Tensor) -> Tensor:
    """Return (1 + tanh(√(2/π)(z + 0.044715 z³))) / 2."""
    if z.requires_grad and torch.is_grad_enabled():
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z))
    return divide_by_input(torch.nn.functional.gelu(z, approximate="tanh"), z)


def divide_by_input(values: Tensor, z: Tensor) -> Tensor:
    """Return f(z) / z, and ½ for z = 0; the values f(z) are overwritten.

    torch computes f several times as fast as Φ. The quotient of two rounded numbers is as accurate as the numbers, also
    near 0.
    """
    return values.div_(z).nan_to_num_(0.5)


def silu_factor(z: Tensor, beta: float) -> Tensor:
    """Return σ(βz) (Ramachandran et al. 2017; β = 1.702 approximates GELU)."""
    return torch.sigmoid(z if beta == 1 else beta * z)


def hardswish_factor(z: Tensor) -> Tensor:
    """Return clamp(z + 3, 0, 6) / 6 (Howard et al. 2019)."""
    return aten.hardsigmoid(z)


def mish_factor(z: Tensor) -> Tensor:
    """Return tanh(softplus(z)) (Misra 2019)."""
    return torch.tanh(torch.nn.functional.softplus(z))


def elu_factor(z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Return scale for z > 0, and scale·alpha·(e^(input_scale·z) - 1) / z below (ELU, SELU and CELU)."""
    below = input_scale * z.clamp(max=0)
    # expm1 keeps all digits near 0, where the ratio is 1.
    ratio = torch.where(below < 0, torch.expm1(below) / torch.where(below < 0, below, 1.0), 1.0)
    return torch.where(z > 0, scale, (scale * alpha * input_scale) * ratio)


def leaky_factor(z: Tensor, slope: float) -> Tensor:
    """Return 1 for z > 0, and the slope below."""
    return torch.where(z > 0, z.new_ones(()), z.new_full((), slope))


def prelu_factor(z: Tensor, slopes: Tensor) -> Tensor:
    """Return 1 for z > 0, and the channel's slope below, for z (N, C, …) and slopes (C,) (He et al. 2015)."""
    return torch.where(z > 0, z.new_ones(()), reshape_along(1, slopes, z))


FACTORS: dict[str, Callable[..., Tensor]] = {
    "gelu": gelu_factor,
    "gelu-tanh": gelu_tanh_factor,
    "silu": silu_factor,
    "hardswish": hardswish_factor,
    "mish": mish_factor,
    "elu": elu_factor,
    "leaky-relu": leaky_factor,
    "prelu": prelu_factor,
}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "silu": lambda z, beta: torch.nn.functional.silu(z) if beta == 1 else z * silu_factor(z, beta),
    "hardswish": torch.nn.functional.hardswish,
    "prelu": torch.nn.functional.prelu,
}
# The supremum of g, where it can exceed 1.
LARGEST: dict[str, Callable[..., float]] = {
    "elu": lambda alpha, scale, input_scale: max(1.0, scale, scale * alpha * input_scale),
    "leaky-relu": lambda slope: max(1.0, slope),
    "prelu": lambda *slopes: max(1.0, *slopes),
}
