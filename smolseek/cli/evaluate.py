"""The verb eval."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from smolseek.cli.shared import Device, Dtype, OnProgress, align_table, progress_bars, quiet_libraries, torch_dtype
from smolseek.config import SEPARATOR, DataSettings

if TYPE_CHECKING:
    from smolseek.data.packing import Packed
    from smolseek.evaluation import Comparison, Difference, Quality
    from smolseek.evaluation.needle import Retrieval
    from smolseek.evaluation.quality import Model

log = logging.getLogger(__name__)

Section = tuple[dict[str, Any], str]
"""One measurement, as JSON and as text."""


@dataclass(frozen=True)
class Eval:
    """Measure a model with stock transformers: on text, on tasks and in retrieval; alone or against its dense source.

    Give at least one of --text, --tasks and --needle.
    """

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base of any causal model, or GGUF file of a dense one."""
    text: tuple[str, ...] = ()
    """Perplexity and bits per byte of each of these, and of all together: files, folders, globs (.txt, .jsonl,
    .parquet), hub:ID, builtin:prose or builtin:python (its held-out split); of experts also their balance."""
    compare: str | None = None
    """Dense model to compare with: shows where the two differ on the text, and the scores of both. None, with --tasks:
    the source in conversion.json."""
    tasks: str | None = None
    """Names of lm-eval tasks, separated by commas (needs smolseek[eval])."""
    needle: bool = False
    """Measure how much a repeated span helps the prediction, by its distance; spans of the text, or of random tokens if
    there is no text."""
    window_tokens: int | None = None
    """Tokens in one window of a text; none: 512, or the model's limit if that is lower."""
    stride: int | None = None
    """Tokens from one window's start to the next, so that windows overlap. Each token is still predicted once, with at
    least window_tokens - stride tokens before it. None: windows side by side."""
    limit: int | None = None
    """Documents to read of each task; none: all."""
    include_path: Path | None = None
    """Folder of your own task files (.yaml)."""
    batch_size: int = 8
    """Batch size for tasks."""
    needle_tokens: int | None = None
    """Longest context of the needle, in tokens; none: the model's limit."""
    needle_trials: int = 32
    """Number of spans for each distance of the needle."""
    seed: int = 0
    """Seed of the needle's spans."""
    separator: str = SEPARATOR
    """Text that separates the documents of a text file."""
    text_column: str = "text"
    """Field of a JSON line or Parquet row that holds the text."""
    json: bool = False
    """Print JSON."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Dtype = "float32"
    """Dtype of the weights in memory."""


def run_eval(command: Eval) -> None:
    quiet_libraries()
    from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
    from smolseek.data.encoding import check_same_tokens, check_vocabulary
    from smolseek.evaluation.tasks import find_tasks
    from smolseek.numerics.precision import check_device

    names = [name for name in (command.tasks or "").split(",") if name]
    if not (command.text or names or command.needle):
        raise ValueError("eval: nothing to measure; name --text FILE, --tasks NAME,NAME or --needle")
    for field in ("limit", "batch_size", "needle_tokens"):
        value = getattr(command, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} {value}: must be 1 or more; leave it out for the default")
    if command.compare == "":
        raise ValueError("compare '': is no name of a model; leave it out to compare with none")
    check_device(command.device)
    manager = find_tasks(names, command.include_path) if names else None
    tokenizer = load_tokenizer(command.folder)
    texts = _read_texts(command, tokenizer)
    folders = [command.folder, *_dense_folders(command)]
    if command.text or command.needle:  # the same tokens go to both models
        for folder in folders[1:]:
            check_same_tokens(folder, load_tokenizer(folder), tokenizer)
    models = [load_for_evaluation(f, dtype=torch_dtype(command.dtype), device=command.device) for f in folders]
    for model, text in itertools.product(models, texts.values()):
        check_vocabulary(text.ids_T, model.config.vocab_size)
    sections: list[Section] = []
    with progress_bars() as on_progress:
        if texts:
            sections.append(_measure_texts(command, models, texts, on_progress))
            sections += _measure_balance(models[0], texts)
        if command.needle:
            sections.append(_measure_needle(command, models, tokenizer, texts, on_progress))
    if names:
        tokenizers = [load_tokenizer(folder) for folder in folders]
        sections.append(_score_tasks(command, list(zip(models, tokenizers, strict=True)), names, manager))
    found = {key: value for tree, _ in sections for key, value in tree.items()}
    print(json.dumps(found) if command.json else "\n\n".join(text for _, text in sections))


def _read_texts(command: Eval, tokenizer: Any) -> dict[str, Packed]:
    """Returns the tokens of each text; raises ValueError for one with nothing to measure."""
    from smolseek.data.packing import pack
    from smolseek.data.splits import held_out_documents
    from smolseek.evaluation.needle import SPAN_TOKENS

    texts = {}
    for name in command.text:
        split = {"train" if name == "builtin:python" else "held_out": (name,)}
        settings = DataSettings(separator=command.separator, text_column=command.text_column, **split)  # type: ignore[arg-type]
        texts[name] = pack(tokenizer, held_out_documents(settings))
        if len(texts[name].ids_T) < 2:
            remedy = f"name another, or its field by --text-column (now {command.text_column})"
            raise ValueError(f"text {name}: has {len(texts[name].ids_T)} tokens, and at least 2 are needed; {remedy}")
    tokens = sum(len(text.ids_T) for text in texts.values())
    if command.needle and texts and tokens <= SPAN_TOKENS:
        raise ValueError(f"text {' '.join(texts)}: {tokens} tokens, and spans of {SPAN_TOKENS} are drawn; name more")
    return texts


def _dense_folders(command: Eval) -> list[str]:
    """Returns the folder of the model to compare with, or no folder."""
    from smolseek.checkpoint.source import read_conversion, resolve_folder

    if command.compare or not command.tasks:
        return [command.compare] if command.compare else []
    conversion = read_conversion(resolve_folder(command.folder)) or {}
    source, commit = conversion.get("source"), conversion.get("source_commit")
    try:
        return [] if source is None else [str(resolve_folder(f"{source}@{commit}" if commit else source))]
    except ValueError:
        log.warning("%s, the source of %s, is not there; name it by --compare to see both", source, command.folder)
        return []


# -- text -------------------------------------------------------------------------------------------------------------


def _measure_texts(command: Eval, models: list[Model], texts: dict[str, Packed], on_progress: OnProgress) -> Section:
    """Measures the quality on each text and on all texts; with a dense model, also where the two differ."""
    from smolseek.evaluation import Quality, combine_qualities, compare, measure_quality

    windows: Any = {"window_tokens": command.window_tokens, "stride": command.stride}
    comparison: Comparison | None = None
    if len(models) > 1:
        streams = {name: text.ids_T for name, text in texts.items()}
        counts = {name: text.counts_T for name, text in texts.items()}
        bar = partial(on_progress, "windows")
        comparison = compare(models[0], models[1], streams, counts=counts, on_window=bar, **windows)
    by_text: dict[str, Quality] = {}
    for name, (ids_T, counts_T, text_bytes) in texts.items():
        if comparison is None:
            bar = partial(on_progress, name)
            by_text[name] = measure_quality(models[0], ids_T, text_bytes, counts_T=counts_T, on_window=bar, **windows)
        else:
            part = comparison.by_text[name]
            by_text[name] = Quality.from_loss(part.loss, part.tokens, int(counts_T.sum()), text_bytes)
    overall = combine_qualities([(by_text[name], text.text_bytes) for name, text in texts.items()])
    tree: dict[str, Any] = overall.to_dict() | {"texts": {name: q.to_dict() for name, q in by_text.items()}}
    rows = [*by_text.items(), ("together", overall)] if len(texts) > 1 else by_text.items()
    shown = _quality_table(rows)
    if comparison is None:
        return tree, shown
    return tree | {"comparison": comparison.to_dict()}, f"{shown}\n\n{_difference_table(comparison)}"


def _measure_balance(model: Model, texts: dict[str, Packed]) -> list[Section]:
    """Returns MaxVio over all texts together as one section; none of a model without routed experts."""
    import torch

    from smolseek.checkpoint.hub import as_ours
    from smolseek.evaluation import measure_balance
    from smolseek.model import DeepseekV3
    from smolseek.model.balance import routers

    ours = as_ours(model)
    if not isinstance(ours, DeepseekV3) or not routers(ours):
        return []
    ids_T = torch.cat([text.ids_T for text in texts.values()])
    by_layer = {layer: round(maxvio, 4) for layer, maxvio in measure_balance(ours, ids_T).items()}
    layer, worst = max(by_layer.items(), key=lambda item: item[1])
    shown = f"MaxVio of the worst layer ({layer}) over {len(ids_T):,} tokens: {worst:.3f}; 0 is balanced"
    return [({"maxvio": worst, "maxvio_per_layer": {str(layer): value for layer, value in by_layer.items()}}, shown)]


def _quality_table(rows: Iterable[tuple[str, Quality]]) -> str:
    head = ["text", "tokens", "loss", "perplexity", "bits per byte"]
    cells = (
        [name, f"{q.tokens:,}", f"{q.loss:.4f}", f"{q.perplexity:.4f}", f"{q.bits_per_byte:.4f}"] for name, q in rows
    )
    return align_table([head, *cells])


def _difference_table(comparison: Comparison) -> str:
    """Returns a table with a part for each way to divide the tokens."""

    def cells(name: str, d: Difference) -> list[str]:
        losses = [d.teacher_loss, d.loss, d.loss - d.teacher_loss, d.kl]
        return [name, f"{d.tokens:,}", *(f"{value:.4f}" for value in losses), f"{d.agreement:.1%}"]

    rows = [["against the dense model", "tokens", "dense loss", "loss", "difference", "KL", "same top token"]]
    rows.append(cells("all", comparison.overall))
    parts = (
        ("text", comparison.by_text if len(comparison.by_text) > 1 else {}),
        ("tokens before it", comparison.by_context),
        ("rank by frequency", comparison.by_frequency),
    )
    for title, part in parts:
        rows += [[f"{title}: {name}", *cells(name, difference)[1:]] for name, difference in part.items()]
    return align_table(rows)


# -- needle -----------------------------------------------------------------------------------------------------------


def _measure_needle(
    command: Eval,
    models: list[Model],
    tokenizer: Any,
    texts: dict[str, Packed],
    on_progress: OnProgress,
) -> Section:
    """Measures the gain by distance, for all models on the same sequences."""
    import torch

    from smolseek.data.encoding import added_start
    from smolseek.evaluation.needle import measure_retrieval, random_tokens, text_pieces

    if texts:
        source = text_pieces(torch.cat([text.ids_T for text in texts.values()]))
    else:
        source = random_tokens(min(m.config.vocab_size for m in models), tokenizer.all_special_ids)
    limit = command.needle_tokens or min(m.config.max_position_embeddings for m in models)
    options: Any = {"limit_tokens": limit, "trials": command.needle_trials, "seed": command.seed}
    options["start_ids"] = added_start(tokenizer)
    names = ("needle", "needle_dense")[: len(models)]
    found = {
        name: measure_retrieval(model, source, **options, on_trial=partial(on_progress, name.replace("_", ", ")))
        for name, model in zip(names, models, strict=True)
    }
    tree = {name: [retrieval.to_dict() for retrieval in by_distance] for name, by_distance in found.items()}
    return tree, _needle_table(*found.values())


def _needle_table(ours: list[Retrieval], dense: list[Retrieval] | None = None) -> str:
    from smolseek.evaluation.paired import paired_difference

    rows = [["copied from, tokens before", "gain, nats per token", "accuracy", "accuracy without"]]
    rows += [[f"{r.distance_tokens:,}", str(r.gain), f"{r.accuracy:.1%}", f"{r.control_accuracy:.1%}"] for r in ours]
    if dense is not None:
        rows[0] += ["dense gain", "difference"]
        for row, our, their in zip(rows[1:], ours, dense, strict=True):
            row += [str(their.gain), str(paired_difference(our.gains, their.gains))]
    return align_table(rows)


# -- tasks ------------------------------------------------------------------------------------------------------------


def _score_tasks(command: Eval, models: list[tuple[Model, Any]], names: list[str], manager: Any) -> Section:
    """Scores each metric of each task; with a dense model, also that model and the difference."""
    from smolseek.evaluation.tasks import score_tasks

    options: Any = {"limit": command.limit, "batch_size": command.batch_size}
    scored = [score_tasks(model, tokenizer, names, manager, **options) for model, tokenizer in models]
    tree: list[dict[str, Any]] = []
    rows = [["task", "metric", "score", *(["dense", "difference"] if len(scored) > 1 else [])]]
    for ours, *others in zip(*scored, strict=True):
        estimates = {"score": ours.value}
        for theirs in others:
            estimates |= {"dense": theirs.value, "difference": ours.minus(theirs)}
        tree.append({"task": ours.task, "metric": ours.metric} | {k: e._asdict() for k, e in estimates.items()})
        rows.append([ours.task, ours.metric, *(str(e) for e in estimates.values())])
    return {"tasks": tree}, align_table(rows)
