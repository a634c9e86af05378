"""PatternNet and PatternAttribution with the interface of captum."""

from pathlib import Path

from torch import Tensor, nn

from patterns.attribution.explainer import Explainer
from patterns.tracing.inputs import Targets


class Attribution:
    """Base class of the methods with captum's interface; `method` is the name of the method."""

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
        """Return the map of each sample for its target.

        Args:
            inputs: Shape (N, …). If they have another shape than before, the model is traced again for it.
            target: One class for all samples, one per sample, or None for the predicted classes.

        Returns:
            The maps, in the shape of the inputs.

        Raises:
            UserError: If the patterns do not fit the model for inputs of this shape, or there is no such class.
        """
        shape = self.explainer.network.input_shape
        if inputs.dim() == len(shape) + 1 and tuple(inputs.shape[1:]) != shape:
            self.explainer = self._load(inputs[:1])
        explanation = self.explainer(inputs, target)
        return explanation.maps[self.method] * 2.0 ** explanation.exponents[self.method]


class PatternNet(Attribution):
    """The signal in the input that the network uses for a target's score (Kindermans et al. 2018).

    Args:
        model: The model that the patterns were fitted for.
        run: The folder of a fit.
        estimator: The estimator of the patterns, or `operator-glob=name` pairs; see `choose`.
        example: An input of the model, shape (N, …); by default zeros in the shape that the patterns were fitted for.
        strict: Reject patterns that were fitted for other weights than the model's.

    Raises:
        UserError: If the run and the model do not fit together.

    Example:
        >>> import tempfile, torch
        >>> from patterns import PatternNet, accumulate, digest, save, solve, trace
        >>> model, data, run = torch.nn.Linear(4, 2), torch.randn(64, 4), tempfile.mkdtemp()
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]) for name, op in network.operators.items()}
        >>> save(run, solutions, digest(model))
        >>> PatternNet(model, run, example=data[:2]).attribute(data[:5], target=1).shape
        torch.Size([5, 4])
    """

    method = "patternnet"


class PatternAttribution(Attribution):
    """The contribution of each input to a target's score through the signal (Kindermans et al. 2018).

    Args:
        model: The model that the patterns were fitted for.
        run: The folder of a fit.
        estimator: The estimator of the patterns, or `operator-glob=name` pairs; see `choose`.
        example: An input of the model, shape (N, …); by default zeros in the shape that the patterns were fitted for.
        strict: Reject patterns that were fitted for other weights than the model's.

    Raises:
        UserError: If the run and the model do not fit together.

    Example:
        >>> import tempfile, torch
        >>> from patterns import PatternAttribution, accumulate, digest, save, solve, trace
        >>> model, data, run = torch.nn.Linear(4, 2), torch.randn(64, 4), tempfile.mkdtemp()
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]) for name, op in network.operators.items()}
        >>> save(run, solutions, digest(model))
        >>> PatternAttribution(model, run, example=data[:2]).attribute(data[:5], target=1).shape
        torch.Size([5, 4])
    """

    method = "patternattribution"
