"""The calibration text of a conversion: windows for the moments, for refinement and, apart from both, to judge by.

Shapes: B windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.checkpoint.hub import load_tokenizer
from smolseek.conversion.job import Job
from smolseek.conversion.sizes import wanted_windows, window_lengths
from smolseek.data import calibration_windows
from smolseek.data.encoding import check_vocabulary

_JUDGED_WINDOWS = 8


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, by what they are for."""

    moments_BT: Tensor
    """For the second moments; the refinement windows, cut shorter, and no more than the settings ask for."""
    refined_BT: Tensor
    """For layer-wise refinement and the end-to-end stage."""
    judged_BT: Tensor
    """For losses by stage. Nothing is learnt from them, unless there is one window only."""
    facts: dict[str, Any]
    """How many there are and of which sources, for conversion.json; `judged_apart` is False if one window is all that
    there is, which is then learnt from and judged by."""


def read_calibration(job: Job) -> Calibration:
    """Returns the windows that a conversion reads.

    Raises:
        ValueError: a source holds less than one window of text, or the tokenizer has tokens that the model has not.
    """
    settings = job.settings
    tokens, length = window_lengths(job.source, settings)
    windows_BT, sources = calibration_windows(
        load_tokenizer(job.folder),
        job.data,
        windows=wanted_windows(job.source, settings) + _JUDGED_WINDOWS,
        window_tokens=length,
        seed=settings.seed,
    )
    check_vocabulary(windows_BT, job.source.vocab_size)
    judged = max(1, min(_JUDGED_WINDOWS, len(windows_BT) // 4)) if len(windows_BT) > 1 else 0
    judged_BT, refined_BT = windows_BT[:judged] if judged else windows_BT, windows_BT[judged:]
    moments_BT = refined_BT.reshape(-1, tokens)[: settings.calibration_windows]
    facts = {
        "windows": len(moments_BT),
        "window_tokens": tokens,
        "refinement_tokens": refined_BT.numel(),
        "judged_tokens": judged_BT.numel(),
        "judged_apart": bool(judged),
        "sources": sources,
        "tokens_sha256": hashlib.sha256(windows_BT.to(torch.int64).numpy().tobytes()).hexdigest(),
    }
    return Calibration(moments_BT, refined_BT, judged_BT, facts)
