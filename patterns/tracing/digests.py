"""Digests that distinguish models: of a module's tensors, and of all other numbers that its forward pass uses."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patterns.tracing.aten_graph import AtenGraph


def digest(model: nn.Module) -> str:
    """Return the SHA-256 digest of a model's parameters and buffers: of their names, dtypes, shapes and bytes.

    Buffers outside of the state dict count too. A shared tensor counts under each of its names.

    Args:
        model: The model.

    Returns:
        `sha256:` and 64 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = digest(layer)
        >>> layer.bias.data += 1
        >>> before.startswith("sha256:"), digest(layer) == before
        (True, False)
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return digest_of(sorted(tensors.items()))


def constants_digest(graph: AtenGraph, model: nn.Module) -> str:
    """Return the SHA-256 digest of the numbers that an exported graph holds in addition to parameters and buffers.

    These are tensors in plain attributes, tensors made in the forward pass, and numbers in its calls. They are hashed
    in an order that depends neither on the device nor on the names that torch.export gives them.
    """
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    tensors = [value for name, value in graph.attributes.items() if name not in known and isinstance(value, Tensor)]
    leaves = [leaf for node in graph.fx.nodes for leaf in tree_leaves((node.args, node.kwargs))]
    numbers = sorted(repr(leaf) for leaf in leaves if type(leaf) is float)
    digests = sorted(digest_of([("", value)]) for value in tensors)
    return f"sha256:{hashlib.sha256('/'.join(digests + numbers).encode()).hexdigest()}"


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 digest of named tensors of any dtype and layout."""
    state = hashlib.sha256()
    for name, value in tensors:
        state.update(f"{name}/{value.dtype}/{tuple(value.shape)}/".encode())
        if value.is_meta:  # the meta device holds no numbers
            continue
        value = value.detach().cpu()
        if value.layout is not torch.strided:
            value = value.to_dense()
        state.update(value.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{state.hexdigest()}"
