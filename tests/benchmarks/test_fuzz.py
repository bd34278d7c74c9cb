"""The benchmark of damaged inputs counts and groups how cases end."""

import fuzz
import pytest
from hypothesis import find

from tests.fuzz.engine import Outcome
from tests.fuzz.kinds import KINDS, Case, cases

REFUSED = "smolseek: checkpoint /tmp/x/m: model_type 'a/b' has 3 heads; fetch it again\n"
RAISED = 'Traceback\n  File "/x/smolseek/cli/__init__.py", line 3\n  File "/x/smolseek/run.py", line 7\nKeyError: 3'


def outcome(status, stderr="", error="", seconds=0.5):
    return Outcome(status, "", stderr, error, seconds, growth=2_000_000)


def test_a_table_of_all_cases(capsys):
    tally, case = fuzz.Tally(), Case("plan", [])
    for end in (outcome(0), outcome(2, REFUSED, seconds=1.5), outcome(2, REFUSED), outcome(None, error=RAISED)):
        tally.add(case, end, end.fault("plan"))
    text = fuzz.report([tally.row("config.json")], "command")
    row = next(line for line in text.splitlines() if line.startswith("| config.json"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["4", "1", "2", "2 × checkpoint PATH: model_type … has N heads", "1", "1.5", "2"]
    assert "1 × run.py:7 KeyError; for example `Case(command='plan'" in text
    assert "KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        (outcome(1), "status 1"),
        (outcome(2), "0 lines"),
        (outcome(2, REFUSED * 2), "2 lines"),
        (outcome(0, REFUSED), "1 lines"),
        (outcome(2, "smolseek: 'utf-8' codec can't decode byte 0xff\n"), "names no input"),
        (outcome(2, f"smolseek: a: {'x' * 2000}\n"), "characters"),
        (outcome(0, seconds=1000), "1000 seconds"),
        (outcome(0, "Traceback (most recent call last):\n"), "raised"),
    ],
)
def test_what_is_a_fault(end, fault):
    assert fault in end.fault("plan")
    assert outcome(1).fault("check") == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_says_how_to_make_it_again(kind):
    import tests.fuzz.changes as changes

    case = find(cases(kind), lambda case: bool(case.changes))
    assert eval(repr(case), vars(changes) | {"Case": Case, "nan": float("nan"), "inf": float("inf")}) == case  # noqa: S307
