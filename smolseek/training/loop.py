"""The training loop: streamed windows, stages, loss-less balancing, held-out evaluation, exact resume.

Shapes: N windows in a micro-batch, T tokens in a window, D hidden, E routed experts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.checkpoint.atomic import remove_leftovers
from smolseek.checkpoint.hub import save
from smolseek.checkpoint.state import load_plain, newest_state
from smolseek.config import Recipe
from smolseek.data.encoding import read_marks
from smolseek.data.packing import pack
from smolseek.data.sources.hub import SourceLost
from smolseek.data.splits import held_out_documents
from smolseek.data.stream import WindowStream
from smolseek.evaluation import Quality, measure_quality, measure_specialisation
from smolseek.generation import continue_text
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import (
    balance_speed,
    describe_load,
    quantile_sums,
    set_balance,
    take_expert_counts,
    update_biases,
)
from smolseek.numerics.loss import IGNORED, next_token_loss
from smolseek.numerics.memory import keep_freed_memory
from smolseek.numerics.precision import autocast
from smolseek.training.guard import StepGuard
from smolseek.training.logs import RunLog
from smolseek.training.optimizer import build_optimizers, choose_trained, decay, learning_rate
from smolseek.training.parallel import Alone
from smolseek.training.settings import changed_settings, check_settings, steered
from smolseek.training.stages import Course, stages_of, step_tokens
from smolseek.training.trackers import open_trackers

log = logging.getLogger(__name__)

SPECIALISATION_TOKENS = 16384
"""Held-out tokens whose routing an evaluation looks at."""


class Progress(NamedTuple):
    """What a step tells whoever watches the run."""

    step: int
    steps: int
    loss: float
    held_out_loss: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Watcher:
    """How a run speaks to whoever started it, and hears that it should stop."""

    on_stage: Callable[[str], None] = lambda stage: None
    on_step: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after {step} steps; {folder} holds the state: go on with --resume")


class Trainer:
    """One run of one model in one folder.

    Args:
        model: ours or any transformers causal LM; trained in fp32 with autocast where the hardware has bf16.
        recipe: what to do; `recipe.train`, `.data`, `.sample` and `.seed` are read.
        folder: logs.txt, metrics.jsonl, checkpoints/ and best/ go here.
        teacher: dense model to distil from when `train.distill_weight` is above 0.
        processes: those that run this together, from `parallel.join`.

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
        processes: Alone = Alone(),  # noqa: B008  (has no state)
    ) -> None:
        check_settings(model, recipe, teacher)
        self.course, self.teacher = Course(stages_of(recipe.train)), teacher
        for stage in self.course.stages:
            processes.check(stage)
        self.processes, self.model = processes, processes.shard(model)
        self.tokenizer, self.recipe, self.folder = tokenizer, recipe, folder
        self.settings = self.course.settings
        self.device = next(model.parameters()).device
        self.autocast = autocast(self.device, self.settings.precision)
        if self.settings.activation_checkpointing:
            checkpoint_activations(model)
        if self.settings.compile and isinstance(model, DeepseekV3):
            model.model.compile_for_training()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._begin_stage()
        self.stream = WindowStream(
            tokenizer, recipe.data, window_tokens=self.settings.window_tokens + 1, seed=recipe.seed
        )
        self.held_out = pack(tokenizer, held_out_documents(recipe.data), recipe.data.held_out_tokens)
        if len(self.held_out.ids_T) < 2:
            raise ValueError("held-out text: none found; name some with data.held_out, or raise data.held_out_share")
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
        take_expert_counts(self.model)  # what ran before this run must not move its balance
        while not self.course.done:
            before = self.step_seconds
            loss, counts = self._train_step()
            tokens_per_second = self.step_tokens / (self.step_seconds - before)
            self._report(loss, counts, tokens_per_second)
            self.step += 1
            held_out = self.quality.loss if self.quality else None
            if self.course.ends(self.step):
                self._end_stage()
            watcher.on_step(Progress(self.step, self.course.steps, loss, held_out, tokens_per_second))
            stop = self.processes.agree(watcher.should_stop()) and not self.course.done
            due = self.step % self.settings.checkpoint_every == 0 and not self.guard.in_a_row  # what is kept is good
            if stop or due or self.course.done:
                self.save()
            if stop:
                raise Interrupted(self.step, self.folder)
        if self.quality is None:
            self.quality = self.evaluate()
        return self.quality

    def _begin_stage(self) -> None:
        """Settings, trained weights, balancing and fresh optimizers of the stage at hand."""
        self.settings = self.course.settings
        choose_trained(self.model, self.settings.trains)
        set_balance(self.model, self.settings)
        self.optimizers = build_optimizers(self.model, self.settings)
        for optimizer in self.optimizers:
            self.processes.prepare(optimizer)

    def _end_stage(self) -> None:
        number, count = self.course.index + 1, len(self.course.stages)
        early = self.step - self.course.start < self.settings.steps
        if count > 1 or early:
            reason = f"no lower held-out loss in {self.course.waited} evaluations" if early else "all its steps"
            self.log.line(f"Stage {number}/{count} ends after step {self.step - 1}: {reason}")
        self.course.advance(self.step)
        if not self.course.done:
            self._begin_stage()

    def _train_step(self) -> tuple[float, list[tuple[int, Tensor]]]:
        """One optimizer step; the mean cross-entropy and (layer, tokens per expert), both over the global batch."""
        rate = learning_rate(self.stage_step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        began, total = time.perf_counter(), 0.0
        for windows_NT, share in self._micro_batches():
            loss, entropy = self._loss(windows_NT.to(self.device))
            (loss * share).backward()
            total += entropy.item() * share
        norm = self.processes.clip(self.model, self.settings.clip_norm)
        total = self.processes.mean(total)
        skipped = self._skips(total, norm)
        for optimizer in self.optimizers:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counts = self.processes.add(take_expert_counts(self.model))
        for sums in quantile_sums(self.model):
            sums.copy_(self.processes.add([(0, sums)])[0][1])
        left = decay(self.stage_step, self.settings)
        speed = 0.0 if skipped else balance_speed(self.stage_step, self.settings, left)
        update_biases(self.model, counts, speed, self.settings.balance_rule)
        self.step_seconds += time.perf_counter() - began
        return total, counts

    def _skips(self, loss: float, gradient_norm: float) -> bool:
        """Whether this step must leave weights, optimizer and biases alone; ValueError when that is so too often."""
        reason = self.guard.objection(loss, gradient_norm)
        if reason is None:
            return False
        self.log.line(f"Step {self.step}/{self.course.steps} | skipped: {reason}")
        if self.guard.in_a_row > self.settings.max_skipped_steps:
            checkpoint = newest_state(self.folder / "checkpoints")
            raise ValueError(
                f"step {self.step}: {reason}, and {self.guard.in_a_row} steps in a row could not be taken "
                f"(train.max_skipped_steps {self.settings.max_skipped_steps}); "
                + (f"the last good checkpoint is {checkpoint}: go on from it with --resume and " if checkpoint else "")
                + f"a lower train.learning_rate ({self.settings.learning_rate})"
            )
        return True

    def _micro_batches(self) -> list[tuple[Tensor, float]]:
        """The step's windows by micro-batch, each with its share of the labels: a token weighs the same in all of them.

        Drawn at once, so that a source that is lost leaves the state of the step before, which is saved; not by one
        process of several, for the others are in their step by then: its end is theirs, and the last checkpoint stands.
        """
        size, count = self.settings.batch_windows, self.settings.gradient_accumulation
        try:
            batches = self.stream.next(size * count).split(size)
        except SourceLost:
            if self.processes.size == 1:
                self.save()
            raise
        rows = [self.processes.rows(windows_NT) for windows_NT in batches]
        labels = max(1, sum(map(_labels, batches)))
        return [(windows_NT, _labels(windows_NT) * self.processes.size / labels) for windows_NT in rows]

    def _data_wait_share(self) -> float:
        """Share of the steps' time since the last call that went by waiting for windows."""
        waited, spent = self.stream.waited_seconds, self.step_seconds
        self.stream.waited_seconds = self.step_seconds = 0.0
        return waited / spent if spent else 0.0

    def _loss(self, windows_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and cross-entropy of marked windows."""
        ids_NT, loss_NT, segments_NT = read_marks(windows_NT)
        inputs_NT, labels_NT = ids_NT[:, :-1], ids_NT[:, 1:].where(loss_NT[:, 1:], IGNORED)
        segment_ids = segments_NT[:, :-1] if self.settings.mask_documents else None
        distilling = self.settings.distill_steps is None or self.stage_step < self.settings.distill_steps
        distill_weight = self.settings.distill_weight if distilling else 0.0
        with self.autocast:
            teacher_hidden = teacher_head = None
            if self.teacher is not None and distill_weight:
                with torch.no_grad():
                    teacher_hidden = self.teacher.hidden_states(inputs_NT, segment_ids=segment_ids).flatten(0, 1)
                teacher_head = self.teacher.lm_head.weight
            hidden_NTD = self.model.hidden_states(inputs_NT, segment_ids=segment_ids)
            return next_token_loss(
                hidden_NTD.flatten(0, 1),
                self.model.lm_head.weight,
                labels_NT.flatten(),
                teacher_hidden_ND=teacher_hidden,
                teacher_head_VD=teacher_head,
                distill_weight=distill_weight,
                temperature=self.settings.distill_temperature,
            )

    @property
    def step_tokens(self) -> int:
        """Tokens predicted in one optimizer step."""
        return step_tokens(self.settings)

    @property
    def stage_step(self) -> int:
        """Steps done in the running stage."""
        return self.step - self.course.start

    # -- what a run tells ---------------------------------------------------------------------------------------------

    def measure(self, model: DeepseekV3 | StockModel) -> Quality:
        """Quality of any model on the held-out text."""
        held_out = self.held_out
        return measure_quality(model, held_out.ids_T, held_out.text_bytes, counts_T=held_out.counts_T)

    def evaluate(self) -> Quality:
        """Quality on the held-out text."""
        quality = None
        with self.processes.whole(self.model) as model:
            if model is not None:
                quality = self.measure(model)
        take_expert_counts(self.model)  # held-out text must not move the balance
        quality = self.processes.share(quality)
        assert quality is not None
        return quality

    def sample(self, prompts: Iterable[str]) -> list[str]:
        """A continuation of each prompt, the prompt included; leaves the global random state alone."""
        texts = []
        with self.processes.whole(self.model) as model:
            if model is not None:
                texts = [continue_text(model, self.tokenizer, p, self.recipe.sample)[0] for p in prompts]
        take_expert_counts(self.model)
        return self.processes.share(texts)

    def save_model(self, name: str, card: str | None = None, *, origin: Path | None = None) -> Path:
        """Write the model as the stock folder `name` inside the run's; `origin` as for `save`."""
        out = self.folder / name
        with self.processes.whole(self.model) as model:
            if model is not None:
                save(model, out, tokenizer_from=self.tokenizer, origin=origin, card=card, force=True)
        return out

    def _report(self, loss: float, counts: list[tuple[int, Tensor]], tokens_per_second: float) -> None:
        """Log lines, held-out evaluation and samples that are due at this step."""
        settings, step = self.settings, self.step
        stage_ends = self.course.ends(step + 1)
        self.best_training_loss = min(self.best_training_loss, loss)
        if step % settings.log_every == 0 or stage_ends:
            self.log.line(f"Step {step}/{self.course.steps} | Loss: {loss:.4f}")
            self.log.metrics(
                step,
                loss=loss if math.isfinite(loss) else None,
                skipped_steps=self.guard.skipped,
                learning_rate=learning_rate(self.stage_step, settings),
                tokens=(step + 1) * self.step_tokens,
                tokens_per_second=round(tokens_per_second, 1),
                data_wait_share=round(self._data_wait_share(), 4),
                **({"malformed_lines": self.stream.malformed} if self.stream.malformed else {}),
                **describe_load(counts),
            )
        if (step + 1) % settings.evaluate_every == 0 or stage_ends:
            self._report_quality()
        last = self.course.ends(step + 1) and self.course.index == len(self.course.stages) - 1
        if (self.recipe.sample.every and step % self.recipe.sample.every == 0) or last:
            prompts = self.recipe.sample.prompts
            for prompt, text in zip(prompts, self.sample(prompts), strict=True):
                self.log.sample(step, prompt, text)
        if last and self.stream.malformed:
            self.log.line(f"Malformed lines skipped: {self.stream.malformed:,}")
        if last:
            self.log.line(
                f"Best loss achieved: {self.best_loss:.4f} (held out); {self.best_training_loss:.4f} (a batch)"
            )

    def _report_quality(self) -> None:
        self.quality = self.evaluate()
        loss = self.quality.loss
        self.course.note(loss)
        self.log.line(f"Step {self.step}/{self.course.steps} | Held-out loss: {loss:.4f}")
        experts = self._specialisation()
        self.log.metrics(self.step, held_out=self.quality.to_dict(), **({"experts": experts} if experts else {}))
        if loss < self.best_loss:
            self.best_loss = loss
            self.save_model("best")

    def _specialisation(self) -> dict[str, dict[str, float]]:
        """How different the experts are; told by the leading process alone."""
        with self.processes.whole(self.model) as model:
            return {} if model is None else measure_specialisation(model, self.held_out.ids_T[:SPECIALISATION_TOKENS])

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write everything that `resume` needs to go on bit for bit."""
        data_plain, data_tensors = self.stream.state()
        tensors = {f"model.{name}": tensor for name, tensor in _untied_state(self.model).items()}
        tensors |= {f"data.{name}": tensor for name, tensor in data_tensors.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
        plain = {
            "step": self.step,
            "course": self.course.state(),
            "best_loss": self.best_loss,
            "best_training_loss": self.best_training_loss,
            "quality": self.quality.to_dict() if self.quality else None,
            "data": data_plain,
            "guard": self.guard.state(),
            "logs": self.log.sizes(),
            "recipe": asdict(self.recipe),
        }
        checkpoints = self.folder / "checkpoints"
        return self.processes.save(checkpoints, self.step, plain, tensors, keep_last=self.settings.keep_last)

    def resume(self) -> bool:
        """Continue from the newest undamaged checkpoint; False when there is none.

        Raises:
            ValueError: every checkpoint is damaged, or the newest is of a run with other settings.
        """
        if self.processes.leads:
            remove_leftovers(self.folder)
        newest = self.processes.newest(self.folder / "checkpoints")
        if newest is None:
            self.log.rewind(dict.fromkeys(self.log.paths, 0))
            return False
        plain = load_plain(newest)
        changed = changed_settings(plain["recipe"], asdict(self.recipe))
        if changed:
            raise ValueError(
                f"{newest}: written with other settings ({changed}); use those, or start over with --force"
            )
        self.step = plain["step"]
        self.course.restore(plain["course"])
        self._begin_stage()
        _, tensors = self.processes.load(newest, self._owners())
        self._restore_model(_part(tensors, "model."))
        self._restore_optimizers(_part(tensors, "optimizer."))
        self.stream.restore(plain["data"], _part(tensors, "data."))
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.best_loss = plain["best_loss"]
        self.best_training_loss = plain["best_training_loss"]
        self.quality = Quality(**plain["quality"]) if plain["quality"] else None
        self.guard.restore(plain["guard"])
        self.log.rewind(plain["logs"])
        for line in steered(plain["recipe"], asdict(self.recipe)):
            self.log.line(f"Resumed at step {self.step} with {line}")
        return True

    def _owners(self) -> dict[str, Tensor]:
        """The live tensors that those of a checkpoint lie beside: weights, and the optimizers' parameters by number."""
        owners = {f"model.{name}": tensor for name, tensor in _untied_state(self.model).items()}
        for number, optimizer in enumerate(self.optimizers):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            owners |= {f"optimizer.{number}.{index}": parameter for index, parameter in enumerate(parameters)}
        return owners

    def _restore_model(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, target in _untied_state(self.model).items():
                target.copy_(tensors[name])

    def _restore_optimizers(self, tensors: dict[str, Tensor]) -> None:
        for number, optimizer in enumerate(self.optimizers):
            tree = optimizer.state_dict()
            for name, tensor in _part(tensors, f"{number}.").items():
                index, _, key = name.partition(".")
                tree["state"].setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict(tree)


def _labels(windows_NT: Tensor) -> int:
    """How many tokens of marked windows loss is taken on."""
    return int(read_marks(windows_NT)[1][:, 1:].sum())


def checkpoint_activations(model: DeepseekV3 | StockModel) -> None:
    """Keep one activation per block in training and compute the rest again (Chen et al. 2016)."""
    if isinstance(model, StockModel):
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.model.activation_checkpointing = True


def _untied_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once (safetensors holds no aliases)."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
