"""generate and chat: the tokens and the text of transformers, and one line for what cannot be."""

import io
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolseek.checkpoint.hub import save
from smolseek.cli import main
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.text import KINDS, kind_of_tokenizer

PROMPT = "Anna sees a b"


def folder_of(path, kind, make=tiny_v3, **config):
    tokenizer = kind_of_tokenizer(kind)
    model = make(vocab_size=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=1, **config)
    if kind == "sentencepiece":
        model.lm_head.weight.data[3:259] = 0  # no single bytes, which are seldom text
    save(model if make is tiny_v3 else StockModel(model), path, tokenizer_from=tokenizer)
    return path


def said(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def stock(folder, prompt, tokens):
    """The ids of a prompt and of its greedy continuation, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer, ids[0].tolist(), whole[0].tolist()


@pytest.mark.parametrize("make", [tiny_v3, tiny_llama])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_transformers(kind, make, tmp_path, capsys):
    folder = folder_of(tmp_path / "m", kind, make)
    tokenizer, ids, whole = stock(folder, PROMPT, 12)
    options = (folder, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 12)
    found = json.loads(said(capsys, "generate", *options, "--json"))
    assert found["prompt_tokens"] == len(ids)
    before = tokenizer.decode(ids, skip_special_tokens=True)
    wanted = tokenizer.decode(whole, skip_special_tokens=True)
    assert wanted.startswith(before) and found["text"] == wanted[len(before) :]
    assert said(capsys, "generate", *options).startswith(PROMPT + found["text"])


def test_a_text_ends_where_generation_config_or_config_says(tmp_path, capsys):
    folder = folder_of(tmp_path / "m", "adds")
    _, ids, whole = stock(folder, PROMPT, 8)
    new = whole[len(ids) :]
    place = next(place for place in range(1, len(new)) if new[place] not in new[:place])
    end = new[place]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    options = (folder, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 8, "--json")
    assert stock(folder, PROMPT, 8)[2] == [*ids, *new[: place + 1]]
    assert json.loads(said(capsys, "generate", *options))["new_tokens"] == place
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [end]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert json.loads(said(capsys, "generate", *options))["new_tokens"] == place


def test_one_newline_at_the_end_of_a_file_or_of_standard_input_is_no_text(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    options = ("--max-new-tokens", 1, "--json")
    for text in (PROMPT, PROMPT + "\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        (tmp_path / "prompt.txt").write_text(text)
        assert json.loads(said(capsys, "generate", folder, *options))["prompt"] == PROMPT
        file = json.loads(said(capsys, "generate", folder, "--prompt-file", tmp_path / "prompt.txt", *options))
        assert file["prompt"] == PROMPT
    assert json.loads(said(capsys, "generate", folder, "--prompt", PROMPT + "\n", *options))["prompt"] == PROMPT + "\n"


def test_a_terminal_is_told_that_a_prompt_is_awaited(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    for terminal in (True, False):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
        monkeypatch.setattr("sys.stdin.isatty", lambda terminal=terminal: terminal)
        assert main(["generate", str(folder), "--max-new-tokens", "1"]) == 0
        assert ("[type the prompt" in capsys.readouterr().err) == terminal


def test_libraries_say_nothing_on_the_terminal(tmp_path):
    """transformers warns of arguments that it will drop one day; a user can do nothing about it."""
    folder = folder_of(tmp_path / "m", "adds", tiny_llama)
    command = [sys.executable, "-m", "smolseek", "generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.stderr.startswith("[") and done.stderr.count("\n") == 1


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_prompts_that_are_no_text_are_refused(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    (tmp_path / "prompt.txt").write_bytes("café".encode("latin-1"))
    assert "prompt.txt" in refusal(capsys, "generate", folder, "--prompt-file", tmp_path / "prompt.txt")
    for verb, errors in itertools.product(("generate", "chat"), ("surrogateescape", "strict")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors=errors))
        assert "standard input: not UTF-8" in refusal(capsys, verb, folder, "--max-new-tokens", 8)


def test_tokens_beyond_the_model_are_one_line(tmp_path, capsys):
    folder = folder_of(tmp_path / "m", "adds")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(300)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert "tokens 512" not in said(capsys, "generate", folder, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert "token 599: the model has 512" in refusal(
        capsys, "generate", folder, "--prompt", "<extra299>", "--max-new-tokens", 1
    )


TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + '\n' }}{% endfor %}"


def chat(monkeypatch, folder, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main(["chat", str(folder), "--temperature", "0", *map(str, options)])


def test_a_long_chat_forgets_its_oldest_turns(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    assert chat(monkeypatch, folder, ["Anna sees a ball and the cat."] * 4, "--max-new-tokens", 8) == 0
    assert "[the oldest turn is forgotten: the model reads 56 tokens]" in capsys.readouterr().err
    lines = ["Anna sees.", "Ben likes.", "Anna " * 25]
    assert chat(monkeypatch, folder, lines, "--max-new-tokens", 8) == 0
    assert "turns are forgotten: the model reads 56 tokens]" in capsys.readouterr().err


def test_a_line_that_is_too_long_is_left_out_and_the_chat_goes_on(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    assert chat(monkeypatch, folder, ["Anna sees a ball.", "Ben."], "--max-new-tokens", 8) == 0
    without = capsys.readouterr()
    assert chat(monkeypatch, folder, ["Anna sees a ball.", "Anna " * 60, "Ben."], "--max-new-tokens", 8) == 0
    said = capsys.readouterr()
    assert said.out.replace("> ", "") == without.out.replace("> ", "")
    assert re.fullmatch(r"\[this line is left out: it has \d+ tokens, and the model reads 56\]\n", said.err)


def test_a_chat_needs_room_for_a_line(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    assert chat(monkeypatch, folder, ["Anna"], "--max-new-tokens", 64) == 2
    assert "--max-new-tokens 64: the model has 64 positions; lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message is needed') }}", "{% for m in messages %}{{ m.content }"]
)
def test_a_chat_template_that_fails_is_one_line(template, tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "m", "adds")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert chat(monkeypatch, folder, ["hi"], "--max-new-tokens", 8) == 2
    error = capsys.readouterr().err
    assert "chat template" in error and error.count("\n") == 1
