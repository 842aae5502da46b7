"""The command line of a training program: a YAML file, flags that override it, `--help`, errors on one line."""

import argparse
import dataclasses
import difflib
import glob
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from stablesr_kit.errors import ConfigError, StableSRKitError, reason_of
from stablesr_kit.training.run.config import ProgramConfig

Config = TypeVar("Config", bound=ProgramConfig)


def launch(main: Callable[[Config], None], kind: type[Config]) -> None:
    """Run `main` with the options of the command line.

    Errors that a user can cause end the program with one line on stderr: exit status 2 for options, 1 for others.
    """
    logging.getLogger("pyvips").setLevel(logging.WARNING)  # it logs every thread pool
    try:
        main(load_config(kind, sys.argv[1:], sys.modules[main.__module__].__doc__))
    except ConfigError as error:
        _end(error, 2)
    except StableSRKitError as error:
        _end(error, 1)


def load_config(kind: type[Config], arguments: Sequence[str], description: str | None = None) -> Config:
    """Options of a program from its command line `--config FILE [--key value ...]`; a flag overrides the file.

    Values are YAML, as in the file; a list with one item may be given as that item. Environment variables
    (`$DATA/photos`) and `~` are expanded. description: first text of `--help`. Raises ConfigError.
    """
    file, flags = _split(arguments)
    fields = {field.name for field in dataclasses.fields(kind)}
    is_help = not {"-h", "--help"}.isdisjoint(flags)
    for key in () if is_help else given_options(arguments):
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown option {key!r}; did you mean {nearest!r}?")
    parser = _parser(kind, file, description, is_help)
    try:
        values = vars(parser.parse_args(flags))
    except (ArgumentError, TypeError) as error:  # TypeError: --help with a file of wrong values
        raise ConfigError(_explained(str(error), kind)) from error
    hints = typing.get_type_hints(kind)
    return kind(**{key: _expanded(value, hints[key]) for key, value in values.items() if key in fields})


def given_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that are given by file and flags, before conversion. Raises ConfigError."""
    file, flags = _split(arguments)
    content = {} if file is None else _read(file)
    parser = _plain_parser()
    for word in flags:
        if word.startswith("--"):
            parser.add_argument(word.partition("=")[0], type=yaml.safe_load)
    found, rest = _parse_known(parser, flags)
    if rest:
        raise ConfigError(f"expected --key value, got {rest[0]!r}")
    return content | vars(found)


def _read(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no `key: value` lines")
    return content


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and all other words."""
    parser = _plain_parser()
    parser.add_argument("--config")
    found, rest = _parse_known(parser, arguments)
    return found.config, rest


def _plain_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False, conflict_handler="resolve")


def _parse_known(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name} needs a value") from error


def _parser(kind: type[ProgramConfig], file: str | None, description: str | None, is_help: bool) -> ArgumentParser:
    """A parser with a flag for every field, grouped by class; defaults come from the file.

    is_help: read the fields' docstrings, from the source files.
    """
    parser = ArgumentParser(
        usage="%(prog)s --config FILE [--OPTION VALUE ...]",
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[] if file is None else [glob.escape(file)],
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; flags override it")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for owner in kind.__mro__:
        own = [fields.pop(name) for name in owner.__dict__.get("__annotations__", {}) if name in fields]
        if not own:
            continue
        group = parser.add_argument_group(str(owner.__doc__).splitlines()[0].rstrip("."))
        texts = docstring_parser.parse_from_object(owner).params if is_help else []
        told = {text.args[1]: str(text.description).replace("None", "null") for text in texts}  # as YAML has it
        for field in own:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            extra: dict[str, Any] = {"required": True} if default is dataclasses.MISSING else {"default": default}
            hint = hints[field.name]
            if not {bool, Literal} & {typing.get_origin(kind) or kind for kind in _alternatives(hint)}:
                extra["metavar"] = "VALUE"  # flags with few possible values show these instead
            group.add_argument(f"--{field.name}", type=_accepted(hint), help=told.get(field.name), **extra)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps line breaks of descriptions; shows type and default after each help text."""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _accepted(hint: Any) -> Any:
    """The type of a flag; a list with one item may be given as that item."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple:
            hint |= typing.get_args(kind)[0]
    return hint


def _expanded(value: Any, hint: Any) -> Any:
    """A parsed value, converted to the type of its field."""
    value = expand_variables(value)
    is_listed = any(typing.get_origin(kind) is tuple for kind in _alternatives(hint))
    return (value,) if is_listed and value is not None and not isinstance(value, tuple) else value


def expand_variables(value: Any) -> Any:
    """A YAML value with environment variables and `~` expanded in all strings."""
    if isinstance(value, str):
        return os.path.expanduser(os.path.expandvars(value))
    if isinstance(value, list | tuple):
        return type(value)(map(expand_variables, value))
    if isinstance(value, Mapping):
        return {key: expand_variables(item) for key, item in value.items()}
    return value


def _explained(error: str, kind: type[ProgramConfig]) -> str:
    """The parser's error message on one line; it has several."""
    if wrong := re.match(r'Parser key "(\w+)".*(?:Got|Given) value: ([^\n]*)', error, re.DOTALL):
        key, value = wrong.groups()
        return f"{key}={value} must be {_name(typing.get_type_hints(kind)[key])}"
    if missing := re.match(r"the following arguments are required: (.*)", error):
        first = missing[1].split(",")[0]
        return f"{missing[1]} must be given, in --config FILE or as --{first} VALUE"
    return f"{' '.join(error.split())}; give --key value; --help lists the keys"


def _name(hint: Any) -> str:
    """A type, as named in messages."""
    names: list[str] = []
    for kind in _alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal:
            names += map(str, arguments)
        elif origin is tuple:
            names.append(f"a list of {arguments[0].__name__}")
        elif origin is not None:
            names.append("names with a number each, {NAME: 1.0}")
        else:
            names.append("null" if kind is types.NoneType else kind.__name__)
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _end(error: StableSRKitError, status: int) -> NoReturn:
    traceback.clear_frames(error.__traceback__)  # ends the running loop and its progress bar
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise SystemExit(status)
