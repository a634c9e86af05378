from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate, Operator, UserError, accumulate, solve, trace
from patterns.observe import PatchObserver
from patterns.operators import Addition, AveragePool, Convolution, Kind, Linear, Scale, TransposedConvolution
from patterns.patches import PatchAccumulator, PatchMoments, bytes_of, draw, generator, zero
from patterns.quality import quality, rho, signals, whiten
from tests.oracles import Neuron, channel_patches, linear_patches, neurons, window_patches

RELU = (0.0, float("inf"))
ALL = 10**6  # positions: more than any image here has
ESTIMATORS = ["filter", "random", "linear", "two-component"]


@dataclass(frozen=True)
class Case:
    """An operator with a ReLU behind it, and images for it."""

    operator: Operator
    shapes: tuple[tuple[int, ...], ...]
    unfold: Callable[..., list[Tensor]]

    def inputs(self, images: int, seed: int) -> tuple[Tensor, ...]:
        """Correlated, skewed, away from 0."""
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(images, *self.shapes[0], generator=generator, dtype=torch.float64)
        noise = [torch.randn(images, *shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return tuple((i + 1) * (common + n).relu() + 0.5 * n.roll(1, -1) + 0.3 for i, n in enumerate(noise))

    def moments(self, inputs: tuple[Tensor, ...], positions: int = ALL, seed: int = 0) -> PatchMoments:
        accumulator = PatchAccumulator(self.operator, positions, seed)
        accumulator.update(inputs, self.operator(*inputs))
        return accumulator.moments()

    def neurons(self, inputs: tuple[Tensor, ...]) -> list[Neuron]:
        return neurons(self.unfold(*inputs), self.operator.weight, self.operator.bias, RELU)


def case(kind: Kind, weight: Tensor, *shapes: tuple[int, ...], unfold: Callable[..., list[Tensor]]) -> Case:
    bias = None if isinstance(kind, Addition | AveragePool) else torch.linspace(-0.5, 0.5, len(weight)).double()
    return Case(Operator("it", kind, weight, bias, (), (), "", Gate(*RELU)), shapes, unfold)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def convolution(
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Case:
    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, tuple(weight.shape[2:]), stride, padding, dilation, groups)

    return case(Convolution(stride, padding, dilation, groups), weight, shape, unfold=unfold)


def transposed(
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    more: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Case:
    kernel = tuple(weight.shape[2:])
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + m + 1
        for n, s, p, d, k, m in zip(shape[1:], stride, padding, dilation, kernel, more)
    ]

    def unfold(x: Tensor) -> list[Tensor]:
        """Output position o sees input i through tap k where o = i · stride - padding + k · dilation."""
        rows = torch.zeros(len(x), *sizes, shape[0], *kernel, dtype=torch.float64)
        everywhere = [product(range(o), range(k)) for o, k in zip(sizes, kernel)]
        for pairs in product(*everywhere):
            spots = [divmod(o + p - k * d, s) for (o, k), p, d, s in zip(pairs, padding, dilation, stride)]
            if all(rest == 0 and 0 <= i < n for (i, rest), n in zip(spots, shape[1:])):
                out, tap = zip(*pairs)
                rows[(slice(None), *out, slice(None), *tap)] = x[(..., *(i for i, _ in spots))]
        return [g.flatten(len(sizes) + 1).flatten(0, -2) for g in rows.chunk(groups, len(sizes) + 1)]

    return case(TransposedConvolution(stride, padding, more, dilation, groups), weight, shape, unfold=unfold)


def average_pool() -> Case:
    kernel, stride, padding = (2, 3), (2, 1), (1, 0)
    weight = torch.full((3, 1, *kernel), 1 / 6, dtype=torch.float64)

    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, kernel, stride, padding, (1, 1), 3)

    return case(AveragePool(kernel, stride, padding), weight, (3, 5, 6), unfold=unfold)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: case(Linear(), normal(4, 7), (7,), unfold=linear_patches),
    "linear on tokens": lambda: case(Linear(), normal(4, 5), (3, 2, 5), unfold=linear_patches),
    "conv1d": lambda: convolution(normal(3, 2, 3), (2, 9), (2,), (1,), (2,)),
    "conv2d": lambda: convolution(normal(4, 2, 2, 3), (2, 6, 5), (2, 1), (1, 2), (1, 2)),
    "grouped": lambda: convolution(normal(6, 2, 2, 1), (4, 4, 5), (1, 2), (0, 1), (2, 1), 2),
    "depthwise": lambda: convolution(normal(3, 1, 3, 2), (3, 6, 5), (1, 2), (1, 0), (1, 1), 3),
    "conv3d": lambda: convolution(normal(3, 1, 2, 1, 2), (1, 3, 4, 4), (1, 2, 1), (0, 1, 1), (2, 1, 1)),
    "transposed": lambda: transposed(normal(3, 2, 3), (2, 6), (2,), (1,), (1,), (1,)),
    "transposed in groups": lambda: transposed(normal(4, 1, 2, 3), (2, 3, 3), (1, 2), (0, 1), (0, 1), (2, 1), 2),
    "addition": lambda: case(
        Addition((1.0, 0.5)), torch.tensor([[1.0, 0.5]] * 3).double(), (3, 4, 2), (3, 4, 2), unfold=channel_patches
    ),
    "average pool": average_pool,
}
IMAGES = {"linear": 120, "linear on tokens": 40}
every_kind = pytest.mark.parametrize("name", CASES)


def patterns_of(case: Case, moments: PatchMoments) -> dict[str, Tensor]:
    return solve(case.operator, moments.moments, ESTIMATORS, seed=3).patterns


def regressed_rho(components: tuple[Tensor, ...], k: int, w: Tensor, on_b: Neuron, on_c: Neuron) -> float:
    """ρ of neuron k, sample by sample: the distractors, their regression on B, its correlation on C."""
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
    for name, components in signals(patterns).items():
        assert found[name].shape == (case.operator.neurons,)
        for k, w in enumerate(case.operator.weight.flatten(1)):
            expected = regressed_rho(components, k, w, on_b[k], on_c[k])
            assert found[name][k].item() == pytest.approx(expected, rel=0, abs=1e-8), (name, k)


# --- the quality ----------------------------------------------------------------------------------


@every_kind
def test_quality_equals_least_squares_on_held_out_samples(name: str) -> None:
    case, images = CASES[name](), IMAGES.get(name, 12)
    a, b, c = (case.inputs(images, seed) for seed in (1, 2, 3))
    patterns = patterns_of(case, case.moments(a))
    assert_rho(case, patterns, b, c)
    found = quality(patterns, case.operator.weight, case.moments(b), case.moments(c))
    assert all(((r >= 0) & (r <= 2)).all() for r in found.values())


@every_kind
def test_on_a_single_set_quality_lies_in_0_1_and_that_of_linear_is_1(name: str) -> None:
    case = CASES[name]()
    moments = case.moments(case.inputs(IMAGES.get(name, 12), 1))
    found = quality(patterns_of(case, moments), case.operator.weight, moments, moments)
    assert all(((r >= 0) & (r <= 1)).all() for r in found.values())
    torch.testing.assert_close(found["linear"], torch.ones_like(found["linear"]), rtol=0, atol=1e-8)
    assert (found["filter"] <= found["linear"] + 1e-8).all()


def confined(case: Case, images: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs in which one is a copy of another and one is always 0."""
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
            components = tuple(p.double() for p in signals(patterns)[name])
            # Float32 patterns stick out by rounding; least squares must be told not to look there.
            confined_w = torch.cat([(w[:1] + w[1:2]), torch.zeros(2), w[3:]])
            rows = [torch.cat([p[:, :1], torch.zeros(len(p), 2), p[:, 3:]], 1) for p in components]
            keep = [Neuron(n.x * torch.tensor([1, 0, 0, 1, 1, 1, 1]), n.y, n.open) for n in (on_b[k], on_c[k])]
            expected = regressed_rho(tuple(rows), k, confined_w, *keep)
            assert found[name][k].item() == pytest.approx(expected, abs=1e-8 if dtype == torch.float64 else 1e-5)
    for name in ("filter", "random"):  # these lead out of the data, where vᵀd is y itself
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


def test_quality_does_not_depend_on_the_bias_but_through_the_gate() -> None:
    case = CASES["conv2d"]()
    a, b, c = (case.moments(case.inputs(12, seed)) for seed in (1, 2, 3))
    free = Case(Operator("it", case.operator.kind, case.operator.weight, None, (), (), ""), case.shapes, case.unfold)
    b_free, c_free = (free.moments(free.inputs(12, seed)) for seed in (2, 3))
    patterns = {name: p for name, p in patterns_of(case, a).items() if name in {"filter", "random", "linear"}}
    for name, r in quality(patterns, case.operator.weight, b, c).items():
        found = quality(patterns, case.operator.weight, b_free, c_free)[name]
        torch.testing.assert_close(found, r, rtol=0, atol=1e-12)


def test_the_two_component_quality_needs_the_gates_sums() -> None:
    operator = Operator("it", Linear(), normal(2, 3), None, (), (), "")
    accumulator = PatchAccumulator(operator, ALL)
    accumulator.update((normal(9, 3),), operator(normal(9, 3)))
    moments = accumulator.moments()
    with pytest.raises(ValueError, match="taken without the sums that this needs"):
        rho((operator.weight, operator.weight), operator.weight, whiten(moments), moments)


def test_estimators_are_named_by_their_patterns() -> None:
    one, two = torch.ones(1, 1), torch.zeros(1, 1)
    assert signals({"linear": one, "positive": one, "negative": two}) == {"linear": (one,), "two-component": (one, two)}
    assert signals({"positive": one, "filter": two}) == {"filter": (two,)}


def undefined(found: Tensor) -> list[bool]:
    return found.isnan().tolist()


def test_where_quality_is_undefined_it_is_nan_for_that_neuron_alone() -> None:
    case = CASES["linear"]()
    a, b = case.moments(case.inputs(60, 1)), case.moments(case.inputs(60, 2))
    weight = case.operator.weight
    assert undefined(rho((), weight, whiten(b), b)) == [True] * 4  # identity
    (dead,) = signals({"linear": patterns_of(case, a)["linear"].clone()}).values()
    dead[0][1] = 0
    assert undefined(rho(dead, weight, whiten(b), b)) == [False, True, False, False]
    (x,) = case.inputs(60, 2)
    x[:, 3:] = 0.25
    weight = weight.clone()
    weight[2, :3] = 0  # y varies with a constant alone
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


def test_no_samples_have_no_quality() -> None:
    case = CASES["linear"]()
    nothing, some = zero(case.operator), case.moments(case.inputs(50, 1))
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


# --- the Gram moments -----------------------------------------------------------------------------


def assert_sums(found: PatchMoments, truth: list[Neuron], rtol: float = 1e-9) -> None:
    """Every sum, against the neurons' samples."""
    k = len(truth)
    for which, part in (("total", found.moments.total), ("open", found.moments.open)):
        assert part is not None
        assert part.x is not None
        assert part.xy is not None
        x = part.x.repeat_interleave(k // len(part.x), 0)
        for i, neuron in enumerate(truth):
            expected = neuron.sums(which)
            assert part.n[i] == expected["n"]
            for field, value in (("y", part.y), ("yy", part.yy), ("x", x), ("xy", part.xy)):
                torch.testing.assert_close(value[i], expected[field], rtol=rtol, atol=1e-9)
    xx = found.xx.repeat_interleave(k // len(found.xx), 0)
    for i, neuron in enumerate(truth):
        torch.testing.assert_close(xx[i], neuron.x.mT @ neuron.x, rtol=rtol, atol=1e-9)


@every_kind
def test_gram_moments_equal_sums_over_all_unfolded_patches(name: str) -> None:
    case = CASES[name]()
    inputs = case.inputs(4, 1)
    found = case.moments(inputs)
    assert {t.dtype for t in found.tensors().values()} == {torch.float64, torch.int64}
    assert_sums(found, case.neurons(inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear"])
@pytest.mark.parametrize("positions", [1, 3])
def test_sampled_sums_are_those_of_the_drawn_positions_alone(name: str, positions: int) -> None:
    case = CASES[name]()
    inputs = case.inputs(5, 1)
    found = case.moments(inputs, positions, seed=7)
    z = case.operator(*inputs)
    available = z[0].numel() // case.operator.neurons
    drawn = draw(generator(7, "it"), 5, available, positions)
    rows = [image * available + int(p) for image, own in enumerate(drawn) for p in own]
    assert found.moments.total.n.tolist() == [5 * positions] * case.operator.neurons
    assert_sums(found, [Neuron(n.x[rows], n.y[rows], n.open[rows]) for n in case.neurons(inputs)])


def test_each_position_is_drawn_equally_often_and_never_twice_from_an_image() -> None:
    images, available, positions = 6000, 12, 4
    drawn = draw(generator(0, "it"), images, available, positions)
    assert drawn.shape == (images, positions)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    counts = drawn.flatten().bincount(minlength=available)
    share = positions / available
    deviation = (images * share * (1 - share)) ** 0.5
    assert ((counts - images * share).abs() < 4 * deviation).all()


@pytest.mark.parametrize("positions", [12, 13])
def test_all_positions_are_taken_where_an_image_has_no_more(positions: int) -> None:
    assert draw(generator(0, "it"), 2, 12, positions).tolist() == [list(range(12))] * 2


def test_the_draw_depends_on_seed_operator_and_source() -> None:
    draws = [draw(generator(s, n, o), 3, 1000, 5).tolist() for s, n, o in product((0, 1), ("a", "b"), ("", "c"))]
    assert len({str(d) for d in draws}) == len(draws)
    assert draw(generator(0, "a", "c"), 3, 1000, 5).tolist() == draws[1]


def test_no_positions_are_refused() -> None:
    with pytest.raises(UserError, match="0 is no number of positions"):
        PatchAccumulator(CASES["conv2d"]().operator, 0)


def assert_same(a: PatchMoments, b: PatchMoments, rtol: float = 0.0) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=0.0)


def test_gram_moments_are_a_commutative_monoid() -> None:
    case = CASES["grouped"]()
    (x,) = case.inputs(7, 1)
    a, b, c = (case.moments((part,)) for part in x.split([2, 4, 1]))
    nothing = zero(case.operator)
    assert_same(a + b, b + a)
    assert_same((a + b) + c, a + (b + c), rtol=1e-12)
    assert_same(a + nothing, a)
    assert_same(nothing + a, a)
    assert_same(a + b + c, case.moments((x,)), rtol=1e-11)
    kept = {name: t.clone() for name, t in a.tensors().items()}
    for t in (a + b).tensors().values():
        t.zero_()
    assert_same(a, PatchMoments.from_tensors(kept))
    assert PatchMoments.from_tensors(a.tensors()).nbytes == bytes_of(case.operator)


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [0, 7]])
def test_a_source_gives_the_same_sums_however_it_is_cut_and_whatever_came_before(cuts: list[int]) -> None:
    case = CASES["conv2d"]()
    (x,) = case.inputs(7, 1)
    whole, cut = PatchAccumulator(case.operator, 3), PatchAccumulator(case.operator, 3)
    whole.begin("shard")
    whole.update((x,), case.operator(x))
    cut.update((x[:2],), case.operator(x[:2]))
    cut.reset()
    cut.begin("shard")
    for part in x.split(cuts):
        cut.update((part,), case.operator(part))
    assert_same(cut.moments(), whole.moments(), rtol=1e-11)


def test_patches_written_out_in_pieces_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["grouped"]()
    inputs = case.inputs(7, 1)
    whole = case.moments(inputs, 2)
    monkeypatch.setattr("patterns.patches.PATCH_ELEMENTS", 40)
    assert_same(case.moments(inputs, 2), whole, rtol=1e-11)


class Sample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.branch(x)).mean((2, 3)))


def test_a_network_feeds_the_chosen_operators_what_the_model_computes_there() -> None:
    torch.manual_seed(0)
    model = Sample().double().requires_grad_(False)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    network = trace(model, x[:1])
    chosen = [name for name in network.operators if name in {"stem", "branch", "head"} or name.startswith("addition")]
    assert len(chosen) == 4
    observer = PatchObserver(network, chosen, ALL)
    torch.testing.assert_close(observer.update(x[:4]), model(x[:4]))
    observer.update(x[4:])
    found, expected = observer.moments(), accumulate(network, [x])
    for name in chosen:
        left, right = found[name].moments.tensors(), replace(expected[name], outer=None).tensors()
        assert left.keys() == right.keys()
        for field in left:
            torch.testing.assert_close(left[field], right[field], rtol=1e-9, atol=1e-9)
    one = PatchObserver(network, ["branch"], 2, seed=1)
    one.update(x)
    assert list(one.moments()) == ["branch"]
    assert one.moments()["branch"].moments.total.n.tolist() == [12] * 4
    one.reset()
    assert_same(one.moments()["branch"], zero(network.operators["branch"]))
    with pytest.raises(KeyError):
        PatchObserver(network, ["nowhere"], 2)


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
        again = generator(0, name)
        draw(again, 8, 144, 20)
        taken = patches[torch.arange(8)[:, None], draw(again, 8, 144, 20)].flatten(0, 1)
        torch.testing.assert_close(whiten(b).cov[0], taken.mT.cov(correction=0), rtol=1e-9, atol=1e-10)
    for name, r in found[1].items():
        torch.testing.assert_close(found[0][name], r, rtol=0, atol=1e-4)
