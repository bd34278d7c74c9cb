"""The README's commands are run, the hub's model replaced by a tiny local one and the text by a small file."""

from tests.pages import ROOT, commands, walk

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_first():
    assert commands(README)[:2] == ["make run", "make test"]


def test_the_walk_through_runs(tmp_path, monkeypatch, capsys):
    ran = walk(README, tmp_path, monkeypatch, capsys)
    assert {"plan", "convert", "eval", "train", "chat", "report", "check", "export"} <= ran
