"""The methods in captum's manner."""

from pathlib import Path

from torch import Tensor, nn

from patterns.attribution.explainer import Explainer
from patterns.tracing.inputs import Targets


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
        self._load = lambda example: Explainer.load(run, model, [self.method], estimator, example, strict)
        self.explainer = self._load(example)

    def attribute(self, inputs: Tensor, target: Targets | None = None) -> Tensor:
        """Return a map of each sample for its target.

        Args:
            inputs: Shape (N, …). If they have another shape than before, the model is traced again for it.
            target: One class for all, one for each sample, or None for the predicted classes.

        Returns:
            Shape of the inputs.

        Raises:
            UserError: If the patterns do not fit the model for inputs of this shape, or there is no such class.
        """
        shape = self.explainer.network.input_shape
        if inputs.dim() == len(shape) + 1 and tuple(inputs.shape[1:]) != shape:
            self.explainer = self._load(inputs[:1])
        explanation = self.explainer(inputs, target)
        return explanation.maps[self.method] * 2.0 ** explanation.exponents[self.method]


class PatternNet(Attribution):
    """The signal that the patterns of a run find for a target (Kindermans et al. 2018)."""

    method = "patternnet"


class PatternAttribution(Attribution):
    """What each input contributes to a target's score through the signal (Kindermans et al. 2018)."""

    method = "patternattribution"
