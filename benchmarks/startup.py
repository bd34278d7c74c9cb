"""How long a user waits before anything happens: whole commands, each in a new process.

python benchmarks/startup.py [RUNS]

`--help`, `plan` on the built-in model, and `generate` to its first token, each RUNS times (default 5), in turns.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from pathlib import Path

from circumstances import circumstances, command_line

COMMANDS = {
    "--help": ["--help"],
    "plan": ["plan", "builtin:base", "--cache", "0.5"],
    "generate, one token": ["generate", "builtin:base", "--prompt", "The", "--max-new-tokens", "1"],
}


def measure(runs: int) -> dict[str, list[float]]:
    """Returns the seconds of each command, run after run."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, arguments in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "smolseek", *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds: dict[str, list[float]], command: str) -> str:
    """Returns medians and spread as Markdown."""
    lines = ["| command | seconds | fastest | slowest |", "|---|---|---|---|"]
    for name, values in seconds.items():
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    return "\n\n".join(["# Start-up", f"`{command}`", circumstances(), "\n".join(lines)]) + "\n"


def main() -> None:
    """Measure, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=5, metavar="RUNS")
    text = report(measure(parser.parse_args().runs), command_line())
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{datetime.date.today()}-startup.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
