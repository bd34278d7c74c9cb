"""Tokens per second in llama.cpp: a dense model against what it was converted into, and smolseek's own decoding beside.

python benchmarks/llamacpp_speed.py --dense SmolLM2-135M --converted smol-v3 --out smollm2

Both are written as GGUF files of the same type. Each has sequences of its own whose caches hold random tokens; the
competitors take turns, round by round, in one process. A figure is the median over the rounds, its spread half their
range. The order is that of what tells most: after `--minutes` no other combination begins, and the same command goes on
later with those that have no row yet.

Shapes: B sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from circumstances import circumstances, command_line
from decode import Step, turn
from dense_gguf import write_dense_gguf
from llamacpp import Decoder, LlamaCpp, shared_library
from rows import Row, Rows, present
from torch import Tensor

from smolseek.checkpoint.hub import load
from smolseek.checkpoint.source import resolve_folder
from smolseek.export.gguf import export_gguf
from smolseek.model import DeepseekV3
from smolseek.model.inference import prepare_for_generation

DENSE, CONVERTED, OURS = "dense, llama.cpp", "converted, llama.cpp", "converted, smolseek"
Kind = Literal["f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class Speed:
    """Decode with a dense model and a converted one in llama.cpp."""

    dense: str
    """Folder of the dense Llama."""
    converted: str
    """Folder of the DeepSeek-V3 made of it."""
    types: tuple[Kind, ...] = ("f16", "q8_0")
    """Types of the GGUF files; smolseek runs beside f16 and bf16, in bfloat16."""
    cached: tuple[int, ...] = (512, 4096, 8192)
    """Tokens in each sequence's cache before the first step."""
    batches: tuple[int, ...] = (1, 8)
    """Sequences at once."""
    rounds: int = 5
    """Turns of each competitor."""
    steps: int = 8
    """Tokens per turn and sequence."""
    threads: int = 2
    """CPU threads of every competitor."""
    minutes: float = 10.0
    """After so long no other combination begins."""
    out: str = "run"
    """NAME in results/DATE-llamacpp-speed-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report and JSON lines go."""


@dataclass(frozen=True)
class Cell:
    """One combination."""

    kind: Kind
    flash: bool
    cached: int
    batch: int


def passes(mine: Speed) -> list[list[Cell]]:
    """Returns the combinations, those that tell most first; a list has one type, with or without flash attention.

    In a list the caches grow, so that they are filled once. The longest caches come last, for they take as long to
    fill as all others together.
    """
    *shorter, longest = sorted(mine.cached)
    return [
        [Cell(kind, flash, cached, batch) for cached in lengths for batch in sorted(mine.batches)]
        for lengths in (shorter, [longest])
        for flash in (True, False)
        for kind in mine.types
        if lengths
    ]


def compare(mine: Speed) -> Rows:
    """Measure the combinations that have no row yet, for `minutes` at most and then to the end of the one begun."""
    shared_library()
    torch.set_num_threads(mine.threads)
    free = ("types", "cached", "batches", "minutes", "results")
    named = dataclasses.replace(mine, dense=Path(mine.dense).name, converted=Path(mine.converted).name)
    rows = Rows(mine.results, f"llamacpp-speed-{mine.out}", named, free=free)
    end = time.monotonic() + 60 * mine.minutes
    with tempfile.TemporaryDirectory() as scratch:
        for cells in passes(mine):
            left = [cell for cell in cells if not rows.find(**vars(cell))]
            if left and time.monotonic() < end:
                with _competitors(mine, Path(scratch), left) as competitors:
                    _measure(mine, rows, competitors, left, end)
    return rows


class Ours:
    """smolseek's own decoding of the converted model, its cache filled with random numbers."""

    def __init__(self, folder: str) -> None:
        model = load(folder)
        assert isinstance(model, DeepseekV3)
        self._model = model.eval().to(torch.bfloat16)
        prepare_for_generation(self._model)

    def start(self, batch: int, cached: int, room: int) -> Step:
        """Returns a step, (B, 1) ids to (B, 1) ids."""
        cache = self._model.new_cache(batch, cached + room)
        cache.entries_LBSW.normal_()
        cache.length = cached

        def step(ids_B1: Tensor) -> Tensor:
            return self._model.lm_head(self._model.hidden_states(ids_B1, cache=cache)[:, -1:]).argmax(-1)

        return step


@contextlib.contextmanager
def _competitors(mine: Speed, scratch: Path, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """Gives the two models in llama.cpp, and ours at equal bytes a weight, once for flash attention on and off."""
    kind, flash = cells[0].kind, cells[0].flash
    room = {"tokens": max(cell.cached for cell in cells) + mine.steps + 2, "threads": mine.threads, "flash": flash}
    with contextlib.ExitStack() as opened:
        competitors: dict[str, Any] = {}
        for name in (DENSE, CONVERTED):
            model = opened.enter_context(LlamaCpp(_file(mine, scratch, name, kind)))
            sequences = max(cell.batch for cell in cells)
            competitors[name] = opened.enter_context(Decoder(model, sequences=sequences, **room))
        if flash and kind != "q8_0":
            competitors[OURS] = Ours(mine.converted)
        yield competitors


def _file(mine: Speed, scratch: Path, name: str, kind: Kind) -> Path:
    """Returns the GGUF file of one model, written at the first call."""
    path = scratch / f"{'dense' if name == DENSE else 'converted'}-{kind}.gguf"
    if not path.exists() and name == DENSE:
        write_dense_gguf(resolve_folder(mine.dense), path, kind)
    elif not path.exists():
        export_gguf(mine.converted, path, type=kind)
    return path


@torch.inference_mode()
def _measure(mine: Speed, rows: Rows, competitors: dict[str, Any], cells: list[Cell], end: float) -> None:
    """Add a row for each competitor and combination."""
    filled = 0
    for cell in cells:
        if time.monotonic() >= end:
            return
        if cell.cached != filled:
            filled = cell.cached
            for name in (DENSE, CONVERTED):
                competitors[name].fill(filled)
        seconds: dict[str, list[float]] = {name: [] for name in competitors}
        for _ in range(mine.rounds):
            for name, competitor in competitors.items():
                if name == OURS:
                    step = competitor.start(cell.batch, cell.cached, mine.steps + 2)
                else:
                    competitor.rewind()
                    step = competitor.step
                seconds[name].append(turn(step, cell.batch, mine.steps, "cpu"))
        for name, measured in seconds.items():
            rows.add(competitor=name, **vars(cell), seconds=measured)
            print(f"  {cell}: {name} {statistics.median(measured) * 1e3:.1f} ms", flush=True)


# -- report -----------------------------------------------------------------------------------------------------------


def report(mine: Speed, rows: list[Row], command: str) -> str:
    """Returns the comparison as Markdown."""
    wanted = [cell for cells in passes(mine) for cell in cells]
    done = [cell for cell in wanted if any(vars(cell).items() <= row.items() for row in rows)]
    about = (
        f"llama.cpp (xllamacpp {version('xllamacpp')}, f16 caches), {mine.threads} threads each; medians of "
        f"{mine.rounds} turns of {mine.steps} steps ± half the range. {OURS} has bfloat16. "
        f"{len(done)} of {len(wanted)} combinations are measured; the same command goes on."
    )
    lines = [
        "| type | flash attention | cached | batch | | ms per step | tokens/s | over dense |",
        "|" + "---|" * 8,
    ]
    for cell in done:
        found = {row["competitor"]: row["seconds"] for row in rows if vars(cell).items() <= row.items()}
        dense = statistics.median(found[DENSE])
        for name, seconds in found.items():
            median, spread = statistics.median(seconds), (max(seconds) - min(seconds)) / 2
            cells = [cell.kind, "on" if cell.flash else "off", f"{cell.cached:,}", f"{cell.batch}", name]
            cells += [
                f"{median * 1e3:.1f} ± {spread * 1e3:.1f}",
                f"{cell.batch / median:,.0f}",
                f"{dense / median:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    title = f"# Decoding in llama.cpp: {mine.out}"
    return "\n\n".join([title, f"`{command}`", circumstances(), about, "\n".join(lines)]) + "\n"


def main() -> int:
    """Measure, write the report, print it."""
    mine = tyro.cli(Speed, description=__doc__)

    def measure() -> tuple[Path, str, None]:
        try:
            rows = compare(mine)
        except ImportError as error:
            raise ValueError(str(error)) from error
        return rows.path, report(mine, rows.rows, command_line()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
