"""Refusals: one line each, before anything heavy runs, and nothing is left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolseek.checkpoint.source import read_config
from smolseek.config import ConvertSettings
from smolseek.conversion.job import read_job
from smolseek.conversion.pipeline import convert
from tests.conversion.folders import edit, stock, write_source


def poke(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    elif isinstance(value, torch.Tensor):
        tensors[name] = value
    else:
        tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_lora(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "architecture": (lambda f: edit(f, model_type="gpt2"), "gpt2.*llama, mistral"),
    "attention bias": (lambda f: edit(f, attention_bias=True), "q_proj.bias.*not in the checkpoint"),
    "mlp bias": (lambda f: edit(f, mlp_bias=True), "mlp_bias"),
    "bias on disk": (lambda f: poke(f, "model.layers.0.self_attn.q_proj.bias", torch.ones(32)), "q_proj.bias"),
    "sliding window": (lambda f: edit(f, model_type="mistral", sliding_window=4096), "sliding_window"),
    "quantised": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "rope scaling": (
        lambda f: edit(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "--exact",
    ),
    "NaN": (lambda f: poke(f, NORM, float("nan")), NORM),
    "infinity": (lambda f: poke(f, NORM, float("inf")), NORM),
    "missing tensor": (lambda f: poke(f, NORM, None), NORM),
    "wrong shape": (lambda f: poke(f, NORM, torch.ones(5)), r"shape \(5,\)"),
    "integers": (lambda f: poke(f, NORM, torch.ones(32, dtype=torch.int8)), "quantised"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "half a file": (lambda f: (f / "model.safetensors").write_bytes(b"12345678abc"), "model.safetensors"),
    "quantised head": (
        lambda f: poke(f, "lm_head.weight", torch.ones(300, 32, dtype=torch.int8)),
        "lm_head.weight: dtype I8 is quantised",
    ),
    "no head": (lambda f: edit(f, tie_word_embeddings=False), "lm_head.weight: .*tie_word_embeddings to true"),
    "dtype": (lambda f: edit(f, dtype="auto"), "dtype 'auto'"),
    "a field that only transformers knows": (
        lambda f: edit(f, use_cache="yes"),
        "does not take its config.json.*use_cache",
    ),
    "a model that cannot be built": (
        lambda f: edit(f, model_type="qwen2", head_dim=None),
        "builds no model from its config.json",
    ),
    "V3": (lambda f: edit(f, model_type="deepseek_v3"), "is DeepSeek-V3 already.*smolseek train"),
    "LoRA": (make_lora, "merge_and_unload"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_refused(case, source, quick, tmp_path):
    shutil.copytree(source, tmp_path / "broken")
    breakage, message = BROKEN[case]
    breakage(tmp_path / "broken")
    refused(tmp_path / "broken", tmp_path, quick(), message)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"kv_lora_rank": 0}, "kv_lora_rank 0"),
    "rank too large": ({"kv_lora_rank": 33}, "at most 32"),
    "odd rope": ({"qk_rope_head_dim": 3}, "even"),
    "exact with ranks": ({"exact": True, "kv_lora_rank": 8}, "exact"),
    "experts do not divide": ({"experts": "upcycle", "moe_intermediate_size": 7}, "moe_intermediate_size 7"),
    "weights without calibration": ({"calibration": (), "calibration_weights": (1.0, 2.0)}, "2 for 1 sources"),
    "missing calibration": ({"calibration": ("nowhere.txt",)}, "nowhere.txt"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_are_refused(case, source, quick, tmp_path):
    changes, message = IMPOSSIBLE[case]
    refused(source, tmp_path, quick(**changes), message)


def refused(source, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "out", settings=settings)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_force_replaces_what_convert_wrote_and_nothing_else(source, tmp_path):
    out, exact = tmp_path / "out", ConvertSettings(exact=True)
    convert(source, out, settings=exact)
    with pytest.raises(ValueError, match="exists already; pass --force"):
        convert(source, out, settings=exact)
    (out / "mine.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(ValueError, match=r"--force would remove mine\.txt, which convert did not write"):
            convert(source, out, settings=exact, force=force)
    (out / "mine.txt").unlink()
    convert(source, out, settings=exact, force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    for force in (False, True):
        with pytest.raises(ValueError, match="is there, and stays: --force replaces only"):
            convert(source, tmp_path / "photos", settings=exact, force=force)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_an_output_in_the_source_is_refused(source):
    before = sorted(source.rglob("*"))
    with pytest.raises(ValueError, match=r"out: lies in the source .*; name a folder outside it"):
        convert(source, source / "out", settings=ConvertSettings(exact=True))
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("out", ["m", "m/..", "text.txt", "texts"])
def test_force_removes_nothing_that_is_read(out, source, quick, text, tmp_path, monkeypatch):
    """The source itself, a folder that holds it, the calibration text, a folder that holds that."""
    shutil.copytree(source, tmp_path / "models" / "m")
    (tmp_path / "models" / "texts").mkdir()
    for copy in ("text.txt", "texts/a.txt"):
        shutil.copyfile(text, tmp_path / "models" / copy)
    monkeypatch.chdir(tmp_path / "models")
    before = sorted(path for path in tmp_path.rglob("*"))
    settings = quick(calibration=("text.txt", "texts/*.txt"))
    with pytest.raises(ValueError, match="which is read here and would be removed; name another"):
        convert("m", out, settings=settings, force=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": None}, "experts: None is not one of none, upcycle, carve"),
        ({"experts": "moe"}, "experts: 'moe' is not one of"),
        ({"profile": "vLLM"}, "profile: 'vLLM' is not one of portable, vllm, transformers"),
        ({"refine_steps": "many"}, "refine_steps: 'many' is not of type int"),
        ({"refine_steps": "3"}, "refine_steps: '3' is not of the type"),
        ({"cache": float("nan")}, "cache: nan is no number"),
        ({"exact": 1}, "exact: 1 is not of type bool"),
        ({"calibration_windows": 0}, "calibration_windows 0: must be 1 or more"),
        ({"calibration_window_tokens": 1}, "calibration_window_tokens 1: must be 2 or more"),
        ({"calibration_weights": (1.0, 2.0)}, "calibration_weights .*: 2 for 1 sources of calibration"),
    ],
)
def test_choices_and_types_are_checked_in_python_too(fields, words, source, quick, tmp_path):
    with pytest.raises(ValueError, match=words):
        convert(source, tmp_path / "out", settings=quick(), **fields)
    assert not list(tmp_path.iterdir())


def test_where_no_text_is_named_the_model_writes_it(source, quick, tmp_path):
    def read(**changes):
        job = read_job(
            source, tmp_path / "self", quick(calibration=(), **changes), device="cpu", force=False, on_progress=print
        )
        return job.settings.calibration, job.data.train

    assert read() == read(exact=True, experts="upcycle") == (("self",), ("self",))
    assert read(exact=True)[0] == ()  # reads no text


def test_a_folder_called_self_is_no_text_that_is_read(source, quick, tmp_path, monkeypatch):
    """The word stands for what the model writes, so --force may replace the folder."""
    monkeypatch.chdir(tmp_path)
    convert(source, "self", settings=ConvertSettings(exact=True))
    read_job(source, Path("self"), quick(calibration=("self",)), device="cpu", force=True, on_progress=print)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_beside_tied_embeddings_counts_where_it_differs(differs, source, tmp_path):
    """transformers unties the two then, whatever config.json says; equal ones stay tied."""
    folder = shutil.copytree(source, tmp_path / "source")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"] * (1.5 if differs else 1.0)
    poke(folder, "lm_head.weight", head)
    out = convert(folder, tmp_path / "out", settings=ConvertSettings(exact=True))
    assert read_config(out)["tie_word_embeddings"] is not differs
    model, dense = stock(out), stock(folder)
    torch.testing.assert_close(model.lm_head.weight, dense.lm_head.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not differs
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)


def test_a_head_of_its_own_is_kept_by_the_fitted_form(source, quick, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"] * 1.5
    poke(folder, "lm_head.weight", head)
    out = convert(folder, tmp_path / "out", settings=quick(calibration_windows=2, distill_steps=0))
    torch.testing.assert_close(stock(out).lm_head.weight, head)


def test_experts_need_a_hidden_size_that_transformers_runs(quick, tmp_path):
    folder = write_source(tmp_path / "source", hidden_size=36, head_dim=8)
    refused(folder, tmp_path, quick(experts="upcycle"), "hidden_size 36: transformers runs experts only")


def test_a_share_that_the_profile_has_not_is_said(tmp_path, caplog):
    """vLLM takes caches of 320, 512 or 576 numbers; this source has 384."""
    shape = {"hidden_size": 384, "num_key_value_heads": 3, "num_attention_heads": 6, "head_dim": 64}
    source = write_source(tmp_path / "source", **shape)
    for cache in (0.5, 0.83):
        settings = ConvertSettings(cache=cache, profile="vllm")
        read_job(source, tmp_path / "out", settings, device="cpu", force=False, on_progress=lambda *_: None)
    assert caplog.messages == [
        "cache 0.5: of vLLM's sizes the nearest is 256 + 64 numbers, which keeps 83.3% of the cache"
    ]
