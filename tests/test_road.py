"""The whole road on tiny models: in one process, and killed and resumed from the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolseek.checkpoint.hub import load, save
from smolseek.config import ConvertSettings, DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.model import StockModel
from smolseek.road import table, travel
from smolseek.training.loop import Watcher
from tests.factories import random_ids, tiny_llama
from tests.text import ENTRIES, tiny_tokenizer, write_stories

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    return save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "source", tokenizer_from=tiny_tokenizer())


@pytest.fixture
def recipe(tmp_path, source):
    return Recipe(
        name="tiny",
        source=str(source),
        convert=ConvertSettings(
            calibration_windows=8, calibration_window_tokens=32, refine_steps=2, distill_steps=2, experts="upcycle"
        ),
        compare_dense=True,
        data=DataSettings(
            train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2, held_out_tokens=300
        ),
        train=TrainSettings(
            steps=6,
            batch_windows=4,
            window_tokens=16,
            warmup_steps=2,
            distill_weight=0.5,
            checkpoint_every=2,
            log_every=1,
        ),
        sample=SampleSettings(every=3, prompts=("Anna ",), max_new_tokens=5),
    )


def test_the_road_ends_in_a_stock_folder_and_a_table(recipe, tmp_path):
    stages = []
    folder = tmp_path / "runs" / "tiny"
    summary = travel(recipe, folder, watcher=Watcher(on_stage=stages.append))
    assert json.loads((folder / "summary.json").read_text()) == summary
    for row in ("dense", "converted", "healed", "dense_trained"):
        assert {
            "loss",
            "perplexity",
            "cache_bytes_per_token",
            "total_parameters",
            "active_parameters",
            "decode_tokens_per_second",
            "sample",
        } <= set(summary[row])
    assert summary["converted"]["cache_bytes_per_token"] < 0.6 * summary["dense"]["cache_bytes_per_token"]
    assert summary["healed"]["loss"] < summary["converted"]["loss"]
    assert summary["maxvio"] >= 0
    assert "healed" in table(summary) and summary["healed"]["sample"] in table(summary)
    started = [stage.split()[0] for stage in stages if not stage.startswith("convert:")]
    assert started == ["convert", "heal:", "train", "measure"]
    for name in ("model", "best", "converted", "checkpoints", "logs.txt", "metrics.jsonl"):
        assert (folder / name).exists()
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = random_ids(2, 30)
    torch.testing.assert_close(stock(ids).logits, load(folder / "model")(ids), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder / "model").bos_token_id == 0
    assert "tiny" in (folder / "model" / "README.md").read_text()


def test_parameters_in_the_table_are_those_of_the_weights(recipe, tmp_path):
    summary = travel(recipe, tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    assert summary["healed"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(1, 1)
    assert summary["healed"]["cache_bytes_per_token"] == cache.nbytes // 2  # bf16, the cache here is fp32


def test_an_existing_run_is_kept_unless_forced(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious").write_text("1")
    with pytest.raises(ValueError, match="--resume"):
        travel(recipe, folder)
    assert (folder / "precious").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": None}, "either source"),
        ({"model": {"model_type": "llama"}}, "either source"),
        ({"source": "./nowhere"}, "no such folder"),
        ({"source": None, "convert": None, "model": {"model_type": "llama"}}, "need a tokenizer"),
        (
            {"source": None, "convert": None, "train_tokenizer_entries": 300, "model": {"model_type": "gpt2"}},
            "llama, deepseek_v3",
        ),
        (
            {"source": None, "convert": None, "train_tokenizer_entries": 300, "model": {"model_type": "llama", "n": 1}},
            r"model\.n",
        ),
    ],
)
def test_recipes_that_cannot_run(recipe, tmp_path, changes, words):
    import dataclasses

    with pytest.raises(ValueError, match=words):
        travel(dataclasses.replace(recipe, **changes), tmp_path / "run")


# -- killed and resumed -----------------------------------------------------------------------------------------------

SCRATCH = """
model:
  {{model_type: deepseek_v3, hidden_size: 32, intermediate_size: 48, moe_intermediate_size: 16, num_hidden_layers: 2,
    num_attention_heads: 2, num_key_value_heads: 2, kv_lora_rank: 16, q_lora_rank: null, qk_rope_head_dim: 8,
    qk_nope_head_dim: 8, v_head_dim: 8, n_routed_experts: 4, n_shared_experts: 1, num_experts_per_tok: 2, n_group: 1,
    topk_group: 1, first_k_dense_replace: 1, max_position_embeddings: 64, scoring_func: {scoring_func}}}
train_tokenizer_entries: 300
data: {{train: {text}, shuffle_windows: 8, held_out_share: 0.2, held_out_tokens: 300}}
train: {{steps: 400, batch_windows: 4, window_tokens: 16, learning_rate: 1e-2, evaluate_every: 40, checkpoint_every: 7}}
sample: {{every: 40, prompts: ["Anna "], max_new_tokens: 8}}
"""


def start(recipe, runs, *options):
    command = [sys.executable, ROOT / "train.py", recipe, "--runs", runs, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_one_thread())


def _one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_for(path, process, pattern="step-*"):
    end = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def test_killed_at_random_and_resumed_the_run_ends_the_same(tmp_path):
    recipe = tmp_path / "scratch.yaml"
    recipe.write_text(SCRATCH.format(text=write_stories(tmp_path / "a.txt"), scoring_func="sigmoid"))
    whole = start(recipe, tmp_path / "whole")
    draw = random.Random()
    cut = start(recipe, tmp_path / "cut")
    for number in range(2):
        wait_for(tmp_path / "cut" / "scratch" / "checkpoints", cut)
        time.sleep(draw.uniform(0, 0.7))
        cut.send_signal([signal.SIGKILL, signal.SIGTERM][number])
        assert cut.wait(60) != 0, "the run ended before the signal came"
        cut = start(recipe, tmp_path / "cut", "--resume")
    for process in (whole, cut):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    one, two = (json.loads((tmp_path / run / "scratch" / "summary.json").read_text()) for run in ("whole", "cut"))
    assert one["trained"]["loss"] == two["trained"]["loss"]
    assert one["maxvio"] == two["maxvio"]


def test_a_softmax_router_trains_and_says_it_is_not_stock(tmp_path):
    from smolseek.cli import main

    recipe = tmp_path / "scratch.yaml"
    recipe.write_text(SCRATCH.format(text=write_stories(tmp_path / "a.txt"), scoring_func="softmax"))
    assert main(["train", str(recipe), "--runs", str(tmp_path / "runs"), "--train.steps", "3"]) == 0
    folder = tmp_path / "runs" / "scratch" / "model"
    assert "not stock" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "smolseek_v3_softmax"
    assert main(["generate", str(folder), "--prompt", "Anna", "--max-new-tokens", "3"]) == 0
