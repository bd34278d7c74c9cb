"""Damaged inputs: how the command line ends on some hundred of each kind; the damage is drawn by tests/fuzz.

python benchmarks/fuzz.py [--inputs 500] [--kinds config.json weights ...] [--seed 0] [--out benchmarks/results]

One line per kind in DATE-fuzz.jsonl; an interrupted benchmark goes on with the next kind. Faults are printed at once,
with the case that makes each of them again.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, command_line
from hypothesis import HealthCheck, Phase, given, seed, settings
from rows import Rows, present

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzz.engine import MOST_BYTES, MOST_SECONDS, Outcome  # noqa: E402
from tests.fuzz.inputs import COMMANDS  # noqa: E402
from tests.fuzz.kinds import KINDS, Case, cases, run_case  # noqa: E402

COMMONEST = 4
_HEAD = (
    "| kind of input | verbs | inputs | successes | refusals | the most common refusals | faults | slowest, s "
    "| growth, MB |",
    "|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Fuzz:
    """Run damaged inputs of each kind and count how they end."""

    inputs: int = 500
    """Inputs of each kind."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of input."""
    seed: int = 0
    """Seed of the damage: the same seed gives the same inputs."""
    out: Path = ROOT / "benchmarks" / "results"
    """Folder for the results."""


@dataclass
class Tally:
    """How the cases of one kind have ended."""

    inputs: int = 0
    successes: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    """For each place or message: how often, the shortest case, and what is wrong with it."""
    slowest: float = 0.0
    slowest_case: str = ""
    growth: int = 0

    def add(self, case: Case, outcome: Outcome, fault: str) -> None:
        self.inputs += 1
        self.growth = max(self.growth, outcome.growth)
        if outcome.seconds > self.slowest:
            self.slowest, self.slowest_case = outcome.seconds, repr(case)[:300]
        if not fault and outcome.status == 2:
            self.refusals[shorten(outcome.refusal)] += 1
        elif not fault:
            self.successes += 1
        else:
            count, shortest, what = self.faults.get(place_of(fault), (0, "", ""))
            if not count or len(repr(case)) < len(shortest):
                shortest, what = repr(case), fault
            if not count:
                print(f"-- {place_of(fault)}\n{shortest[:1500]}\n{fault[-1500:]}", flush=True)
            self.faults[place_of(fault)] = (count + 1, shortest, what)

    def row(self, kind: str) -> dict[str, Any]:
        """Returns the counts as they are written."""
        return {
            "kind": kind,
            "verbs": sorted({COMMANDS[command][0] for command in KINDS[kind].commands}),
            "inputs": self.inputs,
            "successes": self.successes,
            "refusals": sum(self.refusals.values()),
            "commonest": self.refusals.most_common(COMMONEST),
            "faults": [[place, *fault] for place, fault in sorted(self.faults.items())],
            "slowest": self.slowest,
            "slowest_case": self.slowest_case,
            "growth": self.growth,
        }


def shorten(line: str) -> str:
    """Returns a refusal without paths, quoted values and numbers, and without its remedy."""
    line = re.sub(r"'[^']*'|\"[^\"]*\"", "…", line.removeprefix("smolseek: ").partition(";")[0])
    line = re.sub(r"[^\s(]*/[^\s:,)]*", "PATH", line)
    return re.sub(r"-?\d[\d,.e+]*", "N", line)[:80].replace("|", " ")


def place_of(fault: str) -> str:
    """Returns where in smolseek an error was raised and its class, or the first words of another fault."""
    frames = re.findall(r'File "[^"]*/smolseek/([\w/]+\.py)", line (\d+)', fault)
    last = fault.strip().splitlines()[-1][:100]
    return f"{':'.join(frames[-1])} {last.partition(':')[0]}" if frames else shorten(fault.splitlines()[0])


def measure(kind: str, inputs: int, number: int) -> Tally:
    """Runs the cases of one kind."""
    tally = Tally()

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(cases(kind))
    def run(case: Case) -> None:
        tally.add(case, *run_case(case))

    run()
    return tally


def measure_all(options: Fuzz) -> Rows:
    """Runs all kinds that the JSON lines do not have yet."""
    rows = Rows(options.out, "fuzz", options, free=("out", "kinds"))
    for kind in options.kinds:
        if not rows.find(kind=kind):
            rows.add(**measure(kind, options.inputs, options.seed).row(kind))
    return rows


def report(rows: list[dict[str, Any]], command: str) -> str:
    """Returns the table as Markdown, with a line for every fault."""
    lines = [*_HEAD]
    for row in rows:
        commonest = "; ".join(f"{count} × {line}" for line, count in row["commonest"])
        faults = sum(fault[1] for fault in row["faults"])
        lines.append(
            f"| {row['kind']} | {', '.join(row['verbs'])} | {row['inputs']:,} | {row['successes']:,} | "
            f"{row['refusals']:,} | {commonest} | {faults:,} | {row['slowest']:.1f} | {row['growth'] / 1e6:.0f} |"
        )
    said = [
        f"- {row['kind']}: {count} × {place}; for example `{case[:300]}`"
        for row in rows
        for place, count, case, _ in row["faults"]
    ]
    rules = (
        "An input is a tiny model, text, recipe or run with drawn damage. A case is good if the command succeeds, or "
        f"refuses with one line and status 2, within {MOST_SECONDS} s and {MOST_BYTES >> 30} GiB of growth, and "
        "changes no file but its output. All others are faults. Growth is that of the process's largest memory in one "
        "case."
    )
    return "\n\n".join(["# Damaged inputs", f"`{command}`", circumstances(), rules, "\n".join(lines), *said]) + "\n"


if __name__ == "__main__":

    def _main() -> tuple[Path, str, None]:
        rows = measure_all(tyro.cli(Fuzz))
        return rows.path, report(rows.rows, command_line()), None

    sys.exit(present(_main, plots=False))
