"""The licence of a checkpoint: its files, and the licence fields in its model card. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from smolseek.formats.files import LICENCE_FILES

_FIELDS = ("license", "license_name", "license_link")


def licence_files(folder: str | Path) -> list[Path]:
    """Returns the files that say under which terms the weights may be used."""
    found = {path for pattern in LICENCE_FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def licence_fields(folder: str | Path) -> dict[str, Any]:
    """Returns the licence fields in README.md's front matter; empty if there is none, or it cannot be read."""
    from huggingface_hub import metadata_load

    card = Path(folder) / "README.md"
    try:
        front = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        front = None
    return {name: front[name] for name in _FIELDS if front.get(name)} if front else {}
