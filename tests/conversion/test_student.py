"""The converted model in memory: what it shares with the dense model, and how far it is from it."""

import pytest
import torch

from smolseek.config import ConvertSettings
from smolseek.conversion.mla.exact import exact_tensors
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.student import assemble, mean_divergence, mean_loss, own_weights
from smolseek.conversion.target import target_config
from smolseek.formats.dense import read_source
from smolseek.model import StockModel
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.experts import MixtureOfExperts
from tests.factories import logits_of, random_ids


@pytest.fixture
def student(teacher):
    """The dense model with every attention block in the exact form."""
    source = read_source(teacher.config.to_dict())
    blocks = [
        Projections(*(getattr(layer.self_attn, f"{letter}_proj").weight.double() for letter in "qkvo"))
        for layer in teacher.model.layers
    ]
    target = target_config(source, ConvertSettings(exact=True))
    return assemble(teacher, target, [exact_tensors(weights, source.head_dim, 0) for weights in blocks])


def test_exact_blocks_make_a_model_that_is_no_distance_from_the_dense_one(teacher, student):
    windows_BT = random_ids(3, 16)
    torch.testing.assert_close(logits_of(student, windows_BT), logits_of(teacher, windows_BT), rtol=0, atol=1e-4)
    assert mean_divergence(student, teacher, windows_BT) == pytest.approx(0.0, abs=1e-5)
    assert mean_loss(student, windows_BT) == pytest.approx(mean_loss(StockModel(teacher), windows_BT), abs=1e-5)


def test_unconverted_weights_are_shared_until_they_are_to_be_trained(teacher, student):
    theirs, tied = teacher.model.embed_tokens.weight, student.lm_head.weight
    assert tied is student.model.embed_tokens.weight and tied.data_ptr() == theirs.data_ptr()
    assert not own_weights(student, (MixtureOfExperts,)), "there are no experts"
    attention = own_weights(student, (MultiheadLatentAttention,))
    assert attention and all(".self_attn." in name for name in attention)
    assert tied.data_ptr() == theirs.data_ptr()
    trained = own_weights(student)
    assert set(trained) == {name for name, _ in student.named_parameters()}
    assert tied is student.model.embed_tokens.weight and tied.data_ptr() != theirs.data_ptr()
