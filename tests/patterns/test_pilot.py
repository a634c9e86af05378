"""The number of positions that a pilot finds suffices for the tolerance, and is the smallest that does."""

import pytest
import torch
from torch import Tensor, nn

from patterns import Network, Observer, trace
from patterns.estimation import position_pilot
from patterns.estimation.jackknife import check_convergence
from patterns.estimation.position_pilot import CANDIDATES, choose_positions

pytestmark = pytest.mark.full


def network() -> Network:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    return trace(model, torch.zeros(2, 3, 32, 32))


def batches(count: int, seed: int) -> list[Tensor]:
    """Noise without correlation between neighbors, so that the error falls with the number of positions."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 32, 32, generator=generator) + 0.5 for _ in range(count)]


def worst(network: Network, positions: int | None, seed: int) -> float:
    """Return the largest p90 of the convolutions after 128 other images, by the jackknife over their batches."""
    names = ["0", "2"]
    observer, parts = Observer(network, operators=names, positions=positions), []
    for batch in batches(8, seed):
        observer.update(batch)
        parts.append(observer.moments())
        observer.reset()
    found = [check_convergence(network.operators[n], [lambda p=p, n=n: p[n] for p in parts]) for n in names]  # type: ignore[misc]
    return max(error.p90 for check in found for error in check.errors.values() if error is not None)


def test_choice_is_the_smallest_number_of_positions_that_reaches_the_tolerance() -> None:
    net = network()
    few, many = CANDIDATES
    errors = {positions: worst(net, positions, seed=2) for positions in CANDIDATES}
    assert errors[few] > 1.5 * errors[many], "more positions do not help on these images"
    for positions, tolerance in ((few, 1.5 * errors[few]), (many, (errors[few] * errors[many]) ** 0.5)):
        found = choose_positions(net, batches(8, seed=1), 128, tolerance)
        assert found.positions == positions
        assert found.error == pytest.approx(errors[positions], rel=0.3)
    assert choose_positions(net, batches(8, seed=1), 128, errors[many] / 4).positions is None
    # With many more images, fewer positions suffice.
    assert choose_positions(net, batches(8, seed=1), 128 * 32, errors[many]).positions == few


def test_operators_with_few_positions_are_not_considered() -> None:
    torch.manual_seed(0)
    net = trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), torch.zeros(2, 3, 2, 2))
    found = choose_positions(net, [torch.randn(4, 3, 2, 2) for _ in range(4)], 10, 1e-9)
    assert (found.positions, found.error) == (CANDIDATES[0], 0)


@pytest.mark.parametrize("estimators", ["default", "multivariate"])
def test_a_part_of_the_neurons_and_operators_is_tried(monkeypatch: pytest.MonkeyPatch, estimators: str) -> None:
    monkeypatch.setattr(position_pilot, "NEURONS", 2)
    whole = choose_positions(network(), batches(8, seed=1), 128, 0, estimators)
    monkeypatch.setattr(position_pilot, "NEURONS", 8)
    assert whole.error == pytest.approx(
        choose_positions(network(), batches(8, seed=1), 128, 0, estimators).error, rel=1
    )
    monkeypatch.setattr(position_pilot, "OPERATORS", 1)
    last = choose_positions(network(), batches(8, seed=1), 128, 0, estimators).error
    assert 0 < last <= 2 * whole.error


def test_too_few_batches_are_rejected() -> None:
    with pytest.raises(ValueError, match="3 batches"):
        choose_positions(network(), batches(3, seed=0), 100, 0.1)
