"""Decoders of the user: functions that make the model's input from the files of a sample.

For formats that the project does not read, such as images with 16 bits or many channels.
"""

import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data.samples import Sample, SampleError
from ray_jobs.io.user_code import describe_error, import_attribute

Decoder = Callable[[dict[str, Any]], Any]  # from a sample of WebDataset to an array (C, H, W)
Decode = Callable[[Sample], Tensor]

REMEDY = "Pass FILE.py:FUNCTION or MODULE:FUNCTION; every worker must be able to import it."


def load_decoder(spec: str) -> Decoder:
    """Import a decoder.

    Args:
        spec: `package.module:function` or `file.py:function`.

    Raises:
        UserError: If it cannot be imported on this machine, or is no function.
    """
    place = f"--decoder {spec}, on {socket.gethostname()}"
    with import_attribute(spec, place, REMEDY) as found:
        if not callable(found):
            raise UserError(place, f"{spec.rpartition(':')[2]} is no function", REMEDY)
        return found


def make_decode(spec: str | None, preprocessing: Preprocessing) -> Decode | None:
    """Return the function that a reader decodes samples with; None if it decodes images and tensors itself.

    Args:
        spec: The decoder; None: none.
        preprocessing: The shape of the input.
    """
    if spec is None:
        return None
    decoder = load_decoder(spec)
    return lambda sample: apply_decoder(decoder, sample, preprocessing.input_shape)


def call_decoder(decoder: Decoder, sample: Sample) -> Tensor:
    """Return what a decoder makes of a sample, float32.

    Args:
        decoder: The decoder. It gets the sample's files by extension in lower case, and its key as `__key__`.
        sample: The sample.

    Raises:
        SampleError: If the decoder raises any exception, or returns no array of real numbers.
    """
    try:
        found = decoder({"__key__": sample.key, **sample.files})
        tensor = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    except (Exception, SystemExit) as error:  # the user's code
        raise SampleError(f"the decoder failed ({describe_error(error)})") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise SampleError(f"the decoder returned {tensor.dtype}, not real numbers")
    return tensor.float()


def apply_decoder(decoder: Decoder, sample: Sample, shape: tuple[int, ...]) -> Tensor:
    """Return the input that a decoder makes of a sample; see `call_decoder`.

    Raises:
        SampleError: If the decoder fails, or the input has another shape or values that are not finite.
    """
    tensor = call_decoder(decoder, sample)
    if tuple(tensor.shape) != shape:
        raise SampleError(f"the decoder returned the shape {tuple(tensor.shape)}, but the model takes {shape}")
    if not tensor.isfinite().all():
        raise SampleError("the decoder returned values that are not finite")
    return tensor
