"""What is explained, in words."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from patterns import Network, UserError, trace
from ray_jobs.models import class_names
from ray_jobs.targets import named, target_of

SCORES = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 4.0, 4.0]])
LABELS = [2, 3]
NAMES = {"tench": 0, "tiger cat": 1, "label-like": 2}


@pytest.fixture(scope="module")
def network() -> Network:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return trace(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("spec", "classes", "score"),
    [
        ("predicted", [[1], [0]], [[3], [5]]),
        ("second", [[2], [2]], [[2], [4]]),
        ("label", [[2], [3]], [[2], [4]]),
        ("top-3", [[1, 2, 0], [0, 2, 3]], [[3, 2, 0.1], [5, 4, 4]]),
        ("3", [[3], [3]], [[-1], [4]]),
        ("tiger cat", [[1], [1]], [[3], [1]]),
        ("label-like", [[2], [2]], [[2], [4]]),
        ("predicted-vs-label", [[1, 2], [0, 3]], [[1], [1]]),
        ("tench-vs-3", [[0, 3], [0, 3]], [[1.1], [1]]),
    ],
)
def test_words_mean_classes_and_their_scores(
    network: Network, spec: str, classes: list[list[int]], score: list[list[float]]
) -> None:
    target = target_of(spec, network, NAMES)
    found = target.classes(SCORES, LABELS)
    assert found.tolist() == classes
    torch.testing.assert_close(target.score(SCORES, found), torch.tensor(score, dtype=torch.float32))
    assert target.maps == len(score[0])
    assert target.needs_label == ("label" in spec and spec != "label-like")
    given = target.targets(SCORES, LABELS)
    if target.against:  # the explained sum is the score
        torch.testing.assert_close((given * SCORES).sum(1, keepdim=True), torch.tensor(score, dtype=torch.float32))
    else:
        assert given.view(2, -1).tolist() == classes


def test_a_neurons_score_is_the_sum_over_its_positions(network: Network) -> None:
    target = target_of("0:5", network, NAMES)
    assert target.operator == "0"
    values = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    assert target.score(values, target.classes(values, LABELS)).tolist() == [[4 * 21.5], [4 * 45.5]]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("best", "--target best: 'best' is no class. Name a class, or its number; --classes reads names."),
        ("tiger cot", "--target tiger cot: 'tiger cot' is no class. Did you mean tiger cat?"),
        ("4", "--target 4: no class 4. The model's are 0 to 3."),
        ("top-5", "--target top-5: the model has 4 classes. Take top-1 to top-4."),
        ("top-0", "--target top-0: the model has 4 classes"),
        ("0:6", "--target 0:6: no neuron '6'. 0 has 0 to 5."),
        ("0:x", "--target 0:x: no neuron 'x'"),
        ("label-vs-label", "--target label-vs-label: a class against itself is 0"),
        ("1-vs-", "--target 1-vs-: '' is no class"),
        ("-1", "--target -1: '-1' is no class"),
    ],
)
def test_words_that_mean_nothing_are_told(network: Network, spec: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        target_of(spec, network, NAMES)
    assert str(caught.value).startswith(line)


def test_names_are_looked_for_only_where_a_target_may_need_them() -> None:
    assert not any(map(named, ["predicted", "label", "12", "top-5", "predicted-vs-second", "3-vs-label"]))
    assert all(map(named, ["tabby", "3-vs-tabby", "features.28:17"]))


@pytest.mark.parametrize("content", ['["tench", "goldfish"]', '{"0": "tench", "1": "goldfish"}', "tench\n\ngoldfish\n"])
def test_names_are_read_from_lists_objects_and_lines(tmp_path: Path, content: str) -> None:
    file = tmp_path / "classes"
    file.write_text(content)
    assert class_names("timm:resnet18", str(file)) == {"tench": 0, "goldfish": 1}


def test_torchvisions_models_know_their_classes() -> None:
    names = class_names("torchvision:resnet18", None)
    assert (names["tench"], names["tabby"], len(names)) == (0, 281, 1000)
    assert class_names("file.py:factory", None) == {}


@pytest.mark.parametrize("content", [json.dumps({"tench": 0}), json.dumps({"x": "y"})])
def test_files_of_no_names_are_told(tmp_path: Path, content: str) -> None:
    file = tmp_path / "classes.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"not from number to name\. Write"):
        class_names("timm:resnet18", str(file))
    with pytest.raises(UserError, match="cannot be read"):
        class_names("timm:resnet18", str(tmp_path / "none"))
