import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolseek.reporting.charts import (
    MAX_POINTS,
    HeatMap,
    HeatPanel,
    Line,
    LineChart,
    downsample,
    downsample_columns,
    heat_level,
    log_ticks,
    round_ticks,
    x_scale,
    y_scale,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def chart_of(ys, xs=None, **options):
    return LineChart("", "", "step", [Line("a", xs or list(range(len(ys))), ys)], **options)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
def test_everything_lies_within_the_scale(ys, from_zero):
    up = y_scale(chart_of(ys, from_zero=from_zero))
    assert all(-1e-6 <= up(value) <= 1 + 1e-6 for value in [*ys, *up.ticks])
    assert 2 <= len(up.ticks) <= 7


@given(st.floats(1e-3, 1e3), st.floats(3.1, 1e5))
def test_a_logarithmic_scale_holds_everything_too(low, ratio):
    up = y_scale(chart_of([low, low * ratio], log=True))
    assert up.log and 0 <= up(low) < up(low * ratio) <= 1 + 1e-9
    assert up(math.sqrt(up.low * up.high)) == pytest.approx(0.5)


def test_ticks_are_round():
    assert round_ticks(0, 12000, 4) == [0, 5000, 10000, 15000]
    assert round_ticks(1.03, 1.17, 4) == [1.0, 1.05, 1.1, 1.15, 1.2]
    assert log_ticks(1.02, 13) == [1, 2, 5, 10, 20]
    assert x_scale(chart_of([1, 2, 3], xs=[25, 37.5, 50], each_x=True)).ticks == [25, 37.5, 50]
    assert x_scale(chart_of([1.0])).ticks == [0]


def test_a_flat_or_empty_line_has_a_scale():
    for ys in ([2.0, 2.0], [0.0], []):
        up = y_scale(chart_of(ys))
        assert up.high > up.low


def test_long_lines_are_means_of_stretches():
    line = downsample(Line("a", range(12000), [1.0, 3.0] * 6000))
    assert len(line.xs) == MAX_POINTS and set(line.ys) == {2.0} and line.xs[0] == pytest.approx(24.5)
    heat = downsample_columns(HeatMap("", "", list(range(100)), [HeatPanel("a", [[0.0, 2.0] * 50])]), 10)
    assert heat.xs == [4.5 + 10 * n for n in range(10)] and heat.panels[0].rows == [[1.0] * 10]


def test_the_colour_of_a_fair_share_is_the_middle_one():
    assert [heat_level(load) for load in (0, 0.3, 1.0, 1.2, 9.0)] == [0, 1, 4, 5, 8]
