"""Models that return dictionaries, tuples and data classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patterns import UserError
from ray_jobs.config import ModelConfig, Resources
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from ray_jobs.models.model_outputs import explain_output, name_outputs
from tests.ray_jobs.runs import PREPROCESSING, make_fit_config

MODEL = """
import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import torch
from torch import nn


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    logits: torch.Tensor
    loss: None = None


Pair = namedtuple("Pair", ["first", "second"])


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out, self.make = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 5), make

    def forward(self, x):
        hidden = torch.relu(self.conv(x)).mean((2, 3))
        return self.make(hidden, self.out(hidden))


def plain():
    return Net(lambda hidden, logits: logits)


def dictionary():
    return Net(lambda hidden, logits: {"hidden": hidden, "logits": logits, "loss": None})


def dataclass():
    return Net(lambda hidden, logits: Output(hidden, logits))


def ordered():
    return Net(lambda hidden, logits: OrderedDict(scores=logits))


def pair():
    return Net(lambda hidden, logits: (logits, hidden))


def named():
    return Net(lambda hidden, logits: Pair(hidden, logits))


def nothing():
    return Net(lambda hidden, logits: {"loss": None})
"""
NAMES = {"dictionary": "logits", "dataclass": "logits", "ordered": "scores", "pair": "0", "named": "first"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "outputs.py"
    path.write_text(MODEL)
    return path


AUXILIARY = """
import torch
from torchvision.models import GoogLeNet, Inception3


def make(model, training):
    torch.manual_seed(0)
    if training:  # the model returns what it returns in training, although its layers are in evaluation mode
        model = type(model.__name__, (model,), {"training": property(lambda self: True, lambda self, value: None)})
    return model(num_classes=5, init_weights=False)


def googlenet():
    return make(GoogLeNet, True)


def googlenet_plain():
    return make(GoogLeNet, False)


def inception():
    return make(Inception3, True)


def inception_plain():
    return make(Inception3, False)
"""
SCORES = {"googlenet": "logits, aux_logits2, aux_logits1", "inception": "logits, aux_logits"}


@pytest.mark.full
@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception", marks=pytest.mark.slow)])
def test_auxiliary_scores_of_training_are_not_explained(name: str, tmp_path: Path) -> None:
    (tmp_path / "auxiliary.py").write_text(AUXILIARY)
    size = 299 if name == "inception" else 64
    options = {**PREPROCESSING, "image_size": size, "resize": size}
    found, plain = (
        loading.load(ModelConfig(spec=f"{tmp_path}/auxiliary.py:{function}", **options))  # type: ignore[arg-type]
        for function in (name, f"{name}_plain")
    )
    assert found.traced.describe()[0].startswith(f"the explained output of the model is logits (of {SCORES[name]})")
    assert list(found.network.operators) == list(plain.network.operators)
    assert not any(operator.lower().startswith("aux") for operator in found.network.operators)
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(found.network.module(x), plain.model(x))


def config(file: Path, name: str, output: str | None = None) -> ModelConfig:
    return ModelConfig(spec=f"{file}:{name}", output=output, **PREPROCESSING)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_logits_or_the_first_tensor_are_explained_and_named(file: Path, name: str) -> None:
    plain, found = loading.load(config(file, "plain")), loading.load(config(file, name))
    assert found.traced.describe()[0].startswith(f"the explained output of the model is {NAMES[name]} (of ")
    assert plain.traced.describe() == []
    x = torch.randn(3, 3, 16, 16)
    hidden = torch.relu(plain.model.conv(x)).mean((2, 3))
    expected = hidden if name == "named" else plain.model(x)
    torch.testing.assert_close(found.network.module(x), expected)
    assert plain.digest == found.digest


@pytest.mark.parametrize(("name", "output"), [("pair", "1"), ("dictionary", "hidden"), ("named", "second")])
def test_another_output_is_chosen_by_name_or_number(file: Path, name: str, output: str) -> None:
    plain, found = loading.load(config(file, "plain")), loading.load(config(file, name, output))
    x = torch.randn(2, 3, 16, 16)
    hidden = torch.relu(plain.model.conv(x)).mean((2, 3))
    expected = plain.model(x) if output == "second" else hidden
    torch.testing.assert_close(found.network.module(x), expected)


@pytest.mark.parametrize(("name", "output"), [("pair", "2"), ("plain", "0"), ("nothing", None), ("nothing", "loss")])
def test_output_that_is_not_there_is_an_error(file: Path, name: str, output: str | None) -> None:
    with pytest.raises(UserError) as caught:
        _ = loading.load(config(file, name, output)).traced
    assert caught.value.parameter == "output"


def test_fit_of_an_output_gives_the_patterns_of_the_model_that_returns_it(
    file: Path, shards: list[str], tmp_path: Path
) -> None:
    found = {}
    for name in ("plain", "dictionary"):
        run = fit(make_fit_config(f"{file}:{name}", shards[:2], tmp_path / name), Resources(workers=0))
        found[name] = load_file(tmp_path / name / "patterns.safetensors")
        assert json.loads((tmp_path / name / "manifest.json").read_text())["fit"]["model"]["output"] is None
        assert run.manifest()["fit"]["samples"] == 12
    assert all(torch.equal(value, found["plain"][key]) for key, value in found["dictionary"].items())


def test_model_that_fails_is_reported_by_the_tracing() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("always")

    assert explain_output(Fails(), torch.zeros(1), None, "it") is None
    assert name_outputs([torch.zeros(1), None]).keys() == {"0"}
