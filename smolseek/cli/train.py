"""The verbs train and data."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolseek.cli.shared import (
    Device,
    ProgressLines,
    StoppedBySignal,
    deferred_signals,
    leads,
    progress_bars,
    quiet_libraries,
    said_once,
)
from smolseek.config import Recipe

if TYPE_CHECKING:
    from tqdm import tqdm

    from smolseek.training.watcher import Progress


@dataclass(frozen=True)
class Train(Recipe):
    """Run a recipe: convert its source (or start from random weights), train, compare, and print a table.

    RECIPE is a YAML file; its keys are the options below, which change them. Without one it is the quickstart,
    recipes/quickstart.yaml.
    """

    resume: bool = False
    """Continue the run in its folder."""
    force: bool = False
    """Delete an earlier run of this name."""
    device: Device = "cpu"
    """Where to train."""
    runs: Path = Path("runs")
    """Folder of the run folders."""


@dataclass(frozen=True)
class Data(Recipe):
    """Show statistics of a recipe's text (data stats RECIPE): documents, tokens, malformed lines, first rows.

    RECIPE is a YAML file; its keys are the options below, which change them. Without one it is the quickstart,
    recipes/quickstart.yaml.
    """

    limit: int = 2000
    """Documents to read of each hub data set; local sources are read to their end."""
    json: bool = False
    """Print JSON."""


class RunDisplay:
    """What a run shows: its stages line by line, and while it trains a bar on a terminal, else lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm[Any] | None = None
        self.lines = None if sys.stderr.isatty() or not leads() else ProgressLines()

    def on_stage(self, stage: str) -> None:
        """End the bar, and print the stage."""
        self.close()
        if leads():
            print(f"[{self.name}] {stage}", flush=True)

    def on_step(self, progress: Progress) -> None:
        """Move the bar on by a step; begin it if there is none."""
        from tqdm import tqdm

        if self.bar is None:
            shows = leads() and self.lines is None
            self.bar = tqdm(
                total=progress.steps, initial=progress.step - 1, unit="step", mininterval=1.0, disable=not shows
            )
        self.bar.total = progress.steps  # fewer if a stage ended early
        held_out = "" if progress.held_out_loss is None else f", held out {progress.held_out_loss:.4f}"
        self.bar.set_postfix_str(
            f"loss {progress.loss:.4f}{held_out}, {progress.tokens_per_second:,.0f} tok/s", refresh=False
        )
        self.bar.update()
        if self.lines is not None:
            self.lines("train", progress.step, progress.steps)

    def close(self) -> None:
        """End the bar if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def run_train(command: Train) -> int | None:
    quiet_libraries()
    from smolseek.numerics.precision import check_device
    from smolseek.numerics.shares import FailedElsewhere
    from smolseek.run import run_recipe
    from smolseek.summary import render_summary
    from smolseek.training.watcher import Interrupted, Watcher

    recipe = Recipe(**{f.name: getattr(command, f.name) for f in dataclasses.fields(Recipe)})
    with said_once():
        check_device(command.device)
    folder, display = command.runs / recipe.name, RunDisplay(recipe.name)

    # There is a bar while steps are being trained. A signal then waits for the end of the step, and the state is saved.
    with deferred_signals(defer=lambda: display.bar is not None) as received, progress_bars() as on_progress:
        watcher = Watcher(display.on_stage, display.on_step, lambda: bool(received), on_progress)
        try:
            summary = run_recipe(
                recipe, folder, device=command.device, resume=command.resume, force=command.force, watcher=watcher
            )
        except Interrupted as stopped:
            raise StoppedBySignal(str(stopped), received[0] if received else signal.SIGTERM) from None
        except FailedElsewhere:
            return 2
        finally:
            display.close()
    if not leads():
        return None
    print(f"\n{render_summary(summary)}\n\nThe folder: {folder / 'model'} (stock: any transformers loads it)")
    print(f"Talk to it: smolseek generate {shlex.quote(str(folder / 'model'))} --prompt 'The function returns'")
    print("A real one: python train.py recipes/smollm2-135m.yaml (SmolLM2-135M from the hub, 12,001 steps)")
    return None


def run_data(command: Data) -> None:
    quiet_libraries()
    from smolseek.checkpoint.hub import load_tokenizer
    from smolseek.checkpoint.source import resolve_folder
    from smolseek.data.statistics import measure_data, render
    from smolseek.formats.files import TOKENIZER_FILES
    from smolseek.training.stages import stages_of, step_tokens
    from smolseek.training.start import corpus_tokenizer

    name = command.tokenizer or command.source
    if name is None and not command.train_tokenizer_entries:
        raise ValueError("recipe: no tokenizer to count with; set tokenizer, source or train_tokenizer_entries")
    tokenizer = (
        load_tokenizer(resolve_folder(name, only=("config.json", *TOKENIZER_FILES)))
        if name
        else corpus_tokenizer(command)
    )
    trained = sum(stage.steps * step_tokens(stage) for stage in stages_of(command.train))
    statistics = measure_data(command, tokenizer, limit=command.limit, trained_tokens=trained)
    print(json.dumps(statistics.to_dict(), indent=2) if command.json else render(statistics))
