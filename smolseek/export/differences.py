"""What a tokenizer does to text and llama.cpp does not: refused, or told in a warning where few texts are concerned."""

from __future__ import annotations

import json
import logging
from typing import Any

_PREPEND = {"type": "Prepend", "prepend": "▁"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BYTES = {f"<0x{number:02X}>" for number in range(256)}

log = logging.getLogger(__name__)


def check_differences(tree: dict[str, Any], *, sentencepiece: bool, whole_words: bool | None) -> None:
    """Checks the parts of a tokenizer.json with BPE that a GGUF file has no keys for.

    Args:
        sentencepiece: whether it is SentencePiece's BPE; else it is byte-level.
        whole_words: whether llama.cpp takes a word that is a token as it is, without merges; None: not known.

    Raises:
        ValueError: a step changes ordinary text in a way that llama.cpp does not.
    """
    _check_model(tree["model"])
    normalizers = [step for step in _steps(tree.get("normalizer")) if step["type"] != "NFC"]
    if len(normalizers) < len(_steps(tree.get("normalizer"))):
        log.warning("tokenizer.json: llama.cpp has no normalizer NFC, so text that is not NFC becomes other tokens")
    if sentencepiece:
        _check_sentencepiece(tree, normalizers)
    else:
        _check_byte_level(tree, normalizers)
    if whole_words is not None:
        _warn_of_merges(tree, whole_words)
    _warn_of_added_tokens(tree, bool(normalizers))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre_tokenizer, with sequences flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers", part.get("pretokenizers", [])) for step in _steps(inner)]


def _check_model(model: dict[str, Any]) -> None:
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(
                f"tokenizer.json: its BPE has {field} {model[field]!r}, which llama.cpp does not know; name a model "
                "whose tokenizer has none"
            )


def _check_byte_level(tree: dict[str, Any], normalizers: list[dict[str, Any]]) -> None:
    if normalizers:
        _refuse("normalizer", normalizers[0])
    steps = _steps(tree.get("pre_tokenizer"))
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        _refuse("pre_tokenizer", steps[-1] if steps else None)


def _check_sentencepiece(tree: dict[str, Any], normalizers: list[dict[str, Any]]) -> None:
    """Checks that spaces become ▁ as in llama.cpp, by normalizers or by a Metaspace step, and nothing else is done."""
    if missing := _BYTES - set(tree["model"]["vocab"]):
        raise ValueError(
            f"tokenizer.json: no token {min(missing)}, and llama.cpp needs one for each byte; copy the model's own"
        )
    _warn_of_unmade(tree)
    steps = _steps(tree.get("pre_tokenizer"))
    if normalizers in ([_REPLACE], [_PREPEND, _REPLACE]) and not steps:
        return
    for step in normalizers:
        if step not in (_PREPEND, _REPLACE):
            _refuse("normalizer", step)
    if len(steps) != 1 or steps[0]["type"] != "Metaspace" or steps[0]["replacement"] != "▁" or normalizers:
        _refuse("pre_tokenizer", steps[0] if steps else None)
    _warn_of_metaspace(tree, steps[0])


def _refuse(part: str, step: dict[str, Any] | None) -> None:
    named = "null" if step is None else f"{step['type']} ({json.dumps(step, ensure_ascii=False)[:200]})"
    raise ValueError(
        f"tokenizer.json: {part} {named} is not what llama.cpp does to text; name a model whose tokenizer has another"
    )


def _warn_of_metaspace(tree: dict[str, Any], step: dict[str, Any]) -> None:
    """Logs where llama.cpp puts a ▁ that Metaspace does not, and which tokens only llama.cpp makes."""
    if step["prepend_scheme"] != "never":
        behind = ", or follows a special token," if step["prepend_scheme"] == "first" else ""
        log.warning("tokenizer.json: text that begins with a space%s gets one ▁ more from llama.cpp", behind)
    across = [token for token in _words(tree) if "▁" in token[1:]]
    if step["split"] and across:
        log.warning(
            "tokenizer.json: Metaspace splits text before each ▁, and llama.cpp does not: it makes %d more tokens: %s",
            len(across),
            ", ".join(across[:5]),
        )


def _warn_of_unmade(tree: dict[str, Any]) -> None:
    """Logs the tokens that no merge makes; llama.cpp makes them of any two tokens whose texts they join."""
    vocabulary, made = tree["model"]["vocab"], {"".join(merge) for merge in tree["model"]["merges"]}
    unmade = []
    for token in _words(tree):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        if token not in made and any(left in vocabulary and right in vocabulary for left, right in halves):
            unmade.append(token)
    if unmade:
        named = ", ".join(unmade[:5])
        log.warning("tokenizer.json: %d tokens are made by no merge, and llama.cpp makes them: %s", len(unmade), named)


def _warn_of_merges(tree: dict[str, Any], whole_words: bool) -> None:
    """Logs the words that are one token on one side, and several that merges make on the other."""
    ignored = bool(tree["model"].get("ignore_merges"))
    if ignored != whole_words and (unmerged := _unmerged(tree)):
        log.warning(
            "tokenizer.json: ignore_merges is %s, and llama.cpp does the reverse; %d words become other tokens: %s",
            str(ignored).lower(),
            len(unmerged),
            ", ".join(unmerged[:5]),
        )


def _unmerged(tree: dict[str, Any]) -> list[str]:
    """Returns the tokens of the vocabulary that merges do not make."""
    from tokenizers.models import BPE

    model = tree["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = BPE(vocab=model["vocab"], merges=merges, unk_token=model.get("unk_token"))
    return [token for token in _words(tree) if len(bpe.tokenize(token)) != 1]


def _words(tree: dict[str, Any]) -> list[str]:
    """Returns the tokens that are made of ordinary text: neither added ones nor bytes of SentencePiece's BPE."""
    apart = {token["content"] for token in tree["added_tokens"]} | _BYTES
    return [token for token in tree["model"]["vocab"] if token not in apart]


def _warn_of_added_tokens(tree: dict[str, Any], has_normalizers: bool) -> None:
    """Logs the tokens that are found in text only with, or without, what stands around them."""
    flags = ["lstrip", "rstrip", "single_word"] + ["normalized"] * has_normalizers
    odd = {token["content"]: flag for token in tree["added_tokens"] for flag in flags if token.get(flag)}
    if odd:
        log.warning(
            "tokenizer.json: llama.cpp does not know lstrip, rstrip, single_word and normalized; text around %d added "
            "tokens may become other tokens: %s",
            len(odd),
            ", ".join(f"{content} ({flag})" for content, flag in list(odd.items())[:5]),
        )
