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
from smolseek.conversion.sizes import WRITTEN_TOKENS, is_small, more_windows, wanted_windows, window_lengths
from smolseek.conversion.work_folder import WorkFolder
from smolseek.data import calibration_windows
from smolseek.data.encoding import check_vocabulary
from smolseek.generation import end_tokens
from smolseek.numerics.memory import release_memory
from smolseek.numerics.precision import compute_dtype

_JUDGED_WINDOWS = {True: 8, False: 16}
"""Windows to judge by: of a small source, and of others, whose windows are half as long."""


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, by what they are for."""

    moments_BT: Tensor
    """For the second moments; the refinement windows, cut shorter, and no more than the settings ask for."""
    refined_BT: Tensor
    """For layer-wise refinement and the end-to-end stage."""
    more_BT: Tensor
    """For the end-to-end stage too: text that is named, as far as there is more."""
    judged_BT: Tensor
    """For losses by stage. Nothing is learnt from them, unless there is one window only."""
    facts: dict[str, Any]
    """How many there are and of which sources, for conversion.json; `judged_apart` is False if one window is all that
    there is, which is then learnt from and judged by."""


@dataclass(frozen=True)
class NamedText:
    """The windows of the sources that were named, before the model has written its own."""

    windows_BT: Tensor
    more_BT: Tensor
    """Those for the end-to-end stage alone."""
    sources: list[dict[str, Any]]
    """How much was read of which."""
    sampled: int
    """How many windows the model is to write beside them."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the calibration follows from, together with source and settings."""
        digest = _digest(self.windows_BT, self.more_BT)
        return {"sources": self.sources, "sampled": self.sampled, "tokens_sha256": digest}


def read_text(job: Job) -> NamedText:
    """Returns the windows of the sources that are text, and how many others the model writes (`SELF`).

    Raises:
        ValueError: a source holds less than one window of text, the weights do not fit the sources, or the tokenizer
            has tokens that the model has not.
    """
    data, (_, length) = job.data, window_lengths(job.source, job.settings)
    check_weights(data, "calibration", "calibration_weights")
    tokenizer = load_tokenizer(job.folder)
    windows = wanted_windows(job.source, job.settings) + _JUDGED_WINDOWS[is_small(job.source)]
    shares = list(zip(data.train, data.weights or (1.0,) * len(data.train), strict=True))
    read = [(name, weight) for name, weight in shares if name != SELF]
    most = max(1, WRITTEN_TOKENS // length)
    if not read:
        nothing_BT = torch.empty(0, length, dtype=torch.long)
        return NamedText(nothing_BT, nothing_BT, [], min(windows, most))
    wanted = max(1, round(windows * sum(weight for _, weight in read) / sum(weight for _, weight in shares)))
    names, weights = zip(*read, strict=True)
    windows_BT, sources = calibration_windows(
        tokenizer,
        dataclasses.replace(data, train=names, weights=weights if data.weights else ()),
        windows=wanted + more_windows(job.source, job.settings),
        window_tokens=length,
        seed=job.settings.seed,
    )
    check_vocabulary(windows_BT, job.source.vocab_size)
    windows_BT, more_BT = windows_BT[:wanted], windows_BT[wanted:]
    sampled = min(windows - len(windows_BT), most) if SELF in data.train else 0
    return NamedText(windows_BT, more_BT, sources, sampled)


def read_calibration(job: Job, text: NamedText, work: WorkFolder) -> Calibration:
    """Returns the windows that a conversion reads: those of `text` and those that the model writes.

    The latter are kept in `work`.

    Raises:
        ValueError: as `read_openings` and `sample_windows` do.
    """
    settings, (tokens, length) = job.settings, window_lengths(job.source, job.settings)
    windows_BT, sources = text.windows_BT, text.sources
    if text.sampled:
        own_BT, documents = _sampled(job, text.sampled, length, work)
        windows_BT = torch.cat([windows_BT, own_BT])
        windows_BT = windows_BT[torch.randperm(len(windows_BT), generator=torch.Generator().manual_seed(settings.seed))]
        sources = [*sources, {"source": SELF, "documents": documents, "windows": len(own_BT)}]
    most = _JUDGED_WINDOWS[is_small(job.source)]
    judged = max(1, min(most, len(windows_BT) // 4)) if len(windows_BT) > 1 else 0
    judged_BT, refined_BT = windows_BT[:judged] if judged else windows_BT, windows_BT[judged:]
    moments_BT = refined_BT.reshape(-1, tokens)[: settings.calibration_windows]
    facts = {
        "windows": len(moments_BT),
        "window_tokens": tokens,
        "refinement_tokens": refined_BT.numel(),
        "end_to_end_tokens": refined_BT.numel() + text.more_BT.numel(),
        "judged_tokens": judged_BT.numel(),
        "judged_apart": bool(judged),
        "sources": sources,
        "tokens_sha256": _digest(windows_BT, text.more_BT),
    }
    return Calibration(moments_BT, refined_BT, text.more_BT, judged_BT, facts)


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
    return hashlib.sha256(torch.cat(windows_BT).to(torch.int64).numpy().tobytes()).hexdigest()
