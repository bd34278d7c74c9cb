"""The training loop: streamed windows, stages, loss-less balancing, held-out evaluation, exact resume.

Shapes: N windows in a micro-batch, T tokens in a window, D hidden, E routed experts.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.checkpoint.hub import save
from smolseek.checkpoint.state import latest_state, load_state, save_state
from smolseek.config import Recipe
from smolseek.data.windows import WindowStream, held_out_documents, pack, segments
from smolseek.evaluation import Quality, measure_quality
from smolseek.generation import continue_text
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import max_violation, take_expert_counts, update_biases
from smolseek.training.logs import RunLog
from smolseek.training.loss import next_token_loss
from smolseek.training.optimizer import build_optimizers, choose_trained, learning_rate
from smolseek.training.stages import Course, stages_of, step_tokens

log = logging.getLogger(__name__)


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
    ) -> None:
        check_settings(model, recipe, teacher)
        self.model, self.tokenizer, self.recipe, self.folder = model, tokenizer, recipe, folder
        self.course, self.teacher = Course(stages_of(recipe.train)), teacher
        self.settings = self.course.settings
        self.device = next(model.parameters()).device
        self.autocast = _autocast(self.device, self.settings.precision)
        if self.settings.activation_checkpointing:
            checkpoint_activations(model)
        self._begin_stage()
        self.stream = WindowStream(
            tokenizer, recipe.data, window_tokens=self.settings.window_tokens + 1, seed=recipe.seed
        )
        self.held_out_T, self.held_out_bytes = pack(
            tokenizer, held_out_documents(recipe.data), recipe.data.held_out_tokens
        )
        if len(self.held_out_T) < 2:
            raise ValueError("held-out text: none found; name some with data.held_out, or raise data.held_out_share")
        self.log = RunLog(folder)
        self.step = 0
        self.best_loss = float("inf")
        self.best_training_loss = float("inf")
        self.quality: Quality | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self, watcher: Watcher) -> Quality:
        """Train to the last step and return the held-out quality there.

        Raises:
            Interrupted: the watcher said stop; the state was saved first.
            ValueError: the loss is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        take_expert_counts(self.model)  # what ran before this run must not move its balance
        clock = time.perf_counter()
        while not self.course.done:
            loss, maxvio = self._train_step()
            now = time.perf_counter()
            tokens_per_second, clock = self.step_tokens / (now - clock), now
            self._report(loss, maxvio, tokens_per_second)
            self.step += 1
            held_out = self.quality.loss if self.quality else None
            if self.course.ends(self.step):
                self._end_stage()
            watcher.on_step(Progress(self.step, self.course.steps, loss, held_out, tokens_per_second))
            if self.step % self.settings.checkpoint_every == 0 or self.course.done:
                self.save()
            if watcher.should_stop() and not self.course.done:
                self.save()
                raise Interrupted(self.step, self.folder)
        if self.quality is None:
            self.quality = self.evaluate()
        return self.quality

    def _begin_stage(self) -> None:
        """Settings, trained weights and fresh optimizers of the stage at hand."""
        self.settings = self.course.settings
        choose_trained(self.model, self.settings.trains)
        self.optimizers = build_optimizers(self.model, self.settings)

    def _end_stage(self) -> None:
        number, count = self.course.index + 1, len(self.course.stages)
        early = self.step - self.course.start < self.settings.steps
        if count > 1 or early:
            reason = f"no lower held-out loss in {self.course.waited} evaluations" if early else "all its steps"
            self.log.line(f"Stage {number}/{count} ends after step {self.step - 1}: {reason}")
        self.course.advance(self.step)
        if not self.course.done:
            self._begin_stage()

    def _train_step(self) -> tuple[float, dict[int, float]]:
        """One optimizer step; the mean cross-entropy and MaxVio per expert layer, both over the global batch."""
        rate = learning_rate(self.stage_step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        total = 0.0
        for _ in range(self.settings.gradient_accumulation):
            loss, entropy = self._loss(self.stream.next(self.settings.batch_windows).to(self.device))
            (loss / self.settings.gradient_accumulation).backward()
            total += entropy.item() / self.settings.gradient_accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step}: the loss is {total} and the gradient not finite; lower train.learning_rate "
                f"({self.settings.learning_rate}) and go on from the last checkpoint with --resume"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counts = take_expert_counts(self.model)
        update_biases(self.model, counts, self.settings.balance_update_speed)
        return total, {layer: max_violation(counts_E) for layer, counts_E in counts}

    def _loss(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        inputs_NT, labels_NT = ids_NT[:, :-1], ids_NT[:, 1:]
        segment_ids = segments(inputs_NT, self.tokenizer) if self.settings.mask_documents else None
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

    def evaluate(self) -> Quality:
        """Quality on the held-out text."""
        quality = measure_quality(self.model, self.held_out_T, self.held_out_bytes)
        take_expert_counts(self.model)  # held-out text must not move the balance
        return quality

    def sample(self, prompt: str) -> str:
        """A continuation of `prompt`, the prompt included; leaves the global random state alone."""
        text, _ = continue_text(self.model, self.tokenizer, prompt, self.recipe.sample)
        take_expert_counts(self.model)
        return text

    def _report(self, loss: float, maxvio: dict[int, float], tokens_per_second: float) -> None:
        """Log lines, held-out evaluation and samples that are due at this step."""
        settings, step = self.settings, self.step
        stage_ends = self.course.ends(step + 1)
        self.best_training_loss = min(self.best_training_loss, loss)
        if step % settings.log_every == 0 or stage_ends:
            self.log.line(f"Step {step}/{self.course.steps} | Loss: {loss:.4f}")
            self.log.metrics(
                step=step,
                loss=loss,
                learning_rate=learning_rate(self.stage_step, settings),
                tokens=(step + 1) * self.step_tokens,
                tokens_per_second=round(tokens_per_second, 1),
                **({"maxvio": {str(layer): round(value, 4) for layer, value in maxvio.items()}} if maxvio else {}),
            )
        if (step + 1) % settings.evaluate_every == 0 or stage_ends:
            self._report_quality()
        last = self.course.ends(step + 1) and self.course.index == len(self.course.stages) - 1
        if (self.recipe.sample.every and step % self.recipe.sample.every == 0) or last:
            for prompt in self.recipe.sample.prompts:
                self.log.sample(step, prompt, self.sample(prompt))
        if last:
            self.log.line(
                f"Best loss achieved: {self.best_loss:.4f} (held out); {self.best_training_loss:.4f} (a batch)"
            )

    def _report_quality(self) -> None:
        self.quality = self.evaluate()
        loss = self.quality.loss
        self.course.note(loss)
        self.log.line(f"Step {self.step}/{self.course.steps} | Held-out loss: {loss:.4f}")
        self.log.metrics(step=self.step, held_out=self.quality.to_dict())
        if loss < self.best_loss:
            self.best_loss = loss
            save(self.model, self.folder / "best", tokenizer_from=self.tokenizer, force=True)

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
            "logs": self.log.sizes(),
            "recipe": asdict(self.recipe),
        }
        return save_state(self.folder / "checkpoints", self.step, plain, tensors)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False when there is none.

        Raises:
            ValueError: the checkpoint is damaged, or of a run with other settings.
        """
        newest = latest_state(self.folder / "checkpoints")
        if newest is None:
            return False
        plain, tensors = load_state(newest)
        changed = _changed_settings(plain["recipe"], asdict(self.recipe))
        if changed:
            raise ValueError(
                f"{newest}: written with other settings ({changed}); use those, or start over with --force"
            )
        self.step = plain["step"]
        self.course.restore(plain["course"])
        self._restore_model(_part(tensors, "model."))
        self._begin_stage()
        self._restore_optimizers(_part(tensors, "optimizer."))
        self.stream.restore(plain["data"], _part(tensors, "data."))
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.best_loss = plain["best_loss"]
        self.best_training_loss = plain["best_training_loss"]
        self.quality = Quality(**plain["quality"]) if plain["quality"] else None
        self.log.rewind(plain["logs"])
        return True

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


def check_settings(model: DeepseekV3 | StockModel, recipe: Recipe, teacher: StockModel | None) -> None:
    """Refuse settings that cannot work, before anything runs."""
    settings, limit = recipe.train, model.config.max_position_embeddings
    stages = stages_of(settings)
    for name in ("evaluate_every", "checkpoint_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"train.{name} {getattr(settings, name)}: must be at least 1")
    if settings.window_tokens > limit:
        raise ValueError(f"train.window_tokens {settings.window_tokens}: the model's limit is {limit} positions")
    for stage in stages:
        if stage.distill_weight and teacher is None:
            raise ValueError(
                f"train.distill_weight {stage.distill_weight}: no dense model to distil from; name a teacher"
            )
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher with {teacher.config.vocab_size} vocabulary entries for a model with {model.config.vocab_size}: "
            "they must share a tokenizer"
        )


def checkpoint_activations(model: DeepseekV3 | StockModel) -> None:
    """Keep one activation per block in training and compute the rest again (Chen et al. 2016)."""
    if isinstance(model, StockModel):
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.model.activation_checkpointing = True


def _changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names of settings that differ and matter to the numbers of a run."""
    pairs = [
        (f"{room}.{key}", old[room].get(key), value) for room in ("data", "train") for key, value in new[room].items()
    ]
    pairs.append(("seed", old["seed"], new["seed"]))
    free = {"train.checkpoint_every", "train.log_every"}
    return ", ".join(
        f"{name} {was!r} then, {now!r} now" for name, was, now in pairs if name not in free and was != _plain(now)
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _untied_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, each storage once (safetensors holds no aliases)."""
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            state[name] = tensor
            seen.add(tensor.data_ptr())
    return state


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast when asked for, or when the hardware multiplies bf16 itself."""
    dtype = teacher_dtype(device, precision)
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def teacher_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What a model that is not trained is held in: the dtype of the computation, for nothing adds up in its weights."""
    use = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.bfloat16 if use else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix units (emulated bf16 is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
