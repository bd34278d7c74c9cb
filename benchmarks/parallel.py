"""Do several processes have the losses of one process at the same global batch? By gloo, on one machine.

python benchmarks/parallel.py [--steps 100] [--out benchmarks/results/DATE-parallel.md]

Trains a tiny DeepSeek-V3 from random weights on the text in every CPython, in fp32, so that only the order of sums
differs. Each run is a folder under --work; a run with a summary is not repeated.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from circumstances import circumstances, command_line

ROOT = Path(__file__).parent.parent
RECIPE = """
name: tiny
model:
  {{model_type: deepseek_v3, hidden_size: 64, intermediate_size: 96, moe_intermediate_size: 32, num_hidden_layers: 3,
    num_attention_heads: 4, num_key_value_heads: 4, kv_lora_rank: 32, q_lora_rank: null, qk_rope_head_dim: 8,
    qk_nope_head_dim: 16, v_head_dim: 16, n_routed_experts: 8, n_shared_experts: 1, num_experts_per_tok: 2, n_group: 1,
    topk_group: 1, first_k_dense_replace: 1, max_position_embeddings: 64, tie_word_embeddings: true}}
train_tokenizer_entries: 300
data: {{train: {text}, shuffle_windows: 16, held_out_share: 0.2, held_out_tokens: 1000}}
train: {{steps: {steps}, batch_windows: 4, gradient_accumulation: 2, window_tokens: 32, learning_rate: 3e-3,
  warmup_steps: 5, evaluate_every: {half}, checkpoint_every: {half}, log_every: 1, precision: float32}}
sample: {{every: 0, prompts: ["The "], max_new_tokens: 8}}
"""
DIES_ONCE = """
import os, signal, sys
from smolseek.cli import main
from smolseek.training.trainer import Trainer
take = Trainer._train_step
def step(trainer):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(trainer)
Trainer._train_step = step
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""A train.py whose process 1 is killed before one step, the first time."""


@dataclass(frozen=True)
class Comparison:
    """Losses of 1, 2 and 4 processes, with and without expert parallelism, resumed at other sizes, one killed."""

    steps: int = 100
    """Optimizer steps of each run."""
    text: str = "builtin:python"
    """Training text."""
    work: Path = Path("runs/parallel")
    """Where the runs lie."""
    out: Path | None = None
    """Report; none: benchmarks/results/DATE-parallel.md."""


def write_recipe(folder: Path, steps: int, text: str) -> Path:
    """Write tiny.yaml, with checkpoints at half of the steps and at the end; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(steps=steps, half=steps // 2, text=text), encoding="utf-8")
    return recipe


def run(recipe: Path, runs: Path, processes: int, *options: str, script: Path | None = None, restarts: int = 0) -> str:
    """Train `recipe` by that many processes (one: no torchrun), one thread each; returns their output.

    Raises:
        RuntimeError: the run failed.
    """
    if (runs / "tiny" / "summary.json").exists():
        return ""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    torchrun += [f"--max-restarts={restarts}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script or ROOT / "train.py"), str(recipe)]
    command += ["--runs", str(runs), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
    return done.stdout + done.stderr


def resume_at(recipe: Path, saved: Path, runs: Path, processes: int, *options: str) -> None:
    """Go on from the older checkpoint of the finished run in `saved`, by another number of processes."""
    if (runs / "tiny" / "summary.json").exists():
        return
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(saved, runs)
    (runs / "tiny" / "summary.json").unlink()
    shutil.rmtree(max((runs / "tiny" / "checkpoints").glob("step-*")))
    run(recipe, runs, processes, "--resume", *options)


def losses(runs: Path) -> list[float]:
    """Returns the training loss of every step, then the held-out losses."""
    lines = [json.loads(line) for line in (runs / "tiny" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out"]["loss"] for line in lines if "held_out" in line]
    return [line["loss"] for line in lines if "loss" in line] + held_out


def largest_difference(one: Path, other: Path) -> float:
    """Returns the largest difference of two runs' losses at the same step."""
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


def compare(comparison: Comparison) -> list[tuple[str, float]]:
    """Returns pairs of a run's name and its largest difference from the single process."""
    work, rows = comparison.work, []
    recipe = write_recipe(work, comparison.steps, comparison.text)
    run(recipe, work / "1", 1)
    for processes, expert in itertools.product((2, 4), (1, 2)):
        runs = work / f"{processes}-expert-{expert}"
        run(recipe, runs, processes, "--parallel.expert", str(expert))
        rows.append((f"{processes} processes, parallel.expert {expert}", largest_difference(work / "1", runs)))
    saved = work / "4-expert-2"
    for processes in (1, 2):
        runs = work / f"saved-4-resumed-{processes}"
        resume_at(recipe, saved, runs, processes)
        rows.append((f"saved by 4 (expert 2), resumed by {processes}", largest_difference(work / "1", runs)))
    runs = work / "saved-1-resumed-4"
    resume_at(recipe, work / "1", runs, 4, "--parallel.expert", "2")
    rows.append(("saved by 1, resumed by 4 (expert 2)", largest_difference(work / "1", runs)))
    script = work / "dies_once.py"
    script.write_text(DIES_ONCE.format(step=comparison.steps * 3 // 4), encoding="utf-8")
    run(recipe, work / "killed", 2, script=script, restarts=2)
    rows.append(
        ("2 processes, one killed at three quarters, restarted", largest_difference(work / "1", work / "killed"))
    )
    return rows


def report(comparison: Comparison, rows: list[tuple[str, float]]) -> str:
    """Returns the report in Markdown."""
    final = losses(comparison.work / "1")[comparison.steps - 1]
    lines = [
        "# Several processes follow one",
        "",
        f"`{command_line()}`: {comparison.steps} steps of the same 8 windows of 32 tokens, gloo on one CPU, fp32.",
        f"The single process ends at a training loss of {final:.4f}. Below: the largest difference of any step's",
        "training loss, or of a held-out loss, from the single process's; wanted: at most 1e-3.",
        "",
        circumstances(),
        "",
        "| run | largest difference, nats |",
        "|---|---|",
        *(f"| {name} | {difference:.1e} |" for name, difference in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, write and print the report."""
    comparison = tyro.cli(Comparison, description=__doc__)
    text = report(comparison, compare(comparison))
    day = datetime.date.today().isoformat()
    out = comparison.out or ROOT / "benchmarks" / "results" / f"{day}-parallel.md"
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
