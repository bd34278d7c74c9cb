"""Streaming sums of outer products are the means that one plain product gives."""

import pytest
import torch

from smolseek.conversion.running_sum import OuterSum


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("channels", [5, 300], ids=["one strip", "two strips"])
def test_batches_add_up_to_the_mean_outer_product(channels, in_file, tmp_path):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(6, 4, width, generator=generator) for width in (channels, 7))
    files = [tmp_path / name if in_file else None for name in ("square", "cross")]
    square, cross = (OuterSum(file) for file in files)
    for rows in (slice(0, 2), slice(2, 6)):
        square.add(left[rows])
        cross.add(left[rows], right[rows])
    square.end()
    cross.end()
    left, right = (tokens.flatten(0, 1).double() for tokens in (left, right))
    torch.testing.assert_close(square.read(), left.T @ left / 24)
    torch.testing.assert_close(cross.read(), left.T @ right / 24)
    assert len(list(tmp_path.iterdir())) == 2 * in_file


def test_a_new_sum_starts_at_zero_where_an_old_file_lies(tmp_path):
    for _ in range(2):
        total = OuterSum(tmp_path / "sum")
        total.add(torch.ones(1, 2))
        assert torch.equal(total.read(), torch.ones(2, 2).double())
