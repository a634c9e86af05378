"""The weight gradient with fewer products: compared with explicit patches, and chosen only if it is faster."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patterns.operators import winograd
from patterns.operators.operator import Convolution
from tests.oracles import window_patches
from tests.patterns.networks import relative

pytestmark = pytest.mark.full


def gradient_of_patches(x: Tensor, grad: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Return the gradient from explicit patches, float64."""
    (patches,) = window_patches(x, kernel, (1, 1), padding, (1, 1))
    rows = grad.double().movedim(1, -1).flatten(0, -2)
    return (rows.mT @ patches).view(grad.shape[1], x.shape[1], *kernel)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int]]:
    """Draw inputs, an output gradient, kernel and padding."""
    kernel, padding = (3, draw(st.integers(1, 5))), (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    sizes = [draw(st.integers(max(1, k - 2 * p), 13)) for k, p in zip(kernel, padding)]
    n, c, k = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    outputs = [size + 2 * p - k + 1 for size, p, k in zip(sizes, padding, kernel)]
    x = torch.randn(n, c, *sizes, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, k, *outputs, generator=generator, dtype=torch.float64), kernel, padding


@pytest.mark.parametrize("block", [1, 300, winograd.BLOCK])
def test_sums_equal_those_over_patches_for_all_sizes_and_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "BLOCK", block)

    @given(convolutions())
    @settings(max_examples=100, derandomize=True)
    def check(given: tuple[Tensor, Tensor, tuple[int, int], tuple[int, int]]) -> None:
        x, grad, kernel, padding = given
        truth = gradient_of_patches(x, grad, kernel, padding)
        found = winograd.weight_gradient(x, grad, kernel, padding)
        magnitude = gradient_of_patches(x.abs(), grad.abs(), kernel, padding)
        assert found.shape == truth.shape
        assert ((found - truth).abs() <= 1e-13 * magnitude.max()).all()

    check()


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28)])
def test_float32_error_is_at_most_that_of_the_plain_gradient(channels: int, size: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, channels, size, size, generator=generator).relu() + mean
    grad = torch.randn(4, channels, size, size, generator=generator)
    grad -= grad.mean((0, 2, 3), keepdim=True)
    convolution, weight = Convolution((1, 1), (1, 1), (1, 1)), x.new_empty(1).expand(channels, channels, 3, 3)
    plain = convolution._backward(grad, x, weight, (False, True, False))[1]
    truth = convolution._backward(grad.double(), x.double(), weight.double(), (False, True, False))[1]
    found = winograd.weight_gradient(x, grad, (3, 3), (1, 1))
    assert relative(found, truth) < max(relative(plain, truth), 2e-6)


PLAIN = Convolution((1, 1), (1, 1), (1, 1))
USED = {
    "wide": (PLAIN, 16, 16, (3, 3), True),
    "wide, of another width": (Convolution((1, 1), (1, 2), (1, 1)), 16, 16, (3, 5), True),
    "narrow": (PLAIN, 16, 2, (3, 3), False),
    "strided": (Convolution((2, 1), (1, 1), (1, 1)), 16, 16, (3, 3), False),
    "dilated": (Convolution((1, 1), (1, 1), (1, 2)), 16, 16, (3, 3), False),
    "in groups": (Convolution((1, 1), (1, 1), (1, 1), groups=2), 16, 16, (3, 3), False),
    "of five rows": (PLAIN, 16, 16, (5, 3), False),
    "of one dimension": (Convolution((1,), (1,), (1,)), 16, 16, (3,), False),
}


@pytest.mark.parametrize("name", USED)
def test_convolutions_use_it_only_if_it_applies_and_is_faster(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, channels, neurons, kernel, expected = USED[name]
    calls, gradient = [], winograd.weight_gradient

    def record(*arguments: object) -> Tensor:
        calls.append(arguments)
        return gradient(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(winograd, "weight_gradient", record)
    monkeypatch.setattr(winograd, "MIN_CHANNEL_COLUMNS", 16 * 12)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *[12] * len(kernel), generator=generator, dtype=torch.float64)
    weight = torch.randn(neurons, channels // convolution.groups, *kernel, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    z = convolution.forward((x,), weight, None)
    grad = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (truth,) = torch.autograd.grad(z, weight, grad)
    assert relative(convolution.weight_gradient((x,), grad, tuple(weight.shape)), truth) < 1e-14
    assert bool(calls) == expected


def test_large_depthwise_kernels_have_the_same_gradient_in_another_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 40, 40, generator=generator, dtype=torch.float64)
    convolution = Convolution((2, 1), (2, 3), (1, 1), groups=6)
    weight = torch.randn(12, 1, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    z = convolution.forward((x,), weight, None)
    grad = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (truth,) = torch.autograd.grad(z, weight, grad)
    assert relative(convolution.weight_gradient((x,), grad, (12, 1, 5, 7)), truth) < 1e-14
