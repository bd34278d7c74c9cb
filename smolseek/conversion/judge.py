"""The check at the end of a conversion: the written folder beside the dense one, on texts that nothing is learnt from.

Shapes: T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from smolseek.checkpoint.atomic import refuse_inputs
from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
from smolseek.config import SELF, DataSettings
from smolseek.conversion.job import Job
from smolseek.data.drawing import held_out_text
from smolseek.data.encoding import check_vocabulary
from smolseek.data.packing import Packed
from smolseek.data.sources import FileSource, HubSource, open_sources
from smolseek.evaluation import WINDOW_TOKENS, Difference, compare
from smolseek.evaluation.quality import check_counted, cut_windows
from smolseek.numerics.perplexity import perplexity

_TOKENS = 8192  # of each text
_BUILTIN = "builtin:python"


def read_judged(job: Job, names: Iterable[str]) -> dict[str, Packed]:
    """Returns of each text at most 8,192 tokens, drawn over the whole of it; of builtin:python its held-out split.

    Raises:
        ValueError: a text does not exist, is calibration text too, lies in the folder to replace, has less than one
            window, nothing that counts, or a token that the model has not.
    """
    names = list(names)
    if not names:
        return {}
    refuse_inputs(job.out, names)
    learnt = _parts((text for text in job.data.train if text != SELF), job.data) if job.calibrates else set()
    texts: dict[str, Packed] = {}
    for name in names:
        if common := sorted(_parts([name], job.data) & learnt):
            raise ValueError(f"judge {name}: {common[0]} is calibration text too, and is learnt from; name other text")
        texts[name] = text = held_out_text(load_tokenizer(job.folder), _held_out(job.data, name))
        size = _window_tokens(job)
        if len(text.ids_T) < size:
            raise ValueError(f"judge {name}: {len(text.ids_T)} tokens, less than one window of {size}; name more text")
        check_vocabulary(text.ids_T, job.source.vocab_size)
        counted = (int(window.predicted_N.sum()) for window in cut_windows(text.counts_T, size))
        check_counted(f"judge {name}", sum(counted))
    return texts


def judge_folder(job: Job, texts: Mapping[str, Packed]) -> list[dict[str, Any]]:
    """Returns for each text how good the dense and the written folder are on it, loaded as `smolseek eval` loads them.

    These are perplexities, their ratio, KL(dense ‖ converted) in nats per token, and the share of tokens after which
    both find the same next token likeliest.

    Raises:
        ValueError: a loss is not finite.
    """
    converted, dense = (load_for_evaluation(folder, device=str(job.device)) for folder in (job.out, job.folder))
    comparison = compare(
        converted,
        dense,
        {name: text.ids_T for name, text in texts.items()},
        counts={name: text.counts_T for name, text in texts.items()},
        window_tokens=_window_tokens(job),
        on_window=partial(job.on_progress, "judge"),
    )
    return [_record(job, name, difference) for name, difference in comparison.by_text.items()]


def perplexity_ratios(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns from a conversion.json the converted model's perplexity over the dense one's, by text.

    The texts are the calibration windows that losses are told on, if there are any, and those it was judged on.
    """
    losses, ratios = report["losses"], {}
    last = next((losses[stage] for stage in ("distilled", "refined", "closed_form") if stage in losses), None)
    if last is not None:
        ratios["the calibration text"] = perplexity(last - losses["dense"])
    return ratios | {record["source"]: record["ratio"] for record in report.get("judged", ())}


def _window_tokens(job: Job) -> int:
    return min(WINDOW_TOKENS, job.source.max_position_embeddings)


def _held_out(data: DataSettings, name: str) -> DataSettings:
    """Returns how one text is read: the whole of it, of the built-in one what no calibration reads."""
    if name == _BUILTIN:
        share = data.held_out_share or DataSettings().held_out_share
        return dataclasses.replace(data, train=(name,), held_out=(), held_out_share=share, held_out_tokens=_TOKENS)
    return dataclasses.replace(data, held_out=(name,), held_out_tokens=_TOKENS)


def _parts(names: Iterable[str], data: DataSettings) -> set[str]:
    """Returns the files and the hub's data sets that sources read, under one name each."""
    parts: set[str] = set()
    for source in open_sources(names, data).sources:
        if isinstance(source, FileSource):
            parts |= {str(path.resolve()) for path in source.paths}
        elif isinstance(source, HubSource):
            parts.add(f"hub:{source.id}" + (f":{source.config}" if source.config else ""))
        elif data.held_out:  # then calibration reads the whole of the built-in text
            parts.add(_BUILTIN)
    return parts


def _record(job: Job, name: str, difference: Difference) -> dict[str, Any]:
    """Returns the numbers of one text, for conversion.json."""
    loss, dense_loss = difference.loss, difference.teacher_loss
    if not math.isfinite(loss - dense_loss):
        raise ValueError(
            f"{job.out}: written, but its loss on {name} is {loss}, the dense model's {dense_loss}: weights hold NaN "
            "or overflow; fetch the source again"
        )
    return {
        "source": name,
        "tokens": difference.tokens,
        "dense_perplexity": perplexity(dense_loss),
        "perplexity": perplexity(loss),
        "ratio": perplexity(loss - dense_loss),
        "kl": difference.kl,
        "agreement": difference.agreement,
    }
