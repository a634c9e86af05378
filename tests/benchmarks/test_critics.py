"""The measures of the critics against scipy, scikit-image, numpy, and networks with a known result."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.critics.measures import (
    absorb_shift,
    backward_convergence,
    cascade,
    cosine,
    earth_movers_accuracy,
    heat,
    randomize,
    ranks,
    singular_ratio,
    singular_values,
    spearman,
    ssim,
    trained_operators,
)
from patterns import Explainer, Network, Operator, UserError, accumulate, solve, trace
from patterns.attribution.baselines import sobel
from patterns.operators.operator import Convolution, Linear
from tests.patterns.test_explain import small


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def chain(*weights: Tensor) -> Network:
    """Return linear layers without bias or rectifier, in the order of the weights."""
    layers = []
    for weight in weights:
        layer = nn.Linear(*reversed(weight.shape), bias=False).double()
        layer.weight.data = weight
        layers.append(layer)
    return trace(nn.Sequential(*layers), torch.zeros(2, weights[0].shape[1], dtype=torch.float64))


def relu_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    return trace(nn.Sequential(*layers).double(), torch.zeros(2, 6, dtype=torch.float64))


# --- modified networks ----------------------------------------------------------------------------


def test_only_named_operators_are_randomized_and_the_network_is_unchanged() -> None:
    it = small("residual")
    before = {name: op.weight.clone() for name, op in it.network.operators.items()}
    other = randomize(it.network, ["head", "one"], seeded(0))
    for name, op in other.operators.items():
        old = it.network.operators[name]
        assert torch.equal(old.weight, before[name])
        assert torch.equal(op.weight, old.weight) == (name not in ("head", "one"))
        assert (op.operator_type, op.gate, op.input_shapes, op.output_shape) == (
            old.operator_type, old.gate, old.input_shapes, old.output_shape
        )  # fmt: skip
    assert not torch.equal(other.operators["one"].bias, it.network.operators["one"].bias)  # type: ignore[arg-type]
    assert not torch.equal(other.module(it.inputs), it.network.module(it.inputs))


def test_randomized_weight_keeps_only_mean_and_standard_deviation() -> None:
    network = chain(2 + 3 * normal(200, 200))
    old, new = network.operators["0"].weight, randomize(network, ["0"], seeded(1)).operators["0"].weight
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=4 * 3 / 200)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=4 / 200 / 2**0.5)
    assert abs(np.corrcoef(old.flatten(), new.flatten())[0, 1]) < 4 / 200


def test_seed_determines_the_weights() -> None:
    network = relu_network()
    one, same, other = (randomize(network, ["0"], seeded(s)).operators["0"].weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_cascade_goes_down_and_keeps_its_earlier_draws() -> None:
    it = small("residual")
    assert trained_operators(it.network) == ["stem", "one", "two", "head"]  # not the addition, nor the pooling
    steps = list(cascade(it.network, seeded(0)))
    assert [name for name, _ in steps] == ["head", "two", "one", "stem"]
    randomized: dict[str, Tensor] = {}
    for name, network in steps:
        weights = {n: op.weight for n, op in network.operators.items()}
        randomized[name] = weights[name]
        for n, weight in weights.items():
            assert torch.equal(weight, randomized.get(n, it.network.operators[n].weight))
    assert not any(torch.equal(w, it.network.operators[n].weight) for n, w in randomized.items())


def test_map_of_a_hidden_neuron_does_not_depend_on_the_cascade_above_it() -> None:
    it = small("residual")
    target = torch.tensor([2, 0, 1, 3])

    def maps(network: Network) -> Tensor:
        return Explainer(network.until("stem"), it.patterns, ["patternattribution"])(it.inputs, target).maps[
            "patternattribution"
        ]

    truth = maps(it.network)
    for name, network in cascade(it.network, seeded(0)):
        assert torch.equal(maps(network), truth) == (name != "stem")


def test_gradient_of_a_linear_model_is_the_product_of_the_randomized_weights() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    first, second = (network.operators[name].weight for name in ("0", "1"))
    for name, other in cascade(network, seeded(3)):
        found = Explainer(other, None, ["gradient"])(x, torch.tensor([1, 2])).maps["gradient"]
        below, above = other.operators["0"].weight, other.operators["1"].weight
        torch.testing.assert_close(found, (above @ below)[[1, 2]], rtol=1e-12, atol=1e-12)
        assert torch.equal(below, first) == (name == "1")
        assert not torch.equal(above, second)


def test_cascade_changes_only_the_size_of_signals_without_gates() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    patterns = {"0": normal(4, 5, seed=3), "1": normal(3, 4, seed=4)}
    targets = torch.tensor([0, 2])
    before = Explainer(network, patterns, ["patternnet"])(x, targets).maps["patternnet"]
    for _, other in cascade(network, seeded(5)):
        after = Explainer(other, patterns, ["patternnet"])(x, targets).maps["patternnet"]
        torch.testing.assert_close(cosine(before, after).abs(), torch.ones(2, dtype=torch.float64))
        assert not torch.allclose(before, after)


# --- constant shift ---------------------------------------------------------------------------


def test_shifted_network_gives_the_same_output_for_shifted_inputs() -> None:
    network, x, shift = relu_network(), normal(20, 6), 3 * normal(6, seed=1)
    other = absorb_shift(network, "0", shift)
    torch.testing.assert_close(other.module(x + shift), network.module(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other.module(x), network.module(x))


def test_convolution_without_padding_absorbs_a_constant_per_channel_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = normal(5, 2, 4, 4)
    network = trace(model, x)
    shift = torch.tensor([2.0, -1.0]).double()[:, None, None].expand(2, 4, 4)
    torch.testing.assert_close(absorb_shift(network, "0", shift).module(x + shift), network.module(x))
    with pytest.raises(UserError, match="no bias can absorb") as caught:
        absorb_shift(network, "0", normal(2, 4, 4))
    assert caught.value.where == "0"


def test_refitted_linear_patterns_equal_those_before_the_shift() -> None:
    network, x, shift = relu_network(), normal(400, 6), 3 * normal(6, seed=1)
    other = absorb_shift(network, "0", shift)

    def patterns(of: Network, inputs: Tensor, choice: str) -> dict[str, Tensor]:
        moments = accumulate(of, [inputs])
        return {n: next(iter(solve(op, moments[n], choice).patterns.values())) for n, op in of.operators.items()}

    carried, refitted = patterns(network, x, "linear"), patterns(other, x + shift, "linear")
    for name, pattern in carried.items():
        torch.testing.assert_close(refitted[name], pattern, rtol=1e-9, atol=1e-9)
    methods = ["patternnet", "patternattribution"]
    truth = Explainer(network, carried, methods)(x[:5]).maps
    for chosen in (carried, refitted):
        found = Explainer(other, chosen, methods)(x[:5] + shift).maps
        for method in methods:
            torch.testing.assert_close(found[method], truth[method], rtol=1e-9, atol=1e-9)
    # The paper's two-component form changes (tests/patterns/test_invariance.py states by how much).
    two = [patterns(of, inputs, "two-component")["0"] for of, inputs in ((network, x), (other, x + shift))]
    assert float(cosine(*two).min()) < 0.99


def test_shift_is_reshaped_like_the_operators_input() -> None:
    torch.manual_seed(0)
    x, shift = normal(5, 2, 3), normal(2, 3, seed=1)
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), x)
    torch.testing.assert_close(absorb_shift(network, "1", shift).module(x + shift), network.module(x))


# --- backward pass ---------------------------------------------------------------------------------


def test_after_a_matrix_of_rank_one_two_gradients_differ_only_in_sign() -> None:
    one = normal(6, 1) @ normal(1, 5, seed=1)
    network = chain(normal(5, 4, seed=2), one, normal(3, 6, seed=3))
    found = backward_convergence(Explainer(network, None, ["gradient"]), normal(8, 4), seeded(0))
    assert list(found) == ["2", "1", "0"]  # the order of the backward pass
    assert float(found["2"].abs().min()) < 0.9  # still two directions there
    for name in ("1", "0"):
        torch.testing.assert_close(found[name].abs(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set(found["0"].sign().tolist()) == {1.0, -1.0}


def test_orthogonal_matrices_keep_the_cosine_of_two_gradients() -> None:
    rotations = [torch.linalg.qr(normal(6, 6, seed=s)).Q for s in range(4)]
    found = backward_convergence(Explainer(chain(*rotations), None, ["gradient"]), normal(9, 6), seeded(7))
    one, other = torch.randn((18, 6), generator=seeded(7), dtype=torch.float64).chunk(2)
    expected = torch.cosine_similarity(one, other)
    assert len(found) == 4
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


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


def operator(operator_type: Convolution | Linear, weight: Tensor) -> Operator:
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


# --- comparing maps -------------------------------------------------------------------------------


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
