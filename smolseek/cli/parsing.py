"""Parses the arguments of one verb by tyro; turns its boxed error messages into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import tyro

_CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName)


def parse(kind: type, program: str, arguments: list[str], **options: Any) -> Any:
    """Returns the arguments as an instance of the dataclass `kind`.

    Raises:
        ValueError: an option of several values is given twice, a flag has a value, an option that needs one has none,
            a number is none, or tyro refuses the arguments: its message in one line.
        SystemExit: after --help.
    """
    fields = _fields(kind)
    arguments = [*_with_none(arguments, fields)]
    _refuse_repeated(arguments, fields)
    written = [*_options(arguments)]
    for (option, values), (following, _) in zip(written, [*written[1:], ("", [])], strict=False):
        hint = fields.get(_name(option))
        _check_missing(option, values, following, hint, fields)
        _check_values(option, values, hint, program)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=_CONFIG, **options)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(said.getvalue(), program)) from None
        raise


def _fields(kind: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields, and of those of the dataclasses in it, by their names."""
    fields: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        inner = () if get_origin(hint) is tuple else filter(dataclasses.is_dataclass, (hint, *get_args(hint)))
        fields |= next(map(_fields, inner), {name: hint})
    return fields


def _name(option: str) -> str:
    """Returns the name of the field that an option such as --train.weight-decay sets."""
    return option.strip("-").replace("-", "_").rpartition(".")[2]


def _options(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each option as it is written, and the arguments up to the next one."""
    starts = [place for place, argument in enumerate(arguments) if re.match("--?[A-Za-z]", argument)]
    for start, end in itertools.pairwise([*starts, len(arguments)]):
        option, equals, value = arguments[start].partition("=")
        yield option, [*([value] if equals else []), *arguments[start + 1 : end]]


def _with_none(arguments: list[str], fields: dict[str, Any]) -> Iterator[str]:
    """Yields the arguments with none and null, where a number may be left out, as tyro reads them: None."""
    for before, argument in itertools.pairwise(["", *arguments]):
        option, equals, value = argument.rpartition("=")
        name = option or before
        kinds = get_args(fields.get(_name(name))) if name.startswith("--") else ()
        left_out = value.lower() in ("none", "null") and NoneType in kinds and {int, float} & {*kinds}
        yield f"{option}{equals}None" if left_out else argument


def _refuse_repeated(arguments: list[str], fields: dict[str, Any]) -> None:
    """Raises ValueError if an option of several values is there twice: tyro would take those of the last alone."""
    options = [option.replace("_", "-") for option, _ in _options(arguments)]
    for number, option in enumerate(options):
        if option in options[:number] and get_origin(fields.get(_name(option))) is tuple:
            raise ValueError(f"{option}: is given twice; give it once, with all its values")


def _check_missing(option: str, values: list[str], following: str, hint: Any, fields: dict[str, Any]) -> None:
    """Raises ValueError if an option of one value has none, and what follows is no option but may be that value."""
    takes_one = hint not in (None, bool) and get_origin(hint) not in (tuple, dict)
    is_option = _name(following) in {*fields, "h", "help", ""}
    if takes_one and not values and not is_option:
        raise ValueError(f"{option}: has no value; one that begins with - is written {option}={following}")


def _check_values(option: str, values: list[str], hint: Any, program: str) -> None:
    """Raises ValueError if a flag has a value, or what must be a number is none."""
    if hint is bool and values and values[0].lower() in ("true", "false"):
        path, dot, name = option.removeprefix("--").rpartition(".")
        raise ValueError(f"{option} {values[0]}: takes no value; write {option} or --{path}{dot}no-{name}")
    if get_origin(hint) is dict:
        if len(values) % 2 or any(_broken_rule(value, {float}) for value in values[1::2]):
            told = " ".join([option, *values])
            raise ValueError(f"{told}: must be names with a number behind each; see {program} --help")
        return
    for value in values if get_origin(hint) is tuple else values[:1]:
        if rule := _broken_rule(value, {hint, *get_args(hint)}):
            raise ValueError(f"{option} {value}: {rule}; see {program} --help")


def _broken_rule(value: str, kinds: set[Any]) -> str | None:
    """Returns what a value must be if it must be a number and is none."""
    kind = next((kind for kind in (int, float) if kind in kinds), str)
    try:
        kind(value)
    except ValueError:
        if not (value == "None" and NoneType in kinds):
            return "must be a whole number" if kind is int else "must be a number, such as 0.5"
    return None


def _one_line(box: str, program: str) -> str:
    """Returns the first section of an error box, and the nearest known option if the box names one.

    A terminal without UTF-8 gets a title, lines of hyphens, and no box.
    """
    _, *lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    ends = ("Got errors:", "─" * 9, "-" * 9)
    first = itertools.dropwhile(lambda line: line.startswith(ends), lines)
    said = " ".join(itertools.takewhile(lambda line: not line.startswith(ends), filter(None, first))).rstrip(".")
    near = next(
        (line.split()[0] for line in lines if box.count("Perhaps you meant") and re.match("--[a-z]", line)), None
    )
    return f"{said}; {f'did you mean {near}? ' if near else ''}see {program} --help"
