"""Random modules: the traced network has the module's outputs at any batch size, or the module is rejected."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patterns import UserError, trace
from tests.patterns.drawn_modules import HOSTILE, SUPPORTED, Drawn, Step

pytestmark = pytest.mark.full

SHAPES = [(3, 8, 8), (2, 5, 6), (6,), (4, 6)]
UNHURRIED = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "phases": [Phase.generate],  # a failure names its module, and shrinking one takes minutes
}


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare the numbers. One sample may have lost its batch dimension, and one number per sample is one class."""
    assert found.numel() == expected.numel(), what
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.reshape(-1), expected.reshape(-1), rtol=0, atol=1e-9 * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def compare(steps: list[Step], shape: tuple[int, ...], seed: int, rejectable: bool) -> None:
    """Trace a module, and compare it with its network for batches of 1, 2 and 5."""
    torch.manual_seed(seed)
    module = Drawn(steps, shape).eval()
    try:
        network = trace(module, torch.zeros(2, *shape, dtype=torch.float64), name="drawn")
    except UserError as error:
        if rejectable:
            return
        raise AssertionError(f"{module} was rejected") from error
    assert network.input_shape == shape
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        with torch.no_grad():
            try:
                expected = module(x)
            except (RuntimeError, IndexError, ValueError):
                assert batch == 1, f"{module} does not take a batch of {batch}, and was traced"
                continue
            assert_same(network.module(x.clone()), expected, f"{module}, a batch of {batch}")


def check_hostile(steps: list[Step], shape: tuple[int, ...], seed: int) -> None:
    compare(steps, shape, seed, rejectable=True)


hostile = given(st.lists(st.sampled_from(SUPPORTED + HOSTILE), max_size=7), st.sampled_from(SHAPES), st.integers(0, 99))


@settings(max_examples=80, derandomize=True, **UNHURRIED)  # type: ignore[arg-type]
@hostile
def test_random_modules_are_traced_exactly_or_rejected(steps: list[Step], shape: tuple[int, ...], seed: int) -> None:
    check_hostile(steps, shape, seed)


@settings(max_examples=30, derandomize=True, **UNHURRIED)  # type: ignore[arg-type]
@given(st.lists(st.sampled_from(SUPPORTED), max_size=7), st.sampled_from(SHAPES), st.integers(0, 99))
def test_random_modules_of_supported_steps_are_never_rejected(
    steps: list[Step], shape: tuple[int, ...], seed: int
) -> None:
    compare(steps, shape, seed, rejectable=False)


@pytest.mark.slow
@settings(max_examples=10_000, **UNHURRIED)  # type: ignore[arg-type]
@hostile
def test_ten_thousand_random_modules_are_traced_exactly_or_rejected(
    steps: list[Step], shape: tuple[int, ...], seed: int
) -> None:
    check_hostile(steps, shape, seed)


# Images and vectors; the other shapes take as long again.
QUICK_SHAPES = [pytest.param(s, marks=() if len(s) != 2 and s[0] != 2 else pytest.mark.slow, id=str(s)) for s in SHAPES]


@pytest.mark.parametrize("shape", QUICK_SHAPES)
@pytest.mark.parametrize("step", HOSTILE, ids=lambda step: step.name)
def test_each_hostile_step_alone_is_traced_exactly_or_rejected(step: Step, shape: tuple[int, ...]) -> None:
    compare([SUPPORTED[4], step, SUPPORTED[4]], shape, 0, rejectable=True)
