"""Live metrics: trackers get the numbers of metrics.jsonl, also from a run that was stopped and resumed."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from smolseek.cli import main
from smolseek.config import DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.training import trackers
from smolseek.training.processes import OneProcess
from smolseek.training.trackers import flatten, open_trackers
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import tiny_v3
from tests.runs import ROOT, scratch_recipe
from tests.text import ENTRIES, tiny_tokenizer, write_stories

STEPS, STOP, CHECKPOINT = 12, 7, 5


@pytest.fixture
def recipe(tmp_path):
    train = TrainSettings(
        steps=STEPS, batch_windows=4, window_tokens=16, evaluate_every=6, checkpoint_every=CHECKPOINT, log_every=1
    )
    data = DataSettings(train=(str(write_stories(tmp_path / "a.txt")),), held_out_share=0.2, held_out_tokens=300)
    return Recipe(name="tiny", data=data, train=train, sample=SampleSettings(every=0, max_new_tokens=2))


def with_tracker(recipe, name):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, trackers=(name,)))


def train(recipe, folder, *, stop_at=None, **options):
    """Trains to the end, or until it is killed after `stop_at` steps, with its last checkpoint some steps earlier."""
    trainer = Trainer(tiny_v3(vocab_size=ENTRIES), tiny_tokenizer(), recipe, folder, **options)
    trainer.resume()

    def kill(progress):
        if progress.step == stop_at:
            raise KeyboardInterrupt

    with contextlib.closing(trainer.log), contextlib.suppress(KeyboardInterrupt):
        trainer.fit(Watcher(on_step=kill))


def numbers_of(folder):
    """Returns the numbers of metrics.jsonl by (name, step)."""
    numbers = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        numbers |= {(name, step): number for name, number in flatten(values).items()}
    return numbers


def test_only_numbers_are_logged():
    assert flatten({"a": 1, "b": {"c": 0.5, "d": [1, 2]}, "e": None, "f": "text"}) == {"a": 1, "b/c": 0.5}


def test_tensorboard_reads_back_a_run_that_was_killed_and_resumed(recipe, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe, folder = with_tracker(recipe, "tensorboard"), tmp_path / "run"
    train(recipe, folder, stop_at=STOP)
    train(recipe, folder)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert logged == pytest.approx(numbers_of(folder))
    losses = [event.step for event in events.Scalars("loss")]
    assert losses == list(range(STEPS)) and ("held_out/loss", 5) in logged and ("maxvio/1", 0) in logged


def test_the_services_go_on_with_the_same_run(recipe, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append(("log", step, numbers))

        def finish(self):
            calls.append(("finish",))

    for name in ("trackio", "wandb"):
        fake = types.ModuleType(name)
        fake.Error, fake.init = RuntimeError, lambda **about: calls.append(("init", about)) or Run()
        monkeypatch.setitem(sys.modules, name, fake)
        calls.clear()
        folder = tmp_path / name
        train(with_tracker(recipe, name), folder, stop_at=STOP)
        train(with_tracker(recipe, name), folder)
        first, second = (call[1] for call in calls if call[0] == "init")
        assert first == second and first["resume"] == "allow" and first["config"]["name"] == "tiny"
        assert calls.count(("finish",)) == 2
        logged = {}
        for call in calls:
            logged |= {(key, call[1]): number for key, number in call[2].items()} if call[0] == "log" else {}
        assert logged == numbers_of(folder)


def test_a_service_that_refuses_is_a_line(recipe, tmp_path, monkeypatch):
    def refuse(**about):
        raise RuntimeError("no API key")

    fake = types.ModuleType("wandb")
    fake.Error, fake.init = RuntimeError, refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match="no API key; run wandb login, or set WANDB_MODE=offline"):
        open_trackers(with_tracker(recipe, "wandb"), tmp_path, 0)


def test_wandb_offline(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(with_tracker(recipe, "wandb"), tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_offline(recipe, tmp_path):
    pytest.importorskip("trackio", reason="trackio is an extra")
    code = f"""
import sys; sys.path[:0] = {[str(ROOT)]!r}
from pathlib import Path
from smolseek.cli import main
assert main({["train", str(scratch_recipe(tmp_path)), "--runs", str(tmp_path), "--train.steps", "6"]!r} +
            ["--train.log-every", "1", "--train.trackers", "trackio"]) == 0
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("smolseek")
losses = [row["loss"] for row in SQLiteStorage.get_logs("smolseek", name) if "loss" in row]
assert name.startswith("scratch-") and len(losses) == 6, (name, losses)
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_a_process_that_does_not_lead_logs_nothing(recipe, tmp_path):
    class Follower(OneProcess):
        leads = False

    train(with_tracker(recipe, "tensorboard"), tmp_path / "run", processes=Follower())
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_nothing_is_imported_that_was_not_chosen(tmp_path):
    command = ["train", str(scratch_recipe(tmp_path)), "--runs", str(tmp_path), "--train.steps", "2"]
    names = {"tensorboard", "torch.utils.tensorboard", "trackio", "wandb"}
    code = f"import sys; from smolseek.cli import main; assert main({command!r}) == 0; "
    code += f"assert not {names!r} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_a_line_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    runs = tmp_path / "runs"
    assert main(["train", str(scratch_recipe(tmp_path)), "--runs", str(runs), "--train.trackers", name]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'smolseek[{name}]'" in error and error.count("\n") == 1 and not runs.exists()


def test_a_tracker_nobody_knows(tmp_path, capsys):
    recipe = scratch_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("train: {", "train: {trackers: [tensorbord], "))
    assert main(["train", str(recipe), "--runs", str(tmp_path / "runs")]) == 2
    assert "train.trackers: 'tensorbord' is not one of tensorboard, trackio, wandb" in capsys.readouterr().err
