"""A run that goes on from a checkpoint is the uninterrupted one bit for bit; damaged and foreign checkpoints."""

import dataclasses
import json

import pytest
import torch

from smolseek.config import StageSettings, TrainSettings
from smolseek.data.sources.hub import SourceLost
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Watcher
from tests.text import write_stories
from tests.training.trainers import assert_same_run, metrics, model_of, stop_at, trainer_of, with_train


@pytest.mark.parametrize(("stopped_at", "optimizer"), [(1, "adamw"), (5, "muon"), (8, "adamw"), (8, "muon")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe, tmp_path, stopped_at, optimizer):
    recipe = with_train(recipe, optimizer=optimizer)
    whole = trainer_of(recipe, tmp_path / "whole")
    whole.fit(Watcher())
    with pytest.raises(Interrupted, match="--resume"):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(stopped_at))
    torch.manual_seed(99)
    resumed = trainer_of(recipe, tmp_path / "cut")
    assert resumed.resume() and resumed.step == stopped_at
    resumed.fit(Watcher())
    assert_same_run(whole, resumed)


def test_resume_goes_back_to_the_checkpoint_and_repeats_no_line(recipe, tmp_path):
    """After a kill -9 the steps since the checkpoint are done again."""
    trainer = trainer_of(recipe, tmp_path / "run")
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_train_step", _fails_after(trainer, 8))
        trainer.fit(Watcher())
    assert len(metrics(tmp_path / "run")) > 5
    resumed = trainer_of(recipe, tmp_path / "run")
    assert resumed.resume() and resumed.step == 5
    resumed.fit(Watcher())
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(12))


def _fails_after(trainer, steps):
    train_step = trainer._train_step

    def step():
        if trainer.step == steps:
            raise RuntimeError("killed")
        return train_step()

    return step


def test_chat_data_trains_and_goes_on_bit_for_bit(chat, tmp_path):
    recipe, tokenizer = chat
    whole, cut, resumed = (Trainer(model_of(), tokenizer, recipe, tmp_path / n) for n in ("whole", "cut", "cut"))
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        cut.fit(stop_at(7))
    assert resumed.resume()
    resumed.fit(Watcher())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    logs = (tmp_path / "whole" / "logs.txt").read_text()
    assert logs == (tmp_path / "cut" / "logs.txt").read_text()
    assert f"Malformed lines skipped: {whole.stream.malformed}" in logs


def test_a_lost_source_leaves_the_state_to_go_on_from(recipe, tmp_path):
    whole, lost = trainer_of(recipe, tmp_path / "whole"), trainer_of(recipe, tmp_path / "lost")
    whole.fit(Watcher())
    draw = lost.stream.next

    def next_windows(count):
        if lost.step == 7:
            raise SourceLost("data source hub:a/b: lost")
        return draw(count)

    lost.stream.next = next_windows
    with pytest.raises(SourceLost):
        lost.fit(Watcher())
    resumed = trainer_of(recipe, tmp_path / "lost")
    assert resumed.resume() and resumed.step == 7
    resumed.fit(Watcher())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(recipe, tmp_path):
    trainer_of(with_train(recipe, steps=5), tmp_path / "run").fit(Watcher())
    with pytest.raises(ValueError, match=r"train\.batch_windows 4 then, 3 now"):
        trainer_of(with_train(recipe, steps=5, batch_windows=3), tmp_path / "run").resume()


def test_a_run_with_no_step_left_keeps_the_settings_of_its_last_step(recipe, tmp_path):
    recipe = with_train(recipe, steps=2)
    trainer_of(recipe, tmp_path / "run").fit(Watcher())
    again = trainer_of(with_train(recipe, learning_rate=5e-5, clip_norm=0.5, log_every=3), tmp_path / "run")
    assert again.resume() and again.recipe == with_train(recipe, log_every=3)
    logs = (tmp_path / "run" / "logs.txt").read_text()
    assert "train.learning_rate 5e-05 (was 0.001): no step is left, so it stays as it was\n" in logs


def test_stages_with_no_step_left_keep_their_rates(recipe, tmp_path):
    stages, others = ((StageSettings(steps=1), StageSettings(steps=1, learning_rate=rate)) for rate in (1e-3, 1e-5))
    recipe = with_train(recipe, steps=TrainSettings().steps, stages=stages)
    trainer_of(recipe, tmp_path / "run").fit(Watcher())
    again = trainer_of(with_train(recipe, stages=others), tmp_path / "run")
    assert again.resume() and again.recipe == recipe


def test_text_that_changed_since_a_checkpoint_is_refused(recipe, tmp_path):
    (texts := tmp_path / "texts").mkdir()
    whole = write_stories(texts / "m.txt").read_text()
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=(str(texts),)))
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "run").fit(stop_at(3))
    (texts / "a.txt").write_text("Anna sat.")
    (texts / "m.txt").write_text(whole[:-9])
    size, changed = len(whole), "step-00000003: written with other text"
    words = rf"{changed} \(.*a\.txt had no bytes and has 9, .*m\.txt had {size} bytes and has {size - 9}\); put it back"
    with pytest.raises(ValueError, match=words):
        trainer_of(recipe, tmp_path / "run").resume()
    (texts / "m.txt").rename(texts / "n.txt")
    with pytest.raises(ValueError, match=rf"{changed} .*m\.txt had {size} bytes and has none, .*n\.txt had no"):
        trainer_of(recipe, tmp_path / "run").resume()
    (texts / "a.txt").unlink()
    (texts / "n.txt").unlink()
    (texts / "m.txt").write_text(whole)
    assert trainer_of(recipe, tmp_path / "run").resume()


def test_a_checkpoint_of_an_older_version_knows_no_files(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("smolseek.training.trainer.load_plain", lambda folder: plain)
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "run").fit(stop_at(3))
    plain = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert plain.pop("files") == {str(tmp_path / "a.txt"): (tmp_path / "a.txt").stat().st_size}
    assert trainer_of(recipe, tmp_path / "run").resume()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda path: path.unlink()])
def test_a_damaged_newest_checkpoint_is_passed_over(recipe, tmp_path, caplog, damage):
    whole = trainer_of(recipe, tmp_path / "whole")
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(8))
    damage(tmp_path / "cut" / "checkpoints" / "step-00000008" / "tensors")
    resumed = trainer_of(recipe, tmp_path / "cut")
    assert resumed.resume() and resumed.step == 5
    (warning,) = caplog.messages
    assert "step-00000005" in warning and "damaged step-00000008 (" in warning
    resumed.fit(Watcher())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert [path.name for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())] == [
        "step-00000010",
        "step-00000012",
    ]
