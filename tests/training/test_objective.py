"""The loss of a step: marked tokens, and the teacher's part."""

import pytest
import torch

from smolseek.data.encoding import read_marks
from smolseek.model import StockModel
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import tiny_llama
from tests.text import ENTRIES
from tests.training.trainers import model_of, trainer_of, with_train


def test_the_users_words_teach_nothing(chat, tmp_path):
    """Labels of tokens that are not to be learnt do not change the loss."""
    recipe, tokenizer = chat
    trainer = Trainer(model_of(), tokenizer, recipe, tmp_path / "run")
    windows = trainer.stream.next(4)
    ids, loss, _ = read_marks(windows)
    last = windows.clone()
    last[:, -1] = windows[:, -1] ^ 1  # the last token is a label, never an input
    masked = ~loss[:, -1]
    assert masked.any() and not masked.all()
    assert torch.equal(trainer._loss(windows[masked])[0], trainer._loss(last[masked])[0])
    assert not torch.equal(trainer._loss(windows[~masked])[0], trainer._loss(last[~masked])[0])
    assert ids.max() < ENTRIES


def test_distillation_brings_the_model_to_its_teacher(recipe, tmp_path):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    recipe = with_train(recipe, steps=40, learning_rate=1e-2, distill_weight=1.0)
    trainer = trainer_of(recipe, tmp_path / "run", teacher=teacher)
    windows = trainer.stream.next(4)
    before = trainer._loss(windows)[0].item()
    trainer.fit(Watcher())
    after = trainer._loss(windows)[0].item()
    assert after < before / 2


def test_after_distill_steps_the_teacher_does_not_run(recipe, tmp_path, monkeypatch):
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
