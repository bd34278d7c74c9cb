import json

import pytest

from smolseek.cli import main
from smolseek.reporting import png
from tests.reporting.folders import write_conversion, write_run


def test_a_page_and_its_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the report extra")
    folders = [str(write_run(tmp_path / "first")), str(write_run(tmp_path / "second", loss=2.0))]
    folders.append(str(write_conversion(tmp_path / "small", numbers=12)))
    out = tmp_path / "out" / "report.html"
    assert main(["report", *folders, "-o", str(out), "--png"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written[0] == str(out) and sorted(written) == sorted(map(str, out.parent.iterdir()))
    names = {path.name for path in out.parent.glob("*.png")}
    assert {"report-training-held-out-loss.png", "report-experts-of-first-load-of-every-expert.png"} <= names
    assert "report-conversion-tiny-perplexity-against-cache-kept.png" in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.parent.glob("*.png"))


def test_runs_of_like_names_have_pictures_of_their_own(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the report extra")
    folders = [str(write_run(tmp_path / name)) for name in ("run_1", "run-1", "ä", "ö")]
    assert main(["report", *folders, "-o", str(tmp_path / "out" / "report.html"), "--png"]) == 0
    assert len([*tmp_path.glob("out/report-experts-of-*load-of-every-expert*.png")]) == 4


def test_files_are_kept_unless_forced(tmp_path, capsys):
    command = ["report", str(write_run(tmp_path / "first")), "-o", str(tmp_path / "report.html")]
    for forced in ([], ["--force"]):
        (tmp_path / "report.html").write_text("precious")
        assert main([*command, *forced]) == 2
        error = capsys.readouterr().err
        assert "is no html file that smolseek wrote, and stays; name another" in error
        assert (tmp_path / "report.html").read_text() == "precious"
    (tmp_path / "report.html").write_text("<!DOCTYPE html>")
    assert main(command) == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>\n<html")


def test_a_picture_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in the report extra")
    folder, out = write_run(tmp_path / "first"), tmp_path / "out" / "report.html"

    def full(chart, figure):
        raise OSError("No space left on device")

    monkeypatch.setattr(png, "_draw_heat", full)
    assert main(["report", str(folder), "-o", str(out), "--png"]) == 2
    assert "No space left" in capsys.readouterr().err and list(out.parent.iterdir()) == []


def test_pictures_need_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(png.importlib.util, "find_spec", lambda name: None)
    assert main(["report", str(write_run(tmp_path / "first")), "-o", str(tmp_path / "a.html"), "--png"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'smolseek[report]'" in error and error.count("\n") == 1 and not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("folders", "words"), [(["."], "neither a run"), (["nowhere"], "neither a run"), ([], "no folder named")]
)
def test_what_is_not_ours(folders, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders, "-o", "a.html"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_no_torch_is_needed(tmp_path):
    import os
    import subprocess
    import sys

    from tests.runs import ROOT

    command = ["report", str(write_run(tmp_path / "first")), "-o", str(tmp_path / "a.html")]
    code = (
        f"import sys; from smolseek.cli import main; assert main({command!r}) == 0; assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", {"recipe": [1]}),
        ("run.json", {"versions": {"torch": 3}}),
        ("summary.json", {"trained_tokens": "many"}),
        ("converted/conversion.json", {"layers": [{"latent_error_weighted": "w"}]}),
        ("metrics.jsonl", {"step": 9, "loss": "low"}),
        ("metrics.jsonl", {"step": 9, "sample": "text"}),
        ("metrics.jsonl", {"step": 9, "sample": {"prompt": "\ud800", "text": ""}}),
    ],
)
def test_a_file_of_other_values_is_one_line_that_names_the_run(file, change, tmp_path, capsys):
    good, bad = (write_run(tmp_path / name) for name in ("good", "bad"))
    if file == "metrics.jsonl":
        with (bad / file).open("a") as lines:
            lines.write(json.dumps(change) + "\n")
    else:
        (bad / file).write_text(json.dumps(json.loads((bad / file).read_text()) | change))
    assert main(["report", str(good), str(bad), "-o", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert "bad" in error and "good" not in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
