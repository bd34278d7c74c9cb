"""What the fields of a config.json may hold. A value that breaks its rule is refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000
_OTHER_HEADS = re.compile("Classification|QuestionAnswering|Reward")
"""What the class names of models with another head than a language model's have in them."""


class Rule(NamedTuple):
    """Which values a field may have, as a check and in words behind "must be"."""

    holds: Callable[[Any], bool]
    words: str

    def or_null(self) -> Rule:
        """Returns a rule that holds for null too."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.words}, or null")


def whole_number(least: int, most: int) -> Rule:
    """Returns the rule of an integer between two bounds; 2.0 and true are none."""
    return Rule(lambda value: type(value) is int and least <= value <= most, f"an integer from {least:,} to {most:,}")


def number(least: float, most: float) -> Rule:
    """Returns the rule of a number between two bounds; true and NaN are none."""
    return Rule(
        lambda value: type(value) in (int, float) and least <= value <= most, f"a number from {least:g} to {most:g}"
    )


def decimal(least: float, most: float) -> Rule:
    """Returns the rule of a number that is written as a decimal, which transformers asks for in some fields."""
    words = f"a decimal number from {least:g} to {most:g}"
    return Rule(lambda value: type(value) is float and least <= value <= most, words)


SIZE = whole_number(1, LARGEST_SIZE)
LAYERS = whole_number(1, MOST_LAYERS)
FLAG = Rule(lambda value: type(value) is bool, "true or false")
TOKEN_ID = Rule(lambda value: type(value) is int, "an integer").or_null()


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_fields(config: Mapping[str, Any], rules: Mapping[str, Rule], *, where: str = "config.json") -> None:
    """Checks each field that has a rule; one that is not there counts as null. `where` begins the message.

    Raises:
        ValueError: a value breaks its rule.
    """
    for field, rule in rules.items():
        if not rule.holds(config.get(field)):
            value = shown(config.get(field))
            raise ValueError(f"{where}: {field} {value}: must be {rule.words}; fetch the file again")


def check_architectures(config: Mapping[str, Any], *, where: str = "config.json") -> None:
    """Checks that `architectures`, if it is there, names no model with another head. `where` begins the message.

    Raises:
        ValueError: it names a classifier, a reward model or a finder of answers.
    """
    named = config.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if _OTHER_HEADS.search(str(name)):
            raise ValueError(
                f"{where}: architectures {shown(name)}: no language model, as its head gives labels or scores; name a "
                "checkpoint of a ...ForCausalLM"
            )
