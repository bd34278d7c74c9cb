"""What a conversion costs: time, memory by stage and disk, on a random checkpoint of a known shape.

python benchmarks/convert.py [--shape 1.7B] [--tokenizer FOLDER] [--experts none carve upcycle] ...

The weights change neither the memory nor the time of the decompositions, and the numbers of steps and windows do not
change the memory. The defaults are therefore short. Linux only: a stage's peak is the kernel's count, reset when the
stage begins.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from circumstances import circumstances, command_line

from smolseek.checkpoint.folder import FolderWriter
from smolseek.config import ConvertSettings
from smolseek.conversion.pipeline import convert
from smolseek.data.tokenizer import train_tokenizer
from smolseek.formats.dense import read_source
from smolseek.machine import measure_machine
from smolseek.planning import Cost, plan

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
SHAPES = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
MEASURE = "--measure"
Row = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """Convert a random checkpoint and measure it."""

    shape: Literal["135M", "1.7B"] = "135M"
    """SmolLM2's."""
    layers: int | None = None
    """Number of layers; none: as many as that shape has."""
    tokenizer: Path | None = None
    """Folder with a tokenizer.json; none: a tokenizer of single bytes, which needs more text."""
    calibration: tuple[str, ...] = ("builtin:python",)
    """Text for the conversion."""
    calibration_windows: int = 4
    """Windows for the moments."""
    refine_steps: tuple[int, ...] = (0, 2)
    """Layer-wise steps; one conversion for each."""
    experts: tuple[Literal["none", "carve", "upcycle"], ...] = ("none",)
    """Kinds of MLPs; each is converted with each number of steps."""
    threads: int | None = None
    """Threads of a conversion; none: torch's choice."""
    out: str | None = None
    """NAME in results/DATE-convert-NAME.md; none: the shape."""
    results: Path = Path(__file__).parent / "results"
    """Where the report goes."""
    work: Path = Path("runs/convert")
    """Where the checkpoint and the converted folders live until they are measured."""


def write_checkpoint(config: dict[str, Any], folder: Path, tokenizer: Path | None) -> None:
    """Write a random bf16 checkpoint; at most one shard is in memory."""
    generator = torch.Generator().manual_seed(0)
    with FolderWriter(folder, force=True) as writer:
        for name, shape in read_source(config).tensors().items():
            random = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            writer.add(name, torch.ones_like(random) if name.endswith("norm.weight") else random)
        writer.write_json("config.json", config)
        if tokenizer is not None:
            writer.copy_tokenizer(tokenizer)
        else:
            train_tokenizer(["bytes"], 300).save_pretrained(writer.path)


# -- one conversion, in a process of its own --------------------------------------------------------------------------


class Stages:
    """Seconds and peak memory of each stage, in order: the GPU's memory if `device` is one, else the process's."""

    def __init__(self, device: str = "cpu") -> None:
        self.rows: list[Row] = []
        self.on_gpu = device == "cuda"
        self.begin("read, calibrate")

    def on_progress(self, stage: str, done: int, count: int) -> None:
        """Begin the stage that a conversion is in."""
        self.begin(stage if done < count else f"after {stage}")

    def begin(self, stage: str) -> None:
        """End the stage before, unless it is the same one."""
        if self.rows and self.rows[-1]["stage"] == stage:
            return
        self.end()
        self.rows.append({"stage": stage, "seconds": -time.perf_counter()})
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present use

    def end(self) -> None:
        """End the last stage."""
        if self.rows:
            self.rows[-1]["peak_bytes"] = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes("VmHWM")
            self.rows[-1]["seconds"] += time.perf_counter()


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Returns the bytes that this process has in memory now, or its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(source: str, out: str, threads: int | None, fields: dict[str, Any]) -> Row:
    """Convert in this process; returns seconds and peaks, less the memory in use after the imports."""
    if threads:
        torch.set_num_threads(threads)
    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoTokenizer  # lazy imports
    imports, start, stages = resident_bytes("VmRSS"), time.perf_counter(), Stages()
    convert(source, out, force=True, on_progress=stages.on_progress, **fields)
    stages.end()
    rows = [row | {"peak_bytes": row["peak_bytes"] - imports} for row in stages.rows]
    return {"imports_bytes": imports, "seconds": time.perf_counter() - start, "stages": rows}


# -- all of them ------------------------------------------------------------------------------------------------------


def measure_all(mine: Measurement, config: dict[str, Any]) -> Iterator[Row]:
    """Returns a row for each conversion, one after the other."""
    source = mine.work / "source"
    write_checkpoint(config, source, mine.tokenizer)
    for experts in mine.experts:
        for steps in mine.refine_steps:
            fields = {"calibration": mine.calibration, "calibration_windows": mine.calibration_windows}
            fields |= {"refine_steps": steps, "experts": experts}
            out = mine.work / "converted"
            job = json.dumps([str(source), str(out), mine.threads, fields])
            told = subprocess.run(
                [sys.executable, __file__, MEASURE, job], stdout=subprocess.PIPE, check=True, text=True
            )
            disk = sum(file.stat().st_size for file in out.iterdir())
            shutil.rmtree(out)
            planned = plan(config, ConvertSettings(**fields), measure_machine()).convert
            row = {"experts": experts, "steps": steps, "disk_bytes": disk, "plan": planned} | json.loads(told.stdout)
            print(row, flush=True)
            yield row
    shutil.rmtree(source)


def report(mine: Measurement, config: dict[str, Any], rows: list[Row]) -> str:
    """Returns Markdown: each conversion by stage, and the cost that `smolseek plan` predicted."""
    weights = 4 * read_source(config).parameters()
    lines = [
        f"# Cost of converting, {mine.out or mine.shape}, {datetime.date.today()}",
        f"`{command_line()}`\n\n{circumstances()}",
        f"A random checkpoint of SmolLM2-{mine.shape}'s shape, {config['num_hidden_layers']} layers, {weights // 4:,} "
        f"parameters ({_gb(weights)} in fp32). Memory is above what is resident after the imports.",
    ]
    table = ["| experts | refine steps | stage | seconds | peak, GB | over fp32 weights |", "|" + "---|" * 6]
    for row in rows:
        planned: Cost = row["plan"]
        peak = max(stage["peak_bytes"] for stage in row["stages"])
        about = f"| {row['experts']} | {row['steps']} |"
        for stage in row["stages"]:
            table.append(f"{about} {stage['stage']} | {_cells(stage['seconds'], stage['peak_bytes'], weights)}")
        whole = f"**all** ({_gb(row['imports_bytes'])} after imports, {_gb(row['disk_bytes'])} written)"
        table.append(f"{about} {whole} | {_cells(row['seconds'], peak, weights)}")
        table.append(f"{about} as planned | {_cells(planned.seconds, planned.memory_bytes, weights)}")
    return "\n\n".join([*lines, "\n".join(table)]) + "\n"


def _cells(seconds: float, size_bytes: int, weights_bytes: int) -> str:
    return f"{seconds:.0f} | {size_bytes / 1e9:.2f} | {size_bytes / weights_bytes:.2f} |"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def main() -> int:
    """Measure, write and print the report."""
    if MEASURE in sys.argv:
        source, out, threads, fields = json.loads(sys.argv[-1])
        print(json.dumps(measure(source, out, threads, fields)))
        return 0
    mine = tyro.cli(Measurement, description=__doc__)
    config: dict[str, Any] = SMOLLM2 | SHAPES[mine.shape]
    if mine.layers:
        config["num_hidden_layers"] = mine.layers
    text = report(mine, config, list(measure_all(mine, config)))
    mine.results.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today()}-convert-{mine.out or mine.shape}.md"
    (mine.results / name).write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
