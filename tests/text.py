"""Small texts and tokenizers made in code."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from smolseek.data.tokenizer import END_OF_TEXT, train_tokenizer

ENTRIES = 300


def stories(count: int = 60, seed: int = 0) -> list[str]:
    """Short texts with some structure to learn, no two alike."""
    draw = random.Random(seed)
    names, verbs, things = (
        ["Anna", "Ben", "Carla", "Dan"],
        ["sees", "finds", "likes"],
        ["a ball", "the cat", "a red hat"],
    )
    return [
        " ".join(
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)} {number}."
            for _ in range(draw.randint(3, 12))
        )
        for number in range(count)
    ]


def write_stories(path: Path, count: int = 60, seed: int = 0) -> Path:
    """A .txt file of stories between <|endoftext|> separators."""
    path.write_text("\n<|endoftext|>\n".join(stories(count, seed)), encoding="utf-8")
    return path


@cache
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 entries, BOS and EOS in one."""
    return train_tokenizer(stories(), ENTRIES)


def kind_of_tokenizer(kind: str) -> Any:
    """A tokenizer that "adds" its BOS, "has" one and does not add it, has "none", or a "sentencepiece" that adds it.

    BOS and EOS are two tokens, of the tiny tokenizer's entries 0 and 1, where there are both.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tree = _sentencepiece() if kind == "sentencepiece" else json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind != "sentencepiece":
        tree = _with_two_specials(tree)
    if kind in ("adds", "sentencepiece"):
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
    if kind == "none":
        del special["bos_token"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **special)


def _with_two_specials(tree: dict[str, Any]) -> dict[str, Any]:
    """The tiny tokenizer with <s> and </s> in place of its end of text and of its rarest token."""
    rarest = max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    merges = [pair for pair in tree["model"]["merges"] if "".join(pair) != rarest]
    words = [word for word in tree["model"]["vocab"] if word not in (END_OF_TEXT, rarest)]
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *words])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": number, "content": word, **flags} for number, word in enumerate(("<s>", "</s>"))]
    return tree | {"added_tokens": added, "model": tree["model"] | {"vocab": vocabulary, "merges": merges}}


def _sentencepiece() -> dict[str, Any]:
    """A SentencePiece BPE of words in the stories, whose tokens carry the space in front of a word."""
    special = ["<s>", "</s>", "<unk>"]
    letters = sorted({letter for text in stories() for letter in text} - {" "})
    merges = [("▁", letter) for letter in letters] + [("a", "t"), ("s", "e"), ("▁a", "▁b")]
    words = [*special, *(f"<0x{number:02X}>" for number in range(256)), "▁", *letters, *map("".join, merges)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": word, **flags} for number, word in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges if "".join(pair) in vocabulary],
        },
    }


KINDS = ("adds", "has", "none", "sentencepiece")
"""The kinds of `kind_of_tokenizer`."""
