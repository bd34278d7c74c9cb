"""The memory of a conversion, and of each process of a training, by count.

Symbols: D hidden_size, I intermediate_size, Y = 2 k (keys and values of a token).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.conversion.sizes import (
    CALIBRATION_BATCH_TOKENS,
    DISTILL_BATCH_TOKENS,
    SPILL_BYTES,
    distill_steps,
    is_small,
    matched_layers,
    refine_steps,
    wanted_windows,
    window_lengths,
)
from smolseek.formats.dense import DenseSource, read_source
from smolseek.machine import Machine
from smolseek.planning.shapes import Shape, distilled_weights, source_shape, target_shape

_FITTING_COPIES = 4  # of a layer's moments while its block is fitted, counted on the measured peaks
_KEPT_FREED = 1.5  # times the end-to-end stage's activations, fitted to the one measured peak
_LOGITS_AT_ONCE = 2**23  # held in training
_LOGITS_COPIES = 4  # logits, their gradient, probabilities, log-probabilities
_LOGITS_CHUNK_BYTES = 2**28  # of the loss, in training
_DISTILL_COPIES = {"cpu": 3, "cuda": 12, "mps": 12}  # of a chunk: the teacher's, and on a GPU five in fp32


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


def training_memory(
    config: dict[str, Any],
    train: TrainSettings,
    processes: int,
    machine: Machine,
    *,
    teacher: dict[str, Any] | None = None,
) -> TrainingMemory:
    """Returns the memory of one of several processes that train a DeepSeek-V3 config.json, perhaps with a teacher's.

    AdamW holds 16 bytes a parameter in fp32, divided by FSDP2. A process gathers embeddings and head for the whole
    step, and two layers, the one that it computes and the next; each is there twice while FSDP2 copies it. Then a
    gradient is whole until it is sent, from one copy into another. The teacher computes in the type of products before
    the model does, and its head stays for the loss. With activation checkpointing a layer keeps its input.
    """
    target = target_shape(config)
    source = target if teacher is None else source_shape(read_source(teacher))
    bf16 = machine.bfloat16 if train.precision == "auto" else train.precision == "bfloat16"
    tokens = train.batch_windows // processes * train.window_tokens
    layer = (target.total - target.tables) // target.layers
    gathered = 4 * (4 * target.tables + 7 * layer) if processes > 1 else 0
    kept = 1 if train.activation_checkpointing else target.layers
    activations = 4 * tokens * kept * (12 * target.hidden + 4 * target.neurons)
    activations += 4 * tokens * target.layers * target.hidden * train.activation_checkpointing
    distils = train.most_distill_weight > 0
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


def convert_bytes(
    dense_source: DenseSource, source: Shape, target: Shape, settings: ConvertSettings, machine: Machine
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


def _distilling_bytes(dense_source: DenseSource, source: Shape, target: Shape, settings: ConvertSettings) -> int:
    """Returns what the end-to-end stage holds beside the dense model and its states.

    Of the weights that are trained there are five copies: themselves, those of before, gradients and two moments. All
    are there once more in bf16, on processors with units for it, until a step ends. Activations count for more than
    they are, for the process keeps memory that it frees.
    """
    trained = distilled_weights(dense_source, target, settings)
    activations = _activation_bytes(source, DISTILL_BATCH_TOKENS[is_small(dense_source)])
    return 20 * trained + 2 * target.weights + int(_KEPT_FREED * activations)


def _activation_bytes(shape: Shape, tokens: int) -> int:
    """Returns the fp32 activations of a pass: about 12 D and 4 I numbers a token and layer, and the logits at once."""
    per_layer = 12 * shape.hidden + 4 * shape.neurons
    logits = min(tokens * shape.vocabulary, _LOGITS_AT_ONCE) * _LOGITS_COPIES
    return 4 * (tokens * shape.layers * per_layer + logits)
