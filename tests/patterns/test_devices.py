"""No tensor is made on another device than the network's, seen on the device that has no numbers."""

import pytest
import torch
from torchvision.models import resnet18

from patterns import METHODS, Explainer, Network, Observer, PatchObserver, trace

PASSES = [name for name, method in METHODS.items() if method.backward is not None]


def traced(device: str) -> Network:
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval().requires_grad_(False).to(device)
    return trace(model, torch.zeros(2, 3, 64, 64, device=device))


@pytest.fixture(scope="module")
def network() -> Network:
    return traced("cpu")


@pytest.fixture(scope="module")
def elsewhere() -> Network:
    """The network on the meta device, on which an operation with a tensor from elsewhere fails."""
    return traced("meta")


@pytest.mark.parametrize("positions", [None, 4])
def test_moments_are_taken_where_the_network_is(elsewhere: Network, positions: int | None) -> None:
    observer = Observer(elsewhere, positions=positions)
    for _ in range(2):
        assert observer.update(torch.zeros(4, 3, 64, 64, device="meta")).device.type == "meta"
    observer.flush()
    assert {t.device.type for t in observer.tensors().values()} == {"meta"}


def test_patches_are_gathered_where_the_network_is(elsewhere: Network) -> None:
    observer = PatchObserver(elsewhere, ["conv1", "layer2.0.conv1", "fc"], 4)
    observer.update(torch.zeros(4, 3, 64, 64, device="meta"))
    assert {t.device.type for t in observer.tensors().values()} == {"meta"}


def test_maps_are_made_where_the_network_is(network: Network, elsewhere: Network) -> None:
    patterns = {name: op.weight for name, op in network.operators.items()}
    there = {name: torch.empty_like(op.weight) for name, op in elsewhere.operators.items()}
    scales = Explainer(network, patterns, PASSES).scales
    explanation = Explainer(elsewhere, there, PASSES, scales)(torch.zeros(4, 3, 64, 64, device="meta"))
    for name in PASSES:
        assert explanation.maps[name].device.type == "meta"
        assert explanation.maps[name].shape == (4, 3, 64, 64)
