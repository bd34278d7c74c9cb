import math

import pytest
import torch
import torch.nn.functional as F

from smolseek.evaluation import measure_divergence, measure_specialisation
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


def test_specialisation_is_said_for_every_expert_layer():
    ids = random_ids(1, 150)[0]
    for groups, experts in ((1, 3), (4, 2)):
        model = tiny_v3(n_group=groups, topk_group=1, num_experts_per_tok=experts)
        found = measure_specialisation(model, ids)
        assert set(found) == {"weights", "routing"}
        assert all(set(by_layer) == {"1", "2"} for by_layer in found.values())
        assert found["weights"]["1"] == pytest.approx(2**0.5, rel=0.05)
        assert 0 <= found["routing"]["1"] <= 1
    assert measure_specialisation(StockModel(tiny_llama()), ids) == {}


def test_routing_by_the_token_alone_is_fully_explained():
    """Without attention the first expert layer sees nothing but the token."""
    model, ids = tiny_v3(first_k_dense_replace=0), random_ids(1, 4000)[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for router in (layer.mlp.gate for layer in model.model.layers):
        router.num_experts_per_tok = 1
    assert min(measure_specialisation(model, ids)["routing"].values()) > 0.97
