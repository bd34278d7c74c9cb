import math

import pytest
import torch
import torch.nn.functional as F

import smolseek.evaluation.quality
from smolseek.evaluation import combine_qualities, measure_quality
from smolseek.evaluation.quality import cut_windows
from tests.factories import logits_of, random_ids, tiny_v3


@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 31, 32, 100])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_strided_windows_predict_each_token_once_with_the_context_they_promise(tokens, stride):
    predicted = []
    for window in cut_windows(torch.arange(tokens), 16, stride):
        here = window.ids_T[window.first :].tolist()
        assert here and (window.ids_T[0] == 0 or window.first == 16 - stride)
        predicted += here
    assert predicted == list(range(1, tokens))


def test_strided_loss_is_that_of_each_token_after_its_own_context():
    model, ids, size, stride = tiny_v3(), random_ids(1, 75)[0], 16, 6
    total = 0.0
    with torch.no_grad():
        for token in range(1, 75):
            window = max(0, -(-(token - size + 1) // stride))  # the first window with the token
            context = ids[window * stride : token]
            logits = logits_of(model, context[None])[0, -1]
            total += F.cross_entropy(logits, ids[token]).item()
    quality = measure_quality(model, ids, 100, window_tokens=size, stride=stride)
    assert quality.tokens == 74
    assert quality.loss == pytest.approx(total / 74, rel=1e-5)
    assert quality.bits_per_byte == pytest.approx(total / 74 * 75 / math.log(2) / 100, rel=1e-5)


def test_many_logits_are_made_in_parts(monkeypatch):
    model, ids = tiny_v3(), random_ids(1, 150)[0]
    whole = measure_quality(model, ids, 100)
    monkeypatch.setattr(smolseek.evaluation.quality, "_CHUNK_LOGITS", 96 * 10)
    assert measure_quality(model, ids, 100).loss == pytest.approx(whole.loss, rel=1e-6)


def test_only_tokens_that_count_are_in_the_loss():
    model, ids = tiny_v3(), random_ids(1, 60)[0]
    counts = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.3
    quality = measure_quality(model, ids, 100, counts_T=counts, window_tokens=60)
    with torch.no_grad():
        losses = F.cross_entropy(logits_of(model, ids[None])[0, :-1], ids[1:], reduction="none")[counts[1:]]
    assert quality.tokens == len(losses) and quality.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    bits = quality.loss * counts.sum().item() / math.log(2) / 100
    assert quality.bits_per_byte == pytest.approx(bits, rel=1e-6)
    with pytest.raises(ValueError, match="the assistant says nothing"):
        measure_quality(model, ids, 100, counts_T=torch.zeros(60, dtype=torch.bool))


def test_progress_is_told_window_by_window():
    told = []
    measure_quality(tiny_v3(), random_ids(1, 150)[0], 1, on_window=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_texts_together_weigh_by_what_they_hold():
    model = tiny_v3()
    parts = [(measure_quality(model, random_ids(1, n, seed=n)[0], size), size) for n, size in ((40, 90), (64, 300))]
    (a, _), (b, _) = parts
    both = combine_qualities(parts)
    assert both.tokens == 39 + 63 and both.loss == pytest.approx((39 * a.loss + 63 * b.loss) / 102)
    assert both.bits_per_byte == pytest.approx((90 * a.bits_per_byte + 300 * b.bits_per_byte) / 390)
    assert combine_qualities(parts[:1]).bits_per_byte == pytest.approx(a.bits_per_byte)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (1, {}, "1 tokens: at least 2"),
        (9, {"window_tokens": 65}, "window_tokens 65: must be 2 to 64"),
        (9, {"window_tokens": 1}, "window_tokens 1: must be 2 to 64"),
        (9, {"window_tokens": 8, "stride": 8}, "stride 8: must be 1 to 7"),
        (9, {"stride": 0}, "stride 0: must be 1 to 63"),
    ],
)
def test_refusals(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        measure_quality(tiny_v3(), random_ids(1, tokens)[0], 1, **options)
