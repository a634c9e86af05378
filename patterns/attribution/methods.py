"""The methods by name, and what may be set about them.

Most are a backward pass of the unchanged forward pass: a choice of weights for the operators (the gradient takes w,
PatternNet the pattern a, PatternAttribution w⊙a: Kindermans et al. 2018, §3.3) and of a rule for the rectifiers. Max
pooling and changes of shape keep their usual backward. Such methods share the forward pass.

`gradient-x-input` is x ⊙ ∂z/∂x, so it starts from 1. In a rectifier network it equals LRP-z, which starts from
the target's value z: there an input x of a neuron z receives x w R/z, so R/z is handed back as a gradient is,
and a rectifier's output is z times its slope (Shrikumar et al. 2016, arXiv 1605.01713; Kindermans et al. 2016,
arXiv 1611.07270).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from torch import Tensor

from patterns.attribution import baselines
from patterns.attribution.baselines import Map, Settings
from patterns.attribution.rectifier_rules import Rule, gated, gated_and_rectified, rectified
from patterns.errors import UserError
from patterns.tracing.network import Network


@dataclass(frozen=True)
class Backward:
    """A way back through the network; positively homogeneous in the gradient, so that scaling is exact.

    operator: the backward weight, from an operator's weight and pattern.
    starts_from_value: it starts from the target's value, else from 1.
    estimator: whose patterns it takes; "": those that the explainer takes by default.
    """

    operator: Callable[[Tensor, Tensor | None], Tensor | None]
    rectifier: Rule = gated
    needs_patterns: bool = False
    starts_from_value: bool = False
    estimator: str = ""


Procedure = Callable[[Network, Settings], Map]


@dataclass(frozen=True)
class Method:
    """A row of the table: a backward pass, which methods of the same one share, or a procedure of its own.

    times_input: the map is the pass's result times the input.
    attributes: the map says how much each input contributed; else it is a signal, an image of its own.
    settings: what may be set about it, and the values that it has else.
    """

    backward: Backward | None = None
    times_input: bool = False
    attributes: bool = False
    procedure: Procedure | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs_patterns(self) -> bool:
        return self.backward is not None and self.backward.needs_patterns


def weight(w: Tensor, a: Tensor | None) -> Tensor:
    """w, whatever the pattern."""
    return w


def by_zennit(name: str) -> Procedure:
    """A procedure of `zennit_methods`, which is imported once it is asked for: zennit takes its time."""

    def procedure(network: Network, settings: Settings) -> Map:
        made: Map = getattr(import_module("patterns.attribution.zennit_methods"), name)(network, settings)
        return made

    return procedure


GRADIENT = Backward(weight)
SIGNAL = Backward(lambda w, a: a, needs_patterns=True, starts_from_value=True)
# Σ map = the target's value, less what is lost at gates and borders: patterns/evaluation/conservation.py.
ATTRIBUTION = replace(SIGNAL, operator=lambda w, a: w * a)  # type: ignore[operator]

METHODS: dict[str, Method] = {
    "gradient": Method(GRADIENT),
    "gradient-x-input": Method(GRADIENT, times_input=True, attributes=True),
    "deconvnet": Method(Backward(weight, rectified)),
    "guided-backprop": Method(Backward(weight, gated_and_rectified)),
    "patternnet": Method(SIGNAL),
    "patternattribution": Method(ATTRIBUTION, attributes=True),
    # S_x of the paper: the estimate that takes all of the input for signal.
    "signal:identity": Method(procedure=lambda network, settings: lambda inputs, start, seeds: inputs.detach()),
    "lrp-z": Method(procedure=by_zennit("lrp_z"), attributes=True, settings={"epsilon": 1e-6}),
    "lrp-epsilon-plus-flat": Method(
        procedure=by_zennit("lrp_epsilon_plus_flat"), attributes=True, settings={"epsilon": 1e-6}
    ),
    "smoothgrad": Method(procedure=by_zennit("smoothgrad"), settings={"samples": 20, "noise": 0.1}),
    "integrated-gradients": Method(
        procedure=by_zennit("integrated_gradients"), attributes=True, settings={"steps": 20}
    ),
    "random": Method(procedure=baselines.random, attributes=True),
    "sobel": Method(procedure=baselines.edges),
}
# What every score of a map is read beside: noise, edges, and the input itself, which know nothing of the model.
BASELINES = ("random", "sobel", "signal:identity")
WITH_PATTERNS = tuple(name for name, method in METHODS.items() if method.needs_patterns)


def method_of(name: str) -> Method:
    """The method of a name, which for those with patterns may say whose: `patternnet:linear`. UserError without one."""
    if name in METHODS:
        return METHODS[name]
    base, _, estimator = name.partition(":")
    method = METHODS.get(base)
    if method is None or not estimator or not method.needs_patterns:
        remedy = (
            f"Choose from {', '.join(METHODS)}; {' and '.join(WITH_PATTERNS)} also as {WITH_PATTERNS[0]}:ESTIMATOR."
        )
        raise UserError("--methods", f"no method {name!r}", remedy)
    assert method.backward is not None
    return replace(method, backward=replace(method.backward, estimator=estimator))


def settings_of(names: Mapping[str, Method], given: Mapping[str, float]) -> dict[str, float]:
    """What is set of some methods, as `{method}.{setting}`: as given, else as it is by default.

    UserError for a setting that none of them has, and for a value that is none: all are above 0.
    """
    known = {f"{name}.{key}": value for name, method in names.items() for key, value in method.settings.items()}
    for name, value in given.items():
        if name not in known:
            raise UserError(
                "--set", f"no setting {name!r} of these methods", f"There are {', '.join(known) or 'none'}."
            )
        if not 0 < value < float("inf") or (isinstance(known[name], int) and value != int(value)):
            kind = "a whole number" if isinstance(known[name], int) else "a number"
            raise UserError("--set", f"{name}={value:g}", f"Give {kind} above 0.")
    return known | {name: type(known[name])(value) for name, value in given.items()}
