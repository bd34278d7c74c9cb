"""What is asked of vLLM on the CPU: folders, what it makes of each, and transformers' answer to the same prompts.

Its latent attention takes 512 + 64 alone on a CPU. Other sizes run with VLLM_MLA_DISABLE=1. `tests/export/test_vllm.py`
asserts it, `benchmarks/vllm_parity.py` writes a table of it.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolseek.checkpoint.hub import load_stock, save
from smolseek.config import ConvertSettings
from smolseek.conversion.pipeline import convert
from smolseek.model import StockModel
from tests.export.folders import YARN, tiny_folder
from tests.factories import LLAMA3 as LLAMA3_ROPE
from tests.factories import random_ids, tiny_dense
from tests.text import ENTRIES, tiny_tokenizer, write_stories

PYTHON = Path(os.environ.get("SMOLSEEK_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))
"""The Python of the environment that has vLLM."""
NEW_TOKENS = 12
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 8, 20)]

YARN_BOTH = YARN | {"mscale_all_dim": 0.7, "mscale": 0.7}
CONVERTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention alone, tied source": ({}, {}),
    "attention alone, untied source": ({"tie_word_embeddings": False}, {}),
    "attention alone, Llama 3's rotation": ({"rope_parameters": LLAMA3_ROPE}, {}),
    "query rank": ({}, {"q_lora_rank": 24}),
    "upcycled, group-limited": ({}, {"experts": "upcycle"}),
    "upcycled behind a dense layer": ({}, {"experts": "upcycle", "first_k_dense_replace": 1}),
    "carved": ({}, {"experts": "carve"}),
}
"""Fields of a dense source, and settings of its conversion to 512 + 64 numbers by the profile vllm."""
OTHER_RANKS = (256, 448)
"""Ranks beside 64 that run on a CPU without latent attention alone."""
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128}
LATENT |= {"hidden_size": 64, "moe_intermediate_size": 32}  # its CPU kernels want 32 to divide both
BUILT = {
    "experts": {},
    "two groups of four": {"n_group": 2, "topk_group": 1},
    "YaRN": {"rope_parameters": YARN_BOTH, "max_position_embeddings": 256},
}


ATTENTION, EXPERTS, BIAS = "model.layers.0.self_attn", "model.layers.1.mlp", "e_score_correction_bias"
"""Where tensors' names begin, and one ends."""
SAME, OTHER = "the same logits", "other logits"
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0 + slot / 32 for slot in range(32)]}
LONGROPE |= {"long_factor": [1.0 + slot / 8 for slot in range(32)]}


@dataclass(frozen=True)
class Folder:
    """A folder that the rules are about, and what vLLM makes of it: SAME, OTHER or words of its error.

    `fields` are written into config.json, and `absent` taken out, when the model is saved; then `tensors` changes them.
    """

    says: str
    sizes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def yarn(says: str, **rope: Any) -> Folder:
    """Returns a folder with YaRN, or another rope type."""
    return Folder(says, sizes={"max_position_embeddings": 256, "rope_parameters": YARN | rope})


def without(says: str, name: str) -> Folder:
    """Returns a folder without a tensor."""
    return Folder(says, tensors=lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})


def with_ones(says: str, name: str, *shape: int) -> Folder:
    """Returns a folder with ones at a tensor's name."""
    return Folder(says, tensors=lambda tensors: tensors | {name: torch.ones(shape)})


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors, the balancing biases in bf16."""
    return {name: tensor.bfloat16() if name.endswith(BIAS) else tensor for name, tensor in tensors.items()}


JUDGED = {
    # First, before the process has had another model in the memory that vLLM leaves as it is.
    "no o_proj": without(OTHER, f"{ATTENTION}.o_proj.weight"),
    "no norm": without("not initialized from checkpoint", "model.layers.0.input_layernorm.weight"),
    "no topk_method": Folder(f"KeyError.*{BIAS}", absent=("topk_method",)),
    "topk_method greedy": Folder(f"KeyError.*{BIAS}", fields={"topk_method": "greedy"}),
    "no scoring_func": Folder(OTHER, absent=("scoring_func",)),
    "no groups": Folder("AssertionError", fields={"n_group": None, "topk_group": None}),
    "biases": Folder(OTHER, sizes={"attention_bias": True}),
    "biases, query rank": Folder(OTHER, sizes={"attention_bias": True, "q_lora_rank": 24}),
    "gelu": Folder("Only silu is supported", fields={"hidden_act": "gelu"}),
    "halves rotated": Folder(OTHER, fields={"rope_interleave": False}),
    "linear": Folder("original_max_position", {"rope_parameters": LINEAR}),
    "dynamic": Folder("original_max_position", {"rope_parameters": DYNAMIC}),
    "llama3": yarn(OTHER, **LLAMA3),
    "longrope": yarn(OTHER, **LONGROPE),
    "YaRN": yarn(SAME),
    "YaRN's betas": yarn(SAME, beta_fast=8.0, beta_slow=2.0),
    "YaRN in llama3's place": yarn(SAME, beta_fast=2.6, beta_slow=0.3, mscale=1e-6, mscale_all_dim=1e-6),
    "YaRN's truncate": yarn(OTHER, truncate=False),
    "YaRN's attention_factor": yarn(OTHER, attention_factor=1.2),
    "YaRN's mscale alone": yarn(OTHER, mscale=0.7),
    "YaRN's mscale_all_dim alone": yarn(OTHER, mscale_all_dim=0.7),
    "o_proj of another shape": with_ones("RuntimeError", f"{ATTENTION}.o_proj.weight", 3, 3),
    "norm of another shape": with_ones("AssertionError", "model.norm.weight", 3),
    "smaller expert": with_ones(OTHER, f"{EXPERTS}.experts.0.up_proj.weight", 3, 3),
    "a weight more": with_ones("KeyError.*gate.scale", f"{EXPERTS}.gate.scale", 3),
    "a bias more": with_ones(SAME, f"{ATTENTION}.o_proj.bias", 64),
    "uncounted layer": with_ones("KeyError.*enorm", "model.layers.3.enorm.weight", 64),
    "biases in bf16": Folder(SAME, tensors=rounded),
}


def write_source(folder: Path, **fields: Any) -> Path:
    """Writes a tiny dense Llama with a tokenizer; returns the folder."""
    sizes: dict[str, Any] = {"vocab_size": ENTRIES, "max_position_embeddings": 128}
    save(StockModel(tiny_dense("llama", **sizes | fields)), folder, tokenizer_from=tiny_tokenizer())
    return folder


def convert_closed(source: Path, out: Path, **fields: Any) -> Path:
    """Converts a source in closed form on a text beside `out`; returns `out`."""
    text = str(write_stories(out.with_suffix(".txt")))
    closed = {"calibration": (text,), "calibration_windows": 8, "calibration_window_tokens": 32, "refine_steps": 0}
    return convert(source, out, settings=ConvertSettings(**closed | fields))  # type: ignore[arg-type]


def write(given: Folder, folder: Path) -> None:
    """Writes a folder as the model says it is; `damage` then changes its tensors."""
    tiny_folder(folder, **LATENT | given.sizes)
    config = folder / "config.json"
    tree = json.loads(config.read_text()) | given.fields
    config.write_text(json.dumps({name: value for name, value in tree.items() if name not in given.absent}))


def damage(given: Folder, folder: Path) -> None:
    """Changes the tensors of a folder that is written."""
    weights = folder / "model.safetensors"
    save_file(given.tensors(load_file(weights)), weights, metadata={"format": "pt"})


def run_in_vllm(jobs: list[dict[str, Any]], folder: Path, *, mla: bool = True) -> list[dict[str, Any]]:
    """Returns what one process of vLLM says to each job, one after another; `folder` is for its files.

    Raises:
        RuntimeError: the process ended with an error, whose text it is.
    """
    asked, out = folder / "jobs.json", folder / "answers.jsonl"
    asked.write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("in_vllm.py")), str(asked), str(out)]
    said = subprocess.run(
        command, env=os.environ | {"VLLM_MLA_DISABLE": str(int(not mla))}, capture_output=True, text=True, check=False
    )
    if said.returncode:
        raise RuntimeError(f"exit status {said.returncode}: {said.stderr}")
    return [json.loads(line) for line in out.read_text().splitlines()]


def job_of(folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Returns a job for in_vllm.py."""
    return {"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS}


@torch.no_grad()
def in_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Returns stock transformers' greedy tokens and their log-probabilities."""
    model, ids, chances = load_stock(folder).model, list(prompt), []
    for _ in range(NEW_TOKENS):
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        chances.append(float(logprobs.max()))
    return ids[len(prompt) :], chances
