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
    matched_layers,
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
FASTER = 1.25
"""Least counted gain that a plan calls one: SmolLM2-135M in llama.cpp gained up to 0.1 more or less than counted."""
DECODED_SEQUENCES = (1, 8, 64)
"""Numbers of sequences side by side for which decoding is counted."""

_FITTING_COPIES = 4  # of a layer's moments while its block is fitted, counted on the measured peaks
_BUSY = 0.1  # share of the processors that others take while they are measured, to be told
_LOGITS_AT_ONCE = 2**23  # held in training
_LOGITS_COPIES = 4  # logits, their gradient, probabilities, log-probabilities
_LOGITS_CHUNK_BYTES = 2**28  # of the loss, in training
_DISTILL_COPIES = {"cpu": 3, "cuda": 12, "mps": 12}  # of a chunk: the teacher's, and on a GPU five in fp32
_TRAFFIC = 20  # times that a training step moves an activation or a score through memory, measured on small models
_WRITING_FLOPS = 4  # a weight and token that the model writes: twice the products', for draws and single rows, measured


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
class Decoding:
    """Decoding some sequences side by side, by count of the bytes that are read and of the operations."""

    sequences: int
    gain: float
    """Dense time of a step over the converted model's, where all sequences are of the largest length."""
    faster_from_tokens: int | None
    """Length from which the gain is `FASTER`; None: at no length that the model takes."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one of several processes holds while it trains, by what they are."""

    state: int
    """Its share of weights, gradients and the optimizer's two moments, in fp32."""
    gathered: int
    """What FSDP2 gathers of the others' weights, and gradients of whole layers on their way to them."""
    casts: int
    """bf16 copies of all weights from the forward pass to the backward pass, whole in every process; with activation
    checkpointing, of two layers and the tables."""
    activations: int
    """Of its share of a micro-batch."""
    logits: int
    """Of one chunk of tokens, with what the loss makes of them."""
    teacher: int
    """Its share of the dense model, and what is gathered of that."""

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """A conversion before it runs; `stages` are the seconds of the conversion's parts."""

    source: ModelSize
    target: ModelSize
    cache_share: float
    max_context_tokens: int
    decoding: tuple[Decoding, ...]
    convert: Cost
    stages: dict[str, float]
    heal: Cost
    heal_tokens: int
    processes: int
    heal_memory: TrainingMemory
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
    tables: int
    """Parameters outside the layers, embeddings and head."""

    @property
    def stored(self) -> int:
        """Parameters that some token is multiplied with: of all experts."""
        return self.weights + self.total - self.active

    @property
    def cache_bytes(self) -> int:
        """Bytes that a token leaves in the cache of all layers, in bf16."""
        return self.layers * self.cache_numbers * CACHE_NUMBER_BYTES

    def size(self) -> ModelSize:
        """Returns the part that is told."""
        per_token = self.cache_bytes
        return ModelSize(self.total, self.active, self.cache_numbers, per_token, per_token * self.context)


def plan(
    source_config: dict[str, Any],
    settings: ConvertSettings,
    machine: Machine,
    *,
    heal_tokens: int = 10_000_000,
    train: TrainSettings | None = None,
    processes: int = 1,
) -> Plan:
    """Returns what converting this config.json under `settings`, and healing for `heal_tokens`, gives and costs.

    Healing is by `train` (the defaults, if none) in so many processes, each on a machine or GPU like this one.

    Raises:
        ValueError: as `read_source` and `target_config`, transformers cannot run experts of this hidden size, or the
            processes cannot share the windows of a micro-batch.
    """
    train = train or _default_training(processes)
    if processes < 1 or train.batch_windows % processes:
        raise ValueError(
            f"processes {processes}: train.batch_windows, {train.batch_windows}, must be a multiple of it; use another"
        )
    dense_source = read_source(source_config)
    config = target_config(dense_source, settings)
    deepseek_v3.check_strides(config)
    source, target = _source_shape(dense_source), _target_shape(config)
    stages = _convert_seconds(dense_source, source, target, settings, machine)
    memory = _training_memory(source, target, train, processes, machine)
    return Plan(
        source=source.size(),
        target=target.size(),
        cache_share=target.cache_bytes / source.cache_bytes,
        max_context_tokens=source.context,
        decoding=tuple(_decoding(source, target, machine, sequences) for sequences in DECODED_SEQUENCES),
        convert=Cost(sum(stages.values()), _convert_bytes(dense_source, source, target, settings, machine)),
        stages=stages,
        heal=Cost(_heal_seconds(target, machine, heal_tokens, train.window_tokens) / processes, memory.total),
        heal_tokens=heal_tokens,
        processes=processes,
        heal_memory=memory,
        machine=machine,
        profile="transformers" if settings.exact else settings.profile,
        runtimes={runtime: verdict(findings) for runtime, findings in check(config).items()},
        config=config,
    )


def _default_training(processes: int) -> TrainSettings:
    """Returns the default settings, with as few windows more as the processes can share."""
    most = TrainSettings().batch_windows
    return TrainSettings(batch_windows=most + -most % max(1, processes))


def cache_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Returns the bytes that one token leaves in the cache of all layers, in bf16, of a V3 or a dense config.json."""
    numbers = deepseek_v3.cache_numbers if deepseek_v3.is_latent(config) else dense.cache_numbers
    return config["num_hidden_layers"] * numbers(config) * CACHE_NUMBER_BYTES


def count_decoding(
    source_config: dict[str, Any], target_config: dict[str, Any], machine: Machine, sequences: int, tokens: int
) -> float:
    """Returns how many times as fast the converted model decodes, by count, behind so many cached tokens.

    A step takes (2 weights bytes) / bandwidth, (2 weights flops) / peak a sequence, and per cached position, layer and
    sequence cache bytes / bandwidth + attention flops / peak. Attention takes 4 H d flops in the dense model and
    2 H (C + R) + 2 H C absorbed (DeepSeek-V2, section 2.1.2). Several sequences read the experts of each.
    """
    source, target = _source_shape(read_source(source_config)), _target_shape(target_config)
    return _gain(_decode(source, machine, sequences), _decode(target, machine, sequences), tokens)


def training_memory(
    config: dict[str, Any],
    train: TrainSettings,
    processes: int,
    machine: Machine,
    *,
    teacher: dict[str, Any] | None = None,
) -> TrainingMemory:
    """Returns the memory of one of several processes that train a DeepSeek-V3 config.json, perhaps with a teacher."""
    target = _target_shape(config)
    source = target if teacher is None else _source_shape(read_source(teacher))
    return _training_memory(source, target, train, processes, machine)


def render(plan: Plan) -> str:
    """The plan as text."""
    before, after, config = plan.source, plan.target, plan.config
    context, tokens = plan.max_context_tokens, f"{plan.heal_tokens:,} tokens"
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
        ("smaller cache", f"{1 / plan.cache_share:.1f} times the tokens or sequences in the same memory"),
        ("decoding", _speed(plan)),
        ("this machine", _rates(plan.machine)),
        ("convert", _cost(plan.convert)),
        *_stages(plan),
        ("heal", f"{tokens}: {_cost(plan.heal)}" + f" in each of {plan.processes}" * (plan.processes > 1)),
        ("  of which", _memory(plan.heal_memory)),
        ("profile", plan.profile),
        *plan.runtimes.items(),
    ]
    return "\n".join(f"{name:16} {text}" for name, text in lines)


def _memory(memory: TrainingMemory) -> str:
    """The parts of a process's memory that are there."""
    return ", ".join(f"{name} {_gb(size)}" for name, size in dataclasses.asdict(memory).items() if size)


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """The parts of a conversion that take a second or more, as a line if there are any."""
    parts = [f"{name} {_duration(part)}" for name, part in plan.stages.items() if part >= 1]
    return [("  of which", ", ".join(parts))] if parts else []


def _speed(plan: Plan) -> str:
    """What the smaller cache buys of time by count, where the rates that it counts with mean something."""
    if plan.machine.others > _BUSY:
        return "not counted while other programs use this machine"
    gains = "/".join(f"{part.gain:.2f}" for part in plan.decoding)
    counts = "/".join(str(part.sequences) for part in plan.decoding)
    told = f"{gains} times the dense speed with {counts} sequences of {plan.max_context_tokens:,} tokens"
    faster = [part for part in plan.decoding if part.faster_from_tokens is not None]
    if not faster:
        return f"by count {told}: memory is gained, not time"
    lengths = ", ".join(f"from {part.faster_from_tokens:,} tokens with {part.sequences}" for part in faster)
    return f"by count, not measured: {told} ({FASTER} times {lengths})"


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
        tables=source.vocab_size * source.hidden_size * (1 if source.tie_word_embeddings else 2),
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
        tables=config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2),
    )


def _decoding(source: _Shape, target: _Shape, machine: Machine, sequences: int) -> Decoding:
    before, after = (_decode(shape, machine, sequences) for shape in (source, target))
    saved = before[1] - FASTER * after[1]
    length = max(0, math.ceil((FASTER * after[0] - before[0]) / saved)) if saved > 0 else None
    length = None if length is None or length > source.context else length
    return Decoding(sequences, _gain(before, after, source.context), length)


def _gain(before: tuple[float, float], after: tuple[float, float], tokens: int) -> float:
    """Returns the first time over the second, of seconds without context and more for each cached position."""
    return (before[0] + tokens * before[1]) / (after[0] + tokens * after[1])


def _decode(shape: _Shape, machine: Machine, sequences: int) -> tuple[float, float]:
    """Returns the seconds of a step without context, and the seconds more for each cached position of all sequences."""
    read, each = min(shape.stored, sequences * shape.weights), 2 * shape.weights / machine.flops_per_second
    cached = shape.cache_bytes / machine.bytes_per_second
    cached += shape.layers * shape.decode_flops / machine.flops_per_second
    return 2 * read / machine.bytes_per_second + sequences * each, sequences * cached


def _convert_seconds(
    dense_source: DenseSource, source: _Shape, target: _Shape, settings: ConvertSettings, machine: Machine
) -> dict[str, float]:
    """Returns the seconds of a conversion's parts, called as its progress bars are.

    Calibration is a forward and a backward pass to activations (4 flops a weight and token). Moments are float64
    (2 (D² + (2 Y)²) a token and layer, for keys on three paths and values), and so are about 15 (D³ + Y³) a layer for
    the decompositions. Each step of refinement takes 8 flops for an attention weight and token (6, and Muon's), and
    both streams pass all weights once, which gives the dense model's part of the end-to-end stage but for its head (2
    flops). There each step takes 4 flops for every weight and 2 more for those that it trains. Then activations take
    time to move, and fp32 weights to read and write. The exact form calibrates nothing unless experts do.
    """
    layers, hidden, width = source.layers, source.hidden, source.cache_numbers
    window, length = window_lengths(dense_source, settings)
    copied = {"copy weights": 4 * (source.total + target.total) / machine.bytes_per_second}
    if settings.exact and settings.experts == "none":
        return copied
    tokens = settings.calibration_windows * window
    moments = hidden**2 + (2 * width) ** 2
    float64 = tokens * 2 * layers * moments + 15 * layers * (hidden**3 + width**3)
    refined = 0 if settings.exact else refine_steps(dense_source, settings) * REFINE_BATCH_TOKENS
    distilled = distill_steps(dense_source, settings) * DISTILL_BATCH_TOKENS
    read = wanted_windows(dense_source, settings) * length
    written = min(read, WRITTEN_TOKENS) if set(settings.calibration) <= {SELF} else 0
    trained = source.weights if is_small(dense_source) else layers * target.attention

    def seconds(flops: float, moved: float = 0) -> float:
        return flops / (EFFICIENCY * machine.flops_per_second) + moved / machine.bytes_per_second

    parts = {
        "sample text": seconds(written * _WRITING_FLOPS * source.weights),
        "closed form": seconds(
            tokens * 4 * source.weights + float64 / machine.float64_share, tokens * _moved_bytes(source, window)
        ),
        "refine layers": seconds(
            refined * 8 * layers * target.attention + (4 * read * source.weights if refined else 0),
            refined * _moved_bytes(source, length, mlp=False),
        ),
        "end-to-end KL": seconds(
            distilled * (4 * source.weights + 2 * trained + 2 * hidden * source.vocabulary),
            distilled * _moved_bytes(source, length),
        ),
    }
    return {name: part for name, part in (parts | copied).items() if part}


def _convert_bytes(
    dense_source: DenseSource, source: _Shape, target: _Shape, settings: ConvertSettings, machine: Machine
) -> int:
    """Returns the peak memory of a conversion.

    It holds the dense model in fp32, and beside it the most of this: the closed form's moments of every layer (those of
    the gradients, (2 Y)², on disk where they are large) with the calibration pass, one batch's activations and logits
    and the weights in bf16, which processors with units for it keep for the way back, or with the fit of one block
    after all others; the three streams of refinement; the end-to-end stage. The exact form holds one matrix at a time.
    """
    if settings.exact and settings.experts == "none":
        return 4 * source.hidden * (source.vocabulary + 2 * source.neurons)
    window, length = window_lengths(dense_source, settings)
    batch = min(settings.calibration_windows * window, max(window, CALIBRATION_BATCH_TOKENS[machine.device]))
    layers = source.layers
    fisher = 8 * (2 * source.cache_numbers) ** 2
    spilled = layers * fisher > SPILL_BYTES
    moments = 8 * layers * source.hidden**2 + (not spilled) * layers * fisher
    calibrating = 2 * source.weights + spilled * fisher + _activation_bytes(source, batch)
    converted = 4 * layers * target.attention
    fitting = converted + _FITTING_COPIES * fisher
    stages = [moments + max(calibrating, fitting)]
    streamed = wanted_windows(dense_source, settings) * length * source.hidden
    trains = settings.experts == "carve" or not settings.exact
    if trains and refine_steps(dense_source, settings):
        stages.append(converted + 12 * streamed)
    if trains and distill_steps(dense_source, settings):
        states = streamed * (4 + 2 * len(matched_layers(dense_source)))  # the dense model's
        stages.append(states + _distilling_bytes(dense_source, source, target, settings))
    return 4 * source.total + max(stages)


def _distilling_bytes(dense_source: DenseSource, source: _Shape, target: _Shape, settings: ConvertSettings) -> int:
    """Returns what the end-to-end stage holds beside the dense model and its states.

    Of the weights that are trained there are five copies: themselves, those of before, gradients and two moments.
    """
    whole = is_small(dense_source) or settings.experts == "carve"
    trained = target.total if whole else target.layers * target.attention
    return 20 * trained + _activation_bytes(source, DISTILL_BATCH_TOKENS)


def _heal_seconds(target: _Shape, machine: Machine, tokens: int, window: int) -> float:
    """Returns the seconds of healing: 6 flops a weight and token, and the time that activations take to move."""
    seconds = tokens * 6 * target.weights / (EFFICIENCY * machine.flops_per_second)
    return seconds + tokens * _moved_bytes(target, window) / machine.bytes_per_second


def _training_memory(
    source: _Shape, target: _Shape, train: TrainSettings, processes: int, machine: Machine
) -> TrainingMemory:
    """Returns the memory of one of the processes.

    AdamW holds 16 bytes a parameter in fp32, divided by FSDP2. A process gathers embeddings and head for the whole
    step, and two layers, the one that it computes and the next; each is there twice while FSDP2 copies it. Then a
    gradient is whole until it is sent, from one copy into another. The teacher computes in the type of products before
    the model does, and its head stays for the loss. With activation checkpointing a layer keeps its input.
    """
    has_bf16 = machine.device != "cpu" or machine.float64_share < 0.5
    bf16 = has_bf16 if train.precision == "auto" else train.precision == "bfloat16"
    tokens = train.batch_windows // processes * train.window_tokens
    layer = (target.total - target.tables) // target.layers
    gathered = 4 * (4 * target.tables + 7 * layer) if processes > 1 else 0
    kept = 1 if train.activation_checkpointing else target.layers
    activations = 4 * tokens * kept * (12 * target.hidden + 4 * target.neurons)
    activations += 4 * tokens * target.layers * target.hidden * train.activation_checkpointing
    distils = train.distill_weight > 0
    chunk = min(tokens * target.vocabulary * (2 if bf16 else 4), _LOGITS_CHUNK_BYTES)
    copies = _DISTILL_COPIES[machine.device] if distils else 2
    dense, dense_layer = source.total, (source.total - source.tables) // source.layers
    gathered_teacher = source.tables + 2 * dense_layer if processes > 1 else 0
    return TrainingMemory(
        state=16 * target.total // processes,
        gathered=gathered,
        casts=bf16 * 2 * (target.tables + 2 * layer if train.activation_checkpointing else target.stored),
        activations=activations,
        logits=copies * chunk,
        teacher=(2 if bf16 else 4) * (dense // processes + gathered_teacher) if distils else 0,
    )


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
    busy = f"; others took {machine.others:.0%} of the processors meanwhile, so idle it is faster"
    rates = f"{place}{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {_gb(machine.bytes_per_second)}/s"
    return rates + busy * (machine.others > _BUSY)


def _cost(cost: Cost) -> str:
    return f"about {_duration(cost.seconds)}, {_gb(cost.memory_bytes)} of memory"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
