"""Finds a checkpoint (a folder, a GGUF file, builtin:base or a hub id) and reads its JSON files. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from smolseek.formats.files import LICENCE_FILES, TOKENIZER_FILES
from smolseek.formats.foreign import check_no_pointer, describe_foreign, is_gguf

BUILTIN_BASE = "builtin:base"
_TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
)
"""Files that are a tokenizer together."""
_WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "conversion.json",
    "model.safetensors",
    "model-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "model_index.json",
    *TOKENIZER_FILES,
    "README.md",
    *LICENCE_FILES,
)
"""Patterns; all but one match nothing in subfolders, where other formats and dtypes lie."""
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def resolve_folder(source: str | Path, *, only: tuple[str, ...] = _WANTED_FILES) -> Path:
    """Returns the local folder of a checkpoint: a folder, builtin:base, a hub id or a GGUF file of a dense model.

    A hub id may have a revision (a branch, a tag or a commit): owner/name@revision. It is downloaded to the hub's
    cache. A GGUF file is unpacked into a folder beside that cache.

    Raises:
        ValueError: `source` is none of these, the download failed, or as `unpack` does.
    """
    if str(source) == BUILTIN_BASE:
        return Path(__file__).parent.parent / "assets" / "base-python"
    folder = Path(source)
    if folder.is_dir():
        return folder
    if is_gguf(folder):
        from smolseek.checkpoint.gguf import unpack

        return unpack(folder)
    if folder.is_file():
        raise ValueError(f"checkpoint {source}: {describe_foreign(folder)}")
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise ValueError(
            f"checkpoint {source}: no such folder; name a folder with config.json, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision: dict[str, Any] = {"revision": hub_id["revision"]} if hub_id["revision"] else {}
    try:
        return Path(snapshot_download(hub_id["name"], allow_patterns=list(only), **revision))
    except GatedRepoError as error:
        raise ValueError(
            f"checkpoint {source}: the hub gives it to those alone who have accepted its terms; accept them on its "
            "page, and log in with: hf auth login"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {source}: no such folder, and the hub gave none ({type(error).__name__}); check the id and "
            "the connection, or download it elsewhere and name the folder"
        ) from error


def pinned(source: str | Path) -> str:
    """Returns a source that will mean the same later: owner/name@commit for a hub id, else the source as it is.

    It downloads config.json alone.

    Raises:
        ValueError: as `resolve_folder` does.
    """
    if str(source) == BUILTIN_BASE or Path(source).exists():
        return str(source)
    commit = resolve_folder(source, only=("config.json",)).name
    return f"{commit_of(source)[0]}@{commit}"


def commit_of(source: str | Path) -> tuple[str, str | None]:
    """Returns the parts of owner/name@commit; (source, None) for a hub id without one and for all else."""
    hub_id = None if Path(source).exists() else _HUB_ID.fullmatch(str(source))
    return (hub_id["name"], hub_id["revision"]) if hub_id else (str(source), None)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns config.json of a folder, or a config.json itself, as a dict.

    Raises:
        ValueError: the file is missing or holds no JSON object.
    """
    path = Path(folder)
    path = path if path.suffix == ".json" else path / "config.json"
    if not path.is_file():
        remedy = (
            describe_foreign(Path(folder)) or "no config.json; name a folder written by transformers' save_pretrained"
        )
        raise ValueError(f"checkpoint {folder}: {remedy}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ValueError: the file holds no JSON object, or is a Git LFS pointer.
    """
    check_no_pointer(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
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


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


def check_tokenizer(folder: Path, source: str | Path) -> None:
    """Checks that a folder has a tokenizer.

    Raises:
        ValueError: it has none (the message names `source`, the checkpoint as the user wrote it), or a Git LFS pointer
            in place of a file of it.
    """
    if not has_tokenizer(folder):
        foreign = None if (folder / "config.json").is_file() else describe_foreign(folder)
        missing = "no tokenizer.json; copy the tokenizer's files into it"
        raise ValueError(f"checkpoint {source}: {foreign or missing}")
    for pattern in TOKENIZER_FILES:
        for path in folder.glob(pattern):
            check_no_pointer(path)


def read_conversion(folder: str | Path) -> dict[str, Any] | None:
    """Returns conversion.json of a folder, which `convert` writes beside the weights; None if there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    path = Path(folder) / "conversion.json"
    return read_json(path) if path.is_file() else None


def fetch_config(source: str | Path) -> dict[str, Any]:
    """Returns the config of a folder, a config.json, builtin:base, a GGUF file or a hub id, without its weights.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `read_gguf` do.
    """
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if is_gguf(path):
        from smolseek.formats.gguf_source import read_gguf  # its library takes a while to import

        return read_gguf(path).config
    return read_config(resolve_folder(source, only=("config.json",)))
