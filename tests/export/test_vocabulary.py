"""The GGUF keys of tokenizers; test_llama_cpp.py tests that llama.cpp then splits text alike."""

import json
import shutil

import pytest
from gguf import TokenType

from smolseek.export.gguf import export_gguf
from smolseek.export.vocabulary import pre_type
from smolseek.formats.pre_tokenizers import PRE_TYPES
from tests.export.folders import read_gguf, tiny_folder
from tests.text import ENTRIES


def _tree(cuts, use_regex):
    steps = [*cuts, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"type": "BPE"}}


@pytest.mark.parametrize("name", PRE_TYPES)
def test_known_cuts_are_found(name):
    assert pre_type(_tree(*PRE_TYPES[name])) == name


@pytest.mark.parametrize(
    "tree",
    [
        _tree([], False),
        _tree([{"type": "Digits", "individual_digits": False}], True),
        {"pre_tokenizer": None, "model": {"type": "BPE"}},
        {"pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "BPE"}},
    ],
)
def test_unknown_cuts_are_refused(tree):
    with pytest.raises(ValueError, match=r"none of gpt-2, smollm, .* with --pre"):
        pre_type(tree)


def _folder(tmp_path, change=lambda tree: None, **overrides):
    tiny_folder(tmp_path / "m", **overrides)
    path = tmp_path / "m/tokenizer.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    return tmp_path / "m"


def without_the_last(tree):
    """Takes the last token of the vocabulary, and the merge that makes it, out of a tokenizer.json."""
    vocabulary = tree["model"]["vocab"]
    del vocabulary[max(vocabulary, key=vocabulary.get)]
    tree["model"]["merges"].pop()


def test_a_cut_can_be_named(tmp_path):
    folder = _folder(tmp_path, lambda tree: tree["pre_tokenizer"]["pretokenizers"].pop(0))
    keys, _ = read_gguf(export_gguf(folder, tmp_path / "found.gguf").path)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(ValueError, match=r"pre viking: llama\.cpp's name for how this tokenizer cuts text is gpt-2"):
        export_gguf(folder, tmp_path / "named.gguf", pre="viking")
    folder = _folder(
        tmp_path / "other", lambda tree: tree["pre_tokenizer"]["pretokenizers"][0].update(type="Punctuation")
    )
    keys, _ = read_gguf(export_gguf(folder, tmp_path / "named.gguf", pre="viking").path)
    assert keys["tokenizer.ggml.pre"] == "viking"


def test_tokens_and_types(tmp_path):
    def add(tree):
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tree["added_tokens"].append(token | {"id": ENTRIES - 1, "content": "<tool>"})
        without_the_last(tree)

    folder = _folder(tmp_path, add)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == ENTRIES
    keys, _ = read_gguf(export_gguf(folder, tmp_path / "m.gguf").path)
    types = keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.tokens"][-1] == "<tool>" and types[-1] == TokenType.USER_DEFINED
    assert types[0] == TokenType.CONTROL and types[20] == TokenType.NORMAL


def test_ids_without_a_token_are_unused(tmp_path):
    keys, _ = read_gguf(export_gguf(_folder(tmp_path, without_the_last), tmp_path / "m.gguf").path)
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{ENTRIES - 1}]"
    assert keys["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    folder = _folder(tmp_path, lambda tree: tree["model"]["vocab"].update(beyond=ENTRIES))
    with pytest.raises(ValueError, match=f"token {ENTRIES} where config.json says vocab_size {ENTRIES}"):
        export_gguf(folder, tmp_path / "m.gguf")
    tree = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tree | {"model": {"type": "WordPiece"}}))
    with pytest.raises(ValueError, match="of type WordPiece; only byte-level BPE and SentencePiece's BPE"):
        export_gguf(folder, tmp_path / "m.gguf")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON"):
        export_gguf(folder, tmp_path / "m.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        export_gguf(folder, tmp_path / "m.gguf")
    (folder / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(
        ValueError, match=r"no tokenizer\.json \(tokenizer\.model alone is not read\); save the tokenizer"
    ):
        export_gguf(folder, tmp_path / "m.gguf")
    shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []
