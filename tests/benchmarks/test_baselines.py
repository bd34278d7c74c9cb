"""The published methods: exact where they should be, in stock form, with the figures of their authors' code."""

import math
from pathlib import Path

import pytest
import torch
from baselines import (
    Cut,
    Sizes,
    TransMLA,
    assemble,
    block_weights,
    input_moments,
    mean_loss,
    rorope,
    supports,
    transmla_block,
    x_ecomla,
    x_ecomla_block,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from smolseek.checkpoint.hub import load_tokenizer, save
from smolseek.checkpoint.source import read_config
from smolseek.config import DataSettings
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from tests.factories import logits_of, random_ids, tiny_llama

DATA = Path(__file__).parents[3] / "shared" / "data"


def transmla(dense, windows, rope):
    return TransMLA(dense, dense.config.to_dict(), windows, rope)


def projections(dense):
    """Returns each layer's weights in float64."""
    return [block_weights(layer) for layer in dense.model.layers]


@given(st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)]), st.integers(0, 9))
def test_rorope_is_a_rotation_whose_first_rows_hold_the_most_energy_of_each_group(kv_heads, fold_and_stride, seed):
    fold, stride = fold_and_stride
    keys = torch.randn(64, kv_heads * 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = rorope(keys.T @ keys, 8, fold, stride)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4 * kv_heads, dtype=torch.float64))
    pairs = torch.complex(*keys.view(64, kv_heads, 2, 4).unbind(2)).flatten(1)
    energy = (pairs @ rotation.T.to(pairs.dtype)).abs().square().sum(0)
    groups, kept = 4 // fold, fold // stride
    rest = energy[groups * kept :].view(groups, -1)
    assert rest.numel() == 0 or all(
        energy[g * kept : (g + 1) * kept].min() >= rest[g].max() * (1 - 1e-9) for g in range(groups)
    )


@pytest.mark.parametrize("fold, exact", [(1, True), (4, False)])
def test_rotating_one_frequency_across_heads_is_exact_with_one_head_and_folding_is_not(fold, exact):
    dense, ids = tiny_llama(num_key_value_heads=1), random_ids(4, 24)
    moments = input_moments(dense, ids)
    blocks = [
        transmla_block(w, w.key @ x_DD @ w.key.T, x_DD, head_dim=8, fold=fold, sizes=Sizes(8, 8))
        for w, x_DD in zip(projections(dense), moments, strict=True)
    ]
    error = (logits_of(assemble(dense, dense.config.to_dict(), blocks, 8), ids) - logits_of(dense, ids)).abs().max()
    assert error < 1e-4 if exact else error > 0.01


def test_full_rank_pca_changes_nothing_and_less_rank_costs_more():
    dense, ids = tiny_llama(), random_ids(6, 24)
    method = transmla(dense, ids, 8)
    exact = logits_of(method.partial_rope, ids)
    errors = [(logits_of(method.cut(rank).joint_pca, ids) - exact).abs().max().item() for rank in (24, 16, 4)]
    assert errors[0] < 1e-4 < errors[1] < errors[2]


def test_stock_forms_differ_in_the_gain_alone_and_load_in_transformers(tmp_path):
    dense, ids = tiny_llama(), random_ids(4, 24)
    cut = transmla(dense, ids, 4).cut(12)
    state, repaired = cut.published.state_dict(), cut.repaired.state_dict()
    differ = {name for name, tensor in repaired.items() if not torch.equal(tensor, state[name])}
    assert differ == {f"model.layers.{i}.self_attn.kv_a_layernorm.weight" for i in range(2)}
    for model in (cut.repaired, x_ecomla(dense, dense.config.to_dict(), ids, Sizes(12, 4))):
        stock = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out", force=True)).eval()
        assert type(stock) is DeepseekV3ForCausalLM
        torch.testing.assert_close(logits_of(stock, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_the_average_key_of_one_head_is_its_key():
    dense, ids = tiny_llama(num_key_value_heads=1), random_ids(2, 24)
    blocks = [x_ecomla_block(weights, head_dim=8, sizes=Sizes(16, 8)) for weights in projections(dense)]
    model = assemble(dense, dense.config.to_dict(), blocks, 8)
    torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes, supported", [({}, True), ({"attention_bias": True}, False)])
def test_sources_that_the_baselines_take(changes, supported):
    assert supports(tiny_llama(**changes)) is supported


FIGURES = {
    Sizes(24, 8): (5.98, 8.55, 66.2, 21.8),
    Sizes(8, 8): (5.98, 26.6, 116, 56.7),
    Sizes(16, 4): (92.4, 93.8, 119, 84.5),
    Sizes(8, 4): (92.4, 96.0, 131, 88.2),
}
"""Perplexities of TransMLA's own code on this model and text.

They are of partial RoPE alone, of joint PCA without a norm, of the stock form, and of the stock form with its gain
repaired.
"""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside the checkout")
def test_transmla_reproduces_its_own_code_within_a_tenth(tmp_path):
    folder, text = DATA / "stories260K", DATA / "text"
    train = (text / "tinystories-train.txt").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(train[: len(train) * 3 // 4], encoding="utf-8")

    def windows(path, size):
        stream, *_ = pack(load_tokenizer(folder), held_out_documents(DataSettings(held_out=(str(path),))))
        return stream[: len(stream) // size * size].view(-1, size)

    packed = windows(tmp_path / "train.txt", 256)
    calibration = packed[torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))[:128]]
    held_out = windows(text / "tinystories-valid.txt", 512)[:117]
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    methods = {rope: TransMLA(dense, read_config(folder), calibration, rope) for rope in (8, 4)}
    for sizes, figures in FIGURES.items():
        cut: Cut = methods[sizes.rope].cut(sizes.rank)
        models = (methods[sizes.rope].partial_rope, cut.joint_pca, cut.published, cut.repaired)
        measured = [math.exp(mean_loss(model, held_out)) for model in models]
        assert measured == pytest.approx(figures, rel=0.1), sizes
