"""Rules of the current backward pass for the norms, smooth gates and detached factors of a graph."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from patterns.attribution.gradient_scaling import ScaledModule
from patterns.operators.gates import FACTORS, activate, gated
from patterns.tracing.scales import SCALES, ScaleRules, detached, factored, find_carriers, standardized


def insert_scale_rules(
    module: GraphModule,
    rules: Callable[[], ScaleRules],
    identities: Callable[[], Collection[str]] = frozenset,
    scales: Collection[Any] = SCALES,
) -> None:
    """Make the norms, smooth gates and detached factors of a graph read their rules in each backward pass.

    Args:
        module: The graph, which is changed.
        rules: Returns the current rules.
        identities: Returns the names of the operators that have the identity estimator.
        scales: The functions of the graph that follow the rules; the others take factors as constants.
    """

    def detach(x: Tensor) -> Tensor:
        return _SwitchedDetach.apply(x, rules)

    options: dict[Any, dict[str, Any]] = {
        detached: {"detach": detach},
        factored: {"rules": rules},
        standardized: {"rules": rules},
    }
    carriers = {node for node in find_carriers(module.graph) if node.target is not detached}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in scales:
            continue
        switched: nn.Module
        if node.target is gated:
            readers = find_readers(module, node, carriers)

            def passes(readers: frozenset[str] | None = readers) -> bool:
                return readers is not None and readers <= set(identities())

            switched = SwitchedGate(rules, passes)
        else:
            switched = Switched(node.target, options[node.target])
        name = f"switched.{node.name}"
        module.add_submodule(name, switched)
        node.op, node.target = "call_module", name
    module.recompile()


def find_readers(module: GraphModule, node: Node, carriers: set[Node]) -> frozenset[str] | None:
    """Return the names of the operators that read a value; None if it is an output of the graph.

    Args:
        module: The graph.
        node: The value.
        carriers: The nodes that pass relevance on. The others, such as those of attention weights, do not count.
    """
    found: set[str] = set()
    for user in node.users:
        if user.op == "output":
            return None
        if user not in carriers:
            continue
        reader = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(reader, ScaledModule):
            found.add(reader.name)
        else:  # norms, products, pools, rectifiers and changes of shape pass relevance on
            behind = find_readers(module, user, carriers)
            if behind is None:
                return None
            found |= behind
    return frozenset(found)


class SwitchedGate(nn.Module):
    """A smooth gate whose backward pass follows rules that can change between backward passes.

    Args:
        rules: Returns the rules.
        passes: Returns whether the gate passes relevance on unchanged.
    """

    def __init__(self, rules: Callable[[], ScaleRules], passes: Callable[[], bool]) -> None:
        super().__init__()
        self.rules, self.passes = rules, passes

    def forward(self, z: Tensor, name: str, *parameters: float) -> Tensor:
        """Return z·g(z)."""
        return _SwitchedGate.apply(z, name, parameters, self.rules, self.passes)


class _SwitchedGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        name: str,
        parameters: tuple[float, ...],
        rules: Callable[[], ScaleRules],
        passes: Callable[[], bool],
    ) -> Tensor:
        ctx.name, ctx.parameters, ctx.rules, ctx.passes = name, parameters, rules, passes
        ctx.save_for_backward(z)
        return activate(z, name, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (z,), (grad,) = ctx.saved_tensors, grads
        if ctx.rules().differentiates:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                (grad,) = torch.autograd.grad(activate(leaf, ctx.name, *ctx.parameters), leaf, grad)
        elif not ctx.passes():
            grad = FACTORS[ctx.name](z, *ctx.parameters).mul_(grad)
        return grad, None, None, None, None


class Switched(nn.Module):
    """A function of a graph with options that are no part of the graph."""

    def __init__(self, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args: Any) -> Tensor:
        """Call the function."""
        return self.function(*args, **self.options)


class _SwitchedDetach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rules: Callable[[], ScaleRules]) -> Tensor:
        ctx.rules = rules
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] if ctx.rules().differentiates else None, None
