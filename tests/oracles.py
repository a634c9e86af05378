"""Oracles: slow, plain float64 computations that share no code with the package."""

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

# --- explicit patches ------------------------------------------------------------------------------


def window_patches(
    x: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int = 1
) -> list[Tensor]:
    """Return the patches of each group, (images × positions, D), for x of shape (N, C, *sizes)."""
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
    """Return one group with every vector along the last dimension."""
    return [torch.stack([x.double()[index] for index in np.ndindex(*x.shape[:-1])])]


def channel_patches(*inputs: Tensor, axis: int = 1) -> list[Tensor]:
    """Return the values of each channel, one column per input."""
    channels = range(inputs[0].shape[axis])
    return [torch.stack([x.double().select(axis, k).flatten() for x in inputs], 1) for k in channels]


def transposed_patches(
    x: Tensor, kernel: Shape, stride: Shape, padding: Shape, output_padding: Shape, dilation: Shape, groups: int = 1
) -> list[Tensor]:
    """Return the patches of a transposed convolution: a plain convolution of x with zeros between its positions."""
    dims = range(2, x.dim())
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)]
    spread = torch.zeros(*x.shape[:2], *sizes, dtype=torch.float64)
    spread[(..., *(slice(None, None, s) for s in stride))] = x.double()
    borders = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
    around = [n for b, extra in reversed(list(zip(borders, output_padding))) for n in (b, b + extra)]
    ones, nothing = (1,) * len(dims), (0,) * len(dims)
    patches = window_patches(F.pad(spread, around), kernel, ones, nothing, dilation, groups)
    # A transposed convolution applies its kernel flipped.
    return [p.unflatten(1, (-1, *kernel)).flip(list(dims)).flatten(1) for p in patches]


def positions_seeing(unfold: Callable[..., list[Tensor]], shapes: Sequence[Shape]) -> list[Tensor]:
    """Return the mean number of an image's samples that contain an input of each weight, (D,) per group.

    The inputs are numbered, and each number is counted in all patches. A weight that only multiplies padding gets 1.
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
    """The samples of a neuron: patches x (S, D), outputs without bias y (S,), and whether its gate is open (S,)."""

    x: Tensor
    y: Tensor
    open: Tensor

    def sums(self, which: str) -> dict[str, Tensor]:
        """Return n, Σy, Σy², Σx and Σx·y over the `total`, `open` or `closed` samples."""
        chosen = {"total": torch.ones_like(self.open), "open": self.open, "closed": ~self.open}[which]
        x, y = self.x[chosen], self.y[chosen]
        xy = (x * y[:, None]).sum(0)
        return {"n": torch.tensor(len(y)), "y": y.sum(), "yy": (y * y).sum(), "x": x.sum(0), "xy": xy}


def neurons(
    patches: Sequence[Tensor], weight: Tensor, bias: Tensor | None, limits: tuple[float, float] | None
) -> list[Neuron]:
    """Return the neurons of an operator with these patches per group; `limits` are those of its gate, if any."""
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
    """Return x and y of the open or closed samples."""
    chosen = (neuron.open if which == "open" else ~neuron.open).numpy()
    return neuron.x.numpy()[chosen], neuron.y.numpy()[chosen]


def two_component(neuron: Neuron, weight: Tensor, which: str) -> np.ndarray:
    """Return (E₊[xy] - E₊[x]E[y]) / wᵀ(…) over the open or closed samples of a neuron, sample by sample."""
    x, y = side(neuron, which)
    direction = np.mean([xi * yi for xi, yi in zip(x, y)], 0) - x.mean(0) * neuron.y.numpy().mean()
    return direction / (weight.double().flatten().numpy() @ direction)


def regressed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return cov[x, y] / var[y] over some samples, shape (D,)."""
    return np.cov(x.T, y, bias=True)[-1, :-1] / np.var(y)


def covariance(neuron: Neuron) -> np.ndarray:
    """Return cov[x, y] of a neuron, shape (D,)."""
    return np.cov(neuron.x.numpy().T, neuron.y.numpy(), bias=True)[-1, :-1]


def multivariate(group: Sequence[Neuron], ridge: float) -> np.ndarray:
    """Return least squares of x on the outputs of all neurons of a group, (K/G, D); the ridge is extra samples."""
    x, y = group[0].x.numpy(), np.stack([neuron.y.numpy() for neuron in group], 1)
    x, y = x - x.mean(0), y - y.mean(0)
    more = np.diag(np.sqrt(ridge * len(y)) * y.std(0))
    return np.linalg.lstsq(np.vstack([y, more]), np.vstack([x, np.zeros((len(group), x.shape[1]))]), rcond=None)[0]


# --- explanations as products of explicit matrices ------------------------------------------------

Layer = Callable[[Tensor, Tensor], Tensor]  # of inputs (N, *shape) and a weight, without bias


def matrix(layer: Callable[[Tensor], Tensor], shape: Shape) -> Tensor:
    """Return the matrix of a linear layer, whose columns are the layer's outputs for the unit vectors."""
    units = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return torch.stack([layer(unit[None])[0].flatten() for unit in units], 1)


@dataclass(frozen=True)
class Value:
    """A value inside a network for one sample, and its Jacobian with backward weights instead of the weights.

    Attributes:
        value: Shape (*shape).
        jacobian: Shape (elements of value, elements of the network's input).
    """

    value: Tensor
    jacobian: Tensor

    def linear(self, layer: Layer, weight: Tensor, backward: Tensor, bias: Tensor | None = None) -> "Value":
        """Apply a linear layer with one weight forward and another in the Jacobian; the bias is per channel."""
        value = layer(self.value[None], weight)[0]
        if bias is not None:
            value = value + bias.reshape(-1, *[1] * (value.dim() - 1))
        return Value(value, matrix(lambda x: layer(x, backward), tuple(self.value.shape)) @ self.jacobian)

    def rectified(self, low: float = 0.0, high: float = np.inf) -> "Value":
        gates = torch.tensor([float(low < z < high) for z in self.value.flatten()], dtype=torch.float64)
        return Value(self.value.clamp(low, high), torch.diag(gates) @ self.jacobian)

    def max_pooled(self, kernel: int, stride: int) -> "Value":
        """Apply max pooling to (C, H, W) without padding, window by window."""
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
        """Return the sum of two values, with a weight of shape (channels, 2) in the Jacobian."""
        repeats = self.value[0].numel()
        mine, its = (torch.diag(column.repeat_interleave(repeats)) for column in backward.double().unbind(1))
        return Value(self.value + other.value, mine @ self.jacobian + its @ other.jacobian)

    def concatenate(self, other: "Value") -> "Value":
        """Return the channels of both values."""
        return Value(torch.cat([self.value, other.value]), torch.cat([self.jacobian, other.jacobian]))

    def flattened(self) -> "Value":
        return Value(self.value.flatten(), self.jacobian)


def explanation(
    network: Callable[[Value, Mapping[str, Tensor]], Value],
    backward: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    output_gradient: float | None = None,
) -> Tensor:
    """Return the maps (N, *shape) of a network of operations on values.

    The output gradient is by default the target's value.
    """

    def maps() -> Iterator[Tensor]:
        for x, target in zip(inputs, targets):
            scores = network(Value(x, torch.eye(x.numel(), dtype=torch.float64)), backward)
            first = torch.zeros_like(scores.value)
            first[target] = scores.value[target] if output_gradient is None else output_gradient
            yield (scores.jacobian.T @ first).reshape(x.shape)

    return torch.stack(list(maps()))
