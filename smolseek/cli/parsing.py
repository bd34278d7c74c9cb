"""Parses the arguments of one verb by tyro; turns its boxed error messages into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from typing import Any, get_origin, get_type_hints

import tyro


def parse(kind: type, program: str, arguments: list[str], **options: Any) -> Any:
    """Returns the arguments as an instance of the dataclass `kind`.

    Raises:
        ValueError: an option of several values is given twice, or tyro refuses the arguments: its message in one line.
        SystemExit: after --help.
    """
    _refuse_repeated(arguments, _lists(kind))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(said.getvalue(), program)) from None
        raise


def _lists(kind: Any) -> set[str]:
    """Returns the fields of a dataclass, and of those in it, that take several values."""
    names: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            names |= _lists(hint)
        elif get_origin(hint) is tuple:
            names.add(name)
    return names


def _refuse_repeated(arguments: list[str], lists: set[str]) -> None:
    """Raises ValueError if an option of several values is there twice: tyro would take those of the last alone."""
    names = [argument.partition("=")[0].replace("-", "_") for argument in arguments if re.match("--[a-z]", argument)]
    for number, name in enumerate(names):
        if name in names[:number] and name.strip("_").rpartition(".")[2] in lists:
            option = name.strip("_").replace("_", "-")
            raise ValueError(f"--{option}: is given twice; give it once, with all its values")


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
