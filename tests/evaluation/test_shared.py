"""Processes that share the windows of a text measure what one process measures."""

import pytest
import torch

from smolseek.evaluation import measure_balance, measure_quality, measure_specialisation
from smolseek.numerics.shares import Shares
from tests.factories import random_ids, tiny_v3


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_every_window_counts_once_and_all_have_equally_many(size):
    shares = [Played(size).of(rank).in_step("abcdefg") for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(window for share in shares for window, counts in share if counts) == list("abcdefg")
    assert {window for share in shares for window, counts in share if not counts} <= {"g"}


class Played:
    """Lets one process after the other measure; the last one gets the sums over all of them."""

    def __init__(self, size):
        self.size, self.totals = size, {}

    def of(self, rank):
        """What the process of that rank has."""
        shares, calls = Shares(), iter(range(1000))

        def sum_(tensor):
            call = next(calls)
            self.totals[call] = self.totals.get(call, 0) + tensor
            tensor.copy_(self.totals[call])

        shares.rank, shares.size, shares.sum_ = rank, self.size, sum_
        return shares

    def measure(self, function):
        return [function(self.of(rank)) for rank in range(self.size)][-1]


def test_three_processes_measure_what_one_does():
    model, ids_T = tiny_v3(), random_ids(1, 64 * 4 + 7)[0]
    counts_T = torch.arange(len(ids_T)) % 5 > 0

    def quality(**shares):
        return measure_quality(model, ids_T, 400, counts_T=counts_T, **shares)

    alone = quality()
    shared = Played(3).measure(lambda shares: quality(shares=shares))
    assert shared.loss == pytest.approx(alone.loss, rel=1e-12) and shared.tokens == alone.tokens
    for measure in (measure_balance, measure_specialisation):
        shared = Played(3).measure(lambda shares, measure=measure: measure(model, ids_T, shares=shares))
        assert shared == measure(model, ids_T)
