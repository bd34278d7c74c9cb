"""What can be known to fail is refused before anything runs; what a resumed run may change."""

import dataclasses
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from smolseek.config import ConvertSettings, DataSettings, Recipe, SampleSettings, StageSettings, TrainSettings
from smolseek.training.settings import changed_settings, changed_start, changed_steering, check_inputs, check_teacher
from smolseek.training.stages import stages_of
from tests.text import ENTRIES, kind_of_tokenizer, tiny_tokenizer, write_stories

CONFIG = SimpleNamespace(max_position_embeddings=64, vocab_size=ENTRIES)


@pytest.fixture
def recipe(tmp_path):
    text = str(write_stories(tmp_path / "a.txt"))
    train = TrainSettings(window_tokens=16)
    return Recipe(source="m", data=DataSettings(train=(text,), held_out_share=0.2), train=train)


def test_inputs_that_fit_give_the_held_out_text(recipe):
    assert len(check_inputs(recipe, tiny_tokenizer(), CONFIG).ids_T) > 100
    written = dataclasses.replace(recipe, convert=ConvertSettings(calibration=("self", *recipe.data.train)))
    assert len(check_inputs(written, tiny_tokenizer(), CONFIG).ids_T) > 100


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("data", {"train": ("nosuch.txt",)}, r"nosuch\.txt: no such file"),
        ("data", {"held_out": ("nosuch.txt",)}, r"nosuch\.txt: no such file"),
        ("data", {"weights": (1.0, 2.0)}, "2 for 1 sources"),
        ("data", {"held_out_share": 0.0}, "held-out text: none found"),
        ("data", {"held_out_share": 1.0}, "no training text"),
        ("data", {"separator": "###"}, "held-out text: none found.*set data.separator.*raise data.held_out_share"),
        ("train", {"window_tokens": 65}, "window_tokens 65: the model's limit is 64"),
        ("sample", {"temperature": -1.0}, "temperature -1.0: must be 0 or more"),
        ("sample", {"top_p": 2.0}, r"top_p 2\.0"),
        ("sample", {"repetition_penalty": 0.0}, r"repetition_penalty 0\.0"),
        ("sample", {"every": -1}, "sample.every -1: must be at least 0"),
        ("sample", {"max_new_tokens": 0}, "sample.max_new_tokens 0: must be at least 1"),
        ("sample", {"prompts": ("word " * 90,)}, "tokens; the model takes 1 to 63"),
        ("sample", {"chat": True}, "chat template: the tokenizer has none"),
        ("convert", {"calibration": ("nosuch.txt",)}, r"nosuch\.txt: no such file"),
    ],
)
def test_mistakes_are_named_before_a_run(recipe, part, changes, words):
    old = getattr(recipe, part) or ConvertSettings()
    bad = dataclasses.replace(recipe, **{part: dataclasses.replace(old, **changes)})
    with pytest.raises(ValueError, match=words):
        check_inputs(bad, tiny_tokenizer(), CONFIG)


def test_a_tokenizer_beyond_the_model_is_named(recipe):
    small = SimpleNamespace(max_position_embeddings=64, vocab_size=100)
    with pytest.raises(ValueError, match="the model has 100 vocabulary entries, the tokenizer more"):
        check_inputs(recipe, tiny_tokenizer(), small)


def test_a_teacher_must_have_the_same_tokens():
    ours = kind_of_tokenizer("adds")
    check_teacher(ENTRIES, ours, ENTRIES, kind_of_tokenizer("has"))
    with pytest.raises(ValueError, match="teacher with 99 vocabulary entries for a model with 300"):
        check_teacher(99, ours, ENTRIES, ours)
    with pytest.raises(ValueError, match=r"teacher: token .* in its tokenizer, and .* in the model's; they must share"):
        check_teacher(ENTRIES, tiny_tokenizer(), ENTRIES, ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
        {"learning_rate": -1e-3},
        {"learning_rate": math.inf},
        {"warmup_steps": -1},
        {"log_every": 0},
        {"evaluate_every": 0},
        {"checkpoint_every": 0},
        {"keep_last": 0},
        {"max_skipped_steps": -1},
        {"spike_factor": -1.0},
        {"balance_update_speed": -1.0},
        {"balance_loss_weight": -1.0},
        {"balance_freeze_share": 2.0},
        {"distill_steps": -1},
        {"distill_weight": math.nan},
        {"distill_temperature": math.nan},
        {"learning_rate_factors": {"norms": -1.0}},
    ],
)
def test_values_that_no_run_can_have(changes):
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=rf"train\.{name}"):
        stages_of(TrainSettings(**changes))
    stages_of(TrainSettings(clip_norm=math.inf))


def test_a_stage_is_named(recipe):
    stages = (StageSettings(steps=1), StageSettings(steps=1, learning_rate=-1.0))
    with pytest.raises(ValueError, match=r"train\.stages\.1\.learning_rate -1\.0"):
        stages_of(TrainSettings(stages=stages))


def with_train(recipe, **changes):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def as_saved(recipe):
    return json.loads(json.dumps(asdict(recipe)))


@pytest.mark.parametrize("field", ["source", "teacher", "tokenizer"])
def test_other_checkpoints_are_other_settings(recipe, field):
    changed = changed_settings(as_saved(recipe), asdict(dataclasses.replace(recipe, **{field: "other"})))
    assert changed == f"{field} {getattr(recipe, field)!r} then, 'other' now"
    assert bool(changed_start(as_saved(recipe), asdict(dataclasses.replace(recipe, **{field: "other"})))) == (
        field != "teacher"
    )


def test_more_steps_are_allowed_and_named_and_fewer_are_not(recipe):
    more, fewer = with_train(recipe, steps=400), with_train(recipe, steps=200)
    assert changed_settings(as_saved(recipe), asdict(more)) == ""
    assert changed_steering(as_saved(recipe), asdict(more), 0) == ["train.steps 400 (was 300)"]
    assert changed_settings(as_saved(recipe), asdict(fewer)) == "train.steps 300 then, 200 now"


def with_rates(recipe, *rates, **changes):
    stages = tuple(StageSettings(steps=4, learning_rate=rate) for rate in rates)
    return with_train(recipe, stages=stages, **changes)


def test_the_learning_rate_of_a_stage_may_be_changed_and_is_named(recipe):
    old, new = as_saved(with_rates(recipe, 0.01, None)), asdict(with_rates(recipe, 0.01, 1e-4))
    assert changed_settings(old, new) == ""
    (line,) = changed_steering(old, new, 1)
    assert line == "train.stages.1.learning_rate 0.0001 (was None)"
    (line,) = changed_steering(old, asdict(with_rates(recipe, 1e-4, None)), 1)
    assert line == "train.stages.0.learning_rate 0.0001 (was 0.01), of a stage that has ended"


def test_a_rate_that_stages_do_not_have_from_the_recipe_is_no_change_of_theirs(recipe):
    old, new = as_saved(with_rates(recipe, 0.01, None)), asdict(with_rates(recipe, 0.01, None, learning_rate=1e-4))
    (line,) = changed_steering(old, new, 0)
    assert line == ("train.learning_rate 0.0001 (was 0.001), which does not change train.stages.0.learning_rate 0.01")


def test_other_changes_of_stages_are_refused(recipe):
    old = as_saved(with_rates(recipe, 0.01, 0.01))
    longer = with_train(recipe, stages=(StageSettings(steps=4, learning_rate=0.01),) * 3)
    assert changed_settings(old, asdict(longer)) == "train.stages 2 then, 3 now"
    other = with_train(recipe, stages=(StageSettings(steps=5, learning_rate=0.01),) * 2)
    assert changed_settings(old, asdict(other)) == (
        "train.stages.0.steps 4 then, 5 now, train.stages.1.steps 4 then, 5 now"
    )
    assert changed_settings(as_saved(with_rates(recipe)), asdict(recipe)) == ""


def test_samples_do_not_matter_to_a_resumed_run(recipe):
    other = dataclasses.replace(recipe, sample=SampleSettings(every=1), name="other")
    assert changed_settings(as_saved(recipe), asdict(other)) == ""
