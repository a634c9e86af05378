"""Models that return more than one tensor: choose the output that is explained."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from patterns import UserError

PREFERRED = ("logits", "image_embeds", "pooler_output")  # names of outputs that are explained by default


def explain_output(model: nn.Module, example: Tensor, key: str | None, where: str) -> str | None:
    """Make a model return one of its outputs, if it returns several outputs or one inside a container.

    The method `forward` is replaced on this instance, so that the names of the model's tensors do not change.

    Args:
        model: The model, which is put into evaluation mode.
        example: Samples of its input, shape (N, …).
        key: The output's name, or its number. None: the first name of PREFERRED, or else the first tensor.
        where: The model in messages.

    Returns:
        What is explained, such as `logits (of logits, hidden_states)`; None if the model returns a tensor.

    Raises:
        UserError: If the model has no such output.
    """
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            output = model(example)
        except Exception:
            return None
    if isinstance(output, Tensor):
        if key is not None:
            raise UserError(where, "the model returns one tensor, so it has no outputs to choose from",
                            "Leave it out.", "output")  # fmt: skip
        return None
    named = name_outputs(output)
    if not named:
        raise UserError(where, f"the model returns {type(output).__name__} without a tensor", "Wrap it.", "output")
    chosen = key if key is not None else next((name for name in PREFERRED if name in named), next(iter(named)))
    if chosen not in named:
        raise UserError(where, f"the model has no output {chosen!r}", f"Choose from {', '.join(named)}.", "output")
    inner = model.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return name_outputs(inner(x))[chosen]

    vars(model)["forward"] = MethodType(forward, model)
    return f"{chosen} (of {', '.join(named)})"


def name_outputs(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's output by name, or by number if they have no names.

    Args:
        output: A mapping, a dataclass, a named tuple, a tuple or a list. Values that are no tensors are left out.

    Example:
        >>> list(name_outputs({"logits": torch.zeros(1), "loss": None}))
        ['logits']
        >>> list(name_outputs((torch.zeros(1), torch.ones(1))))
        ['0', '1']
    """
    if isinstance(output, Mapping):
        pairs = [(str(name), value) for name, value in output.items()]
    elif is_dataclass(output):
        pairs = [(each.name, getattr(output, each.name)) for each in fields(output)]
    elif hasattr(output, "_fields"):
        pairs = [(name, getattr(output, name)) for name in output._fields]
    elif isinstance(output, tuple | list):
        pairs = [(str(number), value) for number, value in enumerate(output)]
    else:
        pairs = []
    return {name: value for name, value in pairs if isinstance(value, Tensor)}
