"""Checkpoints: find the state dict in a file, and load it into a model by its strict load_state_dict.

The format is detected by the content, not by the file name. Only tensors, plain values and argparse.Namespace are
unpickled.
"""

import argparse
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from patterns import UserError
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import format_first_line

StateDict = Mapping[str, Any]  # tensors by name; values of names that end in _extra_state have any type

SAVE_REMEDY = "Save the state dict alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file."
COPY_REMEDY = "Copy or download it again."
# Formats that hold no weights: how the file begins, what it is, and the remedy.
OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for", "Run `git lfs pull`."),
    (b"<!doctype html", "an HTML page, not weights", "Download the file itself, and check the URL."),
    (b"<html", "an HTML page, not weights", "Download the file itself, and check the URL."),
    (b"<?xml", "an XML document, not weights", "Download the file itself, and check the URL."),
    (b"\x89hdf", "an HDF5 file, as Keras writes it", SAVE_REMEDY),
    (b"gguf", "a GGUF file", SAVE_REMEDY),
    (b"\x1f\x8b", "compressed with gzip", "Decompress it."),
    (b"bzh", "compressed with bzip2", "Decompress it."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Decompress it."),
    (b"\xfd7zxz", "compressed with xz", "Decompress it."),
    (b"\x93numpy", "a NumPy array", SAVE_REMEDY),
)
LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # of files that torch.save wrote before version 1.6
# Segments of tensor names that wrappers of a module add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = ("ema", "averaged", "swa")  # words in the key of a state dict with averaged weights
INDEX = ".index.json"  # ending of the name of an index of several safetensors files
MAX_DEPTH = 3  # of nested dictionaries that are searched for a state dict


def load_weights(model: nn.Module, where: str, spec: str) -> str | None:
    """Load the weights of a file or URL into a model.

    Args:
        model: The model; changed in place.
        where: The path or URL of a file of torch.save or safetensors, or of the index of several safetensors files.
        spec: The model's name in messages.

    Returns:
        How the weights were found, if they are not the whole file under the model's own names; else None.

    Raises:
        UserError: If the file cannot be read, or its state dict does not fit the model.
    """
    place = f"--weights {where}"
    if re.fullmatch(r"\w+", where) and not Path(where).exists():
        what = "neither a file, nor a name of weights for this model"
        raise UserError(
            place, what, "Pass default, random, a file or a URL, or for torchvision a name such as DEFAULT."
        )
    content = read_option_file("--weights", where)
    if where.endswith(INDEX):
        key, state = "", load_shards(content, where, place)
    else:
        key, state = select_state_dict(parse_checkpoint(content, place), place)
    prefix = load_state_dict(model, state, place, spec)
    found = [f"the key {key!r} of the file"] if key else []
    found += [f"names such as {prefix} for {next(iter(model.state_dict()))}"] if prefix else []
    return f"weights from {', with '.join(found)}" if found else None


def load_shards(content: bytes, where: str, place: str) -> StateDict:
    """Return the state dict of an index file, whose tensors are in several safetensors files of the same folder.

    Args:
        content: The index: JSON with the file of each tensor in `weight_map`.
        where: Its path or URL.
        place: The file in messages.

    Raises:
        UserError: If the index or one of its files cannot be read, or a file does not hold its tensors.
    """
    try:
        files = json.loads(content)["weight_map"]
        names = {str(name): str(file) for name, file in files.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        what = f"not an index of safetensors files ({format_first_line(error)})"
        raise UserError(place, what, COPY_REMEDY) from error
    folder, state = where.removesuffix(where.rpartition("/")[2]), OrderedDict[str, Any]()
    for file in dict.fromkeys(names.values()):
        if Path(file).name != file:
            raise UserError(place, f"its index names a file in another folder: {file}", COPY_REMEDY)
        shard = f"--weights {folder}{file}"
        state.update(parse_checkpoint(read_option_file("--weights", folder + file), shard))
    if missing := sorted(names.keys() - state.keys()):
        what = f"{len(missing)} tensors of the index are not in its files, the first is {missing[0]}"
        raise UserError(place, what, COPY_REMEDY)
    return state


def parse_checkpoint(content: bytes, place: str) -> Any:
    """Return the object in a file. Raise UserError if neither safetensors nor torch.save wrote the file."""
    if not content:
        raise UserError(place, "an empty file", COPY_REMEDY)
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**27:
        try:
            return load_safetensors(content)
        except Exception as error:  # a damaged file raises many types
            raise UserError(
                place, f"a damaged or truncated safetensors file ({format_first_line(error)})", COPY_REMEDY
            ) from error
    reject_other_formats(content, place)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many types
        raise unreadable_error(content, error, place) from error


def reject_other_formats(content: bytes, place: str) -> None:
    """Raise UserError, which names the format, for a file that neither torch.save nor safetensors wrote."""
    begin = content[:512].lstrip().lower()
    for first, what, remedy in OTHER_FORMATS:
        if begin.startswith(first):
            raise UserError(place, what, remedy)
    if content.startswith(b"PK"):
        if not zipfile.is_zipfile(BytesIO(content)):
            raise UserError(place, "a truncated or damaged torch file", COPY_REMEDY)
        names = ["/" + name for name in zipfile.ZipFile(BytesIO(content)).namelist()]
        if any(name.endswith("/constants.pkl") for name in names):
            remedy = "Load it with torch.jit.load, and save its state_dict() with torch.save."
            raise UserError(place, "a TorchScript archive, not a state dict", remedy)
        if any(name.endswith("/archive_format") for name in names):
            remedy = "Pass it as --model FILE.pt2, without --weights."
            raise UserError(place, "an exported program (torch.export), not a state dict", remedy)
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(
                place, f"a zip archive that torch.save did not write; it contains {names[0][1:]}", SAVE_REMEDY
            )
    elif LEGACY_MAGIC not in content[:32]:
        if content.startswith(b"\x80"):
            raise UserError(place, "a pickle that torch.save did not write", SAVE_REMEDY)
        text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in content[:512])
        raise UserError(place, "a text file, not weights" if text else "not a torch or safetensors file", SAVE_REMEDY)


def unreadable_error(content: bytes, error: Exception, place: str) -> UserError:
    """Return the error for a file of torch.save that torch.load rejected."""
    found = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))  # names only the first
    try:
        found += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(BytesIO(content)))
    except Exception as damaged:  # or written before torch 1.6
        error.add_note(str(damaged))
    if not found:
        return UserError(place, "a truncated or damaged torch file", COPY_REMEDY)
    whole = any(name.startswith("torch.nn.modules.") for name in found)
    remedy = SAVE_REMEDY
    if whole:
        remedy = (
            "If you trust it, convert it in Python: model = torch.load(FILE, weights_only=False); "
            "torch.save(model.state_dict(), NEW_FILE)."
        )
    pickled = f"a whole model, {found[0]}" if whole else f"objects of {', '.join(dict.fromkeys(found[:4]))}"
    what = f"not a state dict, but a pickle of {pickled}, which is not loaded because it can run code"
    return UserError(place, what, remedy)


def is_state_dict(value: Any) -> bool:
    """Return whether a value maps names to tensors."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(
            isinstance(name, str) and (isinstance(item, Tensor) or name.endswith("_extra_state"))
            for name, item in value.items()
        )
    )


def find_state_dicts(value: Any, depth: int = MAX_DEPTH) -> dict[str, StateDict]:
    """Return the state dicts in nested dictionaries, by their keys joined with dots."""
    found: dict[str, StateDict] = {}
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if "optim" in str(key):  # an optimizer's state may also map names to tensors
            continue
        if is_state_dict(item):
            found[str(key)] = item
        elif depth > 1:
            found |= {f"{key}.{inner}": state for inner, state in find_state_dicts(item, depth - 1).items()}
    return found


def select_state_dict(content: Any, place: str) -> tuple[str, StateDict]:
    """Return the state dict of a checkpoint with its key: the checkpoint itself (""), or the only state dict in it.

    Averaged weights, under a key such as `state_dict_ema`, are used only if there are no other state dicts.

    Raises:
        UserError: If there is no state dict, or more than one.
    """
    if is_state_dict(content):
        return "", content
    found = find_state_dicts(content)
    found = {key: state for key, state in found.items() if not any(word in key for word in AVERAGED)} or found
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        what = f"it contains several state dicts: {', '.join(found)}"
        raise UserError(place, what, "Save the state dict of this model alone, with torch.save.")
    if not isinstance(content, Mapping):
        what = f"it contains an object of type {type(content).__name__}, not a state dict"
        raise UserError(place, what, SAVE_REMEDY)
    others = [str(key) for key, item in content.items() if not isinstance(item, Tensor)]
    what = f"not a state dict: besides tensors it contains {', '.join(others[:4])}" if others else "an empty state dict"
    raise UserError(place, what, SAVE_REMEDY)


def rename_tensors(state: StateDict, new: Callable[[str], str | None]) -> OrderedDict[str, Any]:
    """Return a state dict with new names; tensors whose new name is None are left out."""
    found = OrderedDict((name, value) for key, value in state.items() if (name := new(key)) is not None)
    metadata = getattr(state, "_metadata", None)  # the versions of modules, which load_state_dict reads
    if isinstance(metadata, Mapping):
        paths = ((new(path) if path else path, versions) for path, versions in metadata.items())
        vars(found)["_metadata"] = OrderedDict((path, versions) for path, versions in paths if path is not None)
    return found


def generate_spellings(state: StateDict) -> Iterator[StateDict]:
    """Yield a state dict as it is, then without the segments of wrappers, each also without its common prefixes."""
    plain = rename_tensors(state, lambda name: None if name == "n_averaged" else name)  # added by torch's AveragedModel
    inner = rename_tensors(plain, lambda name: ".".join(part for part in name.split(".") if part not in WRAPPERS))
    yield state
    for names in (plain, inner if len(inner) == len(plain) else plain):
        yield names
        while len(prefixes := {name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
            names = strip_prefix(names, *prefixes)
            yield names


def strip_prefix(state: StateDict, prefix: str) -> OrderedDict[str, Any]:
    """Return a state dict without the first segment of its names."""
    return rename_tensors(state, lambda name: "" if name == prefix else name.removeprefix(f"{prefix}."))


def load_state_dict(model: nn.Module, state: StateDict, place: str, spec: str) -> str | None:
    """Load a state dict by the model's strict load_state_dict, with the first spelling of its names that fits.

    Returns:
        The first name in the state dict if other names were loaded; else None.

    Raises:
        UserError: If no spelling fits; it describes the closest.
    """
    errors = []
    for names in generate_spellings(state):
        try:
            model.load_state_dict(fill_tied(model, names))
            return None if names.keys() <= state.keys() else next(iter(state))
        except Exception as error:  # the model's own code may run
            errors.append((names, error))
    own = model.state_dict()
    closest, reason = max(errors, key=lambda attempt: len(own.keys() & attempt[0].keys()))
    what, remedy = explain_misfit(state, closest, own, reason)
    raise UserError(place, f"these are not weights of {spec}: {what}", remedy) from reason


def fill_tied(model: nn.Module, state: StateDict) -> StateDict:
    """Return a state dict with all names of shared tensors, of which safetensors keeps only one."""
    filled, own, names_by_tensor = rename_tensors(state, lambda name: name), model.state_dict(), dict[int, list[str]]()
    for members in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in members:
            names_by_tensor.setdefault(id(tensor), []).append(name)
    for names in names_by_tensor.values():
        present = [name for name in names if name in state]
        if present:
            filled.update({name: state[present[0]] for name in names if name in own and name not in state})
    return filled


def explain_misfit(given: StateDict, state: StateDict, own: Mapping[str, Any], error: Exception) -> tuple[str, str]:
    """Return why a state dict does not fit a model, and the remedy.

    Args:
        given: The state dict of the file.
        state: The same tensors with the names that are closest to the model's.
        own: The state dict of the model.
        error: The exception of load_state_dict.
    """
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing:
        for prefix in sorted({name[: -len(missing[0])] for name in given if name.endswith(f".{missing[0]}")}):
            if all(prefix + name in given for name in own):
                other = next(name for name in given if not name.startswith(prefix))
                what = f"its tensors are in the file under the prefix {prefix!r}, together with others such as {other}"
                return what, f"Save only the tensors that begin with {prefix!r}, without the prefix."
    if missing and unknown and missing[0].endswith(f".{unknown[0]}"):
        prefix = missing[0][: -len(unknown[0])]
        if {prefix + name for name in state} == set(own):
            what = f"the model's tensor names begin with {prefix!r}, but the names in the file do not"
            return what, f"Add the prefix, or pass as --model a factory of the submodule {prefix[:-1]!r}."
    if missing or unknown:
        found = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
        found += [f"{len(unknown)} tensors are not in the model, the first is {unknown[0]}"] if unknown else []
        return "; ".join(found), "Pass weights of this model."
    for name, value in state.items():
        if isinstance(value, Tensor) and isinstance(own[name], Tensor) and value.shape != own[name].shape:
            what = f"{name} has shape {tuple(value.shape)}, but {tuple(own[name].shape)} in the model"
            return what, "Pass weights of this model with the same number of classes."
    return (
        f"load_state_dict raised {type(error).__name__} ({format_first_line(error)})",
        "Pass weights of this model.",
    )
