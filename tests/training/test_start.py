"""The random start of a run: fields of `recipe.model` that it cannot have."""

import pytest

from smolseek.config import Recipe
from smolseek.training.start import random_skeleton
from tests.text import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "model.model_type: None is not one of llama, deepseek_v3"),
        ({"model_type": "llama", "hidden": 3}, "model.hidden: unknown to the config of llama"),
        ({"model_type": "llama", "vocab_size": 512}, "model.vocab_size: the tokenizer gives it, here [0-9]+; leave it"),
        ({"model_type": "deepseek_v3", "eos_token_id": 2}, "model.eos_token_id: the tokenizer gives it"),
    ],
)
def test_fields_that_a_random_model_cannot_have(fields, words):
    with pytest.raises(ValueError, match=f"recipe key {words}"):
        random_skeleton(Recipe(model=SIZES | fields), tiny_tokenizer())
