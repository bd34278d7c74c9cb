"""Tiny folders to export, and a reader for GGUF files."""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from smolseek.checkpoint.hub import save
from smolseek.model import DeepseekV3
from tests.factories import tiny_v3
from tests.text import ENTRIES, tiny_tokenizer

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
"""With these numbers YaRN's ramp lies inside the 8 rope slots of qk_rope_head_dim 16."""
YARN_SIZES = {"qk_rope_head_dim": 16, "max_position_embeddings": 256}


def tiny_folder(folder: Path, **overrides: Any) -> DeepseekV3:
    """Saves a lively model with a tokenizer and returns the model."""
    model = tiny_v3(vocab_size=ENTRIES, eos_token_id=0, bos_token_id=0, **overrides)
    save(model, folder, tokenizer_from=tiny_tokenizer())
    return model


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (keys, tensors) of a GGUF file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def ids(tokens: int = 60, seed: int = 0) -> torch.Tensor:
    """Returns random token ids, (tokens,)."""
    return torch.randint(ENTRIES, (tokens,), generator=torch.Generator().manual_seed(seed))


def byte_level_tree() -> dict[str, Any]:
    """Returns tokenizer.json of the tiny byte-level tokenizer."""
    tree: dict[str, Any] = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    return tree


def sentencepiece_tree() -> dict[str, Any]:
    """Returns tokenizer.json of a tiny SentencePiece BPE, with the normalizer of Llama 2."""
    special = ["<unk>", "<s>", "</s>"]
    merges = "▁ t,h e,▁t he,▁ a,i n,▁ c,a t,▁c at,o n,e r".split(",")
    pairs = [merge.split(" ") for merge in merges]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    tokens = [*special, *bytes_, *"▁abcdefghilnorstu", *("".join(pair) for pair in pairs)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": pairs,
        },
    }


def around(*items: str, **ids: int) -> dict[str, Any]:
    """Returns a post_processor that makes a text of `items`: special tokens, and A for the text."""
    pieces = [{"Sequence" if item == "A" else "SpecialToken": {"id": item, "type_id": 0}} for item in items]
    special = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": special}


def tokenizer_folder(folder: Path, tree: dict[str, Any], names: dict[str, Any], **config: Any) -> Path:
    """Saves a model of one layer, which names no end token unless `config` does, with a tokenizer.

    Args:
        tree: tokenizer.json.
        names: fields of tokenizer_config.json.
        config: fields of config.json.
    """
    save(tiny_v3(vocab_size=ENTRIES, num_hidden_layers=1, bos_token_id=None), folder)
    own = json.loads((folder / "config.json").read_text()) | config
    names = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    for name, content in (("config", own), ("tokenizer", tree), ("tokenizer_config", names)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
