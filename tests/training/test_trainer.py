import dataclasses
import json

import pytest
import torch
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM

from smolseek.checkpoint.hub import load
from smolseek.checkpoint.state import newest_state
from smolseek.config import DataSettings, Recipe, SampleSettings, StageSettings, TrainSettings
from smolseek.data.corpus import SourceLost
from smolseek.data.windows import read_marks
from smolseek.model import StockModel
from smolseek.model.balance import take_expert_counts
from smolseek.training import trainer as trainer_module
from smolseek.training.optimizer import learning_rate
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Watcher
from tests.data.test_chat import CHATML, tokenizer_with
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, stories, tiny_tokenizer, write_stories

STEPS = TrainSettings().steps  # the default, which may stand beside stages


@pytest.fixture
def recipe(tmp_path):
    return Recipe(
        name="test",
        source="unused",
        data=DataSettings(
            train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2, held_out_tokens=300
        ),
        train=TrainSettings(
            steps=12,
            batch_windows=4,
            window_tokens=16,
            warmup_steps=2,
            evaluate_every=6,
            checkpoint_every=5,
            log_every=1,
            precision="float32",
        ),
        sample=SampleSettings(every=6, prompts=("Anna ",), max_new_tokens=5),
    )


def model_of():
    torch.manual_seed(0)
    return tiny_v3(vocab_size=ENTRIES)


def trainer_of(recipe, folder, model=None, **options):
    return Trainer(model or model_of(), tiny_tokenizer(), recipe, folder, **options)


def with_train(recipe, **changes):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = {"tokens_per_second", "data_wait_share"}
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def assert_same_run(one, other):
    """Weights, metrics and logs, bit for bit."""
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert metrics(one.folder) == metrics(other.folder)
    assert (one.folder / "logs.txt").read_text() == (other.folder / "logs.txt").read_text()


def stop_at(step):
    seen = []
    return Watcher(on_step=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1] >= step)


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
    """As after kill -9: steps since the checkpoint are done again."""
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


def test_micro_batches_are_one_batch(recipe, tmp_path):
    """Same windows in one or in two micro-batches: same update, same routing biases (counts of the global batch)."""
    one, two = model_of(), model_of()
    trainer_of(with_train(recipe, steps=1), tmp_path / "one", one).fit(Watcher())
    trainer_of(with_train(recipe, steps=1, batch_windows=2, gradient_accumulation=2), tmp_path / "two", two).fit(
        Watcher()
    )
    start = model_of().state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=0, atol=2e-4)
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, two.state_dict()[name]) and not torch.equal(tensor, start[name])


@pytest.fixture
def chat(recipe, tmp_path):
    """The recipe on conversations of unequal length, and the tokenizer with a template."""
    tokenizer = tokenizer_with(CHATML)
    rows = [
        [{"role": "user", "content": text * (1 + n % 3)}, {"role": "assistant", "content": text[: 5 + 9 * (n % 7)]}]
        for n, text in enumerate(stories())
    ]
    lines = [json.dumps({"messages": row}) for row in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines[:5], "broken", *lines[5:]]))
    data = dataclasses.replace(recipe.data, train=(str(tmp_path / "chat.jsonl"),))
    return dataclasses.replace(recipe, data=data), tokenizer


def test_a_token_weighs_the_same_in_every_micro_batch_of_chat_data(chat, tmp_path):
    recipe, tokenizer = chat
    recipe = with_train(recipe, steps=1, batch_windows=8)
    one, two = model_of(), model_of()
    Trainer(one, tokenizer, recipe, tmp_path / "one").fit(Watcher())
    split = with_train(recipe, batch_windows=2, gradient_accumulation=4)
    Trainer(two, tokenizer, split, tmp_path / "two").fit(Watcher())
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=0, atol=2e-4)
    losses = [metrics(tmp_path / name)[0]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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


def test_the_users_words_teach_nothing(chat, tmp_path):
    """The labels of marked tokens do not reach the loss: changing them changes nothing."""
    recipe, tokenizer = chat
    trainer = Trainer(model_of(), tokenizer, recipe, tmp_path / "run")
    windows = trainer.stream.next(4)
    ids, loss, _ = read_marks(windows)
    last = windows.clone()
    last[:, -1] = windows[:, -1] ^ 1  # the last token is a label and no input
    masked = ~loss[:, -1]
    assert masked.any() and not masked.all()
    assert torch.equal(trainer._loss(windows[masked])[0], trainer._loss(last[masked])[0])
    assert not torch.equal(trainer._loss(windows[~masked])[0], trainer._loss(last[~masked])[0])
    assert ids.max() < ENTRIES


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


def test_the_share_of_time_that_waits_for_data_is_told(recipe, tmp_path):
    trainer_of(recipe, tmp_path / "run").fit(Watcher())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_share"] for line in lines if "loss" in line]
    assert len(shares) == 12 and all(0 <= share <= 1 for share in shares)


def test_training_learns_and_leaves_what_is_described(recipe, tmp_path):
    folder = tmp_path / "run"
    trainer = trainer_of(with_train(recipe, steps=60, learning_rate=1e-2, evaluate_every=20), folder)
    before = trainer.evaluate().loss
    quality = trainer.fit(Watcher())
    assert quality.loss < before - 1
    logs = (folder / "logs.txt").read_text()
    assert "Step 59/60 | Loss: " in logs and "Best loss achieved: " in logs
    assert "Sample at step 0 | Prompt: Anna" in logs and "-" * 80 in logs
    assert set(metrics(folder)[0]["maxvio"]) == {"1", "2"}
    best = load(folder / "best")
    assert best.config.vocab_size == ENTRIES
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000055", "step-00000060"]


def test_evaluation_and_samples_do_not_touch_training(recipe, tmp_path):
    quiet = dataclasses.replace(with_train(recipe, evaluate_every=1000), sample=SampleSettings(every=0, prompts=()))
    one, two = trainer_of(recipe, tmp_path / "a"), trainer_of(quiet, tmp_path / "b")
    one.fit(Watcher())
    two.fit(Watcher())
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


def test_a_dense_llama_trains_too(recipe, tmp_path):
    model = StockModel(tiny_llama(vocab_size=ENTRIES))
    trainer = trainer_of(with_train(recipe, steps=40, learning_rate=1e-2), tmp_path / "run", model)
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 0.5
    assert LlamaForCausalLM.from_pretrained(tmp_path / "run" / "best").config.vocab_size == ENTRIES


def test_distillation_brings_the_model_to_its_teacher(recipe, tmp_path):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    recipe = with_train(recipe, steps=40, learning_rate=1e-2, distill_weight=1.0)
    trainer = trainer_of(recipe, tmp_path / "run", teacher=teacher)
    windows = trainer.stream.next(4)
    before = trainer._loss(windows)[0].item()
    trainer.fit(Watcher())
    after = trainer._loss(windows)[0].item()
    assert after < before / 2


def test_distillation_for_the_first_part_only_asks_the_teacher_no_longer(recipe, tmp_path, monkeypatch):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    asked, hidden_states = [], teacher.hidden_states
    monkeypatch.setattr(teacher, "hidden_states", lambda *a, **k: asked.append(trainer.step) or hidden_states(*a, **k))
    trainer = trainer_of(with_train(recipe, distill_weight=0.9, distill_steps=5), tmp_path / "run", teacher=teacher)
    trainer.fit(Watcher())
    assert asked == list(range(5))


def test_the_biases_move_by_less_as_the_learning_rate_falls(recipe, tmp_path, monkeypatch):
    speeds = []
    monkeypatch.setattr(trainer_module, "update_biases", lambda model, counts, speed, rule: speeds.append(speed))
    trainer = trainer_of(with_train(recipe, balance_update_speed=1.0, learning_rate=1.0), tmp_path / "run")
    trainer.fit(Watcher())
    rates = [learning_rate(step, trainer.settings) for step in range(trainer.settings.steps)]
    assert speeds[:3] == [1.0, 1.0, 1.0]  # the warm-up, and the peak
    assert speeds[2:] == pytest.approx([0.2 + 0.8 * rate for rate in rates[2:]])
    assert speeds[-1] < 0.25


def test_the_teacher_may_be_held_in_bf16(recipe, tmp_path):
    teacher = StockModel(tiny_llama(vocab_size=ENTRIES)).eval()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        bf16 = with_train(recipe, distill_weight=0.5, precision="bfloat16")
        trainer = trainer_of(bf16, tmp_path / "run", teacher=teacher.to(dtype))
        losses.append(trainer._loss(trainer.stream.next(4))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("dense", [False, True])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_token_twice(recipe, tmp_path, dense):
    found = []
    for checkpointing in (False, True):
        model = StockModel(tiny_llama(vocab_size=ENTRIES)) if dense else model_of()
        changed = with_train(recipe, activation_checkpointing=checkpointing)
        trainer = trainer_of(changed, tmp_path / "run", model.train())
        take_expert_counts(model)
        calls: list[int] = []
        norm = next(module for name, module in model.named_modules() if name.endswith("0.input_layernorm"))
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):  # two micro-batches
            trainer._loss(trainer.stream.next(4))[0].backward()
        assert len(calls) == (4 if checkpointing else 2)
        found.append(({name: p.grad for name, p in model.named_parameters()}, take_expert_counts(model)))
    (plain, counts), (recomputed, counts_again) = found
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name
    assert len(counts) == len(counts_again) == (0 if dense else 2)
    for (_, once), (_, again) in zip(counts, counts_again, strict=True):
        assert once.sum() == 2 * 4 * 16 * 3 and torch.equal(once, again)


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_go_on_bit_for_bit(recipe, tmp_path):
    plain, whole = (trainer_of(with_train(recipe, compile=c), tmp_path / f"{c}") for c in (False, True))
    qualities = [trainer.fit(Watcher()).loss for trainer in (plain, whole)]
    assert whole.model.model.compiled_layers and qualities[0] == pytest.approx(qualities[1], abs=1e-4)
    losses = [[line["loss"] for line in metrics(t.folder) if "loss" in line] for t in (plain, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    with pytest.raises(Interrupted):
        trainer_of(with_train(recipe, compile=True), tmp_path / "cut").fit(stop_at(5))
    resumed = trainer_of(with_train(recipe, compile=True), tmp_path / "cut")
    assert resumed.resume()
    resumed.fit(Watcher())
    assert_same_run(whole, resumed)


def test_blocks_without_a_compiler_run_as_they_are(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    losses = []
    for compiled in (False, True):
        trainer = trainer_of(with_train(recipe, compile=compiled), tmp_path / "run")
        trainer.model.train()
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_cache():
            losses.append(trainer._loss(trainer.stream.next(4))[0])
        losses[-1].backward()
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, r"train\.steps 0"),
        ({"distill_temperature": 0.0}, r"train\.distill_temperature 0\.0: must be above 0"),
        ({"decay_share": 2.0}, r"train\.decay_share 2\.0: must be between 0 and 1"),
        ({"patience": 0}, r"train\.patience 0: must be at least 1"),
        (
            {"learning_rate_factors": {"gates": 2.0}},
            r"learning_rate_factors\.gates: no such group; there are attention",
        ),
        ({"steps": STEPS, "stages": (StageSettings(),)}, "give it one of the two"),
        ({"steps": STEPS, "stages": (StageSettings(steps=1, tokens=1),)}, "give it one of the two"),
        (
            {"steps": STEPS, "stages": (StageSettings(steps=1, distill_weight=2.0),)},
            r"train\.stages\.0\.distill_weight 2\.0",
        ),
        ({"steps": STEPS, "stages": (StageSettings(steps=1, distill_weight=0.5),)}, "name a teacher"),
        ({"window_tokens": 65}, r"train\.window_tokens 65: the model's limit is 64"),
        ({"distill_weight": 1.5}, "between 0 and 1"),
        ({"distill_weight": 0.5}, "name a teacher"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(with_train(recipe, **changes), tmp_path / "run")


def test_a_checkpoint_of_other_settings_is_refused(recipe, tmp_path):
    trainer_of(with_train(recipe, steps=5), tmp_path / "run").fit(Watcher())
    with pytest.raises(ValueError, match=r"train\.batch_windows 4 then, 3 now"):
        trainer_of(with_train(recipe, steps=5, batch_windows=3), tmp_path / "run").resume()


# -- steps that must not be taken -------------------------------------------------------------------------------------


def spoil(trainer, steps, value):
    """Let the loss of some steps come out as `value` (in the backward pass too)."""
    loss_of = trainer._loss

    def spoiled(*arguments, **options):
        loss, *rest = loss_of(*arguments, **options)
        if trainer.step not in steps:
            return loss, *rest
        return loss * value, rest[0] * value, *rest[1:]

    trainer._loss = spoiled
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 4.0])
def test_a_step_with_nan_or_a_spike_is_skipped_and_counted(recipe, tmp_path, value):
    steps = 24
    recipe = with_train(recipe, steps=steps, checkpoint_every=steps)
    trainer = spoil(trainer_of(recipe, tmp_path / "run"), {15, 16, 20}, value)
    seen = []
    take = trainer._train_step

    def step():
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        moments = [s["exp_avg"].clone() for s in trainer.optimizers[0].state_dict()["state"].values()]
        result = take()
        same = all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in before.items())
        after = [s["exp_avg"] for s in trainer.optimizers[0].state_dict()["state"].values()]
        seen.append(same and all(torch.equal(*pair) for pair in zip(moments, after, strict=True)) and trainer.step > 0)
        return result

    trainer._train_step = step
    trainer.fit(Watcher())
    assert [number for number, same in enumerate(seen) if same] == [15, 16, 20]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line][-1] == 3
    assert (tmp_path / "run" / "logs.txt").read_text().count("skipped: the loss is") == 3
    resumed = trainer_of(recipe, tmp_path / "run")
    assert resumed.resume() and resumed.guard.skipped == 3 and len(resumed.guard.recent) == 21


def test_a_spike_is_told_from_losses_that_were_saved(recipe, tmp_path):
    """Resumed just before the spike, the run still knows what losses are usual."""
    recipe = with_train(recipe, steps=18)
    whole = spoil(trainer_of(recipe, tmp_path / "whole"), {14}, 4.0)
    whole.fit(Watcher())
    with pytest.raises(Interrupted):
        trainer_of(recipe, tmp_path / "cut").fit(stop_at(14))
    resumed = spoil(trainer_of(recipe, tmp_path / "cut"), {14}, 4.0)
    assert resumed.resume()
    resumed.fit(Watcher())
    assert whole.guard.skipped == 1
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_too_many_skipped_steps_stop_the_run_and_name_the_last_good_checkpoint(recipe, tmp_path):
    recipe = with_train(recipe, steps=30, max_skipped_steps=3)
    trainer = spoil(trainer_of(recipe, tmp_path / "run"), range(7, 30), float("nan"))
    with pytest.raises(ValueError, match=r"step 10: the loss is nan, and 4 steps .*step-00000005: .*--resume") as stop:
        trainer.fit(Watcher())
    assert "\n" not in str(stop.value)
    assert newest_state(tmp_path / "run" / "checkpoints").name == "step-00000005"
    steered = trainer_of(with_train(recipe, learning_rate=5e-4), tmp_path / "run")
    assert steered.resume() and steered.step == 5
    assert "Resumed at step 5 with train.learning_rate 0.0005 (was 0.001)" in (tmp_path / "run/logs.txt").read_text()


def test_weights_that_are_not_finite_stop_the_run(recipe, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 0: the loss is nan.* lower train.learning_rate"):
        trainer_of(with_train(recipe, max_skipped_steps=0), tmp_path / "run", model).fit(Watcher())


# -- checkpoints ------------------------------------------------------------------------------------------------------


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
