"""The GGUF keys of a folder's tokenizer, made from tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_step(digits: str) -> dict[str, Any]:
    """Returns the step of tokenizer.json that splits text in Llama 3 and Qwen 2, which differ only in `digits`."""
    regex = f"{_CONTRACTIONS}{_WORDS}|{digits}{_REST}"
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


PRE_TYPES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([], True),
    "smollm": ([{"type": "Digits", "individual_digits": True}], True),
    "llama-bpe": ([_split_step(r"\p{N}{1,3}")], False),
    "qwen2": ([_split_step(r"\p{N}")], False),
}
"""llama.cpp's names for pre-tokenizations of byte-level BPE. For each: the steps before ByteLevel in tokenizer.json's
`pre_tokenizer`, and whether ByteLevel splits text too."""


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int, *, pre: str | None = None) -> bool:
    """Writes tokens, types, merges or scores, special tokens and the chat template.

    Args:
        pre: llama.cpp's name for the pre-tokenization of byte-level BPE; None: it is found from tokenizer.json.

    Returns:
        Whether there is a chat template.

    Raises:
        ValueError: no tokenizer.json, a tokenizer that is neither byte-level BPE nor SentencePiece's BPE, an unknown
            pre-tokenization, or more tokens than the model has.
    """
    tree = _read(folder)
    model = tree["model"]
    tokens, types = _tokens(tree, vocab_size)
    sentencepiece = model["type"] == "BPE" and bool(model.get("byte_fallback"))
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prepends_space(tree))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_type(tree))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=vocab_size)
    for kind in ("bos", "eos"):  # always written, because llama.cpp's default depends on the kind of tokenizer
        special.add_special_token.setdefault(kind, False)
    special.add_to_gguf(writer, quiet=True)
    return special.chat_template is not None


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


def _read(folder: Path) -> dict[str, Any]:
    """Returns tokenizer.json as a dict; raises ValueError if it is missing, not JSON or of an unknown kind."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: no tokenizer.json; save the tokenizer into it with transformers")
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    kind = tree.get("model", {}).get("type")
    if kind != "BPE":
        raise ValueError(
            f"{path}: a tokenizer of type {kind}; only byte-level BPE and SentencePiece's BPE are exported"
        )
    return tree


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


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Returns a score for each token: minus the rank of the merge that makes it.

    SentencePiece merges the pair whose token has the highest score, so the earliest merge gets the highest score.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _prepends_space(tree: dict[str, Any]) -> bool:
    """Returns whether text gets a space in front: by the normalizer (in older files) or by a Metaspace step."""
    steps = [tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}]
    steps += [part for step in steps for part in step.get("normalizers", []) + step.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
