"""Measures of papers that criticize attribution maps: does a map depend on the weights, the class, the data?

Adebayo et al. 2018 (arXiv 1810.03292) randomize weights and compare maps. Sixt et al. 2020 (arXiv 1912.09818) propagate
random output gradients backward and measure their convergence. Kindermans et al. 2017 (arXiv 1711.00867) add a constant
to the inputs. Clark et al. 2023 (arXiv 2306.12816) compare maps with the ground truth of generated data.

Maps have shape (N, C, H, W), their heat (N, H, W). The measures return one number per sample, shape (N,).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns.attribution.backward_weights import OperatorWithBackwardWeight
from patterns.attribution.explainer import Explainer
from patterns.errors import UserError
from patterns.operators.operator import Addition, AveragePool, Operator
from patterns.tracing.network import Network

WINDOW, SPREAD = 11, 1.5  # of SSIM, in pixels: Wang et al. 2004, §III.C
CONSTANTS = 0.01**2, 0.03**2  # (K₁L)² and (K₂L)² there, for values of the range L = 1


# --- modified networks -----------------------------------------------------------------------------


def trained_operators(network: Network) -> list[str]:
    """Return the operators with trained weights from the input on: all except additions and average pooling."""
    return [name for name, op in network.operators.items() if not isinstance(op.operator_type, Addition | AveragePool)]


def randomize(network: Network, names: Collection[str], generator: torch.Generator) -> Network:
    """Return the network with new random weights and biases for some operators, drawn in the order of the names.

    Each tensor is drawn from a normal distribution with its own mean and standard deviation, so that outputs keep their
    order of magnitude. The generator is on the CPU.
    """
    operators = network.operators
    drawn = {
        name: with_weights(op, redraw(op.weight, generator), None if op.bias is None else redraw(op.bias, generator))
        for name, op in ((name, operators[name]) for name in names)
    }
    return replace_operators(network, drawn)


def cascade(network: Network, generator: torch.Generator) -> Iterator[tuple[str, Network]]:
    """Randomize the trained operators one after another, from the last to the first (Adebayo et al. 2018, §3).

    Yields:
        The name of the operator that was randomized last, and the network with this and all later operators randomized.
    """
    for name in reversed(trained_operators(network)):
        network = randomize(network, [name], generator)
        yield name, network


def absorb_shift(network: Network, name: str, shift: Tensor) -> Network:
    """Return the network that gives for x + shift the output for x, because the bias of an operator absorbs the shift.

    Args:
        network: The network.
        name: The operator, the only one that reads the input, as it is or reshaped.
        shift: Shape (*input_shape).

    Raises:
        UserError: If no bias can absorb the shift, for example of a convolution whose padding is not shifted.
    """
    operator = network.operators[name]
    response = operator.operator_type.forward((shift.reshape(1, *operator.input_shapes[0]),), operator.weight, None)
    per_neuron = response.movedim(operator.operator_type.axis, 0).flatten(1)
    absorbed = per_neuron[:, 0]
    if not torch.allclose(per_neuron, absorbed[:, None].expand_as(per_neuron)):
        what = "the shift changes the outputs by a different amount at each position, which no bias can absorb"
        raise UserError(name, what, "Use a constant for each channel, and an operator without padding.")
    bias = torch.zeros_like(absorbed) if operator.bias is None else operator.bias
    return replace_operators(network, {name: with_weights(operator, operator.weight, bias - absorbed)})


def redraw(values: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers with the shape, mean and standard deviation of a tensor."""
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    return values.mean() + values.std(correction=0) * noise


def with_weights(operator: Operator, weight: Tensor, bias: Tensor | None) -> Operator:
    """Return the operator with another weight and bias."""
    shapes = operator.input_shapes, operator.output_shape
    other = Operator(operator.name, operator.operator_type, weight, bias, *shapes, operator.source, operator.gate)
    other.calls, other.mixed_gates = operator.calls, operator.mixed_gates
    return other


def replace_operators(network: Network, operators: Mapping[str, Operator]) -> Network:
    """Return the network with some of its operators replaced."""
    return replace(network, module=network.rewrite(lambda op: operators.get(op.name, op)))


# --- backward pass ----------------------------------------------------------------------------------


def backward_convergence(explainer: Explainer, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Measure how similar two random output gradients become in the backward pass (Sixt et al. 2020, §4).

    Two independent normal vectors are propagated backward through the gates of each input. At a cosine of 1, only the
    length of the output gradient is left of it.

    Args:
        explainer: An explainer of one method, which is a backward pass.
        inputs: Shape (N, *input_shape).
        generator: The generator of the vectors, on the CPU.

    Returns:
        The cosine of the two gradients at the input of each operator, shape (N,), from the output to the input in the
        order of the backward pass; of an addition at its first input.
    """
    module, found = explainer.module(), dict[str, Tensor]()
    gradients = torch.randn(
        (2 * len(inputs), *explainer.network.output_shape), generator=generator, dtype=torch.float64
    )

    def record(name: str, gradient: Tensor) -> None:
        found.pop(name, None)
        found[name] = cosine(*gradient.chunk(2))

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, OperatorWithBackwardWeight)
        name = module.name
        arguments[0].register_hook(lambda gradient: record(name, gradient))

    operators = [part for part in module.modules() if isinstance(part, OperatorWithBackwardWeight)]
    hooks = [operator.register_forward_pre_hook(watch) for operator in operators]
    twice = torch.cat([inputs, inputs]).detach().requires_grad_()
    scores = module(twice)
    for hook in hooks:
        hook.remove()
    torch.autograd.grad(scores, twice, gradients.to(scores))
    return found


def singular_values(operator: Operator, weight: Tensor) -> Tensor:
    """Return the singular values of an operator's (K, D) matrix with this weight, float64, in descending order.

    The matrix of a convolution is its flattened kernel, not the map from image to image. Groups of neurons with
    different inputs are blocks on the diagonal; the values of a depthwise convolution are the lengths of its filters.
    """
    blocks = weight.detach().double().flatten(1).unflatten(0, (operator.groups, -1))
    return torch.linalg.svdvals(blocks).flatten().sort(descending=True).values


def singular_ratio(operator: Operator, weight: Tensor) -> float:
    """Return σ₁/σ₂ of an operator with this weight; infinite if there is no second direction (Sixt et al. 2020, §3)."""
    first, *others = singular_values(operator, weight).tolist()
    return first / others[0] if others and others[0] > 0 else float("inf")


# --- comparing maps --------------------------------------------------------------------------------


def heat(maps: Tensor) -> Tensor:
    """Return Σ|channel| of each map divided by its maximum, float64 (N, H, W) in [0, 1]; 0 for a map of zeros."""
    mass = maps.double().abs().sum(1)
    largest = mass.amax((1, 2), keepdim=True)
    return mass / torch.where(largest > 0, largest, 1.0)


def cosine(maps: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of pairs of maps of any shape; accurate for tiny maps, NaN if a map is 0."""
    rows, columns = (m.flatten(1).double() for m in (maps, others))
    rows, columns = (m / m.abs().amax(1, keepdim=True) for m in (rows, columns))
    return (rows * columns).sum(1) / (rows.norm(dim=1) * columns.norm(dim=1))


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's rank correlation of pairs of maps of any shape; ties share their mean rank."""
    rows, columns = ranks(maps.flatten(1)), ranks(others.flatten(1))
    return cosine(rows - rows.mean(1, keepdim=True), columns - columns.mean(1, keepdim=True))


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, from 1, float64 (N, n); ties share their mean rank."""
    found = []
    for row in values:
        _, index, count = torch.unique(row, return_inverse=True, return_counts=True)
        found.append((count.cumsum(0) - (count - 1) / 2.0).double()[index])
    return torch.stack(found)


def ssim(heats: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of images (N, H, W) with values in [0, 1] (Wang et al. 2004, eq. 13).

    It is the mean over all positions of a Gaussian window of 11×11 pixels inside the image.

    Raises:
        UserError: If the images are smaller than the window.
    """
    if min(heats.shape[1:]) < WINDOW:
        what = f"a map of {heats.shape[1]}×{heats.shape[2]} pixels is smaller than SSIM's window of {WINDOW}×{WINDOW}"
        raise UserError("", what, "Compare these maps by rank correlation.", "heats")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=heats.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:
        down = F.conv2d(values[:, None], line[None, None, :, None])
        return F.conv2d(down, line[None, None, None, :])[:, 0]

    x, y = heats.double(), others.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = CONSTANTS
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2))


def earth_movers_accuracy(heats: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - EMD / the largest distance in the image (Clark et al. 2023, §3.3); 1 if the map equals the mask.

    EMD is the exact earth mover's distance between the normalized heat and the uniform distribution on the mask. It
    solves a linear program with one variable for each pixel and pixel of the mask, so it suits small images only.

    Args:
        heats: Shape (N, H, W). A heat of zeros counts as uniform.
        mask: bool, shape (H, W), not empty.
    """
    height, width = mask.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([rows, columns], -1).flatten(0, 1).double()
    targets = mask.flatten().nonzero()[:, 0].cpu()
    distances = torch.cdist(pixels, pixels[targets])
    largest = max(float(torch.tensor([height - 1.0, width - 1.0]).norm()), 1.0)
    share = torch.full((len(targets),), 1 / len(targets), dtype=torch.float64)
    found = []
    for mass in heats.detach().cpu().double().flatten(1):
        mass = mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass))
        found.append(1 - transport_cost(mass, share, distances) / largest)
    return torch.tensor(found, dtype=torch.float64)


def transport_cost(mass: Tensor, share: Tensor, distances: Tensor) -> float:
    """Return the minimum Σ flow·distance that turns a distribution (n,) into another (m,), for distances (n, m)."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    nonzero = mass > 0
    mass, distances = mass[nonzero], distances[nonzero]
    n, m = distances.shape
    # Constraints on the flow out of each source and into each target; the last one follows from the others.
    outflow = kron(eye_array(n), [[1.0] * m])
    inflow = kron([[1.0] * n], eye_array(m))
    flows = vstack([outflow, inflow]).tocsr()[:-1]
    amounts = torch.cat([mass, share])[:-1].numpy()
    result = linprog(distances.flatten().numpy(), A_eq=flows, b_eq=amounts, method="highs")
    if result.status != 0:
        raise RuntimeError(f"the linear program of a transport has no solution: {result.message}")
    return float(result.fun)
