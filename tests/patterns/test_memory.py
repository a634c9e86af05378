"""The peak memory of accumulating moments, measured in torch's allocator."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks.machine import peak
from patterns import Observer, PatchObserver, trace

pytestmark = pytest.mark.full


def test_the_measure_includes_results_and_temporary_memory() -> None:
    ones = torch.ones(2**20)
    size, few = ones.nbytes, 64  # scalars
    assert peak(lambda: ones + 1) == pytest.approx(size, abs=few)
    assert peak(lambda: (ones + 1) + 1) == pytest.approx(2 * size, abs=few)
    # The sum in float64 and a temporary float64 copy of the term: the reason for CHUNK_ELEMENTS.
    assert peak(lambda: torch.zeros(2**20, dtype=torch.float64).add_(ones)) == pytest.approx(4 * size, abs=few)


def convolutions(width: int = 32) -> list[nn.Module]:
    layers: list[nn.Module] = []
    sizes = 3, width, width, 2 * width, 2 * width, 2 * width
    for inner, outer in pairwise(sizes):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()]
    return layers


def small_head(channels: int = 64) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def large_head() -> list[nn.Module]:
    """A head with more weights than the network has activations, as in VGG-16."""
    return [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64 * 16 * 16, 512), nn.ReLU(), nn.Linear(512, 10)]


@pytest.mark.parametrize("head", [small_head, large_head])
def test_accumulating_needs_at_most_a_third_more_than_forward_and_backward_in_addition_to_the_moments(
    head: Callable[[], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scaled down in proportion from VGG-16: 2²² of 103 million weights, and of 13 million activations.
    monkeypatch.setattr("patterns.moments.accumulator.CHUNK_ELEMENTS", 2**18)
    monkeypatch.setattr("patterns.operators.winograd.BLOCK", 2**18)
    torch.manual_seed(0)
    model = nn.Sequential(*convolutions(), *head()).eval().requires_grad_(False)
    x = torch.randn(4, 3, 64, 64)
    network = trace(model, x[:2])
    observer = Observer(network)
    moments = observer.moments()

    def forward_and_backward() -> Tensor:
        inputs = x.clone().requires_grad_()
        return torch.autograd.grad(model(inputs).sum(), inputs)[0]

    plain, accumulating = peak(forward_and_backward), peak(lambda: observer.update(x))
    activations = (2 * 32 + 3 * 64) * x[:, 0].nbytes
    assert activations < plain < 2.5 * activations
    assert accumulating <= 1.3 * plain  # the moments are not part of it
    assert observer.moments().keys() == moments.keys()


@pytest.mark.slow
def test_sampling_patches_needs_at_most_a_third_more_than_a_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_a_time = 2**15
    monkeypatch.setattr("patterns.moments.gram.PATCH_ELEMENTS", at_a_time)
    torch.manual_seed(0)
    model = nn.Sequential(*convolutions(16), *small_head(32)).eval().requires_grad_(False)
    x = torch.randn(8, 3, 64, 64)
    network = trace(model, x[:2])
    observer = PatchObserver(network, network.operators, positions=512)
    assert 35 * at_a_time < 8 * 512 * 32 * 9  # the patches of the last convolutions, never all in memory
    with torch.no_grad():
        plain = peak(lambda: network.module(x))
    assert peak(lambda: observer.update(x)) <= 4 / 3 * plain
