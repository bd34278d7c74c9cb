"""The seconds of a conversion and of healing, by count of operations and of bytes that move.

Symbols: D hidden_size, Y = 2 k (keys and values of a token).
"""

from __future__ import annotations

from smolseek.config import ConvertSettings
from smolseek.conversion.sizes import (
    CARVE_BATCH_TOKENS,
    CARVE_TOKENS,
    DISTILL_BATCH_TOKENS,
    OPENING_BATCH_TOKENS,
    OPENINGS,
    REFINE_BATCH_TOKENS,
    WRITTEN_TOKENS,
    carve_steps,
    distill_steps,
    is_small,
    more_windows,
    own_share,
    refine_steps,
    wanted_windows,
    window_lengths,
)
from smolseek.formats.dense import DenseSource
from smolseek.machine import Machine
from smolseek.planning.shapes import Shape, distilled_weights

EFFICIENCY = 0.5
"""Share of the matrix-product peak that a model reaches; this project's trainer gets about this on 2 CPU cores."""
_TRAFFIC = 20  # times that a training step moves an activation or a score through memory, measured on small models
_WRITING_FLOPS = 4  # a weight and token that the model writes: twice the products', for draws and single rows, measured


def convert_seconds(
    dense_source: DenseSource, source: Shape, target: Shape, settings: ConvertSettings, machine: Machine
) -> dict[str, float]:
    """Returns the seconds of a conversion's parts, called as its progress bars are.

    Calibration is a forward and a backward pass to activations (4 flops a weight and token). Moments are float64
    (2 (D² + (2 Y)²) a token and layer, for keys on three paths and values), and so are about 15 (D³ + Y³) a layer for
    the decompositions. Each step of refinement takes 8 flops for an attention weight and token (6, and Muon's), and
    both streams pass all weights once, which gives the dense model's part of the end-to-end stage but for its head (2
    flops); on more text that is a pass of its own. There each step takes 4 flops for every weight and 2 more for those
    that it trains. Then activations take time to move, and fp32 weights to read and write. The exact form calibrates
    nothing unless experts do, and has no moments. Carving is in fp32 (on a CPU twice as fast as float64): 24 flops a
    weight and token in closed form (router, moves, outputs), whose least squares are float64 (2 I² a token, I³), and 18
    in each step of its refinement.
    """
    layers, hidden, width = source.layers, source.hidden, source.cache_numbers
    window, length = window_lengths(dense_source, settings)
    copied = {"copy weights": 4 * (source.total + target.total) / machine.bytes_per_second}
    if settings.exact and settings.experts == "none":
        return copied
    calibrated = 0 if settings.exact else settings.calibration_windows * window
    moments = hidden**2 + (2 * width) ** 2
    float64 = 0 if settings.exact else calibrated * 2 * layers * moments + 15 * layers * (hidden**3 + width**3)
    steps = refine_steps(dense_source, settings)
    opens = not (settings.exact or is_small(dense_source))
    refined = 0 if settings.exact else steps * (REFINE_BATCH_TOKENS + opens * OPENING_BATCH_TOKENS)
    carves = settings.experts == "carve"
    learns = carves or not settings.exact
    distilled = distill_steps(dense_source, settings) * DISTILL_BATCH_TOKENS[is_small(dense_source)] * learns
    read = wanted_windows(dense_source, settings) * length
    written = min(int(read * own_share(dense_source, settings)), WRITTEN_TOKENS)
    passed = (read + opens * OPENINGS) * bool(refined or carves)
    more, long = more_windows(dense_source, settings)
    new = distilled if more else 0
    trained = distilled_weights(dense_source, target, settings)
    carved = layers * _carve_flops(hidden, source.neurons, min(read, CARVE_TOKENS), machine) * carves
    carved_tokens = carve_steps(dense_source, settings) * CARVE_BATCH_TOKENS[is_small(dense_source)] * carves
    carved += carved_tokens * 18 * layers * hidden * source.neurons

    def seconds(flops: float, moved: float = 0) -> float:
        return flops / (EFFICIENCY * machine.flops_per_second) + moved / machine.bytes_per_second

    parts = {
        "sample text": seconds(written * _WRITING_FLOPS * source.weights),
        "closed form": seconds(
            calibrated * 4 * source.weights + float64 / machine.float64_share,
            calibrated * _moved_bytes(source, window),
        ),
        "refine layers": seconds(
            refined * 8 * layers * target.attention + carved + passed * 4 * source.weights,
            refined * _moved_bytes(source, length, mlp=False),
        ),
        "end-to-end KL": seconds(
            distilled * (4 * source.weights + 2 * trained + 2 * hidden * source.vocabulary) + new * 2 * source.weights,
            distilled * _moved_bytes(source, long if more else length),
        ),
    }
    return {name: part for name, part in (parts | copied).items() if part}


def _carve_flops(hidden: int, neurons: int, tokens: int, machine: Machine) -> float:
    """Returns the flops of carving one layer in closed form, as if in the dtype that the machine multiplies fastest."""
    single = 24 * hidden * neurons * tokens
    double = 2 * tokens * neurons**2 + neurons**3
    return single / (2 * machine.float64_share) + double / machine.float64_share


def heal_seconds(target: Shape, machine: Machine, tokens: int, window: int) -> float:
    """Returns the seconds of healing: 6 flops a weight and token, and the time that activations take to move."""
    seconds = tokens * 6 * target.weights / (EFFICIENCY * machine.flops_per_second)
    return seconds + tokens * _moved_bytes(target, window) / machine.bytes_per_second


def _moved_bytes(shape: Shape, window: int, *, mlp: bool = True) -> int:
    """Returns the bytes that a training step moves for a token: activations, and fp32 scores against a whole window."""
    per_layer = 8 * shape.hidden + shape.heads * window
    per_layer += 4 * (shape.hidden + shape.neurons) if mlp else 0
    return 4 * _TRAFFIC * shape.layers * per_layer
