"""Balancing in a run: what it logs, that it resumes, freezes and is the same in micro-batches."""

import json

import pytest
import torch

from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.training.loop import Interrupted, Trainer, Watcher
from tests.factories import tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories


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


def stop_at(step):
    seen = []
    return Watcher(on_step=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1] >= step)


@pytest.mark.parametrize("rule", ["proportional", "quantile"])
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


@pytest.mark.parametrize("rule", ["sign", "proportional", "quantile"])
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
    assert losses[0] == losses[2], "the balance loss is no part of what is reported"
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
