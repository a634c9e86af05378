"""The input shape of a model that a user's function makes, inferred from the data: the first tensor of a shard."""

import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

from patterns import UserError
from ray_jobs.config import ModelConfig
from ray_jobs.data import shard_reader
from ray_jobs.data.decoders import call_decoder, load_decoder
from ray_jobs.data.image_decoding import parse_npy_header
from ray_jobs.data.samples import Sample, SampleError, find_image, find_tensor
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.process_pool import ProcessPool
from ray_jobs.models.loading import IMAGENET, LIBRARIES

PREPROCESSING = ("image_size", "resize", "mean", "std")
MAX_SHARDS, MAX_SAMPLES = 3, 100  # that are read to find a sample with a tensor or an image


def infer_input_size(model: ModelConfig, shards: Sequence[str], begun: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return a config with the height, width and number of channels of the data, if these are ready tensors.

    The config is returned unchanged for a model of a library, if an option of preprocessing is given, and for images.

    Args:
        model: The config of the model.
        shards: The data.
        begun: The manifest's section of a fit that is resumed; its shape is used if no shard can be read now.

    Raises:
        UserError: If the tensors are not square.
    """
    if model.spec.partition(":")[0] in LIBRARIES or any(getattr(model, name) is not None for name in PREPROCESSING):
        return model
    for shard in shards[:MAX_SHARDS]:
        try:
            shape = read_first_shape(shard, model.decoder)
        except UserError:  # the job itself reports the error
            continue
        if shape is None or shape == IMAGENET.input_shape:
            return model
        channels, height, width = shape
        if height != width:
            what = f"a tensor of shape {shape}, whose height and width differ"
            raise UserError(shard, what, "Store square tensors (C, H, H); only square inputs are supported.")
        mean, std = (0.0,) * channels, (1.0,) * channels
        return replace(model, image_size=height, resize=height, mean=mean, std=std)
    if begun is None or begun["model"]["spec"] != model.spec:
        return model
    stored = {name: begun["model"][name] for name in PREPROCESSING}
    return ModelConfig(**asdict(model) | {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def read_first_shape(shard: str, decoder: str | None = None) -> tuple[int, ...] | None:
    """Return the shape (C, H, W) of a shard's first sample with data, or None if that is an image.

    Args:
        shard: The shard.
        decoder: The user's decoder; None: images and ready tensors are the data.

    Raises:
        UserError: If the shard cannot be read, or no sample of it has a tensor or an image.
    """
    with closing(read_shard(shard)) as read:
        samples = islice(read, MAX_SAMPLES)
        if decoder is not None:
            load_decoder(decoder)  # an error here is that of the whole job
            # As in a worker, a decoder that hangs or kills its process costs one sample.
            parts = ([sample] for sample in samples)
            with (
                ProcessPool(1, shard_reader.__name__) as pool,
                closing(pool.map(partial(decode_shape, decoder), lambda *_: None, parts)) as shapes,
            ):
                found = next((shape for (shape,) in shapes if shape is not None), None)
            if found is not None:
                return found
        for sample in samples:
            if find_image(sample.files):
                return None
            if tensor := find_tensor(sample.files):
                try:
                    shape, _, _ = parse_npy_header(io.BytesIO(sample.files[tensor]))
                except Exception:  # untrusted bytes raise many types; the job rejects the sample with its reason
                    continue
                if len(shape) == 3 and min(shape) > 0:
                    return tuple(shape)
    raise UserError(shard, "no sample holds a tensor or an image", "Replace the shard, or leave it out of --shards.")


def decode_shape(decoder: str, sample: Sample) -> tuple[int, ...] | None:
    """Return the shape (C, H, W) of what a decoder makes of a sample; None if the job will reject the sample."""
    try:
        shape = tuple(call_decoder(load_decoder(decoder), sample).shape)
    except SampleError:
        return None
    return shape if len(shape) == 3 and min(shape) > 0 else None
