"""How well a conversion keeps the model: our stages and the published baselines, at every size, on any source.

python benchmarks/convert_quality.py SOURCE --calibration TEXT ... --held-out TEXT ... [--other-domain TEXT ...]

Perplexity is the project's own (`measure_quality`), through stock transformers from the written folder, on text that no
conversion saw; KL to the dense model is on text of another domain. Every measurement is at once written as a JSON line
beside the report, so the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from baselines import Sizes, TransMLA, mean_loss, supports, ways_to_split, x_ecomla
from circumstances import circumstances, command_line
from rows import Row, Rows, present
from torch import Tensor

from smolseek.checkpoint.hub import load_for_evaluation, load_stock, load_tokenizer, save
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import ConvertSettings, DataSettings, SampleSettings, load_recipe, recipes_folder
from smolseek.conversion.job import calibration_data
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.data import calibration_windows
from smolseek.data.packing import Packed, pack
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import measure_divergence, measure_quality
from smolseek.formats.dense import read_source
from smolseek.model import DeepseekV3, StockModel
from smolseek.run import run_recipe

BUILTIN_TEXT = "builtin:python"
PUBLISHED, REPAIRED = "TransMLA, stock form as published", "TransMLA, stock form, gain repaired"
SVD = "X-EcoMLA's initialisation"
STOCK_BASELINES = (PUBLISHED, REPAIRED, SVD)
STAGES = {"closed": "ours, closed form", "refined": "ours, refined", "distilled": "ours, refined, end-to-end KL"}
HEALED, TRAINED = "ours, healed", "dense, trained on the same tokens"


@dataclass(frozen=True)
class Comparison:
    """Convert SOURCE every way and compare the results."""

    source: tyro.conf.Positional[str]
    """Dense checkpoint: folder, hub id or builtin:base."""
    calibration: tuple[str, ...]
    """Text for conversion and healing."""
    held_out: tuple[str, ...]
    """Text for perplexity; builtin:python is its held-out split, any other text must not be calibration text."""
    other_domain: tuple[str, ...] = ()
    """Text of another domain, for KL to the dense model."""
    shares: tuple[float, ...] = (0.75, 0.5, 0.375, 0.25)
    """Shares of the source's cache to keep."""
    sizes: tuple[str, ...] = ()
    """Sizes RANK+ROPE in place of shares, for baselines too; otherwise a baseline takes its best split of the total."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws calibration windows, batches and everything else anew."""
    active: tuple[float, ...] = (0.75, 0.5)
    """Shares of the neurons that a token meets, for carving."""
    parts: tuple[Literal["attention", "carve", "upcycle"], ...] = ("attention", "carve", "upcycle")
    """What to compare; for carve and upcycle the attention is exact."""
    stages: tuple[Literal["closed", "refined", "distilled"], ...] = ("closed", "refined", "distilled")
    """Stages of ours; healing starts from the last."""
    refine_steps: int | None = None
    """Layer-wise steps; none: the conversion's own number."""
    distill_steps: int | None = None
    """End-to-end KL steps; none: the conversion's own number."""
    heal_steps: int = 0
    """Steps of recipes/heal.yaml on the calibration text after the last stage, and of the dense control; 0: neither."""
    heal_learning_rate: float = 5e-4
    """Peak learning rate of healing: for models of a few million parameters or less."""
    calibration_windows: int = 128
    """Windows of calibration text, for ours and the baselines alike."""
    calibration_window_tokens: int = 256
    """Tokens in one of them."""
    text_tokens: int = 65536
    """Tokens of held-out and of other-domain text that are read at most."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""
    out: str = "run"
    """NAME in results/DATE-convert-quality-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report, plot and JSON lines go."""
    work: Path = Path("runs/convert-quality")
    """Where converted folders and runs live until they are measured."""


class Bench:
    """The dense model, the texts and the rows measured so far, shared by all measurements of one comparison."""

    def __init__(self, comparison: Comparison) -> None:
        both = set(comparison.calibration) & set(comparison.held_out) - {BUILTIN_TEXT}
        if both:
            raise ValueError(f"held-out text {min(both)}: is calibration text too; name text that no conversion sees")
        self.comparison = comparison
        self.folder = resolve_folder(comparison.source)
        self.config = read_config(self.folder)
        self.source = read_source(self.config)
        self.whole = self.source.cache_numbers
        self.tokenizer = load_tokenizer(self.folder)
        self.dense = load_stock(self.folder)
        self.held_out_T, _, self.held_out_bytes = self._text(comparison.held_out)
        self.other_T = self._text(comparison.other_domain).ids_T if comparison.other_domain else None
        free = ("parts", "shares", "active", "seeds", "stages", "results", "work")
        self.kept = Rows(comparison.results, f"convert-quality-{comparison.out}", comparison, free=free)
        self.lines, self.rows = self.kept.path, self.kept.rows

    def _text(self, names: tuple[str, ...]) -> Packed:
        texts = {"train" if BUILTIN_TEXT in names else "held_out": names}
        settings = DataSettings(separator=self.comparison.separator, **texts)  # type: ignore[arg-type]
        return pack(self.tokenizer, held_out_documents(settings), self.comparison.text_tokens)

    def measure(self, model: DeepseekV3 | StockModel) -> Row:
        """Returns loss and perplexity on the held-out text, and KL to the dense model on the other domain's."""
        quality = measure_quality(model, self.held_out_T, self.held_out_bytes)
        row: Row = {"loss": quality.loss, "perplexity": quality.perplexity}
        if self.other_T is not None:
            row |= {
                k: v for k, v in measure_divergence(model, self.dense, self.other_T).to_dict().items() if k != "tokens"
            }
        return row

    def settings(self, seed: int, **fields: Any) -> ConvertSettings:
        """Returns the settings of one conversion of ours."""
        mine = self.comparison
        return ConvertSettings(
            calibration=mine.calibration,
            calibration_windows=mine.calibration_windows,
            calibration_window_tokens=mine.calibration_window_tokens,
            separator=mine.separator,
            seed=seed,
            **fields,
        )

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Returns the label of each cache size and the settings for it."""
        if not self.comparison.sizes:
            return {f"{100 * share:g}%": {"cache": share} for share in self.comparison.shares}
        given = {}
        for label in self.comparison.sizes:
            rank, _, rope = label.partition("+")
            if not (rank.isdecimal() and rope.isdecimal() and int(rope) and self.source.head_dim % int(rope) == 0):
                raise ValueError(f"sizes {label}: must be RANK+ROPE, and ROPE must divide head_dim; for example 24+8")
            given[label] = {"kv_lora_rank": int(rank), "qk_rope_head_dim": int(rope)}
        return given

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """Returns settings that end a conversion after `stage`."""
        fields: dict[str, Any] = {"refine_steps": self.comparison.refine_steps}
        fields |= {"distill_steps": self.comparison.distill_steps if stage == "distilled" else 0}
        if stage == "closed":
            fields["refine_steps"] = 0
        return {name: steps for name, steps in fields.items() if steps is not None}

    def stages(self) -> list[str]:
        """Returns the stages to measure, in order."""
        return [stage for stage in STAGES if stage in self.comparison.stages]


# -- measurements -----------------------------------------------------------------------------------------------------


def compare(comparison: Comparison) -> Bench:
    """Measure everything in the comparison that has no row yet."""
    bench = Bench(comparison)
    if not bench.kept.find(what="dense"):
        bench.kept.add(
            part="dense", size="", what="dense", seed=0, numbers=bench.whole, seconds=None, **bench.measure(bench.dense)
        )
    for seed in comparison.seeds:
        if "attention" in comparison.parts:
            _compare_attention(bench, seed)
        if "carve" in comparison.parts:
            for active in comparison.active:
                _compare_ours(
                    bench, seed, "carve", f"{active:.0%}", {"experts": "carve", "active": active, "exact": True}
                )
        if "upcycle" in comparison.parts:
            _compare_ours(bench, seed, "upcycle", "", {"experts": "upcycle", "exact": True}, stages=["closed"])
        if comparison.heal_steps and not bench.kept.find(what=TRAINED, seed=seed):
            _measure_healed(bench, bench.folder, seed, part="dense", size="", what=TRAINED, numbers=bench.whole)
    return bench


def _compare_attention(bench: Bench, seed: int) -> None:
    """Measure baselines and ours at every cache size."""
    mine = bench.comparison
    windows_BT, _ = calibration_windows(
        bench.tokenizer,
        calibration_data(ConvertSettings(calibration=mine.calibration, separator=mine.separator)),
        windows=mine.calibration_windows,
        window_tokens=min(mine.calibration_window_tokens, bench.source.max_position_embeddings),
        seed=seed,
    )

    @functools.cache
    def rotate(rope: int) -> TransMLA:  # the same at every rank
        return TransMLA(bench.dense.model, bench.config, windows_BT, rope)

    for size, fields in bench.sizes().items():
        target = target_config(bench.source, bench.settings(seed, **fields))
        given = Sizes(target["kv_lora_rank"], target["qk_rope_head_dim"])
        print(f"cache {size}, seed {seed}: {given.rank} + {given.rope} numbers per token and layer", flush=True)
        if not supports(bench.dense.model):
            print("  no baselines: they are written for models without biases and with RoPE in every layer", flush=True)
        elif not bench.kept.find(size=size, what=SVD, seed=seed):
            ways = [given] if mine.sizes else ways_to_split(bench.source, sum(given))
            _measure_baselines(bench, size, seed, windows_BT, rotate, ways)
        _compare_ours(bench, seed, "attention", size, fields)


def _measure_baselines(
    bench: Bench, size: str, seed: int, windows_BT: Tensor, rotate: Callable[[int], TransMLA], splits: list[Sizes]
) -> None:
    """Measure each published method at its best split on the calibration text."""
    about = {"part": "attention", "size": size, "seed": seed, "numbers": sum(splits[0])}
    start = time.perf_counter()
    cuts = {split: rotate(split.rope).cut(split.rank) for split in splits}
    best = min(splits, key=lambda split: mean_loss(cuts[split].repaired, windows_BT))
    seconds, rotated, cut = time.perf_counter() - start, rotate(best.rope), cuts[best]
    about_transmla = about | {"split": f"{best.rank}+{best.rope}", "fold": rotated.fold, "seconds": seconds}
    memory = {
        "TransMLA, partial RoPE only (no norm)": rotated.partial_rope,
        "TransMLA, joint PCA (no norm)": cut.joint_pca,
    }
    rows = [about_transmla | {"what": what} | bench.measure(model) for what, model in memory.items()]
    for what, model in ((PUBLISHED, cut.published), (REPAIRED, cut.repaired)):
        rows.append(about_transmla | {"what": what} | _measure_written(bench, model))
    start = time.perf_counter()
    models = {split: x_ecomla(bench.dense.model, bench.config, windows_BT, split) for split in splits}
    best = min(splits, key=lambda split: mean_loss(models[split], windows_BT))
    about |= {"split": f"{best.rank}+{best.rope}", "seconds": time.perf_counter() - start}
    rows.append(about | {"what": SVD} | _measure_written(bench, models[best]))
    for row in rows:  # only now, so that an interruption leaves all of them or none
        bench.kept.add(**row)


def _measure_written(bench: Bench, model: DeepseekV3) -> Row:
    """Returns the row of a model that is written as a stock folder and read by stock transformers."""
    folder = bench.comparison.work / bench.comparison.out / "baseline"
    save(model, folder, tokenizer_from=bench.folder, force=True)
    row = bench.measure(load_for_evaluation(folder))
    shutil.rmtree(folder)
    return row


def _compare_ours(
    bench: Bench, seed: int, part: str, size: str, fields: dict[str, Any], stages: list[str] | None = None
) -> None:
    """Measure ours after each stage, and healed after the last of them."""
    stages = stages or bench.stages()
    about: dict[str, Any] = {"part": part, "size": size, "seed": seed}
    healing = bool(bench.comparison.heal_steps) and not bench.kept.find(**about, what=HEALED)
    for stage in stages:
        kept = healing and stage == stages[-1]
        if bench.kept.find(**about, what=STAGES[stage]) and not kept:
            continue
        folder = bench.comparison.work / bench.comparison.out / "-".join(filter(None, (part, size, stage, str(seed))))
        if not folder.exists():
            convert(
                bench.comparison.source, folder, settings=bench.settings(seed, **fields, **bench.stage_fields(stage))
            )
        report, target = (json.loads((folder / f"{name}.json").read_text()) for name in ("conversion", "config"))
        sizes = Sizes(target["kv_lora_rank"], target["qk_rope_head_dim"])
        about |= {"numbers": sum(sizes), "split": f"{sizes.rank}+{sizes.rope}"}
        if not bench.kept.find(**about, what=STAGES[stage]):
            model = load_for_evaluation(folder)
            row = bench.measure(model) | {"seconds": report["seconds"]}
            if part == "upcycle":
                row["logit_difference"] = _logit_difference(bench, model)
            bench.kept.add(**about, what=STAGES[stage], **row)
        if kept:
            _measure_healed(bench, folder, what=HEALED, **about)
        shutil.rmtree(folder)


@torch.inference_mode()
def _logit_difference(bench: Bench, model: Any) -> float:
    """Returns the largest difference of a logit to the dense model's, over eight windows of held-out text, in fp32."""
    size = min(512, bench.source.max_position_embeddings)
    windows = bench.held_out_T[: 8 * size].split(size)
    return max(float((model(ids_T[None]) - bench.dense(ids_T[None])).abs().max()) for ids_T in windows)


def _measure_healed(bench: Bench, start: Path, seed: int, **about: Any) -> None:
    """Train `start` by recipes/heal.yaml on the calibration text (the dense source by cross-entropy), and measure."""
    mine, control = bench.comparison, start == bench.folder
    heal = load_recipe(recipes_folder() / "heal.yaml")
    builtin = BUILTIN_TEXT in mine.held_out  # training leaves out its held-out split anyway
    recipe = dataclasses.replace(
        heal,
        source=str(start),
        teacher=None if control else mine.source,
        seed=seed,
        data=DataSettings(
            train=mine.calibration,
            held_out=() if builtin else mine.held_out,
            held_out_tokens=mine.text_tokens,
            separator=mine.separator,
        ),
        train=dataclasses.replace(
            heal.train,
            steps=mine.heal_steps,
            learning_rate=mine.heal_learning_rate,
            window_tokens=min(heal.train.window_tokens, bench.source.max_position_embeddings),
            warmup_steps=min(heal.train.warmup_steps, mine.heal_steps // 10),
            distill_weight=0.0 if control else heal.train.distill_weight,
            evaluate_every=mine.heal_steps,
        ),
        sample=SampleSettings(every=0),
    )
    run = mine.work / mine.out / f"heal-{'dense' if control else start.name}-{seed}"
    begin = time.perf_counter()
    run_recipe(recipe, run, resume=run.exists())
    seconds = time.perf_counter() - begin
    bench.kept.add(**about, seed=seed, seconds=seconds, **bench.measure(load_for_evaluation(run / "model")))
    shutil.rmtree(run)


# -- report -----------------------------------------------------------------------------------------------------------


def grouped(rows: list[Row], **about: Any) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each (size, what), one for each seed, in the order of measurement."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if about.items() <= row.items():
            groups.setdefault((row["size"], row["what"]), []).append(row)
    return groups


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """Returns the mean and, behind ±, half the distance from the lowest to the highest."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def excess_below(rows: list[Row], what: str) -> dict[str, float]:
    """Returns for each cache size how far the excess loss of `what` is below the best stock baseline's.

    Excess loss is nats over the dense model. The difference is a share of the baseline's, averaged over seeds.
    """
    dense = next(row["loss"] for row in rows if row["what"] == "dense")
    groups = grouped(rows, part="attention")
    below: dict[str, float] = {}
    for (size, name), mine in groups.items():
        if name == what:
            excesses = []
            for row in mine:
                rivals = [
                    r for r in rows if r["size"] == size and r["seed"] == row["seed"] and r["what"] in STOCK_BASELINES
                ]
                if rivals:
                    excesses.append(1 - (row["loss"] - dense) / (min(r["loss"] for r in rivals) - dense))
            if excesses:
                below[size] = statistics.mean(excesses)
    return below


def report(bench: Bench, command: str) -> str:
    """Returns the comparison as Markdown."""
    rows, mine = bench.rows, bench.comparison
    parts = [f"# Conversion quality: {mine.out}, {bench.lines.name[:10]}", _circumstances(bench, command)]
    titles = {
        "attention": "Attention (MLP dense)",
        "carve": "Carve: fewer active neurons (attention exact)",
        "upcycle": "Upcycle: more neurons, the same function (attention exact)",
    }
    for part, title in titles.items():
        if grouped(rows, part=part):
            parts += [f"## {title}", "\n".join(_table(bench, part))]
    if grouped(rows, part="attention"):
        below = {name: excess_below(rows, name) for name in (*STAGES.values(), HEALED)}
        parts += ["## Excess loss below the best baseline", "\n".join(_excess_table(bench, below))]
    return "\n\n".join(parts) + "\n"


def _circumstances(bench: Bench, command: str) -> str:
    mine = bench.comparison
    seeds = f"{len(mine.seeds)} seeds" if len(mine.seeds) > 1 else "one seed"
    other = (
        f" KL and agreement on {len(bench.other_T):,} tokens of another domain." if bench.other_T is not None else ""
    )
    return (
        f"`{command}`\n\n{circumstances()}\n\n"
        f"Dense: perplexity {bench.rows[0]['perplexity']:.3f} on {len(bench.held_out_T):,} held-out tokens, cache of "
        f'{bench.whole} numbers per token and layer.{other} Mean over {seeds} ± half the range. A model "no norm" is '
        "not stock V3 and was measured in memory, any other through stock transformers from its folder."
    )


def _table(bench: Bench, part: str) -> Iterator[str]:
    """Returns the lines of one part's table; the dense model and its control, if there is one, come first."""
    dense = bench.rows[0]["perplexity"]
    head = {"attention": "cache", "carve": "active", "upcycle": ""}[part]
    columns = [head, "", "rank + rope", "perplexity", "over dense", "KL, other domain", "same top token", "seconds"]
    columns += ["max logit difference"] if part == "upcycle" else []
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    controls = grouped([row for row in bench.rows if row["what"] == TRAINED])
    for (size, what), rows in (grouped(bench.rows, what="dense") | controls | grouped(bench.rows, part=part)).items():
        perplexities = [row["perplexity"] for row in rows]
        cells = [size, what, ", ".join(dict.fromkeys(row.get("split", "") for row in rows))]
        cells += [mean_and_spread(perplexities, 2), mean_and_spread([p / dense for p in perplexities])]
        for key, digits in (("kl", 3), ("agreement", 3), ("seconds", 0)):
            values = [row[key] for row in rows if row.get(key) is not None]
            cells.append(mean_and_spread(values, digits) if values else "")
        if part == "upcycle":
            cells.append(", ".join(f"{row['logit_difference']:.1e}" for row in rows if "logit_difference" in row))
        yield "| " + " | ".join(cells) + " |"


def _excess_table(bench: Bench, below: dict[str, dict[str, float]]) -> Iterator[str]:
    """Returns a table: how far ours is below the best stock baseline (negative: above), by size and on average."""
    sizes = list(bench.sizes())
    yield "| | " + " | ".join(sizes) + " | mean |"
    yield "|" + "---|" * (len(sizes) + 2)
    for name, shares in below.items():
        if shares:
            cells = [f"{shares[size]:.0%}" if size in shares else "" for size in sizes]
            yield f"| {name} | " + " | ".join(cells) + f" | {statistics.mean(shares.values()):.0%} |"


def plot(bench: Bench, path: Path) -> None:
    """Plot perplexity over dense against the share of the cache kept: a line for each method, bars over the seeds."""
    groups = grouped(bench.rows, part="attention")
    if not groups:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    dense = bench.rows[0]["perplexity"]
    for name in (*STOCK_BASELINES, *STAGES.values(), HEALED):
        points = sorted(
            (100 * rows[0]["numbers"] / bench.whole, [row["perplexity"] / dense for row in rows])
            for (_, what), rows in groups.items()
            if what == name
        )
        if points:
            shares, means = [share for share, _ in points], [statistics.mean(ratios) for _, ratios in points]
            below = [statistics.mean(ratios) - min(ratios) for _, ratios in points]
            above = [max(ratios) - statistics.mean(ratios) for _, ratios in points]
            style = "--" if name in STOCK_BASELINES else "-"
            axes.errorbar(shares, means, yerr=[below, above], marker="o", capsize=3, linestyle=style, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8, label="dense")
    axes.set(xlabel="cache kept, %", ylabel="perplexity over dense", yscale="log", title=bench.comparison.out)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Measure, write the report and the plot, print the report."""
    comparison = tyro.cli(Comparison, description=__doc__)

    def measure() -> tuple[Path, str, Callable[[Path], None]]:
        bench = compare(comparison)
        return bench.lines, report(bench, command_line()), functools.partial(plot, bench)

    return present(measure)


if __name__ == "__main__":
    sys.exit(main())
