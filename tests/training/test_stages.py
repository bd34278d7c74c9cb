"""Stages: which weights each trains and for how long, early ends, and resuming within and between stages."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolseek.config import StageSettings, TrainSettings, load_recipe
from smolseek.training.stages import StageProgress, learning_rate_name, stages_of, step_tokens
from smolseek.training.watcher import Interrupted, Watcher
from tests.training.trainers import assert_same_run, metrics, model_of, stop_at, trainer_of, with_train

STAGES = (
    StageSettings(steps=5, trains="attention", learning_rate=2e-3, warmup_steps=1),
    StageSettings(tokens=6 * 4 * 16 - 3, trains="experts", optimizer="muon", learning_rate_factors={"router": 3.0}),
    StageSettings(steps=3, schedule="wsd"),
)


def test_settings_without_stages_are_one_stage():
    train = TrainSettings(steps=7, patience=2)
    assert stages_of(train) == (train,)


def test_a_stage_has_the_runs_settings_and_its_own_override_them():
    train = TrainSettings(batch_windows=4, window_tokens=16, learning_rate=1e-3, distill_weight=0.0, stages=STAGES)
    first, second, third = stages_of(train)
    assert (first.steps, first.trains, first.learning_rate, first.optimizer) == (5, "attention", 2e-3, "adamw")
    assert (second.steps, second.optimizer, second.learning_rate) == (6, "muon", 1e-3)
    assert dataclasses.replace(third, steps=train.steps, schedule="cosine", stages=STAGES) == train
    with pytest.raises(ValueError, match="steps 99: the stages have lengths"):
        stages_of(dataclasses.replace(train, steps=99))


@given(st.integers(1, 10**6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 64))
def test_a_token_budget_is_met_by_whole_steps(tokens, windows, micro_batches, window_tokens):
    train = TrainSettings(
        batch_windows=windows,
        gradient_accumulation=micro_batches,
        window_tokens=window_tokens,
        stages=(StageSettings(tokens=tokens),),
    )
    (stage,) = stages_of(train)
    assert tokens <= stage.steps * step_tokens(train) < tokens + step_tokens(train)


def test_progress_waits_with_patience():
    progress = StageProgress((TrainSettings(steps=10, patience=2), TrainSettings(steps=4)))
    for loss, ended in ((3.0, False), (2.0, False), (2.5, False), (2.0, True)):
        progress.note_held_out_loss(loss)
        assert progress.ends(6) == ended
    assert progress.steps == 14
    progress.advance(6)
    assert progress.steps == 10 and not progress.ends(9) and progress.ends(10) and not progress.done
    progress.advance(10)
    assert progress.done and progress.steps == 10 and progress.settings.steps == 4


def with_stages(recipe, stages, **changes):
    return with_train(recipe, steps=TrainSettings().steps, stages=stages, **changes)


def test_each_stage_trains_its_own_weights(recipe, tmp_path):
    recipe = with_stages(recipe, STAGES)
    states = {0: model_of().state_dict()}

    def keep(progress):
        states[progress.step] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    trainer = trainer_of(recipe, tmp_path / "run")
    trainer.fit(Watcher(on_step=keep))
    assert max(states) == 14 == trainer.stages.steps

    def moved(first, last):
        return {name for name, tensor in states[first].items() if not torch.equal(tensor, states[last][name])}

    parameters = {name for name, _ in trainer.model.named_parameters()}
    assert moved(0, 5) & parameters == {name for name in parameters if ".self_attn." in name}
    assert moved(5, 11) & parameters == {name for name in parameters if ".mlp." in name}
    assert moved(11, 14) >= parameters
    assert "Stage 1/3 ends after step 4: all its steps" in (tmp_path / "run" / "logs.txt").read_text()
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert rates[0] == 2e-3 and rates[5] == rates[11] == 5e-4  # each stage has a warm-up of its own


def with_early_end(recipe, **changes):
    """Returns a recipe whose second stage cannot learn, so that its patience ends it early."""
    stages = (STAGES[0], StageSettings(steps=50, learning_rate=0.0, patience=2, trains="experts"), STAGES[2])
    return with_stages(recipe, stages, evaluate_every=1, balance_update_speed=0.0, **changes)


def test_a_stage_ends_early_when_held_out_loss_stops_improving(recipe, tmp_path):
    trainer = trainer_of(with_early_end(recipe), tmp_path / "run")
    trainer.fit(Watcher())
    assert trainer.step == trainer.stages.steps == 5 + 3 + 3
    logs = (tmp_path / "run" / "logs.txt").read_text()
    assert "Stage 2/3 ends after step 7: no lower held-out loss in 2 evaluations" in logs
    assert logs.count("Best loss achieved") == 1


def test_the_last_stage_may_end_early_too(recipe, tmp_path):
    recipe = with_train(recipe, steps=50, learning_rate=0.0, patience=2, evaluate_every=1, balance_update_speed=0.0)
    trainer = trainer_of(recipe, tmp_path / "run")
    trainer.fit(Watcher())
    assert trainer.step == 3
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert "Best loss achieved" in (tmp_path / "run" / "logs.txt").read_text()
    again = trainer_of(recipe, tmp_path / "run")
    assert again.resume() and again.stages.done
    assert again.fit(Watcher()) == trainer.quality and again.step == 3


@pytest.mark.parametrize("stopped_at", [3, 5, 6, 8, 10])
def test_resuming_in_and_between_stages_is_exact(recipe, tmp_path, stopped_at):
    recipe = with_early_end(recipe, optimizer="muon")
    whole = trainer_of(recipe, tmp_path / "whole")
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(stopped_at))
    resumed = trainer_of(recipe, tmp_path / "cut")
    assert resumed.resume() and resumed.step == stopped_at
    resumed.fit(Watcher())
    assert_same_run(whole, resumed)


def test_a_resumed_stage_takes_another_learning_rate(recipe, tmp_path):
    with pytest.raises(Interrupted):
        trainer_of(with_stages(recipe, STAGES), tmp_path / "run").fit(stop_at(3))
    slower = (dataclasses.replace(STAGES[0], learning_rate=1e-5), *STAGES[1:])
    resumed = trainer_of(with_stages(recipe, slower), tmp_path / "run")
    assert resumed.resume()
    resumed.fit(Watcher())
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert rates[2] > 1e-4 and 0 < rates[3] < 1e-5
    logs = (tmp_path / "run" / "logs.txt").read_text()
    assert "Resumed at step 3 with train.stages.0.learning_rate 1e-05 (was 0.002)\n" in logs


def test_the_learning_rate_of_a_stage_has_a_name():
    train = TrainSettings(stages=STAGES)
    assert learning_rate_name(train, 0) == "train.stages.0.learning_rate"
    assert learning_rate_name(train, 2) == learning_rate_name(TrainSettings(), 0) == "train.learning_rate"


def test_stages_in_a_recipe(tmp_path):
    path = tmp_path / "staged.yaml"
    path.write_text(
        "train:\n  learning_rate: 1e-3\n  stages:\n"
        "    - {tokens: 10000, trains: attention, learning_rate_factors: {attention: 2}}\n"
        "    - {steps: 10, distill_weight: 0, patience: 3}\n"
    )
    first, second = load_recipe(path).train.stages
    assert first.tokens == 10000 and first.learning_rate_factors == {"attention": 2.0}
    assert second.patience == 3 and second.distill_weight == 0.0
    path.write_text("train: {stages: [{step: 3}]}")
    with pytest.raises(ValueError, match=r"train\.stages\.step: unknown; did you mean train\.stages\.steps"):
        load_recipe(path)


def test_progress_goes_on_where_it_was_saved():
    progress = StageProgress((TrainSettings(), TrainSettings()))
    progress.note_held_out_loss(2.0)
    progress.note_held_out_loss(3.0)
    progress.advance(4)
    progress.note_held_out_loss(1.5)
    other = StageProgress(progress.settings_of_each)
    other.restore(progress.state())
    assert other == progress and other.best == 1.5 and math.isfinite(other.best)
