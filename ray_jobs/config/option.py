"""Options: metadata of a config's fields, from which the command line, its help and its validation are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

# Where a path may lead: to this machine or a store, or to this machine only. `name` expands a leading ~ only.
PathKind = Literal["path", "local path", "name"]


@dataclass(frozen=True)
class Option:
    """Form of a field on the command line, and the values that it may have.

    Attributes:
        help: Help text. A function returns it if it lists names of `patterns`, which is imported only then.
        flag: Flag if it is not the field's name, with the negative flag after a slash: "--wait/--no-wait".
        aliases: Further flags with the same meaning.
        former: Deprecated flag. It still works, is hidden, and prints a warning.
        argument: Whether it is a positional argument.
        required: Whether the command line requires it; None: if the field has no default.
        parse: Function from text to value that raises ValueError, or the kind of path. None: by the field's type;
            tuples are written with commas.
        repeated: Whether a tuple is given by repeating the flag, once for each item.
        metavar: Placeholder of the value in the help; None: by the field's type.
        min: Minimum of a number.
        max: Maximum of a number.
        choices: Allowed values, of each item if the field is a tuple.
        validate: Function that raises UserError for a wrong value.
        environment: Environment variable that holds the default.
    """

    help: str | Callable[[], str]
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    former: str | None = None
    argument: bool = False
    required: bool | None = None
    parse: Callable[[str], Any] | PathKind | None = None
    repeated: bool = False
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    validate: Callable[[Any], object] | None = None
    environment: str | None = None


def option(default: Any, help: str | Callable[[], str], **settings: Any) -> Any:  # noqa: A002
    """Return a dataclass field that is an option with a default; `settings` are attributes of `Option`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Config(Validated):
        ...     batch_size: int = option(32, "Samples per batch.", min=1)
        >>> Config(batch_size=0)
        Traceback (most recent call last):
            ...
        patterns.errors.UserError: `batch_size`: 0 is too small. Give at least 1.
    """
    return field(default=default, metadata=required(help, **settings))


def required(help: str | Callable[[], str], **settings: Any) -> Mapping[str, Option]:  # noqa: A002
    """Return the metadata of a field that is an option without a default: `field(metadata=required(...))`."""
    return {"option": Option(help, **settings)}


def same(config: type, name: str, **changes: Any) -> Any:
    """Return a dataclass field that is the same option as a field of another config.

    Args:
        config: The other config.
        name: The name of its field.
        **changes: Attributes of `Option` that differ, or `default`.
    """
    (original,) = (each for each in fields(config) if each.name == name)
    default = changes.pop("default", original.default)
    return field(default=default, metadata=metadata_of(config, name, **changes))


def metadata_of(config: type, name: str, **changes: Any) -> Mapping[str, Option]:
    """Return the metadata of the same option as a field of another config, for a field without a default.

    Args:
        config: The other config.
        name: The name of its field.
        **changes: Attributes of `Option` that differ.
    """
    return {"option": replace(options_of(config)[name], **changes)}


def options_of(config: type) -> dict[str, Option]:
    """Return the options of a config by the name of the field; fields without an option are left out."""
    return {each.name: each.metadata["option"] for each in fields(config) if "option" in each.metadata}


def choices_of(option: Option) -> tuple[str, ...]:
    """Return the allowed values of an option; empty if any value is allowed."""
    return tuple(option.choices() if callable(option.choices) else option.choices)


class Validated:
    """Base class of the configs. Values are validated when a config is made, from Python and from the command line."""

    def __post_init__(self) -> None:
        """Raise UserError for the first value that its option does not allow."""
        for name, option in options_of(type(self)).items():
            if (value := getattr(self, name)) is not None:
                validate(name, value, option)


def validate(name: str, value: Any, option: Option) -> None:
    """Raise UserError if an option does not allow this value."""
    from patterns import UserError  # takes seconds, and the helpers of this package do not need it

    if option.min is not None and not isinstance(value, str) and not value >= option.min:
        raise UserError("", f"{value} is too small", f"Give at least {option.min:g}.", name)
    if option.max is not None and not value <= option.max:
        raise UserError("", f"{value} is too large", f"Give at most {option.max:g}.", name)
    if choices := choices_of(option):
        for each in value if isinstance(value, tuple) and value else (value or "",):
            if each not in choices:
                noun = name.replace("_", " ").removesuffix("s")
                raise UserError("", f"no {noun} {each!r}", f"Choose from {', '.join(choices)}.", name)
    if option.validate is not None:
        option.validate(value)
