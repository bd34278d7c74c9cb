import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import smolseek.checkpoint.folder
import smolseek.checkpoint.hub
from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.hub import (
    as_ours,
    check_stock,
    copy_tokenizer,
    load,
    load_for_evaluation,
    load_stock,
    load_tokenizer,
    save,
)
from smolseek.checkpoint.shard import ShardWriter
from smolseek.checkpoint.source import fetch_config, read_config, resolve_folder
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.shards import own_part
from tests.factories import enliven, random_ids, tiny_llama, tiny_v3_pair
from tests.fake_processes import process
from tests.text import kind_of_tokenizer, tiny_tokenizer


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"n_group": 2, "topk_group": 1, "q_lora_rank": 16}, {"attention_bias": True}],
)
def test_folders_go_both_ways_through_transformers(tmp_path, overrides):
    ours, stock = tiny_v3_pair(**overrides)
    ids = random_ids(2, 20)
    stock.save_pretrained(tmp_path / "theirs")
    mine = load(tmp_path / "theirs")
    assert isinstance(mine, DeepseekV3)
    torch.testing.assert_close(mine(ids), stock(ids).logits, rtol=0, atol=1e-5)
    save(ours, tmp_path / "ours", tokenizer_from=tiny_tokenizer())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(back(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").bos_token_id == 0
    names = TensorFolder(tmp_path / "ours").names()
    assert names == TensorFolder(tmp_path / "theirs").names()
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert ("lm_head.weight" in names) is not bool(overrides.get("tie_word_embeddings"))


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}])
def test_a_stock_model_becomes_ours_without_a_copy(tmp_path, overrides):
    ours, _ = tiny_v3_pair(**overrides)
    save(ours, tmp_path / "a", tokenizer_from=tiny_tokenizer())
    stock, ids = load_stock(tmp_path / "a"), random_ids(2, 20)
    mine, alone = as_ours(stock), load(tmp_path / "a")
    assert torch.equal(mine(ids), alone(ids)) and mine.end_token_ids == alone.end_token_ids
    assert not mine.training and not any(tensor.is_meta for tensor in (*mine.parameters(), *mine.buffers()))
    shared = {tensor.data_ptr() for tensor in stock.parameters()}
    assert {tensor.data_ptr() for tensor in mine.parameters()} == shared
    assert as_ours(mine) is mine and as_ours(dense := StockModel(tiny_llama())) is dense


def test_config_on_disk_says_what_other_runtimes_read(tmp_path):
    ours, _ = tiny_v3_pair()
    config = read_config(save(ours, tmp_path / "a"))
    assert config["scoring_func"] == "sigmoid" and config["topk_method"] == "noaux_tc"
    assert config["num_nextn_predict_layers"] == 0 and config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "auto_map" not in config


def test_bf16_folders_keep_the_routing_bias_in_fp32(tmp_path):
    ours, _ = tiny_v3_pair(dtype="bfloat16")
    save(ours, tmp_path / "a")
    tensors = TensorFolder(tmp_path / "a")
    assert tensors.dtype("model.layers.1.mlp.gate.e_score_correction_bias") == "F32"
    assert tensors.dtype("model.embed_tokens.weight") == "BF16"
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_a_folder_whose_config_names_no_dtype_keeps_that_of_its_weights(tmp_path):
    ours, _ = tiny_v3_pair(dtype="bfloat16")
    folder = save(ours, tmp_path / "a")
    edit(folder, dtype=None, torch_dtype=None)
    again = save(load(folder), tmp_path / "b")
    assert (
        TensorFolder(again).dtype("model.embed_tokens.weight") == "BF16" and read_config(again)["dtype"] == "bfloat16"
    )


@pytest.mark.parametrize("make", [lambda: tiny_v3_pair()[1].bfloat16(), lambda: tiny_llama().bfloat16()])
def test_a_bf16_folder_stays_bf16_and_keeps_what_training_moved_a_little(make, tmp_path):
    make().save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a")
    assert model.lm_head.weight.dtype == torch.float32
    (embedding,) = [weight for name, weight in model.named_parameters() if name.endswith("embed_tokens.weight")]
    before, step = embedding.detach().clone(), embedding.detach() * 2.0**-10  # an eighth to a quarter of bf16's
    embedding.data += step
    tensors = TensorFolder(save(model, tmp_path / "b"))
    assert tensors.dtype("model.embed_tokens.weight") == "BF16" and read_config(tmp_path / "b")["dtype"] == "bfloat16"
    moved = tensors.get("model.embed_tokens.weight").float() - before
    assert float((moved * step).sum() / (step * step).sum()) == pytest.approx(1, abs=0.3)


def test_softmax_folders_say_that_they_are_not_stock(tmp_path):
    ours, _ = tiny_v3_pair()
    ours.config.scoring_func = "softmax"
    model = DeepseekV3(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    save(model, tmp_path / "a")
    assert read_config(tmp_path / "a")["model_type"] == "smolseek_v3_softmax"
    with pytest.raises(ValueError, match="smolseek_v3_softmax"):
        load_stock(tmp_path / "a")
    ids = random_ids(1, 9)
    torch.testing.assert_close(load(tmp_path / "a")(ids), model(ids))


def test_dense_folders_load_through_transformers(tmp_path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path / "a")
    model = load(tmp_path / "a")
    assert isinstance(model, StockModel)
    ids = random_ids(2, 20)
    torch.testing.assert_close(model(ids), llama(ids).logits)
    save(model, tmp_path / "b")
    torch.testing.assert_close(load(tmp_path / "b")(ids), llama(ids).logits)


def test_packed_documents_do_not_see_each_other_in_a_dense_model():
    llama = StockModel(tiny_llama()).eval()
    ids = random_ids(1, 12)
    packed = llama(ids, segment_ids=torch.tensor([[0] * 5 + [1] * 7]))
    torch.testing.assert_close(packed[:, 5:], llama(ids[:, 5:]), rtol=0, atol=1e-4)


def test_shards_are_read_and_written(tmp_path, monkeypatch):
    ours, stock = tiny_v3_pair()
    monkeypatch.setattr(smolseek.checkpoint.folder, "_MAX_SHARD_BYTES", 20_000)
    save(ours, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    ids = random_ids(1, 9)
    torch.testing.assert_close(load(tmp_path / "a")(ids), ours(ids))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(back(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    ours, _ = tiny_v3_pair()
    return save(ours, tmp_path / "model", tokenizer_from=tiny_tokenizer())


def test_half_a_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (load, load_stock):
        with pytest.raises(ValueError, match=r"no tensor model\.norm\.weight"):
            read(folder)


def test_weights_that_do_not_fit_the_config_are_named(folder):
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    for read in (load, load_stock):
        with pytest.raises(ValueError, match=r"mlp\.\w+\.weight: shape .*56.* where config\.json asks for .*60"):
            read(folder)


def test_pickle_alone_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load(folder)


def test_missing_weights_config_and_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(folder)
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("moment", ["add", "finish"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, moment):
    def refuse(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, moment, refuse)
    with (
        pytest.raises(OSError, match=r"cannot write the weights .*No space left"),
        FolderWriter(tmp_path / "out") as writer,
    ):
        writer.add("a", torch.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_hub_ids_go_through_the_hub_library(tmp_path, monkeypatch):
    """Replaces the hub library's download: it copies a local folder, or fails as it does offline."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    ours, _ = tiny_v3_pair()
    save(ours, tmp_path / "served")
    asked = []

    def serve(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(shutil.copytree(tmp_path / "served", tmp_path / "cache", dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    ids = random_ids(1, 9)
    torch.testing.assert_close(load("someone/model")(ids), ours(ids))
    assert fetch_config("someone/model")["model_type"] == "deepseek_v3"
    assert asked[0][0] == "someone/model" and not any("bin" in pattern for pattern in asked[0][1])
    assert asked[-1][1] == ["config.json"]

    def refuse(*_args, **_options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"someone/model: .*connection"):
        resolve_folder("someone/model")


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


@pytest.fixture
def dense_folder(tmp_path):
    return save(StockModel(tiny_llama()), tmp_path / "dense")


def add_head(folder, factor):
    """Adds a head to a folder: its embeddings times a factor; returns it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors["lm_head.weight"]


@pytest.mark.parametrize("factor", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["V3", "dense"])
def test_a_head_beside_tied_embeddings_counts_where_it_differs(kind, factor, tmp_path):
    """transformers unties the two then; so do we, and what is saved keeps the head."""
    model = tiny_v3_pair(tie_word_embeddings=True)[0] if kind == "V3" else StockModel(tiny_llama())
    folder = save(model, tmp_path / "model")
    head, ids = add_head(folder, factor), random_ids(2, 20)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(stock.lm_head.weight, head)
    mine = load(folder)
    torch.testing.assert_close(mine(ids), stock(ids).logits, rtol=0, atol=1e-5)
    assert mine.config.tie_word_embeddings is (factor == 1.0)
    again = save(mine, tmp_path / "again")
    assert ("lm_head.weight" in TensorFolder(again).names()) is (factor != 1.0)
    torch.testing.assert_close(load(again)(ids), mine(ids))


def test_a_head_in_another_dtype_with_the_same_numbers_is_tied(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not TensorFolder(folder).has_own_head()


@pytest.mark.parametrize("read", [load, load_stock])
def test_a_missing_head_is_not_drawn(read, tmp_path):
    for model in (tiny_v3_pair(tie_word_embeddings=True)[0], StockModel(tiny_llama())):
        folder = save(model, tmp_path / "model", force=True)
        edit(folder, tie_word_embeddings=False)
        with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
            read(folder)


def test_a_head_of_another_size_is_named(tmp_path):
    folder = save(tiny_v3_pair(tie_word_embeddings=True)[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 40)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight: shape \(3, 40\)"):
        load(folder)


BROKEN_FIELDS = [
    {"eos_token_id": "2"},
    {"max_position_embeddings": 64.0},
    {"max_position_embeddings": None},
    {"pad_token_id": 10**6},
    {"dtype": "auto"},
    {"dtype": ["a"]},
    {"vocab_size": -1},
    {"hidden_size": None},
    {"hidden_size": 10**30},
    {"num_attention_heads": 0},
    {"rms_norm_eps": "small"},
    {"hidden_act": "nothing"},
    {"tie_word_embeddings": "true"},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0}},
    {"rope_parameters": {"rope_type": "invented", "rope_theta": 100.0}},
    {"max_position_embeddings": -5},
    {"sliding_window": "wide"},
    {"attention_dropout": -1.0},
    {"dtype": 2.5e16},
    {"quantization_config": 7},
    {"model_type": None},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"model_type": ["llama"]},
    {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "invented"},
]


@pytest.mark.parametrize("fields", BROKEN_FIELDS)
def test_configs_that_transformers_refuses_are_refused_in_one_line(fields, folder, dense_folder):
    for broken in (folder, dense_folder):
        edit(broken, **fields)
        for read in (load, load_for_evaluation, load_stock, *([check_stock] if broken == dense_folder else [])):
            with pytest.raises(ValueError) as refusal:
                read(broken)
            said = str(refusal.value)
            assert "\n" not in said and len(said) < 500, said


def test_a_model_that_does_not_run_is_refused_in_one_line(folder, dense_folder):
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "short_factor": [1.0], "long_factor": []}
    for broken, read in ((folder, load), (folder, load_stock), (dense_folder, load)):
        edit(broken, rope_parameters=rope)
        with pytest.raises(ValueError, match=r"its model does not run \(RuntimeError"):
            read(broken)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    ],
)
def test_logits_that_are_not_the_heads_are_refused_in_one_line(kind, fields, tmp_path):
    sizes = tiny_llama().config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{k: sizes[k] for k in kept}, **fields))
    enliven(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its model changes what its head gives, as logits_scaling"):
        load(tmp_path)


def test_a_tokenizer_that_panics_is_refused_in_one_line(folder, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_args, **_options):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(ValueError, match="does not load its tokenizer"):
        load_tokenizer(folder)


def test_sizes_are_compared_with_the_weights_before_memory_is_taken(folder, dense_folder):
    for huge in (folder, dense_folder):
        edit(huge, vocab_size=2**31 - 1)
        for read in (load, load_stock):
            with pytest.raises(ValueError, match=r"where config\.json asks for"):
                read(huge)


def test_too_little_memory_is_no_fault_of_the_folder(dense_folder, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_stock(dense_folder)


def test_quantised_v3_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: dtype F8_E4M3 is quantised"):
        load(folder)


def vocabulary(folder):
    """Writes a tokenizer in its older form and removes tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (folder / "tokenizer.json").unlink()


def test_vocabulary_and_merges_are_a_tokenizer(folder):
    vocabulary(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert len(load_tokenizer(folder)) == len(tiny_tokenizer())


BROKEN_TOKENIZERS = {
    "cut": ("tokenizer.json", lambda text: text[: len(text) // 2]),
    "swapped": ("tokenizer.json", lambda _: json.dumps({"model_type": "llama"})),
    "list": ("tokenizer.json", lambda _: "[1]"),
    "empty": ("tokenizer.json", lambda _: ""),
    "no text": ("tokenizer.json", lambda _: "\xff\xfe"),
    "config cut": ("tokenizer_config.json", lambda _: "{"),
    "config list": ("tokenizer_config.json", lambda _: "[]"),
    "class": ("tokenizer_config.json", lambda _: '{"tokenizer_class": 7}'),
    "token": ("tokenizer_config.json", lambda _: '{"bos_token": 7}'),
    "code": ("tokenizer_config.json", lambda _: '{"auto_map": {"AutoTokenizer": ["code.Own", null]}}'),
    "length": ("tokenizer_config.json", lambda text: json.dumps(json.loads(text) | {"model_max_length": "x"})),
    "special": ("special_tokens_map.json", lambda _: "[]"),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_refused_in_one_line(case, folder):
    name, change = BROKEN_TOKENIZERS[case]
    path = folder / name
    path.write_bytes(change(path.read_text() if path.is_file() else "").encode("latin-1"))
    with pytest.raises(ValueError, match="transformers does not load its tokenizer") as refusal:
        load_tokenizer(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_sentencepiece_is_asked_for_where_it_is_missing(folder, monkeypatch):
    import importlib.util

    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        load_tokenizer(folder)


def test_a_folder_without_weights_says_what_it_has(dense_folder):
    (dense_folder / "model.safetensors").rename(dense_folder / "adapter_model.safetensors")
    (dense_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"LoRA .* merge_and_unload"):
        load(dense_folder)


@pytest.mark.parametrize("read", [load, load_stock])
def test_each_process_reads_its_part(read, folder, monkeypatch):
    monkeypatch.setattr(smolseek.checkpoint.hub, "_tried", lambda model, source: model)  # it needs the other processes
    alone = read(folder).state_dict()
    for rank in range(3):
        with process(rank, 3) as processes:
            state = read(folder, shard=processes.shard).state_dict()
            assert state.keys() == alone.keys()
            for name, tensor in state.items():
                part, bounds = own_part(tensor)
                assert torch.equal(part, alone[name][bounds]), name


@pytest.mark.parametrize("rows", [slice(0, 20), slice(5, 20), slice(5, 33), slice(20, 40), slice(7, 7)])
def test_a_part_of_stacked_experts_is_read(folder, rows, monkeypatch):
    """Rows of the gate, of the up projection and of both, some experts and some columns."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole, bounds = load(folder).state_dict()[name], (slice(2, 5), rows, slice(1, 30))
    part = torch.zeros_like(whole[bounds])
    monkeypatch.setattr(smolseek.checkpoint.hub, "own_part", lambda target: (part, bounds))
    smolseek.checkpoint.hub._fill(whole, name, TensorFolder(folder))
    assert torch.equal(part, whole[bounds])


def test_parts_are_found_by_transformers_names_only(dense_folder):
    tensors = load_file(dense_folder / "model.safetensors")
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, dense_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight.* use one process"):
        load_stock(dense_folder, shard=lambda model: model)


def prepended(tree):
    """A SentencePiece tokenizer.json as older Mistrals have it: a normalizer puts the space in front of a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return tree | {"normalizer": normalizer, "pre_tokenizer": None}


@pytest.mark.parametrize(
    ("model_type", "kind", "class_name", "change"),
    [
        ("mistral", "sentencepiece", "LlamaTokenizer", prepended),
        ("mistral", "sentencepiece", "LlamaTokenizerFast", prepended),
        ("qwen2", "has", "PreTrainedTokenizerFast", dict),
        ("qwen3", "has", None, dict),
        ("llama", "adds", "PreTrainedTokenizerFast", dict),
    ],
)
def test_a_copied_tokenizer_gives_the_same_tokens(model_type, kind, class_name, change, tmp_path):
    """transformers chooses the class by model_type, too, and that becomes DeepSeek's."""
    source, out = tmp_path / "source", tmp_path / "out"
    kind_of_tokenizer(kind).save_pretrained(source)
    tree = change(json.loads((source / "tokenizer.json").read_text()))
    (source / "tokenizer.json").write_text(json.dumps(tree))
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    edit_tokenizer(source, tokenizer_class=class_name)
    with FolderWriter(out) as writer:
        writer.write_json("config.json", {"model_type": "deepseek_v3"})
        copy_tokenizer(writer, source)
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    for text in (" Anna sees", "</s> Anna", "<s>Anna</s>Ben", "  two  spaces\n\nX", "nai\u0308ve 1234 def f():\n    x"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    config = "tokenizer_config.json"
    if model_type == "llama":
        assert (out / config).read_bytes() == (source / config).read_bytes()


def mistral_of_many_entries(folder, **fields):
    """Writes a Mistral's tokenizer with so many entries that transformers looks for the wrong cuts."""
    kind_of_tokenizer("has").save_pretrained(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    model = tree["model"]
    model["merges"].append(["A", "B"])
    words = dict.fromkeys([*model["vocab"], "AB", *(f"<{number}>" for number in range(100_001))])
    model["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.57.1"}))
    edit_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast", **fields)


@pytest.mark.parametrize("fields", [{}, {"fix_mistral_regex": True}])
@pytest.mark.parametrize(
    "config", [{"model_type": "deepseek_v3"}, {"model_type": "mistral", "transformers_version": "5.0.0"}]
)
def test_a_copied_tokenizer_keeps_the_cuts_that_transformers_mends(fields, config, tmp_path):
    """It mends them for Mistral's model_type alone, and where an old version wrote the folder."""
    source, out = tmp_path / "source", tmp_path / "out"
    mistral_of_many_entries(source, **fields)
    with FolderWriter(out) as writer:
        writer.write_json("config.json", config)
        copy_tokenizer(writer, source)
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert theirs.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str()
    for text in ("AB 2024 don't", "AutoTokenizer reads naïve HTML  \n x"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    same = (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert same is not bool(fields)


OLD = {"do_sample": True, "temperature": 0.5, "max_length": 50, "eos_token_id": [1, 2]}


@pytest.mark.parametrize("kind", ["V3", "dense"])
def test_what_an_old_config_says_of_generation_is_kept(kind, tmp_path):
    """Old checkpoints have it in config.json, and transformers reads it there if there is no generation_config.json."""
    model = tiny_v3_pair()[0] if kind == "V3" else StockModel(tiny_llama())
    folder = save(model, tmp_path / "old")
    assert not (folder / "generation_config.json").exists()
    edit(folder, **OLD)
    again = save(load(folder), tmp_path / "again", origin=folder)
    for made in (folder, again):
        config = AutoModelForCausalLM.from_pretrained(made).generation_config
        assert {field: getattr(config, field) for field in OLD} == OLD
    plain = save(load(folder), tmp_path / "plain", origin=save(model, tmp_path / "source"))
    assert not (plain / "generation_config.json").exists()


def edit_tokenizer(folder, **fields):
    path = folder / "tokenizer_config.json"
    tree = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))
