"""The moments with Σxxᵀ, over all patches and over sampled patches."""

from itertools import product

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import UserError, accumulate, trace
from patterns.estimation.observer import PatchObserver
from patterns.moments.gram import PatchAccumulator, PatchMoments, patch_moments_bytes, zero_patch_moments
from patterns.moments.moments import TOKENS
from patterns.moments.position_sampling import STEP, PositionSampler, draw_uniform, mix
from patterns.operators import operator
from tests.oracles import Neuron, window_patches
from tests.patterns.gram import ALL, CASES, SCALES, drawn

TYPES = CASES | SCALES
every_operator_type = pytest.mark.parametrize("name", TYPES)


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


@every_operator_type
def test_gram_moments_equal_sums_over_all_unfolded_patches(name: str) -> None:
    case = TYPES[name]()
    inputs = case.inputs(4, 1)
    found = case.moments(inputs)
    assert {t.dtype for t in found.tensors().values()} == {torch.float64, torch.int64}
    assert_sums(found, case.neurons(inputs))


@pytest.mark.parametrize("name", [name for name in TYPES if name != "linear"])
@pytest.mark.parametrize("positions", [1, 3])
def test_sampled_sums_are_those_of_the_drawn_positions_alone(name: str, positions: int) -> None:
    case = TYPES[name]()
    inputs = case.inputs(5, 1)
    found = case.moments(inputs, positions, seed=7)
    z = case.operator(*inputs)
    available = z[0].numel() // case.operator.neurons
    taken = drawn(torch.arange(5), "it", available, positions, seed=7)
    rows = [image * available + int(p) for image, own in enumerate(taken) for p in own]
    assert found.moments.total.n.tolist() == [5 * positions] * case.operator.neurons
    assert_sums(found, [Neuron(n.x[rows], n.y[rows], n.open[rows]) for n in case.neurons(inputs)])


@pytest.mark.parametrize(("available", "positions"), [(12, 4), (13, 5), (49, 16), (7, 6), (5, 1)])
def test_each_position_is_sampled_equally_often_and_at_most_once_per_image(available: int, positions: int) -> None:
    images = 6000
    taken = drawn(torch.arange(images), "it", available, positions)
    assert taken.shape == (images, positions)
    assert (taken.sort(1).values.diff(dim=1) > 0).all()
    counts = taken.flatten().bincount(minlength=available)
    share = positions / available
    deviation = (images * share * (1 - share)) ** 0.5
    assert ((counts - images * share).abs() < 4 * deviation).all()


@pytest.mark.parametrize("positions", [12, 13])
def test_all_positions_are_taken_if_an_image_has_no_more(positions: int) -> None:
    assert drawn(torch.arange(2), "it", 12, positions).tolist() == [list(range(12))] * 2


def test_sampled_positions_depend_only_on_seed_operator_call_and_image() -> None:
    images = torch.tensor([3, 8, -5])
    arguments = list(product(("a", "b"), (1000,), (5,), (0, 1), (0, 1)))
    draws = [drawn(images, *one) for one in arguments]
    assert len({tuple(row) for d in draws for row in d.tolist()}) == len(arguments) * len(images)
    for taken, one in zip(draws, arguments):
        for image, row in zip(images, taken):
            assert torch.equal(drawn(image[None], *one)[0], row)


def test_sampling_for_all_calls_at_once_equals_sampling_one_by_one() -> None:
    draw, calls = PositionSampler(5), [("a", 1000), ("b", 77), ("a", 9), ("c", 5), ("b", 77)]
    for seeds in (torch.tensor([3, 8, -5]), torch.tensor([4]), torch.tensor([3, 8])):
        draw.start_pass(seeds)
        seen: list[str] = []
        for name, available in calls:
            assert torch.equal(draw.sample(name, available), drawn(seeds, name, available, 5, call=seen.count(name)))
            seen.append(name)


def test_numbers_are_uniform_and_independent_and_those_of_splitmix64() -> None:
    numbers = draw_uniform(torch.arange(2000), torch.tensor([5]), 50)[0]
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * (5000 * 0.95) ** 0.5).all()
    between = torch.corrcoef(numbers.T) - torch.eye(50)
    assert between.abs().max() < 6 * 2000**-0.5
    along = torch.corrcoef(numbers[:200]) - torch.eye(200)
    assert along.abs().max() < 6 * 50**-0.5
    # The published first outputs of splitmix64 from seed 1234567.
    states = torch.tensor(1234567) + torch.tensor([1, 2]) * STEP
    assert [value % 2**64 for value in mix(states).tolist()] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("positions", [0, -1])
def test_no_positions_are_rejected(positions: int) -> None:
    with pytest.raises(UserError, match=f"{positions} is not a number") as caught:
        PositionSampler(positions)
    assert (caught.value.where, caught.value.parameter) == ("", "positions")


def assert_same(a: PatchMoments, b: PatchMoments, rtol: float = 0.0) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=0.0)


def test_the_gram_moments_of_every_type_of_operator_are_tested() -> None:
    assert {type(case().operator.operator_type) for case in TYPES.values()} == set(operator.OPERATOR_TYPES.values())


@every_operator_type
def test_gram_moments_are_a_commutative_monoid(name: str) -> None:
    case = TYPES[name]()
    inputs = case.inputs(7, 1)
    a, b, c = (case.moments(part) for part in zip(*(x.split([2, 4, 1]) for x in inputs)))
    nothing = zero_patch_moments(case.operator)
    assert_same(a + b, b + a)
    assert_same((a + b) + c, a + (b + c), rtol=1e-11)
    assert_same(a + nothing, a)
    assert_same(nothing + a, a)
    assert_same(a + b + c, case.moments(inputs), rtol=1e-11)
    kept = {name: t.clone() for name, t in a.tensors().items()}
    for t in (a + b).tensors().values():
        t.zero_()
    assert_same(a, PatchMoments.from_tensors(kept))
    assert PatchMoments.from_tensors(a.tensors()).nbytes == patch_moments_bytes(case.operator)


@every_operator_type
def test_saved_gram_moments_load_exactly_and_only_under_their_own_names(name: str) -> None:
    case = TYPES[name]()
    moments = case.moments(case.inputs(4, 1))
    named = load(save(moments.tensors()))
    assert_same(PatchMoments.from_tensors(named), moments)
    with pytest.raises(ValueError, match=r"total\.z"):
        PatchMoments.from_tensors({**named, "total.z": named["total.y"]})
    for field in named:
        with pytest.raises(KeyError, match=field):
            PatchMoments.from_tensors({other: t for other, t in named.items() if other != field})


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [0, 7]])
def test_images_give_the_same_sums_in_any_order_and_batches(cuts: list[int]) -> None:
    case = CASES["conv2d"]()
    (x,), seeds = case.inputs(7, 1), torch.arange(7) * 5
    draws = PositionSampler(3), PositionSampler(3)
    whole, cut = (PatchAccumulator(case.operator, draw) for draw in draws)
    draws[0].start_pass(seeds)
    whole.update((x,), case.operator(x))
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    for part, seed in zip(x[order].split(cuts), seeds[order].split(cuts)):
        draws[1].start_pass(seed)
        cut.update((part,), case.operator(part))
    assert_same(cut.moments(), whole.moments(), rtol=1e-11)


class Twice(nn.Module):
    """One layer called at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x))[:, :, ::2]).flatten(1)


@pytest.mark.full
@pytest.mark.parametrize("cuts", [[2, 2, 2], [1, 0, 5]])
def test_a_layer_that_is_called_twice_samples_the_same_positions_in_any_batches(cuts: list[int]) -> None:
    torch.manual_seed(0)
    model = Twice().double().requires_grad_(False)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    network = trace(model, x[:1])
    whole, cut = (PatchObserver(network, ["layer"], 3, seed=7) for _ in range(2))
    whole.update(x)
    for part in x.split(cuts):
        cut.update(part)
    assert_same(cut.moments()["layer"], whole.moments()["layer"], rtol=1e-11)
    # Other positions at each call.
    first = window_patches(x, (3, 3), (1, 1), (1, 1), (1, 1))[0].unflatten(0, (6, -1))
    middle = model.layer(x).relu()[:, :, ::2]
    second = window_patches(middle, (3, 3), (1, 1), (1, 1), (1, 1))[0].unflatten(0, (6, -1))
    images = torch.arange(6)[:, None]
    taken = [
        patches[images, drawn(torch.arange(6), "layer", patches.shape[1], 3, 7, call)].flatten(0, 1)
        for call, patches in enumerate((first, second))
    ]
    rows = torch.cat(taken)
    torch.testing.assert_close(whole.moments()["layer"].xx[0], rows.mT @ rows, rtol=1e-10, atol=1e-10)


def test_patches_written_out_in_chunks_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["grouped"]()
    inputs = case.inputs(7, 1)
    whole = case.moments(inputs, 2)
    monkeypatch.setattr("patterns.moments.gram.PATCH_ELEMENTS", 40)
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


@pytest.mark.full
def test_selected_operators_are_observed_with_the_inputs_of_the_model() -> None:
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
        left, right = found[name].moments.tensors(), expected[name].tensors()
        assert left.keys() == right.keys() - set(TOKENS)
        for field in left:
            torch.testing.assert_close(left[field], right[field], rtol=1e-9, atol=1e-9)
    one = PatchObserver(network, ["branch"], 2, seed=1)
    one.update(x)
    assert list(one.moments()) == ["branch"]
    assert one.moments()["branch"].moments.total.n.tolist() == [12] * 4
    one.reset()
    assert_same(one.moments()["branch"], zero_patch_moments(network.operators["branch"]))
    with pytest.raises(KeyError):
        PatchObserver(network, ["nowhere"], 2)
