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


def test_numbers_as_they_are_written():
    assert parsed("plan", "builtin:base", "--cache", ".5", "--heal-tokens", "1_000").heal_tokens == 1000
    assert parsed("plan", "--cache", "1e-1", "builtin:base", "--seed", "-5").settings.cache == 0.1
    train = parsed("train", "--train.learning-rate-factors", "router", "0.5", "norms", "2", "--data.weights", "1", "2")
    assert train.train.learning_rate_factors == {"router": 0.5, "norms": 2} and train.data.weights == (1, 2)


def test_arguments_without_an_option():
    assert parsed("plan", "builtin:base").source == "builtin:base"


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
        *(
            (f"plan builtin:base --cache {wrong}", f"--cache {wrong}: must be a number")
            for wrong in ("50%", "0,5", "half")
        ),
        ("plan builtin:base --cache=half", "--cache half: must be a number"),
        (
            "plan --refine-steps 1e2 builtin:base",
            "--refine-steps 1e2: must be a whole number; see smolseek plan --help",
        ),
        ("plan builtin:base --heal-tokens 1M", "--heal-tokens 1M: must be a whole number; see smolseek plan --help"),
        ("plan builtin:base --heal-tokens none", "--heal-tokens none: must be a whole number"),
        ("generate builtin:base --temperature warm", "--temperature warm: must be a number"),
        ("train RECIPE --convert.cache 50%", "--convert.cache 50%: must be a number"),
        ("train --data.weights 1 x", "--data.weights x: must be a number"),
        ("convert builtin:base out --calibration-weights 50% 50%", "--calibration-weights 50%: must be a number"),
        (
            "train --train.learning-rate-factors router x",
            "--train.learning-rate-factors router x: must be names with a number behind each",
        ),
        ("chat builtin:base --prompt-file=x", "chat: takes no --prompt, --prompt-file, --samples or --json"),
        ("export half x.gguf", "export half: is no kind of file; write smolseek export gguf half x.gguf"),
        ("generate builtin:base --prompt -x", "--prompt: has no value; one that begins with - is written --prompt=-x"),
        ("generate builtin:base --prompt --seed 3", "Missing value for argument '--prompt'"),
        ("train --train.learning-rate-factors router", "must be names with a number behind each"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        parsed(*arguments.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("convert", "[OPTIONS] SOURCE OUT\n"),
        ("export", "[OPTIONS] gguf FOLDER OUT\n"),
        ("push", "[-h] FOLDER ID "),
        ("train", "Without one it is the quickstart"),
    ],
)
def test_help_names_what_is_put_without_an_option(verb, words, capsys):
    with pytest.raises(SystemExit):
        parsed(verb, "--help")
    assert words in capsys.readouterr().out


def test_help_of_chat_has_no_options_that_chat_refuses(capsys):
    with pytest.raises(SystemExit):
        parsed("chat", "--help")
    said = capsys.readouterr().out
    assert "--max-new-tokens" in said and not re.search("--(prompt|prompt-file|samples|json)\\b", said)
