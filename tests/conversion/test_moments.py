"""The calibration pass against slow and plain versions of itself."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from smolseek.conversion import moments
from smolseek.conversion.moments import (
    ROTATED,
    SLOT,
    UNROTATED,
    VALUE,
    collect_mlp_inputs,
    collect_moments,
    norm_moments,
    rotate,
    sample_labels,
)
from smolseek.numerics import precision
from tests.factories import random_ids, tiny_dense, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Plain products, as the slow versions have them; bf16 has a test of its own."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)


def angles(model):
    return model.model.rotary_emb.inv_freq.clone()


def test_probing_changes_neither_the_output_nor_the_model(model, tmp_path):
    ids, before = random_ids(2, 12), model.config._attn_implementation
    seen = []
    handle = model.model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state.detach()))
    collect_moments(model, ids, angles(model), seed=0, folder=tmp_path)
    handle.remove()
    torch.testing.assert_close(seen[0], model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_fisher_is_the_mean_outer_product_of_gradients_at_sampled_labels(model, tmp_path):
    """Rotated keys and values by autograd through transformers' own attention, one position of one window."""
    ids = random_ids(1, 9)
    kept = {}
    hooks = [
        getattr(model.model.layers[1].self_attn, f"{n}_proj").register_forward_hook(
            lambda _, a, o, n=n: kept.update({n: o})
        )
        for n in "kv"
    ]
    logits = model(ids).logits
    labels = sample_labels(logits.softmax(-1)[0], torch.Generator().manual_seed(3)).T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    key, value = (g[0].double() for g in torch.autograd.grad(loss, [kept["k"], kept["v"]]))
    for hook in hooks:
        hook.remove()
    layer = collect_moments(model, ids, angles(model), seed=3, folder=tmp_path)[1]()
    for path, gradient in ((ROTATED, key), (VALUE, value)):
        torch.testing.assert_close(layer.fisher([path], [path]), gradient.T @ gradient / 9, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.fisher([VALUE], [ROTATED]), value.T @ key / 9, rtol=1e-3, atol=1e-6)


def test_paths_agree_exactly_when_they_turn_alike(model, tmp_path):
    still = torch.zeros_like(angles(model))
    as_source = collect_moments(model, random_ids(2, 10), angles(model), seed=0, folder=tmp_path)[0]()
    unturned = collect_moments(model, random_ids(2, 10), still, seed=0, folder=tmp_path)[0]()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    close(as_source.fisher([SLOT], [SLOT]), as_source.fisher([ROTATED], [ROTATED]))
    close(unturned.fisher([SLOT], [SLOT]), unturned.fisher([UNROTATED], [UNROTATED]))
    assert not torch.allclose(as_source.fisher([SLOT], [SLOT]), as_source.fisher([UNROTATED], [UNROTATED]), rtol=0.1)


def test_input_and_norm_moments_are_those_of_the_block_input(model, tmp_path):
    ids = random_ids(3, 8)
    inputs = []
    projection = model.model.layers[0].self_attn.k_proj
    handle = projection.register_forward_hook(
        lambda _, args, out: inputs.append(args[0].detach().flatten(0, 1).double())
    )
    model(ids)
    handle.remove()
    x = inputs[0]
    encoder = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).double()
    layer = collect_moments(model, ids, angles(model), seed=0, folder=tmp_path)[0]()
    norm = norm_moments(layer, encoder)
    c = x @ encoder.T
    n = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer.input_DD, x.T @ x / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.latent_RR, n.T @ n / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.cross_DR, x.T @ n / 24, rtol=1e-5, atol=1e-6)


def test_keys_and_queries_are_seen_behind_their_norms(tmp_path):
    """Qwen3: E[z xᵀ] and E[z²] of what RoPE gets, and the gradient there, as autograd has them."""
    model, ids = tiny_dense("qwen3", head_dim=8), random_ids(1, 9)
    attention, kept = model.model.layers[1].self_attn, {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=n: kept.update({n: (args[0], out)}))
        for n, module in {"q": attention.q_norm, "k": attention.k_norm, "v": attention.v_proj}.items()
    ]
    logits = model(ids).logits
    labels = sample_labels(logits.softmax(-1)[0], torch.Generator().manual_seed(3)).T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    key = torch.autograd.grad(loss, kept["k"][1])[0][0].flatten(1).double()
    for hook in hooks:
        hook.remove()
    layer = collect_moments(model, ids, angles(model), seed=3, folder=tmp_path)[1]()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    close(layer.fisher([ROTATED], [ROTATED]), key.T @ key / 9)
    x = kept["v"][0][0].detach().double()
    z = torch.cat([kept[n][1][0].detach().flatten(1) for n in "qk"], dim=1).double()
    close(layer.input_DD, x.T @ x / 9)
    close(layer.heads_ZD, z.T @ x / 9)
    close(layer.heads_energy_Z, z.square().mean(0))


def test_same_seed_same_moments_another_seed_others(model, tmp_path):
    ids = random_ids(2, 8)
    first, again, other = (collect_moments(model, ids, angles(model), seed=s, folder=tmp_path)[0]() for s in (0, 0, 1))
    assert torch.equal(first.fisher_PKPK, again.fisher_PKPK)
    assert not torch.equal(first.fisher_PKPK, other.fisher_PKPK)


def test_bf16_products_change_the_moments_less_than_the_draw_of_labels_does(model, tmp_path, monkeypatch):
    ids = random_ids(64, 32)
    plain, other = (collect_moments(model, ids, angles(model), seed=s, folder=tmp_path)[1]() for s in (0, 1))
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    rounded = collect_moments(model, ids, angles(model), seed=0, folder=tmp_path)[1]()
    assert not torch.equal(rounded.input_DD, plain.input_DD)
    assert (rounded.input_DD - plain.input_DD).norm() / plain.input_DD.norm() < 0.01
    drawn = (other.fisher_PKPK - plain.fisher_PKPK).norm()
    assert (rounded.fisher_PKPK - plain.fisher_PKPK).norm() < 0.5 * drawn


def test_spilled_moments_are_the_same(model, tmp_path, monkeypatch):
    ids = random_ids(3, 10)
    held = [read() for read in collect_moments(model, ids, angles(model), seed=0, folder=tmp_path)]
    monkeypatch.setattr(moments, "_SPILL_BYTES", 0)
    spilled = [read() for read in collect_moments(model, ids, angles(model), seed=0, folder=tmp_path)]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "0-inputs", "1-inputs"}
    for ours, theirs in zip(spilled, held, strict=True):
        assert torch.equal(ours.fisher_PKPK, theirs.fisher_PKPK) and torch.equal(ours.input_DD, theirs.input_DD)


def test_rotate_is_transformers_rope(model):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(1, 2, 6, 8)
    cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
    torch.testing.assert_close(rotate(x, angles(model)), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_mlp_inputs_are_spread_over_the_windows(model):
    inputs = collect_mlp_inputs(model, random_ids(4, 16), tokens=16)
    assert [tuple(x.shape) for x in inputs] == [(4, 4, 32)] * 2


def test_labels_come_as_often_as_they_are_likely_and_never_where_they_are_not():
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = sample_labels(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=6) / len(drawn)
    torch.testing.assert_close(shares, p, rtol=0, atol=0.02)
    assert set(drawn.unique().tolist()) == {1, 3, 4}


def test_moments_do_not_depend_on_how_many_windows_or_queries_are_taken_at_once(model, monkeypatch, tmp_path):
    ids = random_ids(4, 10)
    together = collect_moments(model, ids, angles(model) / 3, seed=0, folder=tmp_path)[1]()
    monkeypatch.setattr(moments, "_QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(moments, "_GRADIENT_TOKENS_AT_ONCE", 1)
    parts = collect_moments(model, ids, angles(model) / 3, seed=0, folder=tmp_path)[1]()
    torch.testing.assert_close(parts.fisher_PKPK, together.fisher_PKPK, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(parts.input_DD, together.input_DD, rtol=1e-5, atol=1e-7)
