"""The start-up benchmark's commands run, and its table has a line for each."""

import startup


def test_every_command_runs_once() -> None:
    text = startup.report(startup.measure(1), "command")
    assert [line.split("|")[1].strip() for line in text.splitlines()[-3:]] == list(startup.COMMANDS)
