"""Arguments as users write them, and one line for what cannot be read."""

import re

import pytest

from smolseek.cli import VERBS, parse_verb
from smolseek.config import recipes_folder

RECIPE = recipes_folder() / "smollm2-135m.yaml"


def parsed(*arguments):
    verb, *rest = [str(RECIPE) if argument == "RECIPE" else argument for argument in arguments]
    return parse_verb(VERBS[verb][0], verb, rest)


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_a_number_that_may_be_left_out_takes_none(word):
    assert parsed("train", "--train.patience", word).train.patience is None
    assert parsed("train", f"--train.balance-update-speed={word}").train.balance_update_speed is None
    assert parsed("plan", "builtin:base", "--cache", word).settings.cache is None
    assert parsed("generate", "builtin:base", "--top_k", word).top_k is None


def test_a_text_may_be_called_none():
    assert parsed("generate", "builtin:base", "--prompt", "none").prompt == "none"
    assert parsed("generate", "builtin:base", "--prompt", "top_k=none").prompt == "top_k=none"
    assert parsed("plan", "builtin:base", "--experts", "none").settings.experts == "none"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "train --train.mask-documents false",
            "--train.mask-documents false: takes no value; write --train.mask-documents or --train.no-mask-documents",
        ),
        ("train --train.mask_documents=False", "takes no value"),
        ("plan builtin:base --json true", "--json true: takes no value; write --json or --no-json"),
        ("train RECIPE --convert.calibration a --convert.calibration b", "is given twice"),
        ("train --data.train=a --data.train b", "--data.train: is given twice"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        parsed(*arguments.split())
    assert "\n" not in str(raised.value)
