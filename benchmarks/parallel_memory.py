"""The memory of a training step in 1, 2 and 4 processes, beside what `smolseek plan --processes` counts.

python benchmarks/parallel_memory.py [--processes 1 2 4]

Each run trains a random DeepSeek-V3 for three steps (gloo, fp32 or bf16). A peak is what a process has in memory in the
third step, less that after the imports; the first step makes the optimizer's state. Each run is a row that is kept: the
same command goes on with those that are missing.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, command_line
from parallel import run
from rows import Row, Rows, present

from smolseek.config import load_recipe
from smolseek.machine import Machine
from smolseek.planning import TrainingMemory, training_memory

ROOT = Path(__file__).parent.parent
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "first_k_dense_replace": 1},
    "dense": {"first_k_dense_replace": 8, "n_routed_experts": 2, "num_experts_per_tok": 2},
    "experts": {"first_k_dense_replace": 0, "n_routed_experts": 8, "num_experts_per_tok": 2},
}
"""Fields of the models: next to nothing, whose peak is what processes take whatever they train; as a conversion leaves
a dense model; and with experts."""
ENTRIES = 4096  # of the tokenizer of builtin:base
SIZES: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 96,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 1536,
    "moe_intermediate_size": 512,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RECIPE = """
name: tiny
tokenizer: builtin:base
model: {model}
data: {{train: {text}, shuffle_windows: 16, held_out_share: 0.2, held_out_tokens: 1000}}
train: {{steps: 3, batch_windows: 4, window_tokens: 256, warmup_steps: 1, evaluate_every: 100, checkpoint_every: 100,
  precision: {precision}}}
sample: {{every: 0, prompts: ["The "], max_new_tokens: 1}}
"""
WATCH = """
import os, sys
sys.path.append(os.environ["BENCHMARKS"])
from pathlib import Path
import torch, transformers
from torch.distributed.fsdp import fully_shard
from smolseek.cli import main
from smolseek.numerics.memory import release_memory
import smolseek.run
import smolseek.training.trainer
if os.environ["FREE_AT_ONCE"] == "yes":
    smolseek.training.trainer.keep_freed_memory = lambda: None
from smolseek.training.trainer import Trainer
from convert import resident_bytes
_ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.DeepseekV3ForCausalLM
imported = resident_bytes("VmRSS")
take = Trainer._train_step
def step(trainer):
    if trainer.step == 2:
        release_memory()
        trainer.resting = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    done = take(trainer)
    if trainer.step == 2:
        rank = os.environ.get("RANK", "0")
        sizes = resident_bytes("VmHWM") - imported, trainer.resting - imported
        Path(os.environ["PEAKS"], rank).write_text(" ".join(map(str, sizes)))
    return done
Trainer._train_step = step
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""A train.py that notes each process's peak in the third step."""


@dataclass(frozen=True)
class Memory:
    """Measure a training step's memory by the number of processes."""

    processes: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes."""
    models: tuple[str, ...] = tuple(MODELS)
    """Models, of `MODELS`."""
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    """Types of the products."""
    free_at_once: bool = True
    """Give freed memory back to the system at once, so that what is resident is what is held. A run on a CPU keeps it
    for its next tensors, which is faster and leaves gaps."""
    work: Path = Path("runs/parallel-memory")
    """Where the runs lie."""
    results: Path = ROOT / "benchmarks" / "results"
    """Where report and JSON lines go."""


def compare(memory: Memory) -> Rows:
    """Measure the runs that have no row yet."""
    rows = Rows(memory.results, "parallel-memory", memory, free=tuple(vars(memory)))
    os.environ |= {"MALLOC_ARENA_MAX": "1", "BENCHMARKS": str(ROOT / "benchmarks")}
    os.environ["FREE_AT_ONCE"] = "yes" if memory.free_at_once else "no"
    for model in memory.models:
        for precision in memory.precisions:
            for processes in memory.processes:
                about = {"model": model, "precision": precision, "processes": processes, "frees": memory.free_at_once}
                if not rows.find(**about):
                    folder = memory.work / f"{model}-{precision}-{processes}"
                    peaks, resting = zip(*measure(folder, model, precision, processes), strict=True)
                    rows.add(**about, peaks=peaks, resting=resting)
                    print(f"  {about}: {peaks}, at rest {resting}", flush=True)
    return rows


def measure(folder: Path, model: str, precision: str, processes: int) -> list[list[int]]:
    """Returns for each process the peak of the third step, and what it had before that step, in bytes."""
    peaks, script = folder / "peaks", folder / "watch.py"
    peaks.mkdir(parents=True, exist_ok=True)
    script.write_text(WATCH, encoding="utf-8")
    os.environ["PEAKS"] = str(peaks)
    run(write_recipe(folder, model, precision), folder / "runs", processes, script=script)
    return [[*map(int, (peaks / str(rank)).read_text().split())] for rank in range(processes)]


def write_recipe(folder: Path, model: str, precision: str) -> Path:
    """Writes the recipe and its text, some modules of the standard library; returns the recipe's path."""
    text, recipe = folder / "text.txt", folder / "tiny.yaml"
    modules = sorted(Path(os.__file__).parent.glob("a*.py"))
    text.write_text("\n<|endoftext|>\n".join(path.read_text(encoding="utf-8") for path in modules), encoding="utf-8")
    fields = json.dumps(SIZES | MODELS[model])
    recipe.write_text(RECIPE.format(model=fields, text=text.resolve(), precision=precision), encoding="utf-8")
    return recipe


def counted(folder: Path, model: str, precision: str, processes: int) -> TrainingMemory:
    """Returns what a plan counts for this run."""
    train = load_recipe(write_recipe(folder, model, precision)).train
    return training_memory(SIZES | MODELS[model] | {"vocab_size": ENTRIES}, train, processes, Machine(1.0, 1.0))


def report(memory: Memory, rows: list[Row], command: str) -> str:
    """Returns measured and counted bytes as a table."""
    lines = [
        "# Memory of a training step, by processes",
        "",
        f"`{command}`",
        "",
        "A random DeepSeek-V3 of 8 layers of 512, 4,096 entries, micro-batches of 4 windows of 256 tokens, AdamW; gloo "
        "on one CPU, one thread each; in MB. *Leading* and *others* are peaks of the third step above what the imports "
        "take: of the process that leads, and the largest of the others. "
        "*At rest* is what the latter has before that step. *Counted* is what `smolseek plan --processes` counts for "
        "each process; the ratio is of the measured peak, less that of the tiny model in as many processes. A run on a "
        "CPU keeps freed memory for its next tensors; *given back*: it does not.",
        "",
        circumstances(),
        "",
        "| model | products | processes | freed memory | leading | others | at rest | counted | measured / counted |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(memory, rows, row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _line(memory: Memory, rows: list[Row], row: Row) -> str:
    """Returns a row of the table."""
    said = counted(memory.work, row["model"], row["precision"], row["processes"]).total
    tiny = [other for other in rows if (other["model"], other["processes"]) == ("tiny", row["processes"])]
    peak = max(row["peaks"][1:] or row["peaks"])
    ratio = f"{(peak - max(tiny[0]['peaks'])) / said:.2f}" if tiny and row["model"] != "tiny" else ""
    rest = max(row["resting"][1:] or row["resting"]) if "resting" in row else None
    cells = [row["model"], row["precision"], str(row["processes"]), "given back" if row["frees"] else "kept"]
    cells += [
        _mb(row["peaks"][0]),
        _mb(peak) if row["processes"] > 1 else "",
        "" if rest is None else _mb(rest),
        _mb(said),
        ratio,
    ]
    return "| " + " | ".join(cells) + " |"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def main() -> int:
    """Measure, write the report, print it."""
    memory = tyro.cli(Memory, description=__doc__)

    def measure_all() -> tuple[Path, str, None]:
        rows = compare(memory)
        return rows.path, report(memory, rows.rows, command_line()), None

    return present(measure_all, plots=False)


if __name__ == "__main__":
    sys.exit(main())
