"""The memory of processes that share a run: each has its part of model and teacher, and a layer at a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolseek.checkpoint.hub import save
from smolseek.formats.headers import read_headers
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.runs import ROOT
from tests.text import ENTRIES, tiny_tokenizer, write_stories

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel counts no peaks"),
]

CONSTANT = 16 * 2**20
"""Activations, buffers of the collectives and what the allocator cannot use again, in bytes."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""With these glibc gives freed memory back at once, so the memory that a process has is what it uses."""
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": ENTRIES}
V3_SIZES = SIZES | {"moe_intermediate_size": 128, "intermediate_size": 1024, "kv_lora_rank": 64}
SCRIPT = """
import gc, json, sys
from pathlib import Path
from smolseek.checkpoint.hub import load, load_stock, load_tokenizer
from smolseek.config import DataSettings, ParallelSettings, Recipe, SampleSettings, TrainSettings
from smolseek.training.processes import join_processes
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher

folder = Path(sys.argv[1])

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peaks(size, processes, **train):
    recipe = Recipe(
        name=size,
        data=DataSettings(train=(str(folder / "a.txt"),), held_out_share=0.2, held_out_tokens=300),
        train=TrainSettings(
            steps=2, batch_windows=4, window_tokens=16, distill_weight=0.5, trains="attention", **train
        ),
        sample=SampleSettings(prompts=("Anna ",), max_new_tokens=3),
    )
    gc.collect()
    before, found = memory("VmRSS"), {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    model = load(folder / f"{size}-model", shard=processes.shard)
    teacher = load_stock(folder / f"{size}-teacher", shard=processes.shard)
    found["loaded"] = memory("VmHWM") - before
    tokenizer = load_tokenizer(folder / f"{size}-model")
    run = folder / f"{size}-{train['precision']}"
    trainer = Trainer(model, tokenizer, recipe, run, teacher=teacher, processes=processes)
    del model, teacher
    trainer.fit(Watcher())
    found["trained"] = memory("VmHWM") - before
    trainer.save_model("model")
    found["written"] = memory("VmHWM") - before
    return found

with join_processes(ParallelSettings(), "cpu") as (processes, _):
    for train in ({"precision": "float32"}, {"precision": "bfloat16", "activation_checkpointing": True}):
        peaks("tiny", processes, **train)  # whatever is imported and allocated once
        found = peaks("big", processes, **train)
        (folder / f"peaks-{train['precision']}-{processes.rank}.json").write_text(json.dumps(found))
"""


def stored_bytes(folder: Path, part: str = "") -> int:
    """Returns the bytes of the tensors in a folder whose names hold `part`, at four bytes for a number."""
    headers = read_headers(folder)
    return sum(4 * math.prod(header.shape) for name, header in headers.items() if part in name)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_process_holds_a_whole_model(tmp_path, processes):
    """Loading, training with a teacher, evaluating, sampling and writing."""
    for size, layers in (("tiny", 2), ("big", 16)):
        model = tiny_v3(**V3_SIZES, num_hidden_layers=layers)
        teacher = StockModel(tiny_llama(**SIZES, intermediate_size=1024, num_hidden_layers=layers))
        save(model, tmp_path / f"{size}-model", tokenizer_from=tiny_tokenizer())
        save(teacher, tmp_path / f"{size}-teacher", tokenizer_from=tiny_tokenizer())
    write_stories(tmp_path / "a.txt")
    (tmp_path / "measure.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | GIVE_BACK
    done = subprocess.run(
        [*command, str(tmp_path / "measure.py"), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    model, teacher = (stored_bytes(tmp_path / f"big-{name}") for name in ("model", "teacher"))
    trained = stored_bytes(tmp_path / "big-model", ".self_attn.")
    layer = max(
        stored_bytes(tmp_path / "big-model", ".layers.5."), stored_bytes(tmp_path / "big-teacher", ".layers.5.")
    )
    assert min(model, teacher) / 2 > 30e6 > CONSTANT + layer  # so a whole model beside half of the other is noticed
    loading = (model + teacher) / processes + layer + CONSTANT
    # Gradients and two moments; a layer more is gathered ahead in the backward pass, and one has whole gradients.
    training = loading + 3 * trained / processes + 2 * layer
    for precision in ("float32", "bfloat16"):
        for rank in range(processes):
            found = json.loads((tmp_path / f"peaks-{precision}-{rank}.json").read_text())
            assert found["loaded"] < loading, (precision, rank, found)
            assert found["written"] < training, (precision, rank, found)
