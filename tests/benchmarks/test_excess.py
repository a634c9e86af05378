"""The kinds of operations in the profile of a fit."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.excess import ADDITIONS, DENSE, FORWARD, GROUPED, profile_shares
from benchmarks.fitting import make_observer
from patterns import trace

pytestmark = pytest.mark.full


class Residual(nn.Sequential):
    """A residual block."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the block's input and output."""
        return x + super().forward(x)


@pytest.mark.parametrize(("groups", "residual"), [(1, False), (8, False), (1, True)])
def test_time_is_divided_by_what_the_network_has(groups: int, residual: bool) -> None:
    block = (Residual if residual else nn.Sequential)(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.ReLU())
    images = torch.randn(2, 8, 12, 12)
    observer = make_observer(trace(block.eval(), images), "default")
    shares = profile_shares(lambda: observer.update(images))
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares[FORWARD] > 0
    assert (shares[DENSE] > 0) == (groups == 1)
    assert (shares[GROUPED] > 0) == (groups > 1)
    assert (shares[ADDITIONS] > 0) == residual
