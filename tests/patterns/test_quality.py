import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import Gate, Operator, solve, trace
from patterns.estimation.observer import PatchObserver
from patterns.estimation.signal_quality import correlation, group_by_estimator, quality, rho, whiten
from patterns.moments.gram import PatchAccumulator, PatchMoments, zero_patch_moments
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import Linear, Scale
from tests.oracles import Neuron, channel_patches, window_patches
from tests.patterns.gram import ALL, CASES, ESTIMATORS, IMAGES, RELU, Case, case, drawn, every_operator_type, normal


def patterns_of(case: Case, moments: PatchMoments) -> dict[str, Tensor]:
    return solve(case.operator, moments.moments, ESTIMATORS, seed=3).patterns


def regressed_rho(components: tuple[Tensor, ...], k: int, w: Tensor, on_b: Neuron, on_c: Neuron) -> float:
    """Return ρ of neuron k from its samples: the distractors, their regression on B, the correlation on C."""
    a = [c[k].flatten() / (c[k].flatten() @ w) for c in components]

    def parts(neuron: Neuron) -> tuple[np.ndarray, np.ndarray]:
        mask = neuron.open if len(a) == 2 else torch.ones_like(neuron.open)
        signal = torch.where(mask[:, None], neuron.y[:, None] * a[0], neuron.y[:, None] * a[-1])
        return (neuron.x - signal).numpy(), neuron.y.numpy()

    (d_b, y_b), (d_c, y_c) = parts(on_b), parts(on_c)
    v = np.linalg.lstsq(d_b - d_b.mean(0), y_b - y_b.mean(), rcond=1e-9)[0]
    return 1 - float(np.corrcoef(y_c, d_c @ v)[0, 1])


def assert_rho(case: Case, patterns: dict[str, Tensor], b: tuple[Tensor, ...], c: tuple[Tensor, ...]) -> None:
    found = quality(patterns, case.operator.weight, case.moments(b), case.moments(c))
    assert found.keys() == set(ESTIMATORS)
    on_b, on_c = case.neurons(b), case.neurons(c)
    for name, components in group_by_estimator(patterns).items():
        assert found[name].shape == (case.operator.neurons,)
        for k, w in enumerate(case.operator.weight.flatten(1)):
            expected = regressed_rho(components, k, w, on_b[k], on_c[k])
            assert found[name][k].item() == pytest.approx(expected, rel=0, abs=1e-8), (name, k)


# --- the quality ----------------------------------------------------------------------------------


@every_operator_type
def test_quality_equals_least_squares_on_held_out_samples(name: str) -> None:
    case, images = CASES[name](), IMAGES.get(name, 12)
    a, b, c = (case.inputs(images, seed) for seed in (1, 2, 3))
    patterns = patterns_of(case, case.moments(a))
    assert_rho(case, patterns, b, c)
    on_b, on_c = whiten(case.moments(b)), case.moments(c)
    for components in group_by_estimator(patterns).values():  # before `rho` clamps the rounding
        found = correlation(components, case.operator.weight, on_b, on_c)
        assert (found.abs() <= 1 + 1e-9).all()


@every_operator_type
def test_on_a_single_set_quality_lies_in_0_1_and_that_of_linear_is_1(name: str) -> None:
    case = CASES[name]()
    moments = case.moments(case.inputs(IMAGES.get(name, 12), 1))
    patterns = patterns_of(case, moments)
    found = quality(patterns, case.operator.weight, moments, moments)
    on_b = whiten(moments)
    for components in group_by_estimator(patterns).values():
        corr = correlation(components, case.operator.weight, on_b, moments)
        assert ((corr >= -1e-9) & (corr <= 1 + 1e-9)).all()
    torch.testing.assert_close(found["linear"], torch.ones_like(found["linear"]), rtol=0, atol=1e-8)
    assert (found["filter"] <= found["linear"] + 1e-8).all()


def confined(case: Case, images: int, seed: int) -> tuple[Tensor, ...]:
    """Return inputs of which one is a copy of another and one is always 0."""
    (x,) = case.inputs(images, seed)
    x[:, 1] = x[:, 0]
    x[:, 2] = 0
    return (x,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_that_span_fewer_dimensions_leave_learned_patterns_their_quality(dtype: torch.dtype) -> None:
    case = CASES["linear"]()
    a, b, c = (confined(case, 100, seed) for seed in (1, 2, 3))
    patterns = {name: p.to(dtype) for name, p in patterns_of(case, case.moments(a)).items()}
    found = quality(patterns, case.operator.weight, case.moments(b), case.moments(c))
    on_b, on_c = case.neurons(b), case.neurons(c)
    for name in ("linear", "two-component"):
        for k, w in enumerate(case.operator.weight):
            components = tuple(p.double() for p in group_by_estimator(patterns)[name])
            # Float32 patterns leave the span by rounding; least squares must not use that.
            confined_w = torch.cat([(w[:1] + w[1:2]), torch.zeros(2), w[3:]])
            rows = [torch.cat([p[:, :1], torch.zeros(len(p), 2), p[:, 3:]], 1) for p in components]
            keep = [Neuron(n.x * torch.tensor([1, 0, 0, 1, 1, 1, 1]), n.y, n.open) for n in (on_b[k], on_c[k])]
            expected = regressed_rho(tuple(rows), k, confined_w, *keep)
            assert found[name][k].item() == pytest.approx(expected, abs=1e-8 if dtype == torch.float64 else 1e-5)
    for name in ("filter", "random"):  # these leave the span of the data, where vᵀd is y itself
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]), rtol=0, atol=1e-8)


def test_a_regression_on_fewer_samples_than_inputs_is_the_pseudo_inverse() -> None:
    case = CASES["linear"]()
    a, b, c = (case.inputs(images, seed) for images, seed in ((100, 1), (5, 2), (60, 3)))
    assert_rho(case, patterns_of(case, case.moments(a)), b, c)


def test_quality_does_not_depend_on_a_patterns_length() -> None:
    case = CASES["conv2d"]()
    a, b, c = (case.moments(case.inputs(12, seed)) for seed in (1, 2, 3))
    patterns = patterns_of(case, a)
    found = quality(patterns, case.operator.weight, b, c)
    longer = quality({name: p * -3 for name, p in patterns.items()}, case.operator.weight, b, c)
    for name, r in found.items():
        torch.testing.assert_close(longer[name], r, rtol=0, atol=1e-10)


def test_quality_depends_on_the_bias_only_through_the_gate() -> None:
    case = CASES["conv2d"]()
    a, b, c = (case.moments(case.inputs(12, seed)) for seed in (1, 2, 3))
    free = Case(
        Operator("it", case.operator.operator_type, case.operator.weight, None, (), (), ""), case.shapes, case.unfold
    )
    b_free, c_free = (free.moments(free.inputs(12, seed)) for seed in (2, 3))
    patterns = {name: p for name, p in patterns_of(case, a).items() if name in {"filter", "random", "linear"}}
    for name, r in quality(patterns, case.operator.weight, b, c).items():
        found = quality(patterns, case.operator.weight, b_free, c_free)[name]
        torch.testing.assert_close(found, r, rtol=0, atol=1e-12)


def test_the_two_component_quality_needs_the_gates_sums() -> None:
    operator = Operator("it", Linear(), normal(2, 3), None, (), (), "")
    draw = PositionSampler(ALL)
    accumulator = PatchAccumulator(operator, draw)
    draw.start_pass(torch.arange(9))
    accumulator.update((normal(9, 3),), operator(normal(9, 3)))
    moments = accumulator.moments()
    with pytest.raises(ValueError, match="without the sums"):
        rho((operator.weight, operator.weight), operator.weight, whiten(moments), moments)


def test_estimators_are_named_by_their_patterns() -> None:
    one, two = torch.ones(1, 1), torch.zeros(1, 1)
    assert group_by_estimator({"linear": one, "positive": one, "negative": two}) == {
        "linear": (one,),
        "two-component": (one, two),
    }
    assert group_by_estimator({"positive": one, "filter": two}) == {"filter": (two,)}


def undefined(found: Tensor) -> list[bool]:
    return found.isnan().tolist()


def test_undefined_quality_is_nan_for_the_affected_neurons_only() -> None:
    case = CASES["linear"]()
    a, b = case.moments(case.inputs(60, 1)), case.moments(case.inputs(60, 2))
    weight = case.operator.weight
    assert undefined(rho((), weight, whiten(b), b)) == [True] * 4  # identity
    (dead,) = group_by_estimator({"linear": patterns_of(case, a)["linear"].clone()}).values()
    dead[0][1] = 0
    assert undefined(rho(dead, weight, whiten(b), b)) == [False, True, False, False]
    (x,) = case.inputs(60, 2)
    x[:, 3:] = 0.25
    weight = weight.clone()
    weight[2, :3] = 0  # y depends on a constant input only
    constant = Case(Operator("it", Linear(), weight, None, (), (), "", Gate(*RELU)), case.shapes, case.unfold)
    still = constant.moments((x,))
    found = quality({"filter": weight}, weight, still, still)["filter"]
    assert undefined(found) == [False, False, True, False]
    moving = constant.moments(constant.inputs(60, 2))
    assert undefined(quality({"filter": weight}, weight, moving, still)["filter"]) == [False, False, True, False]


def test_a_neuron_of_one_input_has_no_distractor() -> None:
    scale = case(Scale(), normal(3, 1), (3, 4), unfold=channel_patches)
    moments = scale.moments(scale.inputs(9, 1))
    found = quality({"linear": 1 / scale.operator.weight}, scale.operator.weight, moments, moments)
    assert undefined(found["linear"]) == [True] * 3


def test_quality_without_samples_is_undefined() -> None:
    case = CASES["linear"]()
    nothing, some = zero_patch_moments(case.operator), case.moments(case.inputs(50, 1))
    for b, c in ((nothing, some), (some, nothing)):
        assert undefined(quality({"filter": case.operator.weight}, case.operator.weight, b, c)["filter"]) == [True] * 4


def test_a_side_of_the_gate_without_samples_needs_no_pattern() -> None:
    case = CASES["linear"]()
    case.operator.bias = torch.full((4,), 100.0, dtype=torch.float64)  # always open
    a, b, c = (case.moments(case.inputs(60, seed)) for seed in (1, 2, 3))
    patterns = patterns_of(case, a)
    assert not patterns["negative"].any()
    found = quality(patterns, case.operator.weight, b, c)
    torch.testing.assert_close(found["two-component"], found["linear"], rtol=0, atol=1e-9)


def test_an_ill_conditioned_covariance_costs_few_digits() -> None:
    case = CASES["linear"]()
    spread = torch.logspace(0, -3, 7, dtype=torch.float64)
    a, b, c = ((case.inputs(200, seed)[0] * spread,) for seed in (1, 2, 3))
    assert_rho(case, patterns_of(case, case.moments(a)), b, c)


@pytest.mark.full
def test_activations_far_from_zero_keep_their_quality_in_float32() -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(2)) + 30
    found = []
    for dtype in (torch.float32, torch.float64):
        network = trace(layer.to(dtype), x[:1].to(dtype))
        observer = PatchObserver(network, network.operators, 20)
        parts = []
        for batch in x.to(dtype).split(8):
            observer.reset()
            observer.update(batch)
            parts.append(observer.moments())
        ((name, operator),) = network.operators.items()
        a, b, c = (part[name] for part in parts)
        patterns = {n: p.double() for n, p in solve(operator, a.moments, ["filter", "linear"]).patterns.items()}
        found.append(quality(patterns, operator.weight, b, c))
        patches = window_patches(x[8:16], (3, 3), (1, 1), (1, 1), (1, 1))[0].unflatten(0, (8, -1))
        where = drawn(torch.arange(8, 16), name, 144, 20)
        taken = patches[torch.arange(8)[:, None], where].flatten(0, 1)
        torch.testing.assert_close(whiten(b).cov[0], taken.mT.cov(correction=0), rtol=1e-9, atol=1e-10)
    for name, r in found[1].items():
        torch.testing.assert_close(found[0][name], r, rtol=0, atol=1e-4)
