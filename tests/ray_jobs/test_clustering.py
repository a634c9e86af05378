"""Clusters of the samples of a class: planted groups are found, and one group stays whole."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from ray_jobs.jobs.atlas.clustering import cluster_class, single_thread


def draw_groups(sizes: list[int], distance: float, features: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of normal distributions with this distance between their means, in random order, and groups."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    means = np.linalg.qr(rng.standard_normal((features, len(sizes))))[0].T * distance / 2**0.5
    return means[groups] + rng.standard_normal((len(groups), features)), groups


@pytest.mark.parametrize("sizes", [[200, 100], [150, 150, 60], [400, 25]])
def test_planted_groups_are_the_clusters(sizes: list[int]) -> None:
    samples, groups = draw_groups(sizes, distance=12.0)
    with single_thread():
        found = cluster_class(samples, seed=0, neighbors=10, max_clusters=12)
    assert found.count == len(sizes)
    assert adjusted_rand_score(groups, found.labels) > 0.99
    assert np.bincount(found.labels).tolist() == sorted(np.bincount(groups).tolist(), reverse=True)
    # The distance of the means is 12 standard deviations; a smaller group is compared with all others.
    assert found.separations.min() > 6


@pytest.mark.parametrize("seed", range(3))
def test_one_group_is_one_cluster(seed: int) -> None:
    samples, _ = draw_groups([300], distance=0.0, seed=seed)
    with single_thread():
        found = cluster_class(samples, seed=0, neighbors=10, max_clusters=12)
    assert found.count == 1
    assert found.separations.tolist() == [0.0]


def test_samples_that_were_not_clustered_get_the_cluster_of_their_group() -> None:
    samples, groups = draw_groups([600, 200], distance=12.0)
    with single_thread():
        found = cluster_class(samples[:400], seed=0, neighbors=10, max_clusters=12)
        placed = found.place(samples)
    assert adjusted_rand_score(groups, placed.clusters) > 0.99
    assert (placed.clusters[:400] == found.labels).mean() > 0.99
    assert (placed.distances.argmin(1) == placed.clusters).mean() > 0.99


def test_the_same_seed_gives_the_same_bytes() -> None:
    samples, _ = draw_groups([100, 50], distance=8.0)
    with single_thread():
        one, other = (cluster_class(samples, seed=3, neighbors=10, max_clusters=12) for _ in range(2))
    assert one.labels.tobytes() == other.labels.tobytes()
    assert one.weights.tobytes() == other.weights.tobytes()
