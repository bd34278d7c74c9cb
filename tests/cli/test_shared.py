"""What a long command shows of its progress, on a terminal and in a file."""

import io
import re
import sys

import pytest

from smolseek.cli import main
from smolseek.cli.shared import progress_bars


@pytest.fixture
def clock(monkeypatch):
    """Makes the time that lines tell; it stands still until a test moves it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("smolseek.cli.shared.time.monotonic", lambda: Clock.now)
    return Clock


def lines_of(clock, steps, capsys):
    """The lines on standard error after (seconds, stage, done, count), one after the other."""
    with progress_bars() as on_progress:
        for seconds, *told in steps:
            clock.now += seconds
            on_progress(*told)
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()


def test_a_line_for_each_layer_with_time_and_time_left(clock, capsys):
    steps = [(0, "refine layers", 0, 4)] + [(70, "refine layers", done, 4) for done in range(1, 5)]
    assert lines_of(clock, steps, capsys) == [
        "refine layers 0/4, 0:00",
        "refine layers 1/4, 1:10, about 3:30 left",
        "refine layers 2/4, 2:20, about 2:20 left",
        "refine layers 3/4, 3:30, about 1:10 left",
        "refine layers 4/4, 4:40",
    ]


def test_a_line_for_each_tenth_of_many_steps(clock, capsys):
    steps = [(30, "end-to-end KL", done, 600) for done in range(1, 601)]
    lines = lines_of(clock, steps, capsys)
    assert [line.split()[2] for line in lines] == ["1/600,", *(f"{done}/600," for done in range(60, 601, 60))]
    assert lines[1] == "end-to-end KL 60/600, 29:30, about 4:30:00 left"


def test_no_lines_close_together_but_the_last_of_each_stage(clock, capsys):
    steps = [(0.5, stage, done, 10) for stage in ("closed form", "refine layers") for done in range(11)]
    assert [line.split(",")[0] for line in lines_of(clock, steps, capsys)] == [
        "closed form 0/10",
        "closed form 4/10",
        "closed form 8/10",
        "closed form 10/10",
        "refine layers 3/10",
        "refine layers 7/10",
        "refine layers 10/10",
    ]


def test_layers_that_were_finished_before_do_not_shorten_the_time_left(clock, capsys):
    read = [(0.01, "refine layers", done, 30) for done in range(21)]
    steps = read + [(60, "refine layers", done, 30) for done in range(21, 27)]
    assert lines_of(clock, steps, capsys)[-1] == "refine layers 26/30, 6:00, about 4:00 left"


def test_a_second_stage_of_the_same_name_has_a_clock_of_its_own(clock, capsys):
    steps = [(60, "train", done, 4) for done in (1, 2, 3, 4, 1, 2)]
    assert lines_of(clock, steps, capsys)[-2:] == ["train 1/4, 0:00", "train 2/4, 1:00, about 2:00 left"]


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bars() as on_progress:
        for stage in ("judge", "refine layers", "judge"):
            for done in range(4):
                on_progress(stage, done, 3)
        assert terminal.getvalue().count("\n") == 3  # each bar ends before the next begins
    assert len(re.findall(r"judge: 100%", terminal.getvalue())) == 2
    assert re.search(r"refine layers: 100%\|.*\| 3/3 \[00:00<00:00", terminal.getvalue())


@pytest.mark.parametrize("arguments", [["convert", "a"], ["convert", "a", "b", "--device", "tpu"]])
def test_one_of_torchruns_processes_tells_of_a_mistake_that_all_have(arguments, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("smolseek: ")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and capsys.readouterr() == ("", "")
