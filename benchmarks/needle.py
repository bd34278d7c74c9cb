"""Do unrotated channels hurt far positions? How much an earlier copy of a span helps to predict it, by distance.

    python benchmarks/needle.py DENSE CONVERTED --text FILE

Both models read the same sequences (`smolseek.evaluation.needle`). Differences are paired, trial by trial.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import tyro
from circumstances import circumstances, command_line

from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
from smolseek.checkpoint.source import read_conversion
from smolseek.config import DataSettings
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from smolseek.evaluation.needle import SPAN_TOKENS, Retrieval, measure_retrieval, text_pieces
from smolseek.evaluation.paired import paired_difference

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Needle:
    """Compare retrieval in a dense model and its conversion."""

    dense: tyro.conf.Positional[str]
    """The dense source."""
    converted: tyro.conf.Positional[str]
    """Its conversion."""
    text: tuple[str, ...]
    """Held-out text that the spans are drawn from."""
    trials: int = 64
    """Spans for each distance."""
    seed: int = 0
    """Seed of the spans."""
    out: Path | None = None
    """The report; none: in benchmarks/results, dated."""


def measure(needle: Needle) -> list[list[Retrieval]]:
    """Returns the results by distance, of the dense model and of the converted one."""
    ids_T = pack(load_tokenizer(needle.dense), held_out_documents(DataSettings(held_out=needle.text))).ids_T
    models = [load_for_evaluation(folder) for folder in (needle.dense, needle.converted)]
    source = text_pieces(ids_T)
    return [measure_retrieval(model, source, trials=needle.trials, seed=needle.seed) for model in models]


def report(needle: Needle, dense: list[Retrieval], converted: list[Retrieval]) -> str:
    """Returns the report in Markdown."""
    cache = (read_conversion(needle.converted) or {}).get("cache", {})
    kept = f", {cache['numbers_per_token'] / cache['source_numbers_per_token']:.0%} of its cache" if cache else ""
    lines = [
        "# Retrieval over distance, dense against converted",
        "",
        f"`{command_line()}`: {Path(needle.dense).name} and a conversion of it{kept}.",
        f"A span of {SPAN_TOKENS} tokens of the text is read a second time, so many tokens behind its first. Gain:",
        "mean log-probability of its tokens but the first, less that with another span in the first place, in nats per",
        f"token; {needle.trials} trials a distance, ± standard error, the difference paired. Accuracy: the share of",
        "those tokens that are likeliest (in brackets: with the other span).",
        "",
        circumstances(),
        "",
        "| distance | dense gain | converted gain | difference | dense accuracy | converted accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for d, c in zip(dense, converted, strict=True):
        difference = paired_difference(c.gains, d.gains)
        accuracies = " | ".join(f"{r.accuracy:.1%} ({r.control_accuracy:.1%})" for r in (d, c))
        lines.append(f"| {d.distance_tokens:,} | {d.gain} | {c.gain} | {difference} | {accuracies} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print the report."""
    needle = tyro.cli(Needle, description=__doc__)
    text = report(needle, *measure(needle))
    day = datetime.date.today().isoformat()
    (needle.out or ROOT / "benchmarks" / "results" / f"{day}-needle.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
