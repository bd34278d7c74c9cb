"""Arguments of one verb by tyro, its boxed error messages as one line."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import tyro


def parse(kind: type, program: str, arguments: list[str], **options: Any) -> Any:
    """tyro's answer, its boxed error message as one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(said.getvalue(), program)) from None
        raise


def _one_line(box: str, program: str) -> str:
    """What an error box says: its first section, and the nearest known option where it names one."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    dividers = [number for number, line in enumerate(lines) if set(line) == {"─"}] or [len(lines)]
    said = " ".join(line for line in lines[: dividers[0]] if line and not line.startswith("─"))
    near = next((line.split()[0] for line in lines if box.count("Perhaps you meant") and line.startswith("--")), None)
    return f"{said}; {f'did you mean {near}? ' if near else ''}see {program} --help"
