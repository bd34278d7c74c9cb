"""The report and the plot of `smollm2.py`: tables from its rows, with published conversions beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from circumstances import circumstances
from rows import Row
from zero_shot import differences, scores, task_mean

from smolseek.evaluation.paired import Estimate

NAMES = {"closed": "closed form", "converted": "converted", "healed": "healed", "trained": "trained"}


class Published(NamedTuple):
    """A published conversion: means over tasks in percent, of the dense model and after conversion."""

    method: str
    model: str
    share: float
    """Share of the cache that is kept."""
    tokens: float | None
    """Tokens of training after conversion; None: not known here."""
    dense: float
    after: float


PUBLISHED = (
    *(Published("MHA2MLA", "SmolLM-135M", *point) for point in (
        (0.3125, 2.25e9, 44.25, 43.06), (0.1875, 2.25e9, 44.25, 41.84), (0.125, 2.25e9, 44.25, 40.97)
    )),
    *(Published("MHA2MLA", "SmolLM-360M", *point) for point in (
        (0.3125, None, 49.63, 47.91), (0.1875, None, 49.63, 46.94), (0.125, None, 49.63, 45.04)
    )),
    *(Published("MHA2MLA", "SmolLM-1.7B", *point) for point in (
        (0.3125, 6e9, 55.93, 54.76), (0.125, 6e9, 55.93, 53.61)
    )),
    Published("X-EcoMLA", "SmolLM-135M-Instruct", 0.5, 7e9, 41.91, 42.01),
    Published("X-EcoMLA, before preference", "SmolLM-135M-Instruct", 0.5, 7e9, 41.91, 41.31),
    Published("TransMLA", "SmolLM-1.7B", 0.3125, 0, 55.90, 51.95),
)  # fmt: skip


def render(name: str, command: str, rows: Sequence[Row]) -> str:
    """Returns the report of a model."""
    dense, others = _dense(rows), [row for row in rows if row["stage"] != "dense"]
    parts = [f"# {name}: what conversion keeps", command, f"{circumstances()} {_about(dense)}"]
    parts += [_table(_main_lines(dense, others))]
    if dense["tasks"]:
        parts += ["## By task, %", "Behind each score its difference from the dense model's, paired by document."]
        parts += [_table(_task_lines(dense, others))]
    parts += ["## Published conversions", "Means over tasks in their papers, which measured other tasks and models."]
    parts += [_table(_published_lines())]
    return "\n\n".join(parts) + "\n"


def ratios(row: Row, window: str = "512") -> list[float]:
    """Returns perplexity over dense for every text."""
    return [math.exp(one["loss"] - one["teacher_loss"]) for one in row["windows"].get(window, {}).values()]


def task_difference(dense: Row, row: Row) -> Estimate | None:
    """Returns the mean over tasks of the difference from the dense model, paired by document; None without tasks."""
    return task_mean(differences(row["tasks"], dense["tasks"])) if row["tasks"] else None


def _dense(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["stage"] == "dense")


def _about(dense: Row) -> str:
    """Returns what was measured, in sentences."""
    said = []
    for window, texts in dense["windows"].items():
        tokens = ", ".join(f"{name} {one['tokens']:,}" for name, one in texts.items())
        perplexities = ", ".join(f"{name} {math.exp(one['loss']):.2f}" for name, one in texts.items())
        said.append(
            f"In windows of {int(window):,} ({tokens} predicted tokens) the dense perplexity is {perplexities}."
        )
    said.append(
        "All through stock transformers, without BOS. Ratios are perplexity over the dense model's, KL is "
        "KL(dense ‖ model) in nats, and both, like the share of the same top token, are means over the texts in the "
        "shorter windows."
    )
    if dense["tasks"]:
        rows = ", ".join(f"{len(digits)} of {name}" for name, digits in dense["tasks"].items())
        said.append(f"Zero-shot tasks by lm-eval, documents: {rows}. ± is one standard error of a paired difference.")
    return " ".join(said)


def _table(lines: Iterator[list[str]]) -> str:
    """Returns a Markdown table; the first line is its head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def _label(row: Row) -> list[str]:
    """Returns the first cells of a row: size, cache, stage, tokens."""
    if row["stage"] == "dense":
        return ["", "100%", "dense", ""]
    kept = f"{row['cache']:.1%}" + (f" ({row['split']})" if row["split"] else "")
    stage = NAMES.get(row["stage"], row["stage"])
    stage += f", distillation {row['distill_weight']:g}" if row["stage"] == "healed" else ""
    stage += ", attention alone" if row.get("trains") == "attention" else ""
    return [row["size"], kept, stage, f"{row['tokens']:,}" if row["tokens"] else ""]


def _main_lines(dense: Row, rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yields the cells of the table with a line for each size and stage."""
    short, *longer = dense["windows"]
    head = ["size", "cache kept", "", "tokens trained", *dense["windows"][short], "mean", "worst"]
    head += [f"{kind} at {int(window):,}" for window in longer for kind in ("mean", "worst")]
    head += ["KL", "same top token", *(["task mean, %", "− dense"] if dense["tasks"] else []), "seconds"]
    yield head
    for row in (dense, *rows):
        by_text = ratios(row, short)
        cells = [*_label(row), *(f"{ratio:.3f}" for ratio in by_text), *_mean_and_worst(by_text)]
        for window in longer:
            cells += _mean_and_worst(ratios(row, window))
        texts = row["windows"][short].values()
        cells += [f"{statistics.fmean(one[key] for one in texts):.3f}" for key in ("kl", "agreement")]
        if row["tasks"]:
            mean = statistics.fmean(score.value.mean for score in scores(row["tasks"]).values())
            cells += [f"{100 * mean:.2f}", "" if row is dense else _points(task_difference(dense, row))]
        elif dense["tasks"]:
            cells += ["", ""]
        yield [*cells, "" if row["seconds"] is None else f"{row['seconds']:.0f}"]


def _mean_and_worst(values: list[float]) -> list[str]:
    return [f"{statistics.fmean(values):.3f}", f"{max(values):.3f}"]


def _task_lines(dense: Row, rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yields the cells of the table of tasks."""
    yield ["size", "cache kept", "", "tokens trained", *dense["tasks"]]
    for row in (dense, *(row for row in rows if row["tasks"])):
        apart = differences(row["tasks"], dense["tasks"])
        cells = []
        for name, score in scores(row["tasks"]).items():
            behind = "" if row is dense else f" ({_points(apart[name])})"
            cells.append(f"{100 * score.value.mean:.1f}{behind}")
        yield [*_label(row), *cells]


def _points(difference: Estimate | None) -> str:
    """Returns a difference in points of percent."""
    assert difference is not None
    error = "" if difference.error is None else f" ± {100 * difference.error:.2f}"
    return f"{100 * difference.mean:+.2f}{error}"


def _published_lines() -> Iterator[list[str]]:
    """Yields the cells of the table of published conversions."""
    yield ["method", "model", "cache kept", "tokens trained", "dense", "after", "− dense"]
    for point in PUBLISHED:
        tokens = "" if point.tokens is None else f"{point.tokens / 1e9:g} billion" if point.tokens else "none"
        numbers = [f"{point.dense:.2f}", f"{point.after:.2f}", f"{point.after - point.dense:+.2f}"]
        yield [point.method, point.model, f"{point.share:.2%}", tokens, *numbers]


# -- plot -------------------------------------------------------------------------------------------------------------

_HIGHEST = 10.0
"""Perplexity over dense where a worse model is drawn: some baselines have ten thousand."""


def plot(name: str, rows: Sequence[Row], path: Path) -> None:
    """Plot perplexity over dense, and below it the task mean's difference: against cache kept, and tokens trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained", sharex="col", sharey="row")
    dense = _dense(rows)
    others = [row for row in rows if row["stage"] != "dense" and row["size"][0].isdecimal()]  # no experts
    for stage in dict.fromkeys(row["stage"] for row in others):
        longest = {row["size"]: row for row in sorted(others, key=lambda row: row["tokens"]) if row["stage"] == stage}
        line = sorted(longest.values(), key=lambda row: row["cache"])
        style = "-" if stage in NAMES else "--"
        _draw(axes[:, 0], dense, line, [100 * row["cache"] for row in line], NAMES.get(stage, stage), style)
    for size in dict.fromkeys(row["size"] for row in others):
        chosen = [row for row in others if row["size"] == size and row["stage"] in ("converted", "healed")]
        line = sorted(chosen, key=lambda row: row["tokens"])
        if line:
            _draw(axes[:, 1], dense, line, [row["tokens"] for row in line], f"{line[0]['cache']:.1%} of the cache", "-")
    if dense["tasks"]:
        _draw_published(axes[1])
    axes[1, 0].set(xlabel="cache kept, %")
    axes[1, 1].set(xlabel="tokens trained")
    axes[1, 1].set_xscale("symlog", linthresh=1e5)  # a logarithm that has a place for 0
    axes[0, 0].set(ylabel=f"perplexity over dense, mean over texts (at most {_HIGHEST:g} is drawn)", yscale="log")
    for set_formatter in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes[1, 0].set(ylabel="task mean − dense, points")
    for axis, level in zip(axes.flat, (1, 1, 0, 0), strict=True):
        axis.axhline(level, color="black", linewidth=0.8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.suptitle(name)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Sequence[Any], dense: Row, line: list[Row], places: list[float], label: str, style: str) -> None:
    """Draw one line in both panels of a column; bars are standard errors."""
    means = [min(statistics.fmean(ratios(row)), _HIGHEST) for row in line]
    axes[0].plot(places, means, marker="o", linestyle=style, label=label)
    if dense["tasks"]:
        apart = [task_difference(dense, row) or Estimate(math.nan, None) for row in line]
        errors = [100 * (one.error or 0) for one in apart]
        seen = label if any(row["tasks"] for row in line) else None
        axes[1].errorbar(places, [100 * one.mean for one in apart], errors, marker="o", linestyle=style, label=seen)


def _draw_published(axes: Sequence[Any]) -> None:
    """Draw the published differences: against cache kept, and against tokens where they are known."""
    for number, (method, model) in enumerate(dict.fromkeys((point.method, point.model) for point in PUBLISHED)):
        points = [point for point in PUBLISHED if (point.method, point.model) == (method, model)]
        style: dict[str, Any] = {"linestyle": ":", "color": "grey", "marker": "sv^DPX*"[number], "markersize": 6}
        apart = [point.after - point.dense for point in points]
        label = f"{method}, {model}"
        axes[0].plot([100 * point.share for point in points], apart, label=label, **style)
        known = [(point.tokens, gap) for point, gap in zip(points, apart, strict=True) if point.tokens is not None]
        if known:
            axes[1].plot(*zip(*known, strict=True), label=label, **style)
