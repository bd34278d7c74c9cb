"""The tokenizer in a GGUF file's keys, as the JSON files of a Hugging Face folder. Imports no torch.

transformers' own reader is not used: it cuts digits otherwise than SmolLM's tokenizer does, and a pre-tokenization that
it does not know as GPT-2's, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from smolseek.formats.fields import shown
from smolseek.formats.pre_tokenizers import PRE_TYPES, WHOLE_WORDS

_SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names of known pre-tokenizations."""
_ADDED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens in tokenizer_config.json, and in GGUF's keys."""
_ENDS = ("eos", "eot", "eom")
_TEMPLATE = "tokenizer.chat_template"


def tokenizer_files(keys: Mapping[str, Any], vocab_size: int) -> dict[str, dict[str, Any]]:
    """Returns tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
        ValueError: there is no tokenizer, or one that is neither byte-level BPE nor SentencePiece's BPE, that cuts text
            in an unknown way, or that has more tokens than the model; or an id is none of its tokens.
    """
    tokens, types = _tokens(keys, vocab_size)
    kind = keys.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model {shown(kind)}: only byte-level BPE (gpt2) and SentencePiece's BPE (llama) are read; "
            "name the checkpoint that it was made from"
        )
    cut = _cut(keys)
    if keys.get("general.architecture") == "qwen2" and (kind, cut) != ("gpt2", "qwen2"):
        raise ValueError(
            f"tokenizer.ggml.pre {shown(keys.get('tokenizer.ggml.pre'))}: transformers cuts the text of every qwen2 "
            "model as Qwen does; name the checkpoint that it was made from"
        )
    special = {name: _special(keys, key, tokens) for name, key in _NAMES.items()}
    steps = _byte_level(keys, tokens) if kind == "gpt2" else _sentencepiece(keys, tokens, types)
    used = {text: number for number, text in enumerate(tokens) if types[number] != TokenType.UNUSED}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, tokens[number], types[number]) for number in used.values() if types[number] in _ADDED
        ],
        **steps,
        "post_processor": _around(keys, special, tokens, is_sentencepiece=kind == "llama"),
        "model": {"type": "BPE", "vocab": used, **steps["model"]},
    }
    return {
        "tokenizer.json": tree,
        "tokenizer_config.json": _tokenizer_config(keys, special),
        "generation_config.json": _generation_config(keys, tokens),
    }


def _tokens(keys: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns text and type of each token."""
    tokens = keys.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise ValueError("tokenizer.ggml.tokens: no list of texts; name a GGUF file with its tokenizer")
    types = keys.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or len(tokens) > vocab_size:
        raise ValueError(
            f"tokenizer.ggml.tokens: {len(tokens)} tokens, where the model has {vocab_size} and each has a type; fetch "
            "the file again"
        )
    if len(set(tokens)) < len(tokens):
        twice = next(text for number, text in enumerate(tokens) if text in tokens[:number])
        raise ValueError(f"tokenizer.ggml.tokens: {shown(twice)} is there twice; name the checkpoint it was made from")
    return tokens, types


def _special(keys: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    """Returns the id that a key names, or None if there is no such key."""
    number = keys.get(f"tokenizer.ggml.{key}_token_id")
    if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
        raise ValueError(
            f"tokenizer.ggml.{key}_token_id {shown(number)}: is none of the {len(tokens)} tokens; fetch the file again"
        )
    return number


def _cut(keys: Mapping[str, Any]) -> str:
    """Returns how the tokenizer cuts text before BPE, by one name for each way."""
    named = str(keys.get("tokenizer.ggml.pre"))
    return _SAME_AS.get(named, named)


def _byte_level(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Returns the parts of tokenizer.json that are byte-level BPE's."""
    cut = _cut(keys)
    if cut not in PRE_TYPES:
        raise ValueError(
            f"tokenizer.ggml.pre {shown(keys.get('tokenizer.ggml.pre'))}: it is not known how that cuts text, only how "
            f"{', '.join((*PRE_TYPES, *_SAME_AS))} do; name the checkpoint that it was made from"
        )
    before, use_regex = PRE_TYPES[cut]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,  # Qwen's own has it; GGUF has no key for it
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, bytes_]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"merges": _merges(keys), "ignore_merges": cut in WHOLE_WORDS},
    }


def _merges(keys: Mapping[str, Any]) -> list[list[str]]:
    """Returns the pairs that are merged; the space between two parts is never the first letter."""
    merges = keys.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise ValueError("tokenizer.ggml.merges: no list of pairs; fetch the file again")
    spaces = [merge.index(" ", 1) for merge in merges]
    return [[merge[:at], merge[at + 1 :]] for merge, at in zip(merges, spaces, strict=True)]


def _sentencepiece(keys: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Returns the parts of tokenizer.json that are SentencePiece's, as llama.cpp has them."""
    prefix = keys.get("tokenizer.ggml.add_space_prefix", True)
    normalizers = [{"type": "Prepend", "prepend": "▁"}, _REPLACE] if prefix else [_REPLACE]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    number = _special(keys, "unknown", tokens)
    unknown = {"unk_token": None if number is None else tokens[number], "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"merges": _merges_by_score(keys, tokens, types), **unknown},
    }


def _merges_by_score(keys: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[list[str]]:
    """Returns every pair of tokens that joins to a third, those with the highest score first.

    SentencePiece merges the pair whose token has the highest score, so a score is a rank.
    """
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores: no score for each token; fetch the file again")
    words = {text: scores[at] for at, text in enumerate(tokens) if types[at] == TokenType.NORMAL}
    merges = []
    for text in sorted(words, key=words.__getitem__, reverse=True):
        halves = [[text[:at], text[at:]] for at in range(1, len(text))]
        merges += [pair for pair in halves if pair[0] in words and pair[1] in words]
    return merges


def _added(number: int, text: str, type_: int) -> dict[str, Any]:
    """Returns a token that is found in text as a whole."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": type_ != TokenType.USER_DEFINED}


def _around(
    keys: Mapping[str, Any], special: Mapping[str, int | None], tokens: list[str], *, is_sentencepiece: bool
) -> dict[str, Any]:
    """Returns the step that puts BOS before a text and EOS behind it, where the keys or llama.cpp's defaults say so."""
    begins = is_sentencepiece or _cut(keys) in WHOLE_WORDS
    wanted = {
        "bos_token": keys.get("tokenizer.ggml.add_bos_token", begins),
        "eos_token": keys.get("tokenizer.ggml.add_eos_token", False),
    }
    used = {name: number for name, number in special.items() if wanted.get(name) and number is not None}
    piece = {name: {"SpecialToken": {"id": tokens[number], "type_id": 0}} for name, number in used.items()}
    single = [piece.get("bos_token"), {"Sequence": {"id": "A", "type_id": 0}}, piece.get("eos_token")]
    return {
        "type": "TemplateProcessing",
        "single": [step for step in single if step],
        "pair": [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")],
        "special_tokens": {
            tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
            for number in used.values()
        },
    }


def _tokenizer_config(keys: Mapping[str, Any], special: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns the special tokens' names and the chat templates."""
    tokens = keys["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: tokens[number] for name, number in special.items() if number is not None}
    named = {
        name.removeprefix(f"{_TEMPLATE}."): text for name, text in keys.items() if name.startswith(f"{_TEMPLATE}.")
    }
    default = keys.get(_TEMPLATE)
    if named:
        named = ({"default": default} if default else {}) | named
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif default:
        config["chat_template"] = default
    return config


def _generation_config(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Returns the ids that generation needs: all those that end a text, BOS and padding."""
    named = [_special(keys, key, tokens) for key in _ENDS]
    ends = list(dict.fromkeys(end for end in named if end is not None))
    ids: dict[str, Any] = {"bos_token_id": _special(keys, "bos", tokens)}
    ids |= {"pad_token_id": _special(keys, "padding", tokens), "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {name: number for name, number in ids.items() if number not in (None, [])}
