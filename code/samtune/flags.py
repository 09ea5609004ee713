"""Flags and YAML into frozen dataclasses: defaults < `--config FILE.yaml` < flags.

A thin layer over `argparse`, which owns the syntax and the help. Of the libraries that build a
command line from dataclasses (jsonargparse, tyro, simple-parsing) none gives flat names, YAML with
the same names, flags that depend on another flag's value, retired flags and the nearest known name
for a typo together, so the layer is ours. It knows dataclasses and no option by name.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import get_type_hints

import yaml

from samtune.config import BatchSize, Recompute, Size, read_batch_size, read_recompute
from samtune.errors import UserError

_TRUE = {"yes", "true", "t", "y", "1", "on"}
_FALSE = {"no", "false", "f", "n", "0", "off"}
_MOST_YAML = 2**20  # bytes of a file of options; a real one has a few thousand


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a `UserError`: the caller decides who prints it."""

    def error(self, message: str):
        raise UserError(message)


@dataclass(frozen=True)
class Parsed:
    """instances: one per group. given: what was said, by name. remarks: to print."""

    instances: list
    given: dict
    remarks: list[str]


def parse(
    program: str,
    description: str,
    groups: Sequence[type],
    argv: Sequence[str],
    retired: dict[str, str] | None = None,
    foreign: dict[str, str] | None = None,
    choices: dict[str, Sequence[str]] | None = None,
    base: str | None = None,
    free: Collection[str] = (),
) -> Parsed:
    """Read `argv` into one instance per dataclass of `groups`.

    retired: flags that are accepted with one value and answered with this remark. foreign: flags
    that exist but not here, and why. choices: values of a flag that only the caller knows. base: a
    YAML file of a run that goes on; it wins over flags and `--config`, except for the names in
    `free`, and over those too where they are given empty.
    Raises UserError for an unknown name (with the nearest known one), a value of the wrong type or
    an unreadable YAML file.
    """
    retired, foreign, choices = retired or {}, foreign or {}, choices or {}
    parser = Parser(
        prog=program, description=description, allow_abbrev=False, formatter_class=_Formatter
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="the same names as these flags; flags win"
    )
    for group in groups:
        _add_group(parser, group, choices)
    for name in retired:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)

    given, unknown = parser.parse_known_args(argv)
    known = {f.name: f for group in groups for f in fields(group)}
    if unknown:
        raise UserError(_unknown_flag(unknown[0], [*known, "config"], foreign))
    given = {name: value for name, value in vars(given).items() if value is not None}
    remarks = [f"--{name} is ignored: {retired[name]}" for name in retired if name in given]
    for name in retired:
        given.pop(name, None)
    if path := given.pop("config", None):
        given = _read_yaml(path, groups, foreign, choices) | given
    values = given
    if base:
        fixed = _read_yaml(base, groups, foreign, choices)
        remarks += [
            f"--{name} {given[name]} is ignored: the run that goes on has {fixed[name]!r}"
            for name in given
            if name not in free and fixed.get(name) not in (given[name], None) and given[name] != ""
        ]
        values = fixed | {n: value for n, value in given.items() if n in free and value != ""}
    instances = [
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for group in groups
    ]
    return Parsed(instances, given, remarks)


def peek(argv: Sequence[str], name: str, default: str) -> str:
    """The value that `--name` (or the YAML file of `--config`) gives, before the full parse."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(argv)
    value = getattr(given, name)
    if value is None and given.config:
        value = _load_yaml(given.config).get(name)
    return default if value is None else value


def dump(instances: Sequence) -> dict:
    """One flat dict of every option, in the order of the flags; `--config` reads it back.

    Of numbers, text and booleans only, as files hold them.
    """
    return {
        name: value.plain if isinstance(value, Size) else value
        for instance in instances
        for name, value in asdict(instance).items()
    }


def _read_yaml(path: str, groups: Sequence[type], foreign: dict, choices: dict) -> dict:
    """The options in a YAML file, checked as flags are."""
    values = _load_yaml(path)
    known = [f.name for group in groups for f in fields(group)]
    for name in values:
        if name not in known:
            raise UserError(f"{path}: " + _unknown_flag(f"--{name}", known, foreign))
    return checked(values, groups, path, choices)


def checked(values: dict, groups: Sequence[type], path: str | Path, choices: dict) -> dict:
    """Of `values`, which a file at `path` holds, the options of these groups, as flags are read.

    choices: values of a flag that only the caller knows. Raises UserError for a value of another
    type, and for one that is not among an option's.
    """
    result = {}
    for group in groups:
        types = get_type_hints(group)
        for f in fields(group):
            if f.name in values:
                allowed = choices.get(f.name) or f.metadata.get("choices")
                result[f.name] = _checked(values[f.name], types[f.name], allowed, f.name, path)
    return result


def _checked(value, kind: type, allowed: Sequence | None, name: str, path: str | Path):
    """One value of a file as a flag of this type and these choices would be read."""
    try:
        result = _TYPES[kind](_text(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{path}: {name}: {error}") from None
    if allowed and result not in allowed:
        raise UserError(
            f"{path}: {name}: invalid choice: {value!r} (choose from "
            f"{', '.join(map(repr, allowed))})"
        )
    return result


def _text(value) -> str:
    """A value of a file as a flag's text. Raises ValueError for what no flag could say.

    A list is never written out: a few lines of YAML can nest one to more than memory holds.
    """
    text = "" if value is None else str(value) if isinstance(value, _PLAIN) else None
    if text is None or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("expected a number, plain text, yes or no")
    return text


def _texts(values: dict) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        try:
            yield name, _text(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _load_yaml(path: str) -> dict[str, str]:
    """The lines of a YAML file, by name."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_YAML + 1)
        if len(text) > _MOST_YAML:
            raise UserError(f"--config {path}: is no file of options; it is too large")
        values = yaml.safe_load(text)
        if values is None:
            return {}
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError(f"--config {path}: expected lines of the form `name: value`")
        return dict(_texts(values))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # what PyYAML lets through: a date that is none, a tag on another value, endless brackets
        raise UserError(f"--config {path}: a value cannot be read ({error})") from None


class _Formatter(argparse.HelpFormatter):
    """Appends each flag's default to its help."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)


def _add_group(parser: argparse.ArgumentParser, group: type, choices: dict) -> None:
    section = parser.add_argument_group(group.__doc__.splitlines()[0])
    types = get_type_hints(group)
    for f in fields(group):
        kind = types[f.name]
        default = "''" if f.default == "" else f.default
        alone = True if kind is bool else f.metadata.get("alone")  # `--flag` without a value
        section.add_argument(
            f"--{f.name}",
            type=_TYPES[kind],
            nargs="?" if alone else None,
            const=alone,
            choices=choices.get(f.name) or f.metadata.get("choices"),
            metavar=None if (choices.get(f.name) or f.metadata.get("choices")) else kind.__name__,
            help=f"{f.metadata.get('help', '')} (default: {default})".replace("%", "%%"),
        )


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return number


def _reader(read: Callable[[str], object]) -> Callable[[str], object]:
    """`read` with its ValueError as argparse wants it, whose own message would hide the text."""

    def convert(text: str):
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


_PLAIN = (str, int, float, date)  # what a line of YAML may give; `yes` is a bool, which is an int
_TYPES = {
    bool: _boolean, int: _integer, float: _number, str: str,
    **{kind: _reader(read) for kind, read in (
        (Size, Size.read), (BatchSize, read_batch_size), (Recompute, read_recompute),
    )},
}  # fmt: skip


def _unknown_flag(flag: str, known: Sequence[str], foreign: dict[str, str]) -> str:
    name = flag.lstrip("-").split("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument {flag!r}; options start with --"
    if name.replace("-", "_") in foreign:
        return f"--{name}: {foreign[name.replace('-', '_')]}"
    name = name.replace("-", "_")
    near = [k for k in known if name.startswith(f"{k}_") or k.startswith(f"{name}_")]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else "")
