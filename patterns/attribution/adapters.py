"""Fitted patterns for those who use other libraries: the ways in which zennit and Quantus ask for maps."""

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


class Replaced(Canonizer):  # type: ignore[misc] # zennit has no types
    """While it is applied, a model computes what another module computes, gradients included."""

    def __init__(self, model: nn.Module, by: nn.Module) -> None:
        super().__init__()
        self.model, self.by = model, by

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        if root_module is not self.model:
            what = "the composite is registered to another model than it was made for"
            raise UserError(type(root_module).__name__, what, "Make a composite for this one.")
        self.register()
        return [self]

    def register(self) -> None:
        self.model.forward = self.by.forward

    def remove(self) -> None:
        self.model.__dict__.pop("forward", None)

    def copy(self) -> "Replaced":
        return Replaced(self.model, self.by)


class PatternComposite(Composite):  # type: ignore[misc] # zennit has no types
    """A zennit composite: what it is registered to has a method's pass for its gradient.

    As with zennit's own, the relevance that an attributor starts from is the user's to say; PatternNet and
    PatternAttribution start from the target's value. Where a pass leaves the dtype's range, the result is the
    explanation times a power of two, the same one for all samples.
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
        super().__init__(canonizers=[Replaced(model, explainer.module())])


class PatternNetComposite(PatternComposite):
    """PatternNet as a zennit composite."""

    method = "patternnet"


class PatternAttributionComposite(PatternComposite):
    """PatternAttribution as a zennit composite."""

    method = "patternattribution"


def quantus_explain(
    run: str | Path, method: str = "patternattribution", estimator: str = "default", strict: bool = True
) -> Callable[..., np.ndarray]:
    """An `explain_func` for Quantus' metrics, of model, inputs (N, C, H, W) and targets (N,): (N, 1, H, W).

    That is the sum of a map's channels.

    strict: refuse a model of other weights than the patterns'; Quantus' randomisation tests need False, which
    carries the patterns over to the randomised model.
    """
    explainers: dict[tuple[str, tuple[int, ...]], Explainer] = {}  # of the last model and shape

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
