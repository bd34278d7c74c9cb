import pytest
import torch
from torch import nn

from smolseek.evaluation.needle import distances, measure_retrieval, random_tokens, text_pieces
from smolseek.evaluation.paired import Estimate, estimate, paired_difference, unpaired_difference
from smolseek.model import StockModel
from tests.factories import random_ids, tiny_llama

VOCAB = 96


class Copier(nn.Module):
    """A model that looks for an earlier copy of the last token, at most `reach` tokens back, and predicts the token
    that followed it."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.config = reach, StockModel(tiny_llama()).config
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def hidden_states(self, ids_BT):
        hidden_BTV = torch.zeros(*ids_BT.shape, VOCAB)
        for row, ids in enumerate(ids_BT.tolist()):
            for now, token in enumerate(ids):
                before = [t for t in range(max(0, now - self.reach), now) if ids[t] == token]
                if before:
                    hidden_BTV[row, now, ids[before[-1] + 1]] = 5.0
        return hidden_BTV


def test_distances_end_at_the_context():
    assert distances(64) == [16, 31] and distances(512) == [16, 32, 64, 128, 256, 479]
    with pytest.raises(ValueError, match="context of 40"):
        distances(40)


def test_a_copier_is_found_out_and_its_reach_too():
    source = random_tokens(VOCAB, special=[0, 1])
    near, far = measure_retrieval(Copier(reach=20), source, trials=8)
    assert (near.distance_tokens, far.distance_tokens) == (16, 31)
    assert near.accuracy > 0.6 and near.control_accuracy < 0.1 and near.gain.mean > 2
    assert abs(far.gain.mean) < 0.5
    everywhere = measure_retrieval(Copier(reach=64), source, trials=8)
    assert everywhere[1].gain.mean > 2


def test_the_seed_alone_decides_the_draws():
    model, source = StockModel(tiny_llama()), text_pieces(random_ids(1, 300)[0])
    first, again, other = (measure_retrieval(model, source, trials=2, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_special_tokens_are_not_drawn():
    drawn = random_tokens(6, special=[0, 3])(200, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 2, 4, 5}


def test_refusals():
    model = StockModel(tiny_llama())
    with pytest.raises(ValueError, match="text of 10 tokens"):
        measure_retrieval(model, text_pieces(random_ids(1, 10)[0]), trials=1)
    with pytest.raises(ValueError, match="trials 0"):
        measure_retrieval(model, random_tokens(VOCAB, []), trials=0)


def test_paired_differences_are_surer_than_unpaired_ones():
    ours, theirs = [1.0, 5.0, 9.0], [0.9, 5.1, 8.8]
    paired, unpaired = paired_difference(ours, theirs), unpaired_difference(estimate(ours), estimate(theirs))
    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx(0.2 / 3)
    assert paired.error is not None and unpaired.error is not None and 0 < paired.error < unpaired.error / 10
    assert estimate([2.0]) == Estimate(2.0, None) and str(Estimate(2.0, None)) == "2.0000"
