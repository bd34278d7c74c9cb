"""The whole model gives what transformers' DeepseekV3ForCausalLM gives with equal weights."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolseek.model import DeepseekV3
from tests.factories import LIVELY_ROPE, VOCAB, random_ids, tiny_v3, tiny_v3_config, tiny_v3_pair

NAMED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "query rank": {"q_lora_rank": 20},
    "groups": {"n_group": 4, "topk_group": 2},
    "upcycled routing": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 2.0},
    "halved rope pairs": {"rope_interleave": False},
    "biases": {"attention_bias": True, "q_lora_rank": 20},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "unnormalised weights": {"norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
    "no dense": {"first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "padding token": {"pad_token_id": 7},
    "odd widths": {"hidden_size": 37, "moe_intermediate_size": 11},
    **{rope: {"rope_parameters": parameters} for rope, parameters in LIVELY_ROPE.items()},
}


@st.composite
def overrides(draw: st.DrawFn) -> dict[str, Any]:
    groups, group_size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    rope_dim, rope = draw(st.sampled_from([4, 8])), dict(LIVELY_ROPE[draw(st.sampled_from(sorted(LIVELY_ROPE)))])
    for factors in {"short_factor", "long_factor"} & rope.keys():
        rope[factors] = rope[factors][: rope_dim // 2]
    if "mscale" in rope:
        rope |= {"mscale": draw(st.sampled_from([0.5, 1.0])), "mscale_all_dim": draw(st.sampled_from([0.0, 0.5, 1.0]))}
    heads = draw(st.integers(1, 4))
    return {
        "hidden_size": draw(st.integers(24, 48)),
        "moe_intermediate_size": draw(st.integers(8, 24)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": draw(st.integers(4, 16)),
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": draw(st.integers(8, 28)),
        "kv_lora_rank": draw(st.integers(8, 32)),
        "q_lora_rank": draw(st.none() | st.integers(8, 32)),
        "rope_parameters": rope,
        "rope_interleave": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "n_group": groups,
        "topk_group": topk_group,
        "n_routed_experts": groups * group_size,
        "num_experts_per_tok": draw(st.integers(1, topk_group * group_size)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def assert_equals_transformers(case: dict[str, Any], *, starved: bool = False) -> None:
    ours, stock = tiny_v3_pair(**case)
    if starved:
        for model in (ours, stock):
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer[::2] -= 10  # sigmoids are below 1, so every second expert gets no token
    ids = random_ids(2, 24)
    direction = torch.randn(2, 24, VOCAB, generator=torch.Generator().manual_seed(3))
    logits, expected = ours(ids), stock(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    # With one chosen expert the normalised weight is always 1: its gradient is only rounding, which is allowed for.
    rounding = 1e-6 * torch.stack([p.grad.norm() for p in stock.parameters() if p.grad is not None]).norm()
    for (name, parameter), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if not parameter.numel():
            continue
        assert parameter.grad is not None and other.grad is not None, name
        error = (parameter.grad - other.grad).norm()
        assert error <= 1e-4 * other.grad.norm() + rounding, f"{name}: {error} of {other.grad.norm()}"


@pytest.mark.parametrize("name", NAMED_CASES)
def test_logits_and_gradients_are_transformers(name: str) -> None:
    assert_equals_transformers(NAMED_CASES[name])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(overrides())
def test_logits_and_gradients_are_transformers_everywhere(case: dict[str, Any]) -> None:
    assert_equals_transformers(case)


def test_starved_experts_are_transformers() -> None:
    assert_equals_transformers({"num_experts_per_tok": 3}, starved=True)


def test_dynamic_rope_grows_as_in_transformers() -> None:
    ours, stock = tiny_v3_pair(rope_parameters=LIVELY_ROPE["dynamic"], max_position_embeddings=16)
    for tokens in (12, 40, 12):  # grows, then goes back
        ids = random_ids(1, tokens)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), stock(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [{}, {"q_lora_rank": 20, "attention_bias": True}, {"tie_word_embeddings": True}])
def test_state_dict_goes_both_ways(case: dict[str, Any]) -> None:
    ours, stock = tiny_v3_pair(**case)
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    stock.load_state_dict(mine)
    ours.load_state_dict(theirs)
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == bool(case.get("tie_word_embeddings"))


def test_a_later_token_changes_no_earlier_logit() -> None:
    model, ids = tiny_v3(), random_ids(2, 20)
    with torch.no_grad():
        before = model(ids)
        for position in (5, 19):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB
            after = model(changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
            assert (after[:, position:] - before[:, position:]).abs().amax(-1).min() > 1e-3


def test_packed_documents_do_not_see_each_other() -> None:
    model, ids = tiny_v3(), random_ids(1, 24)
    segments = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5])
    with torch.no_grad():
        packed = model(ids, segment_ids=segments)
        for number in range(3):
            alone = model(ids[:, segments[0] == number])
            torch.testing.assert_close(packed[:, segments[0] == number], alone, rtol=0, atol=1e-5)
        assert (packed - model(ids))[:, 7:].abs().max() > 1  # without segments they do


def test_casting_leaves_biases_and_frequencies_fp32() -> None:
    model = tiny_v3().to(torch.bfloat16)
    kinds = {name.rpartition(".")[2]: buffer.dtype for name, buffer in model.named_buffers()}
    assert kinds["e_score_correction_bias"] == kinds["inv_freq"] == torch.float32
    assert model(random_ids(1, 8)).dtype == torch.bfloat16
    assert model.new_cache(1, 4).entries_LBSW.dtype == torch.bfloat16


def test_autocast_trains_in_bf16_close_to_fp32() -> None:
    model, ids = tiny_v3(), random_ids(2, 16)
    expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    logits.float().pow(2).mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Rounding may change the choice of an expert and so move a token's logits; most tokens must hardly move.
    assert (logits - expected).abs().amax(-1).median() < 0.1


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    model = DeepseekV3(tiny_v3_config(attention_bias=True, initializer_range=0.05, pad_token_id=3))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.2), name
    assert (model.model.embed_tokens.weight[3] == 0).all()


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads 1"),
        ({"n_group": 3}, "n_routed_experts 8"),
        ({"n_group": 8}, "n_routed_experts 8"),
        ({"n_group": 2, "topk_group": 3}, "topk_group 3"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok 3"),
        ({"scoring_func": "argmax"}, "scoring_func 'argmax'"),
    ],
)
def test_impossible_configs_are_refused_by_name(case: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepseekV3(tiny_v3_config(**case))
    if "num_key_value_heads" not in case:
        DeepseekV3(tiny_v3_config(**case, first_k_dense_replace=3))  # without experts these fields are not checked
