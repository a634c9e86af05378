"""A model must return one row per sample, the same in every batch and call; other models are rejected."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import UserError, trace
from tests.patterns.small import FunctionModel, conv, image


def trace_error(forward: Callable[[FunctionModel, Tensor], object], **layers: nn.Module) -> UserError:
    """Return the error that tracing a model with these layers raises."""
    with pytest.raises(UserError) as caught:
        trace(FunctionModel(forward, conv=conv(), head=nn.Linear(4, 3), **layers).double(), image(), name="zoo:net")
    assert caught.value.where == "zoo:net"
    return caught.value


ROWS: dict[str, tuple[Callable[[FunctionModel, Tensor], object], tuple[int, ...]]] = {
    "view": (lambda m, x: m.conv(x).view(-1, 64), (12, 64)),
    "reshape": (lambda m, x: m.conv(x).reshape(-1, 4), (192, 4)),
    "patches": (lambda m, x: m.head(m.conv(x).flatten(2).transpose(1, 2).flatten(0, 1)), (192, 3)),
    "transposed": (lambda m, x: m.head(m.conv(x).mean((2, 3))).t(), (3, 2)),
    "one for all": (lambda m, x: m.head(m.conv(x).mean((2, 3))).mean(0, keepdim=True), (1, 3)),
    "a number for all": (lambda m, x: m.conv(x).mean(), ()),
}


@pytest.mark.parametrize("name", ROWS)
def test_outputs_without_one_row_per_sample_are_rejected_with_their_shape(name: str) -> None:
    forward, shape = ROWS[name]
    assert str(shape) in trace_error(forward).what


ACROSS: dict[str, Callable[[FunctionModel, Tensor], object]] = {
    "mean of the batch": lambda m, x: m.conv(x - x.mean(0, keepdim=True)),
    "batch statistics": lambda m, x: F.batch_norm(m.conv(x), None, None, training=True),
    "a layer without running statistics": lambda m, x: m.norm(m.conv(x)),
    "flipped batch": lambda m, x: m.conv(x).flip(0),
    "the first sample": lambda m, x: m.conv(x) + m.conv(x)[:1],
    "the largest of all": lambda m, x: m.conv(x) / m.conv(x).abs().max(),
    "only for a batch of one": lambda m, x: m.conv(x) * (2 if x.shape[0] == 1 else 1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_models_whose_samples_depend_on_each_other_are_rejected(name: str) -> None:
    error = trace_error(ACROSS[name], norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert "depends on the other samples" in error.what


def test_error_names_batch_norms_without_running_statistics() -> None:
    error = trace_error(lambda m, x: m.norm(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert "(batch norm without running statistics: norm)" in error.what
    assert "track_running_stats" in error.remedy


RANDOM: dict[str, Callable[[FunctionModel, Tensor], object]] = {
    "dropout": lambda m, x: F.dropout(m.conv(x), 0.5),
    "dropout of channels": lambda m, x: F.dropout2d(m.conv(x), 0.5, training=True),
    "rare dropout": lambda m, x: F.dropout(m.conv(x).mean((2, 3)), 1e-6),
    "noise": lambda m, x: m.conv(x) + 0.1 * torch.randn_like(x[:, :1]),
    "a factor": lambda m, x: m.conv(x) * torch.rand(()),
    "leaky slopes": lambda m, x: F.rrelu(m.conv(x), training=True),
}


@pytest.mark.full
@pytest.mark.parametrize("name", RANDOM)
def test_random_forward_passes_are_rejected_without_advice_to_pass_them_through(name: str) -> None:
    error = trace_error(RANDOM[name])
    assert "random" in error.what
    assert error.parameter is None
    assert "pass_through" not in error.remedy


class Counting(nn.Module):
    """A model whose output grows from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = conv(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_forward_passes_that_change_from_call_to_call_are_rejected() -> None:
    with pytest.raises(UserError) as caught:
        trace(Counting().double(), image(), name="zoo:net")
    assert "changes from call to call" in caught.value.what


@pytest.mark.full
def test_random_layers_that_are_off_in_evaluation_are_accepted() -> None:
    model = nn.Sequential(conv(), nn.Dropout(0.5), nn.RReLU(), nn.Dropout2d(0.2)).double()
    assert list(trace(model, image()).operators) == ["0"]


def test_tracing_keeps_the_state_of_the_random_generator() -> None:
    model = FunctionModel(RANDOM["noise"], conv=conv()).double()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(UserError, match="the forward pass is random"):
        trace(model, image())
    assert torch.equal(torch.rand(3), expected)


def test_forward_passes_that_branch_on_the_batch_size_are_rejected() -> None:
    assert "batch size" in trace_error(lambda m, x: m.conv(x) if x.shape[0] < 5 else -m.conv(x)).what


@pytest.mark.full
@pytest.mark.parametrize(
    "squeeze",
    [lambda y: y.squeeze(), lambda y: y.squeeze(0).squeeze(-1).squeeze(-1), lambda y: torch.squeeze(y, (0, 2, 3))],
    ids=["all", "one by one", "several"],
)
def test_squeezes_keep_the_batch_dimension_of_a_single_sample(squeeze: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = FunctionModel(lambda m, x: m.head(squeeze(m.conv(x).mean((2, 3), True))), conv=conv(), head=nn.Linear(4, 3))
    network, x = trace(model.double(), image()), image(3)
    with torch.no_grad():
        torch.testing.assert_close(network.module(x[1:2]), model(x)[1:2], rtol=1e-12, atol=0)


HEADS: dict[str, Callable[[FunctionModel, Tensor], object]] = {
    "a column": lambda m, x: m.one(m.conv(x).mean((2, 3))),
    "a number": lambda m, x: m.one(m.conv(x).mean((2, 3))).squeeze(1),
    "squeezed": lambda m, x: m.one(m.conv(x).mean((2, 3))).squeeze(),
}


@pytest.mark.full
@pytest.mark.parametrize("name", HEADS)
def test_models_that_return_one_number_per_sample_have_one_class(name: str) -> None:
    torch.manual_seed(0)
    model = FunctionModel(HEADS[name], conv=conv(), one=nn.Linear(4, 1)).double()
    network, x = trace(model, image()), image(5)
    assert network.output_shape == (1,)
    with torch.no_grad():
        for batch in (x, x[:2]):
            torch.testing.assert_close(network.module(batch)[:, 0], model(batch).flatten(), rtol=1e-12, atol=0)
    assert network.module(x[:1]).shape == (1, 1)


ENDS = {
    "softmax": (nn.Softmax(1), lambda z: z.softmax(1)),
    "log_softmax": (nn.LogSoftmax(1), lambda z: z.log_softmax(1)),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "softmax, reshaped": (nn.Sequential(nn.Softmax(1), nn.Flatten()), lambda z: z.softmax(1)),
}


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", ENDS)
def test_models_that_end_in_probabilities_are_rejected_unless_the_end_is_stripped(name: str) -> None:
    torch.manual_seed(0)
    end, function = ENDS[name]
    body = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double()
    model = nn.Sequential(body, end)
    with pytest.raises(UserError) as caught:
        trace(model, image())
    assert name.partition(",")[0] in caught.value.what
    assert caught.value.parameter == "strip_softmax"
    network, x = trace(model, image(), strip_softmax=True), image(4)
    with torch.no_grad():
        torch.testing.assert_close(network.module(x), body(x), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(function(network.module(x)), model(x), rtol=1e-12, atol=1e-15)


@pytest.mark.full
def test_stripping_does_not_change_models_that_end_in_logits() -> None:
    model, x = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double(), image(4)
    stripped = trace(model, image(), strip_softmax=True)
    assert torch.equal(stripped.module(x), trace(model, image()).module(x))


@pytest.mark.full
def test_softmax_in_the_middle_is_not_stripped() -> None:
    model = nn.Sequential(conv(), nn.Softmax(1), nn.Flatten(), nn.Linear(256, 3)).double()
    with pytest.raises(UserError) as caught:
        trace(model, image(), strip_softmax=True)
    assert caught.value.parameter == "pass_through"
    assert "softmax" in caught.value.what
