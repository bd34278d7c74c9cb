"""Small texts and tokenizers made in code."""

import random
from functools import cache
from pathlib import Path
from typing import Any

from smolseek.data.tokenizer import train_tokenizer

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
