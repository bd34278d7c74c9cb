"""The base model in the package is unchanged (by its hash), small enough, and a plain Llama."""

import hashlib

from smolseek.checkpoint.hub import load_tokenizer
from smolseek.checkpoint.source import BUILTIN_BASE, read_config, resolve_folder

SHA256 = "6412da805f0c1e754001cb71537d87bf5e7fdc9fdf2d90c7254abf7899c975a0"


def test_the_base_model_is_frozen():
    weights = (resolve_folder(BUILTIN_BASE) / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == SHA256, "a retrained base gets another name"
    assert len(weights) <= 14 * 2**20


def test_the_base_model_has_smollm2s_proportions():
    config = read_config(resolve_folder(BUILTIN_BASE))
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert len(load_tokenizer(BUILTIN_BASE)) == config["vocab_size"] == 4096
