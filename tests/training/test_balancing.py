"""Balancing in a run: speed, settings and logs; it resumes, freezes and is the same in micro-batches."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.training import trainer as trainer_module
from smolseek.training.balancing import balance_speed, describe_load, set_balance
from smolseek.training.optimizer import learning_rate
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Watcher
from tests.factories import layers_of, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories
from tests.training.trainers import stop_at


@pytest.fixture
def trainer_of(tmp_path):
    text = str(write_stories(tmp_path / "a.txt"))

    def build(name, **train):
        settings = {"steps": 6, "batch_windows": 4, "window_tokens": 16, "warmup_steps": 2, "precision": "float32"}
        settings |= {"evaluate_every": 3, "log_every": 1, "checkpoint_every": 100}
        recipe = Recipe(
            source="unused",
            data=DataSettings(train=(text,), shuffle_windows=8, held_out_share=0.2, held_out_tokens=200),
            train=TrainSettings(**(settings | train)),
            sample=SampleSettings(every=0, prompts=()),
        )
        torch.manual_seed(0)
        return Trainer(tiny_v3(vocab_size=ENTRIES), tiny_tokenizer(), recipe, tmp_path / name)

    return build


def biases_of(trainer):
    return {name: t.clone() for name, t in trainer.model.state_dict().items() if name.endswith("correction_bias")}


@pytest.mark.parametrize("rule", ["proportional"])
def test_every_rule_resumes_bit_for_bit(trainer_of, rule):
    options = {"balance_rule": rule, "balance_loss_weight": 0.1}
    whole = trainer_of("whole", **options)
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        trainer_of("cut", **options).fit(stop_at(2))
    resumed = trainer_of("cut", **options)
    assert resumed.resume()
    resumed.fit(Watcher())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_biases_move_until_they_are_frozen(trainer_of, rule):
    trainer = trainer_of("run", balance_rule=rule, balance_freeze_share=0.5)
    start = biases_of(trainer)
    with pytest.raises(Interrupted):
        trainer.fit(stop_at(3))
    moved = biases_of(trainer)
    assert all(not torch.equal(start[name], bias) for name, bias in moved.items())
    trainer.fit(Watcher())
    assert all(torch.equal(moved[name], bias) for name, bias in biases_of(trainer).items())


def test_a_sequence_loss_is_the_same_in_micro_batches(trainer_of):
    whole, parts, without = (
        trainer_of(name, steps=1, **options)
        for name, options in {
            "whole": {"balance_loss_weight": 0.5},
            "parts": {"balance_loss_weight": 0.5, "batch_windows": 2, "gradient_accumulation": 2},
            "without": {},
        }.items()
    )
    losses, grads = [], []
    for trainer in (whole, parts, without):
        trainer.model.train()
        windows = trainer.stream.next(4)
        size = trainer.settings.batch_windows
        for part in windows.split(size):
            loss = trainer._loss(part)[0]
            (loss / trainer.settings.gradient_accumulation).backward()
        losses.append(float(loss))
        grads.append(trainer.model.model.layers[2].mlp.gate.weight.grad.clone())
    assert losses[0] == losses[2], "the reported loss must not include the balance loss"
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    assert (grads[0] - grads[2]).abs().max() > 1e-4


def test_metrics_hold_the_load_and_how_different_the_experts_are(trainer_of):
    trainer = trainer_of("run")
    trainer.fit(Watcher())
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    loads = [line["load"] for line in lines if "loss" in line]
    assert len(loads) == 6 and set(loads[0]) == {"1", "2"}
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for load in loads for shares in load.values())
    assert [set(line["experts"]) for line in lines if "experts" in line] == [{"weights", "routing"}] * 2


def test_the_sign_rules_speed_falls_with_the_learning_rate():
    settings = TrainSettings(steps=10, balance_update_speed=0.5)
    assert [balance_speed(9, settings, decay) for decay in (1.0, 0.5, 0.0)] == pytest.approx([0.5, 0.3, 0.1])
    proportional = dataclasses.replace(settings, balance_rule="proportional")
    assert balance_speed(9, proportional, 0.0) == 0.5


def test_the_loss_weighs_the_global_batch():
    model = tiny_v3()
    set_balance(model, TrainSettings(balance_loss_weight=0.4, gradient_accumulation=4, balance_loss="batch"))
    gate = layers_of(model)[1].mlp.gate
    assert gate.balance_loss_weight == pytest.approx(0.1) and gate.balance_loss_over_batch
    set_balance(nn.Linear(2, 2), TrainSettings())


def test_load_for_the_metrics():
    assert describe_load([]) == {}
    expected = {"maxvio": {"3": 1.0}, "load": {"3": [0.6667, 0.3333, 0.0]}}
    assert describe_load([(3, torch.tensor([4, 2, 0]))]) == expected


def test_the_speed_is_zero_once_the_biases_are_frozen():
    settings = TrainSettings(steps=10, balance_freeze_share=0.3, balance_rule="proportional")
    assert [balance_speed(step, settings, 0.5) for step in (0, 6, 7, 9)] == [1e-3, 1e-3, 0, 0]


def test_the_biases_move_by_less_as_the_learning_rate_falls(trainer_of, monkeypatch):
    speeds = []
    monkeypatch.setattr(trainer_module, "update_biases", lambda model, counts, speed, rule: speeds.append(speed))
    trainer = trainer_of("run", steps=12, balance_update_speed=1.0, learning_rate=1.0)
    trainer.fit(Watcher())
    rates = [learning_rate(step, trainer.settings) for step in range(trainer.settings.steps)]
    assert speeds[:3] == [1.0, 1.0, 1.0]  # the warm-up, and the peak
    assert speeds[2:] == pytest.approx([0.2 + 0.8 * rate for rate in rates[2:]])
    assert speeds[-1] < 0.25
