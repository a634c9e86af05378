"""Write a program of `torch.export` as an ONNX graph.

ONNX has no operations for gradients. Those of convolutions and pooling, and a stable sort, are rewritten here into
operations that it has; torch's exporter does the same with simpler ones.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from patterns import UserError
from ray_jobs.units import format_bytes, format_first_line

aten = torch.ops.aten
LARGEST = 2**31 - 2**24  # bytes of weights; an ONNX file is at most 2 GiB
OPSET = 18
Sizes = Sequence[int]


def require_onnx() -> None:
    """Raise UserError unless the packages that write ONNX files are installed."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        what = f"{missing[0]} is not installed"
        raise UserError("", what, "Run pip install 'patternnet-ray[onnx]', or write a .pt2 file.", "to")


def write_onnx(
    program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Write a program as an ONNX file.

    Args:
        program: The program.
        path: The file.
        inputs: The names of its inputs.
        outputs: The names of its outputs.
        metadata: Entries of the file's metadata.

    Raises:
        UserError: If ONNX lacks an operation of the program, or the file would be too large.
    """
    size = sum(t.nbytes for t in program.state_dict.values())
    if size > LARGEST:
        what = f"the weights take {format_bytes(size)}, and an ONNX file holds at most {format_bytes(LARGEST)}"
        raise UserError("", what, "Write a .pt2 file.", "to")
    try:
        with warnings.catch_warnings(action="ignore"):
            rewritten = program.run_decompositions(REWRITES)
            converted = torch.onnx.export(
                rewritten, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
            )
    except Exception as error:  # torch's exporter raises many types
        raise UserError("", describe(error), "Write a .pt2 file.", "to") from error
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    converted.save(path, external_data=False)


def describe(error: BaseException) -> str:
    """Return in a line why torch's exporter failed: the operation that ONNX lacks, if it names one."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(chain[-1])):
        return f"ONNX has no operation for {found[1]}"
    return f"torch.onnx cannot export the model ({format_first_line(chain[-1])})"


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """Return the gradient of a convolution's input: a transposed convolution, and the reverse."""
    if transposed:
        zeros = [0] * len(stride)
        return aten.convolution(grad, weight, None, stride, padding, dilation, False, zeros, groups), None, None
    axes = range(len(stride))
    reached = [(grad.shape[2 + i] - 1) * stride[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in axes]
    rest = [x.shape[2 + i] + 2 * padding[i] - reached[i] for i in axes]  # what no window reaches
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups), None, None


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Return the gradient of the input of max pooling: each gradient is added at the index of its maximum."""
    zeros = grad.new_zeros(x.shape).flatten(2)
    return zeros.scatter_add(2, indices.flatten(2), grad.flatten(2)).view(x.shape)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Return the gradient of the input of average pooling, a depthwise convolution, if all windows are of one size."""
    if ceil_mode or divisor_override is not None or (any(padding) and not count_include_pad):
        return NotImplemented
    weight = grad.new_full((x.shape[1], 1, *kernel), 1 / prod(kernel))
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    options = stride or kernel, padding, ones, False, zeros, x.shape[1], (True, False, False)
    return convolution_backward(grad, x, weight, None, *options)[0]


def sort(x: Tensor, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Return sorted values and their indices; of equal values, ONNX's TopK puts the lower index first."""
    return aten.topk(x, x.shape[dim], dim, descending, True)


REWRITES = {
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.sort.stable: sort,
}
