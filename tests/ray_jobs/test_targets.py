"""The parsing of `--target`, and the names of classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights

from patterns import Network, UserError, trace
from ray_jobs.jobs.explain.targets import load_target_names, needs_names, parse_target
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names

SCORES = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 4.0, 4.0]])
LABELS = [2, 3]
NAMES = (("tench", 0), ("tiger cat", 1), ("label-like", 2))


def weighted_mean(*scores: float) -> float:
    """Return the mean of some scores, weighted by their softmax."""
    weights = np.exp(scores)
    return float(np.average(scores, weights=weights))


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
        ("contrast", [[1], [0]], [[3 - weighted_mean(0.1, 2, -1)], [5 - weighted_mean(1, 4, 4)]]),
        ("label-vs-others", [[2], [3]], [[2 - weighted_mean(0.1, 3, -1)], [4 - weighted_mean(5, 1, 4)]]),
        ("tench-vs-others", [[0], [0]], [[0.1 - weighted_mean(3, 2, -1)], [5 - weighted_mean(1, 4, 4)]]),
    ],
)
def test_targets_pick_classes_and_their_scores(
    network: Network, spec: str, classes: list[list[int]], score: list[list[float]]
) -> None:
    target = parse_target(spec, network, NAMES)
    found = target.pick_classes(SCORES, LABELS)
    assert found.tolist() == classes
    torch.testing.assert_close(target.score(SCORES, found), torch.tensor(score, dtype=torch.float32))
    assert target.maps == len(score[0])
    assert target.needs_label == ("label" in spec and spec != "label-like")
    given = target.make_targets(SCORES, LABELS)
    if target.against or target.against_others:  # the explained sum is the score
        torch.testing.assert_close((given * SCORES).sum(1, keepdim=True), torch.tensor(score, dtype=torch.float32))
    else:
        assert given.view(2, -1).tolist() == classes


def test_the_score_of_a_neuron_is_the_sum_over_its_positions(network: Network) -> None:
    target = parse_target("0:5", network, NAMES)
    assert target.operator == "0"
    values = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    assert target.score(values, target.pick_classes(values, LABELS)).tolist() == [[4 * 21.5], [4 * 45.5]]


def test_the_strongest_neuron_has_the_largest_sum_over_positions(network: Network) -> None:
    target = parse_target("0:strongest", network, NAMES)
    assert target.operator == "0"
    values = torch.zeros(2, 6, 2, 2)
    values[0, 3], values[0, 1, 0, 0], values[1, 5] = 1, 3, 0.1
    assert target.pick_classes(values, LABELS).tolist() == [[3], [5]]
    assert target.score(values, torch.tensor([[3], [5]])).tolist() == [[4], [pytest.approx(0.4)]]


@pytest.mark.parametrize(
    ("spec", "what", "remedy"),
    [
        ("best", "'best' is no class", "`classes` reads names"),
        ("tiger cot", "'tiger cot' is no class", "Did you mean tiger cat?"),
        ("4", "no class 4", "0 to 3"),
        ("top-5", "the model has 4 classes", "top-1 to top-4"),
        ("top-0", "the model has 4 classes", "top-1 to top-4"),
        ("0:6", "no neuron '6'", "0 has 0 to 5"),
        ("0:x", "no neuron 'x'", "0 has 0 to 5"),
        ("others", "'others' is no class", "Name a class"),
        ("label-vs-label", "a class against itself is 0", "two classes"),
        ("1-vs-", "'' is no class", "Name a class"),
        ("-1", "'-1' is no class", "Name a class"),
    ],
)
def test_wrong_targets_are_rejected(network: Network, spec: str, what: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(spec, network, NAMES)
    assert (caught.value.where, caught.value.parameter, caught.value.what) == (spec, "target", what)
    assert remedy in caught.value.remedy


def test_names_are_needed_only_for_targets_that_may_name_a_class() -> None:
    assert not any(map(needs_names, ["predicted", "label", "12", "top-5", "predicted-vs-second", "3-vs-label"]))
    assert all(map(needs_names, ["tabby", "3-vs-tabby", "features.28:17"]))


INDEX = '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}'


@pytest.mark.parametrize(
    "content",
    [
        '["tench", "goldfish"]',
        '{"0": "tench", "1": "goldfish"}',
        '{"tench": 0, "goldfish": 1}',
        INDEX,
        "tench\n\ngoldfish\n",
        "\ufefftench\r\ngoldfish",
    ],
)
def test_names_are_read_from_lists_objects_and_lines(tmp_path: Path, content: str) -> None:
    file = tmp_path / "classes"
    file.write_text(content)
    names = load_class_names("timm:resnet18", str(file))
    assert dict(names)["tench"] == 0
    assert map_numbers_to_names(names) == {0: "tench", 1: "goldfish"}
    if content == INDEX:
        assert dict(names)["n01443537"] == 1


def test_models_of_torchvision_have_names_of_classes() -> None:
    names = load_class_names("torchvision:resnet18", None)
    assert [(name, number) for number, name in enumerate(ResNet18_Weights.DEFAULT.meta["categories"])] == list(names)
    assert load_class_names("file.py:factory", None) == ()


@pytest.mark.parametrize(
    "read", [{"x": "y"}, {"0": 1.5}, {"0": []}, {"0": [1]}, {"-1": "a"}, [["n01", "tench"]], [1, 2], {}, [None]]
)
def test_files_without_names_are_rejected(tmp_path: Path, read: object) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(read))
    with pytest.raises(UserError) as caught:
        load_class_names("timm:resnet18", str(file))
    assert caught.value.where == f"--classes {file}"
    with pytest.raises(UserError, match="cannot be read"):
        load_class_names("timm:resnet18", str(tmp_path / "none"))


TWICE = (("crane", 0), ("dog", 1), ("crane", 3), ("a-vs-b", 2))


@pytest.mark.parametrize("spec", ["crane", "dog-vs-crane", "crane-vs-dog"])
def test_a_name_of_two_classes_is_rejected_with_their_numbers(network: Network, spec: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(spec, network, TWICE)
    assert "0, 3" in caught.value.what
    assert parse_target("dog-vs-3", network, TWICE).pick_classes(SCORES, LABELS).tolist() == [[1, 3], [1, 3]]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("a-vs-b", [2]), ("dog-vs-a-vs-b", [1, 2]), ("a-vs-b-vs-dog", [2, 1]), ("a-vs-b-vs-0", [2, 0])],
)
def test_a_name_may_contain_the_separator_of_two_classes(network: Network, spec: str, expected: list[int]) -> None:
    assert parse_target(spec, network, TWICE).pick_classes(SCORES, LABELS)[0].tolist() == expected


@pytest.mark.parametrize("word", ["predicted", "second", "label", "top-2", "predicted-vs-0"])
def test_a_name_that_is_a_keyword_of_targets_is_rejected(network: Network, tmp_path: Path, word: str) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(["predicted", "second", "label", "top-2"]))
    names = load_target_names(word, "file.py:factory", str(file))
    with pytest.raises(UserError, match="a keyword of targets"):
        parse_target(word, network, names)
    assert load_target_names(word, "torchvision:resnet18", None) == ()
    parse_target(word, network, ())
