"""Preparation of modules: unwrap, validate, materialize and cast an nn.Module, so that it can be traced and hashed."""

import inspect
from collections.abc import Iterator, Sequence
from io import BytesIO
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from patterns import UserError
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import format_first_line

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
STATISTICS = ("running_mean", "running_var")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel, DistributedDataParallel and AveragedModel."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def prepare(model: nn.Module, where: str, inputs: Sequence[tuple[str, str]] = ()) -> nn.Module:
    """Return the unwrapped module, with a forward pass of one positional argument.

    Args:
        model: The model.
        where: The model in messages.
        inputs: The names and values of its further inputs; see `parse_value`.

    Raises:
        UserError: If the model cannot be traced because it is TorchScript, quantized or on the meta device, or it has
            no such inputs.
    """
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{f'its module {name} is' if name else 'it is'} TorchScript, which has no Python code to trace"
            raise UserError(where, what, "Load the original nn.Module, and its weights from a state dict.")
        if type(module).__module__.startswith(QUANTIZED):
            what = f"its module {name} is quantized ({type(module).__name__})"
            raise UserError(where, what, "Load the model in floating point, as it was before quantization.")
        if isinstance(module, nn.DataParallel):
            module.device_ids = []  # then it calls its module on the module's device
        if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
            prepare_exported(module, where)
    for name, tensor in iterate_tensors(model):
        if tensor.is_meta:
            what = f"its {name} is on the meta device and has no values"
            raise UserError(where, what, "Build the model on the CPU, with values for all its tensors.")
        if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
            what = f"its {name} is a {type(tensor.data).__name__ if not tensor.is_quantized else 'quantized tensor'}"
            raise UserError(where, what, "Load the model in floating point, with ordinary tensors.")
    fill_inputs(model, where, inputs)
    accept_one_input(model, where)
    return model


def prepare_exported(module: torch.fx.GraphModule, where: str) -> None:
    """Allow `eval()` on the module of an exported program; it does not change the graph, which is fixed.

    Raises:
        UserError: If the program was exported for one batch size.
    """
    inputs = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() and type(inputs[0].shape[0]) is int:
        remedy = "Export it with dynamic_shapes=({0: torch.export.Dim('batch')},), or load the original nn.Module."
        raise UserError(where, f"it was exported for batches of {inputs[0].shape[0]} only", remedy)
    for name in ("eval", "train"):
        vars(module).pop(name, None)


def parse_value(name: str, text: str) -> Any:
    """Return the value of a further input: a number, True, False, None, or the tensor of an npy file.

    Raises:
        UserError: If the text is none of these, or the file cannot be read.
    """
    if text.endswith(".npy"):
        content = read_option_file("--input", text)
        try:
            return torch.from_numpy(np.load(BytesIO(content), allow_pickle=False))
        except Exception as error:  # a damaged file raises many types
            what = f"not an npy file of numbers ({format_first_line(error)})"
            raise UserError(f"--input {name}={text}", what, "Write it with numpy.save.") from error
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    remedy = "Pass a number, true, false, none or FILE.npy."
    raise UserError(f"--input {name}={text}", f"{text!r} is not a value", remedy)


def fill_inputs(model: nn.Module, where: str, inputs: Sequence[tuple[str, str]]) -> None:
    """Give a model's forward constant values for its further inputs, in place.

    A tensor is repeated for each sample of a batch: its shape is that of one sample. Floating-point values get the
    precision of the images.

    Raises:
        UserError: If the model has no such input, or none is left for the images.
    """
    if not inputs:
        return
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if p.kind not in VARIABLE]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    values = {name: parse_value(name, text) for name, text in inputs}
    unknown = [name for name in values if name not in names and not any_name]
    left = [name for name in names if name not in values]
    if unknown or not left:
        what = "all inputs have fixed values, so no input takes the images"
        what = f"the model has no input {unknown[0]!r}" if unknown else what
        raise UserError(where, what, f"Its inputs are {', '.join(names)}.", "inputs")
    needed = [name for name in left if parameters[name].default is inspect.Parameter.empty] or left[:1]
    inner = model.forward

    def forward(self: nn.Module, x: Tensor) -> Any:
        return inner(**{needed[0]: x}, **{name: repeat(value, x) for name, value in values.items()})

    vars(model)["forward"] = MethodType(forward, model)


def repeat(value: Any, x: Tensor) -> Any:
    """Return a tensor for each sample of a batch, in its dtype if it has floating-point values; others unchanged."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(x.device, x.dtype if value.is_floating_point() else value.dtype)
    return value.expand(x.shape[0], *value.shape)


def accept_one_input(model: nn.Module, where: str) -> None:
    """Give a model whose forward takes *args, or only keyword arguments, a forward of one positional argument.

    torch.export needs an input with a name. The method is replaced on this instance, instead of wrapping the model, so
    that the names of its tensors do not change.

    Raises:
        UserError: If it is not clear which keyword argument is the input.
    """
    if "forward" in vars(model):
        return
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):

        def forward(self: nn.Module, x: Tensor) -> Any:
            return type(self).forward(self, x)
    elif not positional:
        keywords = [p for p in parameters if p.kind not in VARIABLE]
        needed = [p for p in keywords if p.default is p.empty] or keywords
        if len(needed) != 1:
            named = ", ".join(p.name for p in needed) or "**kwargs"
            what = f"its forward takes only keyword arguments ({named})"
            raise UserError(where, what, "Wrap it in a module whose forward takes the images.")
        name = needed[0].name

        def forward(self: nn.Module, x: Tensor) -> Any:
            return type(self).forward(self, **{name: x})
    else:
        return
    vars(model)["forward"] = MethodType(forward, model)


def materialize(model: nn.Module, shape: tuple[int, ...], where: str) -> None:
    """Create the parameters of lazy layers by a forward pass of zeros, with torch's global generator.

    Args:
        model: The model; changed in place.
        shape: The shape of an input (C, H, W).
        where: The model in messages.

    Raises:
        UserError: If the model does not take an input of this shape, or does not use one of its lazy layers.
    """
    if not any(is_lazy(tensor) for _, tensor in iterate_tensors(model)):
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *shape))
    except Exception as error:  # the model's own code
        what = f"its lazy layers cannot be created from an input of shape {shape} ({format_first_line(error)})"
        raise UserError(where, what, "Set --image-size, --mean and --std to the model's input.") from error
    for name, tensor in iterate_tensors(model):
        if is_lazy(tensor):
            what = f"its lazy {name} has no shape after a forward pass, because the forward pass does not use it"
            raise UserError(where, what, "Remove the layer, or replace it by a layer with fixed sizes.")


def iterate_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model with their names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model to a device and its tensors to a precision, in place; complex tensors stay complex.

    `nn.Module.to` would make them real.
    """
    complex_dtype = torch.promote_types(dtype, torch.complex64)

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(
            complex_dtype if tensor.is_complex() else dtype if tensor.is_floating_point() else tensor.dtype
        )

    return model.to(device)._apply(convert)


def require_finite(model: nn.Module, where: str) -> None:
    """Raise UserError if a parameter or a norm's running statistics are not finite.

    Other buffers are not checked, because a mask for attention holds -inf.
    """
    for name, tensor in iterate_tensors(model):
        statistic = name.rpartition(".")[2] in STATISTICS
        if tensor.layout is not torch.strided or not (isinstance(tensor, nn.Parameter) or statistic):
            continue
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            what = f"{wrong} of the {tensor.numel()} values of {name} are not finite (NaN or infinite)"
            raise UserError(where, what, "Pass weights of a training that did not diverge.")
