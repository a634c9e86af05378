"""What a rectifier passes on the way back, where that is not its own gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import GraphModule, Node

from patterns.tracing.rectifiers import IN_PLACE, RECTIFIERS

FUNCTIONAL = {in_place: functional for functional, in_place in IN_PLACE.items()}
# From the gradient at a rectifier's output: what goes straight to its input, and what goes through its usual backward.
Rule = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def gated(gradient: Tensor) -> tuple[None, Tensor]:
    """The rectifier's own backward."""
    return None, gradient


def rectified(gradient: Tensor) -> tuple[Tensor, None]:
    """What is positive, whatever the rectifier's input was (Zeiler & Fergus 2014)."""
    return gradient.clamp(min=0), None


def gated_and_rectified(gradient: Tensor) -> tuple[None, Tensor]:
    """What is positive, through the rectifier's own backward (Springenberg et al. 2015)."""
    return None, gradient.clamp(min=0)


def passed(gradient: Tensor) -> tuple[Tensor, None]:
    """Everything, as LRP does, which leaves it to the next operator to give nothing to what was rectified to 0."""
    return gradient, None


def add_rules(module: GraphModule, rule: Callable[[], Rule]) -> None:
    """Put a Ruled behind each rectifier of a graph."""
    rectifiers = [node for node in module.graph.nodes if rectifier(node)]
    for number, node in enumerate(rectifiers):
        node.target = rectifier(node)  # in place, its input would be no more
        name = f"rectifiers.{number}"
        module.add_submodule(name, Ruled(rule))
        with module.graph.inserting_after(node):
            ruled = module.graph.call_module(name, (node.args[0], node))
        node.replace_all_uses_with(ruled, delete_user_cb=lambda user, ruled=ruled: user is not ruled)
    module.recompile()


def rectifier(node: Node) -> Any:
    """The function of a rectifier's node, not in place; None for any other node."""
    target = FUNCTIONAL.get(node.target, node.target)
    return target if target in RECTIFIERS else None


class Ruled(nn.Module):
    """A rectifier's output y, whose gradient a rule shares out between its input x and y itself."""

    def __init__(self, rule: Callable[[], Rule]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _Ruled.apply(self.rule, x, y)


class _Ruled(Function):
    @staticmethod
    def forward(ctx: Any, rule: Callable[[], Rule], x: Tensor, y: Tensor) -> Tensor:
        ctx.rule = rule
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.rule()(grads[0])
