"""Absorbed attention over the cache gives what the expanded form gives over the whole window."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smolseek.model import DeepseekV3
from smolseek.model.attention import rotate
from smolseek.model.transformer import attention_mask
from tests.factories import LIVELY_ROPE, layers_of, random_ids, tiny_v3

TOKENS = 20
MODEL = tiny_v3(q_lora_rank=20, rope_parameters=LIVELY_ROPE["yarn"])


def decode(model: DeepseekV3, ids: Tensor, chunks: list[int], padding_B: Tensor | None = None) -> Tensor:
    """Returns the logits at every position when the tokens are read chunk by chunk through one cache."""
    cache = model.new_cache(len(ids), ids.shape[1], padding_B)
    with torch.no_grad():
        return torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6).map(lambda sizes: [*sizes, TOKENS]))
def test_any_chunks_equal_the_full_forward(sizes: list[int]) -> None:
    ends = [min(sum(sizes[: n + 1]), TOKENS) for n in range(len(sizes))]
    chunks = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    ids = random_ids(2, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(decode(MODEL, ids, chunks), MODEL(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "case", [{}, {"attention_bias": True}, {"rope_interleave": False}, {"v_head_dim": 28}, {"num_attention_heads": 1}]
)
def test_token_by_token_equals_the_full_forward(case: dict[str, Any]) -> None:
    model = tiny_v3(**({"num_key_value_heads": case.get("num_attention_heads", 3)} | case))
    ids = random_ids(3, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(decode(model, ids, [1] * TOKENS), model(ids), rtol=0, atol=1e-4)


def test_left_padded_rows_equal_each_prompt_alone() -> None:
    lengths = [TOKENS, 13, 3]
    padding_B = torch.tensor([TOKENS - length for length in lengths])
    ids = random_ids(3, TOKENS)
    for chunks in ([9, 8, 1, 1, 1], [TOKENS - 1, 1], [1] * TOKENS):
        logits = decode(MODEL, ids, chunks, padding_B)
        assert logits.isfinite().all()
        for row, length in enumerate(lengths):
            with torch.no_grad():
                alone = MODEL(ids[row : row + 1, -length:])
            torch.testing.assert_close(logits[row : row + 1, -length:], alone, rtol=0, atol=1e-4)


def test_positions_count_from_the_first_real_token() -> None:
    model = tiny_v3(rope_parameters=LIVELY_ROPE["longrope"])  # its frequencies change beyond position 16
    ids = random_ids(1, TOKENS)
    logits = decode(model, ids, [TOKENS], torch.tensor([8]))
    with torch.no_grad():
        torch.testing.assert_close(logits[:, 8:], model(ids[:, 8:]), rtol=0, atol=1e-4)


def test_every_padding_token_sees_something() -> None:
    cache = MODEL.new_cache(2, 9, torch.tensor([7, 0]))
    mask_B1TS = attention_mask(9, None, cache)
    assert mask_B1TS is not None and mask_B1TS.any(dim=-1).all()  # a row that sees nothing gives NaN in some kernels


def test_decoding_never_expands_the_prefix() -> None:
    seen: list[int] = []
    hooks = [
        layer.self_attn.kv_b_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for layer in layers_of(MODEL)
    ]
    decode(MODEL, random_ids(1, 12), [8, 2, 1, 1])
    for hook in hooks:
        hook.remove()
    assert seen == [8] * len(hooks)  # only the first chunk is expanded


def test_segments_with_a_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="segment_ids"):
        MODEL(random_ids(1, 4), segment_ids=torch.zeros(1, 4), cache=MODEL.new_cache(1, 4))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotated_scores_depend_on_distance_alone(interleaved: bool) -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)

    def score(query_position: int, key_position: int) -> Tensor:
        angles = [(position * frequencies).view(1, 1, 1, 4) for position in (query_position, key_position)]
        rotated = [rotate(x, a.cos(), a.sin(), interleaved) for x, a in zip((query, key), angles, strict=True)]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


def test_heads_before_tokens_are_rotated_alike() -> None:
    x_BTHd = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.arange(5)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])
    expected_BTHd = rotate(x_BTHd, angles_TF[:, None].cos(), angles_TF[:, None].sin())
    rotated_BHTd = rotate(x_BTHd.transpose(1, 2), angles_TF.cos(), angles_TF.sin())
    assert torch.equal(rotated_BHTd.transpose(1, 2), expected_BTHd)
