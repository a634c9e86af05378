"""Validate what callers pass to a network and an explainer: batches of one shape, and targets in several forms."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.tracing.aten_graph import AtenGraph

Targets = int | Sequence[int] | np.ndarray | Tensor


def add_shape_check(graph: AtenGraph, shape: tuple[int, ...]) -> None:
    """Make a graph reject inputs of another shape, because its slices and pools would read only a part of them."""
    (placeholder,) = graph.fx.find_nodes(op="placeholder")
    with graph.fx.inserting_after(placeholder):
        checked = graph.fx.call_function(require_batch, (placeholder, shape))
    checked.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)


def require_batch(inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return inputs of shape (N, *shape).

    Raises:
        UserError: If the inputs have another shape.
    """
    if tuple(inputs.shape[1:]) != shape:
        what = f"shape {tuple(inputs.shape)}, but the network was traced for (N, {', '.join(map(str, shape))})"
        one = tuple(inputs.shape) == shape
        remedy = "Add a batch dimension: x[None]." if one else "Resize them, or trace an example of their shape."
        raise UserError("", what, remedy, "inputs")
    return inputs


def validate_inputs(inputs: Tensor, like: Tensor) -> Tensor:
    """Return inputs that autograd accepts.

    Args:
        inputs: The inputs, of any shape.
        like: A weight of the network, for its dtype and device.

    Raises:
        UserError: If the inputs have another dtype or device than the weight.
    """
    for name in ("dtype", "device"):
        found, wanted = getattr(inputs, name), getattr(like, name)
        if found != wanted:
            what = f"{name} {found}, but the network has {wanted}"
            raise UserError("", what, f"Pass inputs.to({wanted!r}).", "inputs")
    inputs = inputs.detach()
    return inputs.clone() if inputs.is_inference() else inputs


def select_images(batch: Any) -> Tensor:
    """Return the images of a batch: the batch itself, or the first item of (images, labels, …) as a DataLoader gives.

    Raises:
        UserError: If the batch is neither a tensor nor a tuple or list that starts with one.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        what = f"a batch of type {type(batch).__name__}"
        raise UserError("", what, "Pass tensors (N, C, H, W), or tuples whose first item is such a tensor.", "batches")
    return images


def resolve_targets(targets: Targets, scores: Tensor) -> Tensor:
    """Return targets as a tensor on the device of the scores.

    Args:
        targets: A class for all samples; a class for each sample, (N,), or several classes, (N, T); or floating-point
            weights of a sum of scores, in the shape of the scores.
        scores: The network's output, shape (N, K, …).

    Returns:
        int64 of shape (N,) or (N, T), or weights in the dtype of the scores.

    Raises:
        UserError: If the number of targets differs from the number of samples, or a class does not exist.
    """
    chosen = torch.as_tensor(targets, device=scores.device)
    if chosen.is_floating_point():
        if chosen.shape != scores.shape:
            what = f"weights of shape {tuple(chosen.shape)} for scores of shape {tuple(scores.shape)}"
            raise UserError("", what, "Pass classes as whole numbers, or a weight for each score.", "targets")
        return chosen.to(scores.dtype)
    if chosen.dtype in (torch.bool, torch.complex64, torch.complex128) or chosen.dim() > 2:
        what = f"targets of type {chosen.dtype} and shape {tuple(chosen.shape)}"
        raise UserError("", what, "Pass classes as whole numbers, one for each sample.", "targets")
    samples, classes = scores.shape[:2]
    chosen = chosen.long().expand(samples) if chosen.dim() == 0 else chosen.long()
    if len(chosen) != samples:
        what = f"{len(chosen)} targets for {samples} samples"
        raise UserError("", what, "Pass a target for each sample, or one number for all.", "targets")
    outside = chosen[(chosen < 0) | (chosen >= classes)]
    if outside.numel():
        raise UserError("", f"no class {int(outside[0])}", f"The model's classes are 0 to {classes - 1}.", "targets")
    return chosen


def choose_targets(targets: Targets | Callable[[Tensor], Tensor] | None, scores: Tensor) -> Tensor:
    """Return the targets for some scores: results of a function, given targets, or by default the predicted classes."""
    if targets is None:
        return scores.argmax(1)
    return targets(scores) if callable(targets) else resolve_targets(targets, scores)


def has_several_targets(targets: Tensor) -> bool:
    """Return whether each sample has several targets, (N, T)."""
    return not targets.is_floating_point() and targets.dim() == 2


def make_output_gradient(targets: Tensor, scores: Tensor) -> Tensor:
    """Return the gradient at the scores, in their shape.

    Args:
        targets: The class of each sample, int64 (N,), whose gradient is 1 and that of other classes 0; or the gradient
            itself, floating-point.
        scores: The network's output, shape (N, classes, …).
    """
    if targets.is_floating_point():
        return targets
    index = targets.view(-1, *[1] * (scores.dim() - 1)).expand(-1, 1, *scores.shape[2:])
    return torch.zeros_like(scores).scatter_(1, index, 1.0)


def contrast(scores: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the weights of a contrastive target: a class less the softmax-weighted mean of all other classes.

    The relevance for the score of a class alone also marks evidence for the classes that resemble it.

    Args:
        scores: The network's output, shape (N, K), K > 1.
        classes: A class for each sample, int64 (N,); by default the one with the highest score.

    Returns:
        Shape (N, K), in the dtype of the scores: 1 for the class, and numbers that add up to -1 for the others.

    Example:
        >>> contrast(torch.tensor([[2.0, 1.0, 1.0]]))
        tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    classes = scores.argmax(1) if classes is None else classes
    chosen = classes[:, None]
    others = scores.scatter(1, chosen, -torch.inf).softmax(1)
    return (-others).scatter(1, chosen, 1.0)
