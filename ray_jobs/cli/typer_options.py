"""From configs to the command line: the options of a command are the fields of the configs that it takes."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from ray_jobs.config.option import Option, choices_of
from ray_jobs.io.file_systems import expand_home
from ray_jobs.io.object_store import normalize_location, require_local_path
from ray_jobs.units import UNITS, parse_duration

Config = TypeVar("Config")
PATHS: dict[str, Callable[[str], Any]] = {
    "path": normalize_location,
    "local path": require_local_path,
    "name": expand_home,
}
METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}


class Given(Generic[Config]):
    """The options of a config as the user gave them, for a command that completes them to the config.

    Args:
        config: The class of the config.
        values: Values of the command's options by key.

    Example:
        >>> from ray_jobs.config import ModelConfig
        >>> given = Given(ModelConfig, {"model": "torchvision:vgg16", "seed": 1})
        >>> given.spec, given.build(weights="random").weights
        ('torchvision:vgg16', 'random')
    """

    def __init__(self, config: type[Config], values: Mapping[str, Any]) -> None:
        """Keep the values of the config's own fields."""
        keys = options_by_key(config)
        self._config = config
        self._values = {keys[key].name: value for key, value in values.items() if key in keys and value is not None}

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option by the name of its field; its default, else None, if it was not given."""
        field = self._config.__dataclass_fields__[name]  # type: ignore[attr-defined]
        return self._values.get(name, None if field.default is MISSING else field.default)

    def build(self, **changes: Any) -> Config:
        """Return the config with these values instead of the given ones, or in addition to them."""
        return self._config(**self._values | changes)


@dataclass(frozen=True)
class Command:
    """A command: the function that runs it and the configs that it takes, one for each parameter.

    Attributes:
        run: The function. A parameter is annotated with a config, or with `Given[...]` of a config.
        examples: Lines of a shell for the help, at most 76 characters wide.
        interspersed: Whether options may follow the first positional argument.
    """

    run: Callable[..., None]
    examples: tuple[str, ...]
    interspersed: bool = True

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.run.__name__.replace("_", "-")

    @property
    def context_settings(self) -> dict[str, Any]:
        """The settings of the command-line library's context."""
        return {} if self.interspersed else {"allow_interspersed_args": False}

    @property
    def epilog(self) -> str:
        """The examples as the help shows them, after the options."""
        shown = (f"  {escape(example)}".replace("\n", "\n  ") for example in self.examples)
        return "\n".join(["", "Examples", *shown])  # the empty line keeps the indentation of the other lines

    def configs(self) -> dict[str, Any]:
        """Return the annotations of the function's parameters by name."""
        hints = get_type_hints(self.run)
        return {name: hint for name, hint in hints.items() if name not in ("return", "context")}

    def fields(self) -> dict[str, tuple[Field[Any], Any]]:
        """Return the fields that are options, with their types, by key."""
        found: dict[str, tuple[Field[Any], Any]] = {}
        for hint in self.configs().values():
            config = get_args(hint)[0] if get_origin(hint) is Given else hint
            types = get_type_hints(config)
            for key, field in options_by_key(config).items():
                found.setdefault(key, (field, types[field.name]))
        return found

    def flags(self) -> dict[str, str]:
        """Return the flags of the command by the names of parameters: those of the configs and of the options."""
        shown = {key: display_name(field) for key, (field, _) in self.fields().items()}
        return shown | {field.name: shown[key] for key, (field, _) in self.fields().items()}

    def function(self, with_help: bool = True) -> Callable[..., None]:
        """Return the function that typer makes the command of: its parameters are the options.

        Args:
            with_help: Whether options have their help.
        """
        own, takes_context = self.fields(), "context" in get_type_hints(self.run)
        parameters = [typer_parameter(key, field, kind, with_help) for key, (field, kind) in own.items()]
        former = [former_parameter(key, field, kind) for key, (field, kind) in own.items() if option_of(field).former]

        def run(context: typer.Context, **values: Any) -> None:
            for key, (field, _) in own.items():
                old = values.pop(former_key(key), None)
                if old is not None:
                    warn_former(field)
                    values[key] = old
                if isinstance(values[key], list):
                    values[key] = tuple(values[key])
            configs = {name: complete(hint, values) for name, hint in self.configs().items()}
            self.run(**{"context": context} if takes_context else {}, **configs)

        parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *parameters, *former])  # type: ignore[attr-defined]
        run.__doc__ = self.run.__doc__
        return run

    def function_without_options(self) -> Callable[..., None]:
        """Return a function like `function`, without the options and without effect, for the list of commands."""

        def run() -> None:
            return None

        run.__doc__ = self.run.__doc__
        return run


def command(*examples: str, interspersed: bool = True) -> Callable[[Callable[..., None]], Command]:
    """Return a decorator that makes a command of a function; its docstring is the command's summary."""
    return lambda run: Command(run, examples, interspersed)


def complete(hint: Any, values: Mapping[str, Any]) -> Any:
    """Return the value for a parameter of a command with this annotation."""
    if get_origin(hint) is Given:
        return Given(get_args(hint)[0], values)
    return Given(hint, values).build()


def option_of(field: Field[Any]) -> Option:
    """Return the option of a field."""
    return field.metadata["option"]


def options_by_key(config: type) -> dict[str, Field[Any]]:
    """Return the fields of a config that are options by key: the long name of the flag as an identifier."""
    found = {}
    for field in fields(config):
        if "option" in field.metadata:
            flag = option_of(field).flag or field.name
            found[flag.split("/")[0].lstrip("-").replace("-", "_")] = field
    return found


def display_name(field: Field[Any]) -> str:
    """Return an option as users know it: its flag, or the placeholder of a positional argument."""
    if option_of(field).argument:
        return field.name.upper()
    return (option_of(field).flag or f"--{field.name.replace('_', '-')}").split("/")[0]


def typer_parameter(key: str, field: Field[Any], kind: Any, with_help: bool) -> inspect.Parameter:
    """Return the parameter from which typer makes an option or an argument."""
    option = option_of(field)
    needed = field.default is MISSING if option.required is None else option.required
    default = inspect.Parameter.empty if needed else default_text(field)
    annotation, settings = typer_settings(field, kind)
    settings["help"] = help_text(option) if with_help else None
    if option.choices:
        settings["autocompletion"] = complete_choice(option)
    if option.environment:
        settings["envvar"] = option.environment
    if option.argument:
        settings["metavar"] = f"{key.upper()}..." if option.repeated else key.upper()
        info: Any = typer.Argument(**settings)
    else:
        flag = option.flag or f"--{key.replace('_', '-')}"
        info = typer.Option(flag, *option.aliases, **settings)
    parameter_kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(key, parameter_kind, default=default, annotation=Annotated[annotation, info])


def former_parameter(key: str, field: Field[Any], kind: Any) -> inspect.Parameter:
    """Return the hidden parameter for the deprecated flag of an option."""
    annotation, settings = typer_settings(field, kind)
    info = typer.Option(option_of(field).former, hidden=True, **settings)
    parameter_kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(former_key(key), parameter_kind, default=None, annotation=Annotated[annotation, info])


def former_key(key: str) -> str:
    """Return the key under which the value of an option's deprecated flag is passed."""
    return f"former_{key}"


def warn_former(field: Field[Any]) -> None:
    """Print that a flag is deprecated."""
    line = f"patternnet: {option_of(field).former} is deprecated; use {display_name(field)} instead"
    print(line, file=sys.stderr, flush=True)


def typer_settings(field: Field[Any], kind: Any) -> tuple[Any, dict[str, Any]]:
    """Return the annotation for typer and the settings of typer.Option that follow from the type of a field."""
    option = option_of(field)
    kinds = [each for each in (get_args(kind) if NoneType in get_args(kind) else (kind,)) if each is not NoneType]
    base = kinds[0]
    if base is bool:
        return bool, {}
    if isinstance(option.parse, str):
        parse, metavar = PATHS[option.parse], "TEXT" if option.parse == "name" else "PATH"
    elif option.parse is not None:
        parse, metavar = usage_error(option.parse), "DURATION" if option.parse is parse_duration else "TEXT"
    elif get_origin(base) is tuple and not option.repeated:
        item = get_args(base)[0]
        parse, metavar = usage_error(parse_numbers if item is float else parse_words), f"{METAVARS[item]},..."
    else:
        kind = base if base in (int, float) else str
        settings = {"min": option.min, "max": option.max, "metavar": option.metavar or METAVARS[kind]}
        return (list[str] if option.repeated else kind), settings
    return (list[str] if option.repeated else str), {"parser": parse, "metavar": option.metavar or metavar}


def complete_choice(option: Option) -> Callable[[str], list[str]]:
    """Return a function from the beginning of a value to the values that the shell offers."""

    def words(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")  # of a list
        return [f"{before}{comma}{choice}" for choice in choices_of(option) if choice.startswith(last)]

    return words


def usage_error(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser whose ValueError becomes a usage error with its text."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


def help_text(option: Option) -> str:
    """Return the help text of an option, with its choices."""
    text = option.help() if callable(option.help) else option.help
    choices = choices_of(option)
    return f"{text} Choices: {', '.join(choices)}." if choices else text


def default_text(field: Field[Any]) -> Any:
    """Return the default of an option as typer takes it: as the user would write it, if it is parsed from text."""
    default: Any = None if field.default is MISSING else field.default
    if option_of(field).parse is parse_duration:
        unit, seconds = next(each for each in reversed(UNITS.items()) if default % each[1] == 0)
        return f"{default / seconds:g}{unit}"
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or None
    return str(default) if option_of(field).parse and default is not None else default


def parse_words(text: str) -> tuple[str, ...]:
    """Parse words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_numbers(text: str) -> tuple[float, ...]:
    """Parse numbers separated by commas. Raise ValueError for anything else."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of numbers; write 0.5,0.5,0.5") from error


def name_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a text in which each parameter in backticks is replaced by its flag; other names stay.

    Example:
        >>> name_flags("Pass `size=56`, not `sizes`.", {"size": "--map-size"})
        'Pass --map-size 56, not `sizes`.'
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        return found[0] if name not in flags else " ".join(filter(None, (flags[name], value)))

    return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, text)
