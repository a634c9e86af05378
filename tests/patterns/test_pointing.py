"""The grid pointing game: planted cases, Quantus' grids and localisation, and the draw of the grids."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patterns import Explainer, UserError, trace
from patterns.evaluation import compute_relevance, draw_quadruples, make_grids, pointing_shares
from tests.patterns.chains import normal, uniform

SIDE = 6  # pixels of an image in a grid


def planted_images(count: int) -> tuple[Tensor, Tensor]:
    """Draw images of faint noise, (count, 4, SIDE, SIDE), each with a bright square in the channel of its class."""
    classes = torch.arange(count) % 4
    images = 0.1 * uniform(count, 4, SIDE, SIDE)
    for n, k in enumerate(classes.tolist()):
        top, left = (3 * n) % 4, (5 * n) % 4
        images[n, k, top : top + 3, left : left + 3] += 1
    return images, classes


@pytest.mark.full
@pytest.mark.parametrize("method", ["gradient-x-input", "patternattribution", "patternnet", "gradient"])
def test_map_of_a_detector_of_bright_squares_points_to_the_quarter_of_its_class(method: str) -> None:
    images, classes = planted_images(24)
    quadruples = draw_quadruples(classes, 6)
    grids, targets = make_grids(images[quadruples]), classes[quadruples]
    detect, head = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
    with torch.no_grad():
        detect.weight.copy_(torch.eye(4)[:, :, None, None])
        detect.bias.fill_(-0.5)  # type: ignore[union-attr]
        head.weight.copy_(torch.eye(4))
        head.bias.fill_(0)
    model = nn.Sequential(detect, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    network = trace(model, grids)
    patterns = {name: op.weight for name, op in network.operators.items()}  # the channels are independent
    maps = Explainer(network, patterns, [method])(grids, targets).maps[method].flatten(0, 1)
    shares = pointing_shares(compute_relevance(method, maps), torch.arange(4).repeat(len(grids)))
    np.testing.assert_allclose(shares, 1, atol=1e-6)


@pytest.mark.full
def test_linear_model_points_to_its_class_only_if_the_map_depends_on_the_input() -> None:
    images, classes = planted_images(24)
    images = images.where(images > 0.5, 0)  # no noise: the score of a class is its bright square
    quadruples = draw_quadruples(classes, 6)
    grids, targets = make_grids(images[quadruples]), classes[quadruples]
    head = nn.Linear(4, 4, bias=False)
    nn.init.eye_(head.weight)
    network = trace(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double(), grids)
    maps = Explainer(network, None, ["gradient", "gradient-x-input"])(grids, targets).maps
    quarters = torch.arange(4).repeat(len(grids))
    for method, share in (("gradient", 0.25), ("gradient-x-input", 1.0)):
        found = pointing_shares(compute_relevance(method, maps[method].flatten(0, 1)), quarters)
        np.testing.assert_allclose(found, share, atol=1e-6)


def test_noise_points_to_each_quarter_by_chance() -> None:
    shares = pointing_shares(normal(4000, 8, 8), torch.arange(4).repeat(1000))
    assert float(shares.mean()) == pytest.approx(0.25, abs=4 * float(shares.std()) / 4000**0.5)


def test_share_equals_that_of_quantus_attribution_localisation() -> None:
    import quantus

    relevance, quarters = normal(8, 6, 10), torch.arange(4).repeat(2)
    masks = np.zeros((8, 1, 6, 10), dtype=int)
    for n, quarter in enumerate(quarters.tolist()):
        row, column = divmod(quarter, 2)
        masks[n, 0, 3 * row : 3 * row + 3, 5 * column : 5 * column + 5] = 1
    metric = quantus.AttributionLocalisation(
        positive_attributions=True, abs=False, normalise=False, max_size=1.0, disable_warnings=True
    )
    arrays = {"x_batch": np.zeros((8, 1, 6, 10)), "y_batch": np.zeros(8, dtype=int), "s_batch": masks}
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    truth = metric(model=model, **arrays, a_batch=relevance[:, None].numpy(), channel_first=True, device="cpu")
    np.testing.assert_allclose(pointing_shares(relevance, quarters), truth, rtol=1e-8)
    np.testing.assert_allclose(pointing_shares(1e-30 * relevance.float(), quarters), truth, rtol=1e-5)


def test_map_without_positive_relevance_scores_less_than_chance() -> None:
    relevance = torch.stack([torch.zeros(4, 4), -torch.ones(4, 4), torch.full((4, 4), torch.nan), torch.ones(4, 4)])
    first, second, third, last = pointing_shares(relevance, torch.tensor([0, 1, 2, 3])).tolist()
    assert (first, second, last) == (0, 0, 0.25)
    assert np.isnan(third)  # an error of the map stays visible


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_map_without_four_equal_quarters_is_rejected(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError) as caught:
        pointing_shares(torch.ones(1, *shape), torch.tensor([0]))
    assert caught.value.parameter == "relevance"


@pytest.mark.parametrize("quarters", [[0], [0, 4], [-1, 0]])
def test_wrong_quarters_are_rejected(quarters: list[int]) -> None:
    with pytest.raises(ValueError, match="quarters"):
        pointing_shares(torch.ones(2, 4, 4), torch.tensor(quarters))


def test_grid_equals_quantus_mosaic() -> None:
    from quantus.functions.mosaic_func import build_single_mosaic

    images = normal(3, 4, 2, 5, 7)
    grids = make_grids(images)
    assert grids.shape == (3, 2, 10, 14)
    for grid, four in zip(grids, images):
        np.testing.assert_array_equal(grid, build_single_mosaic(list(four.numpy())))
    with pytest.raises(ValueError, match="a grid needs"):
        make_grids(images[:, :3])


# --- the draw ---------------------------------------------------------------------------------------


@pytest.mark.full
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=12), st.integers(1, 40), st.integers(0, 1000))
def test_groups_have_four_classes_and_use_the_samples_equally_often(sizes: list[int], count: int, seed: int) -> None:
    classes = torch.tensor([10 * k for k, size in enumerate(sizes) for _ in range(size)])
    classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))]
    groups = draw_quadruples(classes, count, seed)
    assert (groups.shape, groups.dtype) == ((count, 4), torch.int64)
    assert all(len(set(classes[group].tolist())) == 4 for group in groups)
    uses = Counter(groups.flatten().tolist())
    totals = Counter(classes[groups].flatten().tolist())
    by_class = {k: [uses[n] for n in (classes == k).nonzero()[:, 0].tolist()] for k in classes.tolist()}
    assert all(max(numbers) - min(numbers) <= 1 for numbers in by_class.values())
    # Classes that are in every group may be used less often than the others, but not more often.
    free = [number for k, numbers in by_class.items() if totals[k] < count for number in numbers]
    limited = [number for k, numbers in by_class.items() if totals[k] == count for number in numbers]
    if free:
        assert max(free) - min(free) <= 1
        assert max(limited, default=0) <= max(free) + 1


def test_seed_determines_the_groups() -> None:
    classes = torch.arange(40) % 8
    one, same, other = (draw_quadruples(classes.tolist(), 20, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_classes_meet_in_many_combinations_and_in_all_quarters() -> None:
    classes = torch.arange(40) % 8
    groups = classes[draw_quadruples(classes, 400)]
    combinations = {tuple(sorted(group)) for group in groups.tolist()}
    assert len(combinations) > 60  # of 70
    for k in range(8):
        at = (groups == k).sum(0)
        assert int(at.sum()) == 200
        assert int(at.min()) > 50 - 4 * (200 * 3 / 16) ** 0.5


@pytest.mark.parametrize(("classes", "count", "parameter"), [([0, 1, 2, 2], 1, "classes"), ([0, 1, 2, 3], 0, "count")])
def test_impossible_draws_are_rejected(classes: list[int], count: int, parameter: str) -> None:
    with pytest.raises(UserError) as caught:
        draw_quadruples(classes, count)
    assert caught.value.parameter == parameter
