"""Photographs of a shard as the model sees them: resized and cropped."""

from collections.abc import Collection, Iterator
from contextlib import closing

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from patterns.attribution import render_input
from ray_jobs.config import Preprocessing
from ray_jobs.data.decoders import Decode, make_decode
from ray_jobs.data.image_decoding import decode, decode_upright, list_formats, resize_and_crop
from ray_jobs.data.samples import Sample, find_image
from ray_jobs.data.shard_reader import read_shard


def read_photographs(
    shard: str, keys: Collection[str], preprocessing: Preprocessing, decoder: str | None
) -> Iterator[tuple[str, Image.Image]]:
    """Yield those samples that a shard still has as pictures, with their keys, in the order of the shard.

    Args:
        shard: The shard.
        keys: The keys of the samples.
        preprocessing: From an image to the model's input.
        decoder: The user's decoder; see `ModelConfig.decoder`.
    """
    left = set(keys)
    read = make_decode(decoder, preprocessing)
    with closing(read_shard(shard)) as samples:
        for sample in samples:
            if sample.key in left and sample.rejection is None:
                left.remove(sample.key)
                yield sample.key, model_view(sample, preprocessing, read)
            if not left:
                return


def model_view(sample: Sample, preprocessing: Preprocessing, read: Decode | None = None) -> Image.Image:
    """Return the part of a sample's image that the model sees, or its ready or decoded tensor as a picture."""
    if read is not None:
        return render_input(read(sample).numpy())
    if image := find_image(sample.files):
        return to_pil_image(
            resize_and_crop(decode_upright(sample.files[image], "RGB", formats=list_formats(image)), preprocessing)
        )
    return render_input(decode(sample.files, preprocessing).numpy())
