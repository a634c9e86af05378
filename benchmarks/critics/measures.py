"""Measures of papers that criticize attribution maps, which only this study uses; see also `patterns.evaluation`.

Sixt et al. 2020 (arXiv 1912.09818) propagate random output gradients backward and measure their convergence. Clark et
al. 2023 (arXiv 2306.12816) compare maps with the ground truth of generated data.

Maps have shape (N, C, H, W), their heat (N, H, W). The measures return one number per sample, shape (N,).
"""

from typing import Any

import torch
from torch import Tensor, nn

from patterns.attribution.backward_weights import OperatorWithBackwardWeight
from patterns.attribution.explainer import Explainer
from patterns.evaluation import cosine
from patterns.operators.operator import Operator

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


# --- ground truth ----------------------------------------------------------------------------------


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
