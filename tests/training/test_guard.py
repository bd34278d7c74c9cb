"""Steps that must not be taken: a loss or gradient that is not finite, and spikes."""

import json

import pytest
import torch

from smolseek.checkpoint.state import newest_state
from smolseek.config import TrainSettings
from smolseek.summary import render_summary, summarize
from smolseek.training.guard import StepGuard
from smolseek.training.watcher import Interrupted, Watcher
from tests.training.trainers import metrics, model_of, stop_at, trainer_of, with_train


def spoil(trainer, steps, value):
    """Multiply the loss of some steps by `value`, in the backward pass too."""
    loss_of = trainer._loss

    def spoiled(*arguments, **options):
        loss, *rest = loss_of(*arguments, **options)
        if trainer.step not in steps:
            return loss, *rest
        return loss * value, rest[0] * value, *rest[1:]

    trainer._loss = spoiled
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 4.0])
def test_a_step_with_nan_or_a_spike_is_skipped_and_counted(recipe, tmp_path, value):
    steps = 24
    recipe = with_train(recipe, steps=steps, checkpoint_every=steps)
    trainer = spoil(trainer_of(recipe, tmp_path / "run"), {15, 16, 20}, value)
    seen = []
    take = trainer._train_step

    def step():
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        moments = [s["exp_avg"].clone() for s in trainer.optimizers[0].state_dict()["state"].values()]
        result = take()
        same = all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in before.items())
        after = [s["exp_avg"] for s in trainer.optimizers[0].state_dict()["state"].values()]
        seen.append(same and all(torch.equal(*pair) for pair in zip(moments, after, strict=True)) and trainer.step > 0)
        return result

    trainer._train_step = step
    trainer.fit(Watcher())
    assert [number for number, same in enumerate(seen) if same] == [15, 16, 20]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line][-1] == 3
    assert (tmp_path / "run" / "logs.txt").read_text().count("skipped: the loss is") == 3
    summary = summarize({}, trainer)
    assert summary["skipped_steps"] == 3 and "Steps skipped: 3 of 24" in render_summary(summary)
    resumed = trainer_of(recipe, tmp_path / "run")
    assert resumed.resume() and resumed.guard.skipped == 3 and len(resumed.guard.recent) == 21


def test_a_batch_without_anything_to_learn_is_no_measure_of_others():
    guard = StepGuard(TrainSettings())
    assert not any(guard.objection(0.0, 0.0) or guard.objection(2.0, 1.0) for _ in range(12))
    assert guard.objection(2.1, 1.0) is None and list(guard.recent) == [2.0] * 12 + [2.1]


def skips(guard, losses):
    """Returns the numbers of the losses that the guard objects to."""
    return [number for number, loss in enumerate(losses) if guard.objection(loss, 1.0)]


@pytest.mark.parametrize("every", [2.5, 10, 50, 300])
def test_a_harder_source_that_keeps_coming_is_learnt_after_three_skipped_steps(every):
    """Its batches are few, so that no median of all batches would ever show them."""
    hard = {int(12 + every * number) for number in range(12)}
    losses = [9.0 + number % 2 if number in hard else 1.0 for number in range(max(hard) + 1)]
    assert skips(StepGuard(TrainSettings()), losses) == sorted(hard)[:3]


def test_higher_spikes_than_those_that_keep_coming_and_rare_ones_are_skipped():
    guard = StepGuard(TrainSettings())
    skips(guard, [1.0] * 12 + [9.0, 1.0] * 3)
    assert guard.objection(8.0, 1.0) is None and guard.objection(28.0, 1.0) and guard.objection(float("inf"), 1.0)
    rare = ([1.0] * 600 + [9.0]) * 5
    assert len(skips(StepGuard(TrainSettings()), rare)) == 5


def test_harder_batches_of_several_heights_are_learnt():
    losses = [1.0] * 12 + [9.0, 1.0, 5.0, 1.0] * 2 + [4.0, 1.0] * 20 + [9.0, 1.0]
    assert skips(StepGuard(TrainSettings()), losses) == [12, 14, 16]


def test_spikes_without_a_good_step_between_them_stay_spikes():
    """Weights that are bad give only such losses, and the run must end."""
    assert skips(StepGuard(TrainSettings()), [1.0] * 12 + [9.0] * 11) == list(range(12, 23))


def test_the_guards_state_is_restored_and_may_be_of_an_older_version():
    guard, losses = StepGuard(TrainSettings()), [1.0] * 12 + [9.0, 1.0] * 2
    skips(guard, losses)
    other = StepGuard(TrainSettings())
    other.restore(json.loads(json.dumps(guard.state())))
    assert skips(guard, [9.0, 1.0, 9.0]) == skips(other, [9.0, 1.0, 9.0]) == [0]
    other.restore({"recent": [1.0] * 12, "skipped": 4, "in_a_row": 0})
    assert skips(other, [9.0, 1.0, 9.0]) == [0, 2] and other.skipped == 6


def test_the_losses_that_a_spike_is_compared_with_are_saved(recipe, tmp_path):
    """A run resumed just before the spike still knows the losses of earlier steps."""
    recipe = with_train(recipe, steps=18)
    whole = spoil(trainer_of(recipe, tmp_path / "whole"), {14}, 4.0)
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(14))
    resumed = spoil(trainer_of(recipe, tmp_path / "cut"), {14}, 4.0)
    assert resumed.resume()
    resumed.fit(Watcher())
    assert whole.guard.skipped == 1
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_too_many_skipped_steps_stop_the_run_and_name_the_last_good_checkpoint(recipe, tmp_path):
    recipe = with_train(recipe, steps=30, max_skipped_steps=3)
    trainer = spoil(trainer_of(recipe, tmp_path / "run"), range(7, 30), float("nan"))
    with pytest.raises(ValueError, match=r"step 10: the loss is nan, and 4 steps .*step-00000005: .*--resume") as stop:
        trainer.fit(Watcher())
    assert "\n" not in str(stop.value)
    assert newest_state(tmp_path / "run" / "checkpoints").name == "step-00000005"
    steered = trainer_of(with_train(recipe, learning_rate=5e-4), tmp_path / "run")
    assert steered.resume() and steered.step == 5
    assert "Resumed at step 5 with train.learning_rate 0.0005 (was 0.001)" in (tmp_path / "run/logs.txt").read_text()


def test_weights_that_are_not_finite_stop_the_run(recipe, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 0: the loss is nan.* lower train.learning_rate"):
        trainer_of(with_train(recipe, max_skipped_steps=0), tmp_path / "run", model).fit(Watcher())
