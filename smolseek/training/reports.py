"""What a run reports while it trains: loss lines, metrics, held-out quality, samples.

Shapes: E n_routed_experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from smolseek.evaluation import measure_specialisation
from smolseek.training.balancing import describe_load
from smolseek.training.optimizer import learning_rate

if TYPE_CHECKING:
    from smolseek.training.trainer import Trainer

SPECIALISATION_TOKENS = 16384
"""Held-out tokens that the specialisation of the experts is measured on."""


def report_step(trainer: Trainer, loss: float, counts: list[tuple[int, Tensor]], tokens_per_second: float) -> None:
    """Write the log lines, held-out evaluation and samples that are due at the trainer's step.

    `loss` is the step's loss, 0 where its batch had nothing to learn; `counts` has (layer index, tokens per expert
    (E,)) of its global batch.
    """
    settings, step, log, stages = trainer.settings, trainer.step, trainer.log, trainer.stages
    stage_ends = stages.ends(step + 1)
    trainer.best_training_loss = min(trainer.best_training_loss, loss or math.inf)
    if step % settings.log_every == 0 or stage_ends:
        log.line(f"Step {step}/{stages.steps} | Loss: {f'{loss:.4f}' if loss else 'none, no token was to be learnt'}")
        log.metrics(
            step,
            loss=loss if loss and math.isfinite(loss) else None,
            skipped_steps=trainer.guard.skipped,
            learning_rate=learning_rate(trainer.stage_step, settings),
            tokens=(step + 1) * trainer.step_tokens,
            tokens_per_second=round(tokens_per_second, 1),
            data_wait_share=round(_data_wait_share(trainer), 4),
            **({"malformed_lines": trainer.stream.malformed} if trainer.stream.malformed else {}),
            **describe_load(counts),
        )
    if (step + 1) % settings.evaluate_every == 0 or stage_ends:
        _report_quality(trainer)
    last = stages.ends(step + 1) and stages.is_last
    sample = trainer.recipe.sample
    if (sample.every and step % sample.every == 0) or last:
        for prompt, text in zip(sample.prompts, trainer.sample(sample.prompts), strict=True):
            log.sample(step, prompt, text)
    if last and trainer.stream.malformed:
        log.line(f"Malformed lines skipped: {trainer.stream.malformed:,}")
    if last:
        log.line(f"Best loss achieved: {trainer.best_loss:.4f} (held out); {trainer.best_training_loss:.4f} (a batch)")


def _report_quality(trainer: Trainer) -> None:
    """Measure the model on held-out text, write the result, and keep the model if it is the best so far."""
    trainer.quality = trainer.evaluate()
    loss = trainer.quality.loss
    trainer.stages.note_held_out_loss(loss)
    trainer.log.line(f"Step {trainer.step}/{trainer.stages.steps} | Held-out loss: {loss:.4f}")
    experts = _specialisation(trainer)
    trainer.log.metrics(trainer.step, held_out=trainer.quality.to_dict(), **({"experts": experts} if experts else {}))
    if loss < trainer.best_loss:
        trainer.best_loss = loss
        trainer.save_model("best")


def _specialisation(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Returns `measure_specialisation` of the model on the beginning of the held-out text."""
    ids_T = trainer.held_out.ids_T[:SPECIALISATION_TOKENS]
    return measure_specialisation(trainer.model, ids_T, shares=trainer.processes.shares)


def _data_wait_share(trainer: Trainer) -> float:
    """Returns which share of the steps' time since the last call was spent waiting for windows."""
    waited, spent = trainer.stream.waited_seconds, trainer.step_seconds
    trainer.stream.waited_seconds = trainer.step_seconds = 0.0
    return waited / spent if spent else 0.0
