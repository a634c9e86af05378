"""Traced networks in the folders of runs, so that a later command need neither load the model nor trace it.

The name of a file holds the digest of all that the network depends on: the spec, weights and options of the model, and
the versions of the packages. A model is found in this way only if names, versions and files determine it: models of
torchvision and timm, transformers' models in a folder, and model files. The code of other models can be anything.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from patterns import Network, UserError
from patterns.io import load_network, save_network, temporary_path
from ray_jobs.config import ModelConfig
from ray_jobs.io import object_store
from ray_jobs.io.object_store import Location
from ray_jobs.models.checkpoints import INDEX
from ray_jobs.models.model_files import ONNX, PROGRAM
from ray_jobs.units import find_version

PREFIX, ENDING = "network-", ".safetensors"
VERSIONS = ("patternnet-ray", "torch", "torchvision", "timm", "transformers", "onnx", "onnx2torch", "numpy")
SOURCES = ("patterns", "ray_jobs.models")  # packages that trace and load models


def make_key(config: ModelConfig) -> str | None:
    """Return all that the traced network of a model depends on, as JSON; None if only the loaded model shows it.

    Files of weights and of the model count by their content.

    Raises:
        UserError: If one of the files cannot be read.
    """
    library, _, name = config.spec.partition(":")
    files = [("--input", value) for _, value in config.inputs if value.endswith(".npy")]
    if config.spec.endswith((PROGRAM, ONNX)):
        files.append(("--model", config.spec))
    elif library == "transformers" and Path(name).is_dir():
        files += [("--model", str(path)) for path in sorted(Path(name).rglob("*")) if path.is_file()]
    elif library not in ("torchvision", "timm") or ":" in name:
        return None
    named = re.fullmatch(r"\w+", config.weights) and not Path(config.weights).exists()
    if config.weights.endswith(INDEX):
        return None
    if not named:
        files.append(("--weights", config.weights))
    key = {
        "model": asdict(config) | {"weights": config.weights if named else None},
        "files": [hashlib.sha256(object_store.read_option_file(*file)).hexdigest() for file in files],
        "versions": {package: find_version(package) for package in VERSIONS},
        "code": digest_code(),
    }
    return json.dumps(key, sort_keys=True)


@cache
def digest_code() -> str:
    """Return the digest of the code that loads and traces models, which may be newer than the package's version."""
    state = hashlib.sha256()
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*.py")):
                state.update(path.read_bytes())
    return state.hexdigest()


def name_file(key: str) -> str:
    """Return the name of the file of a network."""
    return f"{PREFIX}{hashlib.sha256(key.encode()).hexdigest()[:32]}{ENDING}"


def find_network(
    key: str, folders: Sequence[Location], problems: list[str]
) -> Iterator[tuple[Network, dict[str, Any]]]:
    """Yield the network with a key that one of some folders has, and what was written with it.

    Args:
        key: See `make_key`.
        folders: The folders of runs.
        problems: Receives a line for each file that cannot be used.
    """
    for folder in folders:
        path = folder / name_file(key)
        try:
            with object_store.fetch(path) as file:
                network, about = load_network(file)
        except FileNotFoundError:
            continue
        except UserError as error:
            problems.append(f"{path} is ignored: {error.what}; the model is traced again")
            continue
        if about.get("key") == key:
            yield network, about
        else:
            problems.append(f"{path} is ignored: it is the network of another model; the model is traced again")


def store_network(folder: Location, key: str, network: Network, about: dict[str, Any]) -> None:
    """Write a network to the folder of a run, in place of older ones.

    Raises:
        TypeError: If files have no form for the network; see `patterns.io.save_network`.
        UserError: If it cannot be written.
    """
    name = name_file(key)
    with object_store.publish(folder) as local, temporary_path(local / name) as temporary:
        save_network(temporary, network, {"key": key, **about})
    for other in object_store.list_names(folder, PREFIX):
        if other.endswith(ENDING) and other != name:
            object_store.remove(folder / other)
