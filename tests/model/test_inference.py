"""A model prepared for generation gives the plain model's logits, within a stated bound."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smolseek.model import DeepseekV3, attention, inference
from smolseek.model.attention import _attend_one_token
from smolseek.model.inference import PackedLinear, PlainLinear, packs_bfloat16, prepare_for_generation
from tests.factories import random_ids, tiny_llama, tiny_v3

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent queries": {"q_lora_rank": 20},
    "biases": {"attention_bias": True, "q_lora_rank": 20},
    "groups": {"n_group": 4, "topk_group": 2},
    "no shared expert": {"n_shared_experts": 0},
    "wide": {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "kv_lora_rank": 32},
}


def steps(model: DeepseekV3, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits at every position: a prefill of five tokens, then one token at a time."""
    cache = model.new_cache(len(ids), ids.shape[1])
    with torch.inference_mode():
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        return torch.cat([model(part, cache=cache) for part in parts], dim=1).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # The logits' standard deviation is about 1, and bf16 keeps 8 bits of each number.
    [(torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_prepared_weights_give_the_same_logits(shape: str, batch: int, dtype: torch.dtype, bound: float) -> None:
    model = tiny_v3(**SHAPES[shape]).eval()
    ids = random_ids(batch, 14)
    # Rounding can change which experts are chosen, and that makes a jump. So every expert is chosen here; their weights
    # still differ.
    for module in model.modules():
        if hasattr(module, "num_experts_per_tok"):
            module.num_experts_per_tok, module.topk_group = module.num_experts, module.n_group
    expected = steps(model, ids)
    model = model.to(dtype)
    prepare_for_generation(model)
    difference = (steps(model, ids) - expected) / expected.std()
    assert difference.pow(2).mean().sqrt() <= bound


def test_greedy_choice_of_experts_is_the_plain_paths() -> None:
    model = tiny_v3().eval()
    prepared = copy.deepcopy(model)
    prepare_for_generation(prepared)
    ids = random_ids(1, 14)
    torch.testing.assert_close(steps(prepared, ids), steps(model, ids), rtol=0, atol=1e-4)
    buffers = dict(prepared.named_buffers())
    counts = {name: count_E for name, count_E in model.named_buffers() if name.endswith("expert_counts")}
    assert counts
    assert all(torch.equal(count_E, buffers[name]) for name, count_E in counts.items())


def test_a_dense_model_of_transformers_too() -> None:
    model, ids = tiny_llama(), random_ids(2, 9)
    with torch.inference_mode():
        expected = model(ids).logits
        prepare_for_generation(model)
        assert isinstance(model.lm_head, PlainLinear)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packs", [False, True])
def test_bf16_weights_are_packed_where_the_cpu_multiplies_them(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if packs and not packs_bfloat16():
        pytest.skip("this CPU has no bf16 products in oneDNN")
    monkeypatch.setattr(inference, "packs_bfloat16", lambda: packs)
    model, ids = tiny_llama().bfloat16(), random_ids(2, 9)
    with torch.inference_mode():
        expected = model(ids).logits
        prepare_for_generation(model)
        assert isinstance(model.lm_head, PackedLinear if packs else PlainLinear)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("layout", [PackedLinear, PlainLinear])
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("width", [16, 40, 96])
def test_every_layout_computes_the_linear_layer(layout: Any, rows: int, width: int) -> None:
    if layout is PackedLinear and not packs_bfloat16():
        pytest.skip("this CPU has no bf16 products in oneDNN")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, width, generator=generator).bfloat16()
    weight, bias = (
        torch.randn(24, width, generator=generator).bfloat16(),
        torch.randn(24, generator=generator).bfloat16(),
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        difference = layout(weight, bias)(x).double() - expected
    assert difference.abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("tokens", [8, 9, 31])
def test_a_cache_read_in_parts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, entries = torch.randn(1, 1, 3, 16).double(), torch.randn(1, 1, tokens, 16).double()
    whole = F.scaled_dot_product_attention(q, entries, entries, scale=0.5)
    monkeypatch.setattr(attention, "_SPLIT_TOKENS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    torch.testing.assert_close(_attend_one_token(q, entries, None, 0.5), whole, rtol=0, atol=1e-12)
