"""The slow truths: plain float64 computations by another route than the package's own."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]

# --- patches, written out -------------------------------------------------------------------------


def window_patches(
    x: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int = 1
) -> list[Tensor]:
    """Each group's patches, (images × positions, D), for x of shape (N, C, *sizes)."""
    padded = F.pad(x.double(), [p for size in reversed(padding) for p in (size, size)])
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    starts = [range(0, n - span + 1, s) for n, span, s in zip(padded.shape[2:], spans, stride)]
    patches: list[list[Tensor]] = [[] for _ in range(groups)]
    for corner in product(*starts):
        window = (slice(c, c + span, d) for c, span, d in zip(corner, spans, dilation))
        for rows, channels in zip(patches, padded[:, :, *window].chunk(groups, 1)):
            rows.append(channels.flatten(1))
    return [torch.stack(rows, 1).flatten(0, 1) for rows in patches]


def linear_patches(x: Tensor) -> list[Tensor]:
    """One group: every vector along the last dimension."""
    return [torch.stack([x.double()[index] for index in np.ndindex(*x.shape[:-1])])]


def channel_patches(*inputs: Tensor, axis: int = 1) -> list[Tensor]:
    """Each channel's values, one column for each input."""
    channels = range(inputs[0].shape[axis])
    return [torch.stack([x.double().select(axis, k).flatten() for x in inputs], 1) for k in channels]


def transposed_patches(
    x: Tensor, kernel: Shape, stride: Shape, padding: Shape, output_padding: Shape, dilation: Shape, groups: int = 1
) -> list[Tensor]:
    """As `window_patches`, of a transposed convolution: a plain one over x with zeros between its positions."""
    dims = range(2, x.dim())
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)]
    spread = torch.zeros(*x.shape[:2], *sizes, dtype=torch.float64)
    spread[(..., *(slice(None, None, s) for s in stride))] = x.double()
    borders = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
    around = [n for b, extra in reversed(list(zip(borders, output_padding))) for n in (b, b + extra)]
    ones, nothing = (1,) * len(dims), (0,) * len(dims)
    patches = window_patches(F.pad(spread, around), kernel, ones, nothing, dilation, groups)
    # It meets its kernel from the other end.
    return [p.unflatten(1, (-1, *kernel)).flip(list(dims)).flatten(1) for p in patches]


def positions_seeing(unfold: Callable[..., list[Tensor]], shapes: Sequence[Shape]) -> list[Tensor]:
    """How many samples of an image see an input that a weight meets, on average; (D,) for each group.

    The inputs are numbered, and every number is looked up in every patch. Where a weight meets padding alone: 1.
    """
    sizes = [prod(shape) for shape in shapes]
    numbers = torch.arange(1, sum(sizes) + 1).split(sizes)
    means = []
    for patches in unfold(*(n.reshape(1, *shape) for n, shape in zip(numbers, shapes))):
        seen = [[int(number) for number in row if number] for row in patches.T]  # by weight; 0 is padding
        count = Counter(number for row in seen for number in row)
        means.append([np.mean([count[number] for number in row]) if row else 1.0 for row in seen])
    return [torch.tensor(row, dtype=torch.float64) for row in means]


# --- sums and estimators over patches -------------------------------------------------------------


@dataclass(frozen=True)
class Neuron:
    """One neuron's samples: patches x (S, D), outputs without bias y (S,), and where its gate is open (S,)."""

    x: Tensor
    y: Tensor
    open: Tensor

    def sums(self, which: str) -> dict[str, Tensor]:
        """n, Σy, Σy², Σx and Σx·y over the `total`, `open` or `closed` samples."""
        chosen = {"total": torch.ones_like(self.open), "open": self.open, "closed": ~self.open}[which]
        x, y = self.x[chosen], self.y[chosen]
        xy = (x * y[:, None]).sum(0)
        return {"n": torch.tensor(len(y)), "y": y.sum(), "yy": (y * y).sum(), "x": x.sum(0), "xy": xy}


def neurons(
    patches: Sequence[Tensor], weight: Tensor, bias: Tensor | None, limits: tuple[float, float] | None
) -> list[Neuron]:
    """The neurons of an operator with these patches for each group; `limits` of the gate, None without one."""
    flat = weight.detach().double().flatten(1)
    low, high = limits or (-np.inf, np.inf)
    found = []
    for k, w in enumerate(flat):
        x = patches[k * len(patches) // len(flat)]
        y = torch.tensor([float(row @ w) for row in x], dtype=torch.float64)
        z = y if bias is None else y + bias.detach().double()[k]
        found.append(Neuron(x, y, (z > low) & (z < high)))
    return found


def side(neuron: Neuron, which: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the open or closed samples."""
    chosen = (neuron.open if which == "open" else ~neuron.open).numpy()
    return neuron.x.numpy()[chosen], neuron.y.numpy()[chosen]


def two_component(neuron: Neuron, weight: Tensor, which: str) -> np.ndarray:
    """(E₊[xy] - E₊[x]E[y]) / wᵀ(…) over the open or closed samples of one neuron, sample by sample."""
    x, y = side(neuron, which)
    direction = np.mean([xi * yi for xi, yi in zip(x, y)], 0) - x.mean(0) * neuron.y.numpy().mean()
    return direction / (weight.double().flatten().numpy() @ direction)


def regressed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """cov[x, y] / var[y] over some samples, shape (D,)."""
    return np.cov(x.T, y, bias=True)[-1, :-1] / np.var(y)


def covariance(neuron: Neuron) -> np.ndarray:
    """cov[x, y] of one neuron, shape (D,)."""
    return np.cov(neuron.x.numpy().T, neuron.y.numpy(), bias=True)[-1, :-1]


def multivariate(group: Sequence[Neuron], ridge: float) -> np.ndarray:
    """Least squares of x on the outputs of all neurons of a group, (K/G, D); the ridge is further samples."""
    x, y = group[0].x.numpy(), np.stack([neuron.y.numpy() for neuron in group], 1)
    x, y = x - x.mean(0), y - y.mean(0)
    more = np.diag(np.sqrt(ridge * len(y)) * y.std(0))
    return np.linalg.lstsq(np.vstack([y, more]), np.vstack([x, np.zeros((len(group), x.shape[1]))]), rcond=None)[0]


# --- explanations as products of explicit matrices ------------------------------------------------

Layer = Callable[[Tensor, Tensor], Tensor]  # of inputs (N, *shape) and a weight, without bias


def matrix(layer: Callable[[Tensor], Tensor], shape: Shape) -> Tensor:
    """The matrix of a linear layer, rows = outputs: its images of the unit vectors."""
    units = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return torch.stack([layer(unit[None])[0].flatten() for unit in units], 1)


@dataclass(frozen=True)
class Value:
    """A value inside a network for one sample, and its derivative in the input with patterns for weights.

    value: (*shape).  jacobian: (elements of value, elements of the network's input).
    """

    value: Tensor
    jacobian: Tensor

    def linear(self, layer: Layer, weight: Tensor, backward: Tensor, bias: Tensor | None = None) -> "Value":
        """A linear layer with one weight forward, and another in its Jacobian; the bias is per channel."""
        value = layer(self.value[None], weight)[0]
        if bias is not None:
            value = value + bias.reshape(-1, *[1] * (value.dim() - 1))
        return Value(value, matrix(lambda x: layer(x, backward), tuple(self.value.shape)) @ self.jacobian)

    def rectified(self, low: float = 0.0, high: float = np.inf) -> "Value":
        gates = torch.tensor([float(low < z < high) for z in self.value.flatten()], dtype=torch.float64)
        return Value(self.value.clamp(low, high), torch.diag(gates) @ self.jacobian)

    def max_pooled(self, kernel: int, stride: int) -> "Value":
        """Max pooling of (C, H, W) without padding, its windows searched one by one."""
        index = torch.arange(self.value.numel()).reshape(self.value.shape)
        c, h, w = self.value.shape
        winners = []
        for k, i, j in product(range(c), range(0, h - kernel + 1, stride), range(0, w - kernel + 1, stride)):
            window = (k, slice(i, i + kernel), slice(j, j + kernel))
            winners.append(int(index[window].flatten()[self.value[window].argmax()]))
        selection = torch.zeros(len(winners), self.value.numel(), dtype=torch.float64)
        selection[range(len(winners)), winners] = 1.0
        shape = (c, (h - kernel) // stride + 1, (w - kernel) // stride + 1)
        return Value((selection @ self.value.flatten()).reshape(shape), selection @ self.jacobian)

    def plus(self, other: "Value", backward: Tensor) -> "Value":
        """The sum of two values, with a (channels, 2) weight for the two in its Jacobian."""
        repeats = self.value[0].numel()
        mine, its = (torch.diag(column.repeat_interleave(repeats)) for column in backward.double().unbind(1))
        return Value(self.value + other.value, mine @ self.jacobian + its @ other.jacobian)

    def beside(self, other: "Value") -> "Value":
        """Channels of one value, then of the other."""
        return Value(torch.cat([self.value, other.value]), torch.cat([self.jacobian, other.jacobian]))

    def flattened(self) -> "Value":
        return Value(self.value.flatten(), self.jacobian)


def explanation(
    network: Callable[[Value, Mapping[str, Tensor]], Value],
    backward: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    start: float | None = None,
) -> Tensor:
    """The maps (N, *shape) of a network written as operations on values; `start` None: the target's value."""

    def maps() -> Iterator[Tensor]:
        for x, target in zip(inputs, targets):
            scores = network(Value(x, torch.eye(x.numel(), dtype=torch.float64)), backward)
            first = torch.zeros_like(scores.value)
            first[target] = scores.value[target] if start is None else start
            yield (scores.jacobian.T @ first).reshape(x.shape)

    return torch.stack(list(maps()))
