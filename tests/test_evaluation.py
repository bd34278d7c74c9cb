import math

import pytest
import torch
import torch.nn.functional as F

from smolseek.evaluation import measure_divergence
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
