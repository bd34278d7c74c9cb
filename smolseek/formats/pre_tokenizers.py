"""How byte-level BPE cuts text before it merges: llama.cpp's names, as steps of a tokenizer.json."""

from __future__ import annotations

from typing import Any

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
WHOLE_WORDS = {"llama-bpe"}
"""Those of them with which llama.cpp takes a word that is a token as it is, without merges."""
