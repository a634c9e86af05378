"""One harness: every kind of operator, and every choice of estimator, obeys the same laws."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from patterns import CHOICES, ESTIMATORS, Moments, solve
from patterns.estimation.estimators import RIDGE, required_sums
from patterns.moments.moments import Accumulator, moments_bytes, zero_moments
from patterns.operators.operator import OPERATOR_TYPES
from tests import oracles
from tests.oracles import Neuron
from tests.patterns.cases import FIXED, Case, fixed

# --- closed forms of a neuron's pattern, over samples written out -------------------------------------

SEED = 3


def filter_(case: Case, k: int) -> np.ndarray:
    w = case.weight[k].flatten().numpy()
    return w / (w @ w)


def random(case: Case, k: int) -> np.ndarray:
    w = case.weight[k].flatten()
    seed = int.from_bytes(hashlib.sha256(f"{SEED}/it".encode()).digest()[:7], "big")
    shape = len(case.weight), len(w)
    u = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[k]
    return (u / (u @ w)).numpy()


def linear(case: Case, k: int) -> np.ndarray:
    return oracles.regressed(case.neurons[k].x.numpy(), case.neurons[k].y.numpy())


def two_component(which: str, case: Case, k: int) -> np.ndarray:
    return oracles.two_component(case.neurons[k], case.weight[k], which)


def own_mean(which: str, case: Case, k: int) -> np.ndarray:
    return oracles.regressed(*oracles.side(case.neurons[k], which))


def multivariate(case: Case, k: int) -> np.ndarray:
    size = len(case.groups[0])
    live = [i for i in range(k - k % size, k - k % size + size) if tells(case.neurons[i])]
    a = oracles.multivariate([case.neurons[i] for i in live], RIDGE)
    return a[live.index(k)] / case.seeing[k].numpy()


CLOSED_FORMS: dict[str, Callable[[Case, int], np.ndarray]] = {
    "filter": filter_,
    "random": random,
    "linear": linear,
    "positive": partial(two_component, "open"),
    "negative": partial(two_component, "closed"),
    "positive-own-mean": partial(own_mean, "open"),
    "negative-own-mean": partial(own_mean, "closed"),
    "multivariate": multivariate,
}


def tells(neuron: Neuron) -> bool:
    """Neither dead nor constant."""
    return bool(neuron.open.any() and neuron.y.std() > 0)


def live(row: str, neuron: Neuron) -> bool:
    """Whether there is anything to make a pattern from."""
    if not ESTIMATORS[row].uses_data:
        return bool(neuron.y.any())
    return tells(neuron) and not (row.startswith("negative") and bool(neuron.open.all()))


# --- the harness --------------------------------------------------------------------------------------

case_of = cache(fixed)
# Every case with a ReLU, and without a gate or with the other by turns; `default` has no estimator of its own.
BESIDES = dict(zip(FIXED, ("none", "relu6") * len(FIXED)))
SAMPLES = [
    (name, gate, choice)
    for name in FIXED
    for gate in ("relu", BESIDES[name])
    for choice in CHOICES
    if choice != "default"
]
every = pytest.mark.parametrize(("name", "gate", "choice"), SAMPLES, ids=["/".join(sample) for sample in SAMPLES])


def moments_of(case: Case, choice: str, images: slice = slice(None)) -> Moments:
    """The sums that this choice asks for, over some images."""
    return case.moments(required_sums(case.operator, choice), tuple(x[images] for x in case.inputs))


def patterns_of(case: Case, moments: Moments, choice: str) -> dict[str, Tensor]:
    return {name: p.flatten(1) for name, p in solve(case.operator, moments, choice, SEED).patterns.items()}


def copied(moments: Moments) -> Moments:
    return Moments.from_tensors({name: t.clone() for name, t in moments.tensors().items()})


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Relative to the largest of the tensor: a sum that cancels is as exact as what it is a sum of."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * max(float(expected.abs().max()), 1e-300))


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert_close(a[name], b[name], rtol)


def test_every_kind_and_every_estimator_goes_through_the_harness() -> None:
    assert {type(case().operator_type) for case in FIXED.values()} == set(OPERATOR_TYPES.values())
    rows = {row for gated, free in CHOICES.values() for row in (*gated, *free)}
    assert rows == ESTIMATORS.keys() == CLOSED_FORMS.keys()


@every
def test_patterns_equal_their_closed_form_over_samples_written_out(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    found = patterns_of(case, moments_of(case, choice), choice)
    assert tuple(found) == CHOICES[choice][gate == "none"]
    for row, pattern in found.items():
        assert pattern.dtype == torch.float64
        assert pattern.shape == case.weight.flatten(1).shape
        for k, neuron in enumerate(case.neurons):
            if live(row, neuron):
                assert_close(pattern[k], torch.from_numpy(CLOSED_FORMS[row](case, k)), 1e-9)
            else:
                assert (pattern[k] == 0).all()


@every
def test_patterns_meet_their_weights_in_one(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    for row, pattern in patterns_of(case, moments_of(case, choice), choice).items():
        some = torch.tensor([live(row, neuron) for neuron in case.neurons])
        weight = case.weight.flatten(1)
        if row != "multivariate":
            ones = torch.ones(int(some.sum()), dtype=torch.float64)
            torch.testing.assert_close((weight * pattern).sum(1)[some], ones, rtol=0, atol=1e-12)
            continue
        # WᵀA = I up to the ridge, where the outputs of a group are independent; A before its division.
        size = len(case.groups[0])
        for group, tell, w, a in zip(case.groups, *(t.split(size) for t in (some, weight, pattern * case.seeing))):
            y = torch.stack([neuron.y for neuron in group])[tell]
            if len(y) <= w.shape[1]:
                least = torch.linalg.eigvalsh(torch.atleast_2d(y.corrcoef()))[0]
                reach = float(RIDGE / least * y.std(1).max() / y.std(1).min())
                torch.testing.assert_close(w[tell] @ a[tell].T, torch.eye(len(y)).double(), rtol=0, atol=1.01 * reach)


@every
@given(st.randoms(use_true_random=False))
@settings(max_examples=3, derandomize=True, deadline=None)
def test_any_split_of_the_samples_in_any_merge_tree_gives_the_same(
    name: str, gate: str, choice: str, random: Random
) -> None:
    case = case_of(name, gate)
    images = list(range(len(case.inputs[0])))
    random.shuffle(images)
    cuts = [0, *sorted(random.sample(range(1, len(images)), random.randrange(min(5, len(images))))), len(images)]
    accumulator, parts = Accumulator(case.operator, required_sums(case.operator, choice)), []
    for start, stop in pairwise(cuts):
        batch = tuple(x[images[start:stop]] for x in case.inputs)
        accumulator.update(batch, case.operator(*batch))
        parts.append(case.moments(required_sums(case.operator, choice), batch))
    random.shuffle(parts)
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    whole = moments_of(case, choice)
    for found in (accumulator.moments(), parts[0]):
        assert_same(found.tensors(), whole.tensors(), 1e-13)
        assert_same(patterns_of(case, found, choice), patterns_of(case, whole, choice), 1e-9)


@every
def test_merging_commutes_and_associates_to_the_last_rounding(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    a, b, c = (moments_of(case, choice, images) for images in (slice(0, 2), slice(2, 6), slice(6, None)))
    assert_same((a + b).tensors(), (b + a).tensors(), 0.0)
    left, right = ((a + b) + c).tensors(), (a + (b + c)).tensors()
    for field, value in left.items():
        # Each of the four additions rounds by at most half the last digit of what it adds.
        sizes = sum(m.tensors()[field].abs() for m in (a, b, c))
        assert ((value - right[field]).abs() <= 2**-51 * sizes).all(), field


@every
def test_an_empty_side_is_neutral_left_and_right(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    a, nothing = moments_of(case, choice), zero_moments(case.operator, required_sums(case.operator, choice))
    assert_same((a + nothing).tensors(), a.tensors(), 0.0)
    assert_same((nothing + a).tensors(), a.tensors(), 0.0)
    assert_same(moments_of(case, choice, slice(0)).tensors(), nothing.tensors(), 0.0)
    assert nothing.nbytes == moments_bytes(case.operator, required_sums(case.operator, choice)) == a.nbytes
    for row, pattern in patterns_of(case, nothing, choice).items():
        assert not ESTIMATORS[row].uses_data or (pattern == 0).all()


@every
def test_merging_and_solving_change_none_of_their_inputs(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    nothing = zero_moments(case.operator, required_sums(case.operator, choice))
    sides = moments_of(case, choice, slice(0, 3)), moments_of(case, choice, slice(3, None)), nothing
    kept = [copied(side) for side in sides]
    for a, b in ((0, 1), (0, 2), (2, 0)):
        merged = sides[a] + sides[b]
        solve(case.operator, merged, choice)
        for value in merged.tensors().values():
            value.zero_()
    for side, before in zip(sides, kept):
        solve(case.operator, side, choice)
        assert_same(side.tensors(), before.tensors(), 0.0)


@every
def test_saved_moments_load_to_the_last_digit_and_only_under_their_own_names(name: str, gate: str, choice: str) -> None:
    case = case_of(name, gate)
    moments = moments_of(case, choice)
    named = load(save(moments.tensors()))
    assert_same(Moments.from_tensors(named).tensors(), moments.tensors(), 0.0)
    for row, pattern in patterns_of(case, Moments.from_tensors(named), choice).items():
        assert torch.equal(pattern, patterns_of(case, moments, choice)[row])
    with pytest.raises(ValueError, match=r"no sums of these names: total\.z"):
        Moments.from_tensors({**named, "total.z": named["total.y"]})
    for field in named:
        rest = {other: t for other, t in named.items() if other != field}
        with pytest.raises(KeyError, match=field):
            Moments.from_tensors(rest)


@every
def test_neurons_solved_in_blocks_have_the_same_patterns(
    name: str, gate: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name, gate)
    moments = moments_of(case, choice)
    whole = solve(case.operator, moments, choice)
    for block in (1, 20, 60):
        monkeypatch.setattr("patterns.estimation.estimators.BLOCK_ELEMENTS", block)
        parted = solve(case.operator, moments, choice)
        assert parted.flags == whole.flags
        for row, pattern in whole.patterns.items():
            torch.testing.assert_close(parted.patterns[row], pattern, rtol=1e-12, atol=1e-13)
