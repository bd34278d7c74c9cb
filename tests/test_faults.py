"""Real faults in processes of their own: kills, kills while a checkpoint is written, full disks, damaged files."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest

from smolseek.checkpoint.state import find_damage
from tests.runs import finish, scratch_recipe, start, wait_for

pytestmark = pytest.mark.timeout(1200)  # each test is several processes, on machines that are shared
DIES_WRITING = """
import os, signal
import smolseek.checkpoint.state as state
save_file, calls = state.save_file, []
def die(tensors, path):
    calls.append(path)
    save_file(tensors, path)
    if len(calls) == {call}:
        os.truncate(path, os.path.getsize(path) * 2 // 3)
        os.kill(os.getpid(), signal.SIGKILL)
state.save_file = die
"""
"""A child process that is killed when two thirds of its checkpoint number `call` are written."""
DIES_RENAMING = """
import os, pathlib, signal
rename, calls = pathlib.Path.rename, []
def die(self, target):
    if ".partial-" in self.name and "step-" in self.name:
        calls.append(self)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = die
"""
"""A child process that is killed when checkpoint number `call` is written but not yet renamed."""


def result(runs):
    """Returns what a run wrote: its weights as bytes, and its logs without times."""
    folder = runs / "scratch"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = (folder / "logs.txt").read_text().split("decode tok/s")[0]
    for line in lines:
        for timed in ("tokens_per_second", "data_wait_share"):
            line.pop(timed, None)
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("model", "best")}
    return {"weights": weights, "metrics": lines, "logs": logs}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run without faults."""
    folder = tmp_path_factory.mktemp("reference")
    finish(start(scratch_recipe(folder), folder / "runs"))
    return result(folder / "runs")


def kill_and_resume(recipe, runs, faults, draw):
    """Start the run; let each fault stop it and resume it; at last let it run to the end."""
    for number, fault in enumerate(faults):
        options = ["--resume"] if number else []
        if fault in (DIES_WRITING, DIES_RENAMING):
            prelude = fault.format(call=draw.randint(1, 8))
            assert finish(start(recipe, runs, *options, prelude=prelude), -signal.SIGKILL) is not None
            continue
        process = start(recipe, runs, *options)
        wait_for(runs / "scratch", process, "logs.txt")
        time.sleep(draw.uniform(0, 0.7))
        process.send_signal(fault)
        assert process.wait(60) != 0, "the run ended before the signal came"
    finish(start(recipe, runs, "--resume"))


def test_killed_three_times_the_run_ends_the_same(reference, tmp_path):
    """Killed at a random moment, while a checkpoint is written, and before its renaming; the logs are equal too."""
    kill_and_resume(
        scratch_recipe(tmp_path), tmp_path / "runs", [signal.SIGKILL, DIES_WRITING, DIES_RENAMING], random.Random()
    )
    assert result(tmp_path / "runs") == reference
    assert not list((tmp_path / "runs" / "scratch").rglob(".*.*"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_twenty_times_the_run_ends_the_same(reference, tmp_path):
    recipe = scratch_recipe(tmp_path)
    longer = tmp_path / "longer"
    finish(start(recipe, longer, "--train.steps", "2000"))
    draw = random.Random(0)
    faults = [draw.choice([signal.SIGKILL, DIES_WRITING, DIES_RENAMING]) for _ in range(20)]
    recipe.write_text(recipe.read_text().replace("steps: 400", "steps: 2000"))
    kill_and_resume(recipe, tmp_path / "runs", faults, draw)
    assert result(tmp_path / "runs") == result(longer)


def assert_starved(process, newest):
    """Check that the process ended with one clear line and left the earlier checkpoint as it was."""
    output = finish(process, 2)
    last = output.strip().splitlines()[-1]
    assert last.startswith("smolseek: ") and "free some space and go on with --resume" in last, output
    assert f"{newest.name} is kept" in last and find_damage(newest) is None
    assert not list(newest.parent.glob(".*"))
    return output


def test_sigterm_then_damage_then_a_full_disk_and_the_run_ends_the_same(reference, tmp_path):
    """SIGTERM saves within a step. The newest checkpoint is then truncated, so the one before it is used. A process
    that may not write files as large as a checkpoint (a limit that any account can set) leaves that one as it is. The
    run still ends bit for bit the same."""
    recipe, runs = scratch_recipe(tmp_path), tmp_path / "runs"
    checkpoints = runs / "scratch" / "checkpoints"
    process = start(recipe, runs)
    wait_for(checkpoints, process)
    process.send_signal(signal.SIGTERM)
    assert "--resume" in finish(process, 128 + signal.SIGTERM)
    before, newest = sorted(checkpoints.iterdir())[-2:]
    metrics = (runs / "scratch" / "metrics.jsonl").read_text().splitlines()
    assert find_damage(newest) is None and int(newest.name.split("-")[1]) > json.loads(metrics[-1])["step"]
    size = (newest / "tensors").stat().st_size
    os.truncate(newest / "tensors", size // 2)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, size * 2 // 3))

    output = assert_starved(start(recipe, runs, "--resume", preexec_fn=limit), newest=before)
    assert f"going on from it, because of a damaged {newest.name}" in output and before.name in output
    finish(start(recipe, runs, "--resume"))
    assert result(runs) == reference


@pytest.mark.slow
def test_a_full_file_system_leaves_the_previous_checkpoint_and_a_clear_line(reference, tmp_path):
    """Uses a tmpfs that is full, and is skipped where this account may not mount one."""
    recipe, runs = scratch_recipe(tmp_path), tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(runs)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    try:
        process = start(recipe, runs)
        wait_for(runs / "scratch" / "checkpoints", process)
        process.send_signal(signal.SIGTERM)
        finish(process, 128 + signal.SIGTERM)
        newest = max((runs / "scratch" / "checkpoints").iterdir())
        room = shutil.disk_usage(runs).free - (newest / "tensors").stat().st_size // 2
        (runs / "filling").write_bytes(bytes(room))
        assert_starved(start(recipe, runs, "--resume"), newest)
        (runs / "filling").unlink()
        finish(start(recipe, runs, "--resume"))
        assert result(runs) == reference
    finally:
        subprocess.run(["umount", str(runs)], check=True)
