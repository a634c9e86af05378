"""What a network and an explainer accept from their callers: batches of one shape, and targets in several forms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.tracing.aten_graph import AtenGraph

Targets = int | Sequence[int] | np.ndarray | Tensor


def add_shape_check(graph: AtenGraph, shape: tuple[int, ...]) -> None:
    """Let a graph refuse inputs of another shape, of which its slices and pools would take a part."""
    (placeholder,) = graph.fx.find_nodes(op="placeholder")
    with graph.fx.inserting_after(placeholder):
        checked = graph.fx.call_function(require_batch, (placeholder, shape))
    checked.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)


def require_batch(inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return inputs of shape (N, *shape). UserError for other shapes."""
    if tuple(inputs.shape[1:]) != shape:
        what = f"shape {tuple(inputs.shape)}, and the network was traced for (N, {', '.join(map(str, shape))})"
        one = tuple(inputs.shape) == shape
        remedy = "Add a batch dimension: x[None]." if one else "Resize them, or trace an example of their shape."
        raise UserError("inputs", what, remedy)
    return inputs


def validate_inputs(inputs: Tensor, like: Tensor) -> Tensor:
    """Return inputs that autograd takes. UserError if they have another type or device than a network's weights."""
    for name in ("dtype", "device"):
        found, wanted = getattr(inputs, name), getattr(like, name)
        if found != wanted:
            what = f"{name} {found}, and the network has {wanted}"
            raise UserError("inputs", what, f"Pass inputs.to({wanted!r}).")
    inputs = inputs.detach()
    return inputs.clone() if inputs.is_inference() else inputs


def select_images(batch: Any) -> Tensor:
    """Return the images of a batch: itself, or the first of (images, labels, …), as a DataLoader gives them."""
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        what = f"a batch of type {type(batch).__name__}"
        raise UserError("batches", what, "Give tensors (N, C, H, W), or tuples whose first item is one.")
    return images


def resolve_targets(targets: Targets, scores: Tensor) -> Tensor:
    """Return targets as a tensor on the device of the scores.

    Args:
        targets: A class for all samples; a class for each sample, (N,), or several, (N, T); or floating-point
            weights of a sum of scores, in the shape of the scores.
        scores: The network's output, shape (N, K, …).

    Returns:
        int64 of shape (N,) or (N, T), or weights in the dtype of the scores.

    Raises:
        UserError: If the number of targets is not that of the samples, or there is no such class.
    """
    chosen = torch.as_tensor(targets, device=scores.device)
    if chosen.is_floating_point():
        if chosen.shape != scores.shape:
            what = f"weights of shape {tuple(chosen.shape)} for scores of shape {tuple(scores.shape)}"
            raise UserError("targets", what, "Give classes as whole numbers, or a weight for each score.")
        return chosen.to(scores.dtype)
    if chosen.dtype in (torch.bool, torch.complex64, torch.complex128) or chosen.dim() > 2:
        what = f"targets of type {chosen.dtype} and shape {tuple(chosen.shape)}"
        raise UserError("targets", what, "Give classes as whole numbers, one for each sample.")
    samples, classes = scores.shape[:2]
    chosen = chosen.long().expand(samples) if chosen.dim() == 0 else chosen.long()
    if len(chosen) != samples:
        what = f"{len(chosen)} targets for {samples} samples"
        raise UserError("targets", what, "Give one for each sample, or one number for all.")
    outside = chosen[(chosen < 0) | (chosen >= classes)]
    if outside.numel():
        raise UserError("targets", f"no class {int(outside[0])}", f"The model's classes are 0 to {classes - 1}.")
    return chosen
