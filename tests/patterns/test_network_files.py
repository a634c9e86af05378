"""Files of traced networks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import patterns
from patterns import Network, UserError
from patterns.io import load_network, save_network
from patterns.io.network_files import compute_digest
from tests.patterns.test_sending import ClassToken


class Shuffled(nn.Module):
    """Several kinds of arguments and tensors: a transposed weight, slopes, a slice, infinite limits, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slopes = nn.Conv2d(3, 8, 3, bias=False), nn.PReLU(8)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(6, 5)
        self.head.weight = nn.Parameter(torch.randn(6, 5).T)
        self.register_buffer("order", torch.tensor([2, 0, 1, 5, 4, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.slopes(self.conv(x))).clamp(min=-float("inf"), max=2.5)
        return self.head(x.mean((2, 3))[:, 1:7][:, self.order])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "class token": (ClassToken, (5, 3)),
    "shuffled": (Shuffled, (3, 8, 8)),
    "vision transformer": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), (3, 32, 32)),
    "lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), (3, 32, 32)),
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n == "lite0" else ()) for n in MODELS])
def network(request: pytest.FixtureRequest) -> Network:
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    return patterns.trace(make(), torch.zeros(2, *shape))


@pytest.fixture
def small() -> Network:
    torch.manual_seed(0)
    return patterns.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))


def test_read_network_is_the_same(network: Network, tmp_path: Path) -> None:
    save_network(tmp_path / "network", network, {"weights": "sha256:0", "sizes": [1, 2.5]})
    read, about = load_network(tmp_path / "network")
    assert about == {"weights": "sha256:0", "sizes": [1, 2.5]}
    assert read.module.code == network.module.code
    assert (read.input_shape, read.output_shape, read.constants) == (
        network.input_shape, network.output_shape, network.constants,
    )  # fmt: skip
    for name, operator in network.operators.items():
        found = read.operators[name]
        assert {k: v for k, v in vars(found).items() if k[0] != "_"} == {
            k: v for k, v in vars(operator).items() if k[0] != "_"
        }
        assert torch.equal(found.weight, operator.weight)
        assert found.weight.stride() == operator.weight.stride()


def test_patterns_and_maps_of_a_read_network_are_bit_equal(network: Network, tmp_path: Path) -> None:
    save_network(tmp_path / "network", network, {})
    inputs = torch.randn(6, *network.input_shape)
    found = []
    for each in (network, load_network(tmp_path / "network")[0]):
        moments = patterns.accumulate(each, [inputs])
        solved = {name: patterns.solve(op, moments[name]).patterns for name, op in each.operators.items()}
        methods = ["gradient", "patternnet", "patternattribution"]
        explanation = patterns.Explainer(each, patterns.choose(each, solved), methods)(inputs)
        found.append((solved, explanation.maps))
    (solved, maps), (again, maps_again) = found
    assert all(torch.equal(p, again[name][row]) for name, rows in solved.items() for row, p in rows.items())
    assert all(torch.equal(values, maps_again[method]) for method, values in maps.items())


def test_every_damaged_byte_is_found(small: Network, tmp_path: Path) -> None:
    path = tmp_path / "network"
    save_network(path, small, {"by": "me"})
    content = path.read_bytes()
    padding = range(8 + int.from_bytes(content[:8], "little") - 8, 8 + int.from_bytes(content[:8], "little"))
    for at in {*range(0, len(content), 7), len(content) - 1} - set(padding):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match="not a complete file"):
            load_network(path)
    for length in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a complete file"):
            load_network(path)


def test_a_file_of_other_tensors_is_no_network(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "network")
    with pytest.raises(UserError, match="not a complete file of a traced network"):
        load_network(tmp_path / "network")


FORGED = [
    ["call_function", {"function": "load"}],
    ["call_function", {"function": "system"}],
    ["call_function", {"operation": ["no_such_operation", "default"]}],
    ["call_method", "numpy"],
    ["call_module", 'x", __import__("os").abort(), "'],
    ["call_module", "forward"],
    ["get_attr", "__class__"],
    ["placeholder", "x=__import__('os').abort()"],
]


@pytest.mark.parametrize(("op", "target"), FORGED)
def test_a_file_runs_no_code_of_its_own(small: Network, tmp_path: Path, op: str, target: object) -> None:
    def forge(node: list[Any]) -> None:
        node[0], node[2] = op, target

    assert_rejected(small, tmp_path, forge)


def test_keywords_of_a_file_are_names(small: Network, tmp_path: Path) -> None:
    assert_rejected(small, tmp_path, lambda node: node[4].update({"x=__import__('os').abort()": 1}))


def assert_rejected(small: Network, folder: Path, forge: Callable[[list[Any]], None]) -> None:
    """Write a network, change one of its calls and the digest, and read it."""
    path = folder / "network"
    save_network(path, small, {})
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    graph = json.loads(texts["graph"])
    forge(next(node for node in graph["nodes"] if node[0] == "call_function"))
    texts["graph"], tensors = json.dumps(graph), load_file(path)
    texts["digest"] = compute_digest(texts, tensors)
    save_file(tensors, folder / "other", texts)
    with pytest.raises(UserError, match="not a complete file"):
        load_network(folder / "other")


def test_a_network_of_unknown_operations_is_not_written(small: Network, tmp_path: Path) -> None:
    @torch.library.custom_op("files_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    (output,) = small.module.graph.find_nodes(op="output")
    with small.module.graph.inserting_before(output):
        output.args = (small.module.graph.call_function(torch.ops.files_test.twice.default, output.args),)
    with pytest.raises(TypeError, match="files_test::twice is not one of torch's own"):
        save_network(tmp_path / "network", small, {})
    assert not (tmp_path / "network").exists()
