"""Uploads a finished folder to the hub, with the token that the hub library stores. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from smolseek.checkpoint.source import check_tokenizer, read_config, read_conversion
from smolseek.formats.deepseek_v3 import expected_tensors
from smolseek.formats.headers import read_headers
from smolseek.formats.paths import plain_name, plain_names
from smolseek.formats.text import read_text


def check_complete(folder: Path) -> None:
    """Checks that a folder can be loaded: its config, every tensor by the shards' headers, and its tokenizer.

    Raises:
        ValueError: one of them is missing, incomplete, or does not fit config.json.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder; name one with config.json, such as runs/NAME/model")
    config, headers = read_config(folder), read_headers(folder)
    if "kv_lora_rank" in config:
        for name, shape in expected_tensors(config).items():
            if name not in headers or headers[name].shape != shape:
                has = f"is {headers[name].shape}" if name in headers else "is not there"
                raise ValueError(f"checkpoint {folder}: {name} {has}, and config.json asks for {shape}")
    check_tokenizer(folder, folder)


def files_to_push(folder: Path) -> list[Path]:
    """Returns the files of a complete checkpoint folder, without hidden files and subfolders but chat templates.

    Raises:
        ValueError: as `check_complete` does.
    """
    check_complete(folder)
    files = (*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja"))
    return sorted(path for path in files if path.is_file() and not path.name.startswith("."))


def check_id(repo_id: str) -> None:
    """Raises ValueError if the hub takes no repository of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_valid = "/" in repo_id
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"push {repo_id}: is no name of a repository; write it as owner/name")


def push(folder: Path, repo_id: str, *, public: bool = False) -> str:
    """Uploads a folder as the model `repo_id` and returns its address; a new repository is private unless `public`.

    Local paths in conversion.json and the card become plain names.

    The token is the one that the hub library stores; this function does not ask for it, show it or log it.

    Raises:
        ValueError: the folder is not complete, its conversion.json is not as smolseek writes it or its card is no UTF-8
            text, there is no token, the repository exists and is public and `public` is
            not set, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    # The base class is the error of the HTTP library that this version of the hub library uses.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    contents = [(path.relative_to(folder).as_posix(), _content(path, folder)) for path in files_to_push(folder)]
    if not get_token():
        raise ValueError(f"push {repo_id}: the hub library keeps no token; log in first: hf auth login")
    api = HfApi()
    try:
        if not public and api.repo_exists(repo_id) and not api.model_info(repo_id).private:
            raise ValueError(f"push {repo_id}: is there and public; pass --public to add to it, or name another")
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in contents]
        api.create_commit(repo_id, operations, commit_message="Upload by smolseek")
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"push {repo_id}: the hub refused (status {status}); check the id, and that the token may write (hf auth "
            "whoami)"
        ) from error
    except transport_error as error:
        raise ValueError(f"push {repo_id}: the hub is not there ({type(error).__name__}); try again") from error
    return str(url)


def _content(path: Path, folder: Path) -> bytes | Path:
    """Returns what is uploaded of a file: the file itself, or conversion.json and the card without local paths."""
    conversion = read_conversion(folder)
    if conversion is None or path.name not in ("conversion.json", "README.md"):
        return path
    if path.name == "conversion.json":
        return (json.dumps(plain_names(conversion), indent=2, sort_keys=True) + "\n").encode()
    card = read_text(path)
    try:
        names = [conversion["source"], *conversion["settings"].get("calibration", ())]
        for name in names:  # older cards have them as they were given
            card = card.replace(name, plain_name(name))
    except (AttributeError, LookupError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / 'conversion.json'}: not as smolseek writes it ({what}); restore it") from error
    return card.encode()
