"""Moments: the sums over samples from which the patterns of an operator are computed.

Sums over different data add up. `K` is the number of neurons, `D` the number of inputs of each neuron, and `G` the
number of groups of neurons that share their inputs (G = 1 for a plain convolution or a linear layer, G = K for a
depthwise convolution).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from patterns.moments.token_norms import TokenNorms, token_norms_bytes, zero_token_norms
from patterns.operators.operator import Operator

T = TypeVar("T")

FIELDS = ("n", "y", "yy", "x", "xy")
TOKENS = ("tokens.n", "tokens.yy")  # sums that moments of earlier versions lack
# Float32 outputs of a neuron that never varies differ by about 1e-7; the square of that is below this share.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Sums:
    """Sums over one set of samples (images × output positions), float64 except for the counts.

    Attributes:
        n: Number of samples, int64, shape (K,). For the side of a smooth gate, the sum of their weights, float64.
        y: Sum of the outputs without bias, shape (K,).
        yy: Sum of y², shape (K,).
        x: Sum of the inputs, shape (G, D) or (K, D); None if it was not requested.
        xy: Sum of x·y, shape (K, D); None if it was not requested.

    Example:
        >>> import torch
        >>> one = Sums(torch.tensor([2]), torch.tensor([3.0]), torch.tensor([5.0]))
        >>> float((one + one).mean_y()), float(one.var_y())
        (1.5, 0.25)
    """

    n: Tensor
    y: Tensor
    yy: Tensor
    x: Tensor | None = None
    xy: Tensor | None = None

    def __add__(self, other: "Sums") -> "Sums":
        return self._combine(other, 1)

    def __sub__(self, other: "Sums") -> "Sums":
        return self._combine(other, -1)

    def _combine(self, other: "Sums", sign: int) -> "Sums":
        def combine(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            both = pair(a, b, "one side has Σx and Σxy, the other has not")
            return both and torch.add(*both, alpha=sign)

        if self.n.dtype != other.n.dtype and sign > 0:
            raise ValueError("one side has the weights of a smooth gate, the other counts of samples")
        return Sums(*(combine(getattr(self, f), getattr(other, f)) for f in FIELDS))  # type: ignore[arg-type]

    def select_neurons(self, neurons: slice) -> "Sums":
        """Return views of the sums of some neurons. An x of shape (G, D) is returned unchanged."""
        x = self.x if self.x is None or len(self.x) < len(self.n) else self.x[neurons]
        return Sums(
            self.n[neurons], self.y[neurons], self.yy[neurons], x, None if self.xy is None else self.xy[neurons]
        )

    def mean_y(self) -> Tensor:
        """Return E[y], shape (K,); 0 without samples."""
        return self.y / self._divisor()

    def var_y(self) -> Tensor:
        """Return var[y], shape (K,); exactly 0 without samples, and if the outputs differ by rounding only."""
        mean_square = self.yy / self._divisor()
        var = mean_square - self.mean_y() ** 2
        return torch.where(var > ROUNDING * mean_square, var, 0.0)

    def mean_x(self) -> Tensor:
        """Return E[x] for each neuron, shape (K, D); 0 without samples, ValueError if x was not summed."""
        x = require(self.x)
        return x.repeat_interleave(len(self.n) // len(x), 0) / self._divisor()[:, None]

    def mean_xy(self) -> Tensor:
        """Return E[x·y], shape (K, D); 0 without samples, ValueError if x·y was not summed."""
        return require(self.xy) / self._divisor()[:, None]

    def _divisor(self) -> Tensor:
        return torch.where(self.n > 0, self.n, 1)


@dataclass(frozen=True)
class Moments:
    """Sums over all samples, and over the samples that open the gate. Moments of different data add up with `+`.

    Attributes:
        total: Sums over all samples.
        open: Sums over the samples that open the gate, with x of shape (K, D), or for a smooth gate over all samples,
            each times its weight (see `patterns.operators.gates`). None if the operator has no gate.
        tokens: The squared norms of the tokens of an addition. None for other operators and if they are unknown, as in
            moments of earlier versions.

    Example:
        >>> import torch
        >>> one = Moments(Sums(torch.tensor([2]), torch.tensor([3.0]), torch.tensor([5.0])))
        >>> (one + one).total.n.tolist()
        [4]
    """

    total: Sums
    open: Sums | None = None
    tokens: TokenNorms | None = None

    @property
    def closed(self) -> Sums:
        """Sums over the samples that close the gate, with x of shape (K, D); exactly 0 for a neuron without any."""
        opened = require(self.open)
        x = require(self.total.x)
        closed = replace(self.total, x=x.repeat_interleave(len(self.total.n) // len(x), 0)) - opened
        # Without samples, the difference of the sums is rounding, which would pass for a direction.
        any_samples = closed.n > ROUNDING * self.total.n
        large = {f: torch.where(any_samples[:, None], require(getattr(closed, f)), 0.0) for f in ("x", "xy")}
        small = {f: torch.where(any_samples, getattr(closed, f), 0.0) for f in ("y", "yy")}
        return replace(closed, **small, **large)

    def __add__(self, other: "Moments") -> "Moments":
        opened = pair(self.open, other.open, "one side has a gate, the other has not")
        tokens = None if self.tokens is None or other.tokens is None else self.tokens + other.tokens
        return Moments(self.total + other.total, opened and opened[0] + opened[1], tokens)

    def select_neurons(self, neurons: slice) -> "Moments":
        """Return views of the moments of some neurons."""
        opened = self.open and self.open.select_neurons(neurons)
        return Moments(self.total.select_neurons(neurons), opened, self.tokens)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the sums."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, such as `total.n` and `open.xy`."""
        found = {
            f"{side}.{field}": getattr(sums, field)
            for side, sums in (("total", self.total), ("open", self.open))
            for field in FIELDS
            if sums is not None and getattr(sums, field) is not None
        }
        return found if self.tokens is None else found | dict(zip(TOKENS, (self.tokens.n, self.tokens.yy)))

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "Moments":
        """Return the moments with these sums; the inverse of `tensors`.

        Args:
            named: The sums by name.

        Raises:
            KeyError: If a sum is missing.
            ValueError: If a name is unknown.
        """

        def sums(side: str) -> Sums:
            large = {f: named[f"{side}.{f}"] for f in ("x", "xy") if {f"{side}.x", f"{side}.xy"} & named.keys()}
            return Sums(*(named[f"{side}.{f}"] for f in ("n", "y", "yy")), **large)

        gated = any(name.startswith("open.") for name in named)
        tokens = TokenNorms(*(named[name] for name in TOKENS)) if set(TOKENS) & named.keys() else None
        moments = Moments(sums("total"), sums("open") if gated else None, tokens)
        if unknown := sorted(named.keys() - moments.tensors().keys()):
            raise ValueError(f"no sums of these names: {', '.join(unknown)}")
        return moments


@dataclass(frozen=True)
class RequiredSums:
    """The large sums, Σx and Σxy, that are taken.

    Attributes:
        total: Take them over all samples.
        open: Take them over the samples that open the gate.

    Example:
        >>> RequiredSums(open=False) <= RequiredSums()
        True
    """

    total: bool = True
    open: bool = True

    def __le__(self, other: "RequiredSums") -> bool:
        """Return whether `other` includes all of these sums."""
        return self.total <= other.total and self.open <= other.open


def zero_moments(operator: Operator, required: RequiredSums) -> Moments:
    """Return the moments of no samples, on the operator's device."""
    k, d = operator.neurons, operator.inputs_per_neuron
    device = operator.weight.device

    def sums(large: bool, x_rows: int, counts: torch.dtype = torch.int64) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        n = torch.zeros(k, dtype=counts, device=device)
        return Sums(n, zeros(k), zeros(k), zeros(x_rows, d) if large else None, zeros(k, d) if large else None)

    opened = None
    if operator.gate is not None:
        opened = sums(required.open, k, torch.float64 if operator.gate.is_smooth else torch.int64)
    return Moments(sums(required.total, operator.groups), opened, zero_token_norms(operator))


def moments_bytes(operator: Operator, required: RequiredSums) -> int:
    """Return the bytes of an operator's moments, before any data is read.

    Args:
        operator: The operator.
        required: The large sums that will be taken.

    Example:
        >>> import torch, patterns
        >>> operator = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)).operators["linear.0"]
        >>> moments_bytes(operator, RequiredSums()) == 8 * (3 * 2 + 3 + 2 * 3)
        True
    """
    return sums_bytes(operator, required) + token_norms_bytes(operator)


def sums_bytes(operator: Operator, required: RequiredSums) -> int:
    """Return the bytes of an operator's sums, without the norms of tokens."""
    k, d = operator.neurons, operator.inputs_per_neuron
    small, total, opened = 3 * k, (operator.groups + k) * d * required.total, 2 * k * d * required.open
    return 8 * (small + total + (0 if operator.gate is None else small + opened))


def require(value: T | None) -> T:
    """Return the value; raise ValueError if it is None, because these sums were not taken."""
    if value is None:
        raise ValueError("these moments were taken without the sums that this needs (Σx and Σxy, or the gate's)")
    return value


def pair(a: T | None, b: T | None, difference: str) -> tuple[T, T] | None:
    """Return both values, or None if both are None; raise ValueError if only one is."""
    if a is None or b is None:
        if a is not b:
            raise ValueError(difference)
        return None
    return a, b
