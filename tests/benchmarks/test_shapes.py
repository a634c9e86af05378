"""The generated images of the study of suppressors."""

import pytest
import torch

from benchmarks.critics import shapes


def test_pixels_outside_the_shapes_are_suppressors() -> None:
    count = 20_000
    x, labels = shapes.draw_images("linear", count, torch.Generator().manual_seed(0))
    difference = (x[labels == 1].mean(0) - x[labels == 0].mean(0))[0]
    standard_error = 2 * x.std() / count**0.5
    torch.testing.assert_close(difference, 0.35 * (shapes.L - shapes.T), rtol=0, atol=5 * float(standard_error))
    centered = x.flatten(1) - x.flatten(1).mean(0)
    weight = torch.linalg.lstsq(centered, labels.double() - 0.5).solution.view(shapes.SIDE, shapes.SIDE).abs()
    assert float(weight[~shapes.MASK].sum()) > float(weight[shapes.MASK].sum())


@pytest.mark.parametrize("scenario", ["multiplicative", "XOR"])
def test_classes_with_equal_means_differ_in_products_of_pixels(scenario: str) -> None:
    count = 20_000
    x, labels = shapes.draw_images(scenario, count, torch.Generator().manual_seed(0))
    one, other = (x[labels == k].flatten(1) for k in (1, 0))
    assert float((one.mean(0) - other.mean(0)).abs().max()) < 5 * 2 * float(x.std()) / count**0.5
    # Products of pixels differ, but only inside the shapes.
    between = (one.T @ one / len(one) - other.T @ other / len(other)).abs()
    if scenario == "XOR":
        inside = shapes.MASK.flatten()
        assert float(between[inside][:, inside].max()) > 0.5
        assert float(between[~inside].max()) < 0.1
    else:
        assert float(between.diagonal()[shapes.MASK.flatten()].min()) > 0.5
        assert float(between.diagonal()[~shapes.MASK.flatten()].max()) < 0.1
