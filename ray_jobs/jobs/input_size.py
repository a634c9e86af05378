"""The input's shape of a factory's model, from the first ready tensor of the data."""

import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from patterns import UserError
from ray_jobs.config import ModelConfig
from ray_jobs.data.image_decoding import npy_header
from ray_jobs.data.samples import image_in, tensor_in
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.models.loading import IMAGENET, LIBRARIES

PREPROCESSING = ("image_size", "resize", "mean", "std")
SHARDS, SAMPLES = 3, 100  # that are read at most until a sample says what the data are


def sized(model: ModelConfig, shards: Sequence[str], begun: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return a config with the height, width and number of channels of the data, if these are ready tensors.

    The config is returned as it is if it is of a library's model, if it has any option of preprocessing, or if the
    data are images.

    Args:
        model: The config of the model.
        shards: The data.
        begun: The manifest's section of a fit that is taken up again; its shape is used if no shard can be read now.

    Raises:
        UserError: If the tensors are not square.
    """
    if model.spec.partition(":")[0] in LIBRARIES or any(getattr(model, name) is not None for name in PREPROCESSING):
        return model
    for shard in shards[:SHARDS]:
        try:
            shape = first_shape(shard)
        except UserError:  # the job itself reports it
            continue
        if shape is None or shape == IMAGENET.input_shape:
            return model
        channels, height, width = shape
        if height != width:
            what = f"a tensor of shape {shape}, of which height and width differ"
            raise UserError(shard, what, "Store square tensors (C, H, H); only square inputs are supported.")
        mean, std = (0.0,) * channels, (1.0,) * channels
        return replace(model, image_size=height, resize=height, mean=mean, std=std)
    if begun is None or begun["model"]["spec"] != model.spec:
        return model
    stored = {name: begun["model"][name] for name in PREPROCESSING}
    return ModelConfig(**asdict(model) | {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def first_shape(shard: str) -> tuple[int, ...] | None:
    """Return the shape (C, H, W) of a shard's first sample with data, or None if that is an image.

    Raises:
        UserError: If the shard cannot be read, or no sample of it has a tensor or an image.
    """
    with closing(read_shard(shard)) as samples:
        for sample in islice(samples, SAMPLES):
            if image_in(sample):
                return None
            if tensor := tensor_in(sample):
                try:
                    shape, _, _ = npy_header(io.BytesIO(sample[tensor]))
                except Exception:  # untrusted bytes raise many types; the job rejects the sample with its reason
                    continue
                if len(shape) == 3 and min(shape) > 0:
                    return tuple(shape)
    raise UserError(shard, "no sample holds a tensor or an image", "Replace it, or leave it out of --shards.")
