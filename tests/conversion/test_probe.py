"""The probe: it changes nothing, and sees the gradient on every path of the keys."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from smolseek.conversion.collect import collect_moments, sample_labels
from smolseek.conversion.moments import ROTATED, SLOT, UNROTATED
from smolseek.conversion.probe import rotate_by_angles, token_weights
from tests.factories import random_ids, tiny_dense

pytestmark = pytest.mark.usefixtures("fp32")


def test_probing_changes_neither_the_output_nor_the_model(dense, angles, tmp_path):
    ids, before = random_ids(2, 12), dense.config._attn_implementation
    seen = []
    handle = dense.model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state.detach()))
    collect_moments(dense, ids, angles, seed=0, folder=tmp_path)
    handle.remove()
    torch.testing.assert_close(seen[0], dense.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert dense.config._attn_implementation == before
    assert all(p.requires_grad for p in dense.parameters())
    assert not any(m._forward_hooks for m in dense.modules())


def test_paths_agree_exactly_when_they_turn_alike(dense, angles, tmp_path):
    still = torch.zeros_like(angles)
    as_source = collect_moments(dense, random_ids(2, 10), angles, seed=0, folder=tmp_path)[0]()
    unturned = collect_moments(dense, random_ids(2, 10), still, seed=0, folder=tmp_path)[0]()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    close(as_source.fisher([SLOT], [SLOT]), as_source.fisher([ROTATED], [ROTATED]))
    close(unturned.fisher([SLOT], [SLOT]), unturned.fisher([UNROTATED], [UNROTATED]))
    assert not torch.allclose(as_source.fisher([SLOT], [SLOT]), as_source.fisher([UNROTATED], [UNROTATED]), rtol=0.1)


def test_keys_and_queries_are_seen_behind_their_norms(tmp_path):
    """In Qwen3, E[z xᵀ], E[z²] and the gradient are of the normed queries and keys, as autograd gives them."""
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
    layer = collect_moments(model, ids, model.model.rotary_emb.inv_freq, seed=3, folder=tmp_path)[1]()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    weight = torch.cat([weight for _, weight in layer.inputs()]).double()
    close(layer.fisher([ROTATED], [ROTATED]), (key / weight).T @ key / 9)
    x = kept["v"][0][0].detach().double()
    z = torch.cat([kept[n][1][0].detach().flatten(1) for n in "qk"], dim=1).double()
    close(layer.input_XX, (weight * x).T @ x / 9)
    close(layer.heads_ZX, (weight * z).T @ x / 9)
    close(layer.heads_energy_Z, (weight * z.square()).mean(0))


def test_a_token_weighs_by_the_root_of_its_gradients_energy():
    first = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [1.0, 1.0], [0.0, 0.0]]])
    second = torch.tensor([[[0.0], [0.0], [2.0], [0.0]]])
    shares = (torch.tensor([25.0, 25.0, 2.0, 0.0]) / 13 + torch.tensor([0.0, 0.0, 4.0, 0.0])) / 2
    roots = torch.tensor([*shares[:3].sqrt(), 0.1])
    torch.testing.assert_close(token_weights(first, second)[0, :, 0], roots / roots.mean())
    assert torch.equal(token_weights(torch.zeros(2, 3, 4)), torch.ones(2, 3, 1))  # where nothing matters


def test_the_first_token_weighs_most_where_all_attend_to_it(tmp_path):
    """The gradient finds an attention sink by itself."""
    model, ids = tiny_dense("llama"), random_ids(4, 12)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # every token attends to all before it alike
    layer = collect_moments(model, ids, model.model.rotary_emb.inv_freq, seed=3, folder=tmp_path)[0]()
    weights = torch.cat([weight for _, weight in layer.inputs()]).view(4, 12).mean(0)
    assert weights.argmax() == 0 and weights[-1] < 1 and weights.mean() == pytest.approx(1.0)


def test_rotation_is_transformers_rope(dense, angles):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(1, 2, 6, 8)
    cos, sin = dense.model.rotary_emb(x, torch.arange(6)[None])
    torch.testing.assert_close(rotate_by_angles(x, angles), apply_rotary_pos_emb(x, x, cos, sin)[0])
