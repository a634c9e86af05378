"""All tensors are created on the network's device, tested on the meta device, which holds no numbers."""

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
def meta_network() -> Network:
    """The network on the meta device, where an operation with a tensor of another device fails."""
    return traced("meta")


@pytest.mark.full
@pytest.mark.parametrize("positions", [None, 4])
def test_moments_are_on_the_networks_device(meta_network: Network, positions: int | None) -> None:
    observer = Observer(meta_network, positions=positions)
    for _ in range(2):
        assert observer.update(torch.zeros(4, 3, 64, 64, device="meta")).device.type == "meta"
    observer.flush()
    assert {t.device.type for t in observer.tensors().values()} == {"meta"}


@pytest.mark.full
def test_patches_are_on_the_networks_device(meta_network: Network) -> None:
    observer = PatchObserver(meta_network, ["conv1", "layer2.0.conv1", "fc"], 4)
    observer.update(torch.zeros(4, 3, 64, 64, device="meta"))
    assert {t.device.type for t in observer.tensors().values()} == {"meta"}


@pytest.mark.full
def test_maps_are_on_the_networks_device(network: Network, meta_network: Network) -> None:
    patterns = {name: op.weight for name, op in network.operators.items()}
    meta_patterns = {name: torch.empty_like(op.weight) for name, op in meta_network.operators.items()}
    scales = Explainer(network, patterns, PASSES).scales
    explanation = Explainer(meta_network, meta_patterns, PASSES, scales)(torch.zeros(4, 3, 64, 64, device="meta"))
    for name in PASSES:
        assert explanation.maps[name].device.type == "meta"
        assert explanation.maps[name].shape == (4, 3, 64, 64)
