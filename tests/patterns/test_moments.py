"""The moments of any operator against sums over its samples, also in float32 and for large counts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import CHOICES, Gate, Moments, Operator, Sums, accumulate, solve, trace
from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import RequiredSums, zero_moments
from patterns.operators.axes import sum_squares
from patterns.operators.operator import Convolution, Linear, OperatorType, Scale
from tests.oracles import Neuron, channel_patches, linear_patches, neurons, window_patches
from tests.patterns.cases import STRATEGIES, Case, any_case, fixed
from tests.patterns.networks import relative

RELU, RELU6 = (0.0, float("inf")), (0.0, 6.0)
REACH = {torch.float32: 1e-5, torch.float64: 1e-10}
Shape = tuple[int, ...]
cases = settings(max_examples=40, derandomize=True, deadline=None)


def is_unambiguous(case: Case) -> bool:
    """Whether no output is so near a limit of its gate that float32 may put it on the other side; equal is fine."""
    if case.limits is None or case.weight.dtype == torch.float64:
        return True
    biases = [0.0] * len(case.neurons) if case.bias is None else case.bias.tolist()
    z = torch.stack([neuron.y + bias for neuron, bias in zip(case.neurons, biases)])
    far = [(z - limit).abs() for limit in case.limits]
    return not any(((d > 0) & (d < 1e-5)).any() for d in far)


def rows(sums: Sums, k: int) -> list[dict[str, Tensor]]:
    """Return the sums of each neuron."""
    assert sums.x is not None
    assert sums.xy is not None
    x = sums.x.repeat_interleave(k // len(sums.x), 0)
    names = ("n", "y", "yy", "x", "xy")
    return [dict(zip(names, row)) for row in zip(sums.n, sums.y, sums.yy, x, sums.xy)]


def assert_equal_sums(found: Sums, expected: list[dict[str, Tensor]], magnitude: list[Neuron], reach: float) -> None:
    """Compare relative to each neuron; a sum that cancels is compared relative to the size of its terms."""
    for row, truth, neuron in zip(rows(found, len(expected)), expected, magnitude):
        assert row["n"] == truth["n"]
        # Outputs of exactly 0 are a bias minus itself, rounded.
        small = max(reach * float(neuron.y @ neuron.y), 1e-9)
        scales = {"y": max(float(neuron.y.norm()), small), "yy": small, "x": float(neuron.x.norm()), "xy": small}
        for field, scale in scales.items():
            assert (row[field] - truth[field]).norm() <= reach * max(float(truth[field].norm()), scale), field


def assert_brute_force(case: Case) -> None:
    assume(is_unambiguous(case))
    found, truth = case.moments(), case.neurons
    reach = REACH[case.weight.dtype]
    assert {t.dtype for t in found.tensors().values()} == {torch.float64, torch.int64}
    assert_equal_sums(found.total, [n.sums("total") for n in truth], truth, reach)
    assert (found.open is None) == (case.limits is None)
    if found.open is not None:
        assert_equal_sums(found.open, [n.sums("open") for n in truth], truth, reach)
        assert found.open.x is not None
        assert len(found.open.x) == len(truth)
        closed = replace(found.closed, yy=found.total.yy - found.open.yy)
        for row, neuron in zip(rows(closed, len(truth)), truth):
            expected, whole = neuron.sums("closed"), neuron.sums("total")
            for field in ("n", "y", "yy", "x", "xy"):
                scale = max(*(float(values.double().norm()) for values in (whole[field], neuron.x, neuron.y)), 1e-9)
                assert (row[field] - expected[field]).double().norm() <= reach * scale, field


@pytest.mark.full
@pytest.mark.parametrize("strategy", [*STRATEGIES, "wide convolution"])
def test_moments_equal_brute_force_sums_over_samples(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if strategy == "wide convolution":
        monkeypatch.setattr("patterns.operators.winograd.MIN_CHANNEL_COLUMNS", 0)
        strategy = "convolution"

    @given(any_case(strategy))
    @cases
    def check(case: Case) -> None:
        assert_brute_force(case)

    check()


@pytest.mark.parametrize(("high", "expected"), [(float("inf"), 4), (6.0, 2)])
def test_a_gate_is_closed_on_its_limits(high: float, expected: int) -> None:
    z = torch.tensor([[-1.0], [0.0], [1e-30], [3.0], [6.0], [7.0]])
    operator = Operator("it", Linear(), torch.ones(1, 1), None, (), (), "", Gate(0.0, high))
    accumulator = Accumulator(operator, RequiredSums())
    accumulator.update((z,), operator(z))
    opened = accumulator.moments().open
    assert opened is not None
    assert opened.n.tolist() == [expected]
    assert opened.y.item() == pytest.approx(sum(v for v in z.flatten().tolist() if 0 < v < high), rel=1e-7)


class Sample(nn.Module):
    """Every operator type, with and without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.branch = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.stem(x))
        x = F.relu(self.norm(x + self.branch(x)))
        x = F.avg_pool2d(x, 3, 2, padding=1)
        return self.head(x.mean((2, 3)))


@pytest.mark.full
def test_each_operator_is_observed_with_the_inputs_of_the_model() -> None:
    torch.manual_seed(0)
    model = Sample().double().requires_grad_(False)
    model.norm.running_mean.fill_(0.2)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64) * 3
    found = accumulate(trace(model, x[:1]), [x])

    stem = F.conv2d(x, model.stem.weight, model.stem.bias, 2, 1)
    a = stem.clamp(0, 6)
    branch = F.conv2d(a, model.branch.weight, None, padding=(1, 0), groups=2)
    both = a + branch
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    shift = -model.norm.running_mean * scale
    b = (both * scale[:, None, None] + shift[:, None, None]).relu()
    pooled = F.avg_pool2d(b, 3, 2, padding=1)
    mean = pooled.mean((2, 3))
    ninth, average = torch.full((4, 9), 1 / 9), torch.full((4, 4), 1 / 4)
    expected = {
        "stem": neurons(window_patches(x, (3, 3), (2, 2), (1, 1), (1, 1)), model.stem.weight, model.stem.bias, RELU6),
        "branch": neurons(window_patches(a, (3, 1), (1, 1), (1, 0), (1, 1), 2), model.branch.weight, None, None),
        "addition.0": neurons(channel_patches(a, branch), torch.ones(4, 2), None, None),
        "norm": neurons(channel_patches(both), scale[:, None], shift, RELU),
        "average_pool.0": neurons(window_patches(b, (3, 3), (2, 2), (1, 1), (1, 1), 4), ninth.double(), None, None),
        "average_pool.1": neurons(window_patches(pooled, (2, 2), (1, 1), (0, 0), (1, 1), 4), average, None, None),
        "head": neurons(linear_patches(mean), model.head.weight, model.head.bias, None),
    }
    assert list(found) == list(expected)
    for name, truth in expected.items():
        reach = 1e-7 if name == "average_pool.0" else 1e-10  # 1/9 above is float32's
        assert_equal_sums(found[name].total, [n.sums("total") for n in truth], truth, reach)
        opened = found[name].open
        assert (opened is not None) == (name in {"stem", "norm"})
        if opened is not None:
            assert_equal_sums(opened, [n.sums("open") for n in truth], truth, reach)


def small() -> Case:
    """A gated convolution over seven images."""
    return fixed("conv2d in groups", "relu")


def assert_same(a: Moments, b: Moments, rtol: float = 0.0) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=0.0)


def test_a_neuron_that_never_closes_has_exactly_no_closed_sums() -> None:
    case = small()
    assert case.operator.bias is not None
    case.operator.bias[2] = 1000.0
    closed = case.moments().closed
    assert closed.x is not None
    assert closed.xy is not None
    assert (closed.n == 0).tolist() == [False, False, True, False, False, False]
    for field in (closed.y, closed.yy, closed.x, closed.xy):
        assert (field.view(6, -1) == 0).all(1).tolist() == (closed.n == 0).tolist()


def test_returned_moments_do_not_change_with_later_batches() -> None:
    case = small()
    accumulator = Accumulator(case.operator, RequiredSums())
    accumulator.update(case.inputs, case.operator(*case.inputs))
    first = accumulator.moments()
    kept = Moments.from_tensors({k: v.clone() for k, v in first.tensors().items()})
    accumulator.update(case.inputs, case.operator(*case.inputs))
    assert_same(first, kept)
    assert_same(accumulator.moments(), kept + kept, rtol=1e-12)
    accumulator.reset()
    assert_same(accumulator.moments(), zero_moments(case.operator, RequiredSums()))


def test_moments_with_and_without_a_gate_do_not_merge() -> None:
    gated, free = small(), fixed("conv2d in groups", "none")
    with pytest.raises(ValueError, match="gate"):
        gated.moments() + free.moments()


def test_sums_taken_on_one_side_alone_do_not_merge() -> None:
    case = small()
    with pytest.raises(ValueError, match="Σx and Σxy"):
        case.moments() + case.moments(RequiredSums(total=False))


@pytest.mark.parametrize("left_out", ["total", "open"])
def test_sums_that_are_not_required_are_not_taken_and_change_no_others(left_out: str) -> None:
    case = small()
    partial, whole = case.moments(replace(RequiredSums(), **{left_out: False})).tensors(), case.moments().tensors()
    assert whole.keys() - partial.keys() == {f"{left_out}.x", f"{left_out}.xy"}
    for name, value in partial.items():
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize("name", ["conv2d", "conv2d in groups", "transposed conv1d", "linear on tokens", "addition"])
@pytest.mark.parametrize("limit", ["CHUNK_POSITIONS", "CHUNK_ELEMENTS"])
def test_a_batch_summed_in_chunks_gives_the_same_sums(limit: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = fixed(name, "relu")
    whole = case.moments()
    for size in (1, 10, 50):
        monkeypatch.setattr(f"patterns.moments.accumulator.{limit}", size)
        assert_same(case.moments(), whole, rtol=1e-11)


# --- float32, and many samples ------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(3, 5, 3, padding=1), (16, 3, 12, 12)),
    "strided": (lambda: nn.Conv2d(3, 8, 3, stride=2), (16, 3, 12, 12)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (16, 3, 12, 12)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (16, 3, 6, 6)),
    "linear": (lambda: nn.Linear(12, 6), (800, 12)),
}
LEARNED = ["linear", "two-component", "two-component-own-mean", "multivariate"]


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("layer", [*LAYERS, "wide convolution"])
def test_activations_thirty_deviations_from_zero_have_accurate_patterns_in_float32(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer == "wide convolution":
        monkeypatch.setattr("patterns.operators.winograd.MIN_CHANNEL_COLUMNS", 0)
        layer = "convolution"
    torch.manual_seed(2)
    make, shape = LAYERS[layer]
    model = nn.Sequential(make(), nn.ReLU())
    x = torch.randn(shape) + 30
    with torch.no_grad():  # about half the samples open each gate, and none is so near its limit that rounding could
        middle = model[0](x).movedim(1, 0).flatten(1).sort().values.tensor_split(4, 1)
        middle = torch.cat(middle[1:3], 1)
        widest = middle.diff().argmax(1, keepdim=True)
        assert model[0].bias is not None
        model[0].bias -= (middle.gather(1, widest) + middle.gather(1, widest + 1))[:, 0] / 2
    solved = []
    for dtype in (torch.float32, torch.float64):
        network = trace(model.to(dtype), x[:2].to(dtype))
        moments = accumulate(network, x.to(dtype).split(4 if x.dim() == 4 else 200))["0"]
        solved.append(solve(network.operators["0"], moments, LEARNED).patterns)
    assert solved[0].keys() == {row for choice in LEARNED for row in CHOICES[choice][0]}
    for row, exact in solved[1].items():
        # With a mean this large, the outputs of a transposed convolution's four types of positions are nearly equal.
        reach = 1e-3 if (layer, row) == ("transposed", "multivariate") else 1e-4
        found, truth = solved[0][row].double().flatten(1), exact.flatten(1)
        assert ((found - truth).norm(dim=1) / truth.norm(dim=1)).max() < reach, row


HALF: dict[str, tuple[OperatorType, Shape, Shape]] = {
    "convolution": (Convolution((1, 1), (1, 1), (1, 1)), (4, 3, 3, 3), (2, 3, 190, 190)),
    "linear": (Linear(), (4, 6), (70_000, 6)),
}  # with more positions than float16 has numbers


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_loses_no_sample_and_no_digit_of_the_models_outputs(name: str, dtype: torch.dtype) -> None:
    operator_type, weight_shape, shape = HALF[name]
    generator = torch.Generator().manual_seed(0)
    weight, x = ((torch.randn(size, generator=generator) + 1).to(dtype) for size in (weight_shape, shape))
    operator = Operator(
        "it", operator_type, weight, torch.linspace(-1, 1, 4).to(dtype), (), (), "", Gate(0.0, float("inf"))
    )
    accumulator, z = Accumulator(operator, RequiredSums()), operator(x)
    accumulator.update((x,), z)
    found = accumulator.moments()
    patches = window_patches(x, (3, 3), (1, 1), (1, 1), (1, 1))[0] if name == "convolution" else x.double()
    outputs = z.double().movedim(operator_type.axis, -1).flatten(0, -2)
    y = outputs - operator.bias.double()  # type: ignore[union-attr]
    for sums, mask in ((found.total, torch.ones_like(y)), (found.open, (outputs > 0).double())):
        assert sums is not None
        assert torch.equal(sums.n, mask.sum(0).long())
        truth = {"y": (mask * y).sum(0), "yy": (mask * y * y).sum(0), "xy": (mask * y).mT @ patches}
        for field, expected in {**truth, "x": (mask.mT @ patches)[: len(sums.x)]}.items():  # type: ignore[arg-type]
            assert relative(getattr(sums, field), expected) < 1e-5, field


# One batch with more positions than float32 can count: sums over them one by one end at 2²⁴.
COUNT = 2**24 + 2**20
MANY: dict[str, tuple[OperatorType, Shape, Shape]] = {
    "linear": (Linear(), (1, 1), (COUNT, 1)),
    "tokens": (Linear(), (1, 1), (COUNT // 2**10, 2**10, 1)),
    "convolution": (Convolution((1,), (1,), (1,)), (1, 1, 2), (COUNT // 2**15, 1, 2**15)),
    "scale": (Scale(), (1, 1), (COUNT // 2**15, 1, 2**15)),
}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("tokens", "scale") else ()) for n in MANY]
)
def test_a_batch_of_more_positions_than_float32_can_count_loses_nothing(name: str) -> None:
    operator_type, weight, shape = MANY[name]
    # The gradient of a convolution adds the positions of a chunk one by one; a norm is rounded to float32.
    reach = 5e-5 if name == "convolution" else 1e-7
    x = torch.ones(shape)
    x.view(-1)[::8] = -0.5
    operator = Operator("it", operator_type, torch.ones(weight), None, (), (), "", Gate(0.0, float("inf")))
    accumulator = Accumulator(operator, RequiredSums())
    z = operator(x)
    accumulator.update((x,), z)
    found = accumulator.moments()
    assert found.open is not None
    for sums, mask in ((found.total, torch.ones_like(z, dtype=torch.bool)), (found.open, z > 0)):
        assert sums.x is not None
        assert sums.xy is not None
        y = z[mask].double()
        assert sums.n.item() == len(y)
        # All weights are 1, so the inputs have the same sum as the outputs.
        for value, expected in ((sums.y, y.sum()), (sums.x, y.sum()), (sums.yy, y @ y), (sums.xy, y @ y)):
            assert value.sum().item() == pytest.approx(float(expected), rel=reach)


def test_a_billion_samples_add_up_exactly_and_one_more_batch_still_counts() -> None:
    case = small()
    part = case.moments()
    many, doublings = part, 32
    for _ in range(doublings):
        many = many + many
    samples = part.total.n * 2**doublings
    assert (samples > 10**9).all()
    assert torch.equal(many.total.n, samples)  # beyond int32 too
    for name, value in many.tensors().items():
        assert torch.equal(value, part.tensors()[name] * 2**doublings), name
    accumulator = Accumulator(case.operator, RequiredSums())
    accumulator._sums = many + zero_moments(case.operator, RequiredSums())  # as if it had accumulated them all
    accumulator.update(case.inputs, case.operator(*case.inputs))
    for more in (many + part, accumulator.moments()):
        for name, value in more.tensors().items():
            added, expected = value - many.tensors()[name], part.tensors()[name]
            # Up to the last digit of the large sum, for each of the terms from which it is computed.
            assert ((added - expected).abs() <= 2**-51 * value.abs()).all(), name
            assert value.is_floating_point() or torch.equal(added, expected)
    for choice in LEARNED:
        few = solve(case.operator, part, choice).patterns
        for row, pattern in solve(case.operator, many, choice).patterns.items():
            torch.testing.assert_close(pattern, few[row], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 5, 7, 2), 1), ((3, 5, 7, 2), -1), ((6, 4), 1), ((4, 6), 0), ((2, 3, 4, 5, 6), 2)],
)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_sums_of_squares_are_those_of_every_axis(shape: Shape, axis: int, is_contiguous: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not is_contiguous:
        values = values.movedim(0, -1).contiguous().movedim(-1, 0)
    expected = [float((part * part).sum()) for part in values.unbind(axis)]
    torch.testing.assert_close(sum_squares(values, axis), torch.tensor(expected, dtype=torch.float64))


def test_sum_of_squares_in_float32_has_many_digits() -> None:
    values = torch.randn(4, 8, 112, 112, generator=torch.Generator().manual_seed(0))
    expected = values.double().square().sum((0, 2, 3))
    assert ((sum_squares(values, 1).double() - expected) / expected).abs().max() < 1e-6
