"""What only a CUDA device can show: the same numbers there, training in bf16, decode through the cache."""

import pytest
import torch

from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.generation import generate
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import random_ids, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_logits_and_greedy_tokens_are_the_cpus():
    model, ids = tiny_v3(), random_ids(2, 20)
    on_cpu, tokens = model(ids), generate(model, ids, max_new_tokens=20)
    model = model.cuda()
    torch.testing.assert_close(model(ids.cuda()).cpu(), on_cpu, rtol=0, atol=1e-3)
    assert torch.equal(generate(model, ids.cuda(), max_new_tokens=20).cpu(), tokens)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns(tmp_path, precision):
    recipe = Recipe(
        source="unused",
        data=DataSettings(train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2),
        train=TrainSettings(
            steps=60, batch_windows=4, window_tokens=16, learning_rate=1e-2, warmup_steps=2, precision=precision
        ),
        sample=SampleSettings(max_new_tokens=5),
    )
    trainer = Trainer(tiny_v3(vocab_size=ENTRIES).cuda(), tiny_tokenizer(), recipe, tmp_path / "run")
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 1
