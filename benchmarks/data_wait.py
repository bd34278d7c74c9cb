"""Does training wait for its text? The share of step time that is spent in `WindowStream.next`.

    python benchmarks/data_wait.py SOURCE TEXT [STEPS]

Trains SOURCE (a folder, hub id or builtin:base) on TEXT twice: with windows that a thread makes ahead, and with windows
made on demand. Prints the share of waiting from metrics.jsonl (without its first line, when the shuffle buffer fills),
steps per second, and how fast windows are made when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances, command_line

from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.data.stream import WindowStream
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher


class OnDemand(WindowStream):
    """Windows made on demand."""

    def next(self, count: int) -> torch.Tensor:
        """Returns the next windows, without a thread."""
        if self._ahead is None:
            self._ahead = self.windows()  # type: ignore[assignment]
        return super().next(count)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("steps", type=int, nargs="?", default=100, metavar="STEPS")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = TrainSettings(steps=given.steps, evaluate_every=10**9, checkpoint_every=10**9)
    data = DataSettings(train=(given.text,), held_out_tokens=1024)
    recipe = Recipe(source=given.source, data=data, train=settings, sample=SampleSettings(every=0, prompts=()))
    print(f"{command_line()}\n{circumstances()}\n")
    print(f"windows alone: {tokens_per_second(recipe):,.0f} tokens/s")
    print(f"{'':12}{'waiting':>9}{'worst':>9}{'steps/s':>9}{'tokens/s':>10}")
    for name, kind in (("ahead", WindowStream), ("on demand", OnDemand)):
        shares, speed = train(recipe, kind)
        print(
            f"{name:12}{sum(shares) / len(shares):9.2%}{max(shares):9.2%}{speed:9.2f}"
            f"{speed * settings.batch_windows * settings.window_tokens:10,.0f}"
        )


def tokens_per_second(recipe: Recipe) -> float:
    """Returns the tokens per second that one thread turns into windows."""
    size = recipe.train.window_tokens + 1
    stream = WindowStream(load_tokenizer(str(recipe.source)), recipe.data, window_tokens=size, seed=0)
    windows = stream.windows()
    next(windows)
    start = time.perf_counter()
    made = sum(1 for _ in islice(windows, 2000))
    return made * size / (time.perf_counter() - start)


def train(recipe: Recipe, kind: type[WindowStream]) -> tuple[list[float], float]:
    """Returns the shares of waiting by log line after the first, and steps per second over the same steps."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer: Any = load_tokenizer(str(recipe.source))
        trainer = Trainer(load(str(recipe.source)), tokenizer, recipe, Path(name))
        trainer.stream = kind(tokenizer, recipe.data, window_tokens=recipe.train.window_tokens + 1, seed=recipe.seed)
        times: list[float] = []
        trainer.fit(Watcher(on_step=lambda _: times.append(time.perf_counter())))
        lines = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        shares = [line["data_wait_share"] for line in lines if "loss" in line]
    return shares[1:], (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main()
