"""Finds a checkpoint (a folder, builtin:base or a hub id) and reads its JSON files. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from smolseek.checkpoint.licence import LICENCE_FILES

BUILTIN_BASE = "builtin:base"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_WANTED_FILES = ("*.safetensors", "*.json", *TOKENIZER_FILES, "README.md", *LICENCE_FILES)


def resolve_folder(source: str | Path, *, only: tuple[str, ...] = _WANTED_FILES) -> Path:
    """Returns the local folder of a checkpoint: a folder, builtin:base, or a hub id (downloaded to the hub's cache).

    Raises:
        ValueError: `source` is none of these, or the download failed.
    """
    if str(source) == BUILTIN_BASE:
        return Path(__file__).parent.parent / "assets" / "base-python"
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise ValueError(
            f"checkpoint {source}: no such folder; name a folder with config.json, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(only)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {source}: no such folder, and the hub gave none ({type(error).__name__}); check the id and "
            "the connection, or download it elsewhere and name the folder"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns config.json of a folder, or a config.json itself, as a dict.

    Raises:
        ValueError: the file is missing or holds no JSON object.
    """
    path = Path(folder)
    path = path if path.suffix == ".json" else path / "config.json"
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: no config.json; name a folder written by transformers' save_pretrained")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch the file again")
    return tree


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """Returns the ids that end a text: `eos_token_id` of config.json, then those that generation_config.json adds.

    Each file names one id, a list, or none.

    Raises:
        ValueError: a file holds no JSON object, or an id is no whole number.
    """
    ends: list[int] = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        named = read_json(path).get("eos_token_id") if path.is_file() else None
        for end in named if isinstance(named, list) else [named] * (named is not None):
            if not isinstance(end, int) or isinstance(end, bool):
                raise ValueError(f"{path}: eos_token_id {end!r} is no whole number; name a token's id, or a list")
            ends.append(end)
    return tuple(dict.fromkeys(ends))


def check_tokenizer(folder: Path, source: str | Path) -> None:
    """Checks that a folder has a tokenizer.

    Raises:
        ValueError: it has none; the message names `source`, the checkpoint as the user wrote it.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ValueError(f"checkpoint {source}: no tokenizer.json; copy the tokenizer's files into it")


def read_conversion(folder: str | Path) -> dict[str, Any] | None:
    """Returns conversion.json of a folder, which `convert` writes beside the weights; None if there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    path = Path(folder) / "conversion.json"
    return read_json(path) if path.is_file() else None


def fetch_config(source: str | Path) -> dict[str, Any]:
    """Returns the config of a folder, a config.json, builtin:base or a hub id; downloads only config.json.

    Raises:
        ValueError: as `resolve_folder` and `read_config` do.
    """
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    return read_config(resolve_folder(source, only=("config.json",)))
