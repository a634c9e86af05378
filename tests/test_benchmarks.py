"""The benchmarks' count of products and bytes, and the roofline."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.machine import Cost, Machine, measure_cost
from patterns.operators import winograd


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layer_type", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradient_has_as_many_products_as_its_convolution(layer_type: type[nn.Module], groups: int) -> None:
    layer = layer_type(8, 16, 3, padding=1, groups=groups)
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    products = 2 * 4 * 10 * 10 * 16 * 8 // groups * 9
    assert measure_cost(lambda: layer(x)).flops == products

    def backward(*variables: Tensor) -> None:
        torch.autograd.grad(layer(x).sum(), variables)

    assert measure_cost(lambda: backward(x)).flops == 2 * products
    assert measure_cost(lambda: backward(layer.weight)).flops == 2 * products
    assert measure_cost(lambda: backward(x, layer.weight)).flops == 3 * products


def test_winograd_gradient_has_half_the_products() -> None:
    x, grad = torch.randn(4, 8, 10, 10), torch.randn(4, 16, 10, 10)
    products = 2 * 4 * 10 * 10 * 16 * 8 * 9
    assert measure_cost(lambda: winograd.weight_gradient(x, grad, (3, 3), (1, 1))).flops == products // 2


def test_bytes_are_counted_once_per_read_and_write_and_views_are_free() -> None:
    x = torch.randn(10, 20)
    assert (
        measure_cost(lambda: x.T.flatten(0)[:7]).bytes == measure_cost(lambda: x.T.contiguous()).bytes == 2 * x.nbytes
    )
    assert measure_cost(lambda: x + 1).bytes == 2 * x.nbytes
    assert measure_cost(lambda: x @ x.T).bytes == 2 * x.nbytes + 10 * 10 * 4


def test_roofline_is_the_larger_of_products_and_bytes() -> None:
    machine = Machine("cpu", flops=100.0, bytes=10.0)
    assert machine.roofline(Cost(flops=100, bytes=1), seconds=2.0) == 0.5
    assert machine.roofline(Cost(flops=1, bytes=40), seconds=8.0) == 0.5
