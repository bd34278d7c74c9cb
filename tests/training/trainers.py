"""Trainers of a tiny model, and comparisons of their runs."""

import dataclasses
import json

import torch

from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import tiny_v3
from tests.text import ENTRIES, tiny_tokenizer


def model_of():
    """Returns the same tiny V3 model each time."""
    torch.manual_seed(0)
    return tiny_v3(vocab_size=ENTRIES)


def trainer_of(recipe, folder, model=None, **options):
    """Returns a trainer of `model`, or of a new `model_of`."""
    return Trainer(model or model_of(), tiny_tokenizer(), recipe, folder, **options)


def with_train(recipe, **changes):
    """Returns the recipe with changes of its training settings."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def metrics(folder):
    """Returns the lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = {"tokens_per_second", "data_wait_share"}
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def assert_same_run(one, other):
    """Compare weights, metrics and logs, bit for bit."""
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert metrics(one.folder) == metrics(other.folder)
    assert (one.folder / "logs.txt").read_text() == (other.folder / "logs.txt").read_text()


def stop_at(step):
    """Returns a watcher that asks the run to stop after `step` steps."""
    seen = []
    return Watcher(on_step=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1] >= step)
