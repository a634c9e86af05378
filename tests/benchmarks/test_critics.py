"""The measures of the critics against scipy, numpy, and networks with a known result."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from benchmarks.critics.measures import (
    backward_convergence,
    earth_movers_accuracy,
    singular_ratio,
    singular_values,
)
from patterns import Explainer, Operator
from patterns.attribution.baselines import sobel
from patterns.evaluation import cosine
from patterns.operators.operator import Convolution, Linear
from tests.patterns.chains import chain, normal, seeded, uniform
from tests.patterns.test_explain import small

# --- backward pass ---------------------------------------------------------------------------------


@pytest.mark.full
def test_after_a_matrix_of_rank_one_two_gradients_differ_only_in_sign() -> None:
    one = normal(6, 1) @ normal(1, 5, seed=1)
    network = chain(normal(5, 4, seed=2), one, normal(3, 6, seed=3))
    found = backward_convergence(Explainer(network, None, ["gradient"]), normal(8, 4), seeded(0))
    assert list(found) == ["2", "1", "0"]  # the order of the backward pass
    assert float(found["2"].abs().min()) < 0.9  # still two directions there
    for name in ("1", "0"):
        torch.testing.assert_close(found[name].abs(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set(found["0"].sign().tolist()) == {1.0, -1.0}


@pytest.mark.full
def test_orthogonal_matrices_keep_the_cosine_of_two_gradients() -> None:
    rotations = [torch.linalg.qr(normal(6, 6, seed=s)).Q for s in range(4)]
    found = backward_convergence(Explainer(chain(*rotations), None, ["gradient"]), normal(9, 6), seeded(7))
    one, other = torch.randn((18, 6), generator=seeded(7), dtype=torch.float64).chunk(2)
    expected = torch.cosine_similarity(one, other)
    assert len(found) == 4
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("method", ["gradient", "patternnet", "patternattribution", "guided-backprop"])
def test_convergence_at_the_input_is_the_cosine_of_two_maps(method: str) -> None:
    it = small("residual")
    explainer = Explainer(it.network, it.patterns, [method])
    found = backward_convergence(explainer, it.inputs, seeded(2))
    assert list(found)[-1] == "stem"
    gradients = torch.randn((8, 3), generator=seeded(2), dtype=torch.float64).chunk(2)
    scores = it.network.module(it.inputs)
    # PatternNet and PatternAttribution multiply the output gradient by the scores, so it is divided by them here.
    divisor = scores if method.startswith("pattern") else torch.ones_like(scores)
    one, other = (explainer(it.inputs, gradient / divisor).maps[method] for gradient in gradients)
    torch.testing.assert_close(found["stem"], cosine(one, other), rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_product_beyond_the_dtypes_range_converges_as_within_it() -> None:
    weights = [normal(5, 5, seed=s) for s in range(6)]
    x = normal(4, 5, seed=9)
    truth = backward_convergence(Explainer(chain(*weights), None, ["gradient"]), x, seeded(1))
    network = chain(*(1e10 * w for w in weights))
    module = network.module.float()
    found = backward_convergence(Explainer(replace(network, module=module), None, ["gradient"]), x.float(), seeded(1))
    assert list(found) == list(truth)
    for name, values in found.items():
        torch.testing.assert_close(values, truth[name], rtol=1e-4, atol=1e-4)


def operator(operator_type: Convolution | Linear, weight: torch.Tensor) -> Operator:
    return Operator("it", operator_type, weight, None, ((1,),), (1,), "")


def test_singular_values_equal_numpys_of_the_flattened_weight() -> None:
    weight = normal(7, 3, 2, 2)
    found = singular_values(operator(Convolution((1, 1), (0, 0), (1, 1)), weight), weight)
    truth = np.linalg.svd(weight.numpy().reshape(7, 12), compute_uv=False)
    np.testing.assert_allclose(found, truth, rtol=1e-12)
    assert singular_ratio(operator(Linear(), weight), weight) == pytest.approx(truth[0] / truth[1], rel=1e-12)


def test_singular_values_of_groups_equal_those_of_the_block_diagonal_matrix() -> None:
    weight = normal(6, 2, 3, 1)
    dense = np.zeros((6, 3 * 6))
    for k in range(6):
        dense[k, 6 * (k // 2) : 6 * (k // 2) + 6] = weight[k].flatten()
    found = singular_values(operator(Convolution((1, 1), (0, 0), (1, 1), groups=3), weight), weight)
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False), rtol=1e-12)


def test_one_neuron_has_no_second_direction() -> None:
    assert singular_ratio(operator(Linear(), normal(1, 5)), normal(1, 5)) == float("inf")
    assert singular_ratio(operator(Linear(), torch.eye(3)), torch.eye(3)) == 1


# --- ground truth -----------------------------------------------------------------------------------


def test_sobel_equals_scipys() -> None:
    x = normal(2, 3, 9, 7)
    for found, image in zip(sobel(x).flatten(0, 1), x.flatten(0, 1)):
        down, across = (scipy.ndimage.sobel(image.numpy(), axis, mode="nearest") for axis in (0, 1))
        np.testing.assert_allclose(found, np.hypot(down, across), rtol=1e-10)


def test_earth_movers_distance_on_a_line_equals_scipys() -> None:
    heats, mask = uniform(5, 1, 12), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [2, 3, 9]] = True
    heats[0, 0, ::2] = 0
    for found, values in zip(earth_movers_accuracy(heats, mask), heats):
        pixels = np.arange(12)
        distance = scipy.stats.wasserstein_distance(pixels, pixels, values[0].numpy(), mask[0].double().numpy())
        assert float(found) == pytest.approx(1 - distance / 11, abs=1e-9)


def test_accuracy_is_1_for_the_mask_and_0_for_the_far_corner() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 0] = True
    heats = torch.zeros(3, 4, 5, dtype=torch.float64)
    heats[0, 0, 0], heats[1, 3, 4], heats[2, 3, 0] = 7, 0.1, 1
    expected = [1, 0, 1 - 3 / 5]  # the image's diagonal is 5 long
    np.testing.assert_allclose(earth_movers_accuracy(heats, mask), expected, atol=1e-9)


def test_mass_is_moved_at_the_least_cost() -> None:
    # Two pixels in the middle, each nearest to one of two targets.
    mask, heats = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(2, 3, 7, dtype=torch.float64)
    mask[1, [0, 6]] = True
    heats[0, 1, [2, 4]] = 1
    heats[1, 1, 2] = 1  # one half moves to the near target, the other to the far one
    expected = torch.tensor([2.0, (2 + 4) / 2]) / 40**0.5
    np.testing.assert_allclose(earth_movers_accuracy(heats, mask), 1 - expected, atol=1e-9)


def test_map_of_zeros_counts_as_uniform() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    zeros, ones = earth_movers_accuracy(torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).double(), mask).tolist()
    assert zeros == ones
    assert 0 < ones < 1
