"""A model against the one it was made from, token by token: distance, and where it is lost.

Shapes: T tokens, N positions of one window, V vocabulary. The last dimension of size 4 holds, of one position,
KL(teacher ‖ model), whether both hold the same next token likeliest, and both losses on the token that follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.evaluation.quality import Model, OnWindow, check_counts, chunk_rows, cut, window_size
from smolseek.generation import evaluating

_CONTEXTS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Tokens before a predicted one, at which a bucket of positions begins."""
_RANKS = (1, 11, 101, 1001, 10001)
"""Ranks of a token by its frequency, at which a bucket of rarity begins."""


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a teacher's: KL(teacher ‖ model) in nats per token, and the
    share of tokens after which both hold the same next token likeliest."""

    kl: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class Difference(Divergence):
    """A divergence over predicted tokens, and the loss of both models on them in nats per token."""

    loss: float
    teacher_loss: float


@dataclass(frozen=True)
class Comparison:
    """Where a model differs from its teacher: over all, and divided by text, tokens of context, and token frequency."""

    overall: Difference
    by_text: dict[str, Difference]
    by_context: dict[str, Difference]
    by_frequency: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


def measure_divergence(model: Model, teacher: Model, ids_T: Tensor, *, window_tokens: int | None = None) -> Divergence:
    """KL to `teacher` and agreement with it over windows as `window_size` says, every token counted.

    On text of a domain that no training saw, it tells keeping the teacher from learning the training text.

    Raises:
        ValueError: no tokens, vocabularies of different sizes, or windows that a model does not read.
    """
    if not len(ids_T):
        raise ValueError("text of 0 tokens: at least 1 is needed to compare two models; name more text")
    size = _common_size(model, teacher, window_tokens)
    total_4 = torch.zeros(4, dtype=torch.float64)
    with evaluating(model), evaluating(teacher), torch.inference_mode():
        for window_T in ids_T.split(size):
            total_4 += _apart(model, teacher, window_T, slice(None)).sum(0)
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
    """Both models on the same predictions of `texts`, streams of tokens (T,) by name, windows as in `measure_quality`,
    and of each the tokens that count (T,).

    A token's frequency is its rank in the texts themselves, the commonest first.

    Raises:
        ValueError: vocabularies of different sizes, as `window_size` and `cut` do, or a text of which no token counts.
    """
    size = _common_size(model, teacher, window_tokens)
    windows = []
    for index, (name, ids_T) in enumerate(texts.items()):
        counts_T = torch.ones_like(ids_T, dtype=torch.bool) if counts is None else counts[name]
        pairs = zip(cut(ids_T, size, stride), cut(counts_T, size, stride), strict=True)
        here = [(index, window, counted.predicted_N) for window, counted in pairs]
        check_counts(name, sum(int(counts_N.sum()) for _, _, counts_N in here))
        windows += here
    measured, keys = [], []
    with evaluating(model), evaluating(teacher), torch.inference_mode():
        for number, (text, window, counts_N) in enumerate(windows, start=1):
            measured.append(_apart(model, teacher, window.ids_T, window.rows)[counts_N])
            contexts_N = torch.arange(window.first, len(window.ids_T))
            key_3N = torch.stack([torch.full_like(contexts_N, text), contexts_N, window.predicted_N])
            keys.append(key_3N[:, counts_N])
            on_window(number, len(windows))
    measured_N4, (text_N, context_N, target_N) = torch.cat(measured), torch.cat(keys, dim=1)
    return Comparison(
        _mean(measured_N4),
        _by(measured_N4, text_N, list(texts)),
        _by(measured_N4, _bucket(context_N, _CONTEXTS), _ranges(_CONTEXTS)),
        _by(measured_N4, _bucket(_ranks(target_N), _RANKS), _ranges(_RANKS)),
    )


def _common_size(model: Model, teacher: Model, window_tokens: int | None) -> int:
    vocabularies = [m.config.vocab_size for m in (model, teacher)]
    if len(set(vocabularies)) > 1:
        raise ValueError(
            f"vocabularies of {vocabularies[0]} and {vocabularies[1]}: only models of one vocabulary can be compared; "
            "name the dense model that this one was made from"
        )
    return window_size([model, teacher], window_tokens)


def _apart(model: Model, teacher: Model, ids_T: Tensor, rows: slice) -> Tensor:
    """The positions `rows` of one window, (N, 4); behind the window's last token no loss means anything."""
    hidden = [m.hidden_states(ids_T[None].to(next(m.parameters()).device))[0, rows] for m in (model, teacher)]
    count, parts = chunk_rows(model), []
    for ours_ND, theirs_ND, target_N in zip(*(t.split(count) for t in (*hidden, ids_T.roll(-1)[rows])), strict=True):
        ours_NV = model.lm_head(ours_ND).float().log_softmax(-1)
        theirs_NV = teacher.lm_head(theirs_ND).float().log_softmax(-1).to(ours_NV.device)
        kl_N = F.kl_div(ours_NV, theirs_NV, reduction="none", log_target=True).sum(-1)
        agreed_N = ours_NV.argmax(-1) == theirs_NV.argmax(-1)
        target_N1 = target_N[:, None].to(ours_NV.device)
        losses_N2 = -torch.cat([ours_NV.gather(1, target_N1), theirs_NV.gather(1, target_N1)], dim=1)
        parts.append(torch.cat([torch.stack([kl_N, agreed_N.float()], dim=1), losses_N2], dim=1).double().cpu())
    return torch.cat(parts)


def _mean(measured_N4: Tensor) -> Difference:
    kl, agreement, loss, teacher_loss = measured_N4.mean(0).tolist()
    return Difference(kl, agreement, len(measured_N4), loss, teacher_loss)


def _by(measured_N4: Tensor, key_N: Tensor, names: Sequence[str]) -> dict[str, Difference]:
    """The means of the positions of each key that is there."""
    return {names[key]: _mean(measured_N4[key_N == key]) for key in key_N.unique().tolist()}


def _bucket(value_N: Tensor, beginnings: Sequence[int]) -> Tensor:
    """The index of the bucket that each value falls into."""
    return torch.bucketize(value_N, torch.tensor(beginnings), right=True) - 1


def _ranges(beginnings: Sequence[int]) -> list[str]:
    pairs = itertools.pairwise(beginnings)
    return [f"{begin:,} to {end - 1:,}" for begin, end in pairs] + [f"{beginnings[-1]:,} and more"]


def _ranks(target_N: Tensor) -> Tensor:
    """Of each token its place when all that are there are sorted by how often, from 1."""
    counts_V = target_N.bincount()
    ranks_V = torch.empty_like(counts_V)
    ranks_V[counts_V.argsort(descending=True, stable=True)] = torch.arange(1, len(counts_V) + 1)
    return ranks_V[target_N]
