"""Backward rules of rectifiers other than their own gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import GraphModule, Node

from patterns.operators.gates import gated
from patterns.tracing.rectifiers import IN_PLACE, RECTIFIERS

FUNCTIONAL = {in_place: functional for functional, in_place in IN_PLACE.items()}
# From the gradient at a rectifier's output to two gradients: one that is passed straight to its input, and one that
# goes through the rectifier's own backward.
Rule = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def gate(gradient: Tensor) -> tuple[None, Tensor]:
    """Use the rectifier's own gradient."""
    return None, gradient


def rectify(gradient: Tensor) -> tuple[Tensor, None]:
    """Pass the positive part of the gradient, whatever the rectifier's input is (Zeiler & Fergus 2014)."""
    return gradient.clamp(min=0), None


def gate_and_rectify(gradient: Tensor) -> tuple[None, Tensor]:
    """Pass the positive part of the gradient, multiplied by the rectifier's own gradient (Springenberg et al. 2015)."""
    return None, gradient.clamp(min=0)


def pass_all(gradient: Tensor) -> tuple[Tensor, None]:
    """Pass the whole gradient, as LRP does. The next operator gives nothing to an input that was rectified to 0."""
    return gradient, None


def insert_rules(module: GraphModule, rule: Callable[[], Rule]) -> None:
    """Insert a `RuledRectifier` after each rectifier of a graph; `rule` returns the current rule."""
    rectifiers = [node for node in module.graph.nodes if rectifier_function(node)]
    for number, node in enumerate(rectifiers):
        node.target = rectifier_function(node)  # an in-place rectifier would overwrite the input that the rule needs
        name = f"rectifiers.{number}"
        module.add_submodule(name, RuledRectifier(rule))
        with module.graph.inserting_after(node):
            ruled = module.graph.call_module(name, (node.args[0], node))
        node.replace_all_uses_with(ruled, delete_user_cb=lambda user, ruled=ruled: user is not ruled)
    module.recompile()


def rectifier_function(node: Node) -> Any:
    """Return the functional form of a rectifier's node; None for any other node."""
    target = FUNCTIONAL.get(node.target, node.target)
    return target if target in RECTIFIERS or target is gated else None


class RuledRectifier(nn.Module):
    """The identity on a rectifier's output y, whose gradient a rule divides between the rectifier's input x and y."""

    def __init__(self, rule: Callable[[], Rule]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y."""
        return _RuledRectifier.apply(self.rule, x, y)


class _RuledRectifier(Function):
    @staticmethod
    def forward(ctx: Any, rule: Callable[[], Rule], x: Tensor, y: Tensor) -> Tensor:
        ctx.rule = rule
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.rule()(grads[0])
