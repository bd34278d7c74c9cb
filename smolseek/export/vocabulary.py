"""A folder's tokenizer as GGUF keys, from tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> dict[str, Any]:
    """The step of tokenizer.json that cuts text as Llama 3 and Qwen 2 publish it; they differ in `digits`."""
    regex = f"{_CONTRACTIONS}{_WORDS}|{digits}{_REST}"
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


PRE_TYPES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([], True),
    "smollm": ([{"type": "Digits", "individual_digits": True}], True),
    "llama-bpe": ([_split(r"\p{N}{1,3}")], False),
    "qwen2": ([_split(r"\p{N}")], False),
}
"""llama.cpp's names of the ways to cut text before byte-level BPE: the steps of tokenizer.json's `pre_tokenizer` before
ByteLevel, and whether ByteLevel cuts too."""


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int, *, pre: str | None = None) -> bool:
    """Write tokens, types, merges or scores, special tokens and the chat template; whether there is a template.

    Args:
        pre: llama.cpp's name of how text is cut before byte-level BPE; by default found from the tokenizer's own cut.

    Raises:
        ValueError: no tokenizer.json, a kind of tokenizer that is neither byte-level BPE nor SentencePiece's BPE, an
            unknown way to cut text, or more tokens than the model has.
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
    for kind in ("bos", "eos"):  # said either way: llama.cpp's own guess depends on the kind of tokenizer
        special.add_special_token.setdefault(kind, False)
    special.add_to_gguf(writer, quiet=True)
    return special.chat_template is not None


def pre_type(tree: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer cuts text, by tokenizer.json's `pre_tokenizer`.

    Raises:
        ValueError: none that is known here.
    """
    steps = tree.get("pre_tokenizer") or {}
    *cuts, last = steps.get("pretokenizers", [steps])
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        for name, way in PRE_TYPES.items():
            if (cuts, last.get("use_regex", True)) == way:
                return name
    raise ValueError(
        f"tokenizer.json: pre_tokenizer {json.dumps(steps)[:200]} is none of {', '.join(PRE_TYPES)}, and llama.cpp "
        "must cut text as it does; name llama.cpp's own for it with --pre"
    )


def _read(folder: Path) -> dict[str, Any]:
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
    """Texts and types of all ids; ids that the model has and the tokenizer has not are unused."""
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
    """SentencePiece merges the pair whose token has the highest score; here the one whose merge comes first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _prepends_space(tree: dict[str, Any]) -> bool:
    """Whether text gets a space in front, said by the normalizer (older files) or a Metaspace step."""
    steps = [tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}]
    steps += [part for step in steps for part in step.get("normalizers", []) + step.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
