"""Loading of models: from a config to a traced network on its device, with its preprocessing and digests."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from patterns import Network, UserError, digest, trace
from ray_jobs.config import SPECS, ModelConfig, Preprocessing
from ray_jobs.io.object_store import Location
from ray_jobs.models import network_cache
from ray_jobs.models.checkpoints import load_weights
from ray_jobs.models.factories import load_custom_model
from ray_jobs.models.libraries import has_torchvision_weights, load_timm_model, load_torchvision_model
from ray_jobs.models.model_files import ONNX, PROGRAM, load_model_file
from ray_jobs.models.model_outputs import explain_output
from ray_jobs.models.modules import cast, materialize, prepare, require_finite
from ray_jobs.models.transformers_models import load_transformers_model
from ray_jobs.units import format_counts

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
IMAGENET = Preprocessing(
    image_size=224, resize=256, interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
LIBRARIES = ("torchvision", "timm", "transformers")


@dataclass(frozen=True)
class Origin:
    """How the network of a model is found in the folders of runs.

    Attributes:
        key: See `network_cache.make_key`; None if it is not kept there.
        problems: Lines on files that could not be used.
    """

    key: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class TracedModel:
    """A traced model as it is sent to workers, which need neither the model's code nor its library.

    Attributes:
        config: The config that it was loaded from.
        network: The network, on its device.
        preprocessing: From images to its inputs.
        digest: `patterns.digest` of the model's weights as they were loaded.
        output: Which of the model's outputs is explained; None if it has only one.
        note: See `LoadedModel`.
        origin: See `LoadedModel`.
        stored: Whether the network was read from the folder of a run.
    """

    config: ModelConfig
    network: Network
    preprocessing: Preprocessing
    digest: str
    output: str | None = None
    note: str | None = None
    origin: "Origin" = Origin()
    stored: bool = False

    @property
    def traced(self) -> "TracedModel":
        """The model itself, which may be used as a `LoadedModel`."""
        return self

    def store(self, folder: Location) -> list[str]:
        """Write the network to the folder of a run, from where `open_model` reads it, unless it was read itself.

        Args:
            folder: The folder. No other driver may write to it now.

        Returns:
            What the log should say of it, a line each. A failure is no error, because later commands trace again.
        """
        lines = list(self.origin.problems)
        if self.origin.key is None or self.stored:
            return lines
        about = {name: getattr(self, name) for name in ("digest", "output", "note")}
        about["preprocessing"] = asdict(self.preprocessing)
        try:
            network_cache.store_network(folder, self.origin.key, self.network, about)
        except (TypeError, UserError) as error:
            reason = error.what if isinstance(error, UserError) else error
            lines.append(f"the traced network is not kept for later commands: {reason}")
        return lines

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.network.like.device

    def describe(self) -> list[str]:
        """Return notes about the traced model for the user, one line for each."""
        lines = [] if self.note is None else [self.note]
        if self.output is not None:
            lines.append(f"the explained output of the model is {self.output}")
        if constants := self.network.constant_factors:
            lines.append(f"taken as constants in explanations: {format_counts(constants)}")
        return lines

    @property
    def dtype(self) -> torch.dtype:
        """The type of the inputs."""
        return PRECISIONS[self.config.precision]

    def require_images(self, what: str) -> None:
        """Raise UserError if the model does not take images.

        Args:
            what: What needs a model of images, at the beginning of a sentence.
        """
        if len(shape := self.network.input_shape) != 3:
            found = f"the model takes inputs of the shape {shape}, not images"
            raise UserError("", found, f"{what} needs a model of images.", "model")

    def to(self, device: str) -> "TracedModel":
        """Return the model on a device, and set this process's precision of float32 products; see `load`."""
        set_precision(self.config)
        return replace(self, network=self.network.to(device))

    def require(self, digest: str, constants: str | None, where: str, reference: str) -> None:
        """Require that this is the same model as another one.

        Args:
            digest: The digest of the other model's weights.
            constants: `patterns.Network.constants` of the other model; None if it is not known.
            where: The host or folder to name in the error.
            reference: The other model in words.

        Raises:
            UserError: If the models hold other weights, or other numbers in addition to their weights.
        """
        if digest != self.digest:
            what = f"the model's weights have the digest {self.digest}, but those of {reference} have {digest}"
            raise UserError(where, what, "Pass the same weights, and seed all random draws in the model's code.")
        if constants is not None and constants != self.network.constants:
            what = f"the model holds other numbers than {reference}, and they are not in its state_dict"
            remedy = "Seed all random draws in the model's code, or make their results buffers that are saved."
            raise UserError(where, what, remedy)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device.

    Attributes:
        config: The config that it was loaded from.
        model: The module, in its precision.
        preprocessing: From images to its inputs.
        digest: `patterns.digest` of its weights as they were loaded.
        device: Its device.
        dtype: The type of its inputs.
        note: How its weights were found in their file, if a user should know; else None.
        origin: How its network is found in the folders of runs.
    """

    config: ModelConfig
    model: nn.Module
    preprocessing: Preprocessing
    digest: str
    device: torch.device
    dtype: torch.dtype
    note: str | None = None
    origin: Origin = Origin()

    @cached_property
    def traced(self) -> TracedModel:
        """The traced model. It is traced on first use, because a finished job needs only the digest of the weights."""
        example = torch.zeros((2, *self.preprocessing.input_shape), device=self.device, dtype=self.dtype)
        output = explain_output(self.model, example, self.config.output, f"--model {self.config.spec}")
        passing, strip = self.config.pass_through, self.config.strip_softmax
        network = trace(self.model, example, name=self.config.spec, pass_through=passing, strip_softmax=strip)
        return TracedModel(self.config, network, self.preprocessing, self.digest, output, self.note, self.origin)

    @property
    def network(self) -> Network:
        """The traced network."""
        return self.traced.network


AnyModel = LoadedModel | TracedModel  # both have `traced`, and what a run records of a model


def open_model(config: ModelConfig, *folders: Location) -> AnyModel:
    """Return the model of a config with the traced network that a run has kept; load the model if there is none.

    Args:
        config: The config.
        folders: The folders of runs to search.

    Raises:
        UserError: See `load`.
    """
    key, problems = network_cache.make_key(config), list[str]()
    for network, about in network_cache.find_network(key, folders, problems) if key is not None else ():
        own: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in about.pop("preprocessing").items()}
        set_precision(config)
        origin = Origin(about.pop("key"), tuple(problems))
        return TracedModel(config, network, Preprocessing(**own), **about, origin=origin, stored=True)
    if key is None:
        problems.append(f"{config.spec} is traced by every command, because its code or weights may have changed")
    return replace(load(config), origin=Origin(key, tuple(problems)))


def set_precision(config: ModelConfig) -> None:
    """Set for this process whether float32 products may be computed in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"


def load(config: ModelConfig, device: str = "cpu") -> LoadedModel:
    """Load the model of a config.

    The precision also sets for the whole process whether float32 products may be computed in TF32, which is cuDNN's
    default.

    Args:
        config: The config.
        device: The device of the model.

    Raises:
        UserError: If the config is invalid, the model or its weights cannot be loaded, or the model cannot be traced.
    """
    set_precision(config)
    where = f"--model {config.spec}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, preprocessing = build_model(config)
        preprocessing = override_preprocessing(preprocessing, config)
        model = prepare(model, where, config.inputs)
        materialize(model, preprocessing.input_shape, where)
    note = None
    if config.weights not in ("default", "random") and not has_torchvision_weights(config.spec, config.weights):
        note = load_weights(model, config.weights, config.spec)
        where = f"--weights {config.weights}"
    require_finite(model, where)
    dtype, weights_digest = PRECISIONS[config.precision], digest(model)
    model = cast(model, torch.device(device), dtype)
    return LoadedModel(config, model, preprocessing, weights_digest, torch.device(device), dtype, note)


def build_model(config: ModelConfig) -> tuple[nn.Module, Preprocessing]:
    """Return the model of a config, with weights of its library but not of a file, and its preprocessing."""
    if config.spec.endswith((PROGRAM, ONNX)):
        model, shape = load_model_file(config.spec)
        return model, with_input_size(IMAGENET, shape)
    library, colon, name = config.spec.partition(":")
    if not colon:
        what, remedy = "not a model spec", f"Use {SPECS}."
        raise UserError(f"--model {config.spec}", what, remedy)
    if library == "torchvision":
        return load_torchvision_model(name, config.weights)
    if library == "timm":
        return load_timm_model(name, config.weights == "default")
    if library == "transformers":
        return load_transformers_model(name, config.weights == "default")
    return load_custom_model(config.spec), IMAGENET


def with_input_size(preprocessing: Preprocessing, shape: Sequence[int]) -> Preprocessing:
    """Return preprocessing for inputs of a shape (C, H, W), if its height and width are fixed and equal."""
    size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else 0
    resize = round(size * preprocessing.resize / preprocessing.image_size)
    return replace(preprocessing, image_size=size, resize=resize) if size else preprocessing


def override_preprocessing(own: Preprocessing, config: ModelConfig) -> Preprocessing:
    """Return the preprocessing of a model with the values that the config overrides.

    Raises:
        UserError: If the means and deviations are invalid for pixels in [0, 1].
    """
    size = config.image_size or own.image_size
    resize = config.resize or round(size * own.resize / own.image_size)
    mean, std = config.mean or own.mean, config.std or own.std
    if len(mean) != len(std):
        what = f"{len(mean)} means and {len(std)} deviations"
        raise UserError("--mean --std", what, "Pass one of each per channel of the input: 1 (gray) or 3 (RGB).")
    if not all(math.isfinite(value) for value in (*mean, *std)):
        raise UserError(
            "--mean --std", f"{format_values(mean)} and {format_values(std)} are not all finite", "Pass finite numbers."
        )
    if min(std) <= 0:
        what = f"the deviations {format_values(std)} are not all positive"
        raise UserError("--std", what, "Pass the standard deviation of each channel, for pixels in [0, 1].")
    if max(*mean, *std) > 1:
        given = {option: values for option, values in (("--mean", config.mean), ("--std", config.std)) if values}
        scaled = " ".join(f"{option} {format_values([v / 255 for v in values])}" for option, values in given.items())
        what = f"{' and '.join(map(format_values, given.values()))} are on the scale of pixels from 0 to 255"
        raise UserError(" ".join(given), what, f"For pixels in [0, 1], pass {scaled}.")
    return replace(own, image_size=size, resize=resize, mean=mean, std=std)


def format_values(values: Sequence[float]) -> str:
    """Format numbers as the command line takes them."""
    return ",".join(f"{value:.5g}" for value in values)
