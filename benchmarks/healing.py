"""What heals a converted model best? Held-out perplexity against tokens trained, by loss and by optimizer.

python benchmarks/healing.py CONVERTED --teacher DENSE --train TEXT ... --held-out TEXT ...

Compares cross-entropy, distillation, and distillation followed by cross-entropy, each with AdamW and with Muon. The
control is the dense model trained on the same tokens, which is what a user could do instead. Every run is written as a
JSON line beside the report when it ends. The same command goes on from the last checkpoint of an interrupted run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from circumstances import circumstances, command_line
from convert_quality import BUILTIN_TEXT, mean_and_spread
from rows import Row, Rows, present

from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
from smolseek.checkpoint.source import resolve_folder
from smolseek.config import DataSettings, Recipe, SampleSettings, load_recipe, recipes_folder
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import measure_quality
from smolseek.run import run_recipe
from smolseek.training.stages import step_tokens

Arm = Literal["cross-entropy", "distillation", "distillation, then cross-entropy", "dense on the same tokens"]
Optimizer = Literal["adamw", "muon"]
ENTROPY, DISTILLED, FIRST, DENSE = Arm.__args__  # type: ignore[attr-defined]
NAMES = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Healing:
    """Heal SOURCE every way and compare the results."""

    source: tyro.conf.Positional[str]
    """Converted checkpoint: a folder or hub id."""
    teacher: str
    """The dense checkpoint that it was made from: folder, hub id or builtin:base."""
    train: tuple[str, ...]
    """Text to train on."""
    held_out: tuple[str, ...]
    """Text for perplexity; builtin:python is its held-out split, any other text must not be training text."""
    arms: tuple[Arm, ...] = (ENTROPY, DISTILLED, FIRST, DENSE)
    """Losses to compare."""
    optimizers: tuple[Optimizer, ...] = ("adamw", "muon")
    """Optimizers to train with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws another order of the training text."""
    steps: int = 600
    """Optimizer steps of recipes/heal.yaml."""
    batch_windows: int = 8
    """Windows in a step."""
    window_tokens: int = 512
    """Tokens in a window (or the model's limit)."""
    evaluations: int = 8
    """Points of a curve."""
    adamw_rate: float = 5e-4
    """Peak learning rate with AdamW."""
    muon_rate: float = 5e-4
    """Peak learning rate of Muon, and of AdamW for the parameters that Muon does not train."""
    distill_weight: float = 0.9
    """Weight of the KL in the loss while distilling."""
    distill_temperature: float = 1.0
    """Temperature of the KL."""
    distill_share: float = 0.5
    """Share of the steps that distil when cross-entropy follows."""
    text_tokens: int = 65536
    """Tokens of held-out text that are read at most."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""
    out: str = "run"
    """NAME in results/DATE-healing-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report, plot and JSON lines go."""
    work: Path = Path("runs/healing")
    """Where runs live until they are measured."""


class Bench:
    """Rows of one comparison, and the recipe of every run in it."""

    def __init__(self, healing: Healing) -> None:
        both = set(healing.train) & set(healing.held_out) - {BUILTIN_TEXT}
        if both:
            raise ValueError(f"held-out text {min(both)}: is training text too; name text that no run trains on")
        self.healing = healing
        self.folders = {"start": resolve_folder(healing.source), "dense": resolve_folder(healing.teacher)}
        self.data = DataSettings(
            train=healing.train,
            held_out=() if BUILTIN_TEXT in healing.held_out else healing.held_out,
            held_out_tokens=healing.text_tokens,
            separator=healing.separator,
        )
        self.kept = Rows(
            healing.results, f"healing-{healing.out}", healing, free=("seeds", "arms", "optimizers", "results", "work")
        )
        self.lines, self.rows = self.kept.path, self.kept.rows

    def recipe(self, arm: Arm, optimizer: Optimizer, seed: int) -> Recipe:
        """Returns recipes/heal.yaml with this run's own settings."""
        mine = self.healing
        heal = load_recipe(recipes_folder() / "heal.yaml")
        limit = json.loads((self.folders["start"] / "config.json").read_text())["max_position_embeddings"]
        distils = arm in (DISTILLED, FIRST)
        train = dataclasses.replace(
            heal.train,
            steps=mine.steps,
            batch_windows=mine.batch_windows,
            window_tokens=min(mine.window_tokens, limit),
            warmup_steps=min(heal.train.warmup_steps, mine.steps // 10),
            optimizer=optimizer,
            learning_rate=mine.muon_rate if optimizer == "muon" else mine.adamw_rate,
            distill_weight=mine.distill_weight if distils else 0.0,
            distill_temperature=mine.distill_temperature,
            distill_steps=round(mine.distill_share * mine.steps) if arm == FIRST else None,
            evaluate_every=max(1, mine.steps // mine.evaluations),
            checkpoint_every=max(1, mine.steps // mine.evaluations),
            stages=(),
        )
        return dataclasses.replace(
            heal,
            source=str(self.folders["dense" if arm == DENSE else "start"]),
            teacher=str(self.folders["dense"]) if distils else None,
            seed=seed,
            data=self.data,
            train=train,
            sample=SampleSettings(every=0, max_new_tokens=8),
        )


def compare(healing: Healing) -> Bench:
    """Make every run of the comparison that has no row yet."""
    bench = Bench(healing)
    for what, folder in bench.folders.items():
        if not bench.kept.find(what=what):
            ids_T, _, text_bytes = pack(load_tokenizer(folder), held_out_documents(bench.data), healing.text_tokens)
            quality = measure_quality(load_for_evaluation(folder), ids_T, text_bytes)
            row = {"loss": quality.loss, "perplexity": quality.perplexity, "tokens": quality.tokens}
            bench.kept.add(what=what, **row, seconds=None)
    for seed in healing.seeds:
        for optimizer in healing.optimizers:
            for arm in healing.arms:
                if not bench.kept.find(what=arm, optimizer=optimizer, seed=seed):
                    _heal(bench, arm, optimizer, seed)
    return bench


def _heal(bench: Bench, arm: Arm, optimizer: Optimizer, seed: int) -> None:
    """Make one run: its curve is the model's in training, its last perplexity stock transformers' on the folder."""
    recipe = bench.recipe(arm, optimizer, seed)
    name = f"{arm.replace(', ', '-').replace(' ', '-')}-{optimizer}-{seed}"
    run = bench.healing.work / bench.healing.out / name
    begin = time.perf_counter()
    summary = run_recipe(recipe, run, resume=run.exists())
    seconds = time.perf_counter() - begin
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = step_tokens(recipe.train)
    curve = [[(line["step"] + 1) * tokens, line["held_out"]["loss"]] for line in lines if "held_out" in line]
    own = summary["healed" if "healed" in summary else "trained"]
    last = {key: own[key] for key in ("loss", "perplexity")}
    about = {"what": arm, "optimizer": optimizer, "seed": seed, "rate": recipe.train.learning_rate}
    bench.kept.add(**about, **last, maxvio=summary.get("maxvio"), curve=curve, seconds=seconds)
    shutil.rmtree(run)


# -- report -----------------------------------------------------------------------------------------------------------


def grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the runs of each (arm, optimizer), one for each seed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "optimizer" in row:
            groups.setdefault((row["what"], row["optimizer"]), []).append(row)
    return groups


def report(bench: Bench, command: str) -> str:
    """Returns the comparison as Markdown."""
    dense, start = ({row["what"]: row for row in bench.rows}[what] for what in ("dense", "start"))
    mine = bench.healing
    seeds = f"{len(mine.seeds)} seeds" if len(mine.seeds) > 1 else "one seed"
    train = bench.recipe(ENTROPY, "adamw", 0).train
    about = (
        f"Held-out perplexity on {dense['tokens']:,} tokens: the dense model {dense['perplexity']:.3f}, converted "
        f"{start['perplexity']:.3f} ({start['perplexity'] / dense['perplexity']:.3f} of it). {mine.steps} steps of "
        f"{step_tokens(train):,} tokens, mean over {seeds} ± half the range. At the last step through stock "
        "transformers from the written folder, before it from the model in training. Distillation is "
        f"{mine.distill_weight:g} KL and the rest cross-entropy; where cross-entropy follows, for the first "
        f"{mine.distill_share:.0%} of the steps."
    )
    parts = [f"# Healing: {mine.out}, {bench.lines.name[:10]}", f"`{command}`", circumstances(), about]
    parts += ["\n".join(_table(bench, dense["perplexity"]))]
    parts += ["## Perplexity against tokens trained", "\n".join(_curves(bench))]
    return "\n\n".join(parts) + "\n"


def _table(bench: Bench, dense: float) -> Iterator[str]:
    """Returns the lines of the table; the last ratio is to the dense model trained with its better optimizer."""
    groups = grouped(bench.rows)
    columns = ["loss", "optimizer", "rate", "perplexity", "over dense", "over dense trained", "MaxVio", "seconds"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    controls = [rows for (arm, _), rows in groups.items() if arm == DENSE]
    control = min((statistics.mean(row["perplexity"] for row in rows) for rows in controls), default=None)
    for (arm, optimizer), rows in groups.items():
        perplexities = [row["perplexity"] for row in rows]
        cells = [arm, NAMES[optimizer], f"{rows[0]['rate']:g}", mean_and_spread(perplexities, 3)]
        cells.append(mean_and_spread([p / dense for p in perplexities], 4))
        cells.append("" if control is None else mean_and_spread([p / control for p in perplexities], 4))
        violations = [row["maxvio"] for row in rows if row["maxvio"] is not None]
        cells.append(mean_and_spread(violations, 2) if violations else "")
        cells.append(mean_and_spread([row["seconds"] for row in rows], 0))
        yield "| " + " | ".join(cells) + " |"


def _curves(bench: Bench) -> Iterator[str]:
    """Returns the lines of a table of the curves, means over seeds."""
    groups = grouped(bench.rows)
    points = [tokens for tokens, _ in next(iter(groups.values()))[0]["curve"]] if groups else []
    yield "| | " + " | ".join(f"{tokens / 1e6:.2f}M" for tokens in points) + " |"
    yield "|" + "---|" * (len(points) + 1)
    for (arm, optimizer), rows in groups.items():
        _, means, _, _ = _curve(rows)
        yield f"| {arm}, {NAMES[optimizer]} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"


def _curve(rows: list[Row]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Returns the tokens of each point, and the mean, lowest and highest perplexity there."""
    tokens = [point for point, _ in rows[0]["curve"]]
    values = [[math.exp(loss) for _, loss in row["curve"]] for row in rows]
    columns = list(zip(*values, strict=True))
    return tokens, [statistics.mean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def plot(bench: Bench, path: Path) -> None:
    """Plot perplexity against tokens trained: a colour for each loss, dashed for Muon, a band over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    first = {row["what"]: row["perplexity"] for row in bench.rows if "optimizer" not in row}
    for (arm, optimizer), rows in grouped(bench.rows).items():
        tokens, means, lowest, highest = _curve(rows)
        begin = first["dense" if arm == DENSE else "start"]
        millions = [0.0, *(point / 1e6 for point in tokens)]
        colour = f"C{(ENTROPY, DISTILLED, FIRST, DENSE).index(arm)}"
        style = "--" if optimizer == "muon" else "-"
        axes.plot(millions, [begin, *means], color=colour, linestyle=style, label=f"{arm}, {NAMES[optimizer]}")
        axes.fill_between(millions, [begin, *lowest], [begin, *highest], color=colour, alpha=0.15, linewidth=0)
    axes.axhline(first["dense"], color="black", linewidth=0.8, label="dense")
    axes.set(xlabel="tokens trained, millions", ylabel="held-out perplexity", title=bench.healing.out)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Train, write the report and the plot, print the report."""
    healing = tyro.cli(Healing, description=__doc__)

    def measure() -> tuple[Path, str, Callable[[Path], None]]:
        bench = compare(healing)
        return bench.lines, report(bench, command_line()), functools.partial(plot, bench)

    return present(measure)


if __name__ == "__main__":
    sys.exit(main())
