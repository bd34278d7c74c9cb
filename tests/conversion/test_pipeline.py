"""Whole conversions, folder to folder, read by unmodified transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

import smolseek
from smolseek.checkpoint.hub import save
from smolseek.config import ConvertSettings, DataSettings
from smolseek.conversion import job, pipeline, refine
from smolseek.conversion.distill import dense_states
from smolseek.conversion.pipeline import convert
from smolseek.model import StockModel
from smolseek.numerics import precision
from tests.conversion.folders import edit, logits, stock, write_source
from tests.factories import tiny_dense, tiny_llama
from tests.text import ENTRIES, tiny_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_a_stock_folder_that_transformers_and_smolseek_read_alike(source, quick, text, tmp_path):
    out = convert(source, tmp_path / "out", settings=quick(kv_lora_rank=16, qk_rope_head_dim=4))
    model = stock(out)
    assert type(model) is DeepseekV3ForCausalLM
    torch.testing.assert_close(logits(smolseek.load(out), text), logits(model, text), rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config["scoring_func"] == "sigmoid" and config["first_k_dense_replace"] == 2
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    report = json.loads((out / "conversion.json").read_text())
    assert report["cache"]["source_numbers_per_token"] == 2 * 2 * 2 * 8
    assert report["cache"]["numbers_per_token"] == 2 * (16 + 4)
    assert len(report["layers"]) == 2
    assert all(
        0 <= layer["latent_error_weighted"] < 1 and 0 < layer["rope_energy_kept"] <= 1 for layer in report["layers"]
    )
    assert report["settings"]["seed"] == 0 and report["calibration"]["windows"] > 0
    card = (out / "README.md").read_text()
    assert "kv_lora_rank: 16" in card and "from_pretrained" in card


def test_more_rank_is_closer_to_the_dense_model(source, quick, text, tmp_path):
    dense = logits(stock(source), text)
    errors = []
    for rank in (2, 8, 32):
        out = convert(source, tmp_path / str(rank), settings=quick(kv_lora_rank=rank, qk_rope_head_dim=8))
        errors.append(float((logits(stock(out), text) - dense).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_refinement_brings_the_logits_nearer_stage_by_stage(source, quick, text, tmp_path):
    dense = logits(stock(source), text)
    errors = []
    for steps in ({}, {"refine_steps": 40, "distill_steps": 0}, {"refine_steps": 40, "distill_steps": 40}):
        settings = quick(kv_lora_rank=8, qk_rope_head_dim=4, **steps)
        out = convert(source, tmp_path / str(len(errors)), settings=settings)
        errors.append(float((logits(stock(out), text) - dense).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    report = json.loads((out / "conversion.json").read_text())
    losses = report["losses"]  # random weights predict no text, so the losses need not fall
    assert set(losses) == {"dense", "closed_form", "refined", "distilled"} and min(losses.values()) > 0
    assert all(layer["attention_error_refined"] < layer["attention_error"] for layer in report["layers"])
    assert "distilled" in (out / "README.md").read_text()
    torch.testing.assert_close(logits(smolseek.load(out), text), logits(stock(out), text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_states_to_learn_from_are_the_dense_models(bf16, source, quick, tmp_path, monkeypatch):
    """The stream moves on in place, and what was kept of it behind a layer stays, in whatever dtype products are."""
    layers, seen = range(1), []
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: bf16)
    monkeypatch.setattr(refine, "matched_layers", lambda _: layers)

    def look(job, student, dense, calibration, states):
        seen.append((states, dense_states(dense, states.ids_BT, layers)))

    monkeypatch.setattr(pipeline, "distill_model", look)
    convert(source, tmp_path / "out", settings=quick(refine_steps=1, distill_steps=1))
    ((kept, known),) = seen
    torch.testing.assert_close(kept.behind_BTD[0], known.behind_BTD[0], rtol=0.02, atol=0.1)
    torch.testing.assert_close(kept.final_BTD, known.final_BTD, rtol=0.02, atol=0.1)
    assert not torch.allclose(kept.behind_BTD[0].float(), kept.final_BTD, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("exact", [False, True])
def test_carving_leaves_fewer_active_neurons_and_refinement_wins_back(exact, source, quick, text, tmp_path):
    dense = logits(stock(source), text)
    errors, losses = [], []
    for steps in ({}, {"refine_steps": 60, "distill_steps": 60}):
        settings = quick(experts="carve", active=0.75, exact=exact, first_k_dense_replace=1, **steps)
        out = convert(source, tmp_path / str(len(errors)), settings=settings)
        losses.append(json.loads((out / "conversion.json").read_text())["losses"])
        model = stock(out)
        torch.testing.assert_close(logits(smolseek.load(out), text), logits(model, text), rtol=1e-3, atol=1e-3)
        errors.append(float((logits(model, text) - dense).square().mean()))
    if not exact:  # with exact attention the closed form loses next to nothing
        assert errors[0] > errors[1]
    assert [{*stages} for stages in losses] == [{"dense", "closed_form"}, {"dense", "refined", "distilled"}]
    assert abs(losses[0]["closed_form"] - losses[0]["dense"]) > 1e-5, "the MLPs are carved"
    config = json.loads((out / "config.json").read_text())
    met = config["n_shared_experts"] + config["num_experts_per_tok"]
    assert met < config["n_shared_experts"] + config["n_routed_experts"] and config["n_group"] == 1
    report = json.loads((out / "conversion.json").read_text())
    assert "mlp_error" not in report["layers"][0]
    assert 0 < report["layers"][1]["mlp_error_refined"] < report["layers"][1]["mlp_error"]


def test_an_interrupted_conversion_goes_on_at_the_layer_it_reached(source, quick, tmp_path):
    settings = quick(refine_steps=3, distill_steps=0, experts="carve")
    whole = convert(source, tmp_path / "whole", settings=settings)
    seen = []

    def stop_at_the_second_layer(stage, done, count):
        seen.append((stage, done))
        if (stage, done) == ("refine layers", 1) and seen.count((stage, done)) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", settings=settings, on_progress=stop_at_the_second_layer)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", settings=settings, on_progress=stop_at_the_second_layer)
    assert seen.count(("closed form", 0)) == 1
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    reports = [json.loads((tmp_path / n / "conversion.json").read_text()) for n in ("out", "whole")]
    assert reports[0]["layers"] == reports[1]["layers"]


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_source_with_biases_learns_under_the_transformers_profile(model_type, quick, tmp_path):
    """Its queries' biases stand behind a constant coordinate, beside weights thousands of times as large."""
    dense = StockModel(tiny_dense(model_type, attention_bias=True, vocab_size=ENTRIES))
    source = save(dense, tmp_path / "source", tokenizer_from=tiny_tokenizer())
    settings = quick(profile="transformers", cache=0.5, refine_steps=40, distill_steps=40)
    out = convert(source, tmp_path / "out", settings=settings)
    report = json.loads((out / "conversion.json").read_text())
    errors = [(layer["attention_error"], layer["attention_error_refined"]) for layer in report["layers"]]
    assert all(after < 0.95 * before for before, after in errors)
    assert "distilled" in report["losses"]


def test_an_end_to_end_stage_that_ends_in_nan_is_undone(source, quick, tmp_path, monkeypatch):
    """By the rule of large sources, too, which are judged by their loss beside the KL."""
    monkeypatch.setattr("smolseek.conversion.distill._RATE", float("nan"))
    plain = convert(source, tmp_path / "0", settings=quick(refine_steps=1, distill_steps=0))
    for small in (True, False):
        monkeypatch.setattr("smolseek.conversion.distill.is_small", lambda _, small=small: small)
        monkeypatch.setattr("smolseek.conversion.distill._RATE_PER_ROOT", float("nan"))
        harmed = convert(source, tmp_path / f"1 {small}", settings=quick(refine_steps=1, distill_steps=3))
        assert (plain / "model.safetensors").read_bytes() == (harmed / "model.safetensors").read_bytes()


def test_an_end_to_end_stage_that_does_harm_is_undone(source, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("smolseek.conversion.distill._RATE", 3.0)
    plain, harmed = (
        convert(source, tmp_path / str(steps), settings=quick(refine_steps=1, distill_steps=steps)) for steps in (0, 3)
    )
    assert (plain / "model.safetensors").read_bytes() == (harmed / "model.safetensors").read_bytes()
    assert "distilled" not in json.loads((harmed / "conversion.json").read_text())["losses"]


def test_one_kv_head_with_full_rope_and_rank_loses_only_what_the_norm_does(tmp_path, quick, text):
    """The slots keep all scores; only the latent's norm loses something, for it is as wide as keys and values."""
    single = write_source(tmp_path / "single", num_key_value_heads=1)
    out = convert(single, tmp_path / "out", settings=quick(kv_lora_rank=16, qk_rope_head_dim=8))
    report = json.loads((out / "conversion.json").read_text())
    assert all(layer["rope_energy_kept"] == pytest.approx(1.0) for layer in report["layers"])
    assert report["rope_theta"] == 100.0


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 1}, {"head_dim": 12}])
def test_exact_conversion_keeps_the_logits(changes, quick, text, tmp_path):
    source = write_source(tmp_path / "source", **changes)
    out = convert(source, tmp_path / "out", settings=ConvertSettings(exact=True))
    dense = logits(stock(source), text)
    torch.testing.assert_close(logits(stock(out), text), dense, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(smolseek.load(out), text), dense, rtol=0, atol=1e-4)


def test_the_exact_form_can_be_trained(source, text, tmp_path):
    """The first steps of training do not move its large constant."""
    model = smolseek.load(convert(source, tmp_path / "out", settings=ConvertSettings(exact=True))).train()
    ids = tiny_tokenizer()(Path(text).read_text()[:2000], return_tensors="pt")["input_ids"][:, :64]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)


def test_exact_conversion_of_a_bf16_source_is_written_in_fp32(quick, text, tmp_path):
    model = tiny_llama(vocab_size=ENTRIES).bfloat16()
    model.config.dtype = torch.bfloat16
    save(StockModel(model), tmp_path / "source", tokenizer_from=tiny_tokenizer())
    out = convert(tmp_path / "source", tmp_path / "out", settings=ConvertSettings(exact=True))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock(out), text), logits(dense, text), rtol=0, atol=1e-4)
    portable = convert(tmp_path / "source", tmp_path / "bf16", settings=quick())
    assert load_file(portable / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("neurons", [48, 44])
def test_upcycling_changes_nothing_at_first(exact, neurons, quick, text, tmp_path):
    source = write_source(tmp_path / "source", intermediate_size=neurons)
    dense, experts = (
        convert(source, tmp_path / kind, settings=quick(experts=kind, exact=exact)) for kind in ("none", "upcycle")
    )
    torch.testing.assert_close(logits(stock(experts), text), logits(stock(dense), text), rtol=0, atol=1e-4)
    assert load_file(experts / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"].any()
    assert json.loads((experts / "config.json").read_text())["moe_intermediate_size"] % 8 == 0


@pytest.mark.parametrize("experts", ["upcycle", "carve"])
def test_same_seed_same_bytes(experts, source, quick, tmp_path):
    changes = {"experts": experts, "qk_rope_head_dim": 4, "refine_steps": 2, "distill_steps": 2}
    first, again = (convert(source, tmp_path / name, settings=quick(**changes)) for name in ("first", "again"))
    other = convert(source, tmp_path / "other", settings=quick(**changes, seed=1))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_mistral_without_a_window_converts(source, quick, text, tmp_path):
    shutil.copytree(source, tmp_path / "mistral")
    edit(tmp_path / "mistral", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    out = convert(tmp_path / "mistral", tmp_path / "out", settings=ConvertSettings(exact=True))
    torch.testing.assert_close(logits(stock(out), text), logits(stock(source), text), rtol=0, atol=1e-4)
    convert(tmp_path / "mistral", tmp_path / "portable", settings=quick())


# -- a real pretrained model ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside the checkout")
def test_stories260k_keeps_its_sense_at_half_its_cache(tmp_path):
    """Half the cache and little calibration text; the limits leave room around the measured values."""
    from smolseek.data import calibration_windows

    source, text = DATA / "stories260K", str(DATA / "text" / "tinystories-train.txt")
    settings = ConvertSettings(24, 8, (text,), calibration_windows=24, experts="upcycle", refine_steps=0)
    out = convert(source, tmp_path / "out", settings=settings)
    data = DataSettings(train=(str(DATA / "text" / "tinystories-valid.txt"),), held_out_share=0.0)
    ids, _ = calibration_windows(AutoTokenizer.from_pretrained(source), data, windows=12, window_tokens=512, seed=0)
    with torch.no_grad():
        dense, converted = (float(stock(folder)(ids, labels=ids).loss.exp()) for folder in (source, out))
    assert dense < 4.5
    assert converted < 1.3 * dense


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside the checkout")
def test_stories260k_exact_on_real_text(tmp_path):
    source = DATA / "stories260K"
    out = convert(source, tmp_path / "out", settings=ConvertSettings(exact=True))
    text = (DATA / "text" / "tinystories-valid.txt").read_text(encoding="utf-8")[:4000]
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        assert (stock(out)(ids).logits - stock(source)(ids).logits).abs().max() < 1e-3


def test_too_little_space_for_the_blocks_inputs_is_said_before_they_are_made(source, quick, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"0\.0 MB free.*for the converted weights"):
        convert(source, tmp_path / "deeper" / "out", settings=quick())
    monkeypatch.setattr(job, "check_space", lambda *_: None)
    with pytest.raises(ValueError, match=r"0\.0 MB free.*free some space or lower calibration_windows"):
        convert(source, tmp_path / "out", settings=quick())
    assert not list(tmp_path.iterdir())


def test_a_number_that_the_dtype_does_not_hold_is_refused(source, quick, tmp_path, monkeypatch):
    def tensors(*_):
        yield "model.norm.weight", torch.tensor([1.0, float("inf")])

    monkeypatch.setattr(pipeline, "student_tensors", tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: NaN or infinite as float32"):
        convert(source, tmp_path / "out", settings=quick())
    assert not (tmp_path / "out").exists()


def test_what_a_killed_conversion_left_goes(source, quick, tmp_path):
    (tmp_path / ".out.partial-9999999-abc").mkdir()  # no process has such a number
    convert(source, tmp_path / "out", settings=quick(exact=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_is_told_from_everywhere_alike(source, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    out = convert(source.name, tmp_path / "out", settings=quick(exact=True))
    assert json.loads((out / "conversion.json").read_text())["source"] == str(source)


def test_a_runs_text_calibrates_where_the_settings_name_none(source, text, tmp_path):
    settings = ConvertSettings(calibration_windows=12, calibration_window_tokens=32, refine_steps=0)
    data = DataSettings(train=(text,), held_out_share=0.0)
    out = convert(source, tmp_path / "out", settings=settings, data=data)
    (record,) = json.loads((out / "conversion.json").read_text())["calibration"]["sources"]
    assert record["source"] == text
