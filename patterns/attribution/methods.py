"""Table of the attribution methods and their settings.

A method is either a backward pass or a procedure of its own. The procedures are functions in `zennit_methods` and
`baselines`, and `METHODS` refers to them. A backward pass leaves the forward pass unchanged and
chooses two things: the weights that the operators use backward (w for the gradient, the pattern a for PatternNet, w⊙a
for PatternAttribution: Kindermans et al. 2018, §3.3), and a rule for the rectifiers. Max pooling and reshaping keep
their usual backward. All backward passes share one forward pass.

`gradient-x-input` is x ⊙ ∂z/∂x, so its output gradient is 1. In a rectifier network it equals LRP-z, whose output
gradient is the target's value z: there, an input x of a neuron z receives x w R/z, so R/z propagates like a gradient,
and a rectifier's output is z times its slope (Shrikumar et al. 2016, arXiv 1605.01713; Kindermans et al. 2016, arXiv
1611.07270).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from torch import Tensor

from patterns.attribution import baselines
from patterns.attribution.baselines import MapFunction, Settings
from patterns.attribution.rectifier_rules import Rule, gate, gate_and_rectify, rectify
from patterns.errors import UserError
from patterns.tracing.network import Network
from patterns.tracing.scales import CONSTANT_FACTORS, ScaleRules


@dataclass(frozen=True)
class BackwardPass:
    """A backward pass through the network. It is positively homogeneous in the gradient, so scaling it is exact.

    Attributes:
        operator: Function from an operator's weight and pattern to its backward weight.
        rectifier: The rule for rectifiers.
        scales: The rules for norms, smooth gates, attention weights and the factors of products.
        needs_patterns: Whether `operator` uses the pattern.
        starts_from_value: Whether the output gradient is the target's value; otherwise it is 1.
        estimator: The estimator whose patterns are used; "" for the explainer's default patterns.
    """

    operator: Callable[[Tensor, Tensor | None], Tensor | None]
    rectifier: Rule = gate
    scales: ScaleRules = CONSTANT_FACTORS
    needs_patterns: bool = False
    starts_from_value: bool = False
    estimator: str = ""


Procedure = Callable[[Network, Settings], MapFunction]


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`: either a backward pass, which several methods can share, or a procedure of its own.

    Attributes:
        backward: The backward pass; None for a procedure.
        times_input: Whether the map is the result of the backward pass times the input.
        is_attribution: Whether the map states how much each input contributed; otherwise it is a signal, an image.
        procedure: Function from the network and the settings to the function that computes maps.
        settings: The settings and their defaults. An int stands for a setting that must be a whole number.
    """

    backward: BackwardPass | None = None
    times_input: bool = False
    is_attribution: bool = False
    procedure: Procedure | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    def without_scales(self) -> "Method":
        """Return the method for networks without scales, in which all rules for scales do the same."""
        return (
            self if self.backward is None else replace(self, backward=replace(self.backward, scales=CONSTANT_FACTORS))
        )

    @property
    def needs_patterns(self) -> bool:
        """Whether the method uses patterns."""
        return self.backward is not None and self.backward.needs_patterns


def use_weight(w: Tensor, a: Tensor | None) -> Tensor:
    """Return the weight itself: the backward weight of the gradient."""
    return w


def load_zennit_method(name: str) -> Procedure:
    """Return a procedure of `zennit_methods`, which is imported on the first use because importing zennit is slow."""

    def procedure(network: Network, settings: Settings) -> MapFunction:
        function: MapFunction = getattr(import_module("patterns.attribution.zennit_methods"), name)(network, settings)
        return function

    return procedure


GRADIENT = BackwardPass(use_weight, scales=ScaleRules(differentiates=True))
LINEARIZED = replace(GRADIENT, scales=CONSTANT_FACTORS)
SIGNAL = BackwardPass(lambda w, a: a, scales=ScaleRules(norms="divide"), needs_patterns=True, starts_from_value=True)
# Σ map is the target's value, less the losses at gates and borders: patterns/evaluation/conservation.py.
ATTRIBUTION = replace(SIGNAL, operator=lambda w, a: w * a, scales=ScaleRules("pass", "pass"))  # type: ignore[operator]

METHODS: dict[str, Method] = {
    "gradient": Method(GRADIENT),
    "gradient-x-input": Method(LINEARIZED, times_input=True, is_attribution=True),
    "deconvnet": Method(replace(GRADIENT, rectifier=rectify)),
    "guided-backprop": Method(replace(GRADIENT, rectifier=gate_and_rectify)),
    "patternnet": Method(SIGNAL),
    "patternattribution": Method(ATTRIBUTION, is_attribution=True),
    # S_x of the paper: the estimate that takes the whole input as signal.
    "signal:identity": Method(procedure=lambda network, settings: lambda inputs, gradient, seeds: inputs.detach()),
    "lrp-z": Method(procedure=load_zennit_method("lrp_z"), is_attribution=True, settings={"epsilon": 1e-6}),
    "lrp-epsilon-plus-flat": Method(
        procedure=load_zennit_method("lrp_epsilon_plus_flat"), is_attribution=True, settings={"epsilon": 1e-6}
    ),
    "smoothgrad": Method(procedure=load_zennit_method("smoothgrad"), settings={"samples": 20, "noise": 0.1}),
    "integrated-gradients": Method(
        procedure=load_zennit_method("integrated_gradients"), is_attribution=True, settings={"steps": 20}
    ),
    "random": Method(procedure=baselines.random, is_attribution=True),
    "sobel": Method(procedure=baselines.edges),
}
BASELINES = ("random", "sobel", "signal:identity")  # the methods that do not depend on the model
BACKWARD_PASSES = tuple(name for name, method in METHODS.items() if method.backward is not None)
WITH_PATTERNS = tuple(name for name, method in METHODS.items() if method.needs_patterns)


def parse_method(name: str) -> Method:
    """Return the method of a name.

    Args:
        name: A name from `METHODS`. A method with patterns can name an estimator: `patternnet:linear`.

    Raises:
        UserError: If there is no such method.

    Example:
        >>> parse_method("patternnet:linear").backward.estimator
        'linear'
    """
    if name in METHODS:
        return METHODS[name]
    base, _, estimator = name.partition(":")
    method = METHODS.get(base)
    if method is None or not estimator or not method.needs_patterns:
        remedy = (
            f"Choose from {', '.join(METHODS)}. "
            f"{' and '.join(WITH_PATTERNS)} can name an estimator: {WITH_PATTERNS[0]}:ESTIMATOR."
        )
        raise UserError("", f"no method {name!r}", remedy, "methods")
    assert method.backward is not None
    return replace(method, backward=replace(method.backward, estimator=estimator))


def resolve_settings(methods: Mapping[str, Method], given: Mapping[str, float]) -> dict[str, float]:
    """Return all settings of some methods, with the defaults replaced by the given values.

    Args:
        methods: The methods by name.
        given: Values by `{method}.{setting}`.

    Returns:
        A value for each `{method}.{setting}` of these methods.

    Raises:
        UserError: If no method has a given setting, or its value is not a finite number above 0. It must also be a
            whole number if the default is one.

    Example:
        >>> resolve_settings({"smoothgrad": METHODS["smoothgrad"]}, {"smoothgrad.samples": 5})
        {'smoothgrad.samples': 5, 'smoothgrad.noise': 0.1}
    """
    known = {f"{name}.{key}": value for name, method in methods.items() for key, value in method.settings.items()}
    for name, value in given.items():
        if name not in known:
            remedy = f"Choose from {', '.join(known)}." if known else "Leave it out: these methods have no settings."
            raise UserError("", f"no setting {name!r} of these methods", remedy, "settings")
        if not 0 < value < float("inf") or (isinstance(known[name], int) and value != int(value)):
            number = "a whole number" if isinstance(known[name], int) else "a number"
            raise UserError("", f"{name}={value:g}", f"Pass {number} above 0.", "settings")
    return known | {name: type(known[name])(value) for name, value in given.items()}
