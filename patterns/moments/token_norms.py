"""Histograms of the squared norms of an addition's tokens.

Some transformers have tokens with values many times as large as those of all others (Sun et al. 2024, arXiv 2402.17762;
Darcet et al. 2024, arXiv 2309.16588). They hold most of Σy² of a residual addition, so that the patterns of the
addition would be those of these tokens. The sums here give the share of Σ‖y‖² that the tokens with the largest norms
hold.
A token is one position of an image; y are the outputs of the addition there.

The sums are a histogram of ‖y‖² with a count and a sum for each bin. They add up over data in any order. A bin holds
the float32 numbers with the same exponent and the same first three binary digits, so it ends at most 1/8 above its
beginning, and every number has a bin.
"""

import math
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from patterns.operators.operator import Addition, Operator

DIGITS = 3  # binary digits that distinguish bins
BINS = 2 ** (8 + DIGITS)  # float32 has 8 bits for the exponent
SHIFT = 23 - DIGITS


@dataclass(frozen=True)
class TokenNorms:
    """A histogram of the squared norms of tokens. Histograms of different data add up with `+`.

    Attributes:
        n: Number of tokens in each bin, int64, shape (BINS,).
        yy: Sum of their squared norms, float64, shape (BINS,).

    Example:
        >>> norms = TokenNorms(torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.float64))
        >>> norms.add(torch.tensor([1.0] * 999 + [1000.0]))
        >>> round(norms.top_share(0.001), 3)
        0.5
    """

    n: Tensor
    yy: Tensor

    def __add__(self, other: "TokenNorms") -> "TokenNorms":
        return TokenNorms(self.n + other.n, self.yy + other.yy)

    def add(self, squares: Tensor) -> None:
        """Add tokens in place.

        Args:
            squares: Their squared norms, float32 or wider, of any shape.
        """
        squares = squares.flatten()
        bins = (squares.float().view(torch.int32) >> SHIFT) & (BINS - 1)  # NaN can have a sign
        self.n.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int64))
        self.yy.index_add_(0, bins, squares.double())

    def top_share(self, top: float) -> float:
        """Return the share of Σ‖y‖² that the tokens with the largest norms hold; 0 without tokens.

        If only some tokens of a bin belong to the largest, each of them counts with the mean of the bin. So the result
        is never too large, and at most 1/8 of its value too small.

        Args:
            top: The number of tokens with the largest norms, as a share of all tokens. It may be less than one token;
                then this fraction of the largest token counts.
        """
        n, yy = self.n.flip(0).double(), self.yy.flip(0)
        before = n.cumsum(0) - n
        taken = ((top * n.sum() - before) / n.clamp(min=1)).clamp(0, 1)
        total = float(yy.sum())
        if not math.isfinite(total):  # a squared norm beyond the range of its dtype
            return 1.0
        return float((taken * yy).sum()) / total if total > 0 else 0.0


def has_tokens(operator: Operator) -> bool:
    """Return whether an operator is an addition with several positions in each image."""
    return isinstance(operator.operator_type, Addition) and prod(operator.output_shape) > operator.neurons


def zero_token_norms(operator: Operator) -> TokenNorms | None:
    """Return the histogram of no tokens, on the operator's device; None for an operator without tokens."""
    if not has_tokens(operator):
        return None
    n = torch.zeros(BINS, dtype=torch.int64, device=operator.weight.device)
    return TokenNorms(n, torch.zeros_like(n, dtype=torch.float64))


def token_norms_bytes(operator: Operator) -> int:
    """Return the bytes of an operator's histogram, before any data is read."""
    return 16 * BINS if has_tokens(operator) else 0
