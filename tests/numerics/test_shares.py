"""Processes that divide a computation: each has its share, and all have the whole result."""

import pytest
import torch

from smolseek.numerics.shares import Shares
from tests.together import JOIN, run_together


def test_a_single_process_has_all_the_work():
    shares, rows, parameter = Shares(), torch.arange(3), torch.ones(2, requires_grad=True)
    assert shares.leads and shares.own(rows).data_ptr() == rows.data_ptr() and len(shares.own(rows)) == 3
    assert shares.by_leader(lambda: 5) == shares.after_leader(lambda: 5) == 5
    assert shares.each(lambda item: item * 2, range(3)) == [0, 2, 4]
    (3 * parameter).sum().backward()
    shares.mean_gradients_([parameter], 7.0)
    shares.sum_(rows)
    shares.complete_([rows])
    assert parameter.grad.tolist() == [3, 3] and rows.tolist() == [0, 1, 2]


THREE = """
    import torch
    from torch.distributed import barrier
    from smolseek.numerics.shares import FailedElsewhere
    rank = shares.rank
    assert shares.size == 3 and shares.leads == (rank == 0)
    assert shares.own(torch.arange(5)).tolist() == [[0, 3], [1, 4], [2]][rank]
    computed = []
    assert shares.each(lambda item: computed.append(item) or item * 2, range(5)) == [0, 2, 4, 6, 8]
    assert computed == [[0, 3], [1, 4], [2]][rank]

    def slow():
        time.sleep(2 * TIMEOUT)
        return torch.arange(2)

    assert shares.by_leader(slow).tolist() == [0, 1]
    assert shares.after_leader(lambda: rank) == rank
    total = torch.tensor([1.0, rank])
    shares.sum_(total)
    assert total.tolist() == [3, 3]
    parts = torch.full((5, 2), float(rank)).split(1)
    shares.complete_(parts)
    assert torch.cat(parts)[:, 1].tolist() == [0, 1, 2, 0, 1]
    parameter = torch.zeros(2, requires_grad=True)
    if rank:  # the leading process has no rows
        (3 * rank * parameter).sum().backward()
    shares.mean_gradients_([parameter], rank)
    assert parameter.grad.tolist() == [5, 5]  # (1 * 3 + 2 * 6) / 3

    def fail(item=0):
        raise ValueError("too small")

    for failing, owner in ((lambda: shares.by_leader(fail), 0), (lambda: shares.each(fail, [0]), 0)):
        try:
            failing()
        except ValueError as error:
            assert str(error) == "too small" and isinstance(error, FailedElsewhere) == (rank != owner)
        else:
            raise AssertionError
    shares.wait()
    try:  # the time-out holds where all should be in step
        time.sleep(2 * TIMEOUT) if shares.leads else barrier()
    except RuntimeError as error:
        assert "imed out" in str(error), error
    else:
        assert shares.leads
"""


@pytest.mark.timeout(600)
def test_three_processes_stay_in_step_however_long_one_takes_alone():
    """The leading one takes twice as long as the time-out of a step that all take."""
    for status, _, error in run_together(3, "-c", (JOIN + THREE).replace("TIMEOUT", "3")):
        assert status == 0, error
