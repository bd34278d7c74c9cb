"""The GGUF keys of a tokenizer's special tokens: what is put around a text, and what ends it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from smolseek.checkpoint.source import read_config

KNOWN_ENDS = frozenset(
    "</s> <eos> <EOT> [EOS] [EOT] <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|endoftext|> <|end_of_text|> "
    "<end_of_turn> <end_of_utterance> <｜end▁of▁sentence｜>".split()
)
"""Texts of tokens at which llama.cpp stops although no key names them."""

log = logging.getLogger(__name__)


def add_special_tokens(
    writer: GGUFWriter, tokenizer: Any, folder: Path, vocab_size: int, *, ends: tuple[int, ...], default_end: int
) -> None:
    """Writes BOS, whether it is put before a text, EOS likewise, the end tokens, and the other special tokens.

    Args:
        tokenizer: the fast tokenizer of `folder`.
        ends: the ids that end a text, as the folder's files name them; if they name none, the tokenizer's EOS does.
        default_end: the token that llama.cpp stops at if the file names none.

    Raises:
        ValueError: the tokenizer puts other tokens around a text than BOS and an end token, or an end token is none of
            the model's.
    """
    config = read_config(folder)
    ids: dict[str, int] = {}
    for kind in ("bos", "unk", "sep", "pad", "mask"):
        own, named = getattr(tokenizer, f"{kind}_token_id"), config.get(f"{kind}_token_id")
        number = named if own is None else own
        if isinstance(number, int) and 0 <= number < vocab_size:
            ids[kind] = number
    before, behind = _added_around(tokenizer)
    text_ends = _checked_ends(ends, tokenizer, folder, vocab_size)
    if before not in ([], [ids.get("bos")]) or behind not in ([], *([end] for end in text_ends)):
        added = " ".join(tokenizer.convert_ids_to_tokens(before + behind))
        raise ValueError(
            f"checkpoint {folder}: its tokenizer adds {added} to a text, and llama.cpp adds only BOS before it and EOS "
            "behind it; correct bos_token and eos_token in tokenizer_config.json, or name another model"
        )
    for kind, number in ids.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(behind))
    _add_ends(writer, tokenizer, behind + [end for end in text_ends if end not in behind], default_end)


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer puts before and behind a text."""
    text, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(at for at in range(len(full)) if full[at : at + len(text)] == text)
    return full[:start], full[start + len(text) :]


def _checked_ends(ends: tuple[int, ...], tokenizer: Any, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Returns `ends`, or the tokenizer's EOS if there are none; raises ValueError if one is none of the model's."""
    for end in ends:
        if not 0 <= end < vocab_size:
            raise ValueError(
                f"checkpoint {folder}: end token {end} where config.json says vocab_size {vocab_size}; correct "
                "eos_token_id in config.json and generation_config.json"
            )
    return ends or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def _add_ends(writer: GGUFWriter, tokenizer: Any, ends: list[int], default_end: int) -> None:
    """Writes the ids at which llama.cpp stops; it has three keys, and knows some tokens by their text."""
    text = tokenizer.convert_ids_to_tokens
    if not ends:
        log.warning(
            "no file names an end token, so llama.cpp stops at token %d (%r); write eos_token_id into config.json",
            default_end,
            text(default_end),
        )
    ends = ends[:1] + sorted(ends[1:], key=lambda end: text(end) in KNOWN_ENDS)
    for end, kind in zip(ends, ("eos", "eot", "eom"), strict=False):
        getattr(writer, f"add_{kind}_token_id")(end)
    if passed := [f"{end} ({text(end)})" for end in ends[3:] if text(end) not in KNOWN_ENDS]:
        log.warning("a GGUF file names three end tokens, so llama.cpp does not stop at %s", ", ".join(passed))
