"""The linear model of the paper's §2, in which what a weight and a pattern say is known beforehand.

Data are x = A_s y + A_d ε: a signal that carries y, and a distractor that does not. A weight that reads y
off x must cancel A_d, so it turns with the distractor; the pattern is A_s, whatever the distractor does.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patterns.estimation.estimators import solve
from patterns.estimation.observer import accumulate
from patterns.tracing.network import Network, trace


@dataclass(frozen=True)
class LinearModel:
    """x = A_s y + A_d ε with y uniform in [-1, 1] and ε ~ N(mean, deviation²), all of them independent.

    signal: A_s, shape (D, K).  distractor: A_d, shape (D, M).  Both float64.
    """

    signal: Tensor
    distractor: Tensor
    mean: float = 0.0
    deviation: float = 1.0

    def observe(self, y: Tensor, noise: Tensor) -> Tensor:
        """x = A_s y + A_d ε for given y, shape (n, K), and ε, shape (n, M): shape (n, D)."""
        return y @ self.signal.T + noise @ self.distractor.T

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x, shape (n, D), and y, shape (n, K)."""
        y = 2 * torch.rand(n, self.signal.shape[1], generator=generator, dtype=torch.float64) - 1
        noise = torch.randn(n, self.distractor.shape[1], generator=generator, dtype=torch.float64)
        return self.observe(y, self.mean + self.deviation * noise), y

    def weight(self) -> Tensor:
        """The weight that recovers y, shape (K, D): that of least squares, the shortest where there are several.

        With K + M independent directions it is exact: wᵀA_s = 1 and wᵀA_d = 0, whatever the variances.
        """
        spread = math.sqrt(1 / 3)  # of y
        white = torch.cat([self.signal * spread, self.distractor * self.deviation], 1)
        return spread * torch.linalg.pinv(white)[: self.signal.shape[1]]

    def rotated(self, degrees: float) -> "LinearModel":
        """The same signal with the distractor turned counter-clockwise; for two inputs only."""
        if len(self.distractor) != 2:
            raise ValueError(f"only a plane has an angle to turn by, and these data have {len(self.distractor)} inputs")
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return replace(self, distractor=torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ self.distractor)


# The paper's own: a_s = (1, 0), a_d = (1, 1), which w = (1, -1) reads.
PAPER = LinearModel(torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))


def trained(x: Tensor, y: Tensor) -> nn.Linear:
    """The linear layer that training by squares on x, shape (n, D), and y, shape (n, K), ends in."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    weight = torch.linalg.lstsq(x - mean_x, y - mean_y, driver="gelsd").solution.T
    return layer(weight, mean_y - weight @ mean_x)


def layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """The linear layer with this weight, shape (K, D), and bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def network(linear: nn.Linear, *behind: nn.Module) -> Network:
    """The layer and what stands behind it, such as a ReLU, as a network whose one operator is `"0"`."""
    return trace(nn.Sequential(linear, *behind), torch.zeros(2, linear.in_features, dtype=linear.weight.dtype))


def fitted(traced: Network, x: Tensor, choices: Collection[str]) -> dict[str, Tensor]:
    """The patterns of such a network on samples x, each (K, D), by estimator."""
    return solve(traced.operators["0"], accumulate(traced, [x])["0"], choices).patterns


def degrees(a: Tensor, b: Tensor) -> float:
    """The angle between the lines of two vectors, from 0 to 90: a direction and its opposite are one line."""
    a, b = a.flatten() / a.norm(), b.flatten() / b.norm()
    return math.degrees(2 * math.asin(min(1.0, float(torch.minimum((a - b).norm(), (a + b).norm())) / 2)))
