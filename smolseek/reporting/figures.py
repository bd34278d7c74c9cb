"""Makes the charts of runs and conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from smolseek.numerics.perplexity import perplexity
from smolseek.reporting.charts import Chart, HeatMap, HeatPanel, Line, LineChart
from smolseek.reporting.read import Conversion, Run, fair_shares

STAGES = ("closed_form", "refined", "distilled", "healed")
"""The stages of a conversion in order, and healing, which comes after them."""
ERRORS = {
    "attention": {"closed_form": "attention_error", "refined": "attention_error_refined"},
    "MLP": {"closed_form": "mlp_error", "refined": "mlp_error_refined"},
}
"""The keys of conversion.json for the error of a block's output relative to the dense block's, by stage."""

BY_LAYER = (
    ("MaxVio", "(largest load − mean load) / mean load over each logged batch; 0 is balanced.", ("maxvio",)),
    (
        "Experts' weights apart",
        "Distance between two over their norm: 0 equal, 1.41 unrelated.",
        ("experts", "weights"),
    ),
    ("Routing by the token", "Share of the choice that the token's identity explains.", ("experts", "routing")),
)
"""Title, note and path in metrics.jsonl of the numbers that are logged for every expert layer."""


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns charts of loss, held-out loss, learning rate and speed, and for several runs of MaxVio; each shows all
    runs."""
    charts: list[Chart | None] = [
        _step_chart(runs, "Training loss", "Nats per token of each logged batch.", "loss"),
        held_out_chart(runs),
        _step_chart(
            runs, "Learning rate", "Of weights without a factor of their own.", "learning_rate", y_format=".3g"
        ),
        _step_chart(
            runs,
            "Tokens per second",
            "Of each logged step, without evaluation, samples and checkpoints.",
            "tokens_per_second",
        ),
    ]
    if len(runs) > 1:
        worst = "(largest load − mean load) / mean load over a batch, of the run's worst layer."
        charts.append(_step_chart(runs, "MaxVio", worst, "maxvio", value=lambda by: max(by.values())))
    return [chart for chart in charts if chart is not None]


def held_out_chart(runs: Sequence[Run]) -> LineChart | None:
    """Returns the held-out loss at every evaluation; None if there is none.

    Dense controls are dashed, and level lines show the models that the runs start from.
    """
    lines = []
    for hue, run in enumerate(runs):
        xs, ys = run.series("held_out", "loss")
        lines.append(Line(run.name, xs, ys, hue=hue, marked=True))
        if run.control:
            xs, ys = run.control.series("held_out", "loss")
            lines.append(Line(f"{run.name}, dense model trained alike", xs, ys, hue=hue, dashed=True, marked=True))
    lines = [line for line in lines if line.xs]
    if not lines:
        return None
    lines += _reference_lines(runs, max(line.xs[-1] for line in lines))
    return LineChart("Held-out loss", "Nats per token of text that no run trains on.", "step", lines)


def _reference_lines(runs: Sequence[Run], last_step: float) -> list[Line]:
    """Returns level lines at the loss of the dense and of the converted model, for each if all runs share it."""
    lines = []
    for model, name in (("dense", "dense source"), ("converted", "as converted")):
        losses = {run.models.get(model, {}).get("loss") for run in runs}
        loss = losses.pop()
        if not losses and loss is not None:
            lines.append(Line(name, [0, last_step], [loss, loss], dashed=model == "converted"))
    return lines


def expert_charts(run: Run) -> list[Chart]:
    """Returns charts of one run's balance and specialisation, a line or a panel per layer; none without experts."""
    if not run.layers:
        return []
    charts: list[Chart] = [load_chart(run)]
    for title, note, path in BY_LAYER:
        lines = []
        for number, layer in enumerate(run.layers):
            xs, ys = run.series(*path, layer)
            rank = number / max(1, len(run.layers) - 1)
            lines.append(Line(f"layer {layer}", xs, ys, rank=rank, marked=path[0] == "experts"))
        if any(line.xs for line in lines):
            charts.append(LineChart(title, note, "step", lines, from_zero=True, y_format=",.3g"))
    return charts


def load_chart(run: Run) -> HeatMap:
    """Returns each expert's load over the run, one panel per layer.

    Raises:
        ValueError: the run has no expert layers.
    """
    if not run.layers:
        raise ValueError(f"{run.name}: no load of experts in its metrics; it trained a model without expert layers")
    panels = []
    for layer in run.layers:
        xs, loads = run.series("load", layer)
        ratios = fair_shares(loads)
        panels.append(HeatPanel(f"layer {layer}", [list(expert) for expert in zip(*ratios, strict=True)]))
    note = (
        "Choices that fell on each expert in a logged batch, over its fair share; experts upwards, steps to the right."
    )
    return HeatMap("Load of every expert", note, xs, panels)


def conversion_charts(runs: Sequence[Run], conversions: Sequence[Conversion]) -> list[Chart]:
    """Returns charts of perplexity against the cache kept, and of each layer's error after each stage."""
    charts = cache_charts(runs, conversions)
    for conversion in conversions:
        for chart in error_charts(conversion):
            title = (
                f"{conversion.name}: {chart.title}"
                if len(conversions) > 1
                else chart.title[0].upper() + chart.title[1:]
            )
            charts.append(replace(chart, title=title))
    return charts


def error_charts(conversion: Conversion) -> list[LineChart]:
    """Returns charts of the error of each layer's attention and MLP by stage; none for an exact conversion."""
    charts = []
    for part, keys in ERRORS.items():
        lines = [_layer_line(conversion, stage, key) for stage, key in keys.items()]
        note = "Of the block's output relative to the dense block's, after each stage that works by layers."
        if any(line.xs for line in lines):
            charts.append(_layer_chart(f"{part} error by layer", note, lines))
    line = _layer_line(conversion, "closed_form", "latent_error_weighted")
    if not charts and line.xs:
        note = "Share of keys and values lost, by what it does to the loss."
        charts.append(_layer_chart("latent cut by layer", note, [line]))
    return charts


def cache_charts(runs: Sequence[Run], conversions: Sequence[Conversion]) -> list[Chart]:
    """Returns charts of perplexity, as a multiple of the dense model's, against the cache kept, one line per stage.

    A source gets a chart if its conversions keep different shares of the cache.
    """
    healed = {run.name: run.models for run in runs if {"dense", "healed"} <= set(run.models)}
    by_source: dict[str, list[Conversion]] = {}
    for conversion in conversions:
        kind = ", carved" if conversion.settings.get("experts") == "carve" else ""
        by_source.setdefault(f"{conversion.source}{kind}", []).append(conversion)
    charts: list[Chart] = []
    for source, group in by_source.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for conversion in group:
            losses = conversion.losses
            shown = [stage for stage in STAGES if stage in losses and "dense" in losses]
            ratios = {stage: perplexity(losses[stage]) / perplexity(losses["dense"]) for stage in shown}
            if models := healed.get(conversion.name):
                ratios["healed"] = models["healed"]["perplexity"] / models["dense"]["perplexity"]
            for stage, ratio in ratios.items():
                points.setdefault(stage, []).append((100 * conversion.cache_share, ratio))
        lines = [_stage_line(stage, sorted(points[stage])) for stage in STAGES if stage in points]
        if len({x for line in lines for x in line.xs}) > 1:
            charts.append(_cache_chart(source, lines))
    return charts


def _cache_chart(source: str, lines: list[Line]) -> LineChart:
    note = "Times the dense model's, on text kept aside (healed: on the run's held-out text)."
    title, x_name = f"{source}: perplexity against cache kept", "% of the source's cache"
    return LineChart(title, note, x_name, lines, log=True, each_x=True, x_format=".3g")


def _layer_line(conversion: Conversion, stage: str, key: str) -> Line:
    return _stage_line(stage, [(layer["layer"], layer[key]) for layer in conversion.layers if key in layer])


def _stage_line(stage: str, points: list[tuple[float, float]]) -> Line:
    return Line(in_words(stage), [x for x, _ in points], [y for _, y in points], hue=STAGES.index(stage), marked=True)


def _layer_chart(title: str, note: str, lines: list[Line]) -> LineChart:
    shown = [line for line in lines if line.xs]
    return LineChart(title, note, "layer", shown, from_zero=True, each_x=True, y_format=",.3g")


def _step_chart(
    runs: Iterable[Run], title: str, note: str, key: str, *, value: Callable[[Any], float] = float, **how: Any
) -> LineChart | None:
    """Returns a chart of the numbers under `key` by step, one line per run; None if no run has any."""
    lines = []
    for hue, run in enumerate(runs):
        xs, values = run.series(key)
        if xs:
            lines.append(Line(run.name, xs, [value(v) for v in values], hue=hue))
    return LineChart(title, note, "step", lines, from_zero=key != "loss", **how) if lines else None


def in_words(name: str) -> str:
    """Returns a key of summary.json or conversion.json as words."""
    return name.replace("_", " ")
