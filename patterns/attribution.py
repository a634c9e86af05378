"""The methods in captum's manner."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patterns.explain import Explainer


class Attribution:
    """A method as an object: `PatternAttribution(model, run).attribute(inputs, target=3)`.

    run: the folder of a fit of this model. The other arguments are those of `Explainer.load`.
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
        self.explainer = Explainer.load(run, model, [self.method], estimator, example, strict)

    def attribute(self, inputs: Tensor, target: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """A map of each sample for its target, of the inputs' shape (N, …).

        target: one class for all, one for each sample, or None for those predicted.
        """
        targets = None
        if target is not None:
            targets = torch.as_tensor(target, dtype=torch.int64, device=inputs.device).expand(len(inputs))
        explanation = self.explainer(inputs, targets)
        return explanation.maps[self.method] * 2.0 ** explanation.exponents[self.method]


class PatternNet(Attribution):
    """The signal that the patterns of a run find for a target (Kindermans et al. 2018)."""

    method = "patternnet"


class PatternAttribution(Attribution):
    """What each input contributes to a target's score through the signal (Kindermans et al. 2018)."""

    method = "patternattribution"
