from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate, Moments, Operator, Sums, accumulate, solve, trace
from patterns.moments import Accumulator, Wanted, planned_bytes, zero
from patterns.operators import Addition, AveragePool, Convolution, Kind, Linear, Scale
from tests.oracles import Neuron, channel_patches, linear_patches, neurons, window_patches

GATES = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0), "none": None}
REACH = {torch.float32: 1e-5, torch.float64: 1e-10}
cases = settings(max_examples=40, derandomize=True, deadline=None)


@dataclass(frozen=True)
class Case:
    operator: Operator
    inputs: tuple[Tensor, ...]
    patches: list[Tensor]
    limits: tuple[float, float] | None

    @property
    def neurons(self) -> list[Neuron]:
        return neurons(self.patches, self.operator.weight, self.operator.bias, self.limits)

    def moments(self, inputs: tuple[Tensor, ...] | None = None) -> Moments:
        inputs = self.inputs if inputs is None else inputs
        accumulator = Accumulator(self.operator, Wanted())
        accumulator.update(inputs, self.operator(*inputs))
        return accumulator.moments()


@dataclass(frozen=True)
class Numbers:
    """A case's random numbers. On a grid every output is exact, and many stand just on a gate's limits."""

    generator: torch.Generator
    dtype: torch.dtype
    grid: bool

    def __call__(self, *shape: int, shift: float = 0.0) -> Tensor:
        if self.grid:
            return torch.randint(-4, 5, shape, generator=self.generator).to(self.dtype) / 2
        return torch.randn(shape, generator=self.generator, dtype=self.dtype) + shift


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return Numbers(generator, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.booleans()))


def case(
    draw: st.DrawFn, random: Numbers, kind: Kind, weight: Tensor, inputs: tuple[Tensor, ...], patches: list[Tensor]
) -> Case:
    biased = isinstance(kind, Convolution | Linear | Scale) and draw(st.booleans())
    bias = random(len(weight)) if biased else None
    limits = GATES[draw(st.sampled_from(sorted(GATES)))]
    gate = None if limits is None else Gate(*limits)
    return Case(Operator("it", kind, weight, bias, (), (), "", gate), inputs, patches, limits)


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    random = draw(numbers())
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = each(0, 2)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    sizes = [max(1, span - 2 * p) + draw(st.integers(0, 3)) for span, p in zip(spans, padding)]
    groups, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    x = random(draw(st.integers(1, 3)), groups * inner, *sizes, shift=0.5)
    weight = random(groups * outer, inner, *kernel)
    patches = window_patches(x, kernel, stride, padding, dilation, groups)
    return case(draw, random, Convolution(stride, padding, dilation, groups), weight, (x,), patches)


@st.composite
def linears(draw: st.DrawFn) -> Case:
    random = draw(numbers())
    k, d = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    x = random(*leading, d, shift=0.5)
    return case(draw, random, Linear(), random(k, d), (x,), linear_patches(x))


@st.composite
def channelwise(draw: st.DrawFn) -> Case:
    """Batch norm, addition and average pooling."""
    random = draw(numbers())
    dims = draw(st.integers(1, 3))
    n, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = tuple(draw(st.integers(4, 5)) for _ in range(dims))
    x = random(n, k, *sizes, shift=0.5)
    kind = draw(st.sampled_from(["scale", "addition", "average_pool"]))
    if kind == "scale":
        return case(draw, random, Scale(), random(k, 1), (x,), channel_patches(x))
    if kind == "addition":
        other, alpha = random(n, k, *sizes), draw(st.sampled_from([1.0, 0.5]))
        weight = torch.tensor([[1.0, alpha]], dtype=x.dtype).repeat(k, 1)
        return case(draw, random, Addition((1.0, alpha)), weight, (x, other), channel_patches(x, other))
    kernel = tuple(draw(st.sampled_from([2, 4])) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    weight = torch.full((k, 1, *kernel), 1 / torch.tensor(kernel).prod().item(), dtype=x.dtype)
    patches = window_patches(x, kernel, stride, padding, (1,) * dims, k)
    return case(draw, random, AveragePool(kernel, stride, padding), weight, (x,), patches)


def undisputed(case: Case) -> bool:
    """No output so near a limit of its gate that float32 may see it on the other side; just on it is fine."""
    if case.limits is None or case.operator.weight.dtype == torch.float64:
        return True
    biases = [0.0] * len(case.neurons) if case.operator.bias is None else case.operator.bias.tolist()
    z = torch.stack([neuron.y + bias for neuron, bias in zip(case.neurons, biases)])
    far = [(z - limit).abs() for limit in case.limits]
    return not any(((d > 0) & (d < 1e-5)).any() for d in far)


def rows(sums: Sums, k: int) -> list[dict[str, Tensor]]:
    """The sums of each neuron."""
    assert sums.x is not None
    assert sums.xy is not None
    x = sums.x.repeat_interleave(k // len(sums.x), 0)
    names = ("n", "y", "yy", "x", "xy")
    return [dict(zip(names, row)) for row in zip(sums.n, sums.y, sums.yy, x, sums.xy)]


def assert_equal_sums(found: Sums, expected: list[dict[str, Tensor]], magnitude: list[Neuron], reach: float) -> None:
    """Relative for each neuron; a sum that cancels is measured against the values that it is a sum of."""
    for row, truth, neuron in zip(rows(found, len(expected)), expected, magnitude):
        assert row["n"] == truth["n"]
        scales = {"y": neuron.y.norm(), "yy": 0.0, "x": neuron.x.norm(), "xy": 0.0}
        for field, scale in scales.items():
            assert (row[field] - truth[field]).norm() <= reach * max(truth[field].norm(), scale), field


def assert_brute_force(case: Case) -> None:
    assume(undisputed(case))
    found, truth = case.moments(), case.neurons
    reach = REACH[case.operator.weight.dtype]
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
                scale = max(float(whole[field].double().norm()), float(neuron.x.norm()), float(neuron.y.norm()))
                assert (row[field] - expected[field]).double().norm() <= reach * scale, field


@given(convolutions())
@cases
def test_moments_of_convolutions_equal_sums_over_unfolded_patches(case: Case) -> None:
    assert_brute_force(case)


@given(linears())
@cases
def test_moments_of_linear_layers_equal_sums_over_their_vectors(case: Case) -> None:
    assert_brute_force(case)


@given(channelwise())
@cases
def test_moments_of_scales_additions_and_average_pools_equal_brute_force(case: Case) -> None:
    assert_brute_force(case)


@given(st.one_of(convolutions(), linears(), channelwise()))
@cases
def test_an_operator_is_its_weight_times_its_patches_plus_bias(case: Case) -> None:
    op = case.operator
    z = op(*case.inputs).movedim(op.kind.axis, 0).flatten(1).double()
    bias = torch.zeros(op.neurons) if op.bias is None else op.bias.double()
    for k, neuron in enumerate(case.neurons):
        truth = neuron.y + bias[k]
        assert (z[k] - truth).abs().max() <= 1e-5 * (1 + truth.abs().max())


@given(st.one_of(convolutions(), linears(), channelwise()))
@cases
def test_input_gradient_is_the_transpose_of_the_forward(case: Case) -> None:
    op = case.operator
    inputs = tuple(x.double().requires_grad_() for x in case.inputs)
    weight = op.weight.double() * 2 - 0.3 if not isinstance(op.kind, Addition | AveragePool) else op.weight.double()
    z = op.kind.forward(inputs, weight, None)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.autograd.grad(z, inputs, grad)
    found = op.kind.input_gradient(grad, weight, tuple(tuple(x.shape) for x in inputs))
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("high", "expected"), [(float("inf"), 4), (6.0, 2)])
def test_a_gate_is_closed_just_on_its_limits(high: float, expected: int) -> None:
    z = torch.tensor([[-1.0], [0.0], [1e-30], [3.0], [6.0], [7.0]])
    operator = Operator("it", Linear(), torch.ones(1, 1), None, (), (), "", Gate(0.0, high))
    accumulator = Accumulator(operator, Wanted())
    accumulator.update((z,), operator(z))
    opened = accumulator.moments().open
    assert opened is not None
    assert opened.n.tolist() == [expected]
    assert opened.y.item() == pytest.approx(sum(v for v in z.flatten().tolist() if 0 < v < high), rel=1e-7)


class Sample(nn.Module):
    """Every kind of operator, with and without a gate."""

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


def test_a_network_feeds_each_operator_what_the_model_computes_there() -> None:
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
    relu, relu6 = GATES["relu"], GATES["relu6"]
    ninth, average = torch.full((4, 9), 1 / 9), torch.full((4, 4), 1 / 4)
    expected = {
        "stem": neurons(window_patches(x, (3, 3), (2, 2), (1, 1), (1, 1)), model.stem.weight, model.stem.bias, relu6),
        "branch": neurons(window_patches(a, (3, 1), (1, 1), (1, 0), (1, 1), 2), model.branch.weight, None, None),
        "addition.0": neurons(channel_patches(a, branch), torch.ones(4, 2), None, None),
        "norm": neurons(channel_patches(both), scale[:, None], shift, relu),
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
    torch.manual_seed(1)
    x = torch.randn(7, 4, 5, 6, dtype=torch.float64) + 0.3
    kind = Convolution((2, 1), (1, 0), (1, 1), 2)
    weight = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    operator = Operator("it", kind, weight, torch.randn(6, dtype=torch.float64), (), (), "", Gate(0.0, float("inf")))
    return Case(operator, (x,), window_patches(x, (3, 2), (2, 1), (1, 0), (1, 1), 2), GATES["relu"])


def parts_of(case: Case, *sizes: int) -> list[Moments]:
    return [case.moments((x,)) for x in case.inputs[0].split(list(sizes))]


def assert_same(a: Moments, b: Moments, rtol: float = 0.0) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=0.0)


def test_a_neuron_that_never_closes_has_exactly_no_closed_sums() -> None:
    case = small()
    assert case.operator.bias is not None
    case.operator.bias[2] = 100.0
    closed = case.moments().closed
    assert closed.x is not None
    assert closed.xy is not None
    assert (closed.n == 0).tolist() == [False, False, True, False, False, False]
    for field in (closed.y, closed.yy, closed.x, closed.xy):
        assert (field.view(6, -1) == 0).all(1).tolist() == (closed.n == 0).tolist()


def test_merging_commutes() -> None:
    a, b = parts_of(small(), 3, 4)
    assert_same(a + b, b + a)


def test_merging_is_associative() -> None:
    a, b, c = parts_of(small(), 2, 4, 1)
    assert_same((a + b) + c, a + (b + c), rtol=1e-12)


def test_no_samples_are_neutral_on_either_side() -> None:
    case = small()
    a, nothing = case.moments(), zero(case.operator, Wanted())
    assert_same(a + nothing, a)
    assert_same(nothing + a, a)


def test_merging_leaves_its_inputs_as_they_were() -> None:
    a, b = parts_of(small(), 3, 4)
    before = [{k: v.clone() for k, v in m.tensors().items()} for m in (a, b)]
    merged = a + b
    for value in merged.tensors().values():
        value.zero_()
    for m, kept in zip((a, b), before):
        assert_same(m, Moments.from_tensors(kept))


def test_moments_handed_out_do_not_change_with_later_batches() -> None:
    case = small()
    accumulator = Accumulator(case.operator, Wanted())
    accumulator.update(case.inputs, case.operator(*case.inputs))
    first = accumulator.moments()
    kept = Moments.from_tensors({k: v.clone() for k, v in first.tensors().items()})
    accumulator.update(case.inputs, case.operator(*case.inputs))
    assert_same(first, kept)
    assert_same(accumulator.moments(), kept + kept, rtol=1e-12)
    accumulator.reset()
    assert_same(accumulator.moments(), zero(case.operator, Wanted()))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7), st.booleans())
@cases
def test_any_split_of_a_batch_gives_the_same_sums(sizes: list[int], merged: bool) -> None:
    case = small()
    (x,) = case.inputs
    batches = x.split([*sizes, len(x) - sum(sizes)]) if sum(sizes) <= len(x) else x.split(sizes[0])
    accumulator, total = Accumulator(case.operator, Wanted()), zero(case.operator, Wanted())
    for batch in batches:
        accumulator.update((batch,), case.operator(batch))
        total = total + case.moments((batch,))
    assert_same(total if merged else accumulator.moments(), case.moments(), rtol=1e-11)


def test_an_empty_batch_adds_nothing() -> None:
    case = small()
    assert_same(case.moments((case.inputs[0][:0],)), zero(case.operator, Wanted()))


def test_moments_with_and_without_a_gate_do_not_merge() -> None:
    gated = small()
    free = small()
    free.operator.gate = None
    with pytest.raises(ValueError, match="one side has a gate, the other has not"):
        gated.moments() + free.moments()


def test_sums_that_are_not_wanted_are_not_taken_and_change_no_others() -> None:
    case = small()
    accumulator = Accumulator(case.operator, Wanted(total=False, open=True))
    accumulator.update(case.inputs, case.operator(*case.inputs))
    partial, whole = accumulator.moments().tensors(), case.moments().tensors()
    assert whole.keys() - partial.keys() == {"total.x", "total.xy"}
    for name, value in partial.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_the_planned_bytes_are_those_held(total: bool, opened: bool, gated: bool) -> None:
    operator, wanted = small().operator, Wanted(total, opened)
    operator.gate = operator.gate if gated else None
    assert planned_bytes(operator, wanted) == zero(operator, wanted).nbytes


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: nn.Conv2d(3, 6, 3, groups=3)])
def test_activations_far_from_zero_keep_their_patterns_in_float32(make: Callable[[], nn.Conv2d]) -> None:
    torch.manual_seed(2)
    layer = make()
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(2)) + 30
    solved = []
    for dtype in (torch.float32, torch.float64):
        network = trace(layer.to(dtype), x[:1].to(dtype))
        moments = accumulate(network, [batch.to(dtype) for batch in x.split(4)])
        (operator,) = network.operators.values()
        solved.append(solve(operator, moments[operator.name], ["linear"]).patterns["linear"].double().flatten(1))
    error = (solved[0] - solved[1]).norm(dim=1) / solved[1].norm(dim=1)
    assert error.max() < 1e-4


def test_more_samples_in_a_batch_than_float32_can_count_are_counted_exactly() -> None:
    count = 2**24 + 3
    operator = Operator("it", Scale(), torch.ones(1, 1), None, (), (), "", Gate(0.0, float("inf")))
    x = torch.ones(1, 1, count + 2)
    x[..., :2] = -1
    accumulator = Accumulator(operator, Wanted(total=False, open=False))
    with torch.no_grad():
        accumulator.update((x,), operator(x))
        accumulator.update((x[..., :5],), operator(x[..., :5]))
    moments = accumulator.moments()
    assert moments.open is not None
    assert moments.total.n.tolist() == [count + 2 + 5]
    assert moments.open.n.tolist() == [count + 3]
    assert moments.open.y.item() == pytest.approx(count + 3, rel=1e-6)


def test_counts_beyond_float32_add_up_exactly() -> None:
    n = torch.tensor([2**24 + 1])
    sums = Sums(n, torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    total = Moments(sums) + Moments(sums) + Moments(sums)
    assert total.total.n.tolist() == [3 * (2**24 + 1)]
