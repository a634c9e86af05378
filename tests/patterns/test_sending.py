"""A traced network that is sent to another process, or moved to another device."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import patterns
from patterns import Network

pytestmark = pytest.mark.full


class ClassToken(nn.Module):
    """Prepends a token to each sample, so that the graph creates a tensor of the batch's size on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.embed, self.head = nn.Parameter(torch.ones(1, 1, 4)), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], 1, 4, device=x.device)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1) + zeros, self.embed(x)], 1)
        return self.head(torch.relu(tokens).mean(1))


MODELS = {
    "class token": (lambda: ClassToken(), (5, 3)),
    "resnet18": (lambda: timm.create_model("resnet18"), (3, 32, 32)),
    "lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), (3, 32, 32)),
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n == "lite0" else ()) for n in MODELS])
def network(request: pytest.FixtureRequest) -> Network:
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    return patterns.trace(make(), torch.zeros(2, *shape))


def test_unpickled_network_is_the_same(network: Network) -> None:
    sent = pickle.loads(pickle.dumps(network))
    x = torch.randn(3, *network.input_shape)
    assert torch.equal(sent.module(x), network.module(x))
    assert sent.module.code == network.module.code
    assert [repr(op) for op in sent.operators.values()] == [repr(op) for op in network.operators.values()]
    fields = "input_shape", "output_shape", "constants"
    assert [getattr(sent, name) for name in fields] == [getattr(network, name) for name in fields]


def test_maps_of_an_unpickled_network_are_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    network = patterns.trace(model, torch.zeros(1, 3, 8, 8))
    sent = pickle.loads(pickle.dumps(network))
    images = torch.randn(2, 3, 8, 8)
    found = {}
    for each in (network, sent):
        moments = patterns.accumulate(each, [images])
        solved = {name: patterns.solve(op, moments[name]).patterns for name, op in each.operators.items()}
        explainer = patterns.Explainer(each, patterns.choose(each, solved), ["patternnet", "patternattribution"])
        found[each is sent] = explainer(images).maps
    for method, maps in found[True].items():
        assert torch.equal(maps, found[False][method]), method


def test_process_that_receives_a_network_needs_no_compiler(tmp_path: Path) -> None:
    network = patterns.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    (tmp_path / "network").write_bytes(pickle.dumps(network))
    program = (
        "import pickle, sys, torch\n"
        f"network = pickle.load(open({str(tmp_path / 'network')!r}, 'rb'))\n"
        "print(tuple(network.module(torch.zeros(7, 3)).shape), 'torch._dynamo' in sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "(7, 2) False\n"


def test_moved_network_creates_its_tensors_on_the_device(network: Network) -> None:
    moved = network.to("meta")
    assert network.to("cpu") is network
    assert {op.weight.device.type for op in moved.operators.values()} == {"meta"}
    assert moved.module(torch.zeros(3, *network.input_shape, device="meta")).shape == (3, *network.output_shape)
    assert {op.weight.device.type for op in network.operators.values()} == {"cpu"}
