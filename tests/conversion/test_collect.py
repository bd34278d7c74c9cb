"""The calibration pass against slow and plain versions of itself."""

import pytest
import torch
from torch.nn import functional as F

from smolseek.conversion import collect, probe
from smolseek.conversion.collect import collect_mlp_inputs, collect_moments, sample_labels
from smolseek.conversion.moments import ROTATED, VALUE
from smolseek.numerics import precision
from tests.factories import random_ids

pytestmark = pytest.mark.usefixtures("fp32")


def test_fisher_is_the_weighted_mean_outer_product_of_gradients_at_sampled_labels(dense, angles, tmp_path):
    """Compares rotated keys and values with autograd through transformers' own attention, on one window."""
    ids = random_ids(1, 9)
    kept = {}
    hooks = [
        getattr(dense.model.layers[1].self_attn, f"{n}_proj").register_forward_hook(
            lambda _, a, o, n=n: kept.update({n: o})
        )
        for n in "kv"
    ]
    logits = dense(ids).logits
    labels = sample_labels(logits.softmax(-1)[0], torch.Generator().manual_seed(3)).T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    key, value = (g[0].double() for g in torch.autograd.grad(loss, [kept["k"], kept["v"]]))
    for hook in hooks:
        hook.remove()
    layer = collect_moments(dense, ids, angles, seed=3, folder=tmp_path)[1]()
    weight = torch.cat([weight for _, weight in layer.inputs()]).double()
    for one, other, left, right in (
        (ROTATED, ROTATED, key, key),
        (VALUE, VALUE, value, value),
        (VALUE, ROTATED, value, key),
    ):
        expected = (left / weight).T @ right / 9
        torch.testing.assert_close(layer.fisher([one], [other]), expected, rtol=1e-3, atol=1e-6)


def test_same_seed_same_moments_another_seed_others(dense, angles, tmp_path):
    ids = random_ids(2, 8)
    first, again, other = (collect_moments(dense, ids, angles, seed=s, folder=tmp_path)[0]() for s in (0, 0, 1))
    assert torch.equal(first.fisher_4k4k, again.fisher_4k4k)
    assert not torch.equal(first.fisher_4k4k, other.fisher_4k4k)


def test_bf16_products_change_the_moments_less_than_the_draw_of_labels_does(dense, angles, tmp_path, monkeypatch):
    ids = random_ids(64, 32)
    plain, other = (collect_moments(dense, ids, angles, seed=s, folder=tmp_path)[1]() for s in (0, 1))
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    rounded = collect_moments(dense, ids, angles, seed=0, folder=tmp_path)[1]()
    assert not torch.equal(rounded.input_XX, plain.input_XX)
    assert (rounded.input_XX - plain.input_XX).norm() / plain.input_XX.norm() < 0.01
    drawn = (other.fisher_4k4k - plain.fisher_4k4k).norm()
    assert (rounded.fisher_4k4k - plain.fisher_4k4k).norm() < 0.5 * drawn


def test_spilled_moments_are_the_same(dense, angles, tmp_path, monkeypatch):
    ids = random_ids(3, 10)
    held = [read() for read in collect_moments(dense, ids, angles, seed=0, folder=tmp_path)]
    monkeypatch.setattr(collect, "SPILL_BYTES", 0)
    spilled = [read() for read in collect_moments(dense, ids, angles, seed=0, folder=tmp_path)]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "0-inputs", "1-inputs"}
    for ours, theirs in zip(spilled, held, strict=True):
        assert torch.equal(ours.fisher_4k4k, theirs.fisher_4k4k) and torch.equal(ours.input_XX, theirs.input_XX)


def test_mlp_inputs_are_spread_over_the_windows(dense):
    inputs = collect_mlp_inputs(dense, random_ids(4, 64), tokens=64)
    assert [tuple(x.shape) for x in inputs] == [(4, 16, 32)] * 2


@pytest.mark.parametrize(("windows", "shape"), [((64, 2), (4, 2, 32)), ((32, 48), (1, 12, 32))])
def test_of_many_windows_some_are_read_so_that_more_than_their_first_tokens_are_there(windows, shape, dense):
    inputs = collect_mlp_inputs(dense, random_ids(*windows), tokens=8 if windows[1] == 2 else 12)
    assert [tuple(x.shape) for x in inputs] == [shape] * 2


def test_labels_come_as_often_as_they_are_likely_and_never_where_they_are_not():
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = sample_labels(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=6) / len(drawn)
    torch.testing.assert_close(shares, p, rtol=0, atol=0.02)
    assert set(drawn.unique().tolist()) == {1, 3, 4}


def test_moments_do_not_depend_on_how_many_windows_or_queries_are_taken_at_once(dense, angles, monkeypatch, tmp_path):
    ids = random_ids(4, 10)
    together = collect_moments(dense, ids, angles / 3, seed=0, folder=tmp_path)[1]()
    monkeypatch.setattr(probe, "_QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(collect, "CALIBRATION_BATCH_TOKENS", {"cpu": 1})
    parts = collect_moments(dense, ids, angles / 3, seed=0, folder=tmp_path)[1]()
    torch.testing.assert_close(parts.fisher_4k4k, together.fisher_4k4k, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(parts.input_XX, together.input_XX, rtol=1e-5, atol=1e-7)
