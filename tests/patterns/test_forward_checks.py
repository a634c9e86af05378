"""A model must give each sample a row of its own, the same in every batch and every call; others are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import UserError, trace
from tests.patterns.small import Calls, conv, image


def refusal(forward: Callable[[Calls, Tensor], object], **layers: nn.Module) -> UserError:
    """The error with which a model of these layers is refused."""
    with pytest.raises(UserError) as caught:
        trace(Calls(forward, conv=conv(), head=nn.Linear(4, 3), **layers).double(), image(), name="zoo:net")
    assert caught.value.where == "zoo:net"
    return caught.value


ROWS: dict[str, tuple[Callable[[Calls, Tensor], object], tuple[int, ...]]] = {
    "view": (lambda m, x: m.conv(x).view(-1, 64), (12, 64)),
    "reshape": (lambda m, x: m.conv(x).reshape(-1, 4), (192, 4)),
    "patches": (lambda m, x: m.head(m.conv(x).flatten(2).transpose(1, 2).flatten(0, 1)), (192, 3)),
    "transposed": (lambda m, x: m.head(m.conv(x).mean((2, 3))).t(), (3, 2)),
    "one for all": (lambda m, x: m.head(m.conv(x).mean((2, 3))).mean(0, keepdim=True), (1, 3)),
    "a number for all": (lambda m, x: m.conv(x).mean(), ()),
}


@pytest.mark.parametrize("name", ROWS)
def test_outputs_whose_rows_are_not_one_per_sample_are_refused_with_their_shape(name: str) -> None:
    forward, shape = ROWS[name]
    assert str(shape) in refusal(forward).what


ACROSS: dict[str, Callable[[Calls, Tensor], object]] = {
    "mean of the batch": lambda m, x: m.conv(x - x.mean(0, keepdim=True)),
    "batch statistics": lambda m, x: F.batch_norm(m.conv(x), None, None, training=True),
    "a layer without running statistics": lambda m, x: m.norm(m.conv(x)),
    "flipped batch": lambda m, x: m.conv(x).flip(0),
    "the first sample": lambda m, x: m.conv(x) + m.conv(x)[:1],
    "the largest of all": lambda m, x: m.conv(x) / m.conv(x).abs().max(),
    "only for a batch of one": lambda m, x: m.conv(x) * (2 if x.shape[0] == 1 else 1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_a_sample_that_depends_on_others_of_its_batch_is_refused(name: str) -> None:
    error = refusal(ACROSS[name], norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert "depends on" in error.what


def test_a_batch_norm_without_running_statistics_is_named() -> None:
    error = refusal(lambda m, x: m.norm(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert "norm" in error.what
    assert "track_running_stats" in error.remedy


RANDOM: dict[str, Callable[[Calls, Tensor], object]] = {
    "dropout": lambda m, x: F.dropout(m.conv(x), 0.5),
    "dropout of channels": lambda m, x: F.dropout2d(m.conv(x), 0.5, training=True),
    "rare dropout": lambda m, x: F.dropout(m.conv(x).mean((2, 3)), 1e-6),
    "noise": lambda m, x: m.conv(x) + 0.1 * torch.randn_like(x[:, :1]),
    "a factor": lambda m, x: m.conv(x) * torch.rand(()),
    "leaky slopes": lambda m, x: F.rrelu(m.conv(x), training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_forward_pass_is_refused_and_no_operation_is_advised_to_pass_through(name: str) -> None:
    error = refusal(RANDOM[name])
    assert "random" in error.what
    assert "pass" not in error.remedy.lower().replace("pass training=self.training", "")


class Counting(nn.Module):
    """Its output grows from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = conv(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_forward_pass_that_changes_from_call_to_call_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        trace(Counting().double(), image(), name="zoo:net")
    assert "changes from call to call" in caught.value.what


def test_random_layers_that_evaluation_switches_off_are_taken() -> None:
    model = nn.Sequential(conv(), nn.Dropout(0.5), nn.RReLU(), nn.Dropout2d(0.2)).double()
    assert list(trace(model, image()).operators) == ["0"]


def test_tracing_leaves_the_state_of_the_random_generator() -> None:
    model = Calls(RANDOM["noise"], conv=conv()).double()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(UserError):
        trace(model, image())
    assert torch.equal(torch.rand(3), expected)


def test_a_forward_pass_that_branches_on_the_batch_size_is_refused() -> None:
    assert "batch size" in refusal(lambda m, x: m.conv(x) if x.shape[0] < 5 else -m.conv(x)).what


@pytest.mark.parametrize(
    "squeeze",
    [lambda y: y.squeeze(), lambda y: y.squeeze(0).squeeze(-1).squeeze(-1), lambda y: torch.squeeze(y, (0, 2, 3))],
    ids=["all", "one by one", "several"],
)
def test_a_squeeze_keeps_the_batch_dimension_of_a_single_sample(squeeze: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.head(squeeze(m.conv(x).mean((2, 3), True))), conv=conv(), head=nn.Linear(4, 3))
    network, x = trace(model.double(), image()), image(3)
    with torch.no_grad():
        torch.testing.assert_close(network.module(x[1:2]), model(x)[1:2], rtol=1e-12, atol=0)


HEADS: dict[str, Callable[[Calls, Tensor], object]] = {
    "a column": lambda m, x: m.one(m.conv(x).mean((2, 3))),
    "a number": lambda m, x: m.one(m.conv(x).mean((2, 3))).squeeze(1),
    "squeezed": lambda m, x: m.one(m.conv(x).mean((2, 3))).squeeze(),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_model_that_gives_one_number_for_each_sample_has_one_class(name: str) -> None:
    torch.manual_seed(0)
    model = Calls(HEADS[name], conv=conv(), one=nn.Linear(4, 1)).double()
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


@pytest.mark.parametrize("name", ENDS)
def test_a_model_that_ends_in_probabilities_is_refused_unless_its_end_is_stripped(name: str) -> None:
    torch.manual_seed(0)
    end, function = ENDS[name]
    body = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double()
    model = nn.Sequential(body, end)
    with pytest.raises(UserError) as caught:
        trace(model, image())
    assert name.partition(",")[0] in caught.value.what
    assert "--strip-softmax" in caught.value.remedy
    network, x = trace(model, image(), strip_softmax=True), image(4)
    with torch.no_grad():
        torch.testing.assert_close(network.module(x), body(x), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(function(network.module(x)), model(x), rtol=1e-12, atol=1e-15)


def test_stripping_changes_nothing_in_a_model_that_ends_in_logits() -> None:
    model, x = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double(), image(4)
    stripped = trace(model, image(), strip_softmax=True)
    assert torch.equal(stripped.module(x), trace(model, image()).module(x))


def test_a_softmax_in_the_middle_is_not_stripped() -> None:
    model = nn.Sequential(conv(), nn.Softmax(1), nn.Flatten(), nn.Linear(256, 3)).double()
    with pytest.raises(UserError, match="softmax"):
        trace(model, image(), strip_softmax=True)
