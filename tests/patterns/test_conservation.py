"""PatternAttribution's map sums to the target's value less the losses, and every loss is found."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Network, accumulate, choose, solve, trace
from patterns.evaluation.conservation import Loss, conservation
from tests.patterns.networks import randomize, traced
from tests.patterns.readings import READINGS, trace_reading


def fitted(network: Network, batches: Sequence[Tensor], choice: str = "two-component") -> dict[str, Tensor]:
    moments = accumulate(network, batches)
    solved = {name: solve(op, moments[name], [choice]).patterns for name, op in network.operators.items()}
    return choose(network, solved, choice)


def shares(network: Network, patterns: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """Return Σ map / the target's value of each sample."""
    found = Explainer(network, patterns, ["patternattribution"])(inputs, targets)
    sums = found.maps["patternattribution"].flatten(1).sum(1) * 2.0 ** found.exponents["patternattribution"]
    return sums / found.scores.gather(1, targets[:, None])[:, 0]


def lost(losses: Sequence[Loss]) -> dict[str, float]:
    """Return the total loss by cause."""
    causes: dict[str, float] = defaultdict(float)
    for loss in losses:
        causes[loss.cause] += loss.lost
    return dict(causes)


class Linear(nn.Module):
    """Every operator type without borders, with biases, 14 layers deep."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.folded_norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.grouped = nn.ModuleList(nn.Conv2d(6, 6, 1, groups=3) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.strided, self.dilated = nn.Conv2d(6, 8, 2, stride=3, bias=False), nn.Conv2d(14, 5, 2, dilation=2)
        self.hidden, self.head = nn.Linear(5 * 2 * 2, 7), nn.Linear(7, 3)
        for norm in (self.folded_norm, *self.norms):
            randomize(norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.folded_norm(self.stem(x))
        for grouped, norm in zip(self.grouped, self.norms):
            x = norm(x + 0.5 * grouped(x) - 1)
        x = torch.cat([self.strided(x), F.avg_pool2d(x, 2, 3)], 1)
        x = F.max_pool2d(self.dilated(x), 2, 1).transpose(1, 2)
        return self.head(self.hidden(x.flatten(1)))


@pytest.mark.full
@pytest.mark.parametrize("choice", ["two-component", "linear", "filter", "random"])
def test_map_sums_to_the_targets_value_without_gates_and_borders(choice: str) -> None:
    torch.manual_seed(6)
    x = torch.randn(40, 2, 17, 17, dtype=torch.float64) + 0.2
    network = trace(Linear().double(), x[:1])
    types = {type(op.operator_type).__name__ for op in network.operators.values()}
    assert types == {"Convolution", "Scale", "Addition", "AveragePool", "Linear"}
    patterns = fitted(network, x.split(20), choice)
    targets = torch.arange(5) % 3
    torch.testing.assert_close(
        shares(network, patterns, x[:5], targets), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-10
    )
    losses = conservation(network, patterns, x[:5], targets)
    assert {loss.name for loss in losses if loss.cause == "neuron"} == set(network.operators)
    for loss in losses:
        assert abs(loss.lost) < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param("vgg11", marks=pytest.mark.slow), "resnet18"])
def test_losses_add_up_to_the_difference_between_map_and_target(name: str) -> None:
    it = traced(name)
    patterns = fitted(it.network, it.inputs.split(1))
    targets = torch.tensor([1, 4, 9])
    losses = conservation(it.network, patterns, it.inputs, targets)
    reached = float(shares(it.network, patterns, it.inputs, targets).mean())
    causes = lost(losses)
    largest = max(abs(loss.received) for loss in losses)
    assert abs(1 - sum(causes.values()) - reached) < 1e-10 * largest
    assert abs(causes["gate"]) > 1e-3
    assert abs(causes["border"]) > 1e-3
    assert abs(causes.get("other", 0.0)) < 1e-10 * largest


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", READINGS)
def test_every_spelling_of_an_operation_loses_relevance_at_gates_only(name: str) -> None:
    network, x = trace_reading(name).network, trace_reading(name).inputs
    patterns, targets = fitted(network, [x]), torch.arange(len(x)) % 3
    losses = conservation(network, patterns, x, targets)
    largest = max(abs(loss.received) for loss in losses)
    assert abs(1 - lost(losses).get("gate", 0.0) - shares(network, patterns, x, targets).mean()) < 1e-10 * largest


@pytest.mark.full
def test_loss_at_borders_is_the_relevance_of_explicit_padding() -> None:
    torch.manual_seed(7)
    x = torch.randn(8, 2, 7, 6, dtype=torch.float64)
    within = nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), stride=2, padding=(1, 2), dilation=1), nn.Flatten(), nn.Linear(36, 4)
    )
    without = nn.Sequential(nn.Conv2d(2, 3, (3, 5), stride=2), *list(within)[1:]).double()
    without.load_state_dict(within.double().state_dict())
    network, padded = trace(within, x), trace(without, F.pad(x, (2, 2, 1, 1)))
    patterns = fitted(network, [x])
    targets = torch.arange(8) % 4
    found = Explainer(padded, patterns, ["patternattribution"])(F.pad(x, (2, 2, 1, 1)), targets)
    relevance = found.maps["patternattribution"]
    border = relevance.flatten(1).sum(1) - relevance[:, :, 1:-1, 2:-2].flatten(1).sum(1)
    expected = float((border / found.scores.gather(1, targets[:, None])[:, 0]).mean())
    causes = lost(conservation(network, patterns, x, targets))
    assert abs(expected) > 1e-3
    assert abs(causes["border"] - expected) < 1e-10
    assert abs(causes["neuron"]) < 1e-10


@pytest.mark.full
def test_transposed_convolutions_lose_the_share_on_zeros_between_inputs() -> None:
    torch.manual_seed(11)
    x = torch.randn(30, 2, 3, 3, dtype=torch.float64)
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Flatten(), nn.Linear(3 * 36, 4))
    network = trace(model.double().requires_grad_(False), x)
    patterns, targets = fitted(network, [x]), torch.zeros(30, dtype=torch.int64)
    relevance = (model[2].weight[0] * patterns["2"][0]).view(3, 3, 2, 3, 2)  # by neuron, row, phase, column, phase
    shares_of_phases = (network.operators["0"].weight * patterns["0"]).sum(1)  # over its two inputs
    torch.testing.assert_close(shares_of_phases.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    expected = float((relevance * (1 - shares_of_phases)[:, None, :, None, :]).sum())
    causes = lost(conservation(network, patterns, x, targets))
    assert abs(expected) > 0.1
    assert abs(causes["border"] - expected) < 1e-10
    assert abs(causes["neuron"]) < 1e-10
    torch.testing.assert_close(shares(network, patterns, x, targets), torch.full((30,), 1 - expected).double())


@pytest.mark.full
@pytest.mark.parametrize("in_place", [False, True])
def test_closed_gates_lose_their_relevance(in_place: bool) -> None:
    torch.manual_seed(8)
    x = torch.randn(30, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(in_place), nn.Linear(6, 2)).double().requires_grad_(False)
    network = trace(model, x)
    patterns = fitted(network, [x])
    relevance = model[2].weight[0] * patterns["2"][0]  # of each hidden unit, as a share of the first class's value
    expected = float((relevance * (model[0](x) <= 0)).sum(1).mean())
    causes = lost(conservation(network, patterns, x, torch.zeros(30, dtype=torch.int64)))
    assert abs(expected) > 1e-3
    assert abs(causes["gate"] - expected) < 1e-12
    assert abs(causes["border"]) < 1e-12


@pytest.mark.full
def test_neurons_without_a_pattern_lose_their_relevance() -> None:
    torch.manual_seed(9)
    x = torch.randn(30, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)).double().requires_grad_(False)
    network = trace(model, x)
    patterns = fitted(network, [x])
    patterns["0"][2] = 0.0
    losses = conservation(network, patterns, x, torch.ones(30, dtype=torch.int64))
    (loss,) = (loss for loss in losses if loss.cause == "neuron" and loss.name == "0")
    assert abs(loss.lost - float(model[1].weight[1, 2] * patterns["1"][1, 2])) < 1e-12
    assert abs(lost(losses)["border"]) < 1e-12


@pytest.mark.full
def test_explicit_padding_counts_as_a_border() -> None:
    torch.manual_seed(10)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(50, 3)).double()
    network = trace(model, x)
    patterns = fitted(network, [x])
    targets = torch.arange(6) % 3
    causes = lost(conservation(network, patterns, x, targets))
    assert abs(causes["border"] - 1 + float(shares(network, patterns, x, targets).mean())) < 1e-10
    assert abs(causes["border"]) > 1e-3
    assert abs(causes["other"]) < 1e-12


@pytest.mark.full
def test_gradient_x_input_sums_to_the_targets_value_of_a_rectifier_network_without_biases() -> None:
    """Euler's theorem: with any gates and borders, the score is homogeneous of degree 1 in the input."""
    torch.manual_seed(12)
    layers = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    model = nn.Sequential(*layers, nn.LeakyReLU(), nn.AvgPool2d(2, 1, 1), nn.Flatten(), nn.Linear(72, 3, bias=False))
    x, targets = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    found = Explainer(trace(model.double(), x), None, ["gradient-x-input"])(x, targets)
    sums = found.maps["gradient-x-input"].flatten(1).sum(1)
    torch.testing.assert_close(sums, found.scores.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-14)
