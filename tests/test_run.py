"""Whole recipes on tiny models, in one process."""

import dataclasses
import json
import shutil
import weakref
from html import escape

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolseek import run
from smolseek.checkpoint.atomic import exclusive
from smolseek.checkpoint.hub import as_ours, load, load_config, load_for_evaluation, load_stock, save
from smolseek.config import ConvertSettings, DataSettings, Recipe, SampleSettings, TrainSettings
from smolseek.conversion.pipeline import convert
from smolseek.evaluation import measure_balance, measure_quality
from smolseek.generation import continue_text
from smolseek.model import StockModel
from smolseek.reporting.report import write_report
from smolseek.run import run_recipe
from smolseek.summary import render_summary
from smolseek.training.run_folder import write_about
from smolseek.training.settings import check_inputs
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Watcher
from tests.factories import random_ids, tiny_llama
from tests.runs import scratch_recipe
from tests.text import ENTRIES, tiny_tokenizer, write_stories

RANDOM = {"source": None, "convert": None, "compare_dense": False, "train_tokenizer_entries": 300}
"""Changes that make a recipe one of random weights."""


@pytest.fixture
def source(tmp_path):
    card, model = "---\nlicense: mit\n---\n", StockModel(tiny_llama(vocab_size=ENTRIES))
    out = save(model, tmp_path / "source", tokenizer_from=tiny_tokenizer(), card=card)
    (out / "LICENSE").write_text("Do as you like.")
    return out


@pytest.fixture
def recipe(tmp_path, source):
    return Recipe(
        name="tiny",
        source=str(source),
        convert=ConvertSettings(
            calibration_windows=8, calibration_window_tokens=32, refine_steps=2, distill_steps=2, experts="upcycle"
        ),
        compare_dense=True,
        data=DataSettings(
            train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2, held_out_tokens=300
        ),
        train=TrainSettings(
            steps=6,
            batch_windows=4,
            window_tokens=16,
            warmup_steps=2,
            distill_weight=0.5,
            checkpoint_every=2,
            log_every=1,
        ),
        sample=SampleSettings(every=3, prompts=("Anna ",), max_new_tokens=5),
    )


def test_a_recipe_converts_on_the_device_that_it_trains_on(recipe, tmp_path, monkeypatch):
    class Converted(Exception):
        pass

    def convert_there(*_, device, **__):
        raise Converted(device)

    monkeypatch.setattr("smolseek.run.convert", convert_there)
    with pytest.raises(Converted, match="mps"):
        run_recipe(recipe, tmp_path / "run", device="mps")


def test_a_run_ends_in_a_stock_folder_and_a_table(recipe, tmp_path):
    stages, told = [], []
    folder = tmp_path / "runs" / "tiny"
    watcher = Watcher(on_stage=stages.append, on_progress=lambda *how: told.append(how))
    summary = run_recipe(recipe, folder, watcher=watcher)
    assert json.loads((folder / "summary.json").read_text()) == summary
    for row in ("dense", "converted", "healed", "dense_trained"):
        assert {
            "loss",
            "perplexity",
            "cache_bytes_per_token",
            "total_parameters",
            "active_parameters",
            "decode_tokens_per_second",
            "samples",
        } <= set(summary[row])
    assert summary["converted"]["cache_bytes_per_token"] < 0.6 * summary["dense"]["cache_bytes_per_token"]
    assert summary["healed"]["loss"] < summary["converted"]["loss"]
    assert summary["maxvio"] >= 0
    assert "healed" in render_summary(summary) and summary["healed"]["samples"]["Anna "] in render_summary(summary)
    started = [stage.split()[0] for stage in stages if not stage.startswith("convert:")]
    assert started == ["convert", "heal:", "write", "train", "write", "measure"]
    assert {stage for stage, done, count in told if done == count} == {"closed form", "refine layers", "end-to-end KL"}
    for name in ("model", "best", "converted", "checkpoints", "logs.txt", "metrics.jsonl"):
        assert (folder / name).exists()
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = random_ids(2, 30)
    torch.testing.assert_close(stock(ids).logits, load(folder / "model")(ids), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder / "model").bos_token_id == 0
    card = (folder / "model" / "README.md").read_text()
    for row in ("dense", "converted", "healed", "dense_trained"):
        assert f"| {row.replace('_', ' ')} | {summary[row]['loss']:.4f} |" in card
    assert card.startswith("---\n") and "license: mit" in card and "# tiny" in card and "| llama.cpp | loads" in card
    for heading in ("## Settings of the conversion", "## Recipe of the training", "## Licence", "## Limits"):
        assert heading in card
    for carried in (folder / "converted", folder / "model", folder / "dense" / "model"):
        assert (carried / "LICENSE").read_text() == "Do as you like."
    assert json.loads((folder / "model" / "conversion.json").read_text())["source"] == recipe.source
    del summary["healed"]["decode_tokens_per_second"]  # several processes measure none
    assert any(line.startswith("healed ") and line.endswith(" -") for line in render_summary(summary).splitlines())
    about = json.loads((folder / "run.json").read_text())
    assert about["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe))) and "torch" in about["versions"]


def test_the_columns_of_large_models_stay_apart():
    row = {"loss": 2.5, "perplexity": 12.2, "cache_bytes_per_token": 196_608, "samples": {}, "repetition_rate": 0.0}
    row |= {"total_parameters": 12_711_376_384, "active_parameters": 1_711_376_384, "decode_tokens_per_second": 12.3}
    small = row | {"total_parameters": 4_721_184, "active_parameters": 4_721_184, "perplexity": 1.5e8}
    head, *lines = render_summary({"dense": row, "healed": small}).splitlines()[:3]
    cells = ["dense", "2.5000", "12.20", "196,608", "12,711,376,384", "1,711,376,384", "12"]
    assert lines[0].split() == cells and len(lines[1].split()) == len(cells)
    assert len(head) == len(lines[0])


def test_the_healed_model_is_gone_when_the_dense_one_trains_and_models_are_measured_one_by_one(
    recipe, tmp_path, monkeypatch
):
    held, folders = [], []

    class Watched(Trainer):
        def release(self):
            moment = next(iter(self.optimizers[0].state.values()))["exp_avg"]
            held.extend(map(weakref.ref, (self.model, self.teacher, next(self.model.parameters()), moment)))
            super().release()

    def load_next(folder, **options):
        assert not any(reference() for reference in held)
        folders.append(folder)
        held.append(weakref.ref(model := load_for_evaluation(folder, **options)))
        return model

    def take_over(stock):
        held.append(weakref.ref(model := as_ours(stock)))
        return model

    def train_next(*about):
        assert len(held) == 4 and not any(reference() for reference in held)
        return train_dense(*about)

    train_dense = run._train_dense
    monkeypatch.setattr(run, "Trainer", Watched)
    monkeypatch.setattr(run, "_train_dense", train_next)
    monkeypatch.setattr("smolseek.summary.load_for_evaluation", load_next)
    monkeypatch.setattr("smolseek.summary.as_ours", take_over)
    summary = run_recipe(recipe, tmp_path / "run")
    assert len(folders) == len(set(folders)) == 4
    tokenizer, healed = tiny_tokenizer(), tmp_path / "run" / "model"
    held_out = check_inputs(recipe, tokenizer, load_config(healed))
    for name, folder in zip(("dense", "converted", "healed", "dense_trained"), folders, strict=True):
        quality = measure_quality(load_stock(folder), held_out.ids_T, held_out.text_bytes, counts_T=held_out.counts_T)
        assert quality.to_dict().items() <= summary[name].items()
        assert continue_text(load(folder), tokenizer, "Anna ", recipe.sample)[0] == summary[name]["samples"]["Anna "]
    assert summary["maxvio"] == round(max(measure_balance(load(healed), held_out.ids_T).values()), 4)


def test_a_finished_and_an_interrupted_run_have_a_report(recipe, tmp_path):
    run_recipe(recipe, tmp_path / "whole")
    stop = Watcher(should_stop=lambda: True)
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path / "cut", watcher=stop)
    write_report([tmp_path / "whole", tmp_path / "cut"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for row in ("dense", "converted", "healed", "dense_trained"):
        assert f"{summary[row]['loss']:.4f}" in page and escape(summary[row]["samples"]["Anna "]) in page
    assert "at step 0, going on or interrupted" in page
    for title in ("Held-out loss", "Load of every expert", "whole: attention error by layer", "Routing by the token"):
        assert title in page


def test_parameters_in_the_table_are_those_of_the_weights(recipe, tmp_path):
    summary = run_recipe(recipe, tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    assert summary["healed"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(1, 1)
    assert summary["healed"]["cache_bytes_per_token"] == cache.nbytes // 2  # bf16, the cache here is fp32


def test_an_existing_run_is_kept_unless_forced(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious").write_text("1")
    with pytest.raises(ValueError, match=r"is no run's folder.*move it away"):
        run_recipe(recipe, folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="--resume"):
        run_recipe(recipe, folder)
    assert (folder / "precious").exists()


def test_a_finished_run_goes_on_with_more_steps(recipe, tmp_path):
    folder = tmp_path / "run"
    run_recipe(recipe, folder)
    converted = (folder / "converted" / "model.safetensors").stat().st_mtime_ns
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=9))
    summary = run_recipe(longer, folder, resume=True)
    assert summary["trained_tokens"] == 9 * 4 * 16
    assert (folder / "converted" / "model.safetensors").stat().st_mtime_ns == converted
    assert "Resumed at step 6 with train.steps 9 (was 6)" in (folder / "logs.txt").read_text()
    assert json.loads((folder / "run.json").read_text())["recipe"]["train"]["steps"] == 9
    slower = dataclasses.replace(longer, train=dataclasses.replace(longer.train, learning_rate=5e-5))
    card = (folder / "model" / "README.md").read_text()
    assert run_recipe(slower, folder, resume=True)["trained_tokens"] == 9 * 4 * 16
    assert json.loads((folder / "run.json").read_text())["recipe"]["train"]["learning_rate"] == 1e-3
    assert (folder / "model" / "README.md").read_text() == card
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps) == 8


def test_the_report_of_a_finished_run_that_went_on_and_was_interrupted_says_so(recipe, tmp_path):
    folder = tmp_path / "run"
    run_recipe(recipe, folder)
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=9))
    with pytest.raises(Interrupted):
        run_recipe(longer, folder, resume=True, watcher=Watcher(should_stop=lambda: True))
    write_report([folder], tmp_path / "report.html")
    assert "at step 6, going on or interrupted" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("how", ["resume", "force"])
def test_a_second_run_in_the_same_folder_is_refused(recipe, tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    write_about(folder, recipe, {}, 1)
    (folder / "logs.txt").write_text("of the first")
    with exclusive(folder), pytest.raises(ValueError, match="another process is at work in it"):
        run_recipe(recipe, folder, **{how: True})
    assert (folder / "logs.txt").read_text() == "of the first"


def test_healing_a_converted_folder_is_compared_with_the_dense_model(recipe, source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}")
    train, chat = dataclasses.replace(recipe.train, steps=1), dataclasses.replace(recipe.sample, chat=True)
    convert(source, tmp_path / "v3", settings=recipe.convert)
    heal = dataclasses.replace(
        recipe, convert=None, source=str(tmp_path / "v3"), teacher=str(source), train=train, sample=chat
    )
    summary = run_recipe(heal, tmp_path / "run")
    models = [name for name, row in summary.items() if isinstance(row, dict) and "loss" in row]
    assert models == ["dense", "converted", "healed", "dense_trained"]
    assert summary["converted"]["cache_bytes_per_token"] < 0.6 * summary["dense"]["cache_bytes_per_token"]
    assert summary["dense"]["samples"]["Anna "].startswith("Anna \n\n")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(escape(summary[name]["samples"]["Anna "]) in page for name in models)


def test_a_run_without_prompts_has_no_samples(recipe, tmp_path):
    quiet = dataclasses.replace(
        recipe,
        convert=None,
        compare_dense=False,
        train=TrainSettings(steps=1, window_tokens=16),
        sample=SampleSettings(prompts=()),
    )
    summary = run_recipe(quiet, tmp_path / "run")
    assert summary["trained"]["samples"] == {} and "--" not in render_summary(summary)


def test_a_refused_resume_changes_nothing(recipe, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_recipe(recipe, folder, watcher=Watcher(should_stop=lambda: True))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other_text = str(write_stories(tmp_path / "b.txt", seed=5))
    for changes in (
        {"data": dataclasses.replace(recipe.data, train=(other_text,))},
        {"convert": dataclasses.replace(recipe.convert, cache=0.5)},
        {
            "source": str(
                save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "b", tokenizer_from=tiny_tokenizer())
            )
        },
    ):
        with pytest.raises(ValueError, match="other settings"):
            run_recipe(dataclasses.replace(recipe, **changes), folder, resume=True)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="no such run to resume; there are run"):
        run_recipe(recipe, tmp_path / "rnu", resume=True)
    assert not (tmp_path / "rnu").exists()


@pytest.mark.parametrize("name", ["source", "teacher"])
def test_weights_that_are_cut_short_leave_no_run(name, recipe, source, tmp_path):
    convert(source, tmp_path / "v3", settings=recipe.convert)
    heal = dataclasses.replace(recipe, convert=None, source=str(tmp_path / "v3"), teacher=str(source))
    cut = shutil.copytree(getattr(heal, name), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        run_recipe(dataclasses.replace(heal, **{name: str(cut)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_when_its_weights_are_read_leaves_no_folder(recipe, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("too bad")

    monkeypatch.setattr("smolseek.run.convert", fails)
    with pytest.raises(ValueError, match="too bad"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_conversion_stays_whatever_comes_later(recipe, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("too bad")

    with monkeypatch.context() as patch:
        patch.setattr("smolseek.run.Trainer", fails)
        with pytest.raises(ValueError, match=r"too bad \(the conversion is kept: mend that and pass --resume\)"):
            run_recipe(recipe, tmp_path / "run")
    monkeypatch.setattr("smolseek.run.convert", fails)
    shorter = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    assert run_recipe(shorter, tmp_path / "run", resume=True)["trained_tokens"] == 2 * 4 * 16


def test_the_conversion_reads_the_runs_training_text_as_the_run_does(recipe, tmp_path, monkeypatch):
    """With its columns, and without what the run holds out."""
    seen = {}

    def convert_there(*_, settings, data, **__):
        seen.update(settings=settings, data=data)
        raise ValueError("seen")

    monkeypatch.setattr("smolseek.run.convert", convert_there)
    with pytest.raises(ValueError, match="seen"):
        run_recipe(recipe, tmp_path / "run")
    assert seen["data"] == recipe.data and seen["settings"].calibration == recipe.data.train
    own = str(write_stories(tmp_path / "c.txt", seed=7))
    convert = dataclasses.replace(recipe.convert, calibration=(own,), separator="|")
    with pytest.raises(ValueError, match="seen"):
        run_recipe(dataclasses.replace(recipe, convert=convert), tmp_path / "other")
    assert seen["data"] == dataclasses.replace(recipe.data, train=(own,), separator="|")


def test_tokenizer_files_and_end_tokens_are_carried_byte_for_byte(recipe, tmp_path, source):
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 7],   "bos_token_id": 0}')
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=7))
    run_recipe(recipe, tmp_path / "run")
    files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for folder in ("converted", "model", "best", "dense/model"):
        for name in files:
            assert (tmp_path / "run" / folder / name).read_bytes() == (source / name).read_bytes(), (folder, name)
    assert {0, 7} <= set(load(tmp_path / "run" / "model").end_token_ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compare_dense": True, "convert": None}, "compare_dense true: no dense model to compare with"),
        ({"name": "../other"}, "is the name of a folder under runs/"),
        ({"source": None}, "either source"),
        ({"model": {"model_type": "llama"}}, "either source"),
        ({"source": "./nowhere"}, "no such folder"),
        ({"source": None, "convert": None, "model": {"model_type": "llama"}}, "need a tokenizer"),
        (
            RANDOM | {"model": {"model_type": "gpt2"}},
            "llama, deepseek_v3",
        ),
        (
            RANDOM | {"model": {"model_type": "llama", "n": 1}},
            r"model\.n",
        ),
        *(
            (RANDOM | {"model": {"model_type": "llama", name: value}}, "recipe key model: no model can be built")
            for name, value in (("num_attention_heads", 7), ("hidden_size", "big"), ("hidden_act", "swish2"))
        ),
        (RANDOM | {"model": {"model_type": "llama"}, "train_tokenizer_entries": -5}, "must not be negative"),
        (
            RANDOM | {"model": {"model_type": "llama"}, "compare_dense": True, "teacher": "t"},
            "compare_dense true: random weights",
        ),
    ],
)
def test_recipes_that_cannot_run(recipe, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run_recipe(dataclasses.replace(recipe, train=TrainSettings(), **changes), tmp_path / "run")


@pytest.mark.parametrize("changes", [{}, RANDOM | {"model": {"model_type": "llama"}, "train": TrainSettings()}])
def test_a_generation_config_that_would_be_copied_is_refused_before_the_training(changes, recipe, source, tmp_path):
    (source / "generation_config.json").write_text("{")
    recipe = dataclasses.replace(recipe, tokenizer=str(source), **changes)
    with pytest.raises(ValueError, match=r"generation_config\.json: not JSON"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_dense_run_has_no_dense_model_to_compare_with(recipe, tmp_path, source):
    recipe = dataclasses.replace(recipe, convert=None, teacher=str(source), compare_dense=True)
    with pytest.raises(ValueError, match=r"compare_dense true: .* is dense itself"):
        run_recipe(recipe, tmp_path / "run")


def test_a_softmax_router_trains_and_its_card_says_it_is_not_stock(tmp_path):
    from smolseek.cli import main

    recipe = scratch_recipe(tmp_path, scoring_func="softmax")
    assert main(["train", str(recipe), "--runs", str(tmp_path / "runs"), "--train.steps", "3"]) == 0
    folder = tmp_path / "runs" / "scratch" / "model"
    assert "not stock" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "smolseek_v3_softmax"
    assert main(["generate", str(folder), "--prompt", "Anna", "--max-new-tokens", "3"]) == 0


def test_a_conversion_json_that_gives_no_card_is_refused_before_the_training(recipe, source, tmp_path):
    (source / "conversion.json").write_text('{"source": 3, "losses": {}}')
    alone = dataclasses.replace(
        recipe, convert=None, compare_dense=False, train=dataclasses.replace(recipe.train, distill_weight=0.0)
    )
    with pytest.raises(ValueError, match=r"conversion\.json: not as smolseek writes it"):
        run_recipe(alone, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run" / "model").exists()
