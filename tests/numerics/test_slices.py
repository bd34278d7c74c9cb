import itertools

from hypothesis import given
from hypothesis import strategies as st

from smolseek.numerics.slices import even_slices


@given(st.integers(0, 50), st.integers(1, 12))
def test_slices_cover_everything_in_order_and_evenly(size, count):
    parts = [list(range(size))[part] for part in even_slices(size, count)]
    assert list(itertools.chain(*parts)) == list(range(size)) and len(parts) == count
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
