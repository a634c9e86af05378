"""What the benchmark says of an operation: its products, its bytes, and memory."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.machine import Cost, Machine, cost
from patterns.operators import winograd


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_gradient_has_as_many_products_as_its_convolution(kind: type[nn.Module], groups: int) -> None:
    layer = kind(8, 16, 3, padding=1, groups=groups)
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    products = 2 * 4 * 10 * 10 * 16 * 8 // groups * 9
    assert cost(lambda: layer(x)).flops == products

    def backward(*wanted: Tensor) -> None:
        torch.autograd.grad(layer(x).sum(), wanted)

    assert cost(lambda: backward(x)).flops == 2 * products
    assert cost(lambda: backward(layer.weight)).flops == 2 * products
    assert cost(lambda: backward(x, layer.weight)).flops == 3 * products


def test_a_gradient_by_winograd_has_half_the_products() -> None:
    x, grad = torch.randn(4, 8, 10, 10), torch.randn(4, 16, 10, 10)
    products = 2 * 4 * 10 * 10 * 16 * 8 * 9
    assert cost(lambda: winograd.weight_gradient(x, grad, (3, 3), (1, 1))).flops == products // 2


def test_bytes_are_what_is_read_and_written_and_views_cost_nothing() -> None:
    x = torch.randn(10, 20)
    assert cost(lambda: x.T.flatten(0)[:7]).bytes == cost(lambda: x.T.contiguous()).bytes == 2 * x.nbytes
    assert cost(lambda: x + 1).bytes == 2 * x.nbytes
    assert cost(lambda: x @ x.T).bytes == 2 * x.nbytes + 10 * 10 * 4


def test_the_roofline_is_the_costlier_of_products_and_bytes() -> None:
    machine = Machine("cpu", flops=100.0, bytes=10.0)
    assert machine.roofline(Cost(flops=100, bytes=1), seconds=2.0) == 0.5
    assert machine.roofline(Cost(flops=1, bytes=40), seconds=8.0) == 0.5
