import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import smolseek.checkpoint.folder
from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.hub import load, load_stock, load_tokenizer, save
from smolseek.checkpoint.source import fetch_config, read_config, resolve_folder
from smolseek.model import DeepseekV3, StockModel
from tests.factories import random_ids, tiny_llama, tiny_v3_pair
from tests.text import tiny_tokenizer


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
    with pytest.raises(ValueError, match=r"no tensor model\.norm\.weight"):
        load(folder)


def test_weights_that_do_not_fit_the_config_are_named(folder):
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    with pytest.raises(ValueError, match=r"gate_proj\.weight: shape \(56, 40\) where config\.json asks for \(60, 40\)"):
        load(folder)


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


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def refuse(*_args, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(smolseek.checkpoint.folder, "save_file", refuse)
    with pytest.raises(OSError, match="No space left"), FolderWriter(tmp_path / "out") as writer:
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
