"""What the critics of attributions ask, as measurements: does a map follow the weights, the class, the data?

Adebayo et al. 2018 (arXiv 1810.03292) redraw weights and compare maps; Sixt et al. 2020 (arXiv 1912.09818) send
random starts back and see them become one; Kindermans et al. 2017 (arXiv 1711.00867) add a constant to the inputs;
Clark et al. 2023 (arXiv 2306.12816) compare maps with what made the data.

Maps are (N, C, H, W); their *heat* is (N, H, W). Every number is one of each sample, shape (N,).
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


# --- networks, changed ----------------------------------------------------------------------------


def learned(network: Network) -> list[str]:
    """The operators whose weights were trained, from the input on: all but sums and average pooling."""
    return [name for name, op in network.operators.items() if not isinstance(op.operator_type, Addition | AveragePool)]


def randomised(network: Network, names: Collection[str], generator: torch.Generator) -> Network:
    """The network with the weights and biases of some operators drawn anew, in the order of the names.

    From normals with the mean and standard deviation that each tensor had, so that outputs keep their order of
    magnitude. generator: on the CPU.
    """
    operators = network.operators
    drawn = {
        name: changed(op, redrawn(op.weight, generator), None if op.bias is None else redrawn(op.bias, generator))
        for name, op in ((name, operators[name]) for name in names)
    }
    return replaced(network, drawn)


def cascade(network: Network, generator: torch.Generator) -> Iterator[tuple[str, Network]]:
    """The cascading randomisation of Adebayo et al. 2018, §3: from the last trained operator down to the first.

    Gives the name of the operator that was last drawn anew, and the network in which it and all above it are.
    """
    for name in reversed(learned(network)):
        network = randomised(network, [name], generator)
        yield name, network


def shifted(network: Network, name: str, shift: Tensor) -> Network:
    """The network that gives for x + shift what this one gives for x: the bias of an operator absorbs the shift.

    shift: (*input_shape); the operator must be the only one that reads the input, as it is or in another shape.
    Raises UserError where no bias can absorb it, as of a convolution whose padding is not shifted.
    """
    operator = network.operators[name]
    response = operator.operator_type.forward((shift.reshape(1, *operator.input_shapes[0]),), operator.weight, None)
    per_neuron = response.movedim(operator.operator_type.axis, 0).flatten(1)
    absorbed = per_neuron[:, 0]
    if not torch.allclose(per_neuron, absorbed[:, None].expand_as(per_neuron)):
        remedy = "Take a constant for each channel, and an operator without padding."
        raise UserError(name, "the shift changes its outputs by position, and a bias is one number", remedy)
    bias = torch.zeros_like(absorbed) if operator.bias is None else operator.bias
    return replaced(network, {name: changed(operator, operator.weight, bias - absorbed)})


def redrawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the same shape, mean and standard deviation."""
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    return values.mean() + values.std(correction=0) * noise


def changed(operator: Operator, weight: Tensor, bias: Tensor | None) -> Operator:
    """The operator with another weight and bias."""
    shapes = operator.input_shapes, operator.output_shape
    other = Operator(operator.name, operator.operator_type, weight, bias, *shapes, operator.source, operator.gate)
    other.calls, other.mixed_gates = operator.calls, operator.mixed_gates
    return other


def replaced(network: Network, operators: Mapping[str, Operator]) -> Network:
    """The network with some of its operators replaced."""
    return replace(network, module=network.rewrite(lambda op: operators.get(op.name, op)))


# --- the way back ---------------------------------------------------------------------------------


def backward_convergence(explainer: Explainer, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """How alike two random starts have become at each operator's input, on the way back (Sixt et al. 2020, §4).

    The cosine of what arrives there of two independent normal vectors in the place of the scores, through the gates
    of each of the inputs (N, *input_shape). By operator, from the output to the input, in the order in which the way
    back is done with them; of a sum, its first input. 1: nothing of the start is left but its size.

    explainer: of one method, which is a backward pass. generator: on the CPU.
    """
    module, found = explainer.module(), dict[str, Tensor]()
    starts = torch.randn((2 * len(inputs), *explainer.network.output_shape), generator=generator, dtype=torch.float64)

    def note(name: str, gradient: Tensor) -> None:
        found.pop(name, None)
        found[name] = cosine(*gradient.chunk(2))

    def follow(part: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(part, OperatorWithBackwardWeight)
        name = part.name
        arguments[0].register_hook(lambda gradient: note(name, gradient))

    parts = [part for part in module.modules() if isinstance(part, OperatorWithBackwardWeight)]
    hooks = [part.register_forward_pre_hook(follow) for part in parts]
    twice = torch.cat([inputs, inputs]).detach().requires_grad_()
    scores = module(twice)
    for hook in hooks:
        hook.remove()
    torch.autograd.grad(scores, twice, starts.to(scores))
    return found


def singular_values(operator: Operator, weight: Tensor) -> Tensor:
    """Of an operator's neurons as a matrix (K, D) with this weight, float64, the largest first.

    A convolution's is that of its kernel laid flat, not of the map from image to image. Groups of neurons that see
    different inputs are blocks on the diagonal; of a depthwise convolution the values are its filters' lengths.
    """
    blocks = weight.detach().double().flatten(1).unflatten(0, (operator.groups, -1))
    return torch.linalg.svdvals(blocks).flatten().sort(descending=True).values


def singular_ratio(operator: Operator, weight: Tensor) -> float:
    """σ₁/σ₂ of an operator with this weight: how nearly it has one direction only (Sixt et al. 2020, §3).

    Infinite where there is no second.
    """
    first, *others = singular_values(operator, weight).tolist()
    return first / others[0] if others and others[0] > 0 else float("inf")


# --- maps, compared -------------------------------------------------------------------------------


def heat(maps: Tensor) -> Tensor:
    """Σ|channel|, each map divided by its largest: (N, C, H, W) → (N, H, W) in [0, 1], float64; 0 of a map of zeros."""
    mass = maps.double().abs().sum(1)
    largest = mass.amax((1, 2), keepdim=True)
    return mass / torch.where(largest > 0, largest, 1.0)


def cosine(maps: Tensor, others: Tensor) -> Tensor:
    """The cosine of each two maps of any shape, however small they are; NaN where one is 0."""
    rows, columns = (m.flatten(1).double() for m in (maps, others))
    rows, columns = (m / m.abs().amax(1, keepdim=True) for m in (rows, columns))
    return (rows * columns).sum(1) / (rows.norm(dim=1) * columns.norm(dim=1))


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation of each two maps of any shape; equal values share their mean rank."""
    rows, columns = ranks(maps.flatten(1)), ranks(others.flatten(1))
    return cosine(rows - rows.mean(1, keepdim=True), columns - columns.mean(1, keepdim=True))


def ranks(values: Tensor) -> Tensor:
    """The rank of each value in its row, from 1; equal values share their mean rank. (N, n) → (N, n) float64."""
    found = []
    for row in values:
        _, place, count = torch.unique(row, return_inverse=True, return_counts=True)
        found.append((count.cumsum(0) - (count - 1) / 2.0).double()[place])
    return torch.stack(found)


def ssim(heats: Tensor, others: Tensor) -> Tensor:
    """The structural similarity of images (N, H, W) with values in [0, 1] (Wang et al. 2004, eq. 13).

    The mean over all positions of a Gaussian window of 11×11 pixels that lie inside the image. UserError for an
    image that is smaller.
    """
    if min(heats.shape[1:]) < WINDOW:
        what = f"a map of {heats.shape[1]}×{heats.shape[2]} pixels is smaller than SSIM's window of {WINDOW}×{WINDOW}"
        raise UserError("ssim", what, "Compare such maps by rank correlation.")
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
    """1 - EMD / the largest distance in the image (Clark et al. 2023, §3.3), exact: 1 for a map that is the mask.

    EMD: how far the heat (N, H, W), divided by its sum, has to travel to lie equally on the pixels of the mask
    (bool (H, W), not empty), by Euclidean distance. A heat of zeros counts as equal everywhere. Needs scipy; a linear
    programme with a variable for each pixel and pixel of the mask, so for small images.
    """
    height, width = mask.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1).double()
    wanted = mask.flatten().nonzero()[:, 0].cpu()
    distances = torch.cdist(places, places[wanted])
    largest = max(float(torch.tensor([height - 1.0, width - 1.0]).norm()), 1.0)
    share = torch.full((len(wanted),), 1 / len(wanted), dtype=torch.float64)
    found = []
    for mass in heats.detach().cpu().double().flatten(1):
        mass = mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass))
        found.append(1 - transported(mass, share, distances) / largest)
    return torch.tensor(found, dtype=torch.float64)


def transported(mass: Tensor, share: Tensor, distances: Tensor) -> float:
    """The least Σ flow·distance that turns one distribution (n,) into another (m,), for distances (n, m)."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    some = mass > 0
    mass, distances = mass[some], distances[some]
    n, m = distances.shape
    # Rows say what leaves each place, and what reaches each; the last follows from the others.
    leaving = kron(eye_array(n), [[1.0] * m])
    reaching = kron([[1.0] * n], eye_array(m))
    flows = vstack([leaving, reaching]).tocsr()[:-1]
    amounts = torch.cat([mass, share])[:-1].numpy()
    done = linprog(distances.flatten().numpy(), A_eq=flows, b_eq=amounts, method="highs")
    if done.status != 0:
        raise RuntimeError(f"the linear programme of a transport has no solution: {done.message}")
    return float(done.fun)
