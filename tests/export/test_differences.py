"""What of a tokenizer llama.cpp does not do; test_llama_cpp.py shows by its tokens that it does not."""

import pytest

from smolseek.export.differences import check_differences
from tests.export.folders import METASPACE, PREPEND, REPLACE, byte_level_tree, sentencepiece_tree


def _sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def _check(tree, caplog, *, whole_words=False):
    caplog.clear()
    check_differences(tree, sentencepiece=tree["model"]["byte_fallback"], whole_words=whole_words)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("normalizer", [REPLACE, _sequence(PREPEND, REPLACE)])
def test_spaces_of_sentencepiece_are_llama_cpp_s(caplog, normalizer):
    assert _check(sentencepiece_tree() | {"normalizer": normalizer}, caplog) == []
    assert _check(sentencepiece_tree() | {"normalizer": None, "pre_tokenizer": METASPACE}, caplog) == []


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"normalizer": _sequence({"type": "NFKC"}, PREPEND, REPLACE)}, "normalizer NFKC"),
        ({"normalizer": _sequence(PREPEND | {"prepend": "_"}, REPLACE)}, "normalizer Prepend"),
        ({"normalizer": PREPEND}, "pre_tokenizer null"),
        ({"normalizer": None}, "pre_tokenizer null"),
        ({"pre_tokenizer": METASPACE}, "pre_tokenizer Metaspace"),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"replacement": "_"}}, "pre_tokenizer Metaspace"),
        ({"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "pre_tokenizer Digits"),
    ],
)
def test_other_steps_of_sentencepiece_are_refused(parts, named):
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {named} .* name a model whose tokenizer") as said:
        check_differences(sentencepiece_tree() | parts, sentencepiece=True, whole_words=False)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Lowercase"},
        {"type": "NFKC"},
        {"type": "NFD"},
        {"type": "StripAccents"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        PREPEND,
        REPLACE,
    ],
)
def test_normalizers_of_byte_level_bpe_are_refused(step):
    for normalizer in (step, _sequence({"type": "NFC"}, _sequence(step))):
        with pytest.raises(ValueError, match=rf"tokenizer\.json: normalizer {step['type']} "):
            check_differences(byte_level_tree() | {"normalizer": normalizer}, sentencepiece=False, whole_words=False)


def test_nfc_is_told(caplog):
    assert _check(byte_level_tree(), caplog) == []
    (said,) = _check(byte_level_tree() | {"normalizer": {"type": "NFC"}}, caplog)
    assert said == "tokenizer.json: llama.cpp has no normalizer NFC, so text that is not NFC becomes other tokens"


@pytest.mark.parametrize("last", [{"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True}])
def test_a_cut_that_was_named_must_end_in_bytes(last):
    for steps in (last, {"type": "Sequence", "pretokenizers": [last]}):
        with pytest.raises(ValueError, match=f"pre_tokenizer {last['type']}"):
            check_differences(byte_level_tree() | {"pre_tokenizer": steps}, sentencepiece=False, whole_words=None)


@pytest.mark.parametrize(
    "fields", [{"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}]
)
def test_other_kinds_of_bpe_are_refused(fields):
    tree = byte_level_tree()
    tree["model"] |= fields
    (name,) = fields
    with pytest.raises(ValueError, match=f"its BPE has {name} "):
        check_differences(tree, sentencepiece=False, whole_words=False)


def test_a_byte_without_a_token_is_refused():
    tree = sentencepiece_tree()
    tree["model"]["vocab"]["é"] = tree["model"]["vocab"].pop("<0xE6>")
    with pytest.raises(ValueError, match=r"no token <0xE6>, and llama.cpp needs one for each byte; copy"):
        check_differences(tree, sentencepiece=True, whole_words=False)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_flags_of_added_tokens_are_told(caplog, flag):
    tree = sentencepiece_tree()
    tree["added_tokens"][1][flag] = True
    (said,) = _check(tree, caplog)
    assert f"text around 1 added tokens may become other tokens: <s> ({flag})" in said
    tree = byte_level_tree()
    tree["added_tokens"][0][flag] = True
    assert len(_check(tree, caplog)) == (flag != "normalized")


@pytest.mark.parametrize("ignored", [True, False])
def test_words_that_no_merge_makes(caplog, ignored):
    tree = byte_level_tree()
    tree["model"]["ignore_merges"] = ignored
    assert _check(tree, caplog, whole_words=not ignored) == []
    tree["model"]["vocab"]["qx"] = len(tree["model"]["vocab"])
    assert _check(tree, caplog, whole_words=ignored) == _check(tree, caplog, whole_words=None) == []
    (said,) = _check(tree, caplog, whole_words=not ignored)
    assert f"ignore_merges is {str(ignored).lower()}, and llama.cpp does the reverse; 1 words" in said and "qx" in said


def test_tokens_that_only_llama_cpp_makes(caplog):
    tree = sentencepiece_tree() | {"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}}
    tree["model"]["merges"].append(["e", "▁"])
    tree["model"]["vocab"]["e▁"] = len(tree["model"]["vocab"])
    (said,) = _check(tree, caplog)
    assert said.endswith("Metaspace splits text before each ▁, and llama.cpp does not: it makes 1 more tokens: e▁")
    tree["model"]["merges"].pop()
    tree["pre_tokenizer"] = METASPACE
    (said,) = _check(tree, caplog)
    assert said.endswith("1 tokens are made by no merge, and llama.cpp makes them: e▁")


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ("never", []),
        ("always", ["text that begins with a space gets"]),
        ("first", ["text that begins with a space, or follows a special token, gets"]),
    ],
)
def test_where_metaspace_puts_a_space(caplog, scheme, told):
    tree = sentencepiece_tree() | {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": scheme}}
    assert _check(tree, caplog) == [f"tokenizer.json: {words} one ▁ more from llama.cpp" for words in told]
