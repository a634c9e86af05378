"""Explainers: one backward pass per method over a shared forward pass; the methods are in `methods`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from patterns.attribution import gradient_scaling
from patterns.attribution.backward_weights import (
    OperatorWithBackwardWeight,
    Patterns,
    Weights,
    compute_backward_weights,
    find_identities,
)
from patterns.attribution.channels import Capture
from patterns.attribution.explanation import Explanation
from patterns.attribution.gradient_scaling import BranchScale, ValueClasses
from patterns.attribution.methods import BackwardPass, parse_method, resolve_settings
from patterns.attribution.rectifier_rules import Rule, gate, insert_rules
from patterns.attribution.rendering import RenderedExplanation, render_input
from patterns.attribution.scale_rules import insert_scale_rules
from patterns.compilation import ForwardBackward
from patterns.errors import UserError
from patterns.io.pattern_files import choose, load, load_trace_options
from patterns.operators.operator import Operator
from patterns.tracing.digests import digest
from patterns.tracing.inputs import (
    Targets,
    choose_targets,
    has_several_targets,
    make_output_gradient,
    validate_inputs,
)
from patterns.tracing.network import Network, trace
from patterns.tracing.scales import CONSTANT_FACTORS, has_scales

# From output gradients to the results of all backward passes, for one output gradient after the other.
BackwardFunction = Callable[[Sequence[Tensor]], Iterator[list[Tensor]]]


class Explainer:
    """Explainer of a network's scores by several methods.

    All backward passes share one forward pass; the methods that zennit computes run their own. If the network ends at
    an operator (`Network.until`), a target is a neuron of this operator, and its values at all spatial positions are
    explained together. An explainer must not be used by several threads at once.

    Args:
        network: The traced network.
        patterns: Patterns by operator name, each in the shape of the operator's weight; None for the identity
            estimator. None if no method needs patterns.
        methods: Names from `METHODS`. A method with patterns can name an estimator: `patternnet:linear`.
        scales: `scales` of an earlier explainer of the same network and patterns. Methods without scales are
            calibrated, which takes a few backward passes.
        estimators: Patterns by estimator and operator name, for methods that name an estimator.
        settings: Settings of the methods by `{method}.{setting}`, for example `{"smoothgrad.samples": 50}`.
        channels: Names of operators whose channels' relevance and activation are recorded in the same passes, as
            `Explanation.channels`. Methods: `patternattribution`, `gradient-x-input` and `gradient`.

    Raises:
        UserError: If a method, setting or operator is unknown, a pattern is missing or has the wrong shape, the scales
            are those of another network, or a method has no relevance at hidden units.

    Example:
        >>> import torch
        >>> from patterns import Explainer, accumulate, choose, solve, trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> data = torch.randn(64, 4)
        >>> network = trace(model, data[:2])
        >>> moments = accumulate(network, [data])
        >>> solutions = {name: solve(op, moments[name]).patterns for name, op in network.operators.items()}
        >>> explainer = Explainer(network, choose(network, solutions), ["gradient", "patternattribution"])
        >>> explainer(data[:5]).maps["patternattribution"].shape
        torch.Size([5, 4])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        network: Network,
        patterns: Patterns | None,
        methods: Collection[str],
        scales: Mapping[str, Sequence[int]] | None = None,
        estimators: Mapping[str, Patterns] | None = None,
        settings: Mapping[str, float] | None = None,
        channels: Collection[str] = (),
    ) -> None:
        if not network.output_shape:
            what = "the model returns one number per sample instead of a score per class"
            raise UserError("", what, "Explain a model whose output has shape (N, classes).", "model")
        self.network, self._like = network, network.like
        self._methods = {name: parse_method(name) for name in methods}
        if not has_scales(network.module):  # then the rules for scales make no difference, and methods share passes
            self._methods = {name: method.without_scales() for name, method in self._methods.items()}
        self.settings = resolve_settings(self._methods, settings or {})
        self._capture = Capture(network, channels, self._methods)
        by_estimator: dict[str, Patterns] = {"": patterns or {}, **(estimators or {})}
        self._procedures = {
            name: method.procedure(network, {key: self.settings[f"{name}.{key}"] for key in method.settings})
            for name, method in self._methods.items()
            if method.procedure is not None
        }
        passes = dict.fromkeys(method.backward for method in self._methods.values() if method.backward is not None)
        self._weights = {b: compute_backward_weights(network, by_estimator.get(b.estimator, {}), b) for b in passes}
        self._identities = {b: find_identities(by_estimator.get(b.estimator, {}), b) for b in passes}
        self._exponents = dict.fromkeys(passes, 0)
        self._output_exponents: dict[BackwardPass, dict[str, int]] = {backward: {} for backward in passes}
        self._restored = dict.fromkeys(passes, 0)  # exponent multiplied back into a scaled pass's result if it fits
        self._current: Weights = {}
        self._identity: Collection[str] = ()
        self._rule: Rule = gate
        self._module = network.rewrite(self._make_operator)
        if any(backward.rectifier is not gate for backward in passes):
            insert_rules(self._module, lambda: self._rule)
        self._scale_rules = CONSTANT_FACTORS
        if has_scales(network.module):
            insert_scale_rules(self._module, lambda: self._scale_rules, lambda: self._identity)
        self._potentials = self._scale_weights(network, scales or {})
        self._compiled: dict[torch.Size, ForwardBackward] = {}

    @classmethod
    def load(
        cls,
        run: str | Path,
        model: nn.Module,
        methods: Collection[str] = ("patternattribution",),
        estimator: str = "default",
        example: Tensor | None = None,
        strict: bool = True,
        settings: Mapping[str, float] | None = None,
    ) -> "Explainer":
        """Load the patterns of a run and return an explainer of a model, on the model's device.

        Args:
            run: The folder of a fit.
            model: The model that the patterns were fitted for.
            methods: As for `Explainer`.
            estimator: The estimator of the methods that name none; or `operator-glob=name` pairs, see `choose`.
            example: An input of the model, shape (N, …); by default zeros in the shape that the patterns were fitted
                for.
            strict: Reject patterns that were fitted for other weights than the model's.
            settings: As for `Explainer`.

        Raises:
            UserError: If the run, the model and the methods do not fit together.
        """
        folder = Path(run)
        weight = next(model.parameters())
        options = load_trace_options(folder, None if example is None else tuple(example.shape[1:]))
        network = trace(
            model,
            torch.zeros((2, *options.input_shape), dtype=weight.dtype, device=weight.device),
            name=type(model).__name__,
            pass_through=options.pass_through,
            strip_softmax=options.strip_softmax,
        )
        patterns = load(folder, digest(model) if strict else None)
        passes = [parse_method(name).backward for name in methods]
        named = {b.estimator for b in passes if b is not None and b.estimator}
        chosen = choose(network, patterns, estimator) if any(b and b.needs_patterns for b in passes) else None
        return cls(
            network, chosen, methods, estimators={e: choose(network, patterns, e) for e in named}, settings=settings
        )

    def __repr__(self) -> str:
        operators = len(self.network.operators)
        return f"Explainer of {operators} operators for {self.network.input_shape} by {', '.join(self._methods)}"

    def show(
        self,
        image: Tensor | Image.Image,
        target: int | None = None,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
    ) -> RenderedExplanation:
        """Explain one image and return its maps as pictures, which a notebook displays as a row.

        Args:
            image: An input of the model, shape (C, H, W) or (1, C, H, W), or a photograph.
            target: The class to explain; by default the predicted one.
            preprocess: Function from a photograph to an input, shape (C, H, W); the model's library has it.

        Raises:
            UserError: If the image is a photograph and `preprocess` is missing.
        """
        if isinstance(image, Tensor):
            x = image.reshape(1, *image.shape[-3:])
        elif preprocess is None:
            what = "a photograph needs preprocessing before the model can take it"
            raise UserError(
                "", what, "Pass `preprocess=...`, for example torchvision's weights.transforms().", "preprocess"
            )
        else:
            x = preprocess(image.convert("RGB"))[None]
        x = x.to(self.network.like)
        return self(x, target).render(0, render_input(x[0].float().cpu().numpy()))

    def module(self) -> nn.Module:
        """Return the network as a module whose input gradient is the explainer's only method.

        For libraries that take gradients of models. The map is the gradient times 2^exponents[method]. The module has
        no second derivatives.
        """
        (method,) = self._methods.values()
        assert method.backward is not None
        self._select(method.backward)
        restored = 2.0 ** self._restored[method.backward]
        factor = next(iter(self._current.values())).new_tensor(restored)
        return nn.Sequential(BranchScale("input", lambda: factor), self._module)

    @property
    def scales(self) -> dict[str, list[int]]:
        """The potential φ of each method's backward pass (see `gradient_scaling`), for the `scales` of an explainer.

        One integer per class of values of the graph, from the output to the input; [] for a pass that needs no
        scaling. φ is calibrated on noise, so it can differ by rounding between hardware. Explainers with the same
        scales return the same exponents.
        """
        return {name: self._potentials[m.backward] for name, m in self._methods.items() if m.backward is not None}

    @property
    def exponents(self) -> dict[str, int]:
        """The exponent of two that the maps of each method are to be multiplied by, see `Explanation`."""
        return {name: self._exponents[m.backward] if m.backward else 0 for name, m in self._methods.items()}

    @torch.inference_mode(False)
    def __call__(
        self,
        inputs: Tensor,
        targets: Targets | Callable[[Tensor], Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Explanation:
        """Explain the score of each sample's target.

        Args:
            inputs: Shape (N, *input_shape), in the network's dtype and on its device.
            targets: What to explain, by default the predicted class. Classes: one for all samples, one per sample
                (N,), or several per sample (N, T), as a number, list, array or tensor. Or floating-point weights in
                the shape of the scores, to explain a weighted sum: 1 for one class and -1 for another explain the
                difference. Or a function from the scores to such a tensor.
            seeds: Seeds of the random methods, one per sample, by default 0. A sample's map depends on no other
                sample.

        Raises:
            UserError: If inputs or targets do not fit the network.
        """
        if targets is None and len(self.network.output_shape) != 1:
            what = f"the model gives outputs of shape {self.network.output_shape}, not a score for each class"
            raise UserError("", what, "Pass `targets=...`.", "targets")
        inputs = validate_inputs(inputs, self._like)
        forward = self._compiled.get(inputs.shape, self._forward)
        scores, chosen, results, maps = self.run(inputs, partial(choose_targets, targets), seeds, forward)
        recorded = [result[len(self._weights) :] for result in results]
        several = has_several_targets(chosen)
        channels = self._capture.collect(self._methods, recorded, several, self._output_exponents)
        return Explanation(maps, self.exponents, scores, chosen, channels)

    def run(
        self,
        inputs: Tensor,
        choose: Callable[[Tensor], Tensor],
        seeds: Sequence[int] | None = None,
        forward: Callable[[Tensor], tuple[Tensor, BackwardFunction]] | None = None,
    ) -> tuple[Tensor, Tensor, list[list[Tensor]], dict[str, Tensor]]:
        """Return scores, targets, results of the backward passes, and maps; `choose` maps scores to targets.

        If all methods are backward passes, these are operations on tensors only, which can be captured as a graph.
        """
        scores, backward = (forward or self._forward)(inputs)
        chosen = choose(scores)
        several = has_several_targets(chosen)
        gradients = [make_output_gradient(t, scores) for t in (chosen.unbind(1) if several else [chosen])]
        results = list(backward(gradients))
        found = [self._maps(inputs, gradient, r, seeds) for gradient, r in zip(gradients, results)]
        maps = {name: torch.stack([m[name] for m in found], 1) if several else found[0][name] for name in found[0]}
        return scores, chosen, results, maps

    def compile(self, batch_size: int, mode: str = "default") -> None:
        """Compile the forward and backward passes for batches of one size. Other batch sizes run uncompiled.

        Methods that are not a backward pass of the shared forward pass (`smoothgrad`, `lrp-z`, …) are not compiled.

        Args:
            batch_size: The number of samples in a batch.
            mode: A mode of `torch.compile`, which takes a minute or two and changes maps by rounding only; or
                `cudagraphs`, which records a GPU's work for a batch in seconds.

        Raises:
            UserError: If there is no such mode, or the compiler fails.
        """
        shapes = self.network.input_shape, self.network.output_shape
        inputs, output_gradient = (self.network.like.new_zeros((batch_size, *shape)) for shape in shapes)

        def forward_backward(inputs: Tensor, output_gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
            scores, backward = self._forward(inputs)
            (results,) = backward([output_gradient])
            return scores, results

        self._compiled[inputs.shape] = ForwardBackward(forward_backward, mode, inputs, output_gradient)

    def _forward(self, inputs: Tensor) -> tuple[Tensor, BackwardFunction]:
        """Return the scores, and the function for the backward passes, which can be called once: it frees the graph."""
        leaf = inputs.detach().requires_grad_()
        self._capture.begin_forward()
        with torch.set_grad_enabled(bool(self._weights)):
            scores = self._module(leaf)
        passes, recorded = list(self._weights), self._capture.read_forward()

        def run_pass(output_gradient: Tensor, backward: BackwardPass, last: bool) -> list[Tensor]:
            values = output_gradient * scores.detach() if backward.starts_from_value else output_gradient
            self._select(backward)
            self._capture.begin_backward(backward)
            (gradient,) = torch.autograd.grad(scores, leaf, values, retain_graph=not last)
            restored = self._restored[backward]
            gradient = gradient_scaling.times_power_of_two(gradient, restored) if restored else gradient
            return [gradient, *self._capture.read_backward()]

        def run_passes(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
            for gradient in gradients:
                found = [run_pass(gradient, b, gradient is gradients[-1] and b is passes[-1]) for b in passes]
                channels = [each for _, *of_pass in found for each in of_pass]
                yield [*(result for result, *_ in found), *channels, *recorded]

        return scores.detach(), run_passes

    def _make_operator(self, operator: Operator) -> OperatorWithBackwardWeight:
        """Return an operator that uses the weight of the current backward pass."""
        name = operator.name
        used = any(name in names for names in self._identities.values())
        is_identity = (lambda: name in self._identity) if used else None
        recorder = self._capture.recorders.get(name)
        return OperatorWithBackwardWeight(operator, lambda: self._current[name], is_identity, recorder)

    def _select(self, backward: BackwardPass) -> None:
        """Let the operators and rectifiers do a backward pass."""
        self._current, self._identity = self._weights[backward], self._identities[backward]
        self._rule, self._scale_rules = backward.rectifier, backward.scales

    def _maps(
        self, inputs: Tensor, output_gradient: Tensor, results: list[Tensor], seeds: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return the map of each method for one output gradient, given the results of the backward passes."""
        by_pass = dict(zip(self._weights, results))
        maps = {}
        for name, method in self._methods.items():
            if method.backward is None:
                maps[name] = self._procedures[name](inputs, lambda _: output_gradient, list(seeds or [0] * len(inputs)))
            else:
                result = by_pass[method.backward]
                maps[name] = result * inputs if method.times_input else result
        return maps

    def _scale_weights(self, network: Network, recorded: Mapping[str, Sequence[int]]) -> dict[BackwardPass, list[int]]:
        """Scale the backward weights of passes whose gradients would leave the dtype's range; return φ by pass.

        The range is judged by the gradients of noise, because only their order of magnitude matters. Passes with
        recorded scales are not judged.
        """
        generator = torch.Generator().manual_seed(0)
        like = network.like
        digits = gradient_scaling.safe_digits(like.dtype)
        noise = torch.randn((2, *network.input_shape), generator=generator).to(like)
        classes = gradient_scaling.find_value_classes(self._module)
        potentials = {b: list(recorded[n]) for n, m in self._methods.items() if (b := m.backward) and n in recorded}
        for backward in self._weights.keys() - potentials.keys():
            unscaled = dict.fromkeys(classes.order, 0)
            if gradient_scaling.is_in_range(self._largest_gradients(backward, classes, unscaled, noise), digits):
                potentials[backward] = []
        if len(potentials) == len(self._weights) and not any(potentials.values()):
            return potentials
        ones = gradient_scaling.insert_branch_scales(self._module, lambda name: self._current[name])
        classes = gradient_scaling.find_value_classes(self._module)
        for backward in self._weights:
            self._weights[backward] = {**self._weights[backward], **{name: one.to(like) for name, one in ones.items()}}
            if backward not in potentials:
                measure = partial(self._largest_gradients, backward, classes, noise=noise)
                phi = gradient_scaling.calibrate(classes, measure)
                potentials[backward] = [phi[c] for c in classes.order]
            potential = potentials[backward] or [0] * len(classes.order)
            if len(potential) != len(classes.order):
                what = f"scales of a network with {len(potential)} values, but this one has {len(classes.order)}"
                raise UserError("", what, "Pass the scales of an explainer of the same model.", "scales")
            phi = dict(zip(classes.order, potential))
            self._weights[backward] = gradient_scaling.scale_weights(self._weights[backward], classes, phi)
            self._output_exponents[backward] = {name: phi[number] for name, number in classes.outputs.items()}
            exponent = phi[classes.source]
            (self._restored if abs(exponent) <= 2 * digits else self._exponents)[backward] = exponent
        return potentials

    def _largest_gradients(
        self, backward: BackwardPass, classes: ValueClasses, phi: Mapping[int, int], noise: Tensor
    ) -> dict[int, float]:
        """Return the largest scaled |gradient| of each class of values in a backward pass with a potential."""
        self._select(backward)
        self._current = gradient_scaling.scale_weights(self._weights[backward], classes, phi)
        return gradient_scaling.measure_gradients(self._module, classes, noise)
