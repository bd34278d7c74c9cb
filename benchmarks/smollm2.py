"""What conversion keeps of a real model: perplexity over the dense one on texts that it was not calibrated on.

python benchmarks/smollm2.py FOLDER --calibration MIXED --texts NAME=FILE ... [--cache 0.5] [--out NAME]

Stock transformers loads the dense folder and the folders that `convert` writes. Tokens are those of `tokenizer(text)`,
without a BOS where the tokenizer adds none; documents are joined by EOS; windows have 512 tokens. Every conversion is
written as a JSON line when it is measured, and the same command goes on from there.

Shapes: T tokens.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from circumstances import circumstances, command_line
from rows import Rows, present
from torch import Tensor

from smolseek.checkpoint.hub import load_stock, load_tokenizer
from smolseek.config import SEPARATOR, DataSettings
from smolseek.conversion.pipeline import convert
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import measure_quality

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RealModel:
    """Convert a real checkpoint and measure it on other texts."""

    source: tyro.conf.Positional[str]
    """Dense checkpoint: a folder or hub id."""
    calibration: tuple[str, ...]
    """Text to calibrate on."""
    texts: tuple[str, ...]
    """Texts to measure on, NAME=FILE each; none may be calibration text."""
    cache: tuple[float, ...] = (0.5,)
    """Shares of the source's cache to keep."""
    refine_steps: int = 200
    """Steps of layer-wise refinement."""
    calibration_windows: int = 96
    """Windows for the second moments."""
    tokens: int = 8192
    """Tokens to measure on in each text."""
    out: str = "smollm2"
    """Name of the result."""
    results: Path = ROOT / "benchmarks" / "results"
    """Folder for the report and its JSON lines."""
    work: Path = Path("runs/smollm2")
    """Folder for converted folders."""


def read_tokens(tokenizer: Any, file: str, tokens: int) -> Tensor:
    """Returns the first tokens of a text, its documents joined by EOS."""
    ids: list[int] = []
    documents = held_out_documents(DataSettings(held_out=(file,), separator=SEPARATOR))
    for document in documents:
        ids += [*tokenizer(document.text[: 20 * tokens], verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens])


def measure(mine: RealModel) -> Rows:
    """Convert and measure what has no row yet; returns all rows."""
    free = ("cache", "results", "work")
    rows = Rows(mine.results, mine.out, mine, free)
    tokenizer = load_tokenizer(mine.source)
    texts = dict(text.split("=", 1) for text in mine.texts)
    ids = {name: read_tokens(tokenizer, file, mine.tokens) for name, file in texts.items()}
    if not rows.find(what="dense"):
        _add(rows, "dense", mine.source, ids, seconds=0.0, cache=1.0)
    for share, steps in itertools.product(mine.cache, (0, mine.refine_steps)):
        what = f"{'refined' if steps else 'closed form'} at {share:g}"
        if rows.find(what=what):
            continue
        folder, began = mine.work / what.replace(" ", "-"), time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        settings = {"calibration_windows": mine.calibration_windows, "refine_steps": steps, "distill_steps": 0}
        convert(mine.source, folder, cache=share, calibration=mine.calibration, **settings)
        report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        kept = report["cache"]["numbers_per_token"] / report["cache"]["source_numbers_per_token"]
        _add(rows, what, str(folder), ids, seconds=time.perf_counter() - began, cache=kept)
    return rows


def _add(rows: Rows, what: str, folder: str, ids: dict[str, Tensor], *, seconds: float, cache: float) -> None:
    """Measure one folder through stock transformers and keep the row."""
    model = load_stock(folder)
    by_text = {name: measure_quality(model, ids_T, 0).perplexity for name, ids_T in ids.items()}
    rows.add(what=what, cache=cache, by_text=by_text, seconds=seconds)
    print(what, {name: round(value, 2) for name, value in by_text.items()}, f"{seconds:.0f} s", flush=True)


def render(mine: RealModel, rows: Rows) -> str:
    """Returns the report."""
    (dense,) = rows.find(what="dense")
    names = list(dense["by_text"])
    perplexities = " | ".join(f"{dense['by_text'][name]:.2f}" for name in names)
    lines = [
        f"# {Path(mine.source).name}: what conversion keeps",
        "",
        f"`{command_line()}`",
        "",
        f"{circumstances()} Perplexity over the dense model's through stock transformers, without BOS, "
        f"{mine.tokens:,} tokens of each text in windows of 512; no text was calibrated on.",
        "",
        f"| | cache kept | {' | '.join(names)} | mean | seconds |",
        f"|---|---|{'---|' * (len(names) + 2)}",
        f"| dense, perplexity | | {perplexities} | | |",
    ]
    for row in rows.rows:
        if row["what"] != "dense":
            ratios = [row["by_text"][name] / dense["by_text"][name] for name in names]
            told = " | ".join(f"{ratio:.3f}" for ratio in [*ratios, sum(ratios) / len(ratios)])
            lines.append(f"| {row['what']} | {row['cache']:.1%} | {told} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main(mine: RealModel) -> int:
    """Measure, write, print."""

    def run() -> tuple[Path, str, None]:
        rows = measure(mine)
        return rows.path, render(mine, rows), None

    return present(run, plots=False)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RealModel)))
