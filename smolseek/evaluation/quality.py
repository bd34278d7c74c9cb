"""Held-out loss: one definition of perplexity everywhere.

Shapes: T tokens, N positions of one window, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.generation import evaluating
from smolseek.model import DeepseekV3, StockModel

WINDOW_TOKENS = 512
_CHUNK_LOGITS = 2**22
"""Logits made at once, 16 MiB, however long the window and large the vocabulary."""

Model = DeepseekV3 | StockModel
OnWindow = Callable[[int, int], None]
"""Told (windows done, windows in all)."""


@dataclass(frozen=True)
class Quality:
    """Held-out loss in nats per token and what follows from it."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def of(cls, loss: float, tokens: int, text_tokens: int, text_bytes: int) -> Quality:
        """From the mean loss of `tokens` predicted tokens of a text of `text_tokens` tokens and `text_bytes` bytes.

        Raises:
            ValueError: a loss that is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"held-out loss is {loss}: the weights hold NaN or overflow; try --dtype float32")
        bits_per_byte = loss * text_tokens / (math.log(2) * max(1, text_bytes))
        return cls(loss, math.exp(min(loss, 700.0)), bits_per_byte, tokens)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


class Window(NamedTuple):
    """Tokens that are read at once, and the first of them that is predicted here; all after it are."""

    ids_T: Tensor
    first: int

    @property
    def predicted_N(self) -> Tensor:
        """The tokens that are predicted here."""
        return self.ids_T[self.first :]

    @property
    def rows(self) -> slice:
        """The positions at which its predictions are made."""
        return slice(self.first - 1, len(self.ids_T) - 1)


def window_size(models: Sequence[Model], wanted: int | None = None) -> int:
    """Tokens of a window: what is wanted, or 512 (or the least limit of the models).

    Raises:
        ValueError: less than two tokens, or more than a model reads.
    """
    limit = min(model.config.max_position_embeddings for model in models)
    if wanted is not None and not 2 <= wanted <= limit:
        raise ValueError(f"window_tokens {wanted}: must be 2 to {limit}, the most that the model reads; lower it")
    return min(WINDOW_TOKENS, limit) if wanted is None else wanted


def cut(ids_T: Tensor, size: int, stride: int | None = None) -> list[Window]:
    """Windows of `size` side by side, or one every `stride` tokens that predicts what no window before it did.

    Side by side, each token but a window's first is predicted; strided, each but the text's first is, once, with
    `size - stride` tokens or more before it (fewer at the text's beginning).

    Raises:
        ValueError: less than two tokens, or a stride that does not overlap.
    """
    if len(ids_T) < 2:
        raise ValueError(f"held-out text of {len(ids_T)} tokens: at least 2 are needed; name more text")
    if stride is None:
        return [Window(part_T, 1) for part_T in ids_T.split(size) if len(part_T) > 1]
    if not 0 < stride < size:
        raise ValueError(f"stride {stride}: must be 1 to {size - 1}, less than a window; leave it out for none")
    starts = range(0, max(1, len(ids_T) - size + stride), stride)
    return [Window(ids_T[start : start + size], size - stride if start else 1) for start in starts]


def chunk_rows(model: Model) -> int:
    """Positions whose logits are made at once."""
    return max(1, _CHUNK_LOGITS // model.config.vocab_size)


def measure_quality(
    model: Model,
    ids_T: Tensor,
    text_bytes: int,
    *,
    counts_T: Tensor | None = None,
    window_tokens: int | None = None,
    stride: int | None = None,
    on_window: OnWindow = lambda done, count: None,
) -> Quality:
    """Perplexity over non-overlapping windows of 512 (or the model's limit), each token but a window's first predicted;
    other windows as `window_size` and `cut` say.

    `ids_T` is one stream of packed documents. The loss is of the tokens that count, all where nothing says which;
    `text_bytes` is their UTF-8 size.

    Raises:
        ValueError: as `window_size` and `cut` do, no token that counts, or a loss that is not finite.
    """
    counts_T = torch.ones_like(ids_T, dtype=torch.bool) if counts_T is None else counts_T
    size = window_size([model], window_tokens)
    windows, counted = cut(ids_T, size, stride), cut(counts_T, size, stride)
    total, count = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for number, (window, counting) in enumerate(zip(windows, counted, strict=True), start=1):
            total += _window_loss(model, window, counting.predicted_N)
            count += int(counting.predicted_N.sum())
            on_window(number, len(windows))
    check_counts("held-out text", count)
    return Quality.of(total / count, count, int(counts_T.sum()), text_bytes)


def check_counts(text: str, count: int) -> None:
    """Raises ValueError for a text of which no predicted token counts."""
    if not count:
        raise ValueError(f"{text}: the assistant says nothing in it; name conversations in which it does")


def _window_loss(model: Model, window: Window, counts_N: Tensor) -> float:
    """Sum over what the window predicts and counts."""
    device, rows = next(model.parameters()).device, chunk_rows(model)
    hidden_ND = model.hidden_states(window.ids_T[None].to(device))[0, window.rows][counts_N.to(device)]
    targets_N = window.predicted_N[counts_N].to(device)
    parts = zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    return sum(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum").item() for h, t in parts)


def together(parts: Sequence[tuple[Quality, int]]) -> Quality:
    """Several texts as one, each with its UTF-8 bytes: the mean over their predicted tokens, and over their bytes."""
    tokens = sum(quality.tokens for quality, _ in parts)
    loss = sum(quality.loss * quality.tokens for quality, _ in parts) / tokens
    bits = sum(quality.bits_per_byte * text_bytes for quality, text_bytes in parts)
    return Quality(loss, math.exp(min(loss, 700.0)), bits / max(1, sum(size for _, size in parts)), tokens)
