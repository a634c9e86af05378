"""From a model spec to a traced network, ready on its device, with the preprocessing it was trained with."""

import difflib
import importlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from patterns import Network, UserError, digest, trace
from ray_jobs.config import ModelConfig, Preprocessing
from ray_jobs.files import content_of

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
IMAGENET = Preprocessing(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ModelDigests:
    """What tells whether two processes hold the same model.

    Attributes:
        weights: `patterns.digest` of its parameters and buffers.
        constants: `patterns.Network.constants`, what its graph holds beside them; None if it is not known.
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
    """The model of a config. UserError for whatever in the config is wrong.

    Says for this process whether products of float32 numbers may be taken in TF32, which cuDNN would do unasked.
    """
    if config.precision not in PRECISIONS:
        raise UserError("--precision", f"no precision {config.precision!r}", f"Choose from {', '.join(PRECISIONS)}.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, preprocessing = build(config)
    preprocessing = overridden(preprocessing, config)
    if config.weights not in ("default", "random"):
        load_weights(model, config.weights, config.spec)
    dtype, weights_digest = PRECISIONS[config.precision], digest(model)
    return Loaded(config, model.to(device, dtype), preprocessing, weights_digest, torch.device(device), dtype)


def build(config: ModelConfig) -> tuple[nn.Module, Preprocessing]:
    """The model of a spec, with the library's own weights if the config says `default`."""
    kind, colon, name = config.spec.rpartition(":")
    if not colon:
        raise UserError(
            f"--model {config.spec}",
            "not a model spec",
            "Use torchvision:NAME, timm:NAME, module:factory or file.py:factory.",
        )
    own_weights = config.weights == "default"
    if kind == "torchvision":
        return torchvision_model(name, own_weights)
    if kind == "timm":
        return timm_model(name, own_weights)
    return factory(config.spec, kind, name)(), IMAGENET


def torchvision_model(name: str, own_weights: bool) -> tuple[nn.Module, Preprocessing]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise unknown_model("torchvision", name, models.list_models(module=models))
    weights = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    preprocessing = Preprocessing(
        preset.crop_size[0], preset.resize_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
    )
    try:
        return models.get_model(name, weights=weights if own_weights else None), preprocessing
    except OSError as error:  # the download
        raise no_download(f"torchvision:{name}", error) from error


def torchvision_classes(name: str) -> list[str]:
    from torchvision import models

    if name not in models.list_models(module=models):
        return []
    return list(models.get_model_weights(name).DEFAULT.meta.get("categories", []))


def timm_model(name: str, own_weights: bool) -> tuple[nn.Module, Preprocessing]:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--model timm:{name}", "timm is not installed", "Run pip install 'patternnet-ray[timm]'."
        ) from error
    if not timm.is_model(name):
        raise unknown_model("timm", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=own_weights)
    except (OSError, RuntimeError) as error:  # the download, or a model without weights
        raise no_download(f"timm:{name}", error) from error
    data = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
    size = data["input_size"][-1]
    return model, Preprocessing(
        size, int(size / data["crop_pct"]), data["interpolation"], tuple(data["mean"]), tuple(data["std"])
    )


def class_names(spec: str, file: str | None) -> dict[str, int]:
    """The numbers of a model's classes by name: from a file, or as torchvision has them; empty where nobody says.

    file: a JSON list, a JSON object from number to name, or a text with one name a line; a path or URL.
    UserError where it is none of these.
    """
    if file is None:
        kind, _, name = spec.rpartition(":")
        listed = torchvision_classes(name) if kind == "torchvision" else []
        return {name: number for number, name in reversed(list(enumerate(listed)))}
    try:
        content = content_of("--classes", file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {file}", f"not UTF-8 text ({error})", "Save it as UTF-8.") from error
    try:
        read = json.loads(content)
    except ValueError:
        read = [line.strip() for line in content.splitlines() if line.strip()]
    pairs = read.items() if isinstance(read, dict) else enumerate(read if isinstance(read, list) else [])
    try:
        return {str(name): int(number) for number, name in pairs}
    except ValueError as error:
        what = "an object that is not from number to name"
        raise UserError(f"--classes {file}", what, 'Write {"0": "tench", "1": "goldfish", …}.') from error


def factory(spec: str, where: str, name: str) -> Any:
    """The callable of `package.module:factory` or `file.py:factory`."""
    remedy = "Name a module that Python can import, or a .py file, and in it a function without arguments."
    try:
        if where.endswith(".py"):
            description = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert description is not None
            assert description.loader is not None
            module = importlib.util.module_from_spec(description)
            sys.modules.setdefault(description.name, module)
            description.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ImportError, FileNotFoundError, SyntaxError) as error:
        raise UserError(f"--model {spec}", f"{where} cannot be imported ({error})", remedy) from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--model {spec}", f"{where} has no function {name!r}", remedy)
    return getattr(module, name)


def overridden(own: Preprocessing, config: ModelConfig) -> Preprocessing:
    """The library's preprocessing with what the config says in its place."""
    size = config.image_size or own.image_size
    resize = config.resize or round(size * own.resize / own.image_size)
    mean, std = config.mean or own.mean, config.std or own.std
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise UserError(
            "--mean --std", f"{len(mean)} means and {len(std)} deviations", "Give 1 (grey) or 3 (RGB) of each."
        )
    return Preprocessing(size, resize, own.interpolation, mean, std)


def load_weights(model: nn.Module, where: str, spec: str) -> None:
    """Load a state dict from safetensors, or from a torch file that holds nothing but tensors."""
    content = content_of("--weights", where)
    try:
        read: Any = (
            load_safetensors(content)
            if where.endswith(".safetensors")
            else torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a broken file raises anything at all
        reason = str(error).strip().partition("\n")[0]
        remedy = "Save it with safetensors, or with torch.save(model.state_dict(), …)."
        raise UserError(f"--weights {where}", f"not a state dict ({reason})", remedy) from error
    state = read.get("state_dict", read) if isinstance(read, dict) else read
    if problem := mismatch(state, model.state_dict()):
        what = f"these are not weights of {spec}: {problem}"
        raise UserError(f"--weights {where}", what, "Give the weights of this model.")
    model.load_state_dict(state)


def mismatch(state: Any, own: dict[str, Tensor]) -> str | None:
    """What keeps a state dict from fitting a model's, or None."""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        return "it does not map names to tensors"
    if missing := sorted(set(own) - set(state)):
        return f"{len(missing)} tensors are missing, the first is {missing[0]}"
    if unexpected := sorted(set(state) - set(own)):
        return f"{len(unexpected)} tensors are not the model's, the first is {unexpected[0]}"
    for name, value in state.items():
        if value.shape != own[name].shape:
            return f"{name} has shape {tuple(value.shape)}, the model's has {tuple(own[name].shape)}"
    return None


def unknown_model(library: str, name: str, names: list[str]) -> UserError:
    close = ", ".join(difflib.get_close_matches(name, names)) or "none of a similar name"
    return UserError(f"--model {library}:{name}", f"{library} has no model {name!r}", f"It has {close}.")


def no_download(spec: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"--model {spec}",
        f"its weights cannot be had ({reason})",
        "Pass --weights FILE, or --weights random for a trial.",
    )
