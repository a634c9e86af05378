"""Image models of Hugging Face's transformers, with the preprocessing of their image processor.

The model and its files are read by transformers itself, from a folder of `save_pretrained` or from the Hub.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.io.extras import import_extra
from ray_jobs.models.libraries import unavailable_error, unsupported_error

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # numbers of Pillow


# Endings of the names of model classes that are loaded as they were saved.
IMAGE_MODELS = ("ForImageClassification", "ForImageClassificationWithTeacher", "ForSemanticSegmentation", "VisionModel",
                "VisionModelWithProjection")  # fmt: skip
# The image encoders of models with an image and a text encoder.
ENCODERS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}


def load_transformers_model(name: str, own_weights: bool) -> tuple[nn.Module, Preprocessing]:
    """Return an image model and its preprocessing.

    A classifier, a segmentation model or an image encoder is loaded as it was saved; of CLIP and SigLIP, the image
    encoder; all others as classifiers.

    Args:
        name: A folder that `save_pretrained` wrote, or `OWNER/NAME` on the Hugging Face Hub.
        own_weights: Whether to load its weights; otherwise they are random.

    Raises:
        UserError: If transformers is not installed, or the model, its weights or its preprocessing cannot be used.
    """
    transformers = import_transformers(name)
    missing: Collection[str] = ()
    try:
        kind = choose_class(transformers, transformers.AutoConfig.from_pretrained(name))
        if own_weights:
            model, info = kind.from_pretrained(name, output_loading_info=True)
            missing = info["missing_keys"]
        elif hasattr(kind, "from_config"):
            model = kind.from_config(transformers.AutoConfig.from_pretrained(name))
        else:
            model = kind(kind.config_class.from_pretrained(name))
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # a missing file, a download, a model without a classifier: it raises many types
        raise unavailable_error(f"transformers cannot load {name!r}", error) from error
    if missing:
        what = f"its files have no weights for {len(missing)} tensors, which would be random: {sorted(missing)[0]}"
        raise UserError(f"--model transformers:{name}", what, f"They were not saved from {type(model).__name__}.")
    return model, convert_image_processor(processor.to_dict(), f"transformers:{name}")


def choose_class(transformers: Any, config: Any) -> Any:
    """Return the class of transformers that loads a model of a configuration."""
    saved = str((config.architectures or [""])[0])
    saved = ENCODERS.get(saved, saved)
    found = getattr(transformers, saved, None) if saved.endswith(IMAGE_MODELS) else None
    return found or transformers.AutoModelForImageClassification


def list_transformers_classes(name: str) -> list[str]:
    """Return the names of a model's classes; empty if they are only numbers.

    Raises:
        UserError: If transformers is not installed, or the model's configuration cannot be read.
    """
    transformers = import_transformers(name)
    try:
        names = transformers.AutoConfig.from_pretrained(name).id2label
    except Exception as error:
        raise unavailable_error(f"transformers cannot load {name!r}", error) from error
    listed = [str(names[number]) for number in sorted(names)]
    return [] if listed == [f"LABEL_{number}" for number in range(len(listed))] else listed


def import_transformers(name: str) -> Any:
    """Import transformers, which takes seconds. Raise UserError if it is not installed."""
    return import_extra("transformers", "transformers", where=f"--model transformers:{name}")


def convert_image_processor(config: Mapping[str, Any], spec: str) -> Preprocessing:
    """Convert the configuration of an image processor.

    Raises:
        UserError: If its transform is not supported.
    """
    size = config.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    mean, std = (tuple(map(float, config.get(key) or ())) for key in ("image_mean", "image_std"))
    if not config.get("do_normalize", True) or not mean:
        mean, std = (0.0,) * 3, (1.0,) * 3
    interpolation = RESAMPLING.get(int(config.get("resample", 2)))
    if not config.get("do_resize", True) or interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise unsupported_error(spec, "has an image processor without a resize, or with an unknown interpolation")
    if config.get("do_rescale", True) and abs(float(config.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3:
        raise unsupported_error(spec, f"rescales pixels by {config['rescale_factor']}; only 1/255 is supported")
    cropped = config.get("crop_size") if config.get("do_center_crop") else None
    crop = cropped["height"] if isinstance(cropped, Mapping) else cropped
    mode = "center"
    if "shortest_edge" in size:
        side, resize = crop or size["shortest_edge"], size["shortest_edge"]
        if config.get("crop_pct"):  # ConvNeXt: images of 384 pixels or more are not cropped
            side, mode = resize, "center" if resize < 384 else "squash"
            resize = int(resize / config["crop_pct"]) if resize < 384 else resize
    elif size.get("height") != size.get("width") or "height" not in size:
        raise unsupported_error(spec, f"takes images of the size {size}; only square images are supported")
    elif crop is not None and crop != size["height"]:
        raise unsupported_error(spec, f"resizes to {size} and crops {crop}")
    else:
        side, resize, mode = size["height"], size["height"], "squash"
    return Preprocessing(
        image_size=side, resize=resize, interpolation=interpolation, mean=mean, std=std, crop_mode=mode
    )
