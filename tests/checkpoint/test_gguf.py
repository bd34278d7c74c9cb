"""GGUF files as sources: the unpacked folder against the Hugging Face folder that the file was made from."""

import json
import logging
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import llamacpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from llamacpp import LlamaCpp
from transformers import AutoModelForCausalLM

import smolseek
from smolseek.checkpoint import gguf
from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import fetch_config, read_config, read_conversion, read_json, resolve_folder
from smolseek.cli import main
from smolseek.formats.dense import read_source
from tests.factories import LIVELY_ROPE, LLAMA3, logits_of
from tests.gguf_files import dense_folder, write_gguf
from tests.text import ENTRIES, KINDS, kind_of_tokenizer, tiny_tokenizer, write_stories

MODELS = {
    "llama": {},
    "llama, its own head": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True},
    "llama, wide heads": {"head_dim": 16},
    "llama, scaled as Llama 3": {"rope_parameters": LLAMA3},
    "llama, scaled linearly": {"rope_parameters": LIVELY_ROPE["linear"]},
    "qwen2": {"pad_token_id": 0},
    "qwen3": {"pad_token_id": 0, "head_dim": 16},
    "smollm3": {"num_hidden_layers": 4},
}
TEXTS = (
    "Anna sees the cat 123.",
    "x   2024\n\n\n 7",
    "Ünïcödé 東京 🙂 I'LL",
    "<|endoftext|>a <|endoftext|>",
    "  a",
    "",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test alone; returns the folder that the unpacked ones lie in."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "smolseek" / "gguf"


def ids(tokens=40):
    return torch.randint(ENTRIES, (1, tokens), generator=torch.Generator().manual_seed(0))


def make(folder, name, **options):
    """Returns a folder of a model of MODELS, and its GGUF file."""
    dense = dense_folder(folder / "dense", name.split(",")[0], **MODELS[name])
    return dense, write_gguf(dense, folder / "model.gguf", **options)


@pytest.mark.parametrize("name", MODELS)
def test_weights_config_and_logits_are_the_original_s(tmp_path, name):
    dense, file = make(tmp_path, name)
    folder = resolve_folder(file)
    theirs, ours = TensorFolder(dense), TensorFolder(folder)
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in theirs.names())
    assert read_source(read_config(folder)) == read_source(read_config(dense))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(model, ids()), logits_of(AutoModelForCausalLM.from_pretrained(dense), ids()))
    assert read_source(fetch_config(file)) == read_source(read_config(dense))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_the_same_model_in_the_file(tmp_path, name, llama_cpp):
    """Without this the order of rows would be that of this project's tests alone."""
    _, file = make(tmp_path, name)
    with LlamaCpp(file) as theirs, torch.inference_mode():
        assert (theirs.logits(ids()[0]) - load(file)(ids())[0]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_1", "bfloat16")]
)
def test_dtypes(tmp_path, kind, dtype):
    _, file = make(tmp_path, "qwen2", kind=kind)
    folder = resolve_folder(file)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    down = tensors["blk.1.ffn_down.weight"]
    wanted = torch.from_numpy(dequantize(down.data, down.tensor_type).copy()).to(getattr(torch, dtype))
    assert torch.equal(TensorFolder(folder).get("model.layers.1.mlp.down_proj.weight"), wanted)
    assert read_config(folder)["dtype"] == dtype


@pytest.fixture
def llama_cpp():
    """Skips a test where llama.cpp is not installed."""
    try:
        llamacpp.shared_library()
    except ImportError as missing:
        pytest.skip(str(missing))


def assert_cut_as_in_llama_cpp(file):
    tokenizer = load_tokenizer(file)
    with LlamaCpp(file) as theirs:
        for text in TEXTS:
            assert theirs.tokenize(text, special=True) == tokenizer(text)["input_ids"], text


def folder_with(folder, tokenizer, **overrides):
    """Returns a folder of a Llama of one layer with a tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
    return dense_folder(folder, tokenizer=tokenizer, **(sizes | overrides))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_template_and_ends_are_the_original_s(tmp_path, kind):
    tokenizer = kind_of_tokenizer(kind)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [1, 5]}
    dense = folder_with(tmp_path / "dense", tokenizer, **special)
    theirs, folder = load_tokenizer(dense), resolve_folder(write_gguf(dense, tmp_path / "model.gguf"))
    ours = load_tokenizer(folder)
    for text in TEXTS:
        if kind == "sentencepiece" and text.startswith(" "):
            continue  # llama.cpp puts one ▁ more before it than Metaspace, and the file does not say which is meant
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"]), text
    speech = [{"role": "user", "content": "Anna 12"}]
    assert ours.apply_chat_template(speech, tokenize=False) == theirs.apply_chat_template(speech, tokenize=False)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [1, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tokenizers_cut_as_llama_cpp_does(tmp_path, kind, llama_cpp):
    assert_cut_as_in_llama_cpp(
        write_gguf(folder_with(tmp_path / "dense", kind_of_tokenizer(kind)), tmp_path / "m.gguf")
    )


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2", "llama3", "llama-v3", "deepseek-r1-qwen"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_text_is_cut_as_llama_cpp_does(tmp_path, family, cut, llama_cpp):
    """transformers has a tokenizer of its own for Qwen, which must not take the place of the file's."""
    dense = dense_folder(tmp_path / "dense", family, num_hidden_layers=1)
    assert_cut_as_in_llama_cpp(write_gguf(dense, tmp_path / "m.gguf", keys={"tokenizer.ggml.pre": cut}))


@pytest.mark.parametrize("cut", ["smollm", "qwen2", "deepseek-r1-qwen"])
def test_another_cut_of_a_qwen2_is_refused_for_transformers_would_cut_as_qwen_does(tmp_path, cut):
    dense = dense_folder(tmp_path / "dense", "qwen2", num_hidden_layers=1)
    file = write_gguf(dense, tmp_path / "m.gguf", keys={"tokenizer.ggml.pre": cut})
    if cut != "smollm":
        assert load_tokenizer(file)("1234 Anna")["input_ids"]
        return
    with pytest.raises(ValueError, match="'smollm': transformers cuts the text of every qwen2 model as Qwen does"):
        load_tokenizer(file)


def test_bos_is_added_where_llama_cpp_adds_it_without_a_key(tmp_path):
    dense = dense_folder(tmp_path / "dense", tokenizer=kind_of_tokenizer("has"))
    for cut, adds in (("llama-bpe", True), ("smollm", False)):
        keys = {"tokenizer.ggml.pre": cut, "tokenizer.ggml.add_bos_token": None}
        file = write_gguf(dense, tmp_path / f"{cut}.gguf", keys=keys)
        assert (load_tokenizer(file)("Anna")["input_ids"][0] == 0) is adds


def test_several_templates(tmp_path):
    tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "tool"}
    file = write_gguf(dense_folder(tmp_path / "dense", tokenizer=tokenizer), tmp_path / "model.gguf")
    assert load_tokenizer(file).chat_template == tokenizer.chat_template


REFUSED = {
    "architecture": (
        {"general.architecture": "gemma3"},
        {},
        r"architecture 'gemma3': not supported; .* llama, smollm3",
    ),
    "no architecture": ({"general.architecture": None}, {}, "architecture None: not supported"),
    "part": ({"split.count": 3}, {}, "one of 3 parts of a model; join them: llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, {}, "a GGUF file of type 'adapter'"),
    "missing key": ({"*.block_count": None}, {}, r"llama\.block_count None: must be an integer"),
    "key of another kind": ({"*.context_length": "64"}, {}, r"llama\.context_length '64': must be an integer"),
    "heads": ({"*.attention.head_count_kv": 3}, {}, "its keys make no model that is read .*KV heads must divide"),
    "experts": ({"*.expert_count": 8}, {}, r"llama\.expert_count 8: not supported"),
    "window": ({"*.attention.sliding_window": 32}, {}, r"llama\.attention\.sliding_window 32: not supported"),
    "a part of a head rotates": ({"*.rope.dimension_count": 4}, {}, "must be the head's size, 8"),
    "yarn": ({"*.rope.scaling.type": "yarn"}, {}, r"rope\.scaling\.type 'yarn': not supported"),
    "other factors": ({}, {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}, "not Llama 3's scaling"),
    "no tensor": ({}, {"blk.1.attn_k.weight": None}, r"no tensor blk\.1\.attn_k\.weight"),
    "no embeddings": ({}, {"token_embd.weight": None}, r"no tensor token_embd\.weight"),
    "one more tensor": (
        {},
        {"blk.1.ffn_gate.bias": np.zeros(64, np.float32)},
        r"ffn_gate\.bias: llama has none like it",
    ),
    "shape": ({"*.feed_forward_length": 32}, {}, r"shape \(64, 32\) where its keys ask for \(32, 32\)"),
    "NaN": ({}, {"output_norm.weight": np.full(32, np.nan, np.float32)}, "output_norm.weight: holds NaN"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, {}, r"tokenizer\.ggml\.tokens: no list of texts"),
    "kind of tokenizer": ({"tokenizer.ggml.model": "bert"}, {}, "only byte-level BPE"),
    "cut": ({"tokenizer.ggml.pre": "tekken"}, {}, "'tekken': it is not known how that cuts text"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, r"merges: no list of pairs"),
    "merges of no tokens": ({"tokenizer.ggml.merges": ["qqq zzz"]}, {}, "its tokenizer is broken"),
    "special token": ({"tokenizer.ggml.eot_token_id": 999}, {}, "eot_token_id 999: is none of the 300 tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, {}, "300 tokens, where the model has 300 and each has a type"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * ENTRIES}, {}, "'a' is there twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_has_is_refused_in_one_line(tmp_path, cache, capsys, name):
    keys, tensors, message = REFUSED[name]
    file = write_gguf(dense_folder(tmp_path / "dense"), tmp_path / "model.gguf", keys=keys, tensors=tensors)
    with pytest.raises(ValueError, match=message) as refusal:
        resolve_folder(file)
    assert str(refusal.value).startswith(str(file)) and "\n" not in str(refusal.value)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists() and [*cache.glob("[!.]*")] == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(tmp_path, cache, share):
    _, file = make(tmp_path, "llama")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    for read in (resolve_folder, fetch_config):
        with pytest.raises(ValueError, match="cannot be read as GGUF, it may be cut short; fetch the file again"):
            read(file)
    assert [*cache.glob("[!.]*")] == []


def test_another_file_with_that_ending_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_text("no model, but longer than a header would be")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        resolve_folder(tmp_path / "model.gguf")


def test_a_file_is_unpacked_once_and_again_when_it_changes(tmp_path, cache, monkeypatch, caplog):
    dense, file = make(tmp_path, "llama")
    with caplog.at_level(logging.WARNING):
        folder = resolve_folder(file)
    assert "may be removed" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "read_gguf", lambda path: pytest.fail("read again"))
        assert resolve_folder(str(file)) == folder
        monkeypatch.chdir(tmp_path)
        assert resolve_folder("model.gguf") == folder
        (tmp_path / "link").symlink_to(file)
        assert resolve_folder(tmp_path / "link") == folder
    stat = file.stat()
    write_gguf(dense, file, keys={"*.attention.layer_norm_rms_epsilon": 0.5})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file.stat().st_size == stat.st_size
    assert read_config(resolve_folder(file))["rms_norm_eps"] == 0.5
    assert len([*cache.glob("[!.]*")]) == 2 and read_config(folder)["rms_norm_eps"] != 0.5


def test_leftovers_of_a_killed_writer_go(tmp_path, cache):
    _, file = make(tmp_path, "llama")
    (cache / ".model-0.partial-9999999-0").mkdir(parents=True)
    resolve_folder(file)
    assert sorted(path.name for path in cache.iterdir() if ".partial" in path.name) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path, cache, monkeypatch):
    _, file = make(tmp_path, "llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"MB are needed there .* HF_HOME"):
        resolve_folder(file)
    assert [*cache.glob("[!.]*")] == []


def test_the_licence_is_taken_over(tmp_path):
    dense = dense_folder(tmp_path / "dense")
    file = write_gguf(dense, tmp_path / "model.gguf", keys={"general.license": "apache-2.0"})
    assert licence_fields(resolve_folder(file)) == {"license": "apache-2.0"}
    assert licence_fields(resolve_folder(write_gguf(dense, tmp_path / "none.gguf"))) == {}


def test_every_command_takes_the_file(tmp_path, monkeypatch, capsys):
    make(tmp_path, "llama", kind="Q8_0")
    text = write_stories(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "model.gguf"]) == 0 and not (tmp_path / "assets").exists()
    sizes = "--calibration-windows 2 --calibration-window-tokens 16 --refine-steps 0 --distill-steps 0".split()
    assert main(["convert", "model.gguf", "v3", *sizes, "--calibration", "text.txt", "--judge", "text.txt"]) == 2
    write_stories(tmp_path / "other.txt", seed=1)
    assert main(["convert", "model.gguf", "v3", *sizes, "--calibration", "text.txt", "--judge", "other.txt"]) == 0
    assert (
        read_conversion("v3")["source"] == str(Path("model.gguf").resolve())
        and read_config("v3")["dtype"] == "bfloat16"
    )
    assert "base_model" not in Path("v3/README.md").read_text()
    assert load_tokenizer("v3")(TEXTS[0])["input_ids"] == tiny_tokenizer()(TEXTS[0])["input_ids"]
    capsys.readouterr()
    assert main(["eval", "v3", "--compare", "model.gguf", "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["generate", "model.gguf", "--prompt", "Anna", "--max-new-tokens", "2"]) == 0
    heal = "--train.steps 1 --train.batch-windows 1 --train.window-tokens 16 --data.held-out-tokens 40".split()
    heal += "--train.warmup-steps 0 --sample.every 0 --runs runs --name healed --data.held-out-share 0.2".split()
    recipe = Path(__file__).parents[2] / "recipes" / "heal.yaml"
    assert (
        main(["train", str(recipe), "--source", "v3", "--teacher", "model.gguf", "--data.train", str(text), *heal]) == 0
    )


def test_force_replaces_no_folder_that_holds_the_file(tmp_path):
    dense, _ = make(tmp_path, "llama")
    text, sizes = write_stories(tmp_path / "text.txt"), {"refine_steps": 0, "distill_steps": 0}
    sizes |= {"calibration": text, "calibration_windows": 2, "calibration_window_tokens": 16}
    smolseek.convert(dense, tmp_path / "v3", **sizes)
    file = write_gguf(dense, tmp_path / "v3" / "model.gguf")
    with pytest.raises(ValueError, match=r"v3: holds .*model\.gguf, which is read here and would be removed"):
        smolseek.convert(file, tmp_path / "v3", force=True, **sizes)
    assert file.is_file()
