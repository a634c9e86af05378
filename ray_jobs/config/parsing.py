"""Parsers of options of the form NAME=VALUE and of names of functions."""

from pathlib import Path


def parse_setting(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER. Raise ValueError for anything else."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a setting; write METHOD.SETTING=NUMBER") from error


def parse_input(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE. Raise ValueError for anything else."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name.isidentifier() or not value:
        raise ValueError(f"{text!r} is not an input; write NAME=VALUE")
    return name, str(Path(value).expanduser().absolute()) if value.endswith(".npy") and ":" not in value else value


def parse_function(text: str) -> str:
    """Parse `module:function` or `file.py:function`, and make the path absolute. Raise ValueError for anything else."""
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier() or not place:
        raise ValueError(f"{text!r} names no function; write module:function or file.py:function")
    return f"{Path(place).expanduser().absolute()}:{name}" if place.endswith(".py") else text


def parse_tracker(text: str) -> str:
    """Parse `mlflow`, `mlflow:URI`, `wandb` or `trackio`. Raise ValueError for anything else."""
    name, colon, uri = text.partition(":")
    if name not in ("mlflow", "wandb", "trackio") or (colon and (name != "mlflow" or not uri)):
        raise ValueError(f"{text!r} is no tracker; write mlflow, mlflow:URI, wandb or trackio")
    return text


def split_price(text: str) -> tuple[float, str]:
    """Return the amount and the unit of a price.

    Raises:
        ValueError: If the text is no price.

    Example:
        >>> split_price("2.5/gpu-hour")
        (2.5, 'gpu-hour')
    """
    amount, _, unit = text.partition("/")
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    if unit not in ("gpu-hour", "worker-hour", "cpu-hour") or not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is no price; write 2.5/gpu-hour, 0.3/worker-hour or 0.04/cpu-hour")
    return value, unit


def parse_price(text: str) -> str:
    """Return the text of a price unchanged. Raise ValueError if the text is not a price."""
    split_price(text)
    return text
