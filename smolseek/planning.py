"""What a conversion will give and cost, from a source's config.json alone; no weights, no torch.

Symbols: D hidden, L layers, H heads, G KV heads, d head_dim, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim, Y = 2 * G * d (keys and values of a token), W weights that a token is multiplied with.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.conversion.target import attention_biases, distill_steps, has_qk_norms, read_source, target_config
from smolseek.formats.runtimes import check, verdict

CACHE_NUMBER_BYTES = 2
"""bf16, in which caches are counted."""
EFFICIENCY = 0.5
"""Share of the matrix-product peak that a model reaches; this project's trainer gets about this on 2 CPU cores."""

_ATTENTION_FIELDS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
_REFINE_STEP_TOKENS, _DISTILL_STEP_TOKENS = 1024, 2048  # as in conversion/refine.py, which imports torch
_GRADIENT_TOKENS, _SPILL_BYTES = 256, 2**30  # of calibration at once, as in conversion/moments.py, for the same reason
_FITTING_COPIES = 4  # of a layer's moments while its block is fitted, counted on the measured peaks
_LOGITS_AT_ONCE = 2**23  # what training holds of them
_LOGITS_COPIES = 4  # logits, their gradient, probabilities, log-probabilities
_TRAFFIC = 20  # times that a training step moves an activation or a score through memory, measured on small models


@dataclass(frozen=True)
class Machine:
    """What this machine does at best: fp32 matrix products, and reading weights."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class ModelSize:
    """Parameters (`active`: those that one token meets) and cache of a model; bytes are bf16."""

    total_parameters: int
    active_parameters: int
    cache_numbers_per_token_and_layer: int
    cache_bytes_per_token: int
    cache_bytes_at_max_context: int


@dataclass(frozen=True)
class Cost:
    """Estimated time and peak memory."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """A conversion before it runs; `payoff_context_tokens` is None where the smaller cache never pays."""

    source: ModelSize
    target: ModelSize
    cache_share: float
    max_context_tokens: int
    payoff_context_tokens: int | None
    convert: Cost
    heal: Cost
    heal_tokens: int
    machine: Machine
    profile: str
    runtimes: dict[str, str]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return dataclasses.asdict(self)


def plan(
    source_config: dict[str, Any], settings: ConvertSettings, machine: Machine, *, heal_tokens: int = 10_000_000
) -> Plan:
    """What converting this config.json under `settings`, and healing for `heal_tokens`, gives and costs.

    Raises:
        ValueError: as `target_config`.
    """
    source, config = read_source(source_config), target_config(source_config, settings)
    before, after = _size(source), _size(config)
    return Plan(
        source=before,
        target=after,
        cache_share=after.cache_bytes_per_token / before.cache_bytes_per_token,
        max_context_tokens=source["max_position_embeddings"],
        payoff_context_tokens=payoff_context_tokens(source, config, machine),
        convert=_convert_cost(source, config, settings, machine, distill_steps(source_config, settings)),
        heal=_heal_cost(config, machine, heal_tokens),
        heal_tokens=heal_tokens,
        machine=machine,
        profile="transformers" if settings.exact else settings.profile,
        runtimes={runtime: verdict(findings) for runtime, findings in check(config).items()},
        config=config,
    )


def count_parameters(config: dict[str, Any]) -> tuple[int, int]:
    """Total and active parameters of a DeepSeek-V3 or Llama-like config.json (a routing bias is none)."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    dense_layers = min(layers, config["first_k_dense_replace"]) if _is_mla(config) else layers
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * config["vocab_size"] * hidden
    shared = embeddings + hidden + layers * (2 * hidden + _attention_parameters(config))
    shared += dense_layers * 3 * hidden * config["intermediate_size"]
    if dense_layers == layers:
        return shared, shared
    expert_layers, expert = layers - dense_layers, 3 * hidden * config["moe_intermediate_size"]
    shared += expert_layers * (config["n_routed_experts"] * hidden + config["n_shared_experts"] * expert)
    total, active = (
        shared + expert_layers * config[field] * expert for field in ("n_routed_experts", "num_experts_per_tok")
    )
    return total, active


def cache_bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes that one token leaves in the cache of all layers, in bf16."""
    return config["num_hidden_layers"] * _cache_numbers(config) * CACHE_NUMBER_BYTES


def payoff_context_tokens(source: dict[str, Any], target: dict[str, Any], machine: Machine) -> int | None:
    """Context length T from which the converted model decodes faster at batch 1; None: at no length.

    A token takes (2 W bytes) / bandwidth + (2 W flops) / peak, and per cached position and layer
    cache bytes / bandwidth + attention flops / peak, where attention takes 4 H d flops in the dense model and
    2 H (C + R) + 2 H C absorbed (DeepSeek-V2, section 2.1.2): T is where the two lines meet.
    """
    (source_start, source_slope), (target_start, target_slope) = (_decode(c, machine) for c in (source, target))
    if target_slope >= source_slope:
        return None
    return max(0, math.ceil((target_start - source_start) / (source_slope - target_slope)))


def measure_machine(seconds: float = 0.4) -> Machine:
    """This machine's fp32 matrix-product and matrix-vector rates, the best of what fits in `seconds`.

    Products small enough for one thread of the BLAS take turns with ones that use all: its threads wait for each other,
    so other work on the machine can spoil the second kind a hundredfold.
    """
    squares = [np.ones((side, side), np.float32) for side in (*[64] * 20, 384)]
    weights = np.ones((4096, 64, 64), np.float32)
    readings = [(weights, np.ones(64, np.float32)), (weights.reshape(8192, 2048), np.ones(2048, np.float32))]
    flops = read = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        flops = max(flops, *(2 * len(square) ** 3 / _seconds(np.matmul, square, square) for square in squares))
        read = max(read, *(weights.nbytes / _seconds(np.matmul, *reading) for reading in readings))
    return Machine(flops_per_second=flops, bytes_per_second=read)


def render(plan: Plan) -> str:
    """The plan as text."""
    before, after, config = plan.source, plan.target, plan.config
    context, length, tokens = plan.max_context_tokens, plan.payoff_context_tokens, f"{plan.heal_tokens:,} tokens"
    pays = "never decodes faster" if length is None else f"decodes faster from {length:,} tokens of context on"
    cache = f"{before.cache_bytes_per_token:,} -> {after.cache_bytes_per_token:,} bytes ({plan.cache_share:.1%})"
    lines = [
        ("attention", ", ".join(f"{name} {config[name]}" for name in _ATTENTION_FIELDS if config[name] is not None)),
        ("MLP", _experts(config)),
        (
            "parameters",
            f"{before.total_parameters:,} -> {after.total_parameters:,} ({after.active_parameters:,} active)",
        ),
        ("cache per token", cache),
        (f"at {context:,}", f"{_gb(before.cache_bytes_at_max_context)} -> {_gb(after.cache_bytes_at_max_context)}"),
        ("smaller cache", f"{pays} (batch 1)"),
        ("this machine", f"{plan.machine.flops_per_second / 1e9:,.0f} GFLOP/s, {_gb(plan.machine.bytes_per_second)}/s"),
        ("convert", _cost(plan.convert)),
        ("heal", f"{tokens}: {_cost(plan.heal)}"),
        ("profile", plan.profile),
        *plan.runtimes.items(),
    ]
    return "\n".join(f"{name:16} {text}" for name, text in lines)


def _experts(config: dict[str, Any]) -> str:
    """What a token meets of the MLPs."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    if dense >= layers:
        return f"dense, {config['intermediate_size']:,} neurons"
    shared, chosen = config["n_shared_experts"], config["num_experts_per_tok"]
    behind = f" behind {dense} dense layers" if dense else ""
    routed, width = config["n_routed_experts"], config["moe_intermediate_size"]
    return f"{shared} shared + {chosen} of {routed} routed experts of {width} neurons{behind}"


def _is_mla(config: dict[str, Any]) -> bool:
    return "kv_lora_rank" in config


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, KV heads and head_dim of a dense model."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _attention_parameters(config: dict[str, Any]) -> int:
    hidden = config["hidden_size"]
    if not _is_mla(config):
        heads, kv_heads, head_dim = _heads(config)
        widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "o": hidden}
        biases = sum(widths[letter] for letter in attention_biases(config))
        norms = 2 * head_dim if has_qk_norms(config) else 0
        return 2 * hidden * (heads + kv_heads) * head_dim + biases + norms
    heads, rank, rope_dim = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope_dim, v_dim, q_rank = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"] or 0
    q_width = heads * (nope_dim + rope_dim)
    query = (hidden + 1 + q_width) * q_rank if q_rank else hidden * q_width
    key_value = hidden * (rank + rope_dim) + rank + rank * heads * (nope_dim + v_dim)
    biases = q_rank + rank + rope_dim + hidden if config.get("attention_bias") else 0
    return query + key_value + heads * v_dim * hidden + biases


def _cache_numbers(config: dict[str, Any]) -> int:
    """Numbers that one token leaves in one layer's cache."""
    if _is_mla(config):
        return config["kv_lora_rank"] + config["qk_rope_head_dim"]
    _, kv_heads, head_dim = _heads(config)
    return 2 * kv_heads * head_dim


def _size(config: dict[str, Any]) -> ModelSize:
    per_token = cache_bytes_per_token(config)
    return ModelSize(
        *count_parameters(config), _cache_numbers(config), per_token, per_token * config["max_position_embeddings"]
    )


def _weights(config: dict[str, Any]) -> int:
    """W: the active parameters, less an embedding table of which a token reads one row."""
    _, active = count_parameters(config)
    return active if config.get("tie_word_embeddings") else active - config["vocab_size"] * config["hidden_size"]


def _decode(config: dict[str, Any], machine: Machine) -> tuple[float, float]:
    """Seconds to decode a token without context, and seconds more for each cached position."""
    heads, _, head_dim = _heads(config)
    rank = config.get("kv_lora_rank", 0)
    flops = 2 * heads * (_cache_numbers(config) + rank) if _is_mla(config) else 4 * heads * head_dim
    weights = _weights(config)
    return (
        2 * weights / machine.bytes_per_second + 2 * weights / machine.flops_per_second,
        cache_bytes_per_token(config) / machine.bytes_per_second
        + config["num_hidden_layers"] * flops / machine.flops_per_second,
    )


def _convert_cost(
    source: dict[str, Any], target: dict[str, Any], settings: ConvertSettings, machine: Machine, distill: int
) -> Cost:
    """Calibration: forward and backward to activations (4 W a token), moments in fp64, which counts double
    (4 (D² + (2 Y)²) a token and layer, keys on three paths and values), and about 30 (D³ + Y³) a layer for the
    decompositions; each step of refinement 8 flops for an attention weight and token (6, and Muon's), each of the
    `distill` steps for every weight (6 the student's, 2 the dense model's); what activations take to move; then reading
    and writing fp32. The exact form calibrates nothing unless experts do.
    """
    layers, hidden, width = source["num_hidden_layers"], source["hidden_size"], _cache_numbers(source)
    parameters, weights = count_parameters(source)[0], _weights(source)
    copied = 4 * (parameters + count_parameters(target)[0]) / machine.bytes_per_second
    if settings.exact and settings.experts == "none":
        return Cost(copied, 4 * hidden * (source["vocab_size"] + 2 * source["intermediate_size"]))
    window = settings.calibration_window_tokens
    tokens = settings.calibration_windows * window
    moments = hidden**2 + (2 * width) ** 2
    flops = tokens * (4 * weights + 4 * layers * moments) + 30 * layers * (hidden**3 + width**3)
    refined = 0 if settings.exact else settings.refine_steps * _REFINE_STEP_TOKENS
    distilled = distill * _DISTILL_STEP_TOKENS
    flops += refined * 8 * layers * _attention_parameters(target) + distilled * 8 * weights
    length = min(2 * window, source["max_position_embeddings"])
    moved = refined * _moved_bytes(source, length, mlp=False) + distilled * _moved_bytes(source, length)
    moved += tokens * _moved_bytes(source, window)
    seconds = copied + flops / (EFFICIENCY * machine.flops_per_second) + moved / machine.bytes_per_second
    return Cost(seconds, _convert_bytes(source, target, min(tokens, max(window, _GRADIENT_TOKENS))))


def _convert_bytes(source: dict[str, Any], target: dict[str, Any], batch: int) -> int:
    """The dense model in fp32 and the moments of every layer (those of the gradients, (2 Y)², on disk where they are
    large); beside them the calibration pass (one batch's activations and logits, and the weights in bf16, which
    processors with units for it keep for the way back) or the fitting of one block after all others, if that is more.
    """
    layers = source["num_hidden_layers"]
    fisher = 8 * (2 * _cache_numbers(source)) ** 2
    spilled = layers * fisher > _SPILL_BYTES
    held = 4 * count_parameters(source)[0] + 8 * layers * source["hidden_size"] ** 2 + (not spilled) * layers * fisher
    calibrating = 2 * _weights(source) + spilled * fisher + _activation_bytes(source, batch)
    fitting = 4 * layers * _attention_parameters(target) + _FITTING_COPIES * fisher
    return held + max(calibrating, fitting)


def _heal_cost(target: dict[str, Any], machine: Machine, tokens: int) -> Cost:
    """6 W flops a token and what its activations take to move; AdamW in fp32 holds 16 bytes a parameter beside the
    activations of a micro-batch of the default size."""
    batch = TrainSettings().batch_windows * TrainSettings().window_tokens
    seconds = tokens * 6 * _weights(target) / (EFFICIENCY * machine.flops_per_second)
    seconds += tokens * _moved_bytes(target, TrainSettings().window_tokens) / machine.bytes_per_second
    return Cost(seconds, 16 * count_parameters(target)[0] + _activation_bytes(target, batch))


def _moved_bytes(config: dict[str, Any], window: int, *, mlp: bool = True) -> int:
    """Bytes that a training step moves for a token: activations and, in fp32, its scores against a whole window."""
    per_layer = 8 * config["hidden_size"] + config["num_attention_heads"] * window
    per_layer += 4 * (config["hidden_size"] + config["intermediate_size"]) if mlp else 0
    return 4 * _TRAFFIC * config["num_hidden_layers"] * per_layer


def _activation_bytes(config: dict[str, Any], tokens: int) -> int:
    """fp32: about 12 vectors of D and 4 of the neurons a token meets in each layer, and the logits held at once."""
    per_layer = 12 * config["hidden_size"] + 4 * config["intermediate_size"]
    logits = min(tokens * config["vocab_size"], _LOGITS_AT_ONCE) * _LOGITS_COPIES
    return 4 * (tokens * config["num_hidden_layers"] * per_layer + logits)


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _cost(cost: Cost) -> str:
    return f"about {_duration(cost.seconds)}, {_gb(cost.memory_bytes)} of memory"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
