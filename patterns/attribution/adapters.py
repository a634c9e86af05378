"""Fitted patterns for other libraries: composites for zennit and an explanation function for Quantus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite

from patterns.attribution.explainer import Explainer
from patterns.errors import UserError
from patterns.tracing.digests import digest


class ForwardReplacement(Canonizer):  # type: ignore[misc] # zennit has no types
    """Canonizer that makes a model run another module's forward pass, and so its gradients, while it is applied."""

    def __init__(self, model: nn.Module, replacement: nn.Module) -> None:
        super().__init__()
        self.model, self.replacement = model, replacement

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Replace the forward pass of the model that the composite was made for."""
        if root_module is not self.model:
            what = "the composite is registered to another model than it was made for"
            raise UserError(type(root_module).__name__, what, "Create a composite for this model.")
        self.register()
        return [self]

    def register(self) -> None:
        """Replace the forward pass."""
        self.model.forward = self.replacement.forward

    def remove(self) -> None:
        """Restore the model's own forward pass."""
        self.model.__dict__.pop("forward", None)

    def copy(self) -> "ForwardReplacement":
        """Return another replacement of the same forward pass."""
        return ForwardReplacement(self.model, self.replacement)


class PatternComposite(Composite):  # type: ignore[misc] # zennit has no types
    """A zennit composite with which the gradient of a model is a method with patterns; `method` is its name.

    As with zennit's own composites, the caller chooses the output gradient; PatternNet and PatternAttribution use the
    target's value. If the map exceeds the range of its dtype, the result is the map times a power of two, the same one
    for all samples.

    Args:
        model: The model that the patterns were fitted for.
        run: The folder of a fit.
        estimator: The estimator of the patterns, or `operator-glob=name` pairs; see `choose`.
        example: An input of the model, shape (N, …); by default zeros in the shape that the patterns were fitted for.
        strict: Reject patterns that were fitted for other weights than the model's.
    """

    method: str

    def __init__(
        self,
        model: nn.Module,
        run: str | Path,
        estimator: str = "default",
        example: Tensor | None = None,
        strict: bool = True,
    ) -> None:
        explainer = Explainer.load(run, model, [self.method], estimator, example, strict)
        super().__init__(canonizers=[ForwardReplacement(model, explainer.module())])


class PatternNetComposite(PatternComposite):
    """PatternNet as a zennit composite, with the arguments of `PatternComposite`."""

    method = "patternnet"


class PatternAttributionComposite(PatternComposite):
    """PatternAttribution as a zennit composite.

    As with zennit's own composites, the caller chooses the output gradient; PatternAttribution uses the target's value.
    If the map exceeds the range of its dtype, the result is the map times a power of two, the same one for all samples.

    Args:
        model: The model that the patterns were fitted for.
        run: The folder of a fit.
        estimator: The estimator of the patterns, or `operator-glob=name` pairs; see `choose`.
        example: An input of the model, shape (N, …); by default zeros in the shape that the patterns were fitted for.
        strict: Reject patterns that were fitted for other weights than the model's.

    Raises:
        UserError: If the run and the model do not fit together, or the composite is registered to another model.

    Example:
        >>> import tempfile, torch
        >>> from zennit.attribution import Gradient
        >>> from patterns import PatternAttributionComposite, accumulate, digest, save, solve, trace
        >>> model, data, run = torch.nn.Linear(4, 2), torch.randn(64, 4), tempfile.mkdtemp()
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]) for name, op in network.operators.items()}
        >>> save(run, solutions, digest(model))
        >>> composite = PatternAttributionComposite(model, run, example=data[:2])
        >>> with Gradient(model, composite) as attributor:
        ...     scores, maps = attributor(data[:5], lambda scores: scores * torch.tensor([0.0, 1.0]))
        >>> maps.shape
        torch.Size([5, 4])
    """

    method = "patternattribution"


def quantus_explain(
    run: str | Path, method: str = "patternattribution", estimator: str = "default", strict: bool = True
) -> Callable[..., np.ndarray]:
    """Return an `explain_func` for the metrics of Quantus.

    Args:
        run: The folder of a fit.
        method: A name from `METHODS`.
        estimator: The estimator of the patterns, or `operator-glob=name` pairs; see `choose`.
        strict: Reject patterns that were fitted for other weights than the model's. Quantus' randomization tests need
            False, which uses the patterns with the randomized model.

    Returns:
        Function from a model, inputs (N, C, H, W) and targets (N,) to the sum of each map over its channels, shape
        (N, 1, H, W).

    Example:
        >>> import tempfile, torch
        >>> from patterns import accumulate, digest, quantus_explain, save, solve, trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 4), torch.nn.Flatten())
        >>> data, run = torch.randn(64, 3, 4, 4), tempfile.mkdtemp()
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]) for name, op in network.operators.items()}
        >>> save(run, solutions, digest(model))
        >>> quantus_explain(run)(model, data[:5].numpy(), [0, 1, 0, 1, 0]).shape
        (5, 1, 4, 4)
    """
    explainers: dict[tuple[str, tuple[int, ...]], Explainer] = {}  # that of the last model and input shape

    def explain_func(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        like = next(model.parameters())
        x = torch.as_tensor(inputs).to(like)
        key = digest(model), tuple(x.shape[1:])
        if key not in explainers:
            explainers.clear()
            explainers[key] = Explainer.load(run, model, [method], estimator, x[:1], strict)
        explanation = explainers[key](x, targets)
        return explanation.maps[method].sum(1, keepdim=True).cpu().numpy()

    return explain_func
