"""The licence of a checkpoint: its files, and what its model card's front matter says of it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_FIELDS = ("license", "license_name", "license_link")


def licence_files(folder: str | Path) -> list[Path]:
    """The files that say under which terms the weights may be used."""
    found = {path for pattern in LICENCE_FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def licence_fields(folder: str | Path) -> dict[str, Any]:
    """The licence fields of README.md's front matter; empty where there is none that can be read."""
    card = Path(folder) / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    try:
        front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError:
        return {}
    return {name: front[name] for name in _FIELDS if front.get(name)} if isinstance(front, dict) else {}
