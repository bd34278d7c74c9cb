import pytest
from transformers import DeepseekV3Config

from smolseek.checkpoint.hub import named_disk_tensors
from smolseek.formats.deepseek_v3 import DEFAULTS, disk_config, expected_tensors
from tests.factories import tiny_v3


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": 20},
        {"attention_bias": True},
        {"q_lora_rank": 20, "attention_bias": True, "tie_word_embeddings": True},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "n_shared_experts": 3},
    ],
)
def test_they_are_what_a_folder_holds(overrides):
    model = tiny_v3(**overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_disk_tensors(model)}
    assert expected_tensors(disk_config(model.config.to_dict())) == shapes


def test_fields_left_out_are_what_transformers_takes():
    config = DeepseekV3Config()
    assert {field: getattr(config, field) for field in DEFAULTS} == DEFAULTS


def test_a_size_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="hidden_size 'wide': must be a whole number"):
        expected_tensors({"hidden_size": "wide"})
