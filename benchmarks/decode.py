"""Greedy decoding: tokens per second of ours, of transformers' DeepSeek-V3 and of the dense Llama that it came from.

python benchmarks/decode.py [--experts] [--prompts 512 1024 4096] [--batches 1 8 64] [--device cuda] [--out NAME]

All models have SmolLM2-135M's shape and random weights. The dense one has grouped heads and a cache of 384 numbers per
token and layer, V3 one of 160; ours and transformers' V3 have the same weights. Caches are filled with random numbers
instead of a prefill: decoding takes the same time. The competitors take turns, round by round, in one
process. A figure is the median over the rounds, its spread half their range. The limit is the time to read the active
weights and the cache once, at the memory bandwidth measured in the same process: no decoder of one token at a time can
be faster.

Shapes: B sequences.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from circumstances import circumstances, command_line
from rows import Row, Rows, present
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from smolseek.model import DeepseekV3
from smolseek.model.decoding import DecodeStep, has_fixed_steps
from smolseek.model.inference import prepare_for_generation
from smolseek.model.stock import cache_argument

OURS, V3, DENSE, COMPILED = "ours", "V3, transformers", "dense, transformers", "dense, compiled"
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Decode with every competitor."""

    prompts: tuple[int, ...] = (512, 1024, 4096)
    """Tokens in the cache before the first step."""
    batches: tuple[int, ...] = (1,)
    """Sequences at once."""
    competitors: tuple[str, ...] = (OURS, V3, DENSE)
    """Competitors; "dense, compiled" is transformers' static cache with torch.compile, which compiles for minutes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, activations and caches."""
    experts: bool = False
    """Replace the dense MLP by one shared and eight routed experts of 512 neurons, two of them per token."""
    layers: int = 30
    """Layers of both models."""
    rounds: int = 5
    """Turns of each competitor."""
    steps: int = 16
    """Tokens per turn and sequence."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    out: str = "run"
    """NAME in results/DATE-decode-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report and JSON lines go."""


def configs(mine: Comparison) -> tuple[DeepseekV3Config, LlamaConfig]:
    """Returns SmolLM2-135M's shape as V3 with 42% of its cache, and as the dense Llama."""
    shared = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": mine.layers,
        "num_attention_heads": 9,
        "max_position_embeddings": 65536,
        "rope_theta": 1e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    latent = {
        "num_key_value_heads": 9,
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "attention_bias": False,
    }
    experts = {
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1 if mine.experts else mine.layers,
    }
    return DeepseekV3Config(**shared, **latent, **experts), LlamaConfig(**shared, num_key_value_heads=3)


class Models:
    """The weights of every competitor, made once."""

    def __init__(self, mine: Comparison) -> None:
        torch.manual_seed(0)
        self.mine, self.dtype = mine, getattr(torch, mine.dtype)
        v3_config, llama_config = configs(mine)
        ours = DeepseekV3(v3_config).eval().to(mine.device, self.dtype)
        self.by_name: dict[str, Any] = {}
        for name in mine.competitors:
            if name == OURS:
                self.by_name[name] = copy.deepcopy(ours)
                prepare_for_generation(self.by_name[name])
            elif name == V3:
                self.by_name[name] = DeepseekV3ForCausalLM(v3_config).eval().to(mine.device, self.dtype)
                self.by_name[name].load_state_dict(ours.state_dict())
            elif name in (DENSE, COMPILED):
                self.by_name[name] = LlamaForCausalLM(llama_config).eval().to(mine.device, self.dtype)
            else:
                raise ValueError(f"competitors {name}: is none of {', '.join((OURS, V3, DENSE, COMPILED))}")
        self.active_bytes = _active_bytes(ours)

    def start(self, name: str, batch: int, prompt: int) -> Step:
        """Returns one competitor's step, (B, 1) ids to (B, 1) ids, with `prompt` random tokens in its cache."""
        model, room = self.by_name[name], prompt + self.mine.steps + 2
        if name == OURS:
            cache = model.new_cache(batch, room)
            cache.entries_LBSW.normal_()
            cache.length = prompt
            if has_fixed_steps(model):
                fixed = DecodeStep(model, cache)
                return lambda ids_B1: fixed(ids_B1).argmax(-1, keepdim=True)
            return lambda ids_B1: model.lm_head(model.hidden_states(ids_B1, cache=cache)[:, -1:]).argmax(-1)
        run: Any = model
        if name == COMPILED:
            stored: Any = StaticCache(config=model.config, max_cache_len=room)
            run = torch.compile(model, dynamic=False)
        else:
            stored = DynamicCache(config=model.config)
        cached = {cache_argument(model): stored, "use_cache": True}
        position = torch.full((batch, 1), prompt, device=self.mine.device)
        if name != COMPILED:
            model(torch.zeros_like(position), **cached)
            for layer in stored.layers:
                heads, width, value_width = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
                layer.keys = layer.keys.new_empty(batch, heads, prompt, width).normal_()
                layer.values = layer.keys.new_empty(batch, heads, prompt, value_width).normal_()
        mask = torch.zeros(1, 1, 1, room, dtype=self.dtype, device=self.mine.device) if name == COMPILED else None

        def step(ids_B1: Tensor) -> Tensor:
            options = {"position_ids": position, "attention_mask": mask} if name == COMPILED else {}
            logits = run(ids_B1, **cached, logits_to_keep=1, **options).logits
            return logits.argmax(-1)

        return step


def _active_bytes(model: DeepseekV3) -> int:
    """Returns the bytes of the weights that one token reads: all but the embedding table and unchosen experts."""
    parameters = dict(model.named_parameters())
    total = sum(p.nbytes for p in parameters.values())  # the tied embedding counts once, as the head
    routed = sum(p.nbytes for name, p in parameters.items() if ".mlp.experts." in name)
    return total - routed + routed * model.config.num_experts_per_tok // model.config.n_routed_experts


def measure_bandwidth(device: str) -> float:
    """Returns the bytes per second that a sum over 512 MiB reads, the best of ten."""
    numbers = torch.ones(128 * 2**20, device=device)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        float(numbers.sum())
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / min(seconds)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects garbage before the block, and none inside it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@torch.inference_mode()
def turn(step: Step, batch: int, steps: int, device: str) -> float:
    """Returns the seconds per step, after two steps of warm-up."""
    ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
    for _ in range(2):
        ids_B1 = step(ids_B1)
    with _no_garbage_collection():
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            ids_B1 = step(ids_B1)
        ids_B1.tolist()
        return (time.perf_counter() - begin) / steps


def compare(mine: Comparison) -> Rows:
    """Measure every combination that has no row yet."""
    if mine.threads:
        torch.set_num_threads(mine.threads)
    rows = Rows(mine.results, f"decode-{mine.out}", mine, free=("prompts", "batches", "competitors", "results"))
    models = Models(mine)
    for batch in mine.batches:
        for prompt in mine.prompts:
            names = [n for n in mine.competitors if not rows.find(competitor=n, batch=batch, prompt=prompt)]
            bandwidth = measure_bandwidth(mine.device) if names else 0.0
            for name, seconds in measure_cell(mine, models, names, batch, prompt).items():
                rows.add(
                    competitor=name,
                    batch=batch,
                    prompt=prompt,
                    seconds=seconds,
                    limit=bytes_read(mine, models, name, batch, prompt) / bandwidth,
                    bandwidth=bandwidth,
                )
                print(f"  batch {batch}, {prompt}: {name} {statistics.median(seconds) * 1e3:.1f} ms", flush=True)
    return rows


def measure_cell(mine: Comparison, models: Models, names: list[str], batch: int, prompt: int) -> dict[str, list[float]]:
    """Returns the seconds per step of each named competitor, turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(mine.rounds):
        for name in names:
            with torch.inference_mode():
                step = models.start(name, batch, prompt)
            seconds[name].append(turn(step, batch, mine.steps, mine.device))
            del step
    return seconds


def bytes_read(mine: Comparison, models: Models, name: str, batch: int, prompt: int) -> float:
    """Returns the bytes that a step must read, with the experts of one token; a batch may meet more of them."""
    numbers = 384 if name in (DENSE, COMPILED) else 160
    size = models.dtype.itemsize
    weights = (
        sum(p.nbytes for p in models.by_name[name].parameters()) if name in (DENSE, COMPILED) else models.active_bytes
    )
    return weights + batch * prompt * mine.layers * numbers * size


# -- report -----------------------------------------------------------------------------------------------------------


def report(mine: Comparison, rows: list[Row], command: str) -> str:
    """Returns the comparison as Markdown."""
    shape = "one shared and eight routed experts of 512, two a token" if mine.experts else "dense MLPs"
    bandwidth = statistics.median(row["bandwidth"] for row in rows) / 1e9
    about = (
        f"SmolLM2-135M's shape, {mine.layers} layers, {shape}; {mine.dtype}; medians of {mine.rounds} turns of "
        f"{mine.steps} steps ± half the range. Memory bandwidth {bandwidth:.1f} GB/s. Cache per token: V3 160 numbers "
        "a layer, dense 384. The limit of a row is its own."
    )
    lines = [
        "| batch | prompt | | ms per step | tokens/s | of the limit | ours is faster by |",
        "|" + "---|" * 7,
    ]
    for batch, prompt in dict.fromkeys((row["batch"], row["prompt"]) for row in rows):
        cell = {row["competitor"]: row for row in rows if (row["batch"], row["prompt"]) == (batch, prompt)}
        medians = {name: statistics.median(row["seconds"]) for name, row in cell.items()}
        for name, row in cell.items():
            spread = (max(row["seconds"]) - min(row["seconds"])) / 2
            cells = [f"{batch}", f"{prompt:,}", name, f"{medians[name] * 1e3:.1f} ± {spread * 1e3:.1f}"]
            cells += [f"{batch / medians[name]:,.0f}", f"{row['limit'] / medians[name]:.0%}"]
            cells.append(f"{medians[name] / medians[OURS]:.2f}" if OURS in medians else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n\n".join([f"# Decoding: {mine.out}", f"`{command}`", circumstances(), about, "\n".join(lines)]) + "\n"


def main() -> int:
    """Measure, write the report, print it."""
    mine = tyro.cli(Comparison, description=__doc__)

    def measure() -> tuple[Path, str, None]:
        rows = compare(mine)
        return rows.path, report(mine, rows.rows, command_line()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
