"""The calibration text of a conversion: windows for the moments, for refinement and, apart from both, to judge by.

Shapes: B windows, T tokens in each.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smolseek.checkpoint.hub import load_stock, load_tokenizer
from smolseek.config import SELF, check_weights
from smolseek.conversion.job import Job
from smolseek.conversion.self_text import read_openings, sample_windows
from smolseek.conversion.sizes import (
    BEGINNING_TOKENS,
    BEGINNINGS,
    JUDGED_WINDOWS,
    OPENINGS,
    WRITTEN_TOKENS,
    is_small,
    more_windows,
    own_share,
    wanted_windows,
    window_lengths,
)
from smolseek.conversion.work_folder import WorkFolder
from smolseek.data import calibration_windows
from smolseek.data.encoding import check_vocabulary
from smolseek.generation import end_tokens
from smolseek.numerics.memory import release_memory
from smolseek.numerics.precision import compute_dtype


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, by what they are for."""

    moments_BT: Tensor
    """For the second moments; the refinement windows, cut shorter, and no more than the settings ask for."""
    refined_BT: Tensor
    """For layer-wise refinement and the end-to-end stage."""
    more_BT: Tensor
    """For the end-to-end stage too: longer windows of text that is named, those of refinement among them."""
    openings_BT: Tensor
    """For the refinement of a large source: the shortest texts."""
    beginnings_BT: Tensor
    """For the end-to-end stage of a large source: short windows."""
    judged_BT: Tensor
    """For losses by stage. Nothing is learnt from them, unless no text has more than one window."""
    facts: dict[str, Any]
    """How many there are and of which sources, for conversion.json; `judged_apart` is False if what is learnt
    from is judged by, too."""


@dataclass(frozen=True)
class NamedText:
    """The windows of the sources that were named, before the model has written its own."""

    judged_BT: Tensor
    windows_BT: Tensor
    more_BT: Tensor
    """Longer windows for the end-to-end stage, whose pieces `windows_BT` are; none where it reads no more text."""
    sources: list[dict[str, Any]]
    """How much was read of which."""
    sampled: int
    """How many windows the model is to write beside them."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the calibration follows from, together with source and settings."""
        digest = _digest(self.judged_BT, self.windows_BT, self.more_BT)
        return {"sources": self.sources, "sampled": self.sampled, "tokens_sha256": digest}


def read_named_text(job: Job) -> NamedText:
    """Returns the windows of the sources that are text, and how many others the model writes (`SELF`).

    Raises:
        ValueError: a source holds less than one window of text, the weights do not fit the sources, or the tokenizer
            has tokens that the model has not.
    """
    data, (_, length) = job.data, window_lengths(job.source, job.settings)
    check_weights(data, "calibration", "calibration_weights")
    tokenizer = load_tokenizer(job.folder)
    refined, judged = wanted_windows(job.source, job.settings), JUDGED_WINDOWS[is_small(job.source)]
    weighted = zip(data.train, data.weights or (1.0,) * len(data.train), strict=True)
    shares = [(name, weight) for name, weight in weighted if name != SELF]
    most = max(1, WRITTEN_TOKENS // length)
    if not shares:
        nothing_BT = torch.empty(0, length, dtype=torch.long)
        return NamedText(nothing_BT, nothing_BT, nothing_BT, [], min(refined + judged, most))
    named = 1 - own_share(job.source, job.settings)
    wanted, apart = max(1, round((refined + judged) * named)), round(judged * named)
    more, long = more_windows(job.source, job.settings)
    pieces = long // length if more else 1
    names, weights = zip(*shares, strict=True)
    drawn_BT, sources = calibration_windows(
        tokenizer,
        dataclasses.replace(data, train=names, weights=weights),
        windows=more + apart if more else wanted,
        window_tokens=pieces * length,
        seed=job.settings.seed,
    )
    check_vocabulary(drawn_BT, job.source.vocab_size)
    apart = _count_aside(len(drawn_BT), apart)
    judged_BT, more_BT = drawn_BT[:apart, :length], drawn_BT[apart:]
    windows_BT = more_BT.unflatten(1, (pieces, length)).transpose(0, 1).flatten(0, 1)[: max(1, wanted - apart)]
    sources = [fact | {"windows": fact["windows"] * pieces} for fact in sources]
    sampled = min(refined + judged - len(judged_BT) - len(windows_BT), most) if SELF in data.train else 0
    return NamedText(judged_BT, windows_BT, more_BT if more else more_BT[:0], sources, sampled)


def _count_aside(windows: int, most: int) -> int:
    """Returns how many of the windows of a text nothing is learnt from: at most a quarter, and one must stay."""
    return max(1, min(most, windows // 4)) if windows > 1 and most else 0


def read_calibration(job: Job, text: NamedText, work: WorkFolder) -> Calibration:
    """Returns the windows that a conversion reads: those of `text` and those that the model writes.

    The latter are kept in `work`.

    Raises:
        ValueError: as `read_openings` and `sample_windows` do.
    """
    settings, (tokens, length) = job.settings, window_lengths(job.source, job.settings)
    judged_BT, refined_BT, sources = text.judged_BT, text.windows_BT, text.sources
    if text.sampled:
        own_BT, documents = _sampled(job, text.sampled, length, work)
        apart = _count_aside(len(own_BT), JUDGED_WINDOWS[is_small(job.source)] - len(judged_BT))
        judged_BT, refined_BT = torch.cat([judged_BT, own_BT[:apart]]), torch.cat([refined_BT, own_BT[apart:]])
        refined_BT = refined_BT[torch.randperm(len(refined_BT), generator=torch.Generator().manual_seed(settings.seed))]
        sources = [*sources, {"source": SELF, "documents": documents, "windows": len(own_BT)}]
    judged = len(judged_BT)
    judged_BT = judged_BT if judged else refined_BT
    moments_BT = refined_BT.reshape(-1, tokens)[: settings.calibration_windows]
    facts = {
        "windows": len(moments_BT),
        "window_tokens": tokens,
        "refinement_tokens": refined_BT.numel(),
        "end_to_end_tokens": refined_BT.numel() + text.more_BT.numel(),
        "judged_tokens": judged_BT.numel(),
        "judged_apart": judged > 0,
        "sources": sources,
        "tokens_sha256": _digest(judged_BT, refined_BT, text.more_BT),
    }
    short = (refined_BT[:0],) * 2 if is_small(job.source) else _short_windows(job, refined_BT, text.more_BT)
    return Calibration(moments_BT, refined_BT, text.more_BT, *short, judged_BT, facts)


def _short_windows(job: Job, *texts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the shortest texts, and short windows cut out of others at random; where the tokenizer puts nothing in
    front of a text, half of the latter have a first token drawn evenly from ordinary ones.

    The first token of a window becomes the sink of all attention, whatever it is, and no other token may. One token in
    256 is too few to learn that from, and those of a few windows are too few kinds.
    """
    generator = torch.Generator().manual_seed(job.settings.seed)
    size = BEGINNING_TOKENS
    pieces_BT = torch.cat([part_BT[:, : part_BT.shape[1] // size * size].reshape(-1, size) for part_BT in texts_BT])
    pieces_BT = pieces_BT[torch.randperm(len(pieces_BT), generator=generator)[:BEGINNINGS]]
    openings = read_openings(load_tokenizer(job.folder), job.source.vocab_size, ())
    if not openings.start:
        index = torch.zeros(len(pieces_BT[::2]), dtype=torch.long)
        pieces_BT[::2, 0] = openings.draw(index, generator)
    return openings.shortest_texts(OPENINGS, generator), pieces_BT


def _sampled(job: Job, windows: int, window_tokens: int, work: WorkFolder) -> tuple[Tensor, int]:
    """Returns windows that the model writes and their number of documents, from `work` if they are there.

    The model that writes has its weights in the dtype of products; it is gone before the one to convert is loaded.
    """
    if (part := work.get(SELF)) is not None:
        return part[0]["windows_BT"], part[1]
    windows_BT, documents = job.shares.by_leader(lambda: _sample(job, windows, window_tokens))
    work.put(SELF, {"windows_BT": windows_BT}, documents)
    return windows_BT, documents


def _sample(job: Job, windows: int, window_tokens: int) -> tuple[Tensor, int]:
    """Returns windows that the model writes and their number of documents.

    One process writes them all: a window's draws follow from those before it.
    """
    tokenizer = load_tokenizer(job.folder)
    writer = load_stock(job.folder, dtype=compute_dtype(job.device, "auto"), device=str(job.device))
    ends = end_tokens(writer, tokenizer)
    windows_BT, documents = sample_windows(
        writer.model,
        read_openings(tokenizer, job.source.vocab_size, ends),
        windows=windows,
        window_tokens=window_tokens,
        end_tokens=ends,
        seed=job.settings.seed,
        on_progress=partial(job.on_progress, "sample text"),
    )
    del writer
    release_memory()
    return windows_BT, documents


def _digest(*windows_BT: Tensor) -> str:
    ids = torch.cat([part_BT.flatten() for part_BT in windows_BT])
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
