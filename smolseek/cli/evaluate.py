"""eval."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import tyro

from smolseek.cli.shared import Device, Dtype, check_device, quiet, torch_dtype


@dataclass(frozen=True)
class Eval:
    """Perplexity and bits per byte of a folder on text files, through stock transformers."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base of any causal model."""
    text: tuple[str, ...]
    """Files or globs (.txt, .jsonl, .parquet), or builtin:python (its held-out split)."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""
    text_column: str = "text"
    """Field of a JSON line or Parquet row that holds the text."""
    json: bool = False
    """Print JSON."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Dtype = "float32"
    """Of the weights in memory."""


def run_eval(command: Eval) -> None:
    quiet()
    from tqdm import tqdm

    from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
    from smolseek.checkpoint.source import resolve_folder
    from smolseek.config import DataSettings
    from smolseek.data.windows import held_out_documents, pack
    from smolseek.evaluation import measure_quality

    check_device(command.device)
    folder = resolve_folder(command.folder)
    builtin = command.text == ("builtin:python",)
    texts = {"train" if builtin else "held_out": command.text}
    settings = DataSettings(separator=command.separator, text_column=command.text_column, **texts)  # type: ignore[arg-type]
    ids_T, text_bytes = pack(load_tokenizer(folder), held_out_documents(settings))
    model = load_for_evaluation(folder, dtype=torch_dtype(command.dtype), device=command.device)
    with tqdm(unit="window", disable=command.json or not sys.stderr.isatty()) as bar:

        def on_window(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        quality = measure_quality(model, ids_T, text_bytes, on_window=on_window)
    print(
        json.dumps(quality.to_dict())
        if command.json
        else "\n".join(f"{k:14} {v}" for k, v in quality.to_dict().items())
    )
