"""Digests that tell models apart: of a module's tensors, and of what else its forward pass holds."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patterns.tracing.aten_graph import AtenGraph


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a model's parameters and buffers.

    Buffers that are not in the state dict count too. A shared tensor counts under each of its names.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return digest_of(sorted(tensors.items()))


def constants_digest(graph: AtenGraph, model: nn.Module) -> str:
    """Return the SHA-256 of the numbers that an exported graph holds in addition to the model's parameters and buffers.

    These are tensors that are plain attributes, tensors made in the forward pass, and numbers in its calls. They are
    hashed in an order that does not depend on the device or on the names that torch.export gives them.
    """
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    tensors = [value for name, value in graph.attributes.items() if name not in known and isinstance(value, Tensor)]
    leaves = [leaf for node in graph.fx.nodes for leaf in tree_leaves((node.args, node.kwargs))]
    numbers = sorted(repr(leaf) for leaf in leaves if type(leaf) is float)
    digests = sorted(digest_of([("", value)]) for value in tensors)
    return f"sha256:{hashlib.sha256('/'.join(digests + numbers).encode()).hexdigest()}"


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of some named tensors, of any type and layout."""
    state = hashlib.sha256()
    for name, value in tensors:
        state.update(f"{name}/{value.dtype}/{tuple(value.shape)}/".encode())
        if value.is_meta:  # it has no numbers
            continue
        value = value.detach().cpu()
        if value.layout is not torch.strided:
            value = value.to_dense()
        state.update(value.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{state.hexdigest()}"
