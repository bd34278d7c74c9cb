"""What `convert` prints at its end: losses, the texts that it was judged on, and a warning where they are far off."""

import json
import logging
import re
import shlex

import pytest

from smolseek.cli import VERBS, main, parse_verb
from tests.conversion.folders import write_source
from tests.text import write_stories
from tests.together import run_together

CALIBRATION = {"judged_tokens": 4096, "judged_apart": True}


@pytest.fixture
def convert(tmp_path, monkeypatch, caplog, capsys):
    """Runs the verb with a conversion that only writes a report; returns what is printed, and the warnings."""

    def run(losses, ratios):
        judged = [
            {"source": name, "dense_perplexity": 8.0, "perplexity": 8 * ratio, "ratio": ratio, "kl": 0.05}
            | {"tokens": 8176, "agreement": 0.875}
            for name, ratio in ratios.items()
        ]

        def report(source, out, *, judge, **_):
            assert judge == tuple(ratios)
            out.mkdir()
            cache = {"numbers_per_token": 320, "source_numbers_per_token": 384}
            tree = {"losses": losses, "calibration": CALIBRATION, "judged": judged, "seconds": 3.0, "cache": cache}
            (out / "conversion.json").write_text(json.dumps(tree))
            return out

        monkeypatch.setattr("smolseek.conversion.pipeline.convert", report)
        with caplog.at_level(logging.WARNING):
            out = str(tmp_path / "my out")
            options = ["--judge", *ratios] if ratios else []
            assert main(["convert", "owner/dense", out, "--calibration", "text.txt", *options]) == 0
        return capsys.readouterr().out, [record.getMessage() for record in caplog.records]

    return run


def test_a_line_for_each_judged_text(convert):
    out, warnings = convert({"dense": 1.0, "closed_form": 1.5, "refined": 1.05}, {"a.txt": 1.05, "b.txt": 1.1})
    assert "a.txt: dense perplexity 8.000, converted 8.400, ratio 1.050, KL 0.0500, same top token 87.5%\n" in out
    assert "b.txt: " in out and warnings == []
    assert "keeps 83.3% of the cache, in 3 s; next: " in out


@pytest.mark.parametrize(
    ("losses", "ratios", "words"),
    [
        (
            {"dense": 1.0, "closed_form": 1.2, "refined": 1.1},
            {},
            "1.11 times the dense model's on the calibration text",
        ),
        ({"dense": 1.0, "closed_form": 1.0}, {"a.txt": 1.2, "b.txt": 1.34}, "1.34 times the dense model's on b.txt"),
        ({}, {"a.txt": 1.2}, "1.20 times the dense model's on a.txt"),
    ],
)
def test_one_warning_says_how_far_it_is_and_what_to_do(losses, ratios, words, convert):
    _, (warning,) = convert(losses, ratios)
    assert words in warning and "\n" not in warning
    for remedy in ("calibration text", "more of the cache", "heal"):
        assert remedy in warning
    _, verb, *arguments = shlex.split(warning[warning.index("smolseek train") :])
    recipe = parse_verb(VERBS[verb][0], verb, arguments)
    assert recipe.source.endswith("/my out") and recipe.teacher == "owner/dense" and recipe.data.train == ("TEXT",)
    assert recipe.train.distill_weight


@pytest.mark.timeout(1200)
def test_the_first_of_several_processes_prints(tmp_path):
    source, text, other = write_source(tmp_path / "tiny"), tmp_path / "a.txt", tmp_path / "b.txt"
    for seed, path in enumerate((text, other)):
        write_stories(path, seed=seed)
    options = ("--calibration", str(text), "--calibration-windows", "9", "--refine-steps", "0", "--judge", str(other))
    command = ("-m", "smolseek", "convert", str(source), str(tmp_path / "out"), *options)
    (status, out, errors), silent = run_together(2, *command)
    assert status == 0 and "closed form  loss" in out and f"{other}: dense perplexity" in out, errors
    assert re.search(r"^closed form (\d+)/\1, ", errors, re.MULTILINE) and silent == (0, "", "")
    (status, out, errors), silent = run_together(2, *command)  # the folder is there
    assert status == 2 and not out and errors.startswith("smolseek: ") and errors.count("\n") == 1
    assert silent == (2, "", "")
