"""Several processes train as a single one does (gloo on this machine)."""

import json

import pytest
import torch
from parallel import DIES_ONCE, largest_difference, resume_at, run, write_recipe

from smolseek.cli import main
from smolseek.config import ParallelSettings, TrainSettings
from smolseek.training.processes import OneProcess, TorchrunProcesses, join_processes, restarted_by_torchrun
from tests.conversion.folders import write_source
from tests.text import write_stories

pytestmark = pytest.mark.timeout(1200)


def recipe_of(folder, steps):
    return write_recipe(folder, steps, str(write_stories(folder / "a.txt")))


def test_one_process_has_trivial_answers(monkeypatch):
    with join_processes(ParallelSettings(), "cpu") as (processes, device):
        assert type(processes) is OneProcess and device == "cpu" and processes.leads
        ids = torch.arange(6).view(3, 2)
        assert processes.own_windows(ids) is ids and processes.mean(1.5) == 1.5 and processes.any_of(True)
    assert not restarted_by_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_by_torchrun()


@pytest.mark.parametrize(("expert", "size"), [(2, 1), (0, 1), (3, 4)])
def test_experts_must_divide_the_processes(monkeypatch, expert, size):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with (
        pytest.raises(ValueError, match=rf"parallel\.expert {expert}: .*{size}.*torchrun"),
        join_processes(ParallelSettings(expert), "cpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("optimizer", "processes", "bound"),
    [("adamw", 2, 1e-4), ("muon", 2, 2e-3), pytest.param("muon", 4, 2e-3, marks=pytest.mark.slow)],
)
def test_several_processes_train_like_one_and_one_resumes_from_them(tmp_path, optimizer, processes, bound):
    """Processes that divide the experts by two; then one process resumes from the checkpoint that all wrote.

    Both optimizers hide a wrong scale of the gradients as long as the scale stays the same. The resumed process would
    have the right scale, and meet moments of the wrong one. Muon iterates in bf16 where the CPU has units for it."""
    recipe, balance = recipe_of(tmp_path, steps=16), "balance_loss: batch, balance_loss_weight: 0.5"
    recipe.write_text(recipe.read_text().replace("steps: 16", f"steps: 16, optimizer: {optimizer}, {balance}"))
    several = tmp_path / str(processes)
    assert main(["train", str(recipe), "--runs", str(tmp_path / "1")]) == 0
    run(recipe, several, processes, "--parallel.expert", "2")
    assert largest_difference(tmp_path / "1", several) < bound
    one, two = (json.loads((runs / "tiny" / "summary.json").read_text()) for runs in (tmp_path / "1", several))
    assert two["trained"]["loss"] == pytest.approx(one["trained"]["loss"], abs=bound)
    if optimizer == "adamw":
        assert two["trained"]["samples"] == one["trained"]["samples"] and two["maxvio"] == pytest.approx(one["maxvio"])
    assert "decode_tokens_per_second" in one["trained"] and "decode_tokens_per_second" not in two["trained"]
    resume_at(recipe, several, tmp_path / "resumed", 1)
    assert largest_difference(tmp_path / "1", tmp_path / "resumed") < bound


@pytest.mark.slow
def test_stages_that_freeze_weights_train_alike_too(tmp_path):
    """The weights that train change during the run, sharded as they are."""
    recipe = recipe_of(tmp_path, steps=12)
    stages = "stages: [{steps: 6, trains: attention}, {steps: 6, trains: experts}], batch_windows"
    recipe.write_text(recipe.read_text().replace("steps: 12, batch_windows", stages))
    run(recipe, tmp_path / "1", 1)
    run(recipe, tmp_path / "2", 2, "--parallel.expert", "2")
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_and_four_processes_train_like_one_over_100_steps(tmp_path):
    recipe = recipe_of(tmp_path, steps=100)
    run(recipe, tmp_path / "1", 1)
    for processes, expert in ((2, 1), (2, 2), (4, 1), (4, 2)):
        runs = tmp_path / f"{processes}-{expert}"
        run(recipe, runs, processes, "--parallel.expert", str(expert))
        assert largest_difference(tmp_path / "1", runs) < 1e-3, (processes, expert)
    for processes in (1, 2):
        resume_at(recipe, tmp_path / "4-2", tmp_path / f"resumed-{processes}", processes)
        assert largest_difference(tmp_path / "1", tmp_path / f"resumed-{processes}") < 1e-3, processes


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_finishes(tmp_path):
    recipe = recipe_of(tmp_path, steps=20)
    run(recipe, tmp_path / "1", 1)
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE.format(step=15))
    output = run(recipe, tmp_path / "2", 2, script=script, restarts=2)
    assert "train: steps 10 to 20 (resumed)" in output
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-3


CONVERTS = """
name: tiny
source: {source}
convert: {{calibration_windows: 8, calibration_window_tokens: 32, refine_steps: 2, distill_steps: 2}}
data: {{train: {text}, shuffle_windows: 8, held_out_share: 0.2, held_out_tokens: 300}}
train: {{steps: 2, batch_windows: 4, window_tokens: 16, warmup_steps: 1}}
sample: {{every: 0, prompts: ["Anna "], max_new_tokens: 4}}
"""


def test_two_processes_convert_a_recipes_source_together(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    source, text = write_source(tmp_path / "source"), write_stories(tmp_path / "a.txt")
    recipe.write_text(CONVERTS.format(source=source, text=text))
    output = run(recipe, tmp_path / "2", 2)
    for stage in ("convert: closed form", "convert: refine layers", "convert: end-to-end KL", "heal: steps 0 to 2"):
        assert output.count(f"[tiny] {stage}\n") == 1, output
    report = json.loads((tmp_path / "2" / "tiny" / "converted" / "conversion.json").read_text())
    assert set(report["losses"]) == {"dense", "closed_form", "refined", "distilled"}


LOST = """
import os, sys
from smolseek.cli import main
from smolseek.data.sources.hub import SourceLost
from smolseek.data.stream import WindowStream
draw = WindowStream.next
def lost(stream, count):
    if os.environ["RANK"] == "1" and stream.drawn == 5:
        raise SourceLost("data source hub:a/b: lost")
    stream.drawn += 1
    return draw(stream, count)
WindowStream.drawn, WindowStream.next = 0, lost
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""train.py whose process 1 loses its source after five steps."""


def test_a_source_that_one_process_loses_ends_the_run(tmp_path):
    recipe, script = recipe_of(tmp_path, steps=8), tmp_path / "lost.py"
    script.write_text(LOST)
    with pytest.raises(RuntimeError, match=r"rank +: 1 .*\n +exitcode +: 2 "):
        run(recipe, tmp_path / "2", 2, script=script)
    assert [folder.name for folder in (tmp_path / "2" / "tiny" / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    recipe = recipe_of(tmp_path, steps=2)
    with pytest.raises(RuntimeError, match=r"train\.batch_windows 3: must be a multiple of the 2 processes"):
        run(recipe, tmp_path / "2", 2, "--train.batch-windows", "3")


def test_compiled_blocks_are_for_one_process():
    processes = object.__new__(TorchrunProcesses)
    processes.size = 2
    with pytest.raises(ValueError, match=r"train\.compile with 2 processes"):
        processes.check_settings(TrainSettings(compile=True))
