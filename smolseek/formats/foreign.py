"""Files and folders that are no safetensors checkpoint of a language model: what they are, and what to do instead."""

from __future__ import annotations

from pathlib import Path

_GGUF_MAGIC = b"GGUF"
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER_BYTES = 1024  # Git LFS's own limit
_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        "adapter_config.json",
        "a LoRA (PEFT) adapter without the weights of its base model; merge it with merge_and_unload() of peft, save "
        "that, and name its folder",
    ),
    ("model_index.json", "a diffusers pipeline; name a folder with a language model's config.json"),
    ("*.gguf", "a folder with a GGUF file; name that file itself"),
    ("*.onnx", "ONNX is a format to run models, not to convert them; name the checkpoint that it was made from"),
)
"""Files that give a folder away, and what it is."""


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a file that begins as GGUF does, or has its ending."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC or path.suffix == ".gguf"


def describe_foreign(path: Path) -> str | None:
    """Returns what a folder without a checkpoint, or a file named in a folder's place, is; None if nothing tells."""
    if path.is_file():
        return "is a file; name the folder that it lies in"
    if (path / "run.json").is_file():
        model = path / "model"
        return f"is a run; name its model: {model}" if model.is_dir() else "is a run without a model yet; --resume it"
    return next((said for pattern, said in _FOREIGN if next(path.glob(pattern), None)), None)


def check_no_pointer(path: Path) -> None:
    """Checks that a file is not the few lines that Git leaves in its place until Git LFS has fetched it.

    Raises:
        ValueError: it is. A file that is not there, or cannot be read, raises nothing here.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_LARGEST_POINTER_BYTES + 1)
    except OSError:
        return
    if head.startswith(_POINTER) and len(head) <= _LARGEST_POINTER_BYTES:
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; in its folder, run: git lfs pull")
