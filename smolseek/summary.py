"""The summary of a run: measurements of each of its models, and the table that is printed at the end.

Shapes: T tokens.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from smolseek.checkpoint.hub import as_ours, load, load_for_evaluation
from smolseek.evaluation import measure_balance, measure_decode_speed
from smolseek.formats.deepseek_v3 import count_parameters
from smolseek.generation import repetition_rate
from smolseek.model import DeepseekV3
from smolseek.planning import cache_bytes_per_token
from smolseek.training.trainer import Trainer


def summarize(folders: dict[str, Path], trainer: Trainer) -> dict[str, Any]:
    """Returns the summary of a run: measurements of the model in each folder, by name, and totals.

    Quality is measured on the trainer's held-out text through stock transformers. MaxVio is that of the last
    DeepSeek-V3 model that is not the untrained conversion. One model is in memory at a time. The trainer's processes
    divide it and measure it together; the speed of decoding is that of a single process, and several have none.
    """
    summary: dict[str, Any] = {}
    for name, folder in folders.items():
        gc.collect()  # a divided model is part of cycles
        summary[name], maxvio = _measure(folder, trainer, balance=name != "converted")
        if maxvio is not None:
            summary["maxvio_per_layer"] = {str(layer): round(value, 4) for layer, value in maxvio.items()}
            summary["maxvio"] = max(summary["maxvio_per_layer"].values(), default=None)
    summary["trained_tokens"] = trainer.trained_tokens
    summary["held_out_tokens"] = len(trainer.held_out.ids_T)
    if trainer.guard.skipped:
        summary |= {"steps": trainer.step, "skipped_steps": trainer.guard.skipped}
    return summary


def _measure(folder: Path, trainer: Trainer, *, balance: bool) -> tuple[dict[str, Any], dict[int, float] | None]:
    """Returns quality, sizes, decode speed and samples of the model in `folder`.

    If `balance` is set and the model is DeepSeek-V3, also returns MaxVio by layer, else None.
    """
    processes, device = trainer.processes, str(trainer.device)
    model = load_for_evaluation(folder, device=device, shard=processes.shard)
    quality = trainer.measure(model)
    if processes.size == 1:
        model = as_ours(model)
    elif model.config.model_type == "deepseek_v3":
        del model  # ours cannot take over the weights of a divided one
        gc.collect()  # which is part of cycles
        model = load(folder, device=device, shard=processes.shard)
    prompts = trainer.recipe.sample.prompts
    samples = dict(zip(prompts, trainer.continuations(model, prompts), strict=True))
    ids = next(iter(samples.values()))[1] if samples else []
    config = model.config.to_dict()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total, active = count_parameters(config) if isinstance(model, DeepseekV3) else (parameters, parameters)
    prompt_T = trainer.held_out.ids_T[: min(128, model.config.max_position_embeddings // 2)]
    row = {
        **quality.to_dict(),
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "total_parameters": total,
        "active_parameters": active,
        "samples": {prompt: text for prompt, (text, _) in samples.items()},
        "repetition_rate": round(repetition_rate(ids), 4),
    }
    if processes.size == 1:
        row["decode_tokens_per_second"] = round(measure_decode_speed(model, prompt_T), 1)
    if balance and isinstance(model, DeepseekV3):
        return row, measure_balance(model, trainer.held_out.ids_T, shares=processes.shares)
    return row, None


def render_summary(summary: dict[str, Any]) -> str:
    """Returns the summary as a text table, with a sample of each model under it."""
    rows = {name: row for name, row in summary.items() if isinstance(row, dict) and "loss" in row}
    wide = max([12, *(len(f"{row['total_parameters']:,}") + 2 for row in rows.values())])  # a billion needs 13 places
    lines = [
        f"{'':14}{'loss':>8}{'perplexity':>12}{'cache B/token':>15}{'parameters':>{wide}}{'active':>{wide}}"
        f"{'decode tok/s':>14}"
    ]
    for name, row in rows.items():
        speed = f"{row['decode_tokens_per_second']:,.0f}" if "decode_tokens_per_second" in row else "-"
        lines.append(
            f"{name.replace('_', ' '):14}{row['loss']:8.4f} {row['perplexity']:11.2f}{row['cache_bytes_per_token']:15,}"
            f"{row['total_parameters']:{wide},}{row['active_parameters']:{wide},}{speed:>14}"
        )
    if summary.get("maxvio") is not None:
        lines.append(
            f"MaxVio of the worst layer over {summary['held_out_tokens']:,} held-out tokens: {summary['maxvio']:.3f}"
        )
    if "skipped_steps" in summary:
        lines.append(f"Steps skipped: {summary['skipped_steps']:,} of {summary['steps']:,}; logs.txt says why")
    for name, row in rows.items():
        for sample in [*row["samples"].values()][:1]:
            lines += ["", f"-- {name.replace('_', ' ')} (4-grams repeated: {row['repetition_rate']:.0%})", sample]
    return "\n".join(lines)
