"""Statistics that merge: means, variances, and the samples with the largest values."""

from dataclasses import dataclass

import numpy as np

NONE = np.iinfo(np.int64).min  # filler of a list that has fewer samples than entries
LOW = np.int64(0xFFFFFFFF)


@dataclass
class RunningMoments:
    """Number, mean and sum of squared deviations of vectors, float64, merged by the formula of Chan et al. (1979).

    Attributes:
        n: Number of vectors.
        mean: Their mean (D,).
        squares: Σ (x - mean)², (D,).

    Example:
        >>> one, other = RunningMoments.zero(1), RunningMoments.zero(1)
        >>> one.update(np.array([[1.0], [3.0]]))
        >>> other.update(np.array([[5.0]]))
        >>> one.merge(other)
        >>> one.n, one.mean, one.variance
        (3, array([3.]), array([2.66666667]))
    """

    n: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def zero(cls, size: int) -> "RunningMoments":
        """Return the moments of no vectors of a length."""
        return cls(0, np.zeros(size), np.zeros(size))

    @property
    def variance(self) -> np.ndarray:
        """The mean squared deviation (D,); 0 for no vectors."""
        return self.squares / max(self.n, 1)

    def update(self, values: np.ndarray) -> None:
        """Add vectors (N, D)."""
        if len(values):
            values = values.astype(np.float64)
            mean = values.mean(0)
            self.merge(RunningMoments(len(values), mean, np.square(values - mean).sum(0)))

    def merge(self, other: "RunningMoments") -> None:
        """Add the vectors of other moments."""
        n = self.n + other.n
        if other.n == 0:
            return
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.n / n)
        self.squares = self.squares + other.squares + np.square(difference) * (self.n * other.n / n)
        self.n = n


def encode_ranks(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return one int64 for each value that orders by value, and for equal values by the sample, the first one highest.

    Lists of the largest values can then be merged in any order with the same result.

    Args:
        values: Finite values, converted to float32 (N, …).
        numbers: The number of each sample in the dataset (N,), below 2^32.

    Returns:
        int64, the shape of the values.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = (LOW - numbers.astype(np.int64)).reshape(-1, *[1] * (values.ndim - 1))
    return (ordered << 32) | last


def decode_values(ranks: np.ndarray) -> np.ndarray:
    """Return the values of ranks, float32; NaN for `NONE`."""
    ordered = ranks >> 32
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return np.where(ranks == NONE, np.float32("nan"), bits.view(np.float32)).astype(np.float32)


def decode_numbers(ranks: np.ndarray) -> np.ndarray:
    """Return the numbers of the samples of ranks, int64; -1 for `NONE`."""
    return np.where(ranks == NONE, -1, LOW - (ranks & LOW))


def merge_top(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    """Return the largest ranks of two lists, in descending order.

    Args:
        one: (N, …).
        other: (M, …).
        count: The number of ranks to keep.

    Returns:
        (count, …), filled up with `NONE`.
    """
    both = np.concatenate([one, other])
    if len(both) < count:
        missing = np.full((count - len(both), *both.shape[1:]), NONE)
        both = np.concatenate([both, missing])
    if len(both) > count:
        both = np.partition(both, len(both) - count, axis=0)[len(both) - count :]
    return np.sort(both, axis=0)[::-1]
