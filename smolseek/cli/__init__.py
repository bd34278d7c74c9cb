"""The command line. It reads arguments, calls the library and prints; each module holds a group of verbs."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from smolseek.cli.convert import Convert, Plan, run_convert, run_plan
from smolseek.cli.evaluate import Eval, run_eval
from smolseek.cli.export import Check, Export, run_check, run_export
from smolseek.cli.generate import Chat, Generate, run_chat, run_generate
from smolseek.cli.parsing import parse
from smolseek.cli.push import Push, run_push
from smolseek.cli.report import Report, run_report
from smolseek.cli.shared import StoppedBySignal, said_once
from smolseek.cli.train import Data, Train, run_data, run_train
from smolseek.config import Recipe, load_recipe, recipes_folder

VERBS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "plan": (Plan, run_plan),
    "convert": (Convert, run_convert),
    "train": (Train, run_train),
    "data": (Data, run_data),
    "generate": (Generate, run_generate),
    "chat": (Chat, run_chat),
    "eval": (Eval, run_eval),
    "report": (Report, run_report),
    "check": (Check, run_check),
    "export": (Export, run_export),
    "push": (Push, run_push),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    The status is 2 after a user's mistake, which is printed in one line, and 1 if a runtime named to `check` refuses.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(
            "usage: smolseek VERB [--help]\n\n" + "\n".join(f"  {v:9} {_first_line(k)}" for v, (k, _) in VERBS.items())
        )
        return 0
    if verb == "--version":
        from smolseek import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        return _fail(f"{verb}: no such verb; there are {', '.join(VERBS)}")
    kind, run = VERBS[verb]
    try:
        with said_once():
            command = parse_verb(kind, verb, arguments[1:])
        return run(command) or 0
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(_said(error))
    except StoppedBySignal as stopped:
        print(f"smolseek: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 130


def _said(error: ValueError | OSError) -> str:
    """Returns an error's message; of the system's own errors the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}; check the path"
    return str(error)


def _fail(message: str) -> int:
    print(f"smolseek: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def parse_verb(kind: type, verb: str, arguments: list[str]) -> Any:
    """Returns one verb's parsed arguments; `train` and `data stats` take defaults from a recipe that is named first."""
    if kind is Export and arguments and arguments[0] != "gguf" and not arguments[0].startswith("-"):
        raise ValueError(
            f"export {arguments[0]}: is no kind of file; write smolseek export gguf {shlex.join(arguments)}"
        )
    if kind is Chat and any(re.match("--(prompt|prompt.file|samples|json)(=|$)", argument) for argument in arguments):
        raise ValueError("chat: takes no --prompt, --prompt-file, --samples or --json; smolseek generate has them")
    if kind not in (Train, Data):
        return parse(kind, f"smolseek {verb}", arguments)
    if kind is Data:
        if arguments[:1] not in (["stats"], ["--help"], ["-h"]):
            raise ValueError("data: say what about it, data stats RECIPE; see smolseek data --help")
        verb, arguments = "data stats", arguments[1:] if arguments[0] == "stats" else arguments
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = load_recipe(arguments[0]), arguments[1:]
    else:
        recipe = load_recipe(recipes_folder() / "quickstart.yaml")
    default = kind(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe)})
    return parse(kind, f"smolseek {verb} [RECIPE]", arguments, default=default)
