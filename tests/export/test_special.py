"""Special tokens in GGUF files; test_llama_cpp.py shows that llama.cpp then adds them and stops at them."""

import json
import logging

import pytest

from smolseek.export.gguf import export_gguf
from tests.export.folders import around, byte_level_tree, read_gguf, sentencepiece_tree, tokenizer_folder
from tests.text import ENTRIES

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = {"eos_token": "<|endoftext|>"}


def _keys(folder):
    keys, _ = read_gguf(export_gguf(folder, folder.with_suffix(".gguf"), force=True).path)
    return {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}


@pytest.mark.parametrize(
    ("names", "added", "config", "bos", "adds"),
    [
        (NAMES, around("<s>", "A", **{"<s>": 1}), {}, 1, (True, False)),
        (NAMES, around("<s>", "A", "</s>", **{"<s>": 1, "</s>": 2}), {}, 1, (True, True)),
        (NAMES, None, {}, 1, (False, False)),
        (NAMES | {"add_bos_token": True}, None, {}, 1, (False, False)),
        ({"eos_token": "</s>"}, None, {}, None, (False, False)),
        ({"eos_token": "</s>"}, around("<s>", "A", **{"<s>": 1}), {"bos_token_id": 1}, 1, (True, False)),
    ],
)
def test_bos_and_eos_are_added_as_the_tokenizer_does(tmp_path, names, added, config, bos, adds):
    tree = sentencepiece_tree() | {"post_processor": added}
    keys = _keys(tokenizer_folder(tmp_path / "m", tree, names, **config))
    assert (keys["add_bos_token"], keys["add_eos_token"]) == adds
    assert (keys.get("bos_token_id"), keys["eos_token_id"]) == (bos, 2)


@pytest.mark.parametrize(
    "added",
    [
        around("<s>", "<unk>", "A", **{"<s>": 1, "<unk>": 0}),
        around("<unk>", "A", **{"<unk>": 0}),
        around("<s>", "A", "<unk>", **{"<s>": 1, "<unk>": 0}),
    ],
)
def test_other_tokens_around_a_text_are_refused(tmp_path, added):
    folder = tokenizer_folder(tmp_path / "m", sentencepiece_tree() | {"post_processor": added}, NAMES)
    with pytest.raises(ValueError, match=r"adds .*<unk> to a text, and llama\.cpp adds only BOS"):
        export_gguf(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("config", "generation", "written"),
    [
        (None, None, (0, None, None)),
        (50, None, (50, None, None)),
        (50, [60, 50], (50, 60, None)),
        ([50, 0], [60, 70], (50, 60, 70)),  # llama.cpp knows 0, <|endoftext|>, by its text
    ],
)
def test_end_tokens_of_both_files_are_written(tmp_path, caplog, config, generation, written):
    folder = tokenizer_folder(tmp_path / "m", byte_level_tree(), END, eos_token_id=config)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    keys = _keys(folder)
    assert tuple(keys.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")) == written
    assert caplog.records == []


def test_the_end_that_the_tokenizer_adds_is_eos(tmp_path):
    tree = sentencepiece_tree() | {"post_processor": around("A", "</s>", **{"</s>": 2})}
    keys = _keys(tokenizer_folder(tmp_path / "m", tree, NAMES, eos_token_id=[50, 2]))
    assert (keys["eos_token_id"], keys["eot_token_id"], keys["add_eos_token"]) == (2, 50, True)


def test_end_tokens_without_a_key_are_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    _keys(tokenizer_folder(tmp_path / "m", byte_level_tree(), END, eos_token_id=[0, 65, 66, 67, 68]))
    (record,) = caplog.records
    assert record.getMessage() == "a GGUF file names three end tokens, so llama.cpp does not stop at 67 (c), 68 (d)"


def test_without_an_end_token_llama_cpp_has_its_own(tmp_path, caplog):
    keys = _keys(tokenizer_folder(tmp_path / "m", byte_level_tree(), {}))
    (record,) = caplog.records
    assert "so llama.cpp stops at token 11 ('+'); write eos_token_id" in record.getMessage()
    assert "eos_token_id" not in keys


@pytest.mark.parametrize("end", [ENTRIES, -1])
def test_an_end_token_beyond_the_model_is_refused(tmp_path, end):
    folder = tokenizer_folder(tmp_path / "m", byte_level_tree(), END, eos_token_id=end)
    with pytest.raises(ValueError, match=rf"end token {end} where config\.json says vocab_size {ENTRIES}; correct"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_an_end_token_that_is_no_number_is_one_line(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", byte_level_tree(), END, eos_token_id="</s>")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id '</s>' is no whole number"):
        export_gguf(folder, tmp_path / "m.gguf")
