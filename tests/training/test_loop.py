import dataclasses
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from smolseek.checkpoint.hub import load
from smolseek.config import DataSettings, Recipe, SampleSettings, StageSettings, TrainSettings
from smolseek.model import StockModel
from smolseek.model.balance import take_expert_counts
from smolseek.training.loop import Interrupted, Trainer, Watcher
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories


@pytest.fixture
def recipe(tmp_path):
    return Recipe(
        name="test",
        source="unused",
        data=DataSettings(
            train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2, held_out_tokens=300
        ),
        train=TrainSettings(
            steps=12,
            batch_windows=4,
            window_tokens=16,
            warmup_steps=2,
            evaluate_every=6,
            checkpoint_every=5,
            log_every=1,
            precision="float32",
        ),
        sample=SampleSettings(every=6, prompts=("Anna ",), max_new_tokens=5),
    )


def model_of():
    torch.manual_seed(0)
    return tiny_v3(vocab_size=ENTRIES)


def trainer_of(recipe, folder, model=None, **options):
    return Trainer(model or model_of(), tiny_tokenizer(), recipe, folder, **options)


def with_train(recipe, **changes):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def stop_at(step):
    seen = []
    return Watcher(on_step=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1] >= step)


@pytest.mark.parametrize(("stopped_at", "optimizer"), [(1, "adamw"), (5, "muon"), (8, "adamw"), (8, "muon")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe, tmp_path, stopped_at, optimizer):
    recipe = with_train(recipe, optimizer=optimizer)
    whole = trainer_of(recipe, tmp_path / "whole")
    whole.fit(Watcher())
    with pytest.raises(Interrupted, match="--resume"):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(stopped_at))
    torch.manual_seed(99)
    resumed = trainer_of(recipe, tmp_path / "cut")
    assert resumed.resume() and resumed.step == stopped_at
    resumed.fit(Watcher())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert (tmp_path / "whole" / "logs.txt").read_text() == (tmp_path / "cut" / "logs.txt").read_text()


def test_resume_goes_back_to_the_checkpoint_and_repeats_no_line(recipe, tmp_path):
    """As after kill -9: steps since the checkpoint are done again."""
    trainer = trainer_of(recipe, tmp_path / "run")
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_train_step", _fails_after(trainer, 8))
        trainer.fit(Watcher())
    assert len(metrics(tmp_path / "run")) > 5
    resumed = trainer_of(recipe, tmp_path / "run")
    assert resumed.resume() and resumed.step == 5
    resumed.fit(Watcher())
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(12))


def _fails_after(trainer, steps):
    train_step = trainer._train_step

    def step():
        if trainer.step == steps:
            raise RuntimeError("killed")
        return train_step()

    return step


def test_micro_batches_are_one_batch(recipe, tmp_path):
    """Same windows in one or in two micro-batches: same update, same routing biases (counts of the global batch)."""
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


def test_training_learns_and_leaves_what_is_described(recipe, tmp_path):
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
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000060"]


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


def test_distillation_brings_the_model_to_its_teacher(recipe, tmp_path):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    recipe = with_train(recipe, steps=40, learning_rate=1e-2, distill_weight=1.0)
    trainer = trainer_of(recipe, tmp_path / "run", teacher=teacher)
    windows = trainer.stream.next(4)
    before = trainer._loss(windows)[0].item()
    trainer.fit(Watcher())
    after = trainer._loss(windows)[0].item()
    assert after < before / 2


def test_distillation_for_the_first_part_only_asks_the_teacher_no_longer(recipe, tmp_path, monkeypatch):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    asked, hidden_states = [], teacher.hidden_states
    monkeypatch.setattr(teacher, "hidden_states", lambda *a, **k: asked.append(trainer.step) or hidden_states(*a, **k))
    trainer = trainer_of(with_train(recipe, distill_weight=0.9, distill_steps=5), tmp_path / "run", teacher=teacher)
    trainer.fit(Watcher())
    assert asked == list(range(5))


def test_the_teacher_may_be_held_in_bf16(recipe, tmp_path):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        bf16 = with_train(recipe, distill_weight=0.5, precision="bfloat16")
        trainer = trainer_of(bf16, tmp_path / "run", teacher=teacher.to(dtype))
        losses.append(trainer._loss(trainer.stream.next(4))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


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
        ({"stages": (StageSettings(),)}, "give it one of the two"),
        ({"stages": (StageSettings(steps=1, tokens=1),)}, "give it one of the two"),
        ({"stages": (StageSettings(steps=1, distill_weight=2.0),)}, r"train\.stages\.0\.distill_weight 2\.0"),
        ({"stages": (StageSettings(steps=1, distill_weight=0.5),)}, "name a teacher"),
        ({"window_tokens": 65}, r"train\.window_tokens 65: the model's limit is 64"),
        ({"distill_weight": 1.5}, "between 0 and 1"),
        ({"distill_weight": 0.5}, "name a teacher"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(with_train(recipe, **changes), tmp_path / "run")


def test_a_checkpoint_of_other_settings_is_refused(recipe, tmp_path):
    trainer_of(with_train(recipe, steps=5), tmp_path / "run").fit(Watcher())
    with pytest.raises(ValueError, match=r"train\.batch_windows 4 then, 3 now"):
        trainer_of(with_train(recipe, steps=5, batch_windows=3), tmp_path / "run").resume()


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 0: the loss is nan"):
        trainer_of(recipe, tmp_path / "run", model).fit(Watcher())
