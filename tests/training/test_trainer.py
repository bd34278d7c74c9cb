"""A run: micro-batches, what it leaves in its folder, what must not change it, and settings that cannot work."""

import dataclasses
import json

import pytest
import torch
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM

from smolseek.checkpoint.hub import load
from smolseek.config import SampleSettings, StageSettings, TrainSettings
from smolseek.model import StockModel
from smolseek.model.balance import take_expert_counts
from smolseek.reporting.read import read_run
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Watcher
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES
from tests.training.trainers import assert_same_run, metrics, model_of, stop_at, trainer_of, with_train

STEPS = TrainSettings().steps  # the default, which a recipe with stages may keep


def test_micro_batches_are_one_batch(recipe, tmp_path):
    """The same windows in one or in two micro-batches give the same update and the same routing biases."""
    one, two = model_of(), model_of()
    trainer_of(with_train(recipe, steps=1), tmp_path / "one", one).fit(Watcher())
    trainer_of(with_train(recipe, steps=1, batch_windows=2, gradient_accumulation=2), tmp_path / "two", two).fit(
        Watcher()
    )
    start = model_of().state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=0, atol=2e-4)
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, two.state_dict()[name]) and not torch.equal(tensor, start[name])


def test_a_token_weighs_the_same_in_every_micro_batch_of_chat_data(chat, tmp_path):
    recipe, tokenizer = chat
    recipe = with_train(recipe, steps=1, batch_windows=8)
    one, two = model_of(), model_of()
    Trainer(one, tokenizer, recipe, tmp_path / "one").fit(Watcher())
    split = with_train(recipe, batch_windows=2, gradient_accumulation=4)
    Trainer(two, tokenizer, split, tmp_path / "two").fit(Watcher())
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=0, atol=2e-4)
    losses = [metrics(tmp_path / name)[0]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_share_of_time_spent_waiting_for_data_is_logged(recipe, tmp_path):
    trainer_of(recipe, tmp_path / "run").fit(Watcher())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_share"] for line in lines if "loss" in line]
    assert len(shares) == 12 and all(0 <= share <= 1 for share in shares)


def test_training_learns_and_writes_the_described_files(recipe, tmp_path):
    folder = tmp_path / "run"
    trainer = trainer_of(with_train(recipe, steps=60, learning_rate=1e-2, evaluate_every=20), folder)
    before = trainer.evaluate().loss
    quality = trainer.fit(Watcher())
    assert quality.loss < before - 1
    logs = (folder / "logs.txt").read_text()
    assert "Step 59/60 | Loss: " in logs and "Best loss achieved: " in logs
    assert "Sample at step 0 | Prompt: Anna" in logs and "-" * 80 in logs
    assert set(metrics(folder)[0]["maxvio"]) == {"1", "2"}
    best = load(folder / "best")
    assert best.config.vocab_size == ENTRIES
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000055", "step-00000060"]


def test_evaluation_and_samples_do_not_touch_training(recipe, tmp_path):
    quiet = dataclasses.replace(with_train(recipe, evaluate_every=1000), sample=SampleSettings(every=0, prompts=()))
    one, two = trainer_of(recipe, tmp_path / "a"), trainer_of(quiet, tmp_path / "b")
    one.fit(Watcher())
    two.fit(Watcher())
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


def test_a_dense_llama_trains_too(recipe, tmp_path):
    model = StockModel(tiny_llama(vocab_size=ENTRIES))
    trainer = trainer_of(with_train(recipe, steps=40, learning_rate=1e-2), tmp_path / "run", model)
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 0.5
    assert LlamaForCausalLM.from_pretrained(tmp_path / "run" / "best").config.vocab_size == ENTRIES


@pytest.mark.parametrize("dense", [False, True])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_token_twice(recipe, tmp_path, dense):
    found = []
    for checkpointing in (False, True):
        model = StockModel(tiny_llama(vocab_size=ENTRIES)) if dense else model_of()
        changed = with_train(recipe, activation_checkpointing=checkpointing)
        trainer = trainer_of(changed, tmp_path / "run", model.train())
        take_expert_counts(model)
        calls: list[int] = []
        norm = next(module for name, module in model.named_modules() if name.endswith("0.input_layernorm"))
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):  # two micro-batches
            trainer._loss(trainer.stream.next(4))[0].backward()
        assert len(calls) == (4 if checkpointing else 2)
        found.append(({name: p.grad for name, p in model.named_parameters()}, take_expert_counts(model)))
    (plain, counts), (recomputed, counts_again) = found
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name
    assert len(counts) == len(counts_again) == (0 if dense else 2)
    for (_, once), (_, again) in zip(counts, counts_again, strict=True):
        assert once.sum() == 2 * 4 * 16 * 3 and torch.equal(once, again)


@pytest.mark.parametrize("dense", [False, True])
def test_activation_checkpointing_drops_the_same_attention_again(recipe, tmp_path, dense):
    found = []
    for checkpointing in (False, True):
        dropping = {"vocab_size": ENTRIES, "attention_dropout": 0.3}
        model = StockModel(tiny_llama(**dropping)) if dense else tiny_v3(**dropping)
        trainer = trainer_of(
            with_train(recipe, activation_checkpointing=checkpointing), tmp_path / "run", model.train()
        )
        windows_BT = trainer.stream.next(4)
        torch.manual_seed(1)
        trainer._loss(windows_BT)[0].backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_go_on_bit_for_bit(recipe, tmp_path):
    plain, whole = (trainer_of(with_train(recipe, compile=c), tmp_path / f"{c}") for c in (False, True))
    qualities = [trainer.fit(Watcher()).loss for trainer in (plain, whole)]
    assert whole.model.model.compiled_layers and qualities[0] == pytest.approx(qualities[1], abs=1e-4)
    losses = [[line["loss"] for line in metrics(t.folder) if "loss" in line] for t in (plain, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    with pytest.raises(Interrupted):
        trainer_of(with_train(recipe, compile=True), tmp_path / "cut").fit(stop_at(5))
    resumed = trainer_of(with_train(recipe, compile=True), tmp_path / "cut")
    assert resumed.resume()
    resumed.fit(Watcher())
    assert_same_run(whole, resumed)


def test_blocks_without_a_compiler_run_as_they_are(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    losses = []
    for compiled in (False, True):
        trainer = trainer_of(with_train(recipe, compile=compiled), tmp_path / "run")
        trainer.model.train()
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_cache():
            losses.append(trainer._loss(trainer.stream.next(4))[0])
        losses[-1].backward()
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, r"train\.steps 0"),
        ({"distill_temperature": 0.0}, r"train\.distill_temperature 0\.0: must be above 0"),
        ({"decay_share": 2.0}, r"train\.decay_share 2\.0: must be between 0 and 1"),
        ({"patience": 0}, r"train\.patience 0: must be at least 1"),
        (
            {"learning_rate_factors": {"gates": 2.0}},
            r"learning_rate_factors\.gates: no such group; there are attention",
        ),
        ({"steps": STEPS, "stages": (StageSettings(),)}, "give it one of the two"),
        ({"steps": STEPS, "stages": (StageSettings(steps=1, tokens=1),)}, "give it one of the two"),
        (
            {"steps": STEPS, "stages": (StageSettings(steps=1, distill_weight=2.0),)},
            r"train\.stages\.0\.distill_weight 2\.0",
        ),
        ({"steps": STEPS, "stages": (StageSettings(steps=1, distill_weight=0.5),)}, "name a teacher"),
        ({"window_tokens": 65}, r"train\.window_tokens 65: the model's limit is 64"),
        ({"distill_weight": 1.5}, "between 0 and 1"),
        ({"distill_weight": 0.5}, "name a teacher"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(with_train(recipe, **changes), tmp_path / "run")


def test_a_batch_without_anything_to_learn_has_no_loss_in_metrics_and_log(recipe, tmp_path):
    trainer = trainer_of(with_train(recipe, steps=2), tmp_path / "run")
    take = trainer._train_step
    trainer._train_step = lambda: (take()[0] * trainer.step, [])
    trainer.fit(Watcher())
    first, second = (line["loss"] for line in metrics(tmp_path / "run") if "loss" in line)
    assert first is None and second > 1
    logs = (tmp_path / "run" / "logs.txt").read_text()
    assert "Step 0/2 | Loss: none, no token was to be learnt\n" in logs and f"{second:.4f} (a batch)" in logs
    assert read_run(tmp_path / "run", "run").series("loss") == ([1], [second])
