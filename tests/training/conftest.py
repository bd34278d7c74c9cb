"""Recipes of a few steps on a text of stories, and on conversations."""

import dataclasses
import json

import pytest

from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from tests.data.test_chat import CHATML, tokenizer_with
from tests.text import stories, write_stories


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


@pytest.fixture
def chat(recipe, tmp_path):
    """The recipe on conversations of unequal length, and the tokenizer with a template."""
    tokenizer = tokenizer_with(CHATML)
    rows = [
        [{"role": "user", "content": text * (1 + n % 3)}, {"role": "assistant", "content": text[: 5 + 9 * (n % 7)]}]
        for n, text in enumerate(stories())
    ]
    lines = [json.dumps({"messages": row}) for row in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines[:5], "broken", *lines[5:]]))
    data = dataclasses.replace(recipe.data, train=(str(tmp_path / "chat.jsonl"),))
    return dataclasses.replace(recipe, data=data), tokenizer
