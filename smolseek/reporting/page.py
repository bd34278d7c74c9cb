"""The report page: one HTML file that loads no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from smolseek.numerics.perplexity import perplexity
from smolseek.reporting.charts import Chart, HeatMap
from smolseek.reporting.draw import collapsible, figure, table
from smolseek.reporting.figures import STAGES, conversion_charts, expert_charts, in_words, training_charts
from smolseek.reporting.read import Conversion, Run

HEAT_CELLS = 40000
"""Most cells of all heat maps together; this keeps every page below a megabyte."""
COLUMNS = {
    "loss": ("held-out loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "cache_bytes_per_token": ("cache B/token", ",d"),
    "total_parameters": ("parameters", ",d"),
    "active_parameters": ("active", ",d"),
    "decode_tokens_per_second": ("decode tok/s", ",.0f"),
}
_JUDGED_COLUMNS = {
    "tokens": ("tokens", ",.0f"),
    "dense_perplexity": ("dense perplexity", ".3f"),
    "perplexity": ("perplexity", ".3f"),
    "ratio": ("ratio", ".3f"),
    "kl": ("KL", ".4f"),
    "agreement": ("same top token", ".1%"),
}


def sections(runs: Sequence[Run], conversions: Sequence[Conversion]) -> dict[str, list[Chart]]:
    """Returns the charts of a report by heading."""
    by_heading = {"Training": training_charts(runs)}
    for run in runs:
        by_heading[f"Experts of {run.name}"] = expert_charts(run)
    by_heading["Conversion"] = conversion_charts(runs, conversions)
    return {heading: charts for heading, charts in by_heading.items() if charts}


def render(runs: Sequence[Run], conversions: Sequence[Conversion]) -> str:
    """Returns the page as HTML."""
    here = Path(__file__)
    style, script = (here.with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = {heading: _charts(charts, len(runs)) for heading, charts in sections(runs, conversions).items()}
    bodies = {"Results": _results(runs), **drawn}
    bodies["Conversion"] = _stages(conversions) + _judged(conversions) + drawn.get("Conversion", "")
    bodies |= {"Samples": "".join(map(_samples, runs)), "Settings": _settings(runs, conversions)}
    bodies = {heading: body for heading, body in bodies.items() if body}
    links = "".join(f'<a href="#s{number}">{escape(heading)}</a>' for number, heading in enumerate(bodies))
    parts = "".join(
        f'<section><h2 id="s{number}">{escape(heading)}</h2>{body}</section>'
        for number, (heading, body) in enumerate(bodies.items())
    )
    title = ", ".join(dict.fromkeys([*(run.name for run in runs), *(conversion.name for conversion in conversions)]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{escape(title)}: smolseek report</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><button id="theme" type="button">Light / dark</button></header>
<nav aria-label="Sections">{links}</nav>
<main>{parts}</main>
<script>{script}</script>
</body>
</html>
"""


def _charts(charts: Iterable[Chart], runs: int) -> str:
    """Returns the drawn charts. Heat maps take the whole width, so they come before the charts in columns."""
    ordered = sorted(charts, key=lambda chart: not isinstance(chart, HeatMap))
    return f'<div class="charts">{"".join(figure(chart, HEAT_CELLS // max(1, runs)) for chart in ordered)}</div>'


def _results(runs: Sequence[Run]) -> str:
    """Returns the state of each run, and a table of the models of the runs that have ended."""
    states = "".join(f"<p><strong>{escape(run.name)}</strong>: {escape(_state(run))}</p>" for run in runs)
    rows = [
        [f"{run.name}: {in_words(name)}" if len(runs) > 1 else in_words(name), *(_cell(row, key) for key in COLUMNS)]
        for run in runs
        for name, row in run.models.items()
    ]
    heads = ["", *(name for name, _ in COLUMNS.values())]
    return states + (f'<div class="scroll">{table(heads, rows)}</div>' if rows else "")


def _cell(row: dict[str, Any], key: str) -> str:
    return format(row[key], COLUMNS[key][1]) if key in row else ""


def _state(run: Run) -> str:
    """Returns a sentence on how far the run is and its last held-out loss."""
    steps, losses = run.series("held_out", "loss")
    held_out = f"held-out loss {losses[-1]:.4f} after step {steps[-1]:,}" if steps else "no held-out loss yet"
    if not run.summary:
        last = f"at step {run.lines[-1]['step']:,}" if run.lines else "before its first step"
        return f"{last}, going on or interrupted; {held_out}."
    balance = run.summary.get("maxvio")
    read = f" over {run.summary['held_out_tokens']:,} held-out tokens" if "held_out_tokens" in run.summary else ""
    maxvio = f"; MaxVio of the worst layer{read} {balance:.3f}" if balance is not None else ""
    trained = run.summary.get("trained_tokens")
    return f"ended{f' after {trained:,} tokens' if trained else ''}; {held_out}{maxvio}."


def _stages(conversions: Sequence[Conversion]) -> str:
    """Returns a table of each conversion's perplexity by stage."""
    stages = list(dict.fromkeys(stage for conversion in conversions for stage in conversion.losses))
    order = [stage for stage in ("dense", *STAGES) if stage in stages]
    rows = [
        [conversion.name, conversion.source, f"{conversion.cache_share:.1%}"]
        + [f"{perplexity(conversion.losses[stage]):.3f}" if stage in conversion.losses else "" for stage in order]
        for conversion in conversions
    ]
    heads = ["", "source", "cache kept", *map(in_words, order)]
    note = '<p class="note">Perplexity by stage, on text that the conversion kept aside.</p>'
    return f'{note}<div class="scroll">{table(heads, rows)}</div>' if rows else ""


def _judged(conversions: Sequence[Conversion]) -> str:
    """Returns a table of each conversion on the texts that it was judged on."""
    rows = [
        [conversion.name, text, *(format(numbers[name], kind) for name, (_, kind) in _JUDGED_COLUMNS.items())]
        for conversion in conversions
        for text, numbers in conversion.judged
    ]
    heads = ["", "text", *(head for head, _ in _JUDGED_COLUMNS.values())]
    note = '<p class="note">On text that nothing was learnt from, beside the dense model.</p>'
    return f'{note}<div class="scroll">{table(heads, rows)}</div>' if rows else ""


def _samples(run: Run) -> str:
    """Returns for each prompt the models' texts side by side, and the texts drawn in training as a collapsible part.

    A run that has not ended shows its newest text in place of the models' texts.
    """
    drawn, parts = run.samples, []
    shown = {name: row["samples"] for name, row in run.models.items() if "samples" in row}
    for prompt in dict.fromkeys([*(p for texts in shown.values() for p in texts), *drawn]):
        texts = {in_words(name): by_prompt[prompt] for name, by_prompt in shown.items() if prompt in by_prompt}
        steps = {f"step {step:,}": text for step, text in drawn.get(prompt, [])}
        texts = texts or dict(list(steps.items())[-1:])
        parts.append(f"<h4>{escape(run.name)}: {escape(prompt)}</h4>{_side_by_side(texts)}")
        parts.append(collapsible("While training", _side_by_side(steps)) if steps else "")
    return "".join(parts)


def _side_by_side(texts: dict[str, str]) -> str:
    cells = (f"<div><h4>{escape(name)}</h4><pre>{escape(text)}</pre></div>" for name, text in texts.items())
    return f'<div class="samples">{"".join(cells)}</div>'


def _settings(runs: Sequence[Run], conversions: Sequence[Conversion]) -> str:
    """Returns tables of versions and of settings that differ between runs, and all settings as collapsible parts."""
    versions = {run.name: run.versions for run in runs if run.versions}
    versions |= {f"{c.name}, conversion": c.versions for c in conversions}
    names = _all_keys(versions.values())
    rows = [[name, *(by_name.get(n, "") for n in names)] for name, by_name in versions.items()]
    parts = [f'<div class="scroll">{table(["", *names], rows, "Versions", text=True)}</div>' if rows else ""]
    settings = {run.name: _dotted(run.recipe) for run in runs if run.recipe}
    different = [key for key in _all_keys(settings.values()) if len({flat.get(key) for flat in settings.values()}) > 1]
    rows = [[key, *(flat.get(key, "") for flat in settings.values())] for key in different if key != "name"]
    parts.append(f'<div class="scroll">{table(["", *settings], rows, "What differs", text=True)}</div>' if rows else "")
    trees = [(f"Recipe of {run.name}", run.recipe) for run in runs]
    trees += [(f"Settings of {conversion.name}'s conversion", conversion.settings) for conversion in conversions]
    parts += [collapsible(name, f"<pre>{escape(_yaml(tree))}</pre>") for name, tree in trees if tree]
    return "".join(parts)


def _all_keys(trees: Iterable[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for tree in trees for key in tree))


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as texts by their dotted name."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
