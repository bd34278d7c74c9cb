"""Local paths in what is meant for elsewhere: a model card, a conversion.json on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FIELDS = {"source", "teacher", "tokenizer", "calibration", "train", "held_out"}
"""Fields of recipes and of conversion.json that name checkpoints or texts."""


def plain_name(name: str) -> str:
    """Returns the last part of a local path, because the rest means nothing elsewhere; ids on the hub stay whole."""
    if name.startswith(("hub:", "builtin:")) or not ("/" in name or "\\" in name):
        return name
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if is_id and not Path(name).suffix[1:].isalpha() else Path(name.replace("\\", "/")).name


def plain_names(tree: Any, field: str = "") -> Any:
    """Returns a JSON-able tree with plain names in place of local paths, in fields that name checkpoints or texts."""
    if isinstance(tree, dict):
        return {key: plain_names(value, key) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain_names(value, field) for value in tree]
    return plain_name(tree) if field in _FIELDS and isinstance(tree, str) else tree
