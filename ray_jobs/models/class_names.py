"""Names of a model's classes, from a file or from the model's library."""

import json
from typing import Any

from patterns import UserError
from ray_jobs.io.object_store import read_option_file
from ray_jobs.models.libraries import list_torchvision_classes
from ray_jobs.models.transformers_models import list_transformers_classes

ClassNames = tuple[tuple[str, int], ...]  # names with class numbers; two classes may have the same name

FORMS = (
    'Write ["tench", "goldfish"], {"0": "tench"}, {"tench": 0} or {"0": ["n01440764", "tench"]}, or one name per line.'
)


def load_class_names(spec: str, file: str | None) -> ClassNames:
    """Return the names of a model's classes with their numbers; empty if they are not known.

    Args:
        spec: The spec of the model; torchvision and transformers know the names of their models' classes.
        file: A path or URL of a JSON list of names; a JSON object from number to name, from name to number, or from
            number to a list of names; or a text with one name per line. None: the names that the library knows.

    Raises:
        UserError: If the file cannot be read or has another format.
    """
    if file is None:
        library, _, name = spec.partition(":")
        known = {"torchvision": list_torchvision_classes, "transformers": list_transformers_classes}
        return enumerate_names(known[library](name) if library in known else [])
    try:
        content = read_option_file("--classes", file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {file}", f"not UTF-8 text ({error})", "Save it as UTF-8.") from error
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        return parse_lines(content)
    if isinstance(read, list) and all(isinstance(name, str) for name in read):
        return enumerate_names(read)
    if isinstance(read, dict) and read:
        return parse_object(read, file)
    if isinstance(read, dict | list):
        raise UserError(f"--classes {file}", "its JSON is not a list or an object of names", FORMS)
    return parse_lines(content)  # one line with a number or a quoted name


def enumerate_names(names: list[str]) -> ClassNames:
    """Number names in their order."""
    return tuple((name, number) for number, name in enumerate(names))


def parse_lines(content: str) -> ClassNames:
    """Return the names of a text with one name per line; blank lines do not count."""
    return enumerate_names([line.strip() for line in content.splitlines() if line.strip()])


def parse_object(read: dict[str, Any], file: str) -> ClassNames:
    """Return the names of a JSON object. Raise UserError if it has another form."""
    if all(type(number) is int and number >= 0 for number in read.values()):
        return tuple(read.items())
    found = []
    for number, value in read.items():
        names = value if isinstance(value, list) else [value]
        if not number.isdecimal() or not names or not all(isinstance(name, str) for name in names):
            what = f"{number!r}: {value!r} is not a class number with its name"
            raise UserError(f"--classes {file}", what, FORMS)
        found += [(name, int(number)) for name in names]
    return tuple(found)


def map_numbers_to_names(names: ClassNames) -> dict[int, str]:
    """Return one name per class, the last of several, because indices of ImageNet put the WordNet id first."""
    return {number: name for name, number in names}
