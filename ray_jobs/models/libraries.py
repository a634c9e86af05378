"""Models of torchvision and timm by name, with the library's weights and preprocessing."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from patterns import UserError
from ray_jobs.config import CROP_MODES, INTERPOLATIONS, Preprocessing
from ray_jobs.io.extras import import_extra
from ray_jobs.units import format_first_line


def load_torchvision_model(name: str, weights: str) -> tuple[nn.Module, Preprocessing]:
    """Return a torchvision model and its preprocessing.

    Args:
        name: The name in torchvision.models.
        weights: `default` or a name such as IMAGENET1K_V1 loads weights of torchvision. Any other value leaves the
            model with random weights.

    Raises:
        UserError: If torchvision has no such model, or its weights cannot be downloaded.
    """
    from torchvision import models

    spec = f"torchvision:{name}"
    if name not in models.list_models(module=models):
        raise unknown_model_error("torchvision", name, models.list_models(module=models))
    members = models.get_model_weights(name).__members__
    named = "DEFAULT" if weights not in members else weights
    chosen = members[named]
    own_weights = weights == "default" or weights in members
    try:
        model = models.get_model(name, weights=chosen if own_weights else None)
    except Exception as error:  # a download, or a damaged file in the cache, raises many types
        default = "default weights" if chosen is members["DEFAULT"] else "weights"
        raise unavailable_error(f"torchvision's {default} {chosen.name} of {name} cannot be loaded", error) from error
    return model, convert_torchvision_preset(chosen.transforms(), spec)


def has_torchvision_weights(spec: str, weights: str) -> bool:
    """Return whether torchvision has weights of this name for a model.

    Args:
        spec: The spec of the model.
        weights: A name such as IMAGENET1K_V1.
    """
    from torchvision import models

    library, _, name = spec.partition(":")
    if library != "torchvision" or name not in models.list_models(module=models):
        return False
    return weights in models.get_model_weights(name).__members__


def convert_torchvision_preset(preset: Any, spec: str) -> Preprocessing:
    """Convert torchvision's preset of weights. Raise UserError if it is not supported."""
    if len(preset.crop_size) != 1 or len(preset.resize_size) != 1:
        raise unsupported_error(
            spec, f"resizes to {preset.resize_size} and crops to {preset.crop_size}, but only squares are supported"
        )
    return Preprocessing(
        image_size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def list_torchvision_classes(name: str) -> list[str]:
    """Return the class names of a torchvision model; empty for an unknown model."""
    from torchvision import models

    if name not in models.list_models(module=models):
        return []
    return list(models.get_model_weights(name).DEFAULT.meta.get("categories", []))


def load_timm_model(name: str, own_weights: bool) -> tuple[nn.Module, Preprocessing]:
    """Return a timm model and its preprocessing.

    Args:
        name: A name in timm's registry, with or without a tag, or `hf-hub:OWNER/NAME` on the Hugging Face Hub.
        own_weights: Whether to load timm's weights.

    Raises:
        UserError: If timm is not installed, has no such model, or its weights or preprocessing cannot be used.
    """
    spec = f"timm:{name}"
    timm = import_extra("timm", "timm", where=f"--model {spec}")
    if name.startswith("timm/"):  # the Hub's name of a model in timm's registry
        name = name.removeprefix("timm/")
    if not set(name) & set(":/") and not timm.is_model(name):  # timm reports errors in other names itself
        raise unknown_model_error("timm", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=own_weights)
    except Exception as error:  # a download, an unknown tag, a model without weights: timm raises many types
        raise unavailable_error(f"timm cannot create {name!r}", error) from error
    return model, convert_timm_config(timm.data.resolve_model_data_config(model), spec)


def convert_timm_config(config: Mapping[str, Any], spec: str) -> Preprocessing:
    """Convert the result of `timm.data.resolve_data_config`, which describes timm's evaluation transform.

    Raises:
        UserError: If the transform is not supported.
    """
    channels, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if height != width:
        raise unsupported_error(spec, f"takes images of {height}×{width} pixels; only square images are supported")
    if channels not in (1, 3) or len(mean) != channels or len(std) != channels:
        what = f"takes {channels} channels, with {len(mean)} means and {len(std)} deviations; 1 or 3 are supported"
        raise unsupported_error(spec, what)
    if config["interpolation"] not in INTERPOLATIONS:
        raise unsupported_error(spec, f"resizes with interpolation {config['interpolation']!r}")
    if config["crop_mode"] not in CROP_MODES:
        raise unsupported_error(spec, f"has crop_mode {config['crop_mode']!r}; {', '.join(CROP_MODES)} are supported")
    resize = math.floor(height / config["crop_pct"])
    return Preprocessing(
        image_size=height,
        resize=resize,
        interpolation=config["interpolation"],
        mean=mean,
        std=std,
        crop_mode=config["crop_mode"],
    )


def unknown_model_error(library: str, name: str, names: Sequence[str]) -> UserError:
    """Return the error for a model that a library does not have."""
    close = ", ".join(difflib.get_close_matches(name, names)) or None
    remedy = f"Similar names are {close}." if close else f"List the models with {library}."
    return UserError(f"--model {library}:{name}", f"{library} has no model {name!r}", remedy)


def unavailable_error(what: str, error: Exception) -> UserError:
    """Return the error for a model that its library could not create or download."""
    remedy = "Check the name and the network, or pass --weights FILE, or --weights random for a test."
    return UserError("--model", f"{what} ({format_first_line(error).rstrip('.')})", remedy)


def unsupported_error(spec: str, what: str) -> UserError:
    """Return the error for preprocessing that cannot be reproduced."""
    return UserError(f"--model {spec}", f"its preprocessing is not supported: it {what}", "Choose another model.")
