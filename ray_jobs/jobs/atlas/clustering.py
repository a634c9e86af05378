"""Clusters of the samples of a class.

1. The samples are divided into pieces by spectral clustering of the graph of nearest neighbors.
2. Linear discriminants between the pieces move samples to the piece that they belong to.
3. The two pieces that are least separated become one, until any two are separated by `SEPARATED` standard deviations.
   A class that varies without a gap has one cluster.
4. Again, every sample is assigned by discriminants that were fitted without it.

A separation is measured on samples that did not choose the direction, because any two pieces are separated on the
samples that they were made of. The eigengap is not used for the number of clusters: the eigenvalue of a group of 3 %
lies among those of the directions in which every class varies (docs/atlas.md has measured values).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_jobs.io.extras import import_extra

COMPONENTS = 64  # principal components in which clusters are found
SHRINKAGE = 0.1  # of the covariance within clusters toward a multiple of the identity
SMALLEST = 8  # samples of a cluster
FOLDS = 5
REFINEMENTS = 1
# Two halves of a uniform distribution are separated by 3.5 standard deviations, those of a normal one by 2.7.
SEPARATED = 4.0


def import_clustering() -> Any:
    """Return the package sklearn. UserError if it is not installed."""
    return import_extra("atlas", "sklearn.cluster", "sklearn.neighbors", where="atlas")


@contextmanager
def single_thread() -> Iterator[None]:
    """Use one thread for linear algebra: sums in another order would differ in their last bits."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@dataclass(frozen=True)
class Placed:
    """Position of samples relative to the clusters of their class.

    Attributes:
        clusters: The cluster of each sample, int64 (N,).
        distances: The distance to the center of each cluster (N, clusters).
        plane: The first two principal components (N, 2).
    """

    clusters: np.ndarray
    distances: np.ndarray
    plane: np.ndarray


@dataclass(frozen=True)
class Clustering:
    """The clusters of a class, in descending order of size.

    Attributes:
        labels: The cluster of each sample that was clustered, int64 (N,).
        separations: How far each cluster is from the rest of the class: the difference of the means along a
            discriminant in units of the standard deviation, on samples that did not choose it; 0 for a single cluster.
        mean: The mean of the features.
        basis: The principal components as columns (D, r).
        centers: The center of each cluster (clusters, r).
        weights: The linear discriminants (r, clusters).
        offsets: Their constants (clusters,).
    """

    labels: np.ndarray
    separations: np.ndarray
    mean: np.ndarray
    basis: np.ndarray
    centers: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray

    @property
    def count(self) -> int:
        """The number of clusters."""
        return len(self.centers)

    def place(self, features: np.ndarray) -> Placed:
        """Return where samples lie, given their features (N, D)."""
        x = (features.astype(np.float64) - self.mean) @ self.basis
        distances = np.linalg.norm(x[:, None] - self.centers, axis=2)
        plane = np.zeros((len(x), 2))
        plane[:, : min(2, x.shape[1])] = x[:, :2]
        return Placed((x @ self.weights + self.offsets).argmax(1), distances, plane)


def cluster_class(features: np.ndarray, seed: int, neighbors: int, max_clusters: int) -> Clustering:
    """Cluster the samples of a class. Call it within `single_thread`, so that the result has the same bits anywhere.

    Args:
        features: The features (N, D).
        seed: The seed of k-means and of the halves of the tests.
        neighbors: Nearest neighbors of each sample in the graph.
        max_clusters: The number of pieces, which is the largest possible number of clusters.
    """
    x, mean, basis = project(features.astype(np.float64))
    labels = np.zeros(len(x), np.int64)
    pieces = min(max_clusters, len(x) // (2 * SMALLEST))
    if pieces > 1 and x.shape[1]:
        labels = refine(x, divide(x, seed, neighbors, pieces), seed)
        labels = merge_pieces(x, labels, seed)
        if labels.any():
            labels = drop_small(refine(x, labels, seed))
    labels = order_by_size(labels)
    centers = np.stack([x[labels == k].mean(0) for k in range(labels.max() + 1)])
    weights, offsets = fit_discriminants(x, labels)
    separations = [separate(x, labels == k, seed) if labels.any() else 0.0 for k in range(len(centers))]
    return Clustering(labels, np.array(separations), mean, basis, centers, weights, offsets)


def project(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the principal components of features, their mean, and the basis; the sign of a component is fixed."""
    mean = features.mean(0)
    centered = features - mean
    if len(features) < features.shape[1]:
        vectors = np.linalg.svd(centered, full_matrices=False)[2].T
    else:
        vectors = np.linalg.eigh(centered.T @ centered)[1][:, ::-1]
    basis = vectors[:, : min(COMPONENTS, len(features) - 1)]
    largest = np.abs(basis).argmax(0)
    basis = basis * np.sign(basis[largest, np.arange(basis.shape[1])])
    return centered @ basis, mean, basis


def divide(x: np.ndarray, seed: int, neighbors: int, pieces: int) -> np.ndarray:
    """Divide samples into pieces by normalized spectral clustering (Ng, Jordan & Weiss 2001)."""
    from scipy.sparse import diags
    from scipy.sparse.linalg import eigsh

    sklearn = import_clustering()
    graph = sklearn.neighbors.kneighbors_graph(x, min(neighbors, len(x) - 1))
    graph = (graph + graph.T) / 2
    scale = diags(1 / np.sqrt(np.asarray(graph.sum(1)).ravel()))
    _, vectors = eigsh(scale @ graph @ scale, k=pieces, which="LA", v0=np.ones(len(x)))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return sklearn.cluster.KMeans(pieces, n_init=10, random_state=seed).fit_predict(vectors).astype(np.int64)


def merge_pieces(x: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Merge the two pieces that are least separated, until any two are separated by `SEPARATED`."""
    labels, known = labels.copy(), dict[tuple[int, int], float]()
    while True:
        pieces = np.unique(labels).tolist()
        pairs = [(i, j) for n, i in enumerate(pieces) for j in pieces[n + 1 :]]
        for i, j in pairs:
            if (i, j) not in known:
                both = (labels == i) | (labels == j)
                known[i, j] = separate(x[both], labels[both] == j, seed)
        if not pairs:
            return labels
        i, j = min(pairs, key=lambda pair: known[pair])
        if known[i, j] >= SEPARATED:
            return labels
        labels[labels == j] = i
        known = {pair: distance for pair, distance in known.items() if not {i, j} & set(pair)}


def separate(x: np.ndarray, inside: np.ndarray, seed: int) -> float:
    """Return how far a part of some samples is from the rest.

    One half of the samples chooses a linear discriminant. The difference of the means along it is measured on the other
    half, in units of the standard deviation within the two. The smaller of the two ways around is returned.

    Args:
        x: The samples (N, r).
        inside: Which of them belong to the part, bool (N,).
        seed: The seed of the halves.
    """
    order = np.random.default_rng(seed).permutation(len(x))
    halves = order[: len(x) // 2], order[len(x) // 2 :]
    if min(min(inside[half].sum(), (~inside[half]).sum()) for half in halves) < 2:
        return 0.0
    distances = []
    for one, other in (halves, halves[::-1]):
        values = x[other] @ discriminant(x[one], inside[one])
        a, b = values[inside[other]], values[~inside[other]]
        spread = np.sqrt((a.var() * len(a) + b.var() * len(b)) / len(values))
        distances.append(float((a.mean() - b.mean()) / max(spread, 1e-12)))
    return max(min(distances), 0.0)


def within_covariance(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the covariance within clusters, shrunk."""
    residuals = np.concatenate([x[labels == k] - x[labels == k].mean(0) for k in np.unique(labels)])
    covariance = residuals.T @ residuals / len(x)
    return covariance + np.eye(len(covariance)) * max(SHRINKAGE * np.trace(covariance) / len(covariance), 1e-30)


def discriminant(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the direction of the linear discriminant between some samples and the rest."""
    difference = x[inside].mean(0) - x[~inside].mean(0)
    found: np.ndarray = np.linalg.solve(within_covariance(x, inside), difference)
    return found


def fit_discriminants(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (r, clusters) and constants of linear discriminants with equal priors."""
    centers = np.stack([x[labels == k].mean(0) for k in range(labels.max() + 1)])
    if len(centers) == 1 or not x.shape[1]:
        return np.zeros((x.shape[1], len(centers))), np.zeros(len(centers))
    weights = np.linalg.solve(within_covariance(x, labels), centers.T)
    return weights, -0.5 * (centers * weights.T).sum(1)


def refine(x: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return labels after some rounds in which each sample is assigned without itself.

    The graph weighs all components alike, so that a piece of it holds samples that a discriminant tells apart.
    """
    for number in range(REFINEMENTS):
        labels = assign_without_itself(x, labels, seed + number)
    return labels


def assign_without_itself(x: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the cluster of each sample by discriminants that were fitted to the other folds."""
    labels = np.unique(labels, return_inverse=True)[1]
    fold = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    assigned = labels.copy()
    for number in range(FOLDS):
        train = fold != number
        if len(np.unique(labels[train])) == labels.max() + 1:
            weights, offsets = fit_discriminants(x[train], labels[train])
            assigned[~train] = (x[~train] @ weights + offsets).argmax(1)
    return assigned


def drop_small(labels: np.ndarray) -> np.ndarray:
    """Return labels in which clusters of too few samples are part of the largest one."""
    values, counts = np.unique(labels, return_counts=True)
    small = np.isin(labels, values[counts < SMALLEST])
    return np.where(small, values[counts.argmax()], labels)


def order_by_size(labels: np.ndarray) -> np.ndarray:
    """Return labels 0, 1, … in descending order of size; of equal sizes, the cluster of the earlier sample first."""
    values, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values))
    return ranks[inverse]
