"""The trainer: streamed windows, stages, balanced experts, held-out evaluation, exact resume.

Shapes: B windows in a micro-batch, T tokens in each, E n_routed_experts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from smolseek.checkpoint.atomic import remove_leftovers
from smolseek.checkpoint.hub import named_disk_tensors, save
from smolseek.checkpoint.state import load_plain, newest_state
from smolseek.config import Recipe
from smolseek.data.encoding import check_vocabulary, read_marks
from smolseek.data.packing import Packed
from smolseek.data.sources import local_sizes
from smolseek.data.sources.hub import SourceLost
from smolseek.data.stream import WindowStream
from smolseek.evaluation import Quality, measure_quality
from smolseek.generation import continue_text
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import take_expert_counts, update_biases
from smolseek.numerics.memory import keep_freed_memory
from smolseek.numerics.precision import autocast
from smolseek.numerics.shards import release_gathered
from smolseek.training.balancing import balance_speed, set_balance
from smolseek.training.guard import StepGuard
from smolseek.training.logs import RunLog
from smolseek.training.objective import count_labels, window_loss
from smolseek.training.optimizer import build_optimizers, choose_trained, decay, learning_rate
from smolseek.training.processes import OneProcess, Processes
from smolseek.training.reports import report_step
from smolseek.training.saved_tensors import collect_tensors, live_tensors, restore_tensors, stream_tensors
from smolseek.training.settings import (
    changed_files,
    changed_settings,
    changed_steering,
    check_inputs,
    check_settings,
    with_steering,
)
from smolseek.training.stages import StageProgress, learning_rate_name, stages_of, step_tokens
from smolseek.training.trackers import open_trackers
from smolseek.training.watcher import Interrupted, Progress, Watcher


class Trainer:
    """One run of one model in one folder.

    Args:
        model: ours or any transformers causal LM; trained in fp32 with autocast where the hardware has bf16. Several
            processes divide it: it comes from `load` or `draw_weights` with their `shard`, and so does the teacher.
        recipe: the settings; `recipe.train`, `.data`, `.sample` and `.seed` are read.
        folder: where logs.txt, metrics.jsonl, checkpoints/ and best/ are written.
        teacher: dense model to distil from, for a `train.distill_weight` above 0.
        held_out: held-out text that was read already; None: that of `recipe.data` is read.
        origin: folder that the model was loaded from; saved models get its licence and generation_config.json.
        tokenizer_from: folder whose tokenizer files are copied to saved models; None: `tokenizer` is saved.
        processes: the processes that share the work, from `processes.join_processes`.

    Raises:
        ValueError: settings that do not fit each other or the model, or sources without text.
    """

    def __init__(
        self,
        model: DeepseekV3 | StockModel,
        tokenizer: Any,
        recipe: Recipe,
        folder: Path,
        *,
        teacher: StockModel | None = None,
        held_out: Packed | None = None,
        origin: Path | None = None,
        tokenizer_from: Path | None = None,
        processes: Processes = OneProcess(),  # noqa: B008  (has no state)
    ) -> None:
        self.stages, self.teacher = StageProgress(stages_of(recipe.train)), teacher
        check_settings(model, recipe, teacher)
        for stage in self.stages.settings_of_each:
            processes.check_settings(stage)
        self.processes, self.model = processes, model
        self.tokenizer, self.recipe, self.folder = tokenizer, recipe, folder
        self.origin, self.tokenizer_from = origin, tokenizer_from
        self.settings = self.stages.settings
        self.device = next(model.parameters()).device
        self.autocast = autocast(self.device, self.settings.precision)
        if self.settings.activation_checkpointing:
            checkpoint_activations(model)
        if self.settings.compile and isinstance(model, DeepseekV3):
            model.model.compile_for_training()
        if self.device.type == "cpu" and processes.size == 1:  # several gather layers and give their memory back
            keep_freed_memory()
        self._begin_stage()
        self.stream = WindowStream(
            tokenizer, recipe.data, window_tokens=self.settings.window_tokens + 1, seed=recipe.seed
        )
        self.held_out = held_out or check_inputs(recipe, tokenizer, model.config)
        self.files = local_sizes((*recipe.data.train, *recipe.data.held_out))
        self.log = RunLog(folder, muted=not processes.leads, track=lambda step: open_trackers(recipe, folder, step))
        self.guard = StepGuard(recipe.train)
        self.step = 0
        self.step_seconds = 0.0
        self.best_loss = float("inf")
        self.best_training_loss = float("inf")
        self.quality: Quality | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self, watcher: Watcher) -> Quality:
        """Train to the last step and return the held-out quality there.

        Raises:
            Interrupted: the watcher said stop; the state was saved first.
            ValueError: too many steps in a row had to be skipped (`train.max_skipped_steps`).
            OSError: a checkpoint, log line or model cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        take_expert_counts(self.model)  # drops earlier counts: only this run's tokens may move the biases
        while not self.stages.done:
            before = self.step_seconds
            loss, counts = self._train_step()
            tokens_per_second = self.step_tokens / (self.step_seconds - before)
            report_step(self, loss, counts, tokens_per_second)
            self.step += 1
            held_out = self.quality.loss if self.quality else None
            if self.stages.ends(self.step):
                self._end_stage()
            watcher.on_step(Progress(self.step, self.stages.steps, loss, held_out, tokens_per_second))
            stop = self.processes.any_of(watcher.should_stop())
            good = not self.guard.in_a_row  # no checkpoint right after a skipped step
            due = good and self.step % self.settings.checkpoint_every == 0
            if stop or due or self.stages.done:
                self.save()
            if stop:
                raise Interrupted(self.step, self.folder)
        if self.quality is None:
            self.quality = self.evaluate()
        return self.quality

    def _begin_stage(self) -> None:
        """Take the running stage's settings, choose its weights, set its balancing and make new optimizers."""
        self.settings = self.stages.settings
        choose_trained(self.model, self.settings.trains)
        set_balance(self.model, self.settings, self.processes.sum)
        self.optimizers = build_optimizers(self.model, self.settings)
        for optimizer in self.optimizers:
            self.processes.prepare_optimizer(optimizer)

    def _end_stage(self) -> None:
        """Say why the running stage ends, and begin the next one if there is one."""
        number, count = self.stages.index + 1, len(self.stages.settings_of_each)
        early = self.step - self.stages.start < self.settings.steps
        if count > 1 or early:
            reason = f"no lower held-out loss in {self.stages.waited} evaluations" if early else "all its steps"
            self.log.line(f"Stage {number}/{count} ends after step {self.step - 1}: {reason}")
        self.stages.advance(self.step)
        if not self.stages.done:
            self._begin_stage()

    def _train_step(self) -> tuple[float, list[tuple[int, Tensor]]]:
        """Takes one optimizer step, or skips it.

        Returns the mean cross-entropy and (layer index, tokens per expert (E,)), both over the global batch.
        """
        rate = learning_rate(self.stage_step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        began, entropies = time.perf_counter(), []
        for windows_BT, share in self._micro_batches():
            loss, entropy = self._loss(windows_BT)
            (loss * share).backward()
            entropies.append((entropy, share))  # read when all is queued: a GPU is waited for once in a step
        norm = self.processes.clip_gradients(self.model, self.settings.clip_norm)
        total = self.processes.mean(sum(entropy.item() * share for entropy, share in entropies))
        skipped = self._skips(total, norm)
        for optimizer in self.optimizers:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counts = self.processes.sum_counts(take_expert_counts(self.model))
        left = decay(self.stage_step, self.settings)
        speed = 0.0 if skipped else balance_speed(self.stage_step, self.settings, left)
        update_biases(self.model, counts, speed, self.settings.balance_rule)
        self.step_seconds += time.perf_counter() - began
        return total, counts

    def _skips(self, loss: float, gradient_norm: float) -> bool:
        """Returns whether this step must leave weights, optimizer and biases unchanged.

        Raises ValueError when more than `max_skipped_steps` steps in a row must.
        """
        reason = self.guard.objection(loss, gradient_norm)
        if reason is None:
            return False
        self.log.line(f"Step {self.step}/{self.stages.steps} | skipped: {reason}")
        if self.guard.in_a_row > self.settings.max_skipped_steps:
            checkpoint = newest_state(self.folder / "checkpoints")
            raise ValueError(
                f"step {self.step}: {reason}, and {self.guard.in_a_row} steps in a row could not be taken "
                f"(train.max_skipped_steps {self.settings.max_skipped_steps}); "
                + (f"the last good checkpoint is {checkpoint}: go on from it with --resume and " if checkpoint else "")
                + f"a lower {learning_rate_name(self.recipe.train, self.stages.index)} ({self.settings.learning_rate})"
            )
        return True

    def _micro_batches(self) -> list[tuple[Tensor, float]]:
        """Returns the step's windows by micro-batch, and each micro-batch's share of the step's labels.

        With these shares as weights, every token counts the same. All windows are drawn before the step begins. When a
        source is lost, the state is therefore that of the step before, and it is saved. One process of several cannot
        save it, because the others are in their step already: all of them end, and the last checkpoint stays.
        """
        size, count = self.settings.batch_windows, self.settings.gradient_accumulation
        try:
            batches = self.stream.next(size * count).split(size)
        except SourceLost:
            if self.processes.size == 1:
                self.save()
            raise
        for windows_BT in batches:
            check_vocabulary(read_marks(windows_BT)[0], self.model.config.vocab_size)
        own = [self.processes.own_windows(windows_BT) for windows_BT in batches]
        labels = max(1, sum(map(count_labels, batches)))
        return [(windows_BT, count_labels(windows_BT) * self.processes.size / labels) for windows_BT in own]

    def _loss(self, windows_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loss and cross-entropy of windows with marks, at the running step."""
        distilling = self.settings.distill_steps is None or self.stage_step < self.settings.distill_steps
        distill_weight = self.settings.distill_weight if distilling else 0.0
        with self.autocast:
            losses = window_loss(
                self.model, windows_BT, self.settings, teacher=self.teacher, distill_weight=distill_weight
            )
        if self.teacher is not None:
            release_gathered(self.teacher)
        return losses

    @property
    def step_tokens(self) -> int:
        """Number of tokens predicted in one optimizer step."""
        return step_tokens(self.settings)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens predicted in the run so far."""
        return self.step * self.step_tokens

    @property
    def stage_step(self) -> int:
        """Number of steps done in the running stage."""
        return self.step - self.stages.start

    # -- quality, samples, folders ------------------------------------------------------------------------------------

    def measure(self, model: DeepseekV3 | StockModel) -> Quality:
        """Returns the quality of any model on the held-out text, which the processes divide among them."""
        held_out, shares = self.held_out, self.processes.shares
        return measure_quality(model, held_out.ids_T, held_out.text_bytes, counts_T=held_out.counts_T, shares=shares)

    def evaluate(self) -> Quality:
        """Returns the quality of the trained model on the held-out text."""
        quality = self.measure(self.model)
        take_expert_counts(self.model)  # held-out text must not move the balance
        return quality

    def sample(self, prompts: Iterable[str]) -> list[str]:
        """Returns each prompt with its continuation; does not touch the global random state."""
        texts = [text for text, _ in self.continuations(self.model, prompts)]
        take_expert_counts(self.model)
        return texts

    def continuations(self, model: DeepseekV3 | StockModel, prompts: Iterable[str]) -> list[tuple[str, list[int]]]:
        """Returns `continue_text` of each prompt by any model; all processes draw it together."""
        with self.processes.in_lockstep(model):
            return [continue_text(model, self.tokenizer, prompt, self.recipe.sample) for prompt in prompts]

    def save_model(self, name: str, card: str | None = None) -> Path:
        """Write the model as a stock folder `name` in the run's folder and return it, in every process."""
        out, tokenizer = self.folder / name, self.tokenizer_from or self.tokenizer
        if self.processes.leads:
            save(self.model, out, tokenizer_from=tokenizer, origin=self.origin, card=card, force=True)
        else:
            for _ in named_disk_tensors(self.model):  # which are gathered from all processes
                pass
        return self.processes.from_leader(out)  # it is complete

    def release(self) -> None:
        """Let model, teacher and optimizers go at the end of a run, so that their memory serves other models.

        What was measured and counted stays.
        """
        del self.model, self.teacher, self.optimizers
        gc.collect()  # cycles would keep them

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write everything that `resume` needs to go on bit for bit."""
        data_plain, data_tensors = self.stream.state()
        plain = {
            "step": self.step,
            "course": self.stages.state(),  # the name in every checkpoint written so far
            "best_loss": self.best_loss,
            "best_training_loss": self.best_training_loss,
            "quality": self.quality.to_dict() if self.quality else None,
            "data": data_plain,
            "files": self.files,
            "guard": self.guard.state(),
            "logs": self.log.sizes(),
            "recipe": asdict(self.recipe),
        }
        tensors = collect_tensors(self.model, self.optimizers, data_tensors, self.device)
        checkpoints = self.folder / "checkpoints"
        return self.processes.save_state(checkpoints, self.step, plain, tensors, keep_last=self.settings.keep_last)

    def resume(self) -> bool:
        """Continue from the newest undamaged checkpoint; returns False when there is none.

        Where no step is left, the recipe gets back the settings of the last one that was taken.

        Raises:
            ValueError: every checkpoint is damaged, or the newest is of a run with other settings or other local text.
        """
        if self.processes.leads:
            remove_leftovers(self.folder)
        newest = self.processes.newest_state(self.folder / "checkpoints")
        if newest is None:
            self.log.rewind(dict.fromkeys(self.log.paths, 0))
            return False
        plain = load_plain(newest)
        changed = changed_settings(plain["recipe"], asdict(self.recipe))
        if changed:
            raise ValueError(
                f"{newest}: written with other settings ({changed}); use those, or start over with --force"
            )
        if changed := changed_files(plain.get("files", self.files), self.files):  # older states have none
            raise ValueError(
                f"{newest}: written with other text ({changed}); put it back as it was, or start over with --force"
            )
        self.step = plain["step"]
        self.stages.restore(plain["course"])
        if self.recipe.train.steps > plain["recipe"]["train"]["steps"]:
            self.stages.reopen()
        self._begin_stage()
        _, tensors = self.processes.load_state(newest, live_tensors(self.model, self.optimizers))
        self.stream.restore(plain["data"], stream_tensors(tensors))
        restore_tensors(tensors, self.model, self.optimizers, self.device)
        self.best_loss = plain["best_loss"]
        self.best_training_loss = plain["best_training_loss"]
        self.quality = Quality(**plain["quality"]) if plain["quality"] else None
        self.guard.restore(plain["guard"])
        self.log.rewind(plain["logs"])
        for line in changed_steering(plain["recipe"], asdict(self.recipe), self.stages.index):
            end = ": no step is left, so it stays as it was" if self.stages.done else ""
            self.log.line(f"Resumed at step {self.step} with {line}{end}")
        if self.stages.done:
            self.recipe = with_steering(self.recipe, plain["recipe"])
        return True


def checkpoint_activations(model: DeepseekV3 | StockModel) -> None:
    """Keep one activation per block in training and compute the rest again (Chen et al. 2016)."""
    if isinstance(model, StockModel):
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.model.activation_checkpointing = True
