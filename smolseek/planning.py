"""What a conversion will give and cost, from a source's config.json alone; no weights, no torch.

Symbols: D hidden_size, L num_hidden_layers, H num_attention_heads, d head_dim, C kv_lora_rank, R qk_rope_head_dim,
Y = 2 k (keys and values of a token).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolseek.config import SELF, ConvertSettings, TrainSettings
from smolseek.conversion.sizes import (
    ATTENTION_FIELDS,
    CALIBRATION_BATCH_TOKENS,
    DISTILL_BATCH_TOKENS,
    REFINE_BATCH_TOKENS,
    SPILL_BYTES,
    WRITTEN_TOKENS,
    distill_steps,
    is_small,
    refine_steps,
    wanted_windows,
    window_lengths,
)
from smolseek.conversion.target import target_config
from smolseek.formats import deepseek_v3, dense
from smolseek.formats.dense import DenseSource, read_source
from smolseek.formats.runtimes import check, verdict
from smolseek.machine import Machine

CACHE_NUMBER_BYTES = 2
"""bf16, in which caches are counted."""
EFFICIENCY = 0.5
"""Share of the matrix-product peak that a model reaches; this project's trainer gets about this on 2 CPU cores."""

_FITTING_COPIES = 4  # of a layer's moments while its block is fitted, counted on the measured peaks
_LOGITS_AT_ONCE = 2**23  # held in training
_LOGITS_COPIES = 4  # logits, their gradient, probabilities, log-probabilities
_TRAFFIC = 20  # times that a training step moves an activation or a score through memory, measured on small models


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


@dataclass(frozen=True)
class _Shape:
    """The sizes of a dense or a converted model that its time and memory follow from."""

    hidden: int
    layers: int
    heads: int
    neurons: int
    total: int
    """Parameters."""
    active: int
    """Parameters that one token meets."""
    weights: int
    """Parameters that a token is multiplied with: not an embedding table, of which it reads one row."""
    attention: int
    """Parameters of one attention block."""
    cache_numbers: int
    """Numbers that a token leaves in one layer's cache."""
    decode_flops: int
    """Flops of a new token for each cached position and layer."""
    vocabulary: int
    context: int

    @property
    def cache_bytes(self) -> int:
        """Bytes that a token leaves in the cache of all layers, in bf16."""
        return self.layers * self.cache_numbers * CACHE_NUMBER_BYTES

    def size(self) -> ModelSize:
        """Returns the part that is told."""
        per_token = self.cache_bytes
        return ModelSize(self.total, self.active, self.cache_numbers, per_token, per_token * self.context)


def plan(
    source_config: dict[str, Any], settings: ConvertSettings, machine: Machine, *, heal_tokens: int = 10_000_000
) -> Plan:
    """Returns what converting this config.json under `settings`, and healing for `heal_tokens`, gives and costs.

    Raises:
        ValueError: as `read_source` and `target_config`, or transformers cannot run experts of this hidden size.
    """
    dense_source = read_source(source_config)
    config = target_config(dense_source, settings)
    deepseek_v3.check_strides(config)
    source, target = _source_shape(dense_source), _target_shape(config)
    return Plan(
        source=source.size(),
        target=target.size(),
        cache_share=target.cache_bytes / source.cache_bytes,
        max_context_tokens=source.context,
        payoff_context_tokens=_payoff_context_tokens(source, target, machine),
        convert=_convert_cost(dense_source, source, target, settings, machine),
        heal=_heal_cost(target, machine, heal_tokens),
        heal_tokens=heal_tokens,
        machine=machine,
        profile="transformers" if settings.exact else settings.profile,
        runtimes={runtime: verdict(findings) for runtime, findings in check(config).items()},
        config=config,
    )


def cache_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Returns the bytes that one token leaves in the cache of all layers, in bf16, of a V3 or a dense config.json."""
    numbers = deepseek_v3.cache_numbers if deepseek_v3.is_latent(config) else dense.cache_numbers
    return config["num_hidden_layers"] * numbers(config) * CACHE_NUMBER_BYTES


def payoff_context_tokens(source_config: dict[str, Any], target_config: dict[str, Any], machine: Machine) -> int | None:
    """Returns the context length from which the converted model decodes faster at batch 1; None: at no length.

    A token takes (2 weights bytes) / bandwidth + (2 weights flops) / peak, and per cached position and layer
    cache bytes / bandwidth + attention flops / peak. Attention takes 4 H d flops in the dense model and
    2 H (C + R) + 2 H C absorbed (DeepSeek-V2, section 2.1.2). The two lines meet at that length.
    """
    return _payoff_context_tokens(_source_shape(read_source(source_config)), _target_shape(target_config), machine)


def render(plan: Plan) -> str:
    """The plan as text."""
    before, after, config = plan.source, plan.target, plan.config
    context, length, tokens = plan.max_context_tokens, plan.payoff_context_tokens, f"{plan.heal_tokens:,} tokens"
    pays = "never decodes faster" if length is None else f"decodes faster from {length:,} tokens of context on"
    cache = f"{before.cache_bytes_per_token:,} -> {after.cache_bytes_per_token:,} bytes ({plan.cache_share:.1%})"
    lines = [
        ("attention", ", ".join(f"{name} {config[name]}" for name in ATTENTION_FIELDS if config[name] is not None)),
        ("MLP", _experts(config)),
        (
            "parameters",
            f"{before.total_parameters:,} -> {after.total_parameters:,} ({after.active_parameters:,} active)",
        ),
        ("cache per token", cache),
        (f"at {context:,}", f"{_gb(before.cache_bytes_at_max_context)} -> {_gb(after.cache_bytes_at_max_context)}"),
        ("smaller cache", f"{pays} (batch 1)"),
        ("this machine", _rates(plan.machine)),
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


def _source_shape(source: DenseSource) -> _Shape:
    total = source.parameters()
    table = 0 if source.tie_word_embeddings else source.vocab_size * source.hidden_size
    attention = {name: shape for name, shape in source.layer_tensors().items() if name.startswith("self_attn.")}
    return _Shape(
        hidden=source.hidden_size,
        layers=source.num_hidden_layers,
        heads=source.num_attention_heads,
        neurons=source.intermediate_size,
        total=total,
        active=total,
        weights=total - table,
        attention=sum(math.prod(shape) for shape in attention.values()),
        cache_numbers=source.cache_numbers,
        decode_flops=4 * source.num_attention_heads * source.head_dim,
        vocabulary=source.vocab_size,
        context=source.max_position_embeddings,
    )


def _target_shape(config: dict[str, Any]) -> _Shape:
    total, active = deepseek_v3.count_parameters(config)
    heads, numbers = config["num_attention_heads"], deepseek_v3.cache_numbers(config)
    table = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    return _Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        neurons=config["intermediate_size"],
        total=total,
        active=active,
        weights=active - table,
        attention=deepseek_v3.attention_parameters(config),
        cache_numbers=numbers,
        decode_flops=2 * heads * (numbers + config["kv_lora_rank"]),
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
    )


def _payoff_context_tokens(source: _Shape, target: _Shape, machine: Machine) -> int | None:
    (source_start, source_slope), (target_start, target_slope) = (_decode(s, machine) for s in (source, target))
    if target_slope >= source_slope:
        return None
    return max(0, math.ceil((target_start - source_start) / (source_slope - target_slope)))


def _decode(shape: _Shape, machine: Machine) -> tuple[float, float]:
    """Returns the seconds to decode a token without context, and the seconds more for each cached position."""
    return (
        2 * shape.weights / machine.bytes_per_second + 2 * shape.weights / machine.flops_per_second,
        shape.cache_bytes / machine.bytes_per_second + shape.layers * shape.decode_flops / machine.flops_per_second,
    )


def _convert_cost(
    dense_source: DenseSource, source: _Shape, target: _Shape, settings: ConvertSettings, machine: Machine
) -> Cost:
    """Returns the cost of a conversion.

    Calibration is a forward and a backward pass to activations (4 flops a weight and token). Moments are float64
    (2 (D² + (2 Y)²) a token and layer, for keys on three paths and values), and so are about 15 (D³ + Y³) a layer for
    the decompositions. Text that the model writes takes 2 flops a weight and token. Each step of refinement takes 8
    flops for an attention weight and token (6, and Muon's), and both streams pass all weights once, which gives the
    dense model's part of the end-to-end stage but for its head (2 flops). There each step takes 4 flops for every
    weight and 2 more for those that it trains.
    Then activations take time to move, and fp32 weights to read and write. The exact form calibrates nothing unless
    experts do.
    """
    layers, hidden, width = source.layers, source.hidden, source.cache_numbers
    copied = 4 * (source.total + target.total) / machine.bytes_per_second
    if settings.exact and settings.experts == "none":
        return Cost(copied, 4 * hidden * (source.vocabulary + 2 * source.neurons))
    window, length = window_lengths(dense_source, settings)
    tokens = settings.calibration_windows * window
    moments = hidden**2 + (2 * width) ** 2
    float64 = tokens * 2 * layers * moments + 15 * layers * (hidden**3 + width**3)
    refined = 0 if settings.exact else refine_steps(dense_source, settings) * REFINE_BATCH_TOKENS
    distilled = distill_steps(dense_source, settings) * DISTILL_BATCH_TOKENS
    read = wanted_windows(dense_source, settings) * length
    written = min(read, WRITTEN_TOKENS) if set(settings.calibration) <= {SELF} else 0
    trained = source.weights if is_small(dense_source) else layers * target.attention
    flops = tokens * 4 * source.weights + float64 / machine.float64_share + written * 2 * source.weights
    flops += refined * 8 * layers * target.attention + (4 * read * source.weights if refined else 0)
    flops += distilled * (4 * source.weights + 2 * trained + 2 * hidden * source.vocabulary)
    moved = refined * _moved_bytes(source, length, mlp=False) + distilled * _moved_bytes(source, length)
    moved += tokens * _moved_bytes(source, window)
    seconds = copied + flops / (EFFICIENCY * machine.flops_per_second) + moved / machine.bytes_per_second
    return Cost(
        seconds, _convert_bytes(source, target, min(tokens, max(window, CALIBRATION_BATCH_TOKENS[machine.device])))
    )


def _convert_bytes(source: _Shape, target: _Shape, batch: int) -> int:
    """Returns the peak memory of a conversion.

    It holds the dense model in fp32 and the moments of every layer (those of the gradients, (2 Y)², on disk where they
    are large). Beside them stands the calibration pass, with one batch's activations and logits and the weights in
    bf16, which processors with units for it keep for the way back; or the fit of one block after all others, if that
    is more.
    """
    layers = source.layers
    fisher = 8 * (2 * source.cache_numbers) ** 2
    spilled = layers * fisher > SPILL_BYTES
    held = 4 * source.total + 8 * layers * source.hidden**2 + (not spilled) * layers * fisher
    calibrating = 2 * source.weights + spilled * fisher + _activation_bytes(source, batch)
    fitting = 4 * layers * target.attention + _FITTING_COPIES * fisher
    return held + max(calibrating, fitting)


def _heal_cost(target: _Shape, machine: Machine, tokens: int) -> Cost:
    """Returns the cost of healing.

    It takes 6 flops a weight and token, and the time that activations take to move. AdamW in fp32 holds 16 bytes a
    parameter beside the activations of a micro-batch of the default size.
    """
    batch = TrainSettings().batch_windows * TrainSettings().window_tokens
    seconds = tokens * 6 * target.weights / (EFFICIENCY * machine.flops_per_second)
    seconds += tokens * _moved_bytes(target, TrainSettings().window_tokens) / machine.bytes_per_second
    return Cost(seconds, 16 * target.total + _activation_bytes(target, batch))


def _moved_bytes(shape: _Shape, window: int, *, mlp: bool = True) -> int:
    """Returns the bytes that a training step moves for a token: activations, and fp32 scores against a whole window."""
    per_layer = 8 * shape.hidden + shape.heads * window
    per_layer += 4 * (shape.hidden + shape.neurons) if mlp else 0
    return 4 * _TRAFFIC * shape.layers * per_layer


def _activation_bytes(shape: _Shape, tokens: int) -> int:
    """Returns the fp32 activations of a pass: about 12 D and 4 I numbers a token and layer, and the logits at once."""
    per_layer = 12 * shape.hidden + 4 * shape.neurons
    logits = min(tokens * shape.vocabulary, _LOGITS_AT_ONCE) * _LOGITS_COPIES
    return 4 * (tokens * shape.layers * per_layer + logits)


def _rates(machine: Machine) -> str:
    place = "" if machine.device == "cpu" else f"{machine.device}, "
    return f"{place}{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {_gb(machine.bytes_per_second)}/s"


def _cost(cost: Cost) -> str:
    return f"about {_duration(cost.seconds)}, {_gb(cost.memory_bytes)} of memory"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
