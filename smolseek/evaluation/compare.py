"""Compares a model with its teacher (the model it was made from) token by token: how far apart they are, and where.

Shapes: T tokens, N positions of one window, D hidden_size, V vocab_size. A last dimension of 4 holds for each position
KL(teacher ‖ model), 1 if both models find the same next token likeliest (else 0), and the loss of the model and of the
teacher on the token that follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.data.encoding import check_vocabulary
from smolseek.evaluation.quality import Model, OnWindow, check_counted, cut_windows, positions_per_chunk, window_size
from smolseek.generation import evaluating

_CONTEXT_STARTS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
"""A bucket of positions begins at each of these numbers of tokens before the predicted one."""
_RANK_STARTS = (1, 11, 101, 1001, 10001)
"""A bucket of tokens begins at each of these ranks by frequency."""


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a teacher's.

    `kl` is KL(teacher ‖ model) in nats per token; `agreement` is the share of tokens after which both models find the
    same next token likeliest; `tokens` counts the tokens.
    """

    kl: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class Difference(Divergence):
    """A divergence over predicted tokens, with the loss of both models on them in nats per token."""

    loss: float
    teacher_loss: float


@dataclass(frozen=True)
class Comparison:
    """Differences from a teacher: over all tokens, and split by text, by length of context and by token frequency."""

    overall: Difference
    by_text: dict[str, Difference]
    by_context: dict[str, Difference]
    by_frequency: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


def measure_divergence(model: Model, teacher: Model, ids_T: Tensor, *, window_tokens: int | None = None) -> Divergence:
    """Returns the divergence from `teacher` over all tokens, in non-overlapping windows of `window_size` tokens.

    On text unlike all training text it shows whether the model kept the teacher's knowledge, apart from what the model
    learnt in training.

    Raises:
        ValueError: no tokens, vocabularies of different sizes, or windows longer than a model's limit.
    """
    if not len(ids_T):
        raise ValueError("text of 0 tokens: at least 1 is needed to compare two models; name more text")
    check_vocabulary(ids_T, model.config.vocab_size)
    size = _common_window_size(model, teacher, window_tokens)
    total_4 = torch.zeros(4, dtype=torch.float64)
    with evaluating(model), evaluating(teacher):
        for window_T in ids_T.split(size):
            total_4 += _measure_positions(model, teacher, window_T, slice(None)).sum(0)
    kl, agreement = (total_4[:2] / len(ids_T)).tolist()
    return Divergence(kl, agreement, len(ids_T))


def compare(
    model: Model,
    teacher: Model,
    texts: Mapping[str, Tensor],
    *,
    counts: Mapping[str, Tensor] | None = None,
    window_tokens: int | None = None,
    stride: int | None = None,
    on_window: OnWindow = lambda done, count: None,
) -> Comparison:
    """Compares both models on the same predictions.

    Args:
        texts: a stream of tokens (T,) for each name.
        counts: for each name a mask (T,), True for the tokens that count; None: all tokens count.
        window_tokens, stride: windows, as in `measure_quality`.

    Returns:
        A comparison whose frequencies are ranks within `texts`; rank 1 is the commonest token.

    Raises:
        ValueError: vocabularies of different sizes, a text in which no predicted token counts, or as `window_size` and
            `cut_windows` do.
    """
    size = _common_window_size(model, teacher, window_tokens)
    windows = []
    for index, (name, ids_T) in enumerate(texts.items()):
        check_vocabulary(ids_T, model.config.vocab_size)
        counts_T = torch.ones_like(ids_T, dtype=torch.bool) if counts is None else counts[name]
        pairs = zip(cut_windows(ids_T, size, stride), cut_windows(counts_T, size, stride), strict=True)
        text_windows = [(index, window, counted.predicted_N) for window, counted in pairs]
        check_counted(name, sum(int(counts_N.sum()) for _, _, counts_N in text_windows))
        windows += text_windows
    measured, keys = [], []
    with evaluating(model), evaluating(teacher):
        for number, (text, window, counts_N) in enumerate(windows, start=1):
            measured.append(_measure_positions(model, teacher, window.ids_T, window.positions)[counts_N])
            contexts_N = torch.arange(window.first, len(window.ids_T))
            key_3N = torch.stack([torch.full_like(contexts_N, text), contexts_N, window.predicted_N])
            keys.append(key_3N[:, counts_N])
            on_window(number, len(windows))
    measured_N4, (text_N, context_N, target_N) = torch.cat(measured), torch.cat(keys, dim=1)
    return Comparison(
        _mean_difference(measured_N4),
        _group_means(measured_N4, text_N, list(texts)),
        _group_means(measured_N4, _bucket_index(context_N, _CONTEXT_STARTS), _bucket_names(_CONTEXT_STARTS)),
        _group_means(measured_N4, _bucket_index(_frequency_ranks(target_N), _RANK_STARTS), _bucket_names(_RANK_STARTS)),
    )


def _common_window_size(model: Model, teacher: Model, window_tokens: int | None) -> int:
    """Returns the window size for both models; raises ValueError if their vocabularies differ in size."""
    vocabularies = [m.config.vocab_size for m in (model, teacher)]
    if len(set(vocabularies)) > 1:
        raise ValueError(
            f"vocabularies of {vocabularies[0]} and {vocabularies[1]}: only models of one vocabulary can be compared; "
            "name the dense model that this one was made from"
        )
    return window_size([model, teacher], window_tokens)


def _measure_positions(model: Model, teacher: Model, ids_T: Tensor, positions: slice) -> Tensor:
    """Returns the four numbers of each of the `positions` of one window, (N, 4).

    No token follows the last position of the window, so its losses are meaningless.
    """
    hidden = [m.hidden_states(ids_T[None].to(next(m.parameters()).device))[0, positions] for m in (model, teacher)]
    streams = [stream.split(positions_per_chunk(model)) for stream in (*hidden, ids_T.roll(-1)[positions])]
    parts = []
    for ours_ND, theirs_ND, target_N in zip(*streams, strict=True):
        ours_NV = model.lm_head(ours_ND).float().log_softmax(-1)
        theirs_NV = teacher.lm_head(theirs_ND).float().log_softmax(-1).to(ours_NV.device)
        kl_N = F.kl_div(ours_NV, theirs_NV, reduction="none", log_target=True).sum(-1)
        agreed_N = ours_NV.argmax(-1) == theirs_NV.argmax(-1)
        target_N1 = target_N[:, None].to(ours_NV.device)
        losses_N2 = -torch.cat([ours_NV.gather(1, target_N1), theirs_NV.gather(1, target_N1)], dim=1)
        parts.append(torch.cat([torch.stack([kl_N, agreed_N.float()], dim=1), losses_N2], dim=1).cpu().double())
    return torch.cat(parts)


def _mean_difference(measured_N4: Tensor) -> Difference:
    kl, agreement, loss, teacher_loss = measured_N4.mean(0).tolist()
    return Difference(kl, agreement, len(measured_N4), loss, teacher_loss)


def _group_means(measured_N4: Tensor, key_N: Tensor, names: Sequence[str]) -> dict[str, Difference]:
    """Returns for each key in `key_N` the mean over its positions, under the key's name."""
    return {names[key]: _mean_difference(measured_N4[key_N == key]) for key in key_N.unique().tolist()}


def _bucket_index(value_N: Tensor, starts: Sequence[int]) -> Tensor:
    """Returns the index of the bucket that each value falls into."""
    return torch.bucketize(value_N, torch.tensor(starts), right=True) - 1


def _bucket_names(starts: Sequence[int]) -> list[str]:
    pairs = itertools.pairwise(starts)
    return [f"{start:,} to {end - 1:,}" for start, end in pairs] + [f"{starts[-1]:,} and more"]


def _frequency_ranks(target_N: Tensor) -> Tensor:
    """Returns each token's rank by its frequency in `target_N`; the most frequent token has rank 1."""
    counts_V = target_N.bincount()
    ranks_V = torch.empty_like(counts_V)
    ranks_V[counts_V.argsort(descending=True, stable=True)] = torch.arange(1, len(counts_V) + 1)
    return ranks_V[target_N]
