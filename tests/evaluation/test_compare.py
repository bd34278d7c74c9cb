import math

import pytest
import torch
import torch.nn.functional as F

from smolseek.evaluation import compare, measure_divergence, measure_quality
from smolseek.model import StockModel
from tests.factories import logits_of, random_ids, tiny_llama, tiny_v3


def test_divergence_is_kl_to_the_teacher_over_every_window():
    model, teacher, ids = tiny_v3(), StockModel(tiny_llama()), random_ids(1, 150)[0]  # windows of 64, 64 and 22
    divergence = measure_divergence(model, teacher, ids)
    kl, agreed = 0.0, 0
    with torch.no_grad():
        for window in ids.split(64):
            ours, theirs = (logits_of(m, window[None])[0].double().softmax(-1) for m in (model, teacher))
            kl += float((theirs * (theirs / ours).log()).sum())
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    assert divergence.tokens == 150
    assert divergence.kl == pytest.approx(kl / 150, rel=1e-4)
    assert divergence.agreement == pytest.approx(agreed / 150)


def test_a_model_does_not_diverge_from_itself():
    model = tiny_v3()
    divergence = measure_divergence(model, model, random_ids(1, 40)[0])
    assert divergence.to_dict() == {"kl": pytest.approx(0, abs=1e-6), "agreement": 1.0, "tokens": 40}


def test_a_uniform_model_is_the_teachers_missing_entropy_away():
    model, teacher, ids = tiny_v3(), tiny_v3(), random_ids(1, 30)[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        logits = logits_of(teacher, ids[None])[0]
        entropy = -(logits.log_softmax(-1) * F.softmax(logits, -1)).sum(-1).mean().item()
    expected = math.log(logits.shape[-1]) - entropy
    assert measure_divergence(model, teacher, ids).kl == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "ids, vocabulary, message", [(torch.empty(0, dtype=torch.long), None, "0 tokens"), (None, 200, "vocabular")]
)
def test_refusals(ids, vocabulary, message):
    other = tiny_llama() if vocabulary is None else tiny_llama(vocab_size=vocabulary)
    with pytest.raises(ValueError, match=message):
        measure_divergence(tiny_v3(), StockModel(other), random_ids(1, 8)[0] if ids is None else ids)


def test_every_predicted_token_is_compared_once_and_divided_three_ways():
    model, teacher = tiny_v3(), StockModel(tiny_llama())
    texts = {"a": random_ids(1, 150)[0], "b": random_ids(1, 90, seed=1)[0]}
    found = compare(model, teacher, texts)
    assert found.overall.tokens == 63 + 63 + 21 + 63 + 25
    for part in (found.by_text, found.by_context, found.by_frequency):
        assert sum(d.tokens for d in part.values()) == found.overall.tokens
        for value in ("kl", "loss", "teacher_loss", "agreement"):
            mean = sum(getattr(d, value) * d.tokens for d in part.values()) / found.overall.tokens
            assert mean == pytest.approx(getattr(found.overall, value))
    assert list(found.by_context) == ["1 to 15", "16 to 63"]
    for name, ids in texts.items():
        assert found.by_text[name].loss == pytest.approx(measure_quality(model, ids, 1).loss, rel=1e-6)
        assert found.by_text[name].teacher_loss == pytest.approx(measure_quality(teacher, ids, 1).loss, rel=1e-6)


def test_only_tokens_that_count_are_compared():
    model, teacher, ids = tiny_v3(), StockModel(tiny_llama()), random_ids(1, 150)[0]
    counts = torch.arange(150) % 3 == 0
    found = compare(model, teacher, {"a": ids}, counts={"a": counts})
    assert found.overall.loss == pytest.approx(measure_quality(model, ids, 1, counts_T=counts).loss, rel=1e-6)
    assert sum(d.tokens for d in found.by_context.values()) == found.overall.tokens < 60
    with pytest.raises(ValueError, match="silent: the assistant says nothing"):
        compare(model, teacher, {"a": ids, "silent": ids}, counts={"a": counts, "silent": counts & False})


def test_a_loss_far_back_is_found_in_its_bucket():
    """The model equals the teacher, but its hidden states are negated from position 16 on."""

    class Forgetful(StockModel):
        def hidden_states(self, *arguments, **options):
            hidden_BTD = super().hidden_states(*arguments, **options)
            return torch.cat([hidden_BTD[:, :16], -hidden_BTD[:, 16:]], dim=1)

    llama = tiny_llama()
    found = compare(Forgetful(llama), StockModel(llama), {"a": random_ids(1, 64)[0]}).by_context
    assert found["1 to 15"].kl == pytest.approx(0, abs=1e-6)
    assert found["16 to 63"].agreement < 1 and found["16 to 63"].kl > 0.1


def test_tokens_are_ranked_by_how_often_they_are_there():
    ids = torch.tensor([0] + [7] * 20 + list(range(10, 30)) * 2)
    found = compare(tiny_v3(), StockModel(tiny_llama()), {"a": ids}).by_frequency
    assert {name: d.tokens for name, d in found.items()} == {"1 to 10": 20 + 9 * 2, "11 to 100": 11 * 2}
