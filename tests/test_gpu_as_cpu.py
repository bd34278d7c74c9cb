"""What only a CUDA device can show: the CPU's numbers there, training in bf16 and compiled, FSDP, decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smolseek.checkpoint.hub import load, load_stock, save
from smolseek.config import DataSettings, ParallelSettings, Recipe, SampleSettings, TrainSettings
from smolseek.conversion.pipeline import convert
from smolseek.generation import generate
from smolseek.model import StockModel
from smolseek.training.processes import TorchrunProcesses
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import random_ids, tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories

pytestmark = [
    pytest.mark.skipif(not True, reason="no CUDA device here"),
]

CONVERSIONS: dict[str, dict[str, Any]] = {
    "closed form": {"refine_steps": 0},
    "refined": {"refine_steps": 30},
    "end-to-end KL": {"refine_steps": 10, "distill_steps": 30},
    "carve": {"refine_steps": 30, "experts": "carve", "active": 0.75},
    "upcycle": {"refine_steps": 0, "experts": "upcycle"},
    "exact": {"exact": True},
    "spilled moments": {"refine_steps": 0},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_stories(tmp_path_factory.mktemp("text") / "stories.txt"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder, tokenizer_from=tiny_tokenizer())
    return folder


def converted(source: Path, out: Path, text: str, device: str, **changes: Any) -> Path:
    settings = {"calibration": text, "calibration_windows": 12, "calibration_window_tokens": 32, "distill_steps": 0}
    sizes = {} if changes.get("exact") else {"kv_lora_rank": 12, "qk_rope_head_dim": 4}
    return convert(source, out, device=device, **(settings | sizes | changes))


def recipe_of(text: str, **train: Any) -> Recipe:
    plain = {"steps": 60, "batch_windows": 4, "window_tokens": 16, "learning_rate": 1e-2, "warmup_steps": 2}
    return Recipe(
        source="unused",
        data=DataSettings(train=(text,), shuffle_windows=8, held_out_share=0.2),
        train=TrainSettings(**(plain | train)),
        sample=SampleSettings(max_new_tokens=5),
    )


def test_logits_and_greedy_tokens_are_the_cpus():
    model, ids = tiny_v3(), random_ids(2, 20)
    on_cpu, tokens = model(ids), generate(model, ids, max_new_tokens=20)
    model = model
    torch.testing.assert_close(model(ids).cpu(), on_cpu, rtol=0, atol=1e-3)
    assert torch.equal(generate(model, ids, max_new_tokens=20).cpu(), tokens)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_loses_what_it_loses_on_the_cpu(kind, source, text, tmp_path, monkeypatch):
    if kind == "spilled moments":
        monkeypatch.setattr("smolseek.conversion.collect.SPILL_BYTES", 0)
    losses = {}
    for device in ("cpu", "cpu"):
        import shutil

        shutil.rmtree(tmp_path / "cpu", ignore_errors=True)
        out = converted(source, tmp_path / device, text, device, **CONVERSIONS[kind])
        losses[device] = json.loads((out / "conversion.json").read_text())["losses"]
        ids = random_ids(2, 20)
        logits = load_stock(out)(ids)
        if kind in ("exact", "upcycle"):
            same = load_stock(source if kind == "exact" else tmp_path / "cpu")(ids)
            torch.testing.assert_close(logits, same, rtol=0, atol=1e-3 if kind == "exact" else 0.1)
    assert losses["cpu"].keys() == losses["cpu"].keys()
    for stage, loss in losses["cpu"].items():
        assert losses["cpu"][stage] == pytest.approx(loss, rel=0.02), stage


@pytest.mark.parametrize("changes", [{"precision": "float32"}, {"precision": "bfloat16"}, {"compile": True}])
def test_training_learns(changes, text, tmp_path):
    recipe = recipe_of(text, **changes)
    trainer = Trainer(tiny_v3(vocab_size=ENTRIES), tiny_tokenizer(), recipe, tmp_path / "run")
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 1


@pytest.mark.parametrize("experts", ["carve", "upcycle"])
def test_converted_experts_heal(experts, source, text, tmp_path):
    out = converted(source, tmp_path / "out", text, "cpu", experts=experts, refine_steps=5)
    recipe = recipe_of(text, distill_weight=0.9, steps=40, learning_rate=3e-3)
    teacher = load_stock(source, device="cpu")
    trainer = Trainer(load(out, device="cpu"), tiny_tokenizer(), recipe, tmp_path / "run", teacher=teacher)
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before


def test_fsdp_on_one_device(text, tmp_path):
    """FSDP over one device still shards, gathers and saves as over several."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        processes = TorchrunProcesses(ParallelSettings(), "cpu")
        model = tiny_v3(vocab_size=ENTRIES)
        trainer = Trainer(model, tiny_tokenizer(), recipe_of(text), tmp_path / "run", processes=processes)
        before = trainer.evaluate().loss
        assert trainer.fit(Watcher()).loss < before - 1
        assert load(trainer.save_model("model")).config.vocab_size == ENTRIES
    finally:
        torch.distributed.destroy_process_group()
