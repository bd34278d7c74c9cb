"""The seconds of a conversion and of healing, by count of operations and of bytes that move.

Symbols: D hidden_size, Y = 2 k (keys and values of a token).
"""

from __future__ import annotations

from dataclasses import dataclass

from smolseek.config import ConvertSettings
from smolseek.conversion.mla.plans import rope_plans
from smolseek.conversion.sizes import (
    CARVE_BATCH_TOKENS,
    CARVE_TOKENS,
    DISTILL_BATCH_TOKENS,
    JUDGED_WINDOWS,
    OPENING_BATCH_TOKENS,
    OPENINGS,
    REFINE_BATCH_TOKENS,
    WRITTEN_TOKENS,
    carve_steps,
    distill_steps,
    is_small,
    latent_sizes,
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

    The exact form calibrates nothing unless experts do.
    """
    copied = 4 * (source.total + target.total) / machine.bytes_per_second
    if settings.exact and settings.experts == "none":
        return {"copy weights": copied}
    work = _Work(dense_source, source, target, settings, machine)
    parts = {
        "sample text": work.sample_text(),
        "closed form": work.closed_form(),
        "refine layers": work.refine_layers(),
        "end-to-end KL": work.end_to_end(),
    }
    rate = EFFICIENCY * machine.flops_per_second
    seconds = {name: flops / rate + moved / machine.bytes_per_second for name, (flops, moved) in parts.items()}
    return {name: part for name, part in (seconds | {"copy weights": copied}).items() if part}


@dataclass(frozen=True)
class _Work:
    """A conversion that calibrates. Each stage is a method that returns its flops, and the bytes that it moves."""

    dense_source: DenseSource
    source: Shape
    target: Shape
    settings: ConvertSettings
    machine: Machine

    @property
    def _fits(self) -> bool:
        """Whether attention gets a latent."""
        return not self.settings.exact

    @property
    def _carves(self) -> bool:
        return self.settings.experts == "carve"

    @property
    def _opens(self) -> bool:
        """Whether refinement reads the shortest texts, too."""
        return self._fits and not is_small(self.dense_source)

    @property
    def _read_tokens(self) -> int:
        """Tokens of the refinement windows."""
        return wanted_windows(self.dense_source, self.settings) * window_lengths(self.dense_source, self.settings)[1]

    def sample_text(self) -> tuple[float, float]:
        """The model writes its own share of the text, up to a limit."""
        written = min(int(self._read_tokens * own_share(self.dense_source, self.settings)), WRITTEN_TOKENS)
        return written * _WRITING_FLOPS * self.source.weights, 0

    def closed_form(self) -> tuple[float, float]:
        """For every stride of the rope slots a forward and a backward pass to activations, and moments.

        The passes take 4 flops a weight and token. Moments are float64 (2 (D² + (2 Y)²) a token and layer, for keys on
        three paths and values), and so are about 15 (D³ + Y³) a layer for the decompositions of every plan of slots.
        Where there are several plans, both models judge each: 4 flops a weight and token. Exact attention has none.
        """
        if not self._fits:
            return 0, 0
        source, (window, length) = self.source, window_lengths(self.dense_source, self.settings)
        plans = rope_plans(self.dense_source.head_dim, latent_sizes(self.dense_source, self.settings)[1])
        hidden, width = source.hidden, source.cache_numbers
        tokens = len({plan.stride for plan in plans}) * self.settings.calibration_windows * window
        moments = tokens * 2 * source.layers * (hidden**2 + (2 * width) ** 2)
        float64 = moments + len(plans) * 15 * source.layers * (hidden**3 + width**3)
        judged = len(plans) * JUDGED_WINDOWS[is_small(self.dense_source)] * length * (len(plans) > 1)
        flops = (tokens + judged) * 4 * source.weights + float64 / self.machine.float64_share
        return flops, tokens * _moved_bytes(source, window)

    def refine_layers(self) -> tuple[float, float]:
        """A step takes 8 flops for an attention weight and token: 6, and Muon's.

        Both streams pass all weights once, which gives the dense model's part of the end-to-end stage but for its head.
        """
        steps, source = refine_steps(self.dense_source, self.settings), self.source
        refined = self._fits * steps * (REFINE_BATCH_TOKENS + self._opens * OPENING_BATCH_TOKENS)
        flops: float = refined * 8 * source.layers * self.target.attention
        if refined or self._carves:
            flops += (self._read_tokens + self._opens * OPENINGS) * 4 * source.weights
        if self._carves:
            flops += self._carve_flops()
        length = window_lengths(self.dense_source, self.settings)[1]
        return flops, refined * _moved_bytes(source, length, mlp=False)

    def _carve_flops(self) -> float:
        """Returns the flops of carving all layers, as if all in the dtype that the machine multiplies fastest.

        The closed form is in fp32, on a CPU twice as fast as float64: 24 flops a weight and token (router, moves,
        outputs). Its least squares are float64: 2 I² a token, and I³. Each step of the refinement takes 18 a weight.
        """
        hidden, neurons = self.source.hidden, self.source.neurons
        tokens = min(self._read_tokens, CARVE_TOKENS)
        single, double = 24 * hidden * neurons * tokens, 2 * tokens * neurons**2 + neurons**3
        closed = single / (2 * self.machine.float64_share) + double / self.machine.float64_share
        steps = carve_steps(self.dense_source, self.settings)
        refined = steps * CARVE_BATCH_TOKENS[is_small(self.dense_source)] * 18 * hidden * neurons
        return self.source.layers * (closed + refined)

    def end_to_end(self) -> tuple[float, float]:
        """Each step takes 4 flops for every weight, 2 more for those that it trains, and 2 for the dense head.

        The dense model's states are known but on text that refinement did not read: 2 flops a weight more.
        """
        if not (self._carves or self._fits):
            return 0, 0
        source = self.source
        tokens = distill_steps(self.dense_source, self.settings) * DISTILL_BATCH_TOKENS[is_small(self.dense_source)]
        trained = distilled_weights(self.dense_source, self.target, self.settings)
        more, long = more_windows(self.dense_source, self.settings)
        dense = 2 * source.hidden * source.vocabulary + 2 * source.weights * bool(more)
        window = long if more else window_lengths(self.dense_source, self.settings)[1]
        return tokens * (4 * source.weights + 2 * trained + dense), tokens * _moved_bytes(source, window)


def heal_seconds(target: Shape, machine: Machine, tokens: int, window: int) -> float:
    """Returns the seconds of healing: 6 flops a weight and token, and the time that activations take to move."""
    seconds = tokens * 6 * target.weights / (EFFICIENCY * machine.flops_per_second)
    return seconds + tokens * _moved_bytes(target, window) / machine.bytes_per_second


def _moved_bytes(shape: Shape, window: int, *, mlp: bool = True) -> int:
    """Returns the bytes that a training step moves for a token: activations, and fp32 scores against a whole window."""
    per_layer = 8 * shape.hidden + shape.heads * window
    per_layer += 4 * (shape.hidden + shape.neurons) if mlp else 0
    return 4 * _TRAFFIC * shape.layers * per_layer
