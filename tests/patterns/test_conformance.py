"""One harness: every operator type and every estimator obeys the same laws.

Each law runs once per case, with all estimators, and a failure names the estimator.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from patterns.attribution.zennit_methods import equivalent_layer
from patterns.estimation.estimators import RIDGE, required_sums
from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import RequiredSums, moments_bytes, zero_moments
from patterns.operators.operator import OPERATOR_TYPES
from tests import oracles
from tests.oracles import Neuron
from tests.patterns.cases import FIXED, Case, fixed

# --- closed forms of a neuron's pattern, from its samples ---------------------------------------------

SEED = 3


def filter_(case: Case, k: int) -> np.ndarray:
    w = case.weight[k].flatten().numpy()
    return w / (w @ w)


def linear(case: Case, k: int) -> np.ndarray:
    return oracles.regressed(case.neurons[k].x.numpy(), case.neurons[k].y.numpy())


def two_component(side: str, case: Case, k: int) -> np.ndarray:
    return oracles.two_component(case.neurons[k], case.weight[k], side)


def own_mean(side: str, case: Case, k: int) -> np.ndarray:
    return oracles.regressed(*oracles.side(case.neurons[k], side))


def multivariate(case: Case, k: int) -> np.ndarray:
    size = len(case.groups[0])
    group = range(k - k % size, k - k % size + size)
    informative = [i for i in group if is_informative(case.neurons[i])]
    a = oracles.multivariate([case.neurons[i] for i in informative], RIDGE)
    return a[informative.index(k)] / case.seeing[k].numpy()


# `random` has none: see test_estimators.
CLOSED_FORMS: dict[str, Callable[[Case, int], np.ndarray]] = {
    "filter": filter_,
    "linear": linear,
    "positive": partial(two_component, "open"),
    "negative": partial(two_component, "closed"),
    "positive-own-mean": partial(own_mean, "open"),
    "negative-own-mean": partial(own_mean, "closed"),
    "multivariate": multivariate,
}


def is_informative(neuron: Neuron) -> bool:
    """Neither dead nor constant."""
    return bool(neuron.open.any() and neuron.y.std() > 0)


def has_pattern(row: str, neuron: Neuron) -> bool:
    if not ESTIMATORS[row].uses_data:
        return bool(neuron.y.any())
    return is_informative(neuron) and not (row.startswith("negative") and bool(neuron.open.all()))


# --- the harness --------------------------------------------------------------------------------------

case_of = cache(fixed)
# Every case with a ReLU, and alternately without a gate or with a ReLU6.
SECOND_GATE = dict(zip(FIXED, ("none", "relu6") * len(FIXED)))
CASES = [(name, gate) for name in FIXED for gate in ("relu", SECOND_GATE[name])]
every_case = pytest.mark.parametrize(("name", "gate"), CASES, ids=["/".join(case) for case in CASES])
NAMES = [name for name in CHOICES if name != "default"]  # `default` has no estimators of its own


@contextmanager
def naming(*estimators: str) -> Iterator[None]:
    """Name the estimators in the report of a failure."""
    try:
        yield
    except Exception as error:
        error.add_note(f"estimators: {', '.join(estimators)}")
        raise


def by_sums(case: Case) -> dict[RequiredSums, list[str]]:
    """Return the choices by the sums that they require."""
    groups: dict[RequiredSums, list[str]] = {}
    for choice in NAMES:
        groups.setdefault(required_sums(case.operator, choice), []).append(choice)
    assert sorted(choice for choices in groups.values() for choice in choices) == sorted(NAMES)
    return groups


def moments_of(case: Case, required: RequiredSums, images: slice = slice(None)) -> Moments:
    return case.moments(required, tuple(x[images] for x in case.inputs))


def patterns_of(case: Case, moments: Moments, choices: list[str]) -> dict[str, Tensor]:
    """Solve for each choice by itself; the patterns by choice and estimator."""
    found = {}
    for choice in choices:
        with naming(choice):
            solution = solve(case.operator, moments, choice, SEED)
            assert tuple(solution.patterns) == CHOICES[choice][case.gate is None]
            found.update({f"{choice}/{row}": p.flatten(1) for row, p in solution.patterns.items()})
    return found


def for_all_estimators(law: Callable[[Case, RequiredSums, list[str]], None]) -> Callable[[str, str], None]:
    """Make a test of every case from a law for the estimators that require the same sums."""

    @every_case
    def test(name: str, gate: str) -> None:
        case = case_of(name, gate)
        for required, choices in by_sums(case).items():
            with naming(*choices):
                law(case, required, choices)

    return test


def copy_moments(moments: Moments) -> Moments:
    return Moments.from_tensors({name: t.clone() for name, t in moments.tensors().items()})


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Relative to the largest value: a sum that cancels is as exact as its terms."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * max(float(expected.abs().max()), 1e-300))


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        with naming(name):
            assert a[name].dtype == b[name].dtype
            assert_close(a[name], b[name], rtol)


def test_every_operator_type_and_every_estimator_is_in_the_harness() -> None:
    assert {type(case().operator_type) for case in FIXED.values()} == set(OPERATOR_TYPES.values())
    rows = {row for gated, ungated in CHOICES.values() for row in (*gated, *ungated)}
    assert rows == ESTIMATORS.keys() == CLOSED_FORMS.keys() | {"random"}


def test_every_operator_type_has_a_layer_for_methods_of_zennit() -> None:
    for case in FIXED.values():
        assert isinstance(equivalent_layer(case().operator_type), torch.nn.Module)


@for_all_estimators
def test_patterns_equal_their_closed_form(case: Case, required: RequiredSums, choices: list[str]) -> None:
    for key, pattern in patterns_of(case, moments_of(case, required), choices).items():
        with naming(key):
            row = key.rpartition("/")[2]
            assert pattern.dtype == torch.float64
            assert pattern.shape == case.weight.flatten(1).shape
            for k, neuron in enumerate(case.neurons):
                if not has_pattern(row, neuron):
                    assert (pattern[k] == 0).all()
                elif row in CLOSED_FORMS:
                    assert_close(pattern[k], torch.from_numpy(CLOSED_FORMS[row](case, k)), 1e-9)
                else:
                    assert pattern[k].isfinite().all()
                    assert (pattern[k] != 0).any()


@for_all_estimators
def test_product_of_weight_and_pattern_is_one(case: Case, required: RequiredSums, choices: list[str]) -> None:
    for key, pattern in patterns_of(case, moments_of(case, required), choices).items():
        with naming(key):
            assert_unit_outputs(case, key.rpartition("/")[2], pattern)


def assert_unit_outputs(case: Case, row: str, pattern: Tensor) -> None:
    some = torch.tensor([has_pattern(row, neuron) for neuron in case.neurons])
    weight = case.weight.flatten(1)
    if row != "multivariate":
        ones = torch.ones(int(some.sum()), dtype=torch.float64)
        torch.testing.assert_close((weight * pattern).sum(1)[some], ones, rtol=0, atol=1e-12)
        return
    # WᵀA = I up to the ridge, if the outputs of a group are independent, with A before its division.
    size = len(case.groups[0])
    for group, informative, w, a in zip(case.groups, *(t.split(size) for t in (some, weight, pattern * case.seeing))):
        y = torch.stack([neuron.y for neuron in group])[informative]
        if len(y) <= w.shape[1]:
            least = torch.linalg.eigvalsh(torch.atleast_2d(y.corrcoef()))[0]
            reach = float(RIDGE / least * y.std(1).max() / y.std(1).min())
            product = w[informative] @ a[informative].T
            torch.testing.assert_close(product, torch.eye(len(y)).double(), rtol=0, atol=1.01 * reach)


@pytest.mark.full
@pytest.mark.cases
@every_case
@given(st.randoms(use_true_random=False))
@settings(max_examples=3, derandomize=True, deadline=None)
def test_any_split_of_the_samples_in_any_merge_tree_gives_the_same(name: str, gate: str, random: Random) -> None:
    case = case_of(name, gate)
    images = list(range(len(case.inputs[0])))
    random.shuffle(images)
    cuts = [0, *sorted(random.sample(range(1, len(images)), random.randrange(min(5, len(images))))), len(images)]
    batches = [tuple(x[images[start:stop]] for x in case.inputs) for start, stop in pairwise(cuts)]
    for required, choices in by_sums(case).items():
        accumulator, partial_moments = Accumulator(case.operator, required), []
        for batch in batches:
            accumulator.update(batch, case.operator(*batch))
            partial_moments.append(case.moments(required, batch))
        random.shuffle(partial_moments)
        while len(partial_moments) > 1:
            at = random.randrange(len(partial_moments) - 1)
            partial_moments[at : at + 2] = [partial_moments[at] + partial_moments[at + 1]]
        whole = moments_of(case, required)
        expected = patterns_of(case, whole, choices)
        for found in (accumulator.moments(), partial_moments[0]):
            with naming(*choices):
                assert_same(found.tensors(), whole.tensors(), 1e-13)
            assert_same(patterns_of(case, found, choices), expected, 1e-9)


@for_all_estimators
def test_merging_commutes_and_associates_up_to_rounding(case: Case, required: RequiredSums, choices: list[str]) -> None:
    a, b, c = (moments_of(case, required, images) for images in (slice(0, 2), slice(2, 6), slice(6, None)))
    assert_same((a + b).tensors(), (b + a).tensors(), 0.0)
    left, right = ((a + b) + c).tensors(), (a + (b + c)).tensors()
    for field, value in left.items():
        # Each of the four additions rounds by at most half the last digit of its terms.
        sizes = sum(m.tensors()[field].abs() for m in (a, b, c))
        assert ((value - right[field]).abs() <= 2**-51 * sizes).all(), field


@for_all_estimators
def test_moments_of_no_samples_are_neutral(case: Case, required: RequiredSums, choices: list[str]) -> None:
    a, nothing = moments_of(case, required), zero_moments(case.operator, required)
    assert_same((a + nothing).tensors(), a.tensors(), 0.0)
    assert_same((nothing + a).tensors(), a.tensors(), 0.0)
    assert_same(moments_of(case, required, slice(0)).tensors(), nothing.tensors(), 0.0)
    assert nothing.nbytes == moments_bytes(case.operator, required) == a.nbytes
    for key, pattern in patterns_of(case, nothing, choices).items():
        if ESTIMATORS[key.rpartition("/")[2]].uses_data:
            assert (pattern == 0).all(), key


@for_all_estimators
def test_merging_and_solving_leave_their_inputs_unchanged(
    case: Case, required: RequiredSums, choices: list[str]
) -> None:
    nothing = zero_moments(case.operator, required)
    sides = moments_of(case, required, slice(0, 3)), moments_of(case, required, slice(3, None)), nothing
    copies = [copy_moments(side) for side in sides]
    for a, b in ((0, 1), (0, 2), (2, 0)):
        merged = sides[a] + sides[b]
        patterns_of(case, merged, choices)
        for value in merged.tensors().values():
            value.zero_()
    for side, copy in zip(sides, copies):
        patterns_of(case, side, choices)
        assert_same(side.tensors(), copy.tensors(), 0.0)


@for_all_estimators
def test_saved_moments_load_exactly_and_only_under_their_own_names(
    case: Case, required: RequiredSums, choices: list[str]
) -> None:
    moments = moments_of(case, required)
    named = load(save(moments.tensors()))
    assert_same(Moments.from_tensors(named).tensors(), moments.tensors(), 0.0)
    assert_same(patterns_of(case, Moments.from_tensors(named), choices), patterns_of(case, moments, choices), rtol=0.0)
    with pytest.raises(ValueError, match=r"total\.z"):
        Moments.from_tensors({**named, "total.z": named["total.y"]})
    for field in named:
        rest = {other: t for other, t in named.items() if other != field}
        with pytest.raises(KeyError, match=field):
            Moments.from_tensors(rest)


@every_case
def test_neurons_solved_in_blocks_have_the_same_patterns(name: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name, gate)
    for required, choices in by_sums(case).items():
        moments = moments_of(case, required)
        monkeypatch.undo()
        whole = {choice: solve(case.operator, moments, choice) for choice in choices}
        for block in (1, 20, 60):
            monkeypatch.setattr("patterns.estimation.estimators.BLOCK_ELEMENTS", block)
            for choice, expected in whole.items():
                with naming(choice):
                    found = solve(case.operator, moments, choice)
                    assert found.flags == expected.flags
                    for row, pattern in expected.patterns.items():
                        torch.testing.assert_close(found.patterns[row], pattern, rtol=1e-12, atol=1e-13)
