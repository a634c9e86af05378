"""Weights from a file: find the state dict in a checkpoint, and load it into a model as torch does.

A file is known by its content, not by its name. Nothing but tensors, plain values and argparse.Namespace is unpickled.
"""

import argparse
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from patterns import UserError
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import format_first_line

StateDict = Mapping[str, Any]  # names → tensors, and values of any type under names that end in _extra_state

SAVE_REMEDY = "Save the state dict alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file."
COPY_REMEDY = "Copy or download it again."
# What a file that holds no weights begins with, what it is, and what to do.
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
LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's magic number, in files of before torch 1.6
# Segments of names that wrappers of a module add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = ("ema", "averaged", "swa")  # in the key of a second state dict, in addition to the model's own
MAX_DEPTH = 3  # dictionaries within dictionaries that are searched for a state dict


def load_weights(model: nn.Module, where: str, spec: str) -> None:
    """Load the weights of a file or URL into a model.

    Args:
        model: Changed in place.
        where: A file of torch.save or safetensors.
        spec: The model's name in messages.

    Raises:
        UserError: If the file cannot be read, or does not hold exactly the model's state dict.
    """
    place = f"--weights {where}"
    content = read_option_file("--weights", where)
    load_state_dict(model, select_state_dict(parse_checkpoint(content, place), place), place, spec)


def parse_checkpoint(content: bytes, place: str) -> Any:
    """Return what a file holds. UserError if it is of another kind than safetensors and torch.save."""
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
    """Raise UserError for a file that neither torch.save nor safetensors wrote, with what it is instead."""
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
            remedy = "Write a factory that returns torch.export.load(FILE).module(), and give it as --model."
            raise UserError(place, "an exported program (torch.export), not a state dict", remedy)
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(place, f"a zip archive that torch.save did not write; it holds {names[0][1:]}", SAVE_REMEDY)
    elif LEGACY_MAGIC not in content[:32]:
        if content.startswith(b"\x80"):
            raise UserError(place, "a pickle that torch.save did not write", SAVE_REMEDY)
        text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in content[:512])
        raise UserError(place, "a text file, not weights" if text else "not a torch or safetensors file", SAVE_REMEDY)


def unreadable_error(content: bytes, error: Exception, place: str) -> UserError:
    """Return the error for a file of torch.save that torch.load refused."""
    found = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))  # the outermost only
    try:
        found += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(BytesIO(content)))
    except Exception as damaged:  # or a file of before torch 1.6
        error.add_note(str(damaged))
    if not found:
        return UserError(place, "a truncated or damaged torch file", COPY_REMEDY)
    whole = any(name.startswith("torch.nn.modules.") for name in found)
    held = f"a whole model, {found[0]}" if whole else f"objects of {', '.join(dict.fromkeys(found[:4]))}"
    what = f"not a state dict, but a pickle of {held}, which is not loaded because it can run code"
    return UserError(place, what, SAVE_REMEDY)


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
    """Return the state dicts within dictionaries, by their keys joined with dots."""
    found: dict[str, StateDict] = {}
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if "optim" in str(key):  # the state of an optimizer, which may hold tensors by name
            continue
        if is_state_dict(item):
            found[str(key)] = item
        elif depth > 1:
            found |= {f"{key}.{inner}": state for inner, state in find_state_dicts(item, depth - 1).items()}
    return found


def select_state_dict(read: Any, place: str) -> StateDict:
    """Return the state dict of a checkpoint: the checkpoint itself, or the only one in it.

    Averaged weights, under a key such as `state_dict_ema`, are used if there are no others.

    Raises:
        UserError: If there is none, or more than one.
    """
    if is_state_dict(read):
        return read
    found = find_state_dicts(read)
    found = {key: state for key, state in found.items() if not any(word in key for word in AVERAGED)} or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        what = f"it holds several state dicts: {', '.join(found)}"
        raise UserError(place, what, "Save the state dict of this model alone, with torch.save.")
    if not isinstance(read, Mapping):
        raise UserError(place, f"it holds an object of type {type(read).__name__}, not a state dict", SAVE_REMEDY)
    others = [str(key) for key, item in read.items() if not isinstance(item, Tensor)]
    held = f"besides tensors {', '.join(others[:4])}" if len(others) < len(read) else ", ".join(others[:4]) or "nothing"
    raise UserError(place, f"it holds {held}, so that it is not a state dict", SAVE_REMEDY)


def rename_tensors(state: StateDict, new: Callable[[str], str | None]) -> OrderedDict[str, Any]:
    """Return a state dict under new names; those that become None are left out."""
    found = OrderedDict((name, value) for key, value in state.items() if (name := new(key)) is not None)
    metadata = getattr(state, "_metadata", None)  # the versions of modules, which load_state_dict reads
    if isinstance(metadata, Mapping):
        paths = ((new(path) if path else path, versions) for path, versions in metadata.items())
        vars(found)["_metadata"] = OrderedDict((path, versions) for path, versions in paths if path is not None)
    return found


def generate_spellings(state: StateDict) -> Iterator[StateDict]:
    """A state dict as it stands, without what wrappers add to its names, and each without the prefixes it shares."""
    plain = rename_tensors(state, lambda name: None if name == "n_averaged" else name)  # of torch's AveragedModel
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


def load_state_dict(model: nn.Module, state: StateDict, place: str, spec: str) -> None:
    """Load a state dict by the model's own strict load_state_dict, under the first spelling of its names that fits.

    Raises:
        UserError: If none does, with what keeps the closest from fitting.
    """
    errors = []
    for names in generate_spellings(state):
        try:
            model.load_state_dict(fill_tied(model, names))
            return
        except Exception as error:  # also the model's own code
            errors.append((names, error))
    own = model.state_dict()
    closest, reason = max(errors, key=lambda tried: len(own.keys() & tried[0].keys()))
    what, remedy = explain_misfit(state, closest, own, reason)
    raise UserError(place, f"these are not weights of {spec}: {what}", remedy) from reason


def fill_tied(model: nn.Module, state: StateDict) -> StateDict:
    """Return a state dict with the tensors that the model has under several names, of which safetensors keeps one."""
    filled, own, named = rename_tensors(state, lambda name: name), model.state_dict(), dict[int, list[str]]()
    for members in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in members:
            named.setdefault(id(tensor), []).append(name)
    for names in named.values():
        present = [name for name in names if name in state]
        if present:
            filled.update({name: state[present[0]] for name in names if name in own and name not in state})
    return filled


def explain_misfit(given: StateDict, state: StateDict, own: Mapping[str, Any], error: Exception) -> tuple[str, str]:
    """Return what keeps a state dict from fitting a model's, and the remedy.

    Args:
        given: The state dict of the file.
        state: The same under the names that are closest to the model's.
        own: The model's.
        error: What load_state_dict raised.
    """
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing:
        for prefix in sorted({name[: -len(missing[0])] for name in given if name.endswith(f".{missing[0]}")}):
            if all(prefix + name in given for name in own):
                other = next(name for name in given if not name.startswith(prefix))
                what = f"its tensors are in the file under the prefix {prefix!r}, together with others such as {other}"
                return what, f"Save those that begin with {prefix!r} alone, without the prefix."
    if missing and unknown and missing[0].endswith(f".{unknown[0]}"):
        prefix = missing[0][: -len(unknown[0])]
        if {prefix + name for name in state} == set(own):
            what = f"the model's names begin with {prefix!r}, those of the file do not"
            return what, f"Add the prefix, or give as --model a factory of what the model calls {prefix[:-1]!r}."
    if missing or unknown:
        found = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
        found += [f"{len(unknown)} are not the model's, the first is {unknown[0]}"] if unknown else []
        return "; ".join(found), "Give the weights of this model."
    for name, value in state.items():
        if isinstance(value, Tensor) and isinstance(own[name], Tensor) and value.shape != own[name].shape:
            what = f"{name} has shape {tuple(value.shape)}, the model's has {tuple(own[name].shape)}"
            return what, "Give the weights of this model, with as many classes."
    return (
        f"load_state_dict raised {type(error).__name__} ({format_first_line(error)})",
        "Give the weights of this model.",
    )
