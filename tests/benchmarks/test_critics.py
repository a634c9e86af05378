"""What the critics measure, against scipy, scikit-image, numpy, and networks whose answer is known."""

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

from benchmarks.critics import shapes
from benchmarks.critics.measures import (
    backward_convergence,
    cascade,
    cosine,
    earth_movers_accuracy,
    heat,
    learned,
    randomised,
    ranks,
    shifted,
    singular_ratio,
    singular_values,
    spearman,
    ssim,
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
    """Linear layers without bias or rectifier, the first weight first."""
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


# --- networks, changed ----------------------------------------------------------------------------


def test_only_what_is_named_is_drawn_anew_and_the_network_stays_as_it_was() -> None:
    it = small("residual")
    before = {name: op.weight.clone() for name, op in it.network.operators.items()}
    other = randomised(it.network, ["head", "one"], seeded(0))
    for name, op in other.operators.items():
        old = it.network.operators[name]
        assert torch.equal(old.weight, before[name])
        assert torch.equal(op.weight, old.weight) == (name not in ("head", "one"))
        assert (op.operator_type, op.gate, op.input_shapes, op.output_shape) == (
            old.operator_type, old.gate, old.input_shapes, old.output_shape
        )  # fmt: skip
    assert not torch.equal(other.operators["one"].bias, it.network.operators["one"].bias)  # type: ignore[arg-type]
    assert not torch.equal(other.module(it.inputs), it.network.module(it.inputs))


def test_a_redrawn_weight_has_the_mean_and_deviation_that_it_had_and_nothing_else_of_it() -> None:
    network = chain(2 + 3 * normal(200, 200))
    old, new = network.operators["0"].weight, randomised(network, ["0"], seeded(1)).operators["0"].weight
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=4 * 3 / 200)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=4 / 200 / 2**0.5)
    assert abs(np.corrcoef(old.flatten(), new.flatten())[0, 1]) < 4 / 200


def test_a_seed_says_what_is_drawn() -> None:
    network = relu_network()
    one, same, other = (randomised(network, ["0"], seeded(s)).operators["0"].weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_cascade_goes_down_and_what_it_drew_once_stays() -> None:
    it = small("residual")
    assert learned(it.network) == ["stem", "one", "two", "head"]  # not the addition, nor the pooling
    steps = list(cascade(it.network, seeded(0)))
    assert [name for name, _ in steps] == ["head", "two", "one", "stem"]
    drawn: dict[str, Tensor] = {}
    for name, network in steps:
        weights = {n: op.weight for n, op in network.operators.items()}
        drawn[name] = weights[name]
        for n, weight in weights.items():
            assert torch.equal(weight, drawn.get(n, it.network.operators[n].weight))
    assert not any(torch.equal(w, it.network.operators[n].weight) for n, w in drawn.items())


def test_a_map_of_a_neuron_inside_does_not_feel_the_cascade_above_it() -> None:
    it = small("residual")
    target = torch.tensor([2, 0, 1, 3])

    def maps(network: Network) -> Tensor:
        return Explainer(network.until("stem"), it.patterns, ["patternattribution"])(it.inputs, target).maps[
            "patternattribution"
        ]

    truth = maps(it.network)
    for name, network in cascade(it.network, seeded(0)):
        assert torch.equal(maps(network), truth) == (name != "stem")


def test_the_gradient_of_a_linear_model_becomes_the_product_of_the_redrawn_weights() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    first, second = (network.operators[name].weight for name in ("0", "1"))
    for name, other in cascade(network, seeded(3)):
        found = Explainer(other, None, ["gradient"])(x, torch.tensor([1, 2])).maps["gradient"]
        below, above = other.operators["0"].weight, other.operators["1"].weight
        torch.testing.assert_close(found, (above @ below)[[1, 2]], rtol=1e-12, atol=1e-12)
        assert torch.equal(below, first) == (name == "1")
        assert not torch.equal(above, second)


def test_of_signals_through_kept_patterns_without_gates_only_the_size_feels_the_cascade() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    patterns = {"0": normal(4, 5, seed=3), "1": normal(3, 4, seed=4)}
    targets = torch.tensor([0, 2])
    before = Explainer(network, patterns, ["patternnet"])(x, targets).maps["patternnet"]
    for _, other in cascade(network, seeded(5)):
        after = Explainer(other, patterns, ["patternnet"])(x, targets).maps["patternnet"]
        torch.testing.assert_close(cosine(before, after).abs(), torch.ones(2, dtype=torch.float64))
        assert not torch.allclose(before, after)


# --- a constant added to the inputs ---------------------------------------------------------------


def test_a_shifted_network_gives_for_shifted_inputs_what_it_gave() -> None:
    network, x, shift = relu_network(), normal(20, 6), 3 * normal(6, seed=1)
    other = shifted(network, "0", shift)
    torch.testing.assert_close(other.module(x + shift), network.module(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other.module(x), network.module(x))


def test_a_convolution_without_padding_absorbs_a_constant_for_each_channel_and_no_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = normal(5, 2, 4, 4)
    network = trace(model, x)
    shift = torch.tensor([2.0, -1.0]).double()[:, None, None].expand(2, 4, 4)
    torch.testing.assert_close(shifted(network, "0", shift).module(x + shift), network.module(x))
    with pytest.raises(UserError, match=r"^0: the shift changes its outputs by position, and a bias is one number\."):
        shifted(network, "0", normal(2, 4, 4))


def test_refitted_linear_patterns_are_those_carried_over_the_shift() -> None:
    network, x, shift = relu_network(), normal(400, 6), 3 * normal(6, seed=1)
    other = shifted(network, "0", shift)

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
    # The paper's two-component form is the one that moves (tests/patterns/test_invariance.py says by what).
    two = [patterns(of, inputs, "two-component")["0"] for of, inputs in ((network, x), (other, x + shift))]
    assert float(cosine(*two).min()) < 0.99


def test_a_shift_is_taken_in_the_shape_in_which_the_operator_reads_it() -> None:
    torch.manual_seed(0)
    x, shift = normal(5, 2, 3), normal(2, 3, seed=1)
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), x)
    torch.testing.assert_close(shifted(network, "1", shift).module(x + shift), network.module(x))


# --- the way back ---------------------------------------------------------------------------------


def test_behind_a_matrix_of_rank_one_two_starts_are_the_same_but_for_their_sign() -> None:
    one = normal(6, 1) @ normal(1, 5, seed=1)
    network = chain(normal(5, 4, seed=2), one, normal(3, 6, seed=3))
    found = backward_convergence(Explainer(network, None, ["gradient"]), normal(8, 4), seeded(0))
    assert list(found) == ["2", "1", "0"]  # as the way back goes
    assert float(found["2"].abs().min()) < 0.9  # there two directions were still two
    for name in ("1", "0"):
        torch.testing.assert_close(found[name].abs(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set(found["0"].sign().tolist()) == {1.0, -1.0}


def test_through_orthogonal_matrices_two_starts_stay_as_alike_as_they_were() -> None:
    turns = [torch.linalg.qr(normal(6, 6, seed=s)).Q for s in range(4)]
    found = backward_convergence(Explainer(chain(*turns), None, ["gradient"]), normal(9, 6), seeded(7))
    one, other = torch.randn((18, 6), generator=seeded(7), dtype=torch.float64).chunk(2)
    expected = torch.cosine_similarity(one, other)
    assert len(found) == 4
    for values in found.values():
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "patternnet", "patternattribution", "guided-backprop"])
def test_at_the_input_it_is_the_cosine_of_two_maps(method: str) -> None:
    it = small("residual")
    explainer = Explainer(it.network, it.patterns, [method])
    found = backward_convergence(explainer, it.inputs, seeded(2))
    assert list(found)[-1] == "stem"
    starts = torch.randn((8, 3), generator=seeded(2), dtype=torch.float64).chunk(2)
    scores = it.network.module(it.inputs)
    # Values are multiplied into the starts of PatternNet and PatternAttribution: divided out before.
    divisor = scores if method.startswith("pattern") else torch.ones_like(scores)
    one, other = (explainer(it.inputs, start / divisor).maps[method] for start in starts)
    torch.testing.assert_close(found["stem"], cosine(one, other), rtol=1e-9, atol=1e-9)


def test_a_product_beyond_the_dtypes_range_converges_as_it_would_within() -> None:
    weights = [normal(5, 5, seed=s) for s in range(6)]
    x = normal(4, 5, seed=9)
    truth = backward_convergence(Explainer(chain(*weights), None, ["gradient"]), x, seeded(1))
    network = chain(*(1e10 * w for w in weights))
    module = network.module.float()
    found = backward_convergence(Explainer(replace(network, module=module), None, ["gradient"]), x.float(), seeded(1))
    assert list(found) == list(truth)
    for name, values in found.items():
        torch.testing.assert_close(values, truth[name], rtol=1e-4, atol=1e-4)


def operator(kind: Convolution | Linear, weight: Tensor) -> Operator:
    return Operator("it", kind, weight, None, ((1,),), (1,), "")


def test_singular_values_are_numpys_of_the_weight_laid_flat() -> None:
    weight = normal(7, 3, 2, 2)
    found = singular_values(operator(Convolution((1, 1), (0, 0), (1, 1)), weight), weight)
    truth = np.linalg.svd(weight.numpy().reshape(7, 12), compute_uv=False)
    np.testing.assert_allclose(found, truth, rtol=1e-12)
    assert singular_ratio(operator(Linear(), weight), weight) == pytest.approx(truth[0] / truth[1], rel=1e-12)


def test_singular_values_of_groups_are_those_of_the_block_diagonal_matrix() -> None:
    weight = normal(6, 2, 3, 1)
    dense = np.zeros((6, 3 * 6))
    for k in range(6):
        dense[k, 6 * (k // 2) : 6 * (k // 2) + 6] = weight[k].flatten()
    found = singular_values(operator(Convolution((1, 1), (0, 0), (1, 1), groups=3), weight), weight)
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False), rtol=1e-12)


def test_one_neuron_has_no_second_direction() -> None:
    assert singular_ratio(operator(Linear(), normal(1, 5)), normal(1, 5)) == float("inf")
    assert singular_ratio(operator(Linear(), torch.eye(3)), torch.eye(3)) == 1


# --- maps, compared -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11, 11), (16, 24), (40, 40)])
def test_ssim_is_scikit_images(shape: tuple[int, int]) -> None:
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


def test_ssim_of_one_window_is_the_formula_written_out() -> None:
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


def test_a_map_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"a map of 8×16 pixels is smaller than SSIM's window of 11×11\. Compare"):
        ssim(uniform(1, 8, 16), uniform(1, 8, 16))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10**6))
def test_spearman_is_scipys_with_ties_and_without(size: int, levels: int, seed: int) -> None:
    a, b = normal(2, size, seed=seed), normal(2, size, seed=seed + 1)
    tied = (a * levels).round(), (b * levels).round()
    for one, other in ((a, b), tied):
        for found, rank, x, y in zip(spearman(one, other), ranks(one), one, other):
            np.testing.assert_array_equal(rank, scipy.stats.rankdata(x))
            if x.unique().numel() > 1 and y.unique().numel() > 1:
                assert float(found) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_the_cosine_does_not_depend_on_a_maps_size() -> None:
    a, b = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    truth = torch.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close(cosine(a, b), truth)
    torch.testing.assert_close(cosine(a * 1e-200, b * 1e200), truth)
    torch.testing.assert_close(cosine(a, -3 * a), -torch.ones(3, dtype=torch.float64))


def test_heat_is_the_mass_of_the_channels_with_the_largest_one() -> None:
    maps = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert heat(maps).tolist() == [[[1.0, 0.5]], [[0.0, 0.0]]]


def test_sobel_is_scipys() -> None:
    x = normal(2, 3, 9, 7)
    for found, image in zip(sobel(x).flatten(0, 1), x.flatten(0, 1)):
        down, across = (scipy.ndimage.sobel(image.numpy(), axis, mode="nearest") for axis in (0, 1))
        np.testing.assert_allclose(found, np.hypot(down, across), rtol=1e-10)


def test_an_earth_movers_distance_along_a_line_is_scipys() -> None:
    heats, mask = uniform(5, 1, 12), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [2, 3, 9]] = True
    heats[0, 0, ::2] = 0
    for found, values in zip(earth_movers_accuracy(heats, mask), heats):
        places = np.arange(12)
        distance = scipy.stats.wasserstein_distance(places, places, values[0].numpy(), mask[0].double().numpy())
        assert float(found) == pytest.approx(1 - distance / 11, abs=1e-9)


def test_a_map_that_is_the_mask_is_right_and_the_far_corner_is_wrong() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 0] = True
    heats = torch.zeros(3, 4, 5, dtype=torch.float64)
    heats[0, 0, 0], heats[1, 3, 4], heats[2, 3, 0] = 7, 0.1, 1
    expected = [1, 0, 1 - 3 / 5]  # the image's diagonal is 5 long
    np.testing.assert_allclose(earth_movers_accuracy(heats, mask), expected, atol=1e-9)


def test_mass_goes_where_it_costs_least() -> None:
    # Two pixels in the middle, each between them and one of the wanted corners: nothing need cross over.
    mask, heats = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(2, 3, 7, dtype=torch.float64)
    mask[1, [0, 6]] = True
    heats[0, 1, [2, 4]] = 1
    heats[1, 1, 2] = 1  # half stays near, half goes far
    expected = torch.tensor([2.0, (2 + 4) / 2]) / 40**0.5
    np.testing.assert_allclose(earth_movers_accuracy(heats, mask), 1 - expected, atol=1e-9)


def test_a_map_of_zeros_says_as_much_as_one_of_equal_values() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    zeros, ones = earth_movers_accuracy(torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).double(), mask).tolist()
    assert zeros == ones
    assert 0 < ones < 1


# --- the images of the study ----------------------------------------------------------------------


def test_a_pixel_beside_the_shapes_says_nothing_of_the_class_and_is_weighed_all_the_same() -> None:
    count = 20_000
    x, labels = shapes.drawn("linear", count, seeded(0))
    difference = (x[labels == 1].mean(0) - x[labels == 0].mean(0))[0]
    standard_error = 2 * x.std() / count**0.5
    torch.testing.assert_close(difference, 0.35 * (shapes.L - shapes.T), rtol=0, atol=5 * float(standard_error))
    centred = x.flatten(1) - x.flatten(1).mean(0)
    weight = torch.linalg.lstsq(centred, labels.double() - 0.5).solution.view(shapes.SIDE, shapes.SIDE).abs()
    assert float(weight[~shapes.MASK].sum()) > float(weight[shapes.MASK].sum())


@pytest.mark.parametrize("scenario", ["multiplicative", "XOR"])
def test_no_mean_of_a_pixel_tells_the_classes_apart_where_they_differ_otherwise(scenario: str) -> None:
    count = 20_000
    x, labels = shapes.drawn(scenario, count, seeded(0))
    one, other = (x[labels == k].flatten(1) for k in (1, 0))
    assert float((one.mean(0) - other.mean(0)).abs().max()) < 5 * 2 * float(x.std()) / count**0.5
    # The products of pixels do, and only those of pixels in the shapes.
    between = (one.T @ one / len(one) - other.T @ other / len(other)).abs()
    if scenario == "XOR":
        inside = shapes.MASK.flatten()
        assert float(between[inside][:, inside].max()) > 0.5
        assert float(between[~inside].max()) < 0.1
    else:
        assert float(between.diagonal()[shapes.MASK.flatten()].min()) > 0.5
        assert float(between.diagonal()[~shapes.MASK.flatten()].max()) < 0.1
