"""Explanations: one backward pass of the unchanged forward pass for each method, see `patterns.attribution.methods`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from patterns.attribution import gradient_scaling
from patterns.attribution.gradient_scaling import Crossing, Step, Values
from patterns.attribution.methods import Backward, parse_method, resolve_settings
from patterns.attribution.rectifier_rules import Rule, insert_rules, gated
from patterns.attribution.rendering import Shown, photograph, picture
from patterns.compilation import ForwardBackward
from patterns.errors import UserError
from patterns.io.pattern_files import TracedAs, choose, load, traced_as
from patterns.operators.operator import Operator
from patterns.tracing.digests import digest
from patterns.tracing.inputs import Targets, ready_inputs, ready_targets
from patterns.tracing.network import Network, trace

Weights = Mapping[str, Tensor]
Back = Callable[[Sequence[Tensor]], Iterator[list[Tensor]]]  # from starts to each one's results, by pass


@dataclass(frozen=True)
class Explanation:
    """maps: by method, shape of the input; the explanation is map · 2^exponents[method].

    exponents: 0 unless the explanation's magnitude is beyond the range of its dtype.
    scores: the network's output (N, K, …).
    targets: as they were given, or the predicted classes; with (N, T) of them, maps are (N, T, …).
    """

    maps: dict[str, Tensor]
    exponents: dict[str, int]
    scores: Tensor
    targets: Tensor

    def __repr__(self) -> str:
        methods = ", ".join(self.maps)
        return f"Explanation of {len(self.scores)} samples by {methods}; targets {self.targets.tolist()}"

    def shown(self, number: int, beside: Image.Image) -> Shown:
        """A sample's maps as pictures, beside a picture; the first target's where there are several."""
        several = not self.targets.is_floating_point() and self.targets.dim() == 2
        maps = {name: m[number, 0] if several else m[number] for name, m in self.maps.items()}
        target = self.targets.view(len(self.targets), -1)[number, 0]
        caption = "" if self.targets.is_floating_point() else f"{int(target)}"
        if caption and self.scores.dim() == 2:
            caption += f": {float(self.scores[number].softmax(0)[target]):.0%}"
        pictures = {name: render_map(name, m.float().cpu().numpy()) for name, m in maps.items()}
        return Shown(beside, caption, pictures)


class Explainer:
    """Explains a network's scores by several methods that share one forward pass, but for those that zennit computes.

    `patterns`: by operator name, in the weight's shape; needed by the methods that use them.
    `estimators`: such patterns by the estimator that a method names, as in `patternnet:linear`.
    `settings`: `{method}.{setting}`: see `patterns.attribution.methods`.
    `scales`: by method, as an earlier explainer of the same network and patterns has them; see `scales` below. Those
    of the other methods are calibrated, which takes some passes.

    A network that ends at an operator (`Network.until`) is explained as one that ends at its classes: a target is a
    neuron, whose values at all positions are explained together.
    Not to be used from several threads at once.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        network: Network,
        patterns: Weights | None,
        methods: Collection[str],
        scales: Mapping[str, Sequence[int]] | None = None,
        estimators: Mapping[str, Weights] | None = None,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        if not network.output_shape:
            what = "the model gives one number for each sample, no score for each class"
            raise UserError("model", what, "Explain a model whose output is (N, classes).")
        self.network, self._like = network, network.like
        self._methods = {name: parse_method(name) for name in methods}
        self.settings = resolve_settings(self._methods, settings or {})
        by_estimator = {"": patterns or {}, **(estimators or {})}
        self._procedures = {
            name: method.procedure(network, {key: self.settings[f"{name}.{key}"] for key in method.settings})
            for name, method in self._methods.items()
            if method.procedure is not None
        }
        passes = dict.fromkeys(method.backward for method in self._methods.values() if method.backward is not None)
        self._weights = {b: compute_backward_weights(network, by_estimator.get(b.estimator, {}), b) for b in passes}
        self._exponents = dict.fromkeys(passes, 0)
        self._restored = dict.fromkeys(passes, 0)  # of a scaled pass whose result is in range itself
        self._current: Weights = {}
        self._rule: Rule = gated
        self._module = network.rewrite(lambda op: Explained(op, lambda: self._current[op.name]))
        if any(backward.rectifier is not gated for backward in passes):
            insert_rules(self._module, lambda: self._rule)
        self._potentials = self._keep_in_range(network, scales or {})
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
        """Explains a model, wherever it is, by the patterns in the folder of a run.

        estimator: of the methods that name none, also for operators by name: see `choose`.
        example: (N, …), what the model takes; by default of the shape that the patterns were fitted for.
        strict: refuse patterns of other weights than the model's.
        Raises UserError where the run, the model and the methods do not fit together.
        """
        folder = Path(run)
        weight = next(model.parameters())
        known = example is None or (folder / "manifest.json").exists()
        as_fitted = traced_as(folder) if known else TracedAs(())
        shape = as_fitted.input_shape if example is None else tuple(example.shape[1:])
        zeros = torch.zeros((2, *shape), dtype=weight.dtype, device=weight.device)
        network = trace(
            model,
            zeros,
            name=type(model).__name__,
            pass_through=as_fitted.pass_through,
            strip_softmax=as_fitted.strip_softmax,
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
    ) -> Shown:
        """One image and its maps, which a notebook shows as a row of pictures.

        image: what the model takes, (C, H, W) or (1, C, H, W); or a photograph, and how to `preprocess` it, as the
        model's library says. target: a class; None: the predicted one.
        """
        if isinstance(image, Tensor):
            x = image.reshape(1, *image.shape[-3:])
        elif preprocess is None:
            what = "a photograph is no input for the model"
            raise UserError("show", what, "Give preprocess=, such as weights.transforms() of torchvision.")
        else:
            x = preprocess(image.convert("RGB"))[None]
        x = x.to(self.network.like)
        return self(x, target).shown(0, photograph(x[0].float().cpu().numpy()))

    def module(self) -> nn.Module:
        """The network with an input gradient that is the explainer's only method, from any start: for libraries that
        take gradients of models. Times 2^exponents[method] it is the explanation. Not to be differentiated twice.
        """
        (method,) = self._methods.values()
        assert method.backward is not None
        self._current, self._rule = self._weights[method.backward], method.backward.rectifier
        restored = 2.0 ** self._restored[method.backward]
        factor = next(iter(self._current.values())).new_tensor(restored)
        return nn.Sequential(Crossing("input", lambda: factor), self._module)

    @property
    def scales(self) -> dict[str, list[int]]:
        """The potential φ (see `gradient_scaling`) of each method's pass, by value of the graph from the output to the
        input; [] for a pass that needs none.

        It is calibrated on noise, and may differ between kinds of hardware by rounding. Explainers that share it give
        the same exponents.
        """
        return {name: self._potentials[m.backward] for name, m in self._methods.items() if m.backward is not None}

    @torch.inference_mode(False)
    def __call__(
        self,
        inputs: Tensor,
        targets: Targets | Callable[[Tensor], Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Explanation:
        """Explain the score of each sample's target, by default its predicted class.

        inputs: (N, *input_shape), on the network's device and in its dtype.
        targets: a class for all samples, or one for each (N,), or (N, T) for several maps of each sample, as a number,
        a list, an array or a tensor; or weights of a sum of the scores, of their shape: 1 for one class and -1 for
        another explains the difference; or a function from the scores to a tensor, int64 (N,) or (N, T), or weights.
        Raises UserError if inputs or targets do not fit the network.
        seeds: one for each sample, of what is random; 0 unless given. So a sample's maps depend on no other sample.
        """
        if targets is None and len(self.network.output_shape) != 1:
            what = f"the model gives outputs of shape {self.network.output_shape}, not a score for each class"
            raise UserError("targets", what, "Say which to explain.")
        inputs = ready_inputs(inputs, self._like)
        scores, back = self._compiled.get(inputs.shape, self._there_and_back)(inputs)
        if targets is None:
            chosen = scores.argmax(1)
        else:
            chosen = targets(scores) if callable(targets) else ready_targets(targets, scores)
        several = not chosen.is_floating_point() and chosen.dim() == 2
        starts = [make_output_gradient(t, scores) for t in (chosen.unbind(1) if several else [chosen])]
        seeds = [0] * len(inputs) if seeds is None else list(seeds)
        found = [self._maps(inputs, start, results, seeds) for start, results in zip(starts, back(starts))]
        maps = {name: torch.stack([m[name] for m in found], 1) if several else found[0][name] for name in found[0]}
        exponents = {name: self._exponents[m.backward] if m.backward else 0 for name, m in self._methods.items()}
        return Explanation(maps, exponents, scores, chosen)

    def compile(self, batch_size: int, mode: str = "default") -> None:
        """Compile what is done with batches of this size; all others are explained as before.

        mode: one of `torch.compile`, which takes a minute or two, and gives the same maps but for rounding; or
        `cudagraphs`, which records what a GPU does with a batch as it is, in seconds. Methods that are no backward pass
        of one forward pass (`smoothgrad`, `lrp-z`, …) are not compiled. UserError where there is no such mode, and
        where the compiler fails.
        """
        network = self.network
        shapes = network.input_shape, network.output_shape
        inputs, start = (network.like.new_zeros((batch_size, *shape)) for shape in shapes)

        def function(inputs: Tensor, start: Tensor) -> tuple[Tensor, list[Tensor]]:
            scores, back = self._there_and_back(inputs)
            (results,) = back([start])
            return scores, results

        self._compiled[inputs.shape] = ForwardBackward(function, mode, inputs, start)

    def _there_and_back(self, inputs: Tensor) -> tuple[Tensor, Back]:
        """The scores, and what takes starts to each pass's result; once, for then the graph is gone."""
        leaf = inputs.detach().requires_grad_()
        with torch.set_grad_enabled(bool(self._weights)):
            scores = self._module(leaf)

        passes = list(self._weights)

        def carried(start: Tensor, backward: Backward, last: bool) -> Tensor:
            values = start * scores.detach() if backward.starts_from_value else start
            self._current, self._rule = self._weights[backward], backward.rectifier
            (gradient,) = torch.autograd.grad(scores, leaf, values, retain_graph=not last)
            restored = self._restored[backward]
            return gradient_scaling.power(gradient, restored) if restored else gradient

        def back(starts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
            for start in starts:
                yield [carried(start, b, start is starts[-1] and b is passes[-1]) for b in passes]

        return scores.detach(), back

    def _maps(self, inputs: Tensor, start: Tensor, results: list[Tensor], seeds: list[int]) -> dict[str, Tensor]:
        """The map of each method for one start, given each pass's result."""
        by_pass = dict(zip(self._weights, results))
        maps = {}
        for name, method in self._methods.items():
            if method.backward is None:
                maps[name] = self._procedures[name](inputs, lambda _: start, seeds)
            else:
                result = by_pass[method.backward]
                maps[name] = result * inputs if method.times_input else result
        return maps

    def _keep_in_range(self, network: Network, recorded: Mapping[str, Sequence[int]]) -> dict[Backward, list[int]]:
        """Scale the backward weights of the passes whose gradients would leave the dtype's range; gives each one's φ.

        Judged by the gradients of noise: only their order of magnitude matters. What was recorded is not judged again.
        """
        generator = torch.Generator().manual_seed(0)
        like = network.like
        safe = gradient_scaling.safe(like.dtype)
        noise = torch.randn((2, *network.input_shape), generator=generator).to(like)
        classes = gradient_scaling.values(self._module)
        potentials = {b: list(recorded[n]) for n, m in self._methods.items() if (b := m.backward) and n in recorded}
        for backward in self._weights.keys() - potentials.keys():
            unscaled = dict.fromkeys(classes.order, 0)
            if gradient_scaling.in_range(self._largest(backward, classes, unscaled, noise), safe):
                potentials[backward] = []
        if len(potentials) == len(self._weights) and not any(potentials.values()):
            return potentials
        ones = gradient_scaling.insert_branch_scales(self._module, lambda name: self._current[name])
        classes = gradient_scaling.values(self._module)
        for backward in self._weights:
            self._weights[backward] = {**self._weights[backward], **{name: one.to(like) for name, one in ones.items()}}
            if backward not in potentials:
                phi = gradient_scaling.calibrate(classes, partial(self._largest, backward, classes, noise=noise))
                potentials[backward] = [phi[c] for c in classes.order]
            potential = potentials[backward] or [0] * len(classes.order)
            if len(potential) != len(classes.order):
                what = f"the scales are of a network of {len(potential)} values, this one has {len(classes.order)}"
                raise UserError("scales", what, "Use those of an explainer of this very model.")
            phi = dict(zip(classes.order, potential))
            self._weights[backward] = gradient_scaling.scaled(self._weights[backward], classes, phi)
            result = phi[classes.source]
            (self._restored if abs(result) <= 2 * safe else self._exponents)[backward] = result
        return potentials

    def _largest(self, backward: Backward, classes: Values, phi: Mapping[int, int], noise: Tensor) -> dict[int, float]:
        """The largest |gradient| that each class of values carries, under a potential."""
        self._current, self._rule = gradient_scaling.scaled(self._weights[backward], classes, phi), backward.rectifier
        largest = dict.fromkeys(classes.order, 0.0)

        def note(number: int, gradient: Tensor) -> None:
            value = float(gradient.abs().max())
            largest[number] = value if not value <= largest[number] else largest[number]

        def follow(part: Step, _: object, output: Tensor) -> None:
            number = classes.outputs[part.name]
            if output.requires_grad:  # what no input reaches, such as a class token alone, has no gradient
                output.register_hook(lambda gradient: note(number, gradient))

        parts = [part for part in self._module.modules() if isinstance(part, Step)]
        hooks = [part.register_forward_hook(follow) for part in parts]
        noise = noise.requires_grad_()
        scores = self._module(noise)
        for hook in hooks:
            hook.remove()
        start = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        (gradient,) = torch.autograd.grad(scores, noise, start)
        note(classes.source, gradient)
        return largest


def make_output_gradient(targets: Tensor, scores: Tensor) -> Tensor:
    """What a pass starts from: 1 at each sample's target and 0 elsewhere, or as it is given."""
    if targets.is_floating_point():
        return targets
    index = targets.view(-1, *[1] * (scores.dim() - 1)).expand(-1, 1, *scores.shape[2:])
    return torch.zeros_like(scores).scatter_(1, index, 1.0)


def compute_backward_weights(network: Network, patterns: Weights, backward: Backward) -> Weights:
    """The weights of a backward pass, by operator, on the operator's device."""
    weights = {}
    for name, operator in network.operators.items():
        pattern = patterns.get(name)
        if pattern is None and backward.needs_patterns:
            raise UserError(name, "the patterns hold none for this operator", "Fit them for this very model.")
        if pattern is not None:
            if pattern.shape != operator.weight.shape:
                found, expected = tuple(pattern.shape), tuple(operator.weight.shape)
                raise UserError(
                    name, f"the pattern has shape {found}, the weight {expected}", "Fit patterns for this very model."
                )
            pattern = pattern.to(operator.weight)
        weights[name] = backward.operator(operator.weight, pattern)
    return weights  # type: ignore[return-value]


class Explained(Step):
    """An operator whose input gradient uses another weight."""

    def __init__(self, operator: Operator, backward_weight: Callable[[], Tensor]) -> None:
        super().__init__(operator.name)
        self.operator, self.backward_weight = operator, backward_weight

    def forward(self, *inputs: Tensor) -> Tensor:
        return _Explained.apply(self.operator, self.backward_weight, *inputs)


class _Explained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, backward_weight: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        ctx.kind, ctx.backward_weight = operator.kind, backward_weight
        ctx.input_shapes = tuple(tuple(x.shape) for x in inputs)
        return operator(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.kind.input_gradient(grads[0], ctx.backward_weight(), ctx.input_shapes)
