"""Damaged inputs of every kind: success or one clear line with status 2, bounded, and no file outside OUT touched."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.kinds import KINDS, Case, cases, run_case

MANY = 300
"""Cases of each kind in the slow tests."""
FEW = 25
"""Cases of each kind in the default tests."""


def check(kind: str, count: int) -> None:
    """Draws and runs cases, always the same; hypothesis prints the smallest one that fails."""

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
    @given(cases(kind))
    def run(case: Case) -> None:
        _, fault = run_case(case)
        assert not fault, fault

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_success_or_one_line(kind):
    check(kind, FEW)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_ends_in_success_or_one_line(kind):
    check(kind, MANY)
