"""Files of traced networks: safetensors with the graph as JSON in the header. Nothing is pickled."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.io.safetensors_stream import CODES, Openable, TensorFile, tensor_specs, write_tensors
from patterns.operators.operator import Operator
from patterns.tracing.digests import digest_of
from patterns.tracing.graph_records import build_graph, record_graph
from patterns.tracing.network import Network
from patterns.tracing.record_texts import decode_operator, decode_record, encode_operator, encode_record

FORMAT = "traced network 1"
DAMAGED = OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError


def save_network(path: Path, network: Network, about: Mapping[str, Any]) -> None:
    """Write a network to a file, which is not written atomically.

    Args:
        path: The file.
        network: The network, on the CPU.
        about: Values of JSON that are written with it.

    Raises:
        TypeError: If the network calls an operation that a file cannot name, such as one of the user's code, or holds a
            tensor that is sparse or of an unusual dtype.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> with TemporaryDirectory() as folder:
        ...     save_network(Path(folder) / "network", network, {"by": "me"})
        ...     loaded, about = load_network(Path(folder) / "network")
        >>> torch.equal(loaded.module(torch.ones(1, 3)), network.module(torch.ones(1, 3))), about
        (True, {'by': 'me'})
    """
    attributes, records = record_graph(network.module)
    tensors: dict[str, Tensor] = {}
    operators = {}
    for name, value in attributes.items():
        if isinstance(value, Operator):
            operators[name] = encode_operator(value)
            tensors |= {f"{name}/{key}": tensor for key, tensor in value.named_buffers()}
        else:
            tensors[name] = value
    if unusual := [f"{t.layout} {t.dtype}" for t in tensors.values() if not is_plain(t)]:
        raise TypeError(f"a tensor of the type {unusual[0]} has no form in files")
    graph = {
        "nodes": [encode_record(record) for record in records],
        "operators": operators,
        "views": {name: [list(t.shape), list(t.stride())] for name, t in tensors.items() if not t.is_contiguous()},
        "fields": [network.input_shape, network.output_shape, network.constants],
    }
    flat = {name: flatten_memory(tensor) for name, tensor in tensors.items()}
    texts = {"format": FORMAT, "about": json.dumps(about), "graph": json.dumps(graph)}
    texts["digest"] = compute_digest(texts, flat)
    write_tensors(path, tensor_specs(flat), flat.values(), texts)


def load_network(path: Openable) -> tuple[Network, dict[str, Any]]:
    """Read a network and its description from a file of `save_network`.

    Args:
        path: The file, local or remote.

    Raises:
        UserError: If there is no such file, or it is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from patterns import trace
        >>> network = trace(torch.nn.Linear(4, 3), torch.zeros(2, 4))
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "network.safetensors")
        ...     save_network(file, network, {"model": "linear"})
        ...     loaded, about = load_network(file)
        >>> list(loaded.operators) == list(network.operators), about
        (True, {'model': 'linear'})
    """
    try:
        with TensorFile(path) as file:
            texts, flat = file.metadata, {name: file.get(name) for name in file.specs}
        if texts["format"] != FORMAT or texts["digest"] != compute_digest(texts, flat):
            raise ValueError("its digest is another one")
        graph, about = json.loads(texts["graph"]), json.loads(texts["about"])
        tensors = dict(flat)
        for name, (shape, stride) in graph["views"].items():
            tensors[name] = flat[name].as_strided(shape, stride)
        attributes: dict[str, Any] = {}
        for name, value in graph["operators"].items():
            attributes[name] = decode_operator(value, tensors.pop(f"{name}/weight"), tensors.pop(f"{name}/bias", None))
        records = tuple(map(decode_record, graph["nodes"]))
        used = {record.target for record in records if record.op in ("get_attr", "call_module")}
        if missing := used - attributes.keys() - tensors.keys():
            raise ValueError(f"it has no {min(missing)}")
        module = build_graph(attributes | tensors, records)
        inputs, outputs, constants = graph["fields"]
        return Network(module, tuple(inputs), tuple(outputs), constants), about
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        what = f"not a complete file of a traced network ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "Delete it, and trace the model again.") from error


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of plain memory of a dtype that files have."""
    return tensor.layout is torch.strided and tensor.dtype in CODES and not tensor.is_meta


def flatten_memory(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor unchanged; of another tensor, return its memory from its first element on.

    Sums can be rounded in another way if the same matrix has another order in memory.
    """
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided((1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())),), (1,))


def compute_digest(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of the content of a file."""
    parts = [texts["format"], texts["about"], texts["graph"], digest_of(sorted(tensors.items()))]
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
