"""Similarity of maps against scipy and scikit-image."""

import numpy as np
import pytest
import scipy.stats
import skimage.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patterns import UserError
from patterns.evaluation import cosine, heat, ranks, spearman, ssim
from tests.patterns.chains import normal, uniform


@pytest.mark.parametrize("shape", [(11, 11), (16, 24), (40, 40)])
def test_ssim_equals_scikit_images(shape: tuple[int, int]) -> None:
    a = uniform(3, *shape)
    b = (a + 0.3 * normal(3, *shape, seed=1)).clamp(0, 1)
    truth = [
        skimage.metrics.structural_similarity(
            x.numpy(), y.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        for x, y in zip(a, b)
    ]
    assert max(truth) < 0.95
    np.testing.assert_allclose(ssim(a, b), truth, rtol=1e-9)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_ssim_of_one_window_equals_the_formula() -> None:
    a, b = uniform(1, 11, 11), uniform(1, 11, 11, seed=1)
    weights = np.array([[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    x, y = a[0].numpy(), b[0].numpy()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    cov = (weights * (x - mean_x) * (y - mean_y)).sum()
    truth = (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
    truth /= (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    assert float(ssim(a, b)) == pytest.approx(truth, rel=1e-10)


def test_map_smaller_than_the_window_is_rejected() -> None:
    with pytest.raises(UserError, match="a map of 8×16 pixels is smaller"):
        ssim(uniform(1, 8, 16), uniform(1, 8, 16))


@pytest.mark.full
@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10**6))
def test_spearman_equals_scipys_with_and_without_ties(size: int, levels: int, seed: int) -> None:
    a, b = normal(2, size, seed=seed), normal(2, size, seed=seed + 1)
    tied = (a * levels).round(), (b * levels).round()
    for one, other in ((a, b), tied):
        for found, rank, x, y in zip(spearman(one, other), ranks(one), one, other):
            np.testing.assert_array_equal(rank, scipy.stats.rankdata(x))
            if x.unique().numel() > 1 and y.unique().numel() > 1:
                assert float(found) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_cosine_does_not_depend_on_the_size_of_a_map() -> None:
    a, b = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    truth = torch.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close(cosine(a, b), truth)
    torch.testing.assert_close(cosine(a * 1e-200, b * 1e200), truth)
    torch.testing.assert_close(cosine(a, -3 * a), -torch.ones(3, dtype=torch.float64))


def test_heat_is_the_mass_of_the_channels_scaled_to_a_maximum_of_1() -> None:
    maps = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert heat(maps).tolist() == [[[1.0, 0.5]], [[0.0, 0.0]]]
