"""Writes docs/recipes.md from the dataclasses in smolseek/config.py: python docs/recipe_reference.py."""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import itertools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from smolseek.config import Recipe

PAGE = Path(__file__).parent / "recipes.md"
INTRODUCTION = """# Recipe reference

<!-- Written by docs/recipe_reference.py from smolseek/config.py: change it there. -->

A recipe is a YAML file for `smolseek train`. Every key has a default, so a recipe holds only what it sets otherwise. A
key that does not exist is refused, and the nearest one that does is named. On the command line each is an option:
`train.learning_rate` is `--train.learning-rate`; `smolseek plan` and `smolseek convert` take the keys of `convert`
without the prefix. The project's own recipes are in `recipes/`; a recipe without a `name` is called after its file.
"""
TITLES = {"": "The recipe", "train.stages": "An item of `train.stages`"}


def page() -> str:
    """Returns the whole page."""
    return "\n".join([INTRODUCTION, *(section(name, kind) for name, kind in sections(Recipe, ""))])


def sections(kind: type, name: str) -> Iterator[tuple[str, type]]:
    """Returns (dotted name, dataclass) of a mapping of settings and of the mappings inside it."""
    yield name, kind
    for key, hint in get_type_hints(kind).items():
        if (inner := mapping_in(hint)) is not None:
            yield from sections(inner, f"{name}.{key}".lstrip("."))


def mapping_in(hint: Any) -> type | None:
    """Returns the dataclass in a field's type, also in a union or a list; None if there is none."""
    if dataclasses.is_dataclass(hint):
        return hint  # type: ignore[return-value]
    return next((inner for inner in map(mapping_in, get_args(hint)) if inner is not None), None)


def section(name: str, kind: type) -> str:
    """Returns the section of one mapping of settings: heading, description and table."""
    hints, told = get_type_hints(kind), descriptions(kind)
    rows = [
        f"| `{field.name}` | {type_name(hints[field.name])} | {default_of(field)} | {told[field.name]} |"
        for field in dataclasses.fields(kind)
    ]
    head = [f"## {TITLES.get(name, f'`{name}`')}", "", inspect.getdoc(kind) or "", ""]
    return "\n".join([*head, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def descriptions(kind: type) -> dict[str, str]:
    """Returns the string under each field, in one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def type_name(hint: Any) -> str:
    """Returns a type as a writer of YAML sees it."""
    origin, inner = get_origin(hint), get_args(hint)
    if mapping_in(hint) is not None:
        return "list of mappings" if origin is tuple else "mapping"
    if origin in (Union, types.UnionType):
        return ", ".join(type_name(kind) for kind in inner if kind is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        return "mapping"
    return {str: "text", float: "number", int: "whole number", bool: "true or false"}[hint]


def default_of(field: dataclasses.Field[Any]) -> str:
    """Returns a default as YAML writes it; a mapping of settings has its defaults in its own section."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return "as below"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if not value and isinstance(value, tuple | dict):
        return "none"
    written = html.escape(str(list(value) if isinstance(value, tuple) else value), quote=False)
    # Some dialects of Markdown take a | neither in a code span nor behind a backslash.
    return f"<code>{written.replace('|', '&#124;')}</code>"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
