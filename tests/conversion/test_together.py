"""Whole conversions by several processes equal those of one, but for the order of sums."""

import json

import pytest
import torch
from safetensors.torch import load_file

from smolseek.conversion.pipeline import convert
from smolseek.numerics import muon
from tests.conversion.folders import write_source
from tests.text import write_stories
from tests.together import JOIN, run_together

pytestmark = pytest.mark.timeout(1200)

CONVERT = """
    from smolseek.conversion import pipeline
    source, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

    def slowly(compute):
        def late(*arguments, **how):
            time.sleep(1.5 * TIMEOUT)
            return compute(*arguments, **how)
        return late

    quick = pipeline.read_named_text, pipeline.write_folder
    pipeline.read_named_text, pipeline.write_folder = map(slowly, quick)
    for name, fields in cases.items():
        pipeline.convert(source, f"{out}/{name}", shares=shares, **fields)
        pipeline.read_named_text, pipeline.write_folder = quick

    def stop(stage, done, count):
        if (stage, done) == ("refine layers", 1):
            raise KeyboardInterrupt

    pipeline.convert(source, f"{out}/stopped", shares=shares, on_progress=stop, **fields)
"""
"""Converts each case, the first one with two waits longer than the time-out, and the last one once more until its
second layer."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Settings of two conversions."""
    folder = tmp_path_factory.mktemp("texts")
    text, short = (str(write_stories(folder / f"{count}.txt", count)) for count in (60, 3))
    few = {"calibration_windows": 8, "calibration_window_tokens": 32, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    return {
        "few": few | {"calibration": [short], "refine_steps": 2, "distill_steps": 2},
        "carved": few
        | {"calibration": ["self", text], "calibration_windows": 24, "calibration_weights": [1, 200]}
        | {"experts": "carve", "refine_steps": 4, "distill_steps": 4},
    }


def test_two_processes_convert_as_one_does_and_one_goes_on_from_them(cases, tmp_path, fp32, monkeypatch):
    """Text, moments, layers, carving and the end-to-end stage; one batch for the moments, or fewer windows than
    processes, leave one without rows. The leading one takes longer alone than the others would wait in a step."""
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: False)
    source = write_source(tmp_path / "source")
    arguments = [str(source), str(tmp_path), json.dumps(cases)]
    outcomes = run_together(2, "-c", (JOIN + CONVERT).replace("TIMEOUT", "5"), *arguments)
    assert "KeyboardInterrupt" in outcomes[0][2] and all(status for status, *_ in outcomes), outcomes
    told = []
    convert(source, tmp_path / "stopped", on_progress=lambda *step: told.append(step), **cases["carved"])
    assert {stage for stage, *_ in told} == {"refine layers", "end-to-end KL"}
    for name, fields in cases.items():
        alone = convert(source, tmp_path / "alone" / name, **fields)
        for other in (name, "stopped") if name == "carved" else (name,):
            assert_alike(tmp_path / other, alone)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "few", "carved", "stopped", "alone"}


def assert_alike(folder, other):
    """Two conversions differ by rounding alone."""
    ours, theirs = (json.loads((path / "conversion.json").read_text()) for path in (folder, other))
    assert ours["calibration"] == theirs["calibration"] and ours["rope_slots"] == theirs["rope_slots"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3 * float(expected[name].abs().max()))
