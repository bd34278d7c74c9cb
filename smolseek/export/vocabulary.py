"""The GGUF keys of a folder's tokenizer, made from the tokenizer.json that transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from smolseek.checkpoint.hub import load_tokenizer
from smolseek.checkpoint.source import read_end_tokens, read_json
from smolseek.export.differences import check_differences
from smolseek.export.special import add_special_tokens
from smolseek.formats.pre_tokenizers import PRE_TYPES, WHOLE_WORDS


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int, *, pre: str | None = None) -> bool:
    """Writes tokens, types, merges or scores, special tokens and the chat template.

    They are those of the tokenizer that transformers makes from the folder, which may differ from tokenizer.json: some
    tokenizer classes have their own normalizer and pre-tokenizer.

    Args:
        pre: llama.cpp's name for the pre-tokenization of byte-level BPE; None: it is found from tokenizer.json.

    Returns:
        Whether there is a chat template.

    Raises:
        ValueError: no tokenizer.json, a tokenizer that is neither byte-level BPE nor SentencePiece's BPE, an unknown
            pre-tokenization, steps that llama.cpp does not do, or more tokens than the model has.
    """
    _check_kind(folder)
    ends = read_end_tokens(folder)  # before transformers reads them, whose errors have many lines
    tokenizer = load_tokenizer(folder)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = tree["model"]["merges"]
    tokens, types = _tokens(tree, vocab_size)
    sentencepiece = bool(tree["model"].get("byte_fallback")) and '"ByteLevel"' not in json.dumps(tree["pre_tokenizer"])
    cut = "default" if sentencepiece else _named_cut(tree, pre) if pre else pre_type(tree)
    is_known = sentencepiece or cut in PRE_TYPES
    check_differences(tree, sentencepiece=sentencepiece, whole_words=cut in WHOLE_WORDS if is_known else None)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(cut)
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(tree))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    add_special_tokens(writer, tokenizer, folder, vocab_size, ends=ends, default_end=2 if sentencepiece else 11)
    return _add_chat_template(writer, tokenizer.chat_template)


def pre_type(tree: dict[str, Any]) -> str:
    """Returns llama.cpp's name for the `pre_tokenizer` of a tokenizer.json with byte-level BPE.

    Raises:
        ValueError: it is none of `PRE_TYPES`.
    """
    steps = tree.get("pre_tokenizer") or {}
    *before, last = steps.get("pretokenizers", [steps])
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        for name, known in PRE_TYPES.items():
            if (before, last.get("use_regex", True)) == known:
                return name
    raise ValueError(
        f"tokenizer.json: pre_tokenizer {json.dumps(steps)[:200]} is none of {', '.join(PRE_TYPES)}, and llama.cpp "
        "must cut text as it does; name llama.cpp's own for it with --pre"
    )


def _named_cut(tree: dict[str, Any], pre: str) -> str:
    """Returns `pre`; raises ValueError where llama.cpp's own name for how a tokenizer.json cuts text is another."""
    try:
        known = pre_type(tree)
    except ValueError:
        return pre
    if pre != known:
        raise ValueError(f"pre {pre}: llama.cpp's name for how this tokenizer cuts text is {known}; leave it out")
    return pre


def _check_kind(folder: Path) -> None:
    """Raises ValueError if tokenizer.json is missing, not JSON or of an unknown kind."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        alone = " (tokenizer.model alone is not read)" if (folder / "tokenizer.model").is_file() else ""
        raise ValueError(f"checkpoint {folder}: no tokenizer.json{alone}; save the tokenizer into it with transformers")
    model = read_json(path).get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise ValueError(
            f"{path}: a tokenizer of type {kind}; only byte-level BPE and SentencePiece's BPE are exported"
        )


def _add_chat_template(writer: GGUFWriter, template: str | dict[str, str] | None) -> bool:
    """Writes the chat template, or several under their names; returns whether there is one."""
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
    return bool(template)


def _tokens(tree: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns text and type of each id below `vocab_size`; ids without a token get the type UNUSED."""
    vocabulary: dict[str, int] = tree["model"]["vocab"]
    added = {token["id"]: token for token in tree.get("added_tokens") or []}
    texts = {number: text for text, number in vocabulary.items()} | {i: t["content"] for i, t in added.items()}
    if max(texts) >= vocab_size:
        raise ValueError(
            f"tokenizer.json: token {max(texts)} where config.json says vocab_size {vocab_size}; "
            "copy the model's own tokenizer"
        )
    unknown = tree["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocab_size):
        text = texts.get(number, f"[PAD{number}]")
        tokens.append(text)
        types.append(_type(text, number, added, unknown, number in texts))
    return tokens, types


def _type(text: str, number: int, added: dict[int, Any], unknown: str | None, is_used: bool) -> int:
    if not is_used:
        return TokenType.UNUSED
    if text == unknown:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Returns a score for each token: minus the rank of the merge that makes it.

    SentencePiece merges the pair whose token has the highest score, so the earliest merge gets the highest score. A
    token that no merge makes gets the lowest: it may not win over one that a merge makes.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(tree: dict[str, Any]) -> bool:
    """Returns whether text gets a space in front: by the normalizer (in older files) or by a Metaspace step."""
    steps = [tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}]
    steps += [part for step in steps for part in step.get("normalizers", []) + step.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
