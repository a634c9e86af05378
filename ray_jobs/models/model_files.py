"""Models in files without Python code: programs of torch.export (`.pt2`) and ONNX graphs (`.onnx`)."""

import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from patterns import UserError
from ray_jobs.io.extras import import_extra
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import format_first_line

PROGRAM, ONNX = ".pt2", ".onnx"
# Objects in an exported program that torch unpickles without restrictions.
PICKLED = ("data/constants/custom_obj_", "data/constants/opaque_obj_")
ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load then unpickles tensors and plain values only


def load_model_file(where: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the model of a file, and the shape of its input.

    Args:
        where: The path or URL of a `.pt2` or `.onnx` file.

    Returns:
        The module, and the sizes (C, H, W) of its input without the batch; a size that is not fixed is 0. Empty if the
        file does not tell.

    Raises:
        UserError: If the file cannot be read, holds pickled objects, or cannot be converted.
    """
    content = read_option_file("--model", where)
    return (load_program if where.endswith(PROGRAM) else load_onnx)(content, f"--model {where}")


def load_program(content: bytes, place: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the module of an exported program, and the shape of its input.

    Args:
        content: What `torch.export.save` wrote.
        place: The file in messages.
    """
    if not zipfile.is_zipfile(BytesIO(content)):
        raise UserError(place, "not an exported program, or a truncated one", "Write it with torch.export.save.")
    names = [name.partition("/")[2] for name in zipfile.ZipFile(BytesIO(content)).namelist()]
    if pickled := next((name for name in names if name.startswith(PICKLED)), None):
        what = f"it holds a pickled object, {pickled}, which is not loaded because it can run code"
        raise UserError(place, what, "Export a model of tensors only, or pass a factory: FILE.py:NAME.")
    try:
        with only_tensors():
            program = torch.export.load(BytesIO(content))
            module = program.module()
    except Exception as error:  # a damaged file raises many types
        what = f"torch.export cannot load it ({format_first_line(error)})"
        raise UserError(place, what, "Export the model again, with this version of torch.") from error
    placeholders = zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs)
    inputs = [node.meta.get("val") for node, spec in placeholders if spec.kind is InputKind.USER_INPUT]
    return module, fixed_sizes(inputs[0].shape[1:]) if inputs and isinstance(inputs[0], Tensor) else ()


def fixed_sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes, with 0 for those that are not fixed."""
    return tuple(size if type(size) is int else 0 for size in sizes)


@contextmanager
def only_tensors() -> Iterator[None]:
    """Make torch.load unpickle only tensors and plain values, whatever its caller requests."""
    before = os.environ.get(ONLY_TENSORS)
    os.environ[ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        os.environ.pop(ONLY_TENSORS)
        if before is not None:
            os.environ[ONLY_TENSORS] = before


def load_onnx(content: bytes, place: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the module that onnx2torch makes of an ONNX graph, and the shape of its input.

    Args:
        content: The file.
        place: The file in messages.
    """
    onnx, onnx2torch = (import_extra("onnx", package, where=place) for package in ("onnx", "onnx2torch"))
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf raises many types
        what = f"not an ONNX file, or a damaged one ({format_first_line(error)})"
        raise UserError(place, what, "Copy or export it again.") from error
    resolve_identities(model.graph)
    try:
        with warnings.catch_warnings(action="ignore"):
            module = onnx2torch.convert(model)
    except Exception as error:
        what = f"onnx2torch cannot convert it ({format_first_line(error)})"
        raise UserError(place, what, "Export it with opset_version=13 to 17, or save it with torch.export.") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name not in weights]
    sizes = [dimension.dim_value for dimension in inputs[0]][1:] if inputs else []
    return module, tuple(sizes)


def resolve_identities(graph: Any) -> None:
    """Make the nodes of an ONNX graph read weights directly instead of through Identity nodes, in place.

    torch's exporter writes such nodes for equal weights, and onnx2torch does not find weights behind them.
    """
    weights = {tensor.name for tensor in graph.initializer}
    sources: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        source = sources.get(node.input[0], node.input[0])
        if source in weights:
            sources[node.output[0]] = source
            graph.node.remove(node)
    for node in graph.node:
        for number, name in enumerate(node.input):
            node.input[number] = sources.get(name, name)
