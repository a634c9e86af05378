"""The digest of a model's weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from patterns import digest


def flip_bit(model: nn.Module, name: str) -> nn.Module:
    """Flip the last bit of one weight."""
    value = model.state_dict()[name]
    words = value.view(-1).view(torch.int32)
    words[-1] ^= 1
    return model


def normalized_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())


def test_equal_weights_have_equal_digests() -> None:
    assert digest(normalized_model()) == digest(normalized_model())
    assert digest(normalized_model()).startswith("sha256:")
    assert len(digest(normalized_model())) == len("sha256:") + 64


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"])
def test_one_bit_of_one_weight_changes_the_digest(name: str) -> None:
    assert digest(flip_bit(normalized_model(), name)) != digest(normalized_model())
    assert digest(flip_bit(flip_bit(normalized_model(), name), name)) == digest(normalized_model())


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: nn.Sequential(m), lambda m: nn.Sequential(m[0], m[1], nn.Identity(), nn.ReLU(), nn.BatchNorm2d(1))],  # noqa: E501
    ids=["dtype", "names", "more"],
)  # fmt: skip
def test_types_and_names_of_weights_change_the_digest(change: Callable[[nn.Module], nn.Module]) -> None:
    assert digest(change(normalized_model())) != digest(normalized_model())


def test_the_shape_of_a_weight_changes_the_digest() -> None:
    models = []
    for shape in ((2, 6), (3, 4)):
        model = nn.Module()
        model.register_buffer("weight", torch.arange(12.0).reshape(shape))
        models.append(model)
    assert digest(models[0]) != digest(models[1])


def test_a_digest_does_not_depend_on_memory_layout_or_gradients() -> None:
    model = normalized_model().to(memory_format=torch.channels_last).requires_grad_(False)
    assert digest(model) == digest(normalized_model())
