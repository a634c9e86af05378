"""Image degradation: patches, their order and their replacement, each against a slow loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from patterns.evaluation.degradation import (
    REPLACEMENTS,
    area_over_curve,
    compute_relevance,
    degrade_stepwise,
    index_patches,
    rank_patches,
    sum_patches,
)

BLACK = torch.tensor([-1.0, -2.0, -3.0]).view(-1, 1, 1)


def images(count: int = 3, height: int = 11, width: int = 14) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def boxes(height: int, width: int, size: int) -> list[tuple[slice, slice]]:
    """Return the patches, row by row."""
    return [
        (slice(y, min(y + size, height)), slice(x, min(x + size, width)))
        for y in range(0, height, size)
        for x in range(0, width, size)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 13))
def test_every_pixel_is_in_one_patch_and_patches_are_summed(height: int, width: int, size: int) -> None:
    values = images(2, height, width)[:, 0]
    sums, patches = sum_patches(values, size), index_patches(height, width, size)
    for number, (rows, columns) in enumerate(boxes(height, width, size)):
        torch.testing.assert_close(sums[:, number], values[:, rows, columns].sum((1, 2)))
        assert (patches[rows, columns] == number).all()
    assert sums.shape[1] == len(boxes(height, width, size)) == int(patches.max()) + 1


@pytest.mark.parametrize("least_first", [False, True])
def test_patches_are_ranked_by_their_sums_and_ties_keep_their_order(least_first: bool) -> None:
    sums = torch.tensor([[3.0, -1.0, 7.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    found = rank_patches(sums, least_first)
    for row, ranks in zip(sums.tolist(), found.tolist()):
        order = sorted(range(4), key=lambda i: (row[i] if least_first else -row[i], i))
        assert [ranks[i] for i in order] == [0, 1, 2, 3]


def test_sign_counts_for_attributions_and_not_for_signals() -> None:
    maps = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    assert compute_relevance("patternattribution", maps).item() == -2
    assert compute_relevance("patternnet", maps).item() == 4


def replacement_of(name: str, x: np.ndarray, size: int) -> np.ndarray:
    """Return the replacement of each pixel of images (N, C, H, W)."""
    if name == "zero":
        return np.broadcast_to(BLACK.numpy(), x.shape)
    if name == "dataset-mean":
        return np.zeros_like(x)
    if name == "blur":
        return gaussian_filter(x, (0, 0, size, size), mode="nearest", radius=(0, 0, 2 * size, 2 * size))
    found = np.empty_like(x)
    for rows, columns in boxes(*x.shape[2:], size):
        found[:, :, rows, columns] = x[:, :, rows, columns].mean((2, 3), keepdims=True)
    return found


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_degraded_images_equal_a_loop_over_patches(name: str) -> None:
    x, size = images(), 4
    values = images(3)[:, 1]
    replacement = REPLACEMENTS[name](x, size, BLACK)
    found = torch.cat([*degrade_stepwise(x, replacement, values, size, steps=12, group=5)], 1).numpy()
    other = replacement_of(name, x.numpy(), size)
    for n in range(len(x)):
        order = sorted(boxes(11, 14, size), key=lambda box: -float(values[n][box].sum()))
        for step in range(1, 13):
            expected = x[n].numpy().copy()
            for rows, columns in order[:step]:
                expected[:, rows, columns] = other[n, :, rows, columns]
            np.testing.assert_allclose(found[n, step - 1], expected, rtol=1e-12, atol=1e-12)


def test_area_over_a_curve_is_the_mean_fall_from_its_start() -> None:
    assert area_over_curve(torch.tensor([[0.8, 0.8, 0.8], [0.9, 0.3, 0.0]])).tolist() == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("pixels", [1, 5])
def test_degradation_of_single_pixels_equals_quantus_pixel_flipping(pixels: int) -> None:
    """Patches of one pixel in images of one channel, which are replaced by the mean that images are normalized by."""
    import quantus

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x, values, targets = images(4, 5, 6)[:, :1].float(), images(4, 5, 6)[:, 1].float(), torch.tensor([0, 1, 2, 0])
    metric = quantus.PixelFlipping(
        features_in_step=pixels, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True
    )
    arrays = {"x_batch": x.numpy(), "y_batch": targets.numpy(), "a_batch": values[:, None].numpy()}
    truth = metric(model=model, **arrays, channel_first=True, softmax=True, device="cpu")

    replacement = REPLACEMENTS["dataset-mean"](x, 1, BLACK)
    degraded = torch.cat([*degrade_stepwise(x, replacement, values, size=1, steps=30)], 1)[:, pixels - 1 :: pixels]
    probabilities = model(degraded.flatten(0, 1)).softmax(1).unflatten(0, (4, -1))
    found = probabilities.gather(2, targets.view(-1, 1, 1).expand(-1, degraded.shape[1], 1))[..., 0]
    np.testing.assert_allclose(found.detach(), truth, rtol=1e-5, atol=1e-6)
