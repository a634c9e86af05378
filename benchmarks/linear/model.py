"""The linear model of the paper's §2, in which weight and pattern are known in closed form.

The data are x = A_s y + A_d ε: a signal that depends on y, and a distractor that does not. A weight that recovers y
from x must cancel A_d, so it turns with the distractor. The pattern is A_s for every distractor.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patterns import solve
from patterns.estimation.observer import accumulate
from patterns.tracing.network import Network, trace


@dataclass(frozen=True)
class LinearModel:
    """The data x = A_s y + A_d ε with independent y ~ U(-1, 1) and ε ~ N(mean, deviation²).

    Attributes:
        signal: A_s, float64, shape (D, K).
        distractor: A_d, float64, shape (D, M).
        mean: The mean of ε.
        deviation: The standard deviation of ε.
    """

    signal: Tensor
    distractor: Tensor
    mean: float = 0.0
    deviation: float = 1.0

    def observe(self, y: Tensor, noise: Tensor) -> Tensor:
        """Return x = A_s y + A_d ε, shape (n, D), for given y, shape (n, K), and ε, shape (n, M)."""
        return y @ self.signal.T + noise @ self.distractor.T

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n samples x, shape (n, D), and y, shape (n, K)."""
        y = 2 * torch.rand(n, self.signal.shape[1], generator=generator, dtype=torch.float64) - 1
        noise = torch.randn(n, self.distractor.shape[1], generator=generator, dtype=torch.float64)
        return self.observe(y, self.mean + self.deviation * noise), y

    def weight(self) -> Tensor:
        """Return the least-squares weight that recovers y, shape (K, D); of several, the shortest.

        If the K + M directions are independent it is exact: wᵀA_s = 1 and wᵀA_d = 0.
        """
        spread = math.sqrt(1 / 3)  # of y
        white = torch.cat([self.signal * spread, self.distractor * self.deviation], 1)
        return spread * torch.linalg.pinv(white)[: self.signal.shape[1]]

    def rotated(self, degrees: float) -> "LinearModel":
        """Return the model with its distractor rotated counterclockwise; D must be 2."""
        if len(self.distractor) != 2:
            raise ValueError(f"only data with 2 inputs can be rotated, and these have {len(self.distractor)}")
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return replace(self, distractor=torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ self.distractor)


# The model of the paper: a_s = (1, 0) and a_d = (1, 1), so w = (1, -1).
PAPER = LinearModel(torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))


def train_layer(x: Tensor, y: Tensor) -> nn.Linear:
    """Return the linear layer with the least squared error on x, shape (n, D), and y, shape (n, K)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    weight = torch.linalg.lstsq(x - mean_x, y - mean_y, driver="gelsd").solution.T
    return make_layer(weight, mean_y - weight @ mean_x)


def make_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer with this weight, shape (K, D), and bias."""
    linear_layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear_layer.weight = nn.Parameter(weight)
    if bias is not None:
        linear_layer.bias = nn.Parameter(bias)
    return linear_layer


def make_network(linear: nn.Linear, *following: nn.Module) -> Network:
    """Trace the layer and the modules after it, such as a ReLU; the only operator of the network is `"0"`."""
    return trace(nn.Sequential(linear, *following), torch.zeros(2, linear.in_features, dtype=linear.weight.dtype))


def fit_patterns(traced: Network, x: Tensor, choices: Collection[str]) -> dict[str, Tensor]:
    """Return the patterns of a network from `make_network` on samples x, shape (K, D), by estimator."""
    return solve(traced.operators["0"], accumulate(traced, [x])["0"], choices).patterns


def angle_between(a: Tensor, b: Tensor) -> float:
    """Return the angle between the lines along two vectors in degrees, from 0 to 90; their signs do not matter."""
    a, b = a.flatten() / a.norm(), b.flatten() / b.norm()
    return math.degrees(2 * math.asin(min(1.0, float(torch.minimum((a - b).norm(), (a + b).norm())) / 2)))
