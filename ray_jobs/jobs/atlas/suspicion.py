"""How unusual a cluster is among the clusters of all classes.

Classes have kinds: shirts with long and with short sleeves are clusters as real as those of a watermark, and a test
against the hypothesis of one kind rejects both. An artifact differs in degree. It is farther from the rest of its class
in units of the variation within (`separation`), and it has relevance where the rest has almost none (`surprise`). The
*suspicion* is the product of the two. A cluster is suspicious if its suspicion stands out among those of all clusters,
which serve as the null distribution (an empirical null, Efron 2004). All of them were found in the same way, so the
choice of clusters does not bias the comparison.
"""

import numpy as np

CELLS = 0.03  # fraction of the cells of a map that a small object covers
FLOOR = 0.25  # relevance of the rest that counts as none, in units of a uniform map's
MAD = 1.4826  # a normal distribution's standard deviation in units of its median absolute deviation
FEWEST = 5  # clusters without which there is no null distribution
LEAST_SPREAD = 0.1  # of the logarithm of the suspicion


def measure_surprise(cluster: np.ndarray, rest: np.ndarray) -> float:
    """Return the surprise of a cluster: the mean of (cluster - rest) / |rest| over the cells where it is largest.

    Args:
        cluster: The mean map of the cluster, as shares (cells,).
        rest: That of the rest of its class.

    Example:
        >>> rest = np.full(100, 0.01)
        >>> cluster = rest.copy()
        >>> cluster[:3] = 0.06
        >>> round(measure_surprise(cluster, rest), 6)
        4.0
    """
    gain = np.maximum(cluster - rest, 0.0) / (np.abs(rest) + FLOOR / len(rest))
    count = max(1, round(CELLS * len(gain)))
    return float(np.sort(gain)[-count:].mean())


def compute_p_values(suspicions: np.ndarray) -> np.ndarray:
    """Return the p-value of each cluster for the hypothesis that its suspicion is that of an ordinary cluster.

    The logarithms are standardized by their median and median absolute deviation, of which a few suspicious clusters
    change little, and compared with Student's distribution. The p-values are corrected over all clusters (Holm 1979).

    Args:
        suspicions: The suspicion of each cluster (N,). Fewer than `FEWEST` have the p-value 1.
    """
    from scipy.stats import t

    if len(suspicions) < FEWEST:
        return np.ones(len(suspicions))
    logs = np.log(np.maximum(suspicions, 1e-3))
    median = np.median(logs)
    spread = max(MAD * float(np.median(np.abs(logs - median))), LEAST_SPREAD)
    return correct(t.sf((logs - median) / spread, len(logs) - 1))


def correct(p_values: np.ndarray) -> np.ndarray:
    """Return p-values corrected by Holm's method.

    Example:
        >>> correct(np.array([0.5, 0.01, 0.02])).tolist()
        [0.5, 0.03, 0.04]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    found = np.empty_like(corrected)
    found[order] = corrected
    return found
