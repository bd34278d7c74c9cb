"""The exact form computes what the dense block computes: scores, values, biases, unrotated keys."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from smolseek.conversion.mla.exact import exact_tensors
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.probe import rotate_by_angles
from tests.conversion.mla.blocks import angles, dense_scores, normed, quick, random_layer, shapes, v3_attention


@given(shapes, st.booleans())
@quick
def test_exact_form_keeps_scores_and_values(shape, room_for_keys):
    kv_heads, repeats, head_dim, seed = shape
    weights, _, x = random_layer(kv_heads, repeats, head_dim, seed)
    tensors = exact_tensors(weights, head_dim, head_dim if room_for_keys else 0)
    scores, values = v3_attention(
        tensors, x[:7], kv_heads * repeats, kv_heads * head_dim, head_dim, angles(head_dim).repeat(kv_heads)
    )
    torch.testing.assert_close(scores, dense_scores(weights, x[:7], kv_heads, head_dim))
    expected = (x[:7] @ weights.value.T).view(7, kv_heads, head_dim).transpose(0, 1)
    torch.testing.assert_close(values, expected.repeat_interleave(repeats, dim=0), rtol=1e-6, atol=1e-6)


@given(shapes, st.booleans())
@quick
def test_exact_form_keeps_biases_and_unrotated_keys(shape, rotates):
    kv_heads, repeats, head_dim, seed = shape
    weights, _, x = random_layer(kv_heads, repeats, head_dim, seed, hidden=21)
    biased = Projections(*weights[:3], weights.output[:20], torch.arange(20.0).double())
    x = torch.cat([x[:7, :20], torch.ones(7, 1).double()], dim=1)
    tensors = exact_tensors(biased, head_dim, head_dim, rotates=rotates)
    query = x[:, :20] @ tensors["q_a_proj.weight"].T + tensors["q_a_proj.bias"]
    query = normed(query, tensors["q_a_layernorm.weight"], 1e-6) @ tensors["q_b_proj.weight"].T
    plain = tensors | {"q_proj.weight": torch.linalg.lstsq(x, query, driver="gelsd").solution.T}
    plain["kv_a_proj_with_mqa.weight"] = torch.cat(
        [tensors["kv_a_proj_with_mqa.weight"], tensors["kv_a_proj_with_mqa.bias"][:, None]], dim=1
    )
    del plain["kv_a_proj_with_mqa.bias"]
    turns = angles(head_dim) if rotates else 0 * angles(head_dim)
    q, k = (rotate_by_angles((x @ w.T).view(7, -1, head_dim).transpose(0, 1)[None], turns)[0] for w in weights[:2])
    wanted = q @ k.repeat_interleave(repeats, dim=0).mT / math.sqrt(head_dim)
    rope_angles = angles(head_dim).repeat(kv_heads)
    scores, values = v3_attention(plain, x, kv_heads * repeats, kv_heads * head_dim, head_dim, rope_angles)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)
    expected = (x @ weights.value.T).view(7, kv_heads, head_dim).transpose(0, 1)
    torch.testing.assert_close(values, expected.repeat_interleave(repeats, dim=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(tensors["o_proj.bias"], torch.arange(20.0).double())
