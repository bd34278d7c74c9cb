"""Held-out loss and perplexity, defined once for the whole package.

Shapes: T tokens, N positions of one window, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.data.encoding import check_vocabulary
from smolseek.generation import evaluating
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.perplexity import perplexity
from smolseek.numerics.shares import ALONE, Shares

WINDOW_TOKENS = 512
_CHUNK_LOGITS = 2**22
"""Most logits computed at once: 16 MiB in fp32, for any window and vocabulary."""

Model = DeepseekV3 | StockModel
OnWindow = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class Quality:
    """Held-out loss in nats per token, and perplexity and bits per byte, which follow from it."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def from_loss(cls, loss: float, tokens: int, text_tokens: int, text_bytes: int) -> Quality:
        """Returns the quality for a mean loss over `tokens` predicted tokens.

        The text they are from has `text_tokens` tokens and `text_bytes` bytes.

        Raises:
            ValueError: a loss that is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss}: the weights hold NaN, or overflow; fetch the checkpoint again, or use float32"
            )
        bits_per_byte = loss * text_tokens / (math.log(2) * max(1, text_bytes))
        return cls(loss, perplexity(loss), bits_per_byte, tokens)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


class Window(NamedTuple):
    """Tokens that are read at once; those from index `first` on are predicted in this window."""

    ids_T: Tensor
    first: int

    @property
    def predicted_N(self) -> Tensor:
        """The tokens that are predicted in this window."""
        return self.ids_T[self.first :]

    @property
    def positions(self) -> slice:
        """The positions whose outputs predict them: each is one before the predicted token."""
        return slice(self.first - 1, len(self.ids_T) - 1)


def window_size(models: Sequence[Model], wanted: int | None = None) -> int:
    """Returns the tokens of a window: `wanted`, or by default 512, or the models' lowest limit if that is less.

    Raises:
        ValueError: fewer than two tokens, or more than a model's limit.
    """
    limit = min(model.config.max_position_embeddings for model in models)
    if wanted is not None and not 2 <= wanted <= limit:
        raise ValueError(f"window_tokens {wanted}: must be 2 to {limit}, the most that the model reads; lower it")
    return min(WINDOW_TOKENS, limit) if wanted is None else wanted


def cut_windows(ids_T: Tensor, size: int, stride: int | None = None) -> list[Window]:
    """Returns windows of `size` tokens: side by side, or one every `stride` tokens.

    Side by side, every token but the first of each window is predicted. With a stride, a window predicts the tokens
    that no earlier window did. So every token but the text's first is predicted once, with at least `size - stride`
    tokens before it (fewer at the text's beginning).

    Raises:
        ValueError: fewer than two tokens, or a stride at which windows do not overlap.
    """
    if len(ids_T) < 2:
        raise ValueError(f"held-out text of {len(ids_T)} tokens: at least 2 are needed; name more text")
    if stride is None:
        return [Window(part_T, 1) for part_T in ids_T.split(size) if len(part_T) > 1]
    if not 0 < stride < size:
        raise ValueError(f"stride {stride}: must be 1 to {size - 1}, less than a window; leave it out for none")
    starts = range(0, max(1, len(ids_T) - size + stride), stride)
    return [Window(ids_T[start : start + size], size - stride if start else 1) for start in starts]


def positions_per_chunk(model: Model) -> int:
    """Returns for how many positions logits are computed at once."""
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
    shares: Shares = ALONE,
) -> Quality:
    """Returns the held-out quality of a model.

    By default windows do not overlap and have 512 tokens (or the model's limit); see `window_size` and `cut_windows`.

    Args:
        ids_T: one stream of packed documents.
        text_bytes: UTF-8 size of the tokens that count.
        counts_T: True for the tokens that count in the loss; None: all tokens count.
        shares: the processes that share the windows; each of them returns the quality on all.

    Raises:
        ValueError: no predicted token counts, a token is not the model's, the loss is not finite, or as `window_size`
            and `cut_windows` do.
    """
    check_vocabulary(ids_T, model.config.vocab_size)
    counts_T = torch.ones_like(ids_T, dtype=torch.bool) if counts_T is None else counts_T
    size = window_size([model], window_tokens)
    windows = list(zip(cut_windows(ids_T, size, stride), cut_windows(counts_T, size, stride), strict=True))
    total_2 = torch.zeros(2, dtype=torch.float64)
    with evaluating(model):
        for number, ((window, counting), counts) in enumerate(shares.in_step(windows), start=1):
            loss = _window_loss(model, window, counting.predicted_N)
            if counts:
                total_2 += torch.tensor([loss, int(counting.predicted_N.sum())], dtype=torch.float64)
            on_window(min(number * shares.size, len(windows)), len(windows))
    shares.sum_(total_2)
    total, count = total_2[0].item(), int(total_2[1])
    check_counted("held-out text", count)
    return Quality.from_loss(total / count, count, int(counts_T.sum()), text_bytes)


def check_counted(text: str, count: int) -> None:
    """Raises ValueError if `count`, the number of predicted tokens of a text that count, is 0."""
    if not count:
        raise ValueError(f"{text}: the assistant says nothing in it; name conversations in which it does")


def _window_loss(model: Model, window: Window, counts_N: Tensor) -> float:
    """Returns the sum of the losses on the window's predicted tokens that count."""
    device, size = next(model.parameters()).device, positions_per_chunk(model)
    hidden_ND = model.hidden_states(window.ids_T[None].to(device))[0, window.positions][counts_N.to(device)]
    targets_N = window.predicted_N[counts_N].to(device)
    parts = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    return sum(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum").item() for h, t in parts)


def combine_qualities(parts: Sequence[tuple[Quality, int]]) -> Quality:
    """Returns the quality over several texts together, each given with its UTF-8 bytes.

    The loss is the mean over all predicted tokens, and bits per byte the mean over all bytes.
    """
    tokens = sum(quality.tokens for quality, _ in parts)
    loss = sum(quality.loss * quality.tokens for quality, _ in parts) / tokens
    bits = sum(quality.bits_per_byte * text_bytes for quality, text_bytes in parts)
    return Quality(loss, perplexity(loss), bits / max(1, sum(size for _, size in parts)), tokens)
