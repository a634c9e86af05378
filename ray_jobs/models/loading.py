"""From a model spec to a traced network, ready on its device, with the preprocessing it was trained with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from patterns import Network, UserError, digest, trace
from ray_jobs.config import ModelConfig, Preprocessing
from ray_jobs.models.checkpoints import load_weights
from ray_jobs.models.class_names import class_names as class_names
from ray_jobs.models.factories import own_model
from ray_jobs.models.libraries import has_weights, timm_model, torchvision_model
from ray_jobs.models.libraries import torchvision_classes as torchvision_classes
from ray_jobs.models.modules import cast, materialize, prepare, refuse_not_finite

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
IMAGENET = Preprocessing(
    image_size=224, resize=256, interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
LIBRARIES = ("torchvision", "timm")


@dataclass(frozen=True)
class ModelDigests:
    """What tells whether two processes hold the same model.

    Attributes:
        weights: `patterns.digest` of its parameters and buffers.
        constants: `patterns.Network.constants`, what its graph holds in addition; None if it is not known.
    """

    weights: str
    constants: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model ready for work. digest: of its weights, as they were loaded."""

    config: ModelConfig
    model: nn.Module
    preprocessing: Preprocessing
    digest: str
    device: torch.device
    dtype: torch.dtype

    @property
    def digests(self) -> ModelDigests:
        """The digests of the model, which is traced for it."""
        return ModelDigests(self.digest, self.network.constants)

    @cached_property
    def network(self) -> Network:
        """The model traced, once it is asked for: a finished job is known by its digest. UserError as `trace`'s."""
        example = torch.zeros((2, *self.preprocessing.input_shape), device=self.device, dtype=self.dtype)
        passing, strip = self.config.pass_through, self.config.strip_softmax
        return trace(self.model, example, name=self.config.spec, pass_through=passing, strip_softmax=strip)


def load(config: ModelConfig, device: str = "cpu") -> Loaded:
    """Load the model of a config.

    This also decides for the whole process whether products of float32 numbers may be computed in TF32, which cuDNN
    would do by default.

    Raises:
        UserError: If anything in the config is wrong, or the model is of a kind that cannot be traced.
    """
    if config.precision not in PRECISIONS:
        raise UserError("--precision", f"no precision {config.precision!r}", f"Choose from {', '.join(PRECISIONS)}.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    where = f"--model {config.spec}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, preprocessing = build(config)
        preprocessing = overridden(preprocessing, config)
        model = prepare(model, where)
        materialize(model, preprocessing.input_shape, where)
    if config.weights not in ("default", "random") and not has_weights(config.spec, config.weights):
        load_weights(model, config.weights, config.spec)
        where = f"--weights {config.weights}"
    refuse_not_finite(model, where)
    dtype, weights_digest = PRECISIONS[config.precision], digest(model)
    model = cast(model, torch.device(device), dtype)
    return Loaded(config, model, preprocessing, weights_digest, torch.device(device), dtype)


def build(config: ModelConfig) -> tuple[nn.Module, Preprocessing]:
    """Return the model of a spec, with the library's own weights if the config names them, and its preprocessing."""
    library, colon, name = config.spec.partition(":")
    if not colon:
        raise UserError(
            f"--model {config.spec}",
            "not a model spec",
            "Use torchvision:NAME, timm:NAME, module:factory or file.py:factory.",
        )
    if library == "torchvision":
        return torchvision_model(name, config.weights)
    if library == "timm":
        return timm_model(name, config.weights == "default")
    return own_model(config.spec), IMAGENET


def overridden(own: Preprocessing, config: ModelConfig) -> Preprocessing:
    """Return the library's preprocessing with the config's values in place of its own.

    Raises:
        UserError: If the means and deviations cannot be right for pixels in [0, 1].
    """
    size = config.image_size or own.image_size
    resize = config.resize or round(size * own.resize / own.image_size)
    mean, std = config.mean or own.mean, config.std or own.std
    if len(mean) != len(std):
        what = f"{len(mean)} means and {len(std)} deviations"
        raise UserError("--mean --std", what, "Give as many of each as the input has channels: 1 (grey) or 3 (RGB).")
    if not all(math.isfinite(value) for value in (*mean, *std)):
        raise UserError("--mean --std", f"{spelled(mean)} and {spelled(std)} are not all finite", "Write numbers.")
    if min(std) <= 0:
        what = f"the deviations {spelled(std)} are not all positive"
        raise UserError("--std", what, "Write the standard deviation of each channel, for pixels in [0, 1].")
    if max(*mean, *std) > 1:
        given = {option: values for option, values in (("--mean", config.mean), ("--std", config.std)) if values}
        scaled = " ".join(f"{option} {spelled([v / 255 for v in values])}" for option, values in given.items())
        what = f"{' and '.join(map(spelled, given.values()))} are on the scale of pixels from 0 to 255"
        raise UserError(" ".join(given), what, f"For pixels in [0, 1], write {scaled}.")
    return replace(own, image_size=size, resize=resize, mean=mean, std=std)


def spelled(values: Sequence[float]) -> str:
    """Return numbers as the command line takes them."""
    return ",".join(f"{value:.5g}" for value in values)
