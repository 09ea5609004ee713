"""Flags and YAML into frozen dataclasses: defaults < `--config FILE.yaml` < flags.

A thin layer over `argparse`, which owns the syntax and the help. Of the libraries that build a
command line from dataclasses (jsonargparse, tyro, simple-parsing) none gives flat names, YAML with
the same names, flags that depend on another flag's value, retired flags and the nearest known name
for a typo together, so the layer is ours. It knows dataclasses and no option by name.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import yaml

from samtune.config import BatchSize, Recompute, Size, read_batch_size, read_recompute
from samtune.errors import UserError

_TRUE = {"yes", "true", "t", "y", "1", "on"}
_FALSE = {"no", "false", "f", "n", "0", "off"}


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
    return default if value is None else str(value)


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
    types = {name: kind for group in groups for name, kind in get_type_hints(group).items()}
    allowed = {
        f.name: choices.get(f.name) or f.metadata.get("choices")
        for group in groups
        for f in fields(group)
    }
    result = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{path}: " + _unknown_flag(f"--{name}", known, foreign))
        try:
            result[name] = _TYPES[types[name]](value if isinstance(value, str) else str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(f"{path}: {name}: {error}") from None
        if allowed[name] and result[name] not in allowed[name]:
            raise UserError(
                f"{path}: {name}: invalid choice: {value!r} (choose from "
                f"{', '.join(map(repr, allowed[name]))})"
            )
    return result


def _load_yaml(path: str) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of the form `name: value`")
    return values


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
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _reader(read: Callable[[str], object]) -> Callable[[str], object]:
    """`read` with its ValueError as argparse wants it, whose own message would hide the text."""

    def convert(text: str):
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


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
