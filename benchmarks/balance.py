"""Does balancing by biases balance the experts, at no cost? Runs that differ only in their balancing.

python benchmarks/balance.py [SOURCE] [--train TEXT ... --held-out TEXT ...] [--steps N] [--seeds 0 1 2] [--out NAME]

The dense source is converted to experts once. The routing biases that the conversion found are set to zero, so every
run starts unbalanced, as routers become when nothing balances them. MaxVio is that of the worst layer, over all
held-out tokens; beside it is the mean over batches as large as a training step's, whose noise floor is higher. An
expert is dead if it takes less than 1% of its fair share of the held-out tokens. `shuffled` is the rise of the held-out
loss when each token goes to random experts. It is 0 where routing has no meaning, and such routers balance at no cost.
Every run is written as a JSON line once it is measured: the same command goes on where it stopped, within a run at its
last checkpoint.

Shapes: B windows, L layers with experts, E n_routed_experts, N tokens in one row.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from circumstances import circumstances, command_line
from convert_quality import mean_and_spread
from rows import Row, Rows, present
from torch import Tensor

from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.checkpoint.source import resolve_folder
from smolseek.config import ConvertSettings, DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.conversion.pipeline import convert
from smolseek.evaluation import measure_quality
from smolseek.model.balance import max_violation, take_expert_counts
from smolseek.model.experts import TopkRouter
from smolseek.reporting.figures import load_chart
from smolseek.reporting.png import draw
from smolseek.reporting.read import read_run
from smolseek.training.loop import Trainer, Watcher

START, DEAD = "before training", 0.01


@dataclass(frozen=True)
class Comparison:
    """Train one converted model with every kind of balancing."""

    source: tyro.conf.Positional[str] = "builtin:base"
    """Dense checkpoint: folder, hub id or builtin:base."""
    train: tuple[str, ...] = ("builtin:python",)
    """Text to train on and to calibrate the conversion with."""
    held_out: tuple[str, ...] = ()
    """Text to measure on; none: the part of the training text that is held out."""
    methods: tuple[str, ...] = ("nothing", "sign", "proportional", "quantile", "loss:1e-3", "loss:1e-2")
    """What balances: nothing; a rule of the bias updates, optionally with its speed (sign:3e-3); loss:WEIGHT, the
    auxiliary loss over the batch without bias updates; or sequence:WEIGHT, sign updates with the sequence-wise loss."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws another order of batches."""
    steps: int = 600
    """Optimizer steps of a run."""
    batch_windows: int = 8
    """Windows in a batch."""
    window_tokens: int = 256
    """Tokens in a window."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    text_tokens: int = 65536
    """Held-out tokens."""
    experts: Literal["carve", "upcycle"] = "carve"
    """How experts are made: carved neurons with a fitted router, or copies that only training makes different."""
    active: float = 0.5
    """Share of the neurons that a token meets (carve). MaxVio is at most E / K - 1: a larger share hides imbalance."""
    cache: float | None = None
    """Share of the source's cache to keep; none: the conversion's own choice."""
    refine_steps: int = 100
    """Layer-wise steps of the conversion."""
    pictures: tuple[str, ...] = ("nothing", "sign")
    """Methods for which a picture shows every expert's load over the first seed's run."""
    out: str = "run"
    """NAME in results/DATE-balance-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report, plot and JSON lines go."""
    work: Path = Path("runs/balance")
    """Where the converted folder and the runs live."""


def train_settings(method: str, mine: Comparison) -> TrainSettings:
    """Returns the recipe's `train` for one method.

    Raises:
        ValueError: the method is none of those above.
    """
    kind, _, number = method.partition(":")
    try:
        value = float(number) if number else None
    except ValueError:
        value = -1.0
    loss = {"loss": "batch", "sequence": "sequence"}.get(kind)
    fields: dict[str, Any] = {"balance_update_speed": 0.0} if kind in ("nothing", "loss") else {}
    if loss and value and value > 0:
        fields |= {"balance_loss": loss, "balance_loss_weight": value}
    elif kind in ("sign", "proportional", "quantile") and (value is None or value > 0):
        fields |= {"balance_rule": kind, "balance_update_speed": value}
    elif method != "nothing":
        raise ValueError(
            f"methods {method}: is none of nothing, sign, proportional, quantile (with :u or without), loss:WEIGHT and "
            "sequence:WEIGHT"
        )
    return TrainSettings(
        steps=mine.steps,
        batch_windows=mine.batch_windows,
        window_tokens=mine.window_tokens,
        learning_rate=mine.learning_rate,
        warmup_steps=max(1, mine.steps // 20),
        evaluate_every=mine.steps,
        checkpoint_every=100,
        log_every=max(1, mine.steps // 200),
        **fields,
    )


# -- measurements -----------------------------------------------------------------------------------------------------


def compare(mine: Comparison) -> Rows:
    """Train and measure everything in the comparison that has no row yet."""
    for method in mine.methods:
        train_settings(method, mine)
    rows = Rows(mine.results, f"balance-{mine.out}", mine, free=("seeds", "methods", "pictures", "results", "work"))
    work = mine.work / mine.out
    start = _converted(mine, work / "converted")
    for seed in mine.seeds:
        for method in mine.methods:
            if not rows.find(method=method, seed=seed):
                run = work / f"{method.replace(':', '-')}-{seed}"
                trainer = _trainer(mine, start, method, seed, run)
                if not rows.find(method=START):
                    rows.add(method=START, seed=seed, **measure(trainer))
                row = {"method": method, "seed": seed, **_train(trainer)}
                if method in mine.pictures and seed == mine.seeds[0]:
                    draw(load_chart(read_run(run, method)), rows.path.with_name(f"{rows.path.stem}-load-{method}.png"))
                rows.add(**row)
                print(f"  {method:16} seed {seed}  loss {row['loss']:.4f}  MaxVio {row['maxvio']:.3f}", flush=True)
                shutil.rmtree(run)
    return rows


def _converted(mine: Comparison, folder: Path) -> Path:
    """Convert the source to experts if that is not done yet; an interrupted conversion goes on."""
    if not folder.exists():
        settings = ConvertSettings(
            calibration=mine.train,
            experts=mine.experts,
            active=mine.active if mine.experts == "carve" else None,
            cache=mine.cache,
            refine_steps=mine.refine_steps,
            distill_steps=0,
        )
        convert(mine.source, folder, settings=settings)
    return folder


def _trainer(mine: Comparison, start: Path, method: str, seed: int, folder: Path) -> Trainer:
    """Returns the run of one method, from biases of zero, or at its last checkpoint if there is one."""
    model = load(start)
    for router in routers(model):
        router.e_score_correction_bias.zero_()
    recipe = Recipe(
        source=mine.source,
        seed=seed,
        data=DataSettings(train=mine.train, held_out=mine.held_out, held_out_tokens=mine.text_tokens),
        train=train_settings(method, mine),
        sample=SampleSettings(every=0, prompts=()),
    )
    trainer = Trainer(model, load_tokenizer(resolve_folder(mine.source)), recipe, folder)
    trainer.resume()
    return trainer


def _train(trainer: Trainer) -> Row:
    """Train to the end; returns what the run logged and what is measured afterwards."""
    trainer.fit(Watcher())
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "maxvio" in line]
    evaluations = [line["experts"] for line in lines if "experts" in line]
    return {
        **measure(trainer),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "curve": [(line["step"], max(line["maxvio"].values())) for line in steps],
        "experts": evaluations[-1],
    }


def measure(trainer: Trainer) -> Row:
    """Returns loss, balance and the loss with shuffled routing, all on the held-out text."""
    model, windows = trainer.model, []
    take_expert_counts(model)
    quality = measure_quality(
        model,
        trainer.held_out.ids_T,
        trainer.held_out.text_bytes,
        on_window=lambda done, count: windows.append([counts_E for _, counts_E in take_expert_counts(model)]),
    )
    counts_BLE = torch.stack([torch.stack(layers) for layers in windows])
    with shuffled_routing(model):
        shuffled = trainer.measure(model)
    take_expert_counts(model)
    per_batch = max(1, round(trainer.step_tokens * len(windows) / len(trainer.held_out.ids_T)))
    fair_L1 = counts_BLE.sum(0).double().mean(1, keepdim=True)
    return {
        "loss": quality.loss,
        "shuffled_loss": shuffled.loss,
        "maxvio": worst(counts_BLE.sum(0)),
        "maxvio_batch": statistics.mean(worst(part.sum(0)) for part in counts_BLE.split(per_batch)),
        "dead": int((counts_BLE.sum(0) < DEAD * fair_L1).sum()),
        "expert_layers": counts_BLE.shape[1],
        "experts_per_layer": counts_BLE.shape[2],
    }


def worst(counts_LE: Tensor) -> float:
    """Returns the MaxVio of the worst layer."""
    return max(max_violation(counts_E) for counts_E in counts_LE)


def routers(model: torch.nn.Module) -> list[TopkRouter]:
    """Returns the routers, first layer first."""
    return [module for module in model.modules() if isinstance(module, TopkRouter)]


@contextlib.contextmanager
def shuffled_routing(model: torch.nn.Module) -> Iterator[None]:
    """Sends every token to random experts inside the block, by groups as always, weighed by its own scores."""
    generator = torch.Generator().manual_seed(0)

    def at_random(router: TopkRouter) -> Any:
        return lambda biased_NE: TopkRouter.choose(router, torch.rand(biased_NE.shape, generator=generator))

    for router in routers(model):
        router.choose = at_random(router)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers(model):
            del router.choose


# -- report -----------------------------------------------------------------------------------------------------------


def report(rows: Rows, mine: Comparison, command: str) -> str:
    """Returns the comparison as Markdown."""
    first = rows.rows[0]
    experts = f"{first['experts_per_layer']} experts in each of {first['expert_layers']} layers"
    about = (
        f"{mine.source}, experts by {mine.experts}, {experts}; {mine.steps} steps of "
        f"{mine.batch_windows * mine.window_tokens:,} tokens; {mine.text_tokens:,} held-out tokens at most; "
        f"mean over {len(mine.seeds)} seed{'s' if len(mine.seeds) > 1 else ''} ± half the range. `run` is the mean "
        "MaxVio of the global batch over the last tenth of the steps."
    )
    columns = ["", "held-out loss", "MaxVio", "per batch", "run", "dead", "shuffled", "routing told by token", "tok/s"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for method in (START, *mine.methods):
        lines.append("| " + " | ".join(_cells(method, rows.find(method=method))) + " |")
    title = f"# Balancing: {mine.out}, {rows.path.name[:10]}"
    return "\n\n".join((title, f"`{command}`\n\n{circumstances()}\n\n{about}", "\n".join(lines))) + "\n"


def _cells(method: str, found: list[Row]) -> list[str]:
    cells = [method]
    for key, digits in (("loss", 4), ("maxvio", 3), ("maxvio_batch", 3)):
        cells.append(mean_and_spread([row[key] for row in found], digits))
    ran = [row for row in found if "curve" in row]
    cells.append(mean_and_spread([_late(row["curve"]) for row in ran]) if ran else "")
    cells.append(mean_and_spread([float(row["dead"]) for row in found], 1))
    cells.append(mean_and_spread([row["shuffled_loss"] - row["loss"] for row in found]))
    told = [statistics.mean(row["experts"]["routing"].values()) for row in ran]
    cells.append(mean_and_spread(told) if ran else "")
    cells.append(mean_and_spread([row["tokens_per_second"] for row in ran], 0) if ran else "")
    return cells


def _late(curve: list[tuple[int, float]]) -> float:
    return statistics.mean(value for _, value in curve[-max(1, len(curve) // 10) :])


def plot(rows: Rows, mine: Comparison, path: Path) -> None:
    """Plot MaxVio of the global batch over the run, a line for each method: the mean over seeds, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in mine.methods:
        curves = [row["curve"] for row in rows.find(method=method)]
        if curves:
            mean = [statistics.mean(points) for points in zip(*([v for _, v in c] for c in curves), strict=True)]
            width = max(1, len(mean) // 20)
            smooth = [statistics.mean(mean[max(0, i - width + 1) : i + 1]) for i in range(len(mean))]
            axes.plot([step for step, _ in curves[0]], smooth, label=method)
    axes.set(xlabel="step", ylabel="MaxVio of the worst layer, global batch", yscale="log", title=mine.out)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Train, measure, write the report and the plots, print the report."""
    mine = tyro.cli(Comparison, description=__doc__)

    def measure() -> tuple[Path, str, Callable[[Path], None]]:
        rows = compare(mine)
        return rows.path, report(rows, mine, command_line()), functools.partial(plot, rows, mine)

    return present(measure)


if __name__ == "__main__":
    sys.exit(main())
