"""Two random output gradients in the backward pass, and σ₁/σ₂ of its weights (Sixt et al. 2020)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.critics.measures import backward_convergence, singular_ratio
from patterns import Explainer, Network, trace

PLAIN = "gradient", "deconvnet", "guided-backprop"
ESTIMATORS = "two-component", "linear"
PATTERNED = tuple(f"{method}:{e}" for method in ("patternnet", "patternattribution") for e in ESTIMATORS)
NORMALS = "normal weights"


def average_positions(layers: Iterable[nn.Module], example: Tensor) -> Network:
    """Return the network from images to the mean of each channel of the last layer.

    An output gradient of it is the same at all positions of the last layer, like that of a class score, which has no
    positions. The operators keep their names.
    """
    return trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), example)


def measure_convergence(
    network: Network, patterns: Mapping[str, Mapping[str, Tensor]], images: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Return the |cosine| of two random output gradients at the input of each operator with patterns, by method."""
    # Average pooling divides an output gradient equally, in every method.
    operators = set(next(iter(patterns.values())))
    pools = {name: filter_pattern(op.weight) for name, op in network.operators.items() if name not in operators}
    completed = {estimator: {**of, **pools} for estimator, of in patterns.items()}
    normals = {"": {**draw_normals(network), **pools}}  # used as patterns
    passes = {name: (name, completed) for name in (*PLAIN, *PATTERNED)}
    found = {}
    for label, (name, weights) in {**passes, NORMALS: ("patternnet", normals)}.items():
        explainer = Explainer(network, weights.get(""), [name], estimators=weights)
        curves = [
            backward_convergence(explainer, image[None], torch.Generator().manual_seed(number))
            for number, image in enumerate(images)
        ]
        found[label] = {op: torch.cat([curve[op] for curve in curves]).abs() for op in curves[0] if op in operators}
        print(f"{label}: {float(found[label][next(reversed(found[label]))].mean()):.3f} at the image", flush=True)
    return found


def filter_pattern(weight: Tensor) -> Tensor:
    """Return w / wᵀw for each neuron."""
    return weight / weight.square().flatten(1).sum(1).view(-1, *[1] * (weight.dim() - 1))


def draw_normals(network: Network) -> dict[str, Tensor]:
    """Return standard normal numbers in the shape of each operator's weight."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(op.weight.shape, generator=generator) for name, op in network.operators.items()}


def measure_singular_ratios(
    network: Network, patterns: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Return σ₁/σ₂ of w, a and w⊙a by operator.

    The matrix of a convolution is its flattened kernel. The authors' code uses the center of the kernel, (K, inputs).
    """
    found: dict[str, dict[str, float]] = {}
    normals = draw_normals(network)
    for name, op in network.operators.items():
        a, b = (patterns[estimator][name] for estimator in ESTIMATORS)
        weights = {
            "normal numbers": normals[name], "w": op.weight, "a": a, "w⊙a": op.weight * a, "w⊙a, linear": op.weight * b
        }  # fmt: skip
        for label, weight in weights.items():
            found.setdefault(label, {})[name] = singular_ratio(op, weight)
            center = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
            found.setdefault(f"{label}, center", {})[name] = singular_ratio(op, center)
    return found


def measure_negative_shares(network: Network, patterns: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the negative share of the mass of w⊙a by operator."""
    products = {name: op.weight * patterns[name] for name, op in network.operators.items()}
    return {name: float(-p.clamp(max=0).sum() / p.abs().sum()) for name, p in products.items()}
