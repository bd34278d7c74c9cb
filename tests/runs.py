"""Runs of the command line in processes of their own, to be killed, starved and resumed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.text import write_stories

ROOT = Path(__file__).parent.parent
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


def scratch_recipe(folder: Path, *, scoring_func: str = "sigmoid") -> Path:
    """scratch.yaml: 400 steps of a tiny V3 from random weights; its run's folder is RUNS/scratch."""
    recipe = folder / "scratch.yaml"
    recipe.write_text(SCRATCH.format(text=write_stories(folder / "a.txt"), scoring_func=scoring_func))
    return recipe


def start(recipe: Path, runs: Path, *options: str, prelude: str = "", **how: Any) -> "subprocess.Popen[str]":
    """`python train.py RECIPE --runs RUNS OPTIONS` with one thread; `prelude` is Python that the child runs before."""
    code = f"import sys\n{prelude}\nfrom smolseek.cli import main\nsys.exit(main(sys.argv[1:]))"
    head = [sys.executable, "-c", code, "train"] if prelude else [sys.executable, str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*head, str(recipe), "--runs", str(runs), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **how
    )


def finish(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """What a process said; it must end with `status`."""
    output, _ = process.communicate(timeout=1000)
    assert process.returncode == status, output
    return output


def wait_for(folder: Path, process: "subprocess.Popen[str]", pattern: str = "step-*") -> None:
    """Until something of that name lies in `folder`."""
    end = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
