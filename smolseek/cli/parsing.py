"""Parses the arguments of one verb by tyro; turns its boxed error messages into one line."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import tyro


def parse(kind: type, program: str, arguments: list[str], **options: Any) -> Any:
    """Returns the arguments as an instance of the dataclass `kind`.

    Raises:
        ValueError: tyro refuses the arguments; its error message in one line.
        SystemExit: after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(said.getvalue(), program)) from None
        raise


def _one_line(box: str, program: str) -> str:
    """Returns the first section of an error box, and the nearest known option if the box names one."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    dividers = [number for number, line in enumerate(lines) if set(line) == {"─"}] or [len(lines)]
    said = " ".join(line for line in lines[: dividers[0]] if line and not line.startswith("─"))
    near = next((line.split()[0] for line in lines if box.count("Perhaps you meant") and line.startswith("--")), None)
    return f"{said}; {f'did you mean {near}? ' if near else ''}see {program} --help"
