"""Models that get their memory after they were built."""

import pytest
import torch
from transformers import LlamaForCausalLM

from smolseek.model import DeepseekV3, StockModel
from smolseek.model.skeleton import draw_weights, take_memory
from smolseek.numerics.shards import own_part
from tests.factories import LIVELY_ROPE, random_ids, tiny_llama, tiny_v3, tiny_v3_config
from tests.fake_processes import process


def skeleton(kind, **changes):
    config = tiny_v3_config(**changes) if kind == "V3" else tiny_llama(**changes).config
    with torch.device("meta"):
        return DeepseekV3(config) if kind == "V3" else StockModel(LlamaForCausalLM(config))


@pytest.mark.parametrize("rope", LIVELY_ROPE)
@pytest.mark.parametrize("kind", ["V3", "stock"])
def test_buffers_that_no_checkpoint_holds_get_their_values(kind, rope):
    changes = {"rope_parameters": LIVELY_ROPE[rope], "tie_word_embeddings": True}
    whole = tiny_v3(**changes) if kind == "V3" else StockModel(tiny_llama(**changes)).eval()
    model = take_memory(skeleton(kind, **changes), "cpu").eval()
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(random_ids(2, 20)), whole(random_ids(2, 20)))
    assert model.lm_head.weight is next(p for name, p in model.named_parameters() if "embed_tokens" in name)


@pytest.mark.parametrize("kind", ["V3", "stock"])
def test_random_weights_are_those_of_transformers(kind):
    """Their spread, norms of 1, biases of 0, no embedding for padding; and other numbers for another seed."""
    changes = {"hidden_size": 64, "pad_token_id": 3, "attention_bias": True, "initializer_range": 0.3}
    model, other = (draw_weights(skeleton(kind, **changes), seed) for seed in (1, 2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.1), name
            assert not torch.equal(parameter, other.get_parameter(name)), name
    assert not model.get_parameter("model.embed_tokens.weight" if kind == "V3" else "model.model.embed_tokens.weight")[
        3
    ].any()
    for name, buffer in model.named_buffers():
        assert "e_score" not in name or not buffer.any()


@pytest.mark.parametrize("kind", ["V3", "stock"])
def test_a_seed_gives_any_number_of_processes_the_same_weights(kind):
    alone = draw_weights(skeleton(kind), 5)
    for rank in range(3):
        with process(rank, 3) as processes:
            model = draw_weights(skeleton(kind), 5, shard=processes.shard)
            for (name, parameter), drawn in zip(model.named_parameters(), alone.parameters(), strict=True):
                part, bounds = own_part(parameter)
                assert torch.equal(part, drawn[bounds]), name
